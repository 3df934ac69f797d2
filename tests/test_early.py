"""What is known of vLLM's arguments before vLLM is imported."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusedstep.errors import ConfigError
from fusedstep.vllm_plugin.launch import early, sources

CLI = "from fusedstep.cli import main; main()"


@pytest.fixture
def taken() -> Any:
    """A port where somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def test_a_port_in_use_is_said_at_once(taken: str) -> None:
    """Before vLLM is imported, which alone takes ten seconds, and torch."""
    code = f"{CLI[:-7]}\ntry:\n    main()\nfinally:\n    import sys\n    print(*sys.modules)"
    for args in (["--port", taken], [f"--port={taken}"], ["--dtype", "float32", "--port", taken]):
        done = subprocess.run(
            [sys.executable, "-c", code, "serve", *args], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stderr == (
            f"error: cannot listen on 127.0.0.1:{taken} (Address already in use): "
            "choose another --host or --port\n"
        )
        assert not {"vllm", "torch"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "args",
    (
        ("--uds", "/tmp/x"),
        ("--config", "file.yaml"),  # it may name another port
        ("--port", "many"),  # vLLM's parser says what is wrong
    ),
    ids=" ".join,
)
def test_where_the_port_is_not_known_it_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, taken: str, args: tuple[str, ...]
) -> None:
    monkeypatch.setattr(early, "PORT", int(taken))
    early.check_server(args)
    with pytest.raises(ConfigError, match="cannot listen"):
        early.check_server(())
    with pytest.raises(ConfigError, match="cannot listen"):
        early.check_server((*args[:1], "x", "--port", taken) if "--config" in args else ())


def test_the_last_value_counts() -> None:
    args = ("--max_model_len", "3", "--seed", "--max-model-len=4")
    assert early.value_of(args, "--max-model-len") == "4"
    assert early.value_of(args, "--model") is None
    assert early.value_of(("--model",), "--model") is None


def test_a_plugins_options_are_left_to_vllms_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[Any]:
        return [SimpleNamespace(dist=SimpleNamespace(name=name)) for name in ("vllm", other)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    other = "fusedstep"
    with pytest.raises(ConfigError, match="no option --npu-speed"):
        sources.check_options(["--npu-speed"], server=True)
    other = "vllm-npu"
    sources.check_options(["--npu-speed"], server=True)


def test_a_vllm_that_we_cannot_read_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "read", lambda path: "")
    monkeypatch.setattr(sources, "option_names", sources.option_names.__wrapped__)
    monkeypatch.setattr(sources, "sampling_fields", sources.sampling_fields.__wrapped__)
    sources.check_options(["--no-such-option"], server=True)
    assert sources.sampling("x", {"no": "field"}) == {"no": "field"}


def model_of(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "args", "limit"),
    (
        ({"max_position_embeddings": 100}, (), 100),
        ({"max_position_embeddings": 100}, ("--max-model-len", "30"), 30),
        ({"max_position_embeddings": 100}, ("--max-model-len=1k",), None),
        ({"max_position_embeddings": 100}, ("--hf-overrides", "{}"), None),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "yarn"}}, (), None),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "default"}}, (), 100),
        ({"text_config": {"max_position_embeddings": 100}}, (), None),
    ),
    ids=str,
)
def test_context(
    tmp_path: Path, config: dict[str, Any], args: tuple[str, ...], limit: int | None
) -> None:
    """A number only where no request can pass it; vLLM's own is checked when it is known."""
    model = model_of(tmp_path, **config)
    assert early.context(model, args) == limit
    wanted = {"--input-len": 60, "--output-len": 41}
    if limit is None:
        early.check_lengths(model, args, wanted)
        return
    early.check_lengths(model, args, {"--input-len": limit - 1, "--output-len": 1})
    with pytest.raises(ConfigError, match=f"101 tokens do not fit .* of {limit}: shorten"):
        early.check_lengths(model, args, wanted)


def test_a_folder_is_a_model_or_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the folder is empty"):
        early.check_folder(str(tmp_path))
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        early.check_folder(str(tmp_path))
    for name in ("params.json", "x.gguf"):
        (tmp_path / name).write_text("")
        early.check_folder(str(tmp_path))
        (tmp_path / name).unlink()
    early.check_folder("org/model")  # the hub's
    early.check_folder("s3://bucket/a/b")


def test_drafting_methods_are_vllm_s() -> None:
    """All that vLLM takes, and nothing beside them that is not a word of its own types."""
    from typing import get_args

    from vllm.config.speculative import SpeculativeMethod

    def words(literal: object) -> set[str]:
        return {
            word
            for arg in get_args(literal)
            for word in ([arg] if isinstance(arg, str) else words(arg))
        }

    assert words(SpeculativeMethod) <= sources.drafting_methods()
    assert "no_such_method" not in sources.drafting_methods()


def test_drafts_are_dropped_from_options() -> None:
    from fusedstep.bench.latency import drop_speculation

    given = ("--dtype", "float32", "-sc", "{}", "--speculative-config={}", "--spec-tokens", "3")
    assert drop_speculation((*given, "--seed", "1")) == ("--dtype", "float32", "--seed", "1")
