"""Minutes of mixed load with clients that hang up and requests that are wrong; then a look around.

    python -m fusedstep.bench.soak --minutes 10 --json FILE [--stock] [--kill-worker] [MODEL] [...]

The load (``load.py``): completions and chats, streamed or not, of random lengths, with several
choices, logprobs, stop strings, JSON schemas, penalties; some clients hang up, some requests are
broken. Eight fixed requests, greedy or seeded, are asked again and again: each must give the text
it gave alone. That holds in float32, which is the default here; the other defaults are a small KV
cache and eight sequences, so that requests wait and are preempted, and windows of up to 250 ms.

Exit code 0 only if

* every request was answered as it should, or refused where it is wrong (status 4xx);
* no fixed request changed its text;
* afterwards nothing runs or waits and the KV cache is empty, according to /metrics;
* memory is flat: of the resident size of all the server's processes, the median in the last quarter
  of the load is at most ``GROWTH_MIB`` above that in the quarter before; the first half is warm-up
  (pools of Python fill, pages of the KV cache are touched for the first time). The server runs with
  ``VARIABLES``: without them stock vLLM grows as fast as fusedstep, by half a MiB a second;
* the log has no ERROR and no traceback;
* SIGINT ends the server with 0 or 130, and no process is left.

With ``--kill-worker`` the end is another: while clients stream, the process that holds the model is
killed (SIGKILL). Every client must see an error or the end of its stream within ``FAULT_SECONDS``,
the server must exit with another code than 0 within ``EXIT_SECONDS``, and no process may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NoReturn

import aiohttp
import psutil

from fusedstep import processes
from fusedstep.bench import progress as steps
from fusedstep.bench import result_file
from fusedstep.bench.environment import machine
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.server import Kind, Server, check
from fusedstep.bench.soak.load import Load, Wrong, hang_up_or_error
from fusedstep.errors import EXIT_CODE, INTERRUPTED, ConfigError, FusedStepError
from fusedstep.options import NAMES, Options, flag
from fusedstep.vllm_plugin.launch import sources

DEFAULTS = (
    *("--dtype", "float32", "--max-model-len", "768", "--max-num-seqs", "8"),
    *("--kv-cache-memory-bytes", str(40 << 20)),
)
WINDOW_LATENCY_MS = "250"
# So that resident memory is memory in use: glibc gives back what is freed, and oneDNN keeps few of
# the kernels that it makes for each number of rows (1024 by default: minutes of growth).
VARIABLES = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(256 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 10),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}
GROWTH_MIB = 16.0
SAMPLE_SECONDS = 0.5  # between two looks at the memory
SAMPLES_PER_WORD = 20  # from one line of progress to the next
IDLE_SECONDS = 20.0  # from the last answer until nothing runs and the KV cache is empty
FAULT_SECONDS = 15.0
EXIT_SECONDS = 30.0
BAD_LINE = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback \(most recent call last\)")


@dataclass
class Report:
    """Observations of a soak. Memory in MiB, times in seconds."""

    env: dict[str, Any]
    asked: dict[str, int]  # requests by kind
    ended: dict[str, int]  # those that ended as their kind should
    lost: int
    texts_changed: int
    problems: list[str]  # the first of them, in words
    tokens_per_event: float  # of streams
    preemptions: float
    rss_mib: dict[str, float]  # start, warm (third quarter), end (last quarter), growth
    left: dict[str, float]  # what /metrics still shows: {} is idle
    bad_lines: list[str]  # of the log, before the end
    exit_code: int | None  # None: it had to be killed
    processes_left: int
    killed: dict[str, Any] | None  # with --kill-worker: how its clients fared

    @property
    def faults(self) -> list[str]:
        """Faults, in words; [] is a soak that was passed."""
        growth = self.rss_mib["growth"]
        found = {
            f"{self.lost} requests did not end as they should": self.lost,
            f"{self.texts_changed} fixed requests changed their text": self.texts_changed,
            "no request of some kind ended": not (self.ended and all(self.ended.values())),
            f"memory grew by {growth:.0f} MiB": growth > GROWTH_MIB,
            f"the server is not idle: {self.left}": self.left,
            f"{len(self.bad_lines)} bad lines in the log": self.bad_lines,
            f"exit code {self.exit_code}": not self._ended_well(),
            f"{self.processes_left} processes are left": self.processes_left,
        }
        if self.killed is not None:
            untold = self.killed["clients"] - self.killed["told"]
            found[f"{untold} clients do not know of the kill"] = untold
        return [words for words, wrong in found.items() if wrong]

    def _ended_well(self) -> bool:
        if self.killed is None:
            return self.exit_code in (0, INTERRUPTED)
        return self.exit_code not in (0, None)


def soak(
    kind: Kind,
    seconds: float,
    options: Options,
    vllm_args: tuple[str, ...],
    *,
    clients: int = 12,
    seed: int = 0,
    kill_worker: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Start a server, load it for ``seconds``, end it, and report.

    Raises:
        ConfigError: the server does not start.
    """
    check(options, vllm_args)
    vllm_args = (*DEFAULTS, *vllm_args)
    progress.say(f"{kind}: starting the server")
    with Server(kind, options, vllm_args, VARIABLES) as server:
        server.wait_until_up()
        load = Load(server.url, _model(server), clients, seed)
        try:
            before = server.rss_bytes()
            samples = asyncio.run(_watched(load, server, seconds, progress))
            left = server.wait_until_idle(IDLE_SECONDS)
            preemptions = server.metrics()["vllm:num_preemptions_total"]
            started = server.processes()
            bad_lines = _bad_lines(server)
            killed = asyncio.run(_kill(load, server)) if kill_worker else None
        except (Wrong, OSError, aiohttp.ClientError) as error:
            problems = [*load.tally.problems[-3:], f"{type(error).__name__}: {error}"]
            raise FusedStepError(
                f"the soak broke off: {problems}; the log ends: {server.tail()}"
            ) from None
        if kill_worker:
            exit_code = _exit_code(server)
        else:
            exit_code = server.end(signal.SIGINT)
            bad_lines = _bad_lines(server)  # a clean end adds none
        _, alive = psutil.wait_procs(started, timeout=10)
        tally = load.tally
        load_of = {"engine": kind, "seconds": seconds, "clients": clients, "seed": seed}
        return Report(
            env=machine() | load_of | {"options": list(vllm_args)} | options.as_dict(),
            asked=dict(tally.asked),
            ended=dict(tally.ended),
            lost=tally.lost,
            texts_changed=tally.texts_changed,
            problems=tally.problems[:20],
            tokens_per_event=tally.stream_tokens / max(tally.stream_events, 1),
            preemptions=preemptions,
            rss_mib=_memory(before, samples),
            left=left,
            bad_lines=bad_lines[:20],
            exit_code=exit_code,
            processes_left=len(alive),
            killed=killed,
        )


def _bad_lines(server: Server) -> list[str]:
    return [line for line in server.log().splitlines() if BAD_LINE.search(line)]


def _memory(before: int, samples: list[int]) -> dict[str, float]:
    """Medians of the last two quarters; a load too short for samples has no growth."""
    quarter = max(len(samples) // 4, 1)
    warm = median(samples[-2 * quarter : -quarter] or samples or [before])
    end = median(samples[-quarter:] or [before])
    sizes = {"start": before, "warm": warm, "end": end, "growth": end - warm}
    return {name: size / (1 << 20) for name, size in sizes.items()}


async def _watched(load: Load, server: Server, seconds: float, progress: Progress) -> list[int]:
    """Run the load; resident bytes of the server, sampled while it lasts."""
    samples: list[int] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            samples.append(server.rss_bytes())
            if len(samples) % SAMPLES_PER_WORD == 0:
                _tell(load, samples, seconds, progress)

    watcher = asyncio.create_task(watch())
    try:
        await load.run(seconds)
    finally:
        watcher.cancel()
    return samples


def _tell(load: Load, samples: list[int], seconds: float, progress: Progress) -> None:
    """How it goes, and what there is so far."""
    tally, mib = load.tally, samples[-1] / (1 << 20)
    progress.say(
        f"{len(samples) * SAMPLE_SECONDS:.0f} of {seconds:.0f} s: {tally.asked.total()} requests, "
        f"{len(tally.problems)} problems, {mib:.0f} MiB"
    )
    progress.keep(
        {
            "asked": dict(tally.asked),
            "ended": dict(tally.ended),
            "texts_changed": tally.texts_changed,
            "problems": tally.problems[:20],
            "rss_mib": [round(size / (1 << 20), 1) for size in samples],
        }
    )


async def _kill(load: Load, server: Server) -> dict[str, Any]:
    """Kill the process with the model while clients stream; what each of them saw."""
    victim = max(server.processes()[1:], key=lambda process: process.memory_info().rss)
    streaming = [asyncio.Event() for _ in range(4)]
    clients = [asyncio.create_task(hang_up_or_error(load, event)) for event in streaming]
    await asyncio.wait_for(asyncio.gather(*(e.wait() for e in streaming)), FAULT_SECONDS)
    victim.kill()
    began = time.monotonic()
    done, waiting = await asyncio.wait(clients, timeout=FAULT_SECONDS)
    for task in waiting:
        task.cancel()
    saw = [task.result() for task in done]
    return {
        "clients": len(clients),
        "told": sum(word is not None for word in saw),
        "saw": [word for word in saw if word],
        "seconds": time.monotonic() - began,
    }


def _exit_code(server: Server) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return server.process.wait(EXIT_SECONDS)
    return None


def _model(server: Server) -> str:
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


def _parsed(argv: list[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Our options and the other arguments, checked as far as that takes no server."""
    parser = argparse.ArgumentParser(
        prog="soak", allow_abbrev=False, description=(__doc__ or "").partition("\n")[0]
    )
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", metavar="FILE", help="written every ten seconds")
    parser.add_argument("--clients", type=int, default=12, help="requests in flight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="stock vLLM, for comparison")
    parser.add_argument("--kill-worker", action="store_true", help="end with a fault")
    for name in NAMES:
        parser.add_argument(flag(name))
    args, vllm_args = parser.parse_known_args(argv)
    sources.check_options(vllm_args, server=True, ours=parser._option_string_actions)
    if not (0 < args.minutes < math.inf and args.clients > 0):
        raise ConfigError("--minutes and --clients must be numbers above 0")
    if args.json:
        result_file.check(args.json)
    return args, tuple(vllm_args)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 passed, 1 not, 2 it could not be run."""
    try:
        args, vllm_args = _parsed(argv)
        given = {name: getattr(args, name) for name in NAMES}
        given["window_latency_ms"] = given["window_latency_ms"] or WINDOW_LATENCY_MS
        report = soak(
            "stock" if args.stock else "fusedstep",
            60 * args.minutes,
            Options.parse(given, flag),
            vllm_args,
            clients=args.clients,
            seed=args.seed,
            kill_worker=args.kill_worker,
            progress=steps.to(args.json),
        )
        faults = report.faults
        result = {"complete": True, "passed": not faults, "faults": faults, **asdict(report)}
        if args.json:
            result_file.write(args.json, result)
    except FusedStepError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED
    print(result_file.as_json(result), end="")
    return 1 if faults else 0


if __name__ == "__main__":
    processes.interrupt_on_signals()
    sys.exit(main())
