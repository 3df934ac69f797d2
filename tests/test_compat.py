"""What decodes in windows and what does not, and which settings win."""

import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedstep import processes
from fusedstep.errors import ConfigError, FusedStepError, UnsupportedError
from fusedstep.options import Options
from fusedstep.vllm_plugin import compat, reasons, register
from fusedstep.vllm_plugin.launch import wiring

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.33.4", "0.33.0+cpu"])
def test_supported_versions(monkeypatch, found):
    monkeypatch.setattr(compat, "vllm_version", lambda: found)
    assert compat.check_vllm_version() == found


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0", "1.0.0", None])
def test_other_versions_get_one_line(monkeypatch, found):
    monkeypatch.setattr(compat, "vllm_version", lambda: found)
    with pytest.raises(UnsupportedError, match="pip install") as error:
        compat.check_vllm_version()
    assert "\n" not in str(error.value)


def test_what_is_supported_is_what_passed():
    """The record holds what ran; the package asks for those versions and no others."""
    record = json.loads(compat.TRIED.read_text())
    for version, ran in record.items():
        assert ran["equality"]["passed"] > 0 and ran["equality"]["failed"] == 0, version
        assert set(ran) <= set(compat.WHOLE)
        assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", each["date"]) for each in ran.values())
    releases = sorted({compat.release_of(version) for version in record})
    (low, *_, high), (major, minor) = compat.SUPPORTED, compat.SUPPORTED[1]
    assert low == releases[0] and high == (major, minor)
    assert releases == [(major, n) for n in range(low[1], minor)]  # no hole
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = re.findall(r'"(vllm(?:-cpu)?>=[^";]+)', json.dumps(extras["optional-dependencies"]))
    wanted = f">={low[0]}.{low[1]},<{major}.{minor}"
    assert len(ranges) >= 2
    assert {each.removeprefix("vllm").removeprefix("-cpu") for each in ranges} == {wanted}


def test_options_of_an_engine(monkeypatch):
    def options(given, device_type="cpu"):
        device_config = SimpleNamespace(device_type=device_type)
        config = SimpleNamespace(additional_config=given, device_config=device_config)
        return compat.options(config)

    monkeypatch.delenv("FUSEDSTEP_DECODE_STEPS", raising=False)
    assert str(options({}).decode_steps) == "auto"
    monkeypatch.setenv("FUSEDSTEP_DECODE_STEPS", "9")
    assert str(options({}).decode_steps) == "9"
    assert str(options({"fusedstep": {"decode_steps": 5}}).decode_steps) == "5"
    assert options({"fusedstep": {"loop": "replay"}}, "cuda").loop == "replay"
    for wrong in ({"decode_steps": 0}, {"loop": "replay"}, {"steps": 3}):
        with pytest.raises(ConfigError):
            options({"fusedstep": wrong})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"temperature": 0.3, "top_p": 0.5, "logprobs": 20, "stop": ["x"], "n": 2}, None),
        ({"stop_token_ids": list(range(128))}, None),
        ({"stop_token_ids": list(range(129))}, "more than 128 stop token ids"),
    ],
)
def test_request_reasons(fields, reason):
    from vllm import SamplingParams

    assert reasons.request_reason(SamplingParams(**fields)) == reason


def test_a_request_without_sampling_takes_stock_steps():
    assert reasons.request_reason(None) == "pooling request"


def test_kv_caches_that_windows_know():
    """Alone, in several groups, and with a spec for each layer of a group."""
    from vllm.v1 import kv_cache_interface as kinds

    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full = kinds.FullAttentionSpec(**shape)
    sliding = kinds.SlidingWindowSpec(**shape, sliding_window=64)
    latent = kinds.MLAAttentionSpec(**shape)
    chunked = kinds.ChunkedLocalAttentionSpec(**shape, attention_chunk_size=64)

    def reason(*specs):
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        return reasons.cache_reason(SimpleNamespace(kv_cache_groups=groups))

    assert reason(full) is reason(full, sliding) is reason(latent) is None
    assert reason(full, chunked) == "KV cache of ChunkedLocalAttentionSpec"
    mixed = kinds.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": full, "b": chunked})
    assert reason(mixed) == "KV cache of ChunkedLocalAttentionSpec"


def test_tokens_below_a_sliding_window():
    """As many as vLLM's manager counts when it gives blocks back."""
    from vllm.v1 import kv_cache_interface as kinds
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

    from fusedstep.vllm_plugin.runner.tables import sliding_reach

    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full = kinds.FullAttentionSpec(**shape, sliding_window=64)  # all of whose blocks are kept
    sliding = kinds.SlidingWindowSpec(**shape, sliding_window=64, extra_retained_tokens=2)
    layers = kinds.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": sliding})
    reaches = [
        sliding_reach(SimpleNamespace(kv_cache_spec=spec)) for spec in (full, sliding, layers)
    ]
    assert reaches == [0, 65, 65]
    for position in (0, 64, 65, 66, 1000):
        skipped = SlidingWindowManager.get_num_skipped_tokens(sliding, position)
        assert max(skipped, 0) == max(position - 65, 0)


@pytest.mark.parametrize(
    ("worker_cls", "refused"),
    [
        (compat.WORKER_CLS, False),
        ("auto", True),
        ("vllm.v1.worker.gpu_worker.Worker", True),
    ],
)
def test_the_scheduler_refuses_a_foreign_worker(worker_cls, refused):
    from fusedstep.vllm_plugin.compat import refuse_foreign_worker

    config = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker_cls))
    if not refused:
        refuse_foreign_worker(config)
        return
    with pytest.raises(ConfigError, match="--worker-cls") as error:
        refuse_foreign_worker(config)
    assert "\n" not in str(error.value)


def test_options_are_no_part_of_the_key_of_compiled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others put into ``additional_config`` is."""
    from vllm.config import VllmConfig

    from fusedstep.vllm_plugin import compile_cache, rotation

    monkeypatch.setattr(VllmConfig, "compute_hash", VllmConfig.compute_hash)
    config = VllmConfig()

    def key(given: dict[str, object]) -> str:
        config.additional_config = given
        result = str(config.compute_hash())
        assert config.additional_config is given
        return result

    before = key({}), key({"x": 1})
    assert key({"fusedstep": {"loop": "eager"}}) not in before  # vLLM's own
    compile_cache.leave_options_out()
    compile_cache.leave_options_out()
    assert (key({}), key({"x": 1})) == before
    for loop in ("eager", "while"):
        assert key({"fusedstep": {"loop": loop}}) == before[0]
        assert key({"fusedstep": {"loop": loop}, "x": 1}) == before[1]
    # Another form of the model, which hand_over writes down.
    fused = key({"fusedstep": {"rope": "fused"}, rotation.FORM: "fused"})
    assert fused not in before


@pytest.mark.parametrize(
    ("value", "found", "is_on", "words"),
    (
        ("", "0.32.0", False, None),
        ("off", "0.32.0", False, None),
        ("off", "0.31.0", False, None),
        ("on", "0.32.0", True, None),
        (" On", "0.32.0", True, None),
        ("auto", "0.32.0", True, None),
        ("auto", "0.31.0", False, None),
        ("on", "0.31.0", True, "fusedstep needs vLLM >=0.32,<0.34, found 0.31.0"),
        ("yes", "0.32.0", False, "FUSEDSTEP must be on, auto or off, not 'yes'"),
    ),
)
def test_the_switch(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: str,
    found: str,
    is_on: bool,
    words: str | None,
) -> None:
    """A mistake ends any program of vLLM's, in one line; but a handler for errors gets it."""
    switched: list[bool] = []
    monkeypatch.setenv("FUSEDSTEP", value)
    monkeypatch.delenv("FUSEDSTEP_COMMAND", raising=False)
    monkeypatch.setattr(processes, "_command", None)  # another test's, in this process
    monkeypatch.setattr(compat, "vllm_version", lambda: found)
    monkeypatch.setattr(register, "_switch_on", lambda: switched.append(True))
    monkeypatch.setattr(register, "attention_backend", lambda _: None)
    assert compat.is_on() is is_on
    if words is None:
        register.register()
        assert bool(switched) is is_on
        return
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}") as error:
        register.register()
    assert isinstance(error.value, SystemExit) and error.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fusedstep: {words}") and err.count("\n") == 1
    monkeypatch.setenv("FUSEDSTEP_COMMAND", "/a/folder")  # our command prints its errors itself
    with pytest.raises(FusedStepError, match=f"^{re.escape(words)}") as error:
        register.register()
    assert not isinstance(error.value, SystemExit) and capsys.readouterr().err == ""


def test_vllm_plugins_may_leave_us_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, out in ((None, False), ("x,fusedstep", False), ("x", True), ("", True)):
        if allowed is None:
            monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("VLLM_PLUGINS", allowed)
        assert compat.is_left_out() is out
    with pytest.raises(ConfigError, match="VLLM_PLUGINS leaves fusedstep out: add fusedstep"):
        wiring.switch_on(Options.parse({}))
