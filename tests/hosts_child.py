"""What a host of ``two_hosts.py`` runs: a server, or the engine's other part.

    python hosts_child.py NUMBER '{"model": ..., "folder": ..., "stock": ..., "options": [...]}'

Host 0 asks its server and writes ``host0.json`` into the folder: the tokens, the counts of the
windows, the files of ours in its memory, and those that are left at its end. Host 1 runs until
then, and writes ``host1.json``: the files that were ever there, those that are left, and the counts
of an engine there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import serving
import two_hosts
from serving import FUSEDSTEP, Server, wait_for

from fusedstep.window.page import Page

LENGTHS = (150, 60, 90)
SECONDS = 120.0  # of a busy machine


def main(number: int, what: dict[str, Any]) -> None:
    os.environ |= {
        "VLLM_HOST_IP": two_hosts.ADDRESSES[number],
        "GLOO_SOCKET_IFNAME": two_hosts.DEVICE,
        "VLLM_CPU_OMP_THREADS_BIND": str(number),
        "VLLM_CPU_SIM_MULTI_NUMA": "0",  # see features_child.serve
        "VLLM_NO_USAGE_STATS": "1",
        "FUSEDSTEP_WINDOW_LATENCY_MS": "60000",  # a slow machine has long windows, too
    }
    serving.START_SECONDS *= 2  # one machine does the work of two
    folder = Path(what["folder"])
    words = [what["model"], *what["options"][number]]
    command = [FUSEDSTEP, "serve", *(["--stock"] if what["stock"] else ["--verbose"])]
    found = (second if number else first)(folder, words, command, what)
    deadline = time.monotonic() + two_hosts.SECONDS
    while (left := files()) and time.monotonic() < deadline:
        time.sleep(0.1)  # vLLM has killed who made them: fusedstep's guardian takes them away
    found["left"] = left
    (folder / f"host{number}.json").write_text(json.dumps(found))


def first(folder: Path, words: list[str], command: list[str], what: dict[str, Any]) -> Any:
    server = Server(folder / "host0.log", *words, command=command)
    try:
        server.wait_until_up()
        found: dict[str, Any] = {"tokens": ask(server, what["ranks"]), "counts": None}
        if not what["stock"]:
            wait_for("the counts are told", lambda: counts(server) is not None, SECONDS)
            time.sleep(2)  # until it has told of the last tokens
            found["counts"] = counts(server)
            (folder / "asked").touch()
            wait_for("host 1 has looked", (folder / "looked").exists, SECONDS)
        found["files"] = files()
        server.process.send_signal(signal.SIGINT)
        found["code"] = server.process.wait(SECONDS)
        return found
    finally:
        server.kill()
        (folder / "over").touch()


def second(folder: Path, words: list[str], command: list[str], _: dict[str, Any]) -> Any:
    """Nothing is asked here; it ends when somebody ends it."""
    seen: set[str] = set()
    with (folder / "host1.log").open("w") as log:
        process = subprocess.Popen([*command, *words], stdout=log, stderr=log)
    pages: list[Any] = []
    while not (folder / "over").exists():
        seen |= set(files())
        if (folder / "asked").exists() and not (folder / "looked").exists():
            pages = [page(name) for name in files() if name.endswith("-counts")]
            (folder / "looked").touch()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS)
    finally:
        process.kill()
    return {"files": sorted(seen), "counts": pages, "code": process.returncode}


def files() -> list[str]:
    return sorted(name for name in os.listdir("/dev/shm") if name.startswith("fusedstep"))


def page(name: str) -> Any:
    """The counts that an engine of this host writes into the file of this name."""
    return Page(name.removeprefix("fusedstep-")).read()


def ask(server: Server, ranks: int) -> list[list[int]]:
    """Three requests, to the engines in turn; two come when the first has a token."""
    begun = Event()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(complete, server, 0, 0, begun.set)]
        while not begun.wait(0.1) and not asked[0].done():
            pass
        asked += [pool.submit(complete, server, n, n % ranks) for n in (1, 2)]
        return [one.result() for one in asked]


def complete(
    server: Server, n: int, rank: int, begun: Callable[[], None] = lambda: None
) -> list[int]:
    """The tokens of request ``n``, as a stream brings them."""
    fields = {
        "model": "tiny",
        "prompt": list(range(10 + n, 30 + 5 * n)),
        "max_tokens": LENGTHS[n],
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", data=json.dumps(fields).encode(), headers=headers
    )
    tokens: list[int] = []
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        for line in answer:
            words = line.decode().removeprefix("data:").strip()
            if words and words != "[DONE]":
                for choice in json.loads(words)["choices"]:
                    tokens += choice.get("token_ids") or []
                    begun()
    return tokens


def counts(server: Server) -> Any:
    """What any of its API servers says of the windows; None before the first turn."""
    try:
        with urllib.request.urlopen(f"{server.url}/fusedstep/explain", timeout=30) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        assert error.code == 404, error
        return None


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
