"""The examples, and what the pages show: Python, requests by curl, vLLM's own server.

One engine at a time: each takes GiBs, and another stream of tests has its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from docs_blocks import ROOT, Block, Command, blocks, commands, documents
from serving import SMALL, Server, wait_for

from fusedstep.explain import explain

EXAMPLES = ROOT / "examples"
PROMPT = "The capital of France is"
# Blocks that import nothing are fragments, which tests/test_docs.py compiles.
PYTHON = [
    block
    for page in documents()
    for block in blocks(page)
    if block.language == "python" and re.search(r"^\s*(from|import) ", block.text, re.MULTILINE)
]
HEALTH = Command("here", ("curl", "-s", "http://127.0.0.1:8000/v1/models"))
CURL = [HEALTH, *(c for page in documents() for c in commands(page) if c.words[0] == "curl")]
SERVERS = [
    command
    for page in documents()
    for command in commands(page)
    if "vllm.entrypoints.openai.api_server" in command.words or command.words[:1] == ("vllm",)
]
# Engine, scheduler and worker in one process: an import of vLLM less for each.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def _output(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | ENV | ONE_PROCESS,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def plain(tmp_path: Path, model: str) -> Iterator[Server]:
    """vLLM's own server; ``python`` is that of this environment."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDSTEP")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = ("bash", str(EXAMPLES / "plain_vllm.sh"), model)
    server = Server(tmp_path / "log", *SMALL, command=command, env=env)
    yield server
    server.kill()


def test_every_example_is_run() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    text = Path(__file__).read_text() + (Path(__file__).with_name("test_cli.py")).read_text()
    assert {name for name in names if f'"{name}"' not in text} == set()


def test_openai_client(server: Server) -> None:
    command = [sys.executable, str(EXAMPLES / "openai_client.py"), server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    chat, *tokens = done.stdout.splitlines()
    assert "Paris" in chat and len(tokens) == 4


@pytest.mark.parametrize("command", CURL, ids=str)
def test_request_of_a_page(server: Server, command: Command) -> None:
    """As curl would send it, to the session's server."""
    curl = argparse.ArgumentParser()
    curl.add_argument("url")
    curl.add_argument("-H", "--header", action="append", default=[])
    curl.add_argument("-d", "--data", "--json")
    for flag in ("-s", "-N", "-sN", "-sS"):
        curl.add_argument(flag, action="store_true")
    given = curl.parse_args(command.words[1:])
    path = urllib.parse.urlsplit(given.url if "://" in given.url else f"http://{given.url}").path
    headers = dict(line.split(": ", 1) for line in given.header)
    body = given.data.encode() if given.data else None
    request = urllib.request.Request(f"{server.url}{path}", body, headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        assert answer.status == 200 and answer.read()


def test_plain_vllm_of_the_pages_is_the_example() -> None:
    """The example is what runs; a page that shows the command shows that one."""
    script = Block("the example", "sh", (EXAMPLES / "plain_vllm.sh").read_text())
    text = script.text.replace('"${1:?MODEL}"', "MODEL").replace('"${@:2}"', "")
    example = next(
        line.partition("exec ")[2].split()
        for line in text.replace("\\\n", " ").splitlines()
        if "exec python" in line
    )
    for command in SERVERS:
        assert " ".join(example).replace("'", "") == " ".join(command.words), command.where


def test_plain_vllm_decodes_in_windows(plain: Server) -> None:
    plain.wait_until_up()
    with openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id
        answer = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=33, temperature=0, extra_body={"ignore_eos": True}
        )
    assert "Paris" in answer.choices[0].text
    wait_for("the counts are told", lambda: explain(plain.url).tokens == 33, 5)
    windows = explain(plain.url)
    assert 1 <= windows.windows < windows.steps == 32


def test_offline_batch(tmp_path: Path) -> None:
    *answers, stats = _output(tmp_path, str(EXAMPLES / "offline_batch.py")).splitlines()[-5:]
    assert f"{PROMPT!r} -> ' Paris" in answers[0]
    steps, windows = map(int, re.findall(r"\d+", stats))
    assert steps > 4 * windows > 0


def test_rl_rollout_samples_from_the_new_weights(tmp_path: Path) -> None:
    """Engine and trainer agree in every round, though training moved what they agree about."""
    rollout = ("--rounds=2", "--answers=2", "--max-tokens=8")
    said = _output(tmp_path, str(EXAMPLES / "rl_rollout.py"), *rollout)
    rounds = [line for line in said.splitlines() if "round" in line]
    found = [[float(x) for x in re.findall(r"\d\.\de[-+]\d+", line)] for line in rounds]
    assert len(found) == 2
    for differ, moved in found:
        assert differ < 1e-3 < 10 * differ + 1e-2 < moved, rounds


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_python_of_a_page(block: Block, tmp_path: Path, model: str) -> None:
    script = tmp_path / "block.py"
    script.write_text(re.sub(r'\bLLM\(\s*"[^"]*"', f'LLM("{model}"', block.text))
    assert _output(tmp_path, str(script)).strip()
