"""Every code block of the documentation says what it is, and every command in it is one.

Commands are read by their own parsers, vLLM's options by vLLM's. What runs besides:
``engine/test_examples.py`` runs the examples, the Python of the pages, requests by curl and vLLM's
own server, ``engine/test_wheel.py`` the commands of an installed wheel, ``engine/test_cli.py``
``verify``, ``engine/test_soak.py`` the soak.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from docs_blocks import LANGUAGES, ROOT, Block, Command, blocks, commands, documents

from fusedstep.bench.gpu_check.__main__ import command as gpu_check
from fusedstep.bench.pair import main as pair
from fusedstep.cli.main import group

BLOCKS = [block for page in documents() for block in blocks(page)]
COMMANDS = [command for page in documents() for command in commands(page)]

# Commands of others, by their first words: why they are not tried here.
OTHERS = {
    "git": "where the project is hosted is the reader's to know",
    "cd": "changes the folder for what follows",
    "curl": "tests/engine/test_examples.py sends the request",
    "bash": "tests/engine/test_examples.py runs the example",
    "pip install": "tests/engine/test_wheel.py installs the wheel",
    "python -m json.tool": "lays out an answer",
    "podman": "tests/test_container.py runs what it can of the Containerfile",
    "docker compose": "tests/engine/test_observability.py reads the file; nothing here can run it",
    "pre-commit": "runs what `make lint` runs (tests/test_doors.py)",
}
# vLLM's servers by name, as a reader may start them.
VLLM_SERVERS = (
    ("vllm", "serve"),
    ("python", "-m", "vllm.entrypoints.cli.main", "serve"),
    ("python", "-m", "vllm.entrypoints.openai.api_server"),
)
# Modules with a parser of their own, and whether they pass on what they do not know to vLLM.
MODULES = {
    "fusedstep.bench.soak": True,
    "fusedstep.bench.fleet": False,
    "scheduler.simulate": False,
}


class Parsed(Exception):
    """A module's parser has read its command line; ``rest`` is what it does not know."""

    def __init__(self, rest: list[str]) -> None:
        self.rest = rest


def _vllm_args(command: Command) -> tuple[str, Sequence[str]] | None:
    """What of a command goes to vLLM: which parser, and the words. Fails if it is no command."""
    words = list(command.words)
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] == "fusedstep" or words[:3] == ["python", "-m", "fusedstep"]:
        return _of_cli(words[1:] if words[0] == "fusedstep" else words[3:])
    for server in VLLM_SERVERS:
        if tuple(words[: len(server)]) == server:
            return "serve", words[len(server) :]
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
        _check_tests(words[1 if words[0] == "pytest" else 3 :])
    elif words[:3] == ["python", "-m", "fusedstep.bench.gpu_check"]:
        gpu_check.make_context("gpu_check", words[3:])
    elif words[:3] == ["python", "-m", "fusedstep.bench.pair"]:
        pair.make_context("pair", words[3:])
    elif words[:2] == ["python", "-m"] and words[2] in MODULES:
        return _of_module(words[2], words[3:])
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
    else:
        line = " ".join(words)
        known = any(line == other or line.startswith(f"{other} ") for other in OTHERS)
        assert known, f"{command.where}: who tries `{command}`? Say so in tests/test_docs.py"
    return None


def _of_cli(words: list[str]) -> tuple[str, Sequence[str]] | None:
    parsed: click.Command = group
    context = click.Context(group)
    name = "fusedstep"
    while isinstance(parsed, click.Group) and words:
        if words[0].startswith("-"):
            break
        name, *words = words
        found = parsed.get_command(context, name)
        assert found is not None, f"no command {name}"
        parsed = found
    if isinstance(parsed, click.Group):
        return None
    try:
        params = parsed.make_context(name, words).params
    except click.exceptions.Exit:  # --help
        return None
    return ("serve" if name == "serve" else "engine"), params.get("vllm_args", ())


def _of_module(name: str, words: list[str]) -> tuple[str, Sequence[str]] | None:
    original = argparse.ArgumentParser.parse_known_args

    def parse(self: Any, args: Any = None, namespace: Any = None) -> NoReturn:
        raise Parsed(original(self, args, namespace)[1])

    def refuse(self: Any, message: str) -> NoReturn:
        raise AssertionError(message)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        patch.setattr(sys, "argv", [name, *words])
        module = importlib.import_module(name)
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{name}.__main__")
        module.main()
    rest = parsed.value.rest
    assert MODULES[name] or not rest, rest
    return ("serve", rest) if rest else None


def _check_tests(words: list[str]) -> None:
    """Test files exist, and have the test that is named."""
    for word in words:
        path, _, name = word.partition("::")
        if path.startswith("tests"):
            assert (ROOT / path).exists(), f"there is no {path}"
            assert name.partition("[")[0] in ((ROOT / path).read_text() if name else "")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_block_says_what_it_is(block: Block) -> None:
    """``sh`` for commands, ``console`` for commands after "$ " and their output, ``text`` else."""
    assert block.language in LANGUAGES, f"a fence with one of {', '.join(LANGUAGES)} is wanted"
    if block.language == "python":
        compile(block.text, block.where, "exec")
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "text":
        begins = ("fusedstep ", "make ", "python ", "vllm ", "curl ", "pip ", ".venv/")
        assert not [line for line in block.text.splitlines() if line.startswith(begins)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}: {command}")
def test_command_is_one(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _vllm_args(command)


def test_the_reader_finds_what_there_is() -> None:
    found = {command.words[:2] for command in COMMANDS}
    assert {("make", "serve"), ("fusedstep", "verify"), ("fusedstep", "bench")} <= found
    assert {block.language for block in BLOCKS} >= {"sh", "python"}


@pytest.mark.parametrize(
    "line",
    ("fusedstep verfy", "fusedstep bench latency --batch-size x", "make serv", "rm -rf build"),
)
def test_what_is_no_command_is_found(line: str) -> None:
    with pytest.raises((AssertionError, click.ClickException)):
        _vllm_args(Command("here", tuple(line.split())))


# Reads [parser, words] pairs; prints what vLLM says to those it refuses.
CHILD = """
import json, sys
from fusedstep.errors import ConfigError
from fusedstep.vllm_plugin.launch import arguments
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parsers = {
    "engine": arguments.engine_parser(),
    "serve": make_arg_parser(FlexibleArgumentParser()),
}
wrong = []
for kind, words in json.loads(sys.argv[1]):
    try:
        arguments.parse(parsers[kind], words)
    except ConfigError as error:
        wrong.append(f"{' '.join(words)}: {error}")
print("RESULT" + json.dumps(wrong))
"""


def test_vllm_takes_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [args for command in COMMANDS if (args := _vllm_args(command)) and args[1]]
    assert len(given) > 3
    given.append(("serve", ["m", "--no-such-option"]))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    result = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    assert result is not None, done.stderr
    wrong = json.loads(result.removeprefix("RESULT"))
    assert [line.partition(":")[0] for line in wrong] == ["m --no-such-option"], wrong
