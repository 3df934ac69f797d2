"""The attention backend FUSEDSTEP in real vLLM, interpreted, against stock's CPU attention."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fusedstep.bench.engine import Engine, Kind
from fusedstep.options import Options
from fusedstep.vllm_plugin.launch import wiring
from fusedstep.vllm_plugin.register import attention_backend

# The interpreter takes milliseconds for what a GPU does in microseconds: a small model.
SMALL = {"num_hidden_layers": 2, "vocab_size": 1024, "hidden_size": 192}
SMALL |= {"num_attention_heads": 3, "num_key_value_heads": 1}  # three queries a key, as it has
ARGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", "67108864", "--block-size", "32", "--load-format", "dummy"),
    *("--hf-overrides", json.dumps(SMALL), "--attention-backend", "FUSEDSTEP"),
)
PROMPTS = [{"prompt_token_ids": list(range(9, 9 + length))} for length in (1, 40, 5, 33, 3)]
IN_A_NEW_PROCESS = """
import pickle, sys
from fusedstep.vllm_plugin import compat, register
if len(sys.argv) == 1:
    register.register()
    register.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    sys.stdout.buffer.write(pickle.dumps([AttentionBackendEnum.FUSEDSTEP, "FLASH_ATTN"]))
else:
    found, other = pickle.load(sys.stdin.buffer)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    assert found is AttentionBackendEnum["FUSEDSTEP"], found
    assert found.get_path() == AttentionBackendEnum.CUSTOM.get_path() == compat.BACKEND_CLS
    assert "fusedstep.vllm_plugin.attention" not in sys.modules
    backend = found.get_class()
    words = backend.validate_configuration(
        64, sys.modules["torch"].float32, None, 32, True, False, False, False, False, None,
        "encoder_decoder", use_dcp=True,
    )
    print(backend.get_name(), *words, sep="; ")
"""


def test_tokens_equal_stock_vllm(device: str, model: str) -> None:
    """Prefills, decode steps in windows, and more requests than rows."""
    if device != "cpu" or not wiring.is_cpu_build():
        pytest.skip("vLLM's CPU build interprets the kernel; on a GPU `fusedstep verify` does this")
    params = [{"max_tokens": 7, "temperature": 0.0, "logprobs": 0, "ignore_eos": True}]

    def run(kind: Kind) -> tuple[list[dict[str, Any]], str]:
        with Engine(kind, model, Options.parse({"ops": "triton"}), ARGS) as engine:
            outputs = engine.call("generate", prompts=PROMPTS, params=params * len(PROMPTS))
            backend = "stock"
            if kind == "fusedstep":
                backend = engine.call("rpc", method="attention_backend")
                stats = engine.call("rpc", method="window_stats")
                assert stats["steps"] > stats["windows"] > 0
            return outputs, backend

    stock, _ = run("stock")
    ours, backend = run("fusedstep")
    assert backend == "FUSEDSTEP"
    for have, want in zip(ours, stock, strict=True):
        (have,), (want,) = have["completions"], want["completions"]
        assert have["token_ids"] == want["token_ids"] and len(have["token_ids"]) == 7
        for token, a, b in zip(want["token_ids"], have["logprobs"], want["logprobs"], strict=True):
            assert a[token][0] == pytest.approx(b[token][0], abs=1e-4)


def test_the_name_is_known_in_every_process() -> None:
    """Registered without importing attention; pickled for a process that has no plugins yet."""
    command = [sys.executable, "-c", IN_A_NEW_PROCESS]
    pickled = subprocess.run(command, capture_output=True, check=True, timeout=600).stdout
    done = subprocess.run([*command, "x"], input=pickled, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    name, *words = done.stdout.decode().strip().splitlines()[-1].split("; ")
    assert name == "FUSEDSTEP"
    assert words == [
        "MLA not supported",
        "attention type encoder_decoder not supported",
        "DCP not supported",
    ]


def test_a_cpu_takes_vllms_cpu_attention_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless the kernels are to be interpreted."""
    import torch
    import vllm.config
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from fusedstep.vllm_plugin.cpu.platform import FusedStepCpuPlatform, logger

    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cpu"),
        additional_config={"fusedstep": {"ops": "native"}},
    )
    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(logger, "propagate", True)
    selector = AttentionSelectorConfig(64, torch.float32, "auto", 16)
    asked = attention_backend("FUSEDSTEP")
    for backend, words in ((asked, "CPU_ATTN on this CPU"), (None, "")):
        caplog.clear()
        with caplog.at_level("WARNING", logger.name):
            path = FusedStepCpuPlatform.get_attn_backend_cls(backend, selector)
        assert path.endswith("CPUAttentionBackend")
        assert words in caplog.text and bool(words) == bool(caplog.text)
    config.additional_config["fusedstep"]["ops"] = "triton"
    assert FusedStepCpuPlatform.get_attn_backend_cls(asked, selector) == asked.get_path()
