"""Requests that Model Runner V2 cannot hold are client errors (400), told before the engine."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from fusedstep.vllm_plugin import compat

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestState


def refuse_what_cannot_be_held() -> None:
    """Let every way into an engine of ours check its requests: API server, LLM and AsyncLLM."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    stock = InputProcessor.process_inputs
    if getattr(stock, "checks_limits", False):
        return

    @wraps(stock)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        from fusedstep.vllm_plugin import request_limits as limits

        request: EngineCoreRequest = stock(self, *args, **kwargs)
        if not compat.has_our_runner(self.vllm_config):
            return request
        params = request.sampling_params
        model: ModelConfig = self.model_config
        if params is not None:
            limits.fit_lengths(params, model.max_model_len)
        refused = limits.refusal(params, request.prompt_token_ids, model)
        refused = refused or next(limits.not_int64("priority", request.priority), None)
        message = (request.request_id, request.cache_salt, request.trace_headers, params)
        refused = refused or next(limits.no_message(*message), None)
        if refused is not None:
            raise VLLMValidationError(f"{refused.parameter} {refused.words}.")
        return request

    process_inputs.checks_limits = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def refuse_ids_in_use() -> None:
    """With VLLM_DISABLE_REQUEST_ID_RANDOMIZATION clients choose the ids, and may choose one twice.

    vLLM takes the second request for the end of the first one's input, and its engine dies.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.output_processor import OutputProcessor

    stock = OutputProcessor.add_request
    if getattr(stock, "checks_ids", False):
        return

    @wraps(stock)
    def add_request(
        self: OutputProcessor, request: EngineCoreRequest, *args: Any, **kwargs: Any
    ) -> None:
        there: RequestState | None = self.request_states.get(request.request_id)
        streamed = there and (there.streaming_input or there.input_chunk_queue is not None)
        if there is not None and not streamed:
            raise VLLMValidationError(f"request id {request.request_id} is in use.")
        stock(self, request, *args, **kwargs)

    add_request.checks_ids = True  # type: ignore[attr-defined]
    OutputProcessor.add_request = add_request
