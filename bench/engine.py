"""One vLLM engine in a process of its own, driven over a pipe.

Stock and fusedstep cannot share a process (vLLM picks its platform once), and a measurement
wants them side by side: an engine that is not being measured is stopped (SIGSTOP).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, Pipe
from typing import Any, Literal, Self

from fusedstep import processes
from fusedstep.bench import adapters
from fusedstep.bench.images import ImagePrompt
from fusedstep.bench.wanted import Wanted, sampling_params
from fusedstep.errors import ConfigError, FusedStepError
from fusedstep.options import Options
from fusedstep.vllm_plugin import compat, startup
from fusedstep.vllm_plugin.compat import SWITCH
from fusedstep.vllm_plugin.launch import arguments, wiring
from fusedstep.vllm_plugin.shared import counts_page

# stock: vLLM as it comes.  oracle: stock Model Runner V2 (on the CPU: with native kernels), the
# one whose random numbers ours are.  fusedstep: ours.
Kind = Literal["stock", "oracle", "fusedstep"]
END_SECONDS = 20.0
PROBE_CLS = "fusedstep.bench.probe.WorkerProbe"


class Engine:
    """Parent side. ``call`` runs a method of ``EngineServer`` in the child."""

    def __init__(
        self,
        kind: Kind,
        model: str,
        options: Options,
        vllm_args: tuple[str, ...] = (),
        wanted: Wanted | None = None,
        start_seconds: float | None = None,  # that the start may take; None: as long as it likes
    ) -> None:
        wiring.check(options)  # stock is often the first of two: do not start it for nothing
        self.kind = kind
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by ``close``)
        self.connection, child = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fusedstep.bench.engine", str(child.fileno())],
            pass_fds=(child.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            start_new_session=True,
        )
        child.close()
        try:
            self.call(
                "start",
                start_seconds,
                kind=kind,
                model=model,
                options=options,
                vllm_args=vllm_args,
                wanted=wanted or Wanted(),
            )
        except BaseException:
            self.close(at_once=True)
            raise

    def call(self, method: str, seconds: float | None = None, /, **kwargs: Any) -> Any:
        """Result of the child's method; its errors are raised here, in one line."""
        try:
            self.connection.send((method, kwargs))
            if seconds is not None and not self.connection.poll(seconds):
                raise FusedStepError(f"the {self.kind} engine: no answer in {seconds:.0f} s")
            ok, result = self.connection.recv()
        except (EOFError, ConnectionError):
            tail = self._log_tail()
            raise FusedStepError(f"the {self.kind} engine died; its log ends: {tail}") from None
        if not ok:
            raise ConfigError(f"the {self.kind} engine: {result}")
        return result

    def _log_tail(self, lines: int = 5) -> str:
        self.log.seek(0)
        return "".join(self.log.readlines()[-lines:])

    def stop_clock(self) -> None:
        """Take every thread of the engine off the cores."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """At once, whatever it does: one that hangs answers nothing."""
        processes.end_session(self.process.pid)  # but for what cleans up shared memory

    def close(self, *, at_once: bool = False) -> None:
        """End the engine and everything it started."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            self.go_on()
        if not at_once:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        processes.end_session(self.process.pid)
        self.process.wait()
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(at_once=error is not None)

    def _environment(self) -> dict[str, str]:
        switch = {"stock": "", "oracle": "oracle", "fusedstep": "on"}[self.kind]
        environment = dict(os.environ, VLLM_LOGGING_STREAM="ext://sys.stderr", **{SWITCH: switch})
        environment.setdefault("VLLM_NO_USAGE_STATS", "1")
        return environment | processes.environment()


class EngineServer:
    """Child side: owns the vllm.LLM."""

    drafted = accepted = 0  # tokens, of timed requests

    def start(
        self,
        kind: Kind,
        model: str,
        options: Options,
        vllm_args: tuple[str, ...],
        wanted: Wanted,
    ) -> None:
        compat.check_vllm_version()
        if kind == "fusedstep":
            wiring.switch_on(options)
        self.kind, self.adapters = kind, wanted.adapters
        with startup.one_line_errors(), wanted.checked():
            self._start(kind, model, options, vllm_args)

    def _start(self, kind: Kind, model: str, options: Options, vllm_args: tuple[str, ...]) -> None:
        parser = arguments.engine_parser()
        vllm_args = (*vllm_args, *adapters.options(self.adapters, vllm_args))
        args = arguments.parse(parser, [*vllm_args, "--model", model])
        arguments.check_model(args)
        given = {"worker_extension_cls": PROBE_CLS, **arguments.given(parser, args)}
        if given.get("speculative_config"):
            given = {"per_request_spec_decode_metrics": "summary"} | given
        if kind == "fusedstep":
            given = wiring.engine_options(options, given)
        else:
            given = wiring.cpu_defaults(given)
        import vllm

        self.llm = vllm.LLM(**given)

    def generate(
        self, prompts: list[Any], params: list[dict[str, Any]], *, timing: bool = False
    ) -> Any:
        """Outputs as plain dicts, or only the seconds it took when ``timing``."""
        sampling = [sampling_params(fields) for fields in params]
        prompts = [p.for_model(self.llm) if isinstance(p, ImagePrompt) else p for p in prompts]
        loras = adapters.in_turn(self.adapters, len(prompts)) if self.adapters else None
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras)
        if timing:
            seconds = time.perf_counter() - began
            self._count_drafts(outputs)
            return seconds, [o.outputs[0].token_ids for o in outputs]
        return [_plain(o) for o in outputs]

    def roll_out(self, prompts: list[Any], params: list[dict[str, Any]]) -> dict[str, Any]:
        """All requests to their end: when each ended, its tokens and their logprobs."""
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        final = {"output_kind": RequestOutputKind.FINAL_ONLY}
        sampling = [sampling_params(fields | final) for fields in params]
        ended: dict[int, tuple[float, Any]] = {}
        began = time.perf_counter()
        for number, (prompt, asked) in enumerate(zip(prompts, sampling, strict=True)):
            engine.add_request(str(number), prompt, asked)
        while engine.has_unfinished_requests():
            done = [output for output in engine.step() if output.finished]
            now = time.perf_counter() - began
            ended |= {int(output.request_id): (now, output.outputs[0]) for output in done}
        seconds = time.perf_counter() - began
        outputs = [ended[number][1] for number in range(len(prompts))]
        return {
            "seconds": seconds,
            "ended": tuple(ended[number][0] for number in range(len(prompts))),
            "rows": min(len(prompts), engine.vllm_config.scheduler_config.max_num_seqs),
            "tokens": tuple(tuple(o.token_ids) for o in outputs),
            "logprobs": tuple(_chosen_logprobs(o.token_ids, o.logprobs) for o in outputs)
            if all(o.logprobs is not None for o in outputs)
            else (),
        }

    def window_counts(self) -> Any:
        """Counts of our scheduler so far; None of stock's, or before any turn."""
        if self.kind != "fusedstep":
            return None
        return counts_page(self.llm.llm_engine.vllm_config, 0).read()

    def rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        """A method of the first worker."""
        return self.llm.collective_rpc(method, args=args)[0]

    def _count_drafts(self, outputs: list[Any]) -> None:
        for output in outputs:
            metrics = output.outputs[0].spec_decode_metrics
            if metrics is not None:
                self.drafted += metrics.num_draft_tokens
                self.accepted += sum(n * times for n, times in enumerate(metrics.histogram))

    def accepted_share(self) -> float | None:
        """Of the drafts of all timed requests; None without drafts."""
        return self.accepted / self.drafted if self.drafted else None

    def num_drafts(self) -> int:
        """Of a speculative round; 0 without speculative decoding."""
        config = self.llm.llm_engine.vllm_config.speculative_config
        return 0 if config is None else int(config.num_speculative_tokens)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ids: list[int] = self.llm.get_tokenizer().encode(text)
        return ids

    def vocab_size(self) -> int:
        return int(self.llm.llm_engine.model_config.get_vocab_size())


def _chosen_logprobs(token_ids: Any, logprobs: Any) -> tuple[float, ...]:
    return tuple(step[token].logprob for token, step in zip(token_ids, logprobs, strict=True))


def _plain(output: Any) -> dict[str, Any]:
    """A RequestOutput without vLLM's types."""
    return {
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "completions": [
            {
                "text": c.text,
                "token_ids": list(c.token_ids),
                "finish_reason": c.finish_reason,
                "stop_reason": c.stop_reason,
                "logprobs": c.logprobs
                and [{t: (lp.logprob, lp.rank) for t, lp in step.items()} for step in c.logprobs],
            }
            for c in output.outputs
        ],
    }


def serve(connection: Connection) -> None:
    """Answer calls until the parent closes the pipe."""
    server = EngineServer()
    while True:
        try:
            method, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(server, method)(**kwargs)))
        except Exception as error:
            traceback.print_exc()
            connection.send((False, startup.first_line(error)))


if __name__ == "__main__":
    processes.belong()
    serve(Connection(int(sys.argv[1])))
