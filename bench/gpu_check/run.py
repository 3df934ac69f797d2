"""Runs the parts of ``gpu_check`` in order of value within the time limit; skips what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from fusedstep import processes
from fusedstep.bench.environment import machine
from fusedstep.bench.gpu_check import device as gpu_device
from fusedstep.bench.gpu_check import models as gpu_models
from fusedstep.bench.gpu_check.budget import LIMITS, Budget
from fusedstep.bench.gpu_check.equality import Batch, Outputs, differences, equality_batches
from fusedstep.bench.gpu_check.measure import (
    OURS,
    STOCK,
    Pair,
    Plan,
    Row,
    Start,
    measure_point,
    trace_point,
)
from fusedstep.bench.gpu_check.report import WORKS, FormReport, Report
from fusedstep.errors import ConfigError, FusedStepError
from fusedstep.loop_forms import LoopForm

AUTO = "auto"  # the form that an engine chooses, and proves, when it starts
NO_ANSWER = "no answer"
DEVICE = (sys.executable, "-m", "fusedstep.bench.gpu_check.device")
LOOP_COST = (sys.executable, "-m", "fusedstep.bench.kernels.loop_cost")
T = TypeVar("T")


class EnginesDied(FusedStepError):
    """Nothing more can be asked of this pair of engines, since a part of this ``kind``.

    ``time_is_up``: it was ended at the end of the run, which says nothing about it.
    """

    def __init__(self, reason: str, kind: str, *, time_is_up: bool) -> None:
        super().__init__(reason)
        self.kind, self.time_is_up = kind, time_is_up


class Check:
    """One run: parts in the order of their value; after each the report is written."""

    def __init__(
        self,
        plan: Plan,
        json_path: str | None,
        say: Callable[[str], None],
        open_pair: Callable[[gpu_models.Model, Plan, Start], Pair] = Pair,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.json_path, self.say = plan, json_path, say
        self.open_pair = open_pair
        self.budget = Budget(plan.minutes, clock)
        forms = {form: FormReport() for form in plan.forms}
        self.report = Report(forms, plan.on_gpu, _environment(plan))
        self._done: set[str] = set()
        self._form = ""  # that runs now
        self._harmful: set[str] = set()  # forms that brought engines down
        self._traces = plan.on_gpu  # until the profiler does that
        self._hangs = False  # does a WHILE node, on this GPU?
        # Without a GPU there are no graphs, hence no sizes: the first engines do for all forms.
        self._one_pair = AUTO in plan.forms and not plan.on_gpu

    def run(self) -> Report:
        """Every model gets an equal share of the time that is left when its turn comes."""
        with tempfile.TemporaryDirectory(prefix="models-", dir=processes.begin()) as folder:
            models = [gpu_models.load(name, Path(folder)) for name in self.plan.models]
            if len({model.name for model in models}) < len(models):
                raise ConfigError("--models: two of the same name")
            self._device()
            for index, model in enumerate(models):
                self.budget.divide(len(models) - index)
                self._as_served(model, first=index == 0)
                self._model(model, first=index == 0)
                if index == 0:
                    self.budget.divide(1)
                    self._loop_cost()
        self.report.complete = True
        self._write()
        return self.report

    def _device(self) -> None:
        """The checks that only a GPU can answer, each in a process of its own."""
        for name, check in gpu_device.CHECKS.items() if self.plan.on_gpu else ():
            work = partial(_in_a_process, (*DEVICE, name), self.budget.limit("device"))
            done = self._part("device", check.what, work)
            if done is None:
                self.report.device[check.what] = self.report.skipped[-1]["reason"]
                self._hangs |= self.report.device[check.what].startswith(NO_ANSWER)
            else:
                self.report.device[check.what] = WORKS

    def _as_served(self, model: gpu_models.Model, *, first: bool) -> None:
        """The engine that users start: its memory profile, all sizes, the proof; then its tokens,
        and what it gains. Where a WHILE node hangs, or the engine does not start with the form that
        it chooses, it is asked for the next one."""
        if AUTO not in self.plan.forms or AUTO in self._harmful:
            return
        known, name = self.report.forms[AUTO], model.name
        pair = None
        for loop in (LoopForm.REPLAY,) if self._hangs else (AUTO, LoopForm.REPLAY):
            how = Start(loop, as_served=True, seconds=self.budget.limit("start as served") / 2)
            start = partial(self.open_pair, model, self.plan, how)
            what = f"{name}: engines as users start them, --loop {loop}"
            if (pair := self._part("start as served", what, start)) is not None:
                break
            known.reason = self.report.skipped[-1]["reason"]
        if pair is None:
            return
        self._form = AUTO
        try:
            facts = self._part("facts", f"{name}: what runs", partial(_facts, pair), pair)
            if facts is not None:
                self.report.env["engines"][name] = facts
            stats = self._part(
                "facts", f"{name}: what auto is", partial(pair.ask, OURS, "window_stats"), pair
            )
            if stats is not None:
                known.ran, known.reason = stats["loop"], stats["loop_reason"]
            self._tokens(pair, [AUTO])
            self._times(pair, [AUTO])
            self._idle_shares(pair, [AUTO])
            if self._one_pair:
                self._all_forms(pair, self._others(), first=first)
        except EnginesDied as error:
            if error.kind == "trace":
                self._traces = False
            elif not error.time_is_up:
                self.report.forms[self._form or AUTO].fail(f"{name}: {error}")
                self._harmful.add(self._form or AUTO)
        finally:
            pair.close()
            self._write()

    def _model(self, model: gpu_models.Model, *, first: bool) -> None:
        """The other forms, of engines with few sizes, so that a form changes quickly. One that
        brings the engines down is left out from then on."""
        if self._one_pair:
            return
        while forms := [form for form in self._others() if form not in self._harmful]:
            how = Start(seconds=self.budget.limit("start"))
            start = partial(self.open_pair, model, self.plan, how)
            self._form = ""
            pair = self._part("start", f"{model.name}: engines for {', '.join(forms)}", start)
            if pair is None:
                return
            try:
                self._all_forms(pair, forms, first=first)
                return
            except EnginesDied as error:
                if error.time_is_up:
                    return
                if error.kind == "trace":
                    self._traces = False
                    continue
                if not self._form:
                    return
                self.report.forms[self._form].fail(f"{model.name}: {error}")
                self._harmful.add(self._form)
            finally:
                pair.close()
                self._write()

    def _others(self) -> list[str]:
        return [form for form in self.plan.forms if form != AUTO]

    def _all_forms(self, pair: Pair, forms: list[str], *, first: bool) -> None:
        """On the first model tokens come first; on others the times of the first form do.

        The requests that are timed are compared, too.
        """
        name = pair.model.name
        if name not in self.report.env["engines"]:
            facts = self._part("facts", f"{name}: what runs", partial(_facts, pair), pair)
            if facts is not None:
                self.report.env["engines"][name] = facts
        if not first:
            self._times(pair, forms[:1])
        self._tokens(pair, forms)
        self._times(pair, forms[:1])
        self._idle_shares(pair, forms[:1])
        self._times(pair, forms)
        self._idle_shares(pair, forms)

    def _tokens(self, pair: Pair, forms: list[str]) -> None:
        """Every form against stock, the simplest first."""
        batches = equality_batches(
            pair.model.vocab_size, self.plan.equality_requests, self.plan.equality_tokens
        )
        expected: list[Outputs] = []
        for form in reversed(forms):
            what = f"{pair.model.name}: tokens of {form}"
            self._with_form(pair, form, "equality", what, partial(self._compare, batches, expected))

    def _times(self, pair: Pair, forms: list[str]) -> None:
        """Every form and point; what runs as another form is measured once."""
        for form in self._distinct(pair, forms):
            for size in self.plan.batch_sizes:
                for temperature in self.plan.temperatures:
                    what = f"{pair.model.name}: {form}, batch {size}, temperature {temperature:g}"
                    work = partial(self._point, size, temperature)
                    self._with_form(pair, form, "point", what, work)

    def _distinct(self, pair: Pair, forms: list[str]) -> Iterator[str]:
        first: dict[str, str] = {}  # what ran -> the form that it stands for
        if any((row.model, row.form) == (pair.model.name, AUTO) for row in self.report.rows):
            first[self.report.forms[AUTO].ran] = AUTO
        for form in forms:
            ran = self.report.forms[form].ran or form
            if first.setdefault(ran, form) == form:
                yield form
            elif (what := f"{pair.model.name}: times of {form}") not in self._done:
                self._done.add(what)
                self._skip(what, f"runs as {ran}, like {first[ran]}")

    def _idle_shares(self, pair: Pair, forms: list[str]) -> None:
        """Traced last, because the profiler can crash an engine."""
        for form in self._distinct(pair, forms) if self._traces else ():
            for size in self.plan.batch_sizes:
                what = f"{pair.model.name}: trace of {form}, batch {size}"
                self._with_form(pair, form, "trace", what, partial(self._trace, size))

    def _with_form(
        self,
        pair: Pair,
        form: str,
        kind: str,
        what: str,
        work: Callable[[Pair, str], None],
    ) -> None:
        """A part, with the loop in the form that it is for."""
        if what in self._done or not self._fits(kind, what):
            return
        if self._form != form:
            self._form = form
            use = partial(pair.ask, OURS, "use_loop", form)
            switch = f"{pair.model.name}: {form} for '{what}'"
            stats = self._part("form", switch, use, pair)
            if stats is None:
                self._form = ""
                return
            known = self.report.forms[form]
            known.ran, known.reason = stats["loop"], stats["loop_reason"]
        self._part(kind, what, partial(work, pair, form), pair)

    def _compare(
        self, batches: list[Batch], expected: list[Outputs], pair: Pair, form: str
    ) -> None:
        """All batches of a form; ``expected`` is filled by the first that needs it."""
        if not expected:
            expected += [pair.outputs(STOCK, batch) for batch in batches]
        found = []
        for batch, want in zip(batches, expected, strict=True):
            have = pair.outputs(OURS, batch)
            found += differences(batch, want, have, self.plan.dtype, pair.stock_outputs)
        requests = sum(len(batch.prompts) for batch in batches)
        self.report.forms[form].add(pair.model.name, requests, found, proof=True)

    def _point(self, size: int, temperature: float, pair: Pair, form: str) -> None:
        known = self.report.forms[form]
        row, found = measure_point(pair, form, known.ran, size, temperature)
        self.report.rows.append(row)
        known.add(pair.model.name, size * (self.plan.repeats + 1), found)

    def _trace(self, size: int, pair: Pair, form: str) -> None:
        """Idle shares of stock and this form, into the greedy row of this batch size."""
        rows = self.report.rows
        for index, row in enumerate(rows):
            point = row.model, row.form, row.batch_size, row.temperature
            if point == (pair.model.name, form, size, 0.0):
                rows[index] = _traced(
                    row, trace_point(pair, STOCK, size), trace_point(pair, OURS, size)
                )

    def _loop_cost(self) -> None:
        """In a process of its own: what goes wrong there stays there."""
        if not self.plan.on_gpu:
            self.report.loop_cost_reason = "needs CUDA"
            return
        work = partial(_in_a_process, LOOP_COST, self.budget.limit("loop"))
        cost = self._part("loop", "cost of a step of the loop alone", work)
        if cost is not None:
            self.report.loop_cost_us, self.report.loop_cost_reason = json.loads(cost), ""

    def _part(
        self, kind: str, what: str, work: Callable[[], T], pair: Pair | None = None
    ) -> T | None:
        """Its result, or None where it does not fit or failed: the report says why.

        Raises:
            EnginesDied: and nothing more can be asked of ``pair``.
        """
        if not self._fits(kind, what):
            return None
        self.say(what)
        limit = self.budget.limit(kind)
        watchdog = threading.Timer(limit, pair.kill if pair is not None else lambda: None)
        watchdog.start()
        try:
            with self.budget.spending(kind):
                return work()
        except Exception as error:
            hangs = pair is not None and pair.killed
            reason = _no_answer(limit) if hangs else str(error) or type(error).__name__
            self._skip(what, reason)
            if pair is not None and not pair.alive():
                time_is_up = hangs and limit < LIMITS[kind]
                pair.kill()  # one waits for its dead, the other for nobody
                raise EnginesDied(reason, kind, time_is_up=time_is_up) from None
            return None
        finally:
            watchdog.cancel()
            self._done.add(what)
            self._write()

    def _fits(self, kind: str, what: str) -> bool:
        if self.budget.fits(kind):
            return True
        entry = {"part": what, "reason": f"no time left of {self.plan.minutes:g} minutes"}
        if entry not in self.report.skipped:
            self._skip(**entry)
        return False

    def _skip(self, part: str, reason: str) -> None:
        self.say(f"skipped: {part} ({reason})")
        self.report.skipped.append({"part": part, "reason": reason})

    def _write(self) -> None:
        if self.json_path is not None:
            self.report.write(self.json_path)


def _environment(plan: Plan) -> dict[str, Any]:
    env = machine() | {"cuda": torch.version.cuda, "plan": asdict(plan), "engines": {}}
    with suppress(PackageNotFoundError):
        env["triton"] = version("triton")
    return env


def _facts(pair: Pair) -> dict[str, Any]:
    kinds = {"stock": STOCK, "fusedstep": OURS}
    return {name: pair.ask(kind, "engine_facts") for name, kind in kinds.items()}


def _traced(row: Row, stock: dict[str, Any], ours: dict[str, Any]) -> Row:
    def side(name: str, trace: dict[str, Any]) -> Any:
        idle_by = trace["reason"] or "profiler"
        found = {"idle_share": trace["idle_share"], "longest": trace["longest"]}
        return replace(getattr(row, name), idle_by=idle_by, **found)

    return replace(row, stock=side("stock", stock), fusedstep=side("fusedstep", ours))


def _in_a_process(command: tuple[str, ...], seconds: float) -> str:
    """Returns what it prints. Killed after so many seconds; what goes wrong stays there."""
    environment = os.environ | processes.environment()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        raise FusedStepError(_no_answer(seconds)) from None
    if done.returncode != 0:
        raise FusedStepError((done.stderr.splitlines() or ["no output"])[-1])
    return done.stdout


def _no_answer(seconds: float) -> str:
    return f"{NO_ANSWER} in {seconds:.3g} s"
