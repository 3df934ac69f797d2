"""``fusedstep.LLM``: its arguments are told apart before an engine starts."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, sys
from fusedstep.llm import check_names
for names in json.loads(sys.argv[1]):
    try:
        check_names(names)
        print()
    except Exception as error:
        print(type(error).__name__, error)
"""
CASES = {
    ("max_model_len", "dtype", "enable_lora", "hf_overrides", "quantization"): "",
    ("max_modl_len",): "ConfigError LLM has no argument max_modl_len: did you mean max_model_len?",
    ("dtype", "decode_step"): (
        "ConfigError LLM has no argument decode_step: did you mean decode_steps?"
    ),
    ("xyzzy",): "ConfigError LLM has no argument xyzzy",
}


def test_a_wrong_name_is_told() -> None:
    """In a process of its own: vLLM's platform is chosen at import."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([list(names) for names in CASES])],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-len(CASES) :] == list(CASES.values())
