"""A text in the own format of each tool and reasoning parser of vLLM, and why some have none."""

from __future__ import annotations

from fusedstep.vllm_plugin.compat import release_of, vllm_version

JSON = '{"city": "Paris", "days": 3}'
CALL = f'{{"name": "get_weather", "arguments": {JSON}}}'
CALL_2 = '{"name": "get_weather", "arguments": {"city": "Rome", "days": 4}}'
QWEN = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
GLM = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
GLM_LINE = GLM.replace("\n", "")
HUNYUAN = GLM.replace("get_weather\n", "get_weather<tool_sep>\n")
PYTHONIC = '[get_weather(city="Paris", days=3), get_weather(city="Rome", days=4)]'


def _dsml(calls: str, invoke: str, parameter: str) -> str:
    return _wide(
        f'Let me look.\n\n<|DSML|{calls}>\n<|DSML|{invoke} name="get_weather">\n'
        f'<|DSML|{parameter} name="city" string="true">Paris</|DSML|{parameter}>\n'
        f'<|DSML|{parameter} name="days" string="false">3</|DSML|{parameter}>\n'
        f"</|DSML|{invoke}>\n</|DSML|{calls}>"
    )


def _wide(text: str) -> str:
    """With the bars of DeepSeek and Step: full width."""
    return text.replace("|", "\uff5c")


def _plamo(text: str) -> str:
    return text.replace("<", "<|plamo:").replace(">", ":plamo|>")


MUSE_CALL = (
    " to=user<|message|>I look.<|eom|><|start|>assistant to=get_weather<|message|>"
    '<atem:function_calls><atem:invoke name="get_weather"><atem:parameter name="city">Paris'
    '</atem:parameter><atem:parameter name="days">3</atem:parameter></atem:invoke>'
    "</atem:function_calls><|eot|>"
)
MUSE_THINKS = (
    " to=self<|message|>The sea is deep.<|eom|><|start|>assistant to=user<|message|>"
    "It is deep.<|eot|>"
)


TOOLS = {
    "apertus": f'I look. <|tools_prefix|>[{{"get_weather": {JSON}}}]<|tools_suffix|>',
    "deepseek_v3": _wide(
        "I look.<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>get_weather\n"
        f"```json\n{JSON}\n```<|tool▁call▁end|><|tool▁calls▁end|>"
    ),
    "deepseek_v31": _wide(
        f"I look.<|tool▁calls▁begin|><|tool▁call▁begin|>get_weather<|tool▁sep|>{JSON}"
        f"<|tool▁call▁end|><|tool▁call▁begin|>get_weather<|tool▁sep|>{JSON}<|tool▁call▁end|>"
        "<|tool▁calls▁end|>"
    ),
    "deepseek_v32": _dsml("function_calls", "invoke", "parameter"),
    "deepseek_v4": _dsml("tool_calls", "invoke", "parameter"),
    "deepseek_v41": _dsml(" calls", " invoke", " parameter"),
    "dots": (
        "<dots_function_call><invoke name=get_weather><parameter name=city>Paris</parameter>"
        "<parameter name=days>3</parameter></invoke></dots_function_call>"
    ),
    "ernie45": (
        f"I look.\n\n\n<tool_call>\n{CALL}\n</tool_call>\n\n<tool_call>\n{CALL_2}\n</tool_call>\n"
    ),
    "functiongemma": (
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,"
        "days:<escape>3<escape>}<end_function_call>"
    ),
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>',
    "gigachat3": f"I look.<|message_sep|>\n\nfunction call<|role_sep|>\n{CALL}",
    "glm45": GLM,
    "glm47": GLM_LINE,
    "granite": f"<|tool_call|>[{CALL}, {CALL_2}]",
    "granite-20b-fc": f"<function_call> {CALL}<function_call> {CALL_2}",
    "granite4": f"I look.<tool_call>{CALL}</tool_call>\n<tool_call>{CALL_2}</tool_call>",
    "hermes": f"I look.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL_2}\n</tool_call>",
    "hunyuan_a13b": f"<tool_calls>[{CALL}, {CALL_2}]</tool_calls>",
    "hy_v3": f"I look.<tool_calls>\n{HUNYUAN}\n</tool_calls>",
    "hy_v4": f"I look.<tool_calls>{GLM_LINE}</tool_calls>",
    "inkling": (
        "<|content_text|>I look.<|end_message|><|message_model|><|content_invoke_tool_json|>"
        f"{CALL.replace('arguments', 'args')}<|end_message|>"
    ),
    "internlm": f"I look.<|action_start|><|plugin|>\n{CALL.replace('arguments', 'parameters')}"
    "<|action_end|>",
    "jamba": f"I look. <tool_calls>[{CALL}, {CALL_2}]</tool_calls>",
    "k2_horizon": (
        "I look.<ifm|tool_calls><ifm|tool_call>get_weather<ifm|arg_key>city</ifm|arg_key>"
        "<ifm|arg_value>Paris</ifm|arg_value><ifm|arg_key>days</ifm|arg_key>"
        "<ifm|arg_value>3</ifm|arg_value></ifm|tool_call></ifm|tool_calls>"
    ),
    "kimi_k2": (
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "kimi_k3": (
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
        '<|open|>argument key="city" type="string"<|sep|>Paris<|close|>argument<|sep|>'
        '<|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>"
    ),
    "lfm2": f"<|tool_call_start|>{PYTHONIC}<|tool_call_end|>I look.",
    "ling3": GLM,
    "llama3_json": CALL.replace("arguments", "parameters"),
    "llama4_json": CALL.replace("arguments", "parameters"),
    "llama4_pythonic": f"<|python_start|>{PYTHONIC}<|python_end|>",
    "longcat": f"I look.\n<longcat_tool_call>\n{CALL}\n</longcat_tool_call>",
    "mimo": QWEN,
    "minicpm5": (
        'I look.<function name="get_weather"><param name="city">Paris</param>'
        '<param name="days">3</param></function>'
    ),
    "minimax_m2": (
        'I look.<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris'
        '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>'
    ),
    "minimax_m3": (
        'I look.]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">\n'
        "]<]minimax[>[<city>Paris]<]minimax[>[</city>\n]<]minimax[>[<days>3]<]minimax[>[</days>\n"
        "]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>"
    ),
    "mistral": f"I look.[TOOL_CALLS][{CALL}, {CALL_2}]",
    "muse": MUSE_CALL,
    "muse_glimmer": MUSE_CALL,
    "musespark1x": MUSE_CALL,
    "olmo3": (
        '<function_calls>get_weather(city="Paris", days=3)\nget_weather(city="Rome", days=4)'
        "</function_calls>"
    ),
    "openai": (
        "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary"
        f" to=functions.get_weather <|constrain|>json<|message|>{JSON}<|call|>"
    ),
    "phi4_mini_json": f"functools[{CALL}]",
    "plamo3": _plamo(
        "<begin_tool_requests><begin_tool_request><begin_tool_name>get_weather<end_tool_name>"
        "<begin_tool_arguments>"
    )
    + f"<|plamo:constrain|>json<|plamo:msg|>{JSON}"
    + _plamo("<end_tool_arguments><end_tool_request><end_tool_requests>"),
    "poolside_v1": f"I look.{GLM}",
    "pythonic": PYTHONIC,
    "qwen3_coder": f"I look.\n{QWEN}",
    "qwen3_json": f"I look.\n<tool_call>\n{CALL}\n</tool_call>",
    "qwen3_xml": f"I look.\n{QWEN}\n{QWEN}",
    "seed_oss": QWEN.replace("tool_call>", "seed:tool_call>"),
    "step3": _wide(
        "I look.<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>"
        '<steptml:invoke name="get_weather"><steptml:parameter name="city">Paris'
        '</steptml:parameter><steptml:parameter name="days">3</steptml:parameter></steptml:invoke>'
        "<|tool_call_end|><|tool_calls_end|>"
    ),
    "step3p5": f"I look.\n{QWEN}",
    "step5": f"I look.\n{QWEN}",
    "xlam": f"[{CALL}, {CALL_2}]",
}
THINK = "<think>The sea is\n deep.</think>It is deep."
REASONING = {
    "deepseek_r1": f"{THINK[:11]}\n{THINK[11:]}",
    "deepseek_v3": THINK,
    "deepseek_v4": THINK,
    "deepseek_v41": THINK,
    "ernie45": "The sea is deep.\n</think>\n\n<response>\nIt is deep.</response>\n",
    "gemma4": "<|channel>thought\nThe sea is deep.<channel|>It is deep.",
    "glm45": THINK,
    "glm47": THINK,
    "granite": "Here is my thought process: The sea. Here is not. Here is my response: It is deep.",
    "granite_thinking_parser": THINK,
    "holo2": THINK,
    "hunyuan_a13b": "<think>\nThe sea is deep.\n</think>\n<answer>\nIt is deep.\n</answer>",
    "hy_v3": THINK,
    "hy_v4": THINK,
    "inkling": (
        "<|content_thinking|>The sea is deep.<|end_message|><|message_model|>"
        "<|content_text|>It is deep.<|end_message|>"
    ),
    "k2_horizon": "<ifm|think>The sea is deep.</ifm|think>It is deep.",
    "kimi_k2": THINK,
    "kimi_k3": (
        "<|open|>think<|sep|>The sea is deep.<|close|>think<|sep|><|open|>response<|sep|>"
        "It is deep.<|close|>response<|sep|>"
    ),
    "ling3": THINK,
    "mimo": THINK,
    "minicpmv": THINK,
    "minimax_m2": "The sea is deep.</think>It is deep.",
    "minimax_m2_append_think": "The sea is deep.</think>It is deep.",
    "minimax_m3": "<mm:think>The sea is deep.</mm:think>It is deep.",
    "mistral": "[THINK]The sea is deep.[/THINK]It is deep.",
    "muse": MUSE_THINKS,
    "muse_glimmer": MUSE_THINKS,
    "musespark1x": MUSE_THINKS,
    "nemotron_v3": THINK,
    "olmo3": "<think>The sea is deep.</think>It is deep.",
    "openai_gptoss": (
        "<|channel|>analysis<|message|>The sea is deep.<|end|><|start|>assistant"
        "<|channel|>final<|message|>It is deep.<|return|>"
    ),
    "plamo3": _plamo("<begin_think>The sea is deep.<end_think>It is deep."),
    "poolside_v1": THINK,
    "qwen3": THINK,
    "seed_oss": THINK.replace("think>", "seed:think>"),
    "step3": "The sea is deep.</think>It is deep.",
    "step3p5": "<think>\nThe sea is deep.\n</think>\nIt is deep.",
    "step5": THINK,
}

# Parsers that cannot be made here, and what they say.
CANNOT = {
    "tool:cohere_command3": "requires the `cohere_melody` package",
    "tool:cohere_command4": "requires the `cohere_melody` package",
    "reasoning:cohere_command3": "requires the `cohere_melody` package",
    "reasoning:cohere_command4": "requires the `cohere_melody` package",
    "tool:beam": "requires `response_template` metadata in the tokenizer",
    "reasoning:beam": "requires `response_template` metadata in the tokenizer",
    "tool:hf": "requires `response_template` metadata in the tokenizer",
    "reasoning:hf": "requires `response_template` metadata in the tokenizer",
}
# Parsers that find nothing in a stream even one token at a time, and why. Compared all the same.
FIND_NOTHING = {
    "tool:phi4_mini_json": "vLLM's parser returns None for every delta",
    "reasoning:hunyuan_a13b": "looks for token ids of its own tokenizer",
    "reasoning:minimax_m2_append_think": "leaves the thoughts in the content, by its purpose",
}
# Parsers that lose or garble text when a delta has several tokens.
NEED_SINGLE_TOKENS = (
    "tool:deepseek_v3",
    "tool:deepseek_v31",
    "tool:ernie45",
    "tool:functiongemma",
    "tool:gigachat3",
    "tool:granite-20b-fc",
    "tool:granite4",
    "tool:internlm",
    "tool:step3",
    "reasoning:deepseek_r1",
    "reasoning:granite",
    "reasoning:olmo3",
)

NEW = ("beam", "muse", "musespark1x", "step5")  # parsers that vLLM 0.32 has not
if release_of(vllm_version() or "0.32") < (0, 33):
    for parser in NEW:
        for texts in (TOOLS, REASONING):
            texts.pop(parser, None)
        for kind in ("tool", "reasoning"):
            CANNOT.pop(f"{kind}:{parser}", None)
