"""``--lora-modules`` of ``verify`` and ``bench latency``: errors before engines; a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from tiny_commands import SMALL, run

from fusedstep.bench import adapters
from fusedstep.bench.engine import EngineServer
from fusedstep.errors import ConfigError


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        tiny_models.make_adapter(number, tmp_path_factory.mktemp("lora") / f"adapter-{number}")
        for number in (1, 2)
    ]


def test_adapters_are_read_and_taken_in_turn(loras: list[str]) -> None:
    found = adapters.find([f"a={loras[0]}", "hub=org/adapter"])
    assert [(each.name, each.rank) for each in found] == [("a", 8), ("hub", None)]
    names = [request and request.lora_name for request in adapters.in_turn(found, 5)]
    assert names == ["a", "hub", None, "a", "hub"]
    given = ("--enable-lora", "--max-loras", "3", "--max-lora-rank", "8")
    assert adapters.options(found, ()) == given
    assert adapters.options(found, ("--max_loras=9", "--enable-lora")) == given[3:]
    assert adapters.options((), ()) == ()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["name"], "'name' is not NAME=PATH"),
        (["=x"], "'=x' is not NAME=PATH"),
        (["a=org/x", "a=org/y"], "a is given twice"),
        (["a=/nowhere/at/all"], "no adapter in /nowhere/at/all"),
        (["a=./org"], "no adapter in ./org"),
    ],
)
def test_what_is_no_adapter_is_told(words: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error) as told:
        adapters.find(words)
    assert "\n" not in str(told.value)


def test_an_adapter_without_a_rank_is_told(tmp_path: Path) -> None:
    for text in ("{}", "no JSON", "[]"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match="has no rank"):
            adapters.find([f"a={tmp_path}"])


def test_the_engine_is_asked_with_them(loras: list[str]) -> None:
    asked: list[Any] = []
    server = EngineServer()
    server.adapters = adapters.find([f"a={loras[0]}"])
    server.llm = SimpleNamespace(generate=lambda *_, **given: asked.append(given) or [])
    server.generate([[1]] * 3, [{}] * 3)
    [a, none, b] = asked[0]["lora_request"]
    assert a is b and (a.lora_name, a.lora_path) == ("a", loras[0]) and none is None
    server.adapters = ()
    server.generate([[1]], [{}])
    assert asked[1]["lora_request"] is None


@pytest.mark.parametrize("command", [("verify",), ("bench", "latency")], ids=" ".join)
def test_it_is_one_line_before_any_engine(command: tuple[str, ...]) -> None:
    done = run(*command, "m", "--lora-modules", "a=/nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --lora-modules: ") and done.stderr.count("\n") == 1


@pytest.mark.exhaustive  # two engines of a minute
def test_verify(loras: list[str], tmp_path: Path) -> None:
    """One prompt, with two adapters and with none, as stock vLLM answers it."""
    model = tiny_models.make("llama", tmp_path / "llama")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w17 w33 w700 w5\n" * 6)
    report = tmp_path / "report.json"
    named = [word for n, path in enumerate(loras) for word in ("--lora-modules", f"a{n}={path}")]
    args = ("--prompts", str(prompts), "--max-tokens", "24", "--json", str(report))
    done = run("verify", model, *args, *named, *SMALL)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(report.read_text())
    assert result["requests"] == 6 and result["different"] == 0
    assert result["steps_per_window_mean"] > 2
    assert set(result["stock_steps"]) == {"prefill"}
