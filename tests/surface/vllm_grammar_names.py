"""Everything of vLLM's structured output that its part in a window uses (of ``vllm_names.py``)."""

from __future__ import annotations

STRUCTURED = {
    "vllm.v1.structured_output": {
        "StructuredOutputManager": """
            _create_grammar
            _get_constraint_bounds(request, spec_tokens)
            _get_reasoner(request)
        """,
    },
    "vllm.v1.structured_output.backend_xgrammar": {"XgrammarGrammar": ""},
    "vllm.reasoning": {"ReasoningParser": ""},
    "vllm.reasoning.basic_parsers": {
        "BaseThinkingReasoningParser": "is_reasoning_end_streaming, end_token_id"
    },
    "vllm.parser.engine.adapters": {
        "ParserEngineReasoningAdapter": "reasoning_end_token_ids\nfind_reasoning_end(token_ids)"
    },
    "vllm.utils.torch_utils": {"async_tensor_h2d": "(data, out=_)"},
}
