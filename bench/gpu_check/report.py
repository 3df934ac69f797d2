"""The report of ``gpu_check``: what goes into the JSON, which targets it reaches, and tables."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from fusedstep.bench import result_file
from fusedstep.bench.gpu_check.equality import Difference, as_json
from fusedstep.bench.gpu_check.measure import Row, Side

WORKS = "works"
MAX_DIFFERENCES = 50  # listed per form; all are counted
# Ratio to stock, to be reached at every temperature: model, batch size, ratio.
RATIOS = (
    ("qwen3-0.6b", 1, 1.8),
    ("qwen3-0.6b", 64, 1.6),
    ("llama-3.2-1b", 1, 1.4),
    ("llama-3.1-8b", 1, 1.05),
)
LEAST_RATIO, MOST_IDLE, MOST_MS = 1.0, 0.03, ("qwen3-0.6b", 1, 0.8)
# What stock must run with on a GPU to be what we compare with.
STOCK = {
    "runner": "v2",
    "decode_graphs": "FULL",
    "async_scheduling": True,
    "attention": "FLASH_ATTN",
}


@dataclass
class FormReport:
    """One form that was asked for. ``equal`` is None until it has been compared."""

    ran: str = ""
    reason: str = ""
    equal: bool | None = None
    requests: int = 0
    near_ties: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, model: str, requests: int, found: list[Difference], *, proof: bool = False
    ) -> None:
        """One more comparison; only one that is made as a ``proof`` says that all are equal."""
        self.requests += requests
        self.near_ties += sum(difference.verdict == "near-tie" for difference in found)
        self.differences += [as_json(model, difference) for difference in found]
        if any(difference.verdict != "near-tie" for difference in found):
            self.equal = False
        elif proof and self.equal is None:
            self.equal = True

    def fail(self, reason: str) -> None:
        """It did not run to the end: nothing is proven."""
        self.equal, self.reason = False, reason


@dataclass
class Report:
    """Everything that is known so far; ``write`` may be called at any time."""

    forms: dict[str, FormReport]
    on_gpu: bool
    env: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    loop_cost_us: dict[str, Any] | None = None
    loop_cost_reason: str = "not measured"
    # What only a GPU can show: check -> "works", or why it does not.
    device: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    complete: bool = False  # the last part is done

    @property
    def equal(self) -> bool:
        """Has every form been compared, none found to differ, and has every check passed?"""
        compared = all(form.equal is True for form in self.forms.values())
        return compared and set(self.device.values()) <= {WORKS}

    def targets(self) -> list[dict[str, Any]]:
        return targets(self.rows, next(iter(self.forms)), self.on_gpu, self.lacking())

    def lacking(self) -> list[str]:
        """Models with which stock did not run as it should on a GPU."""
        if not self.on_gpu:
            return []
        return [
            f"{model}: stock ran with {name} {facts['stock'].get(name)}, not {wanted}"
            for model, facts in self.env["engines"].items()
            for name, wanted in STOCK.items()
            if facts["stock"].get(name) != wanted
        ]

    def as_dict(self) -> dict[str, Any]:
        forms = {name: asdict(form) for name, form in self.forms.items()}
        for form in forms.values():
            form["differences"].sort(key=lambda difference: difference["verdict"] == "near-tie")
            del form["differences"][MAX_DIFFERENCES:]
        return {
            "complete": self.complete,
            "equal": self.equal,
            "device": self.device,
            "forms": forms,
            "rows": [asdict(row) | {"ratio": row.ratio} for row in self.rows],
            "targets": self.targets(),
            "loop_cost_us": self.loop_cost_us,
            "loop_cost_reason": self.loop_cost_reason,
            "env": self.env | {"stock_lacks": self.lacking()},
            "skipped": self.skipped,
        }

    def write(self, path: str) -> None:
        """Whole or not at all: who kills us later finds the last one."""
        result_file.write(path, self.as_dict(), so_far=not self.complete)


def targets(rows: list[Row], form: str, on_gpu: bool, lacking: list[str]) -> list[dict[str, Any]]:
    """Each figure to reach, what the first form has, and whether that reaches it.

    ``reached`` is None where nothing says so: not measured, not on a GPU, or not against stock as
    it should be.
    """
    ours = [row for row in rows if row.form == form]

    def at(model: str, size: int) -> list[Row]:
        return [row for row in ours if (row.model, row.batch_size) == (model, size)]

    def ratio(chosen: list[Row]) -> float | None:
        """The worst; 0 where outputs differ."""
        return min((row.ratio or 0.0 for row in chosen), default=None)

    model, size, most_ms = MOST_MS
    idle = [row.fusedstep.idle_share for row in ours if row.fusedstep.idle_share is not None]
    ms = max((row.fusedstep.ms_per_step.p50 for row in at(model, size)), default=None)
    judged: list[tuple[str, float | None, str, float]] = [
        (f"{name} batch {n}: ratio to stock", ratio(at(name, n)), ">=", least)
        for name, n, least in RATIOS
    ]
    judged += [
        ("every point measured: ratio to stock", ratio(ours), ">=", LEAST_RATIO),
        ("every point traced: GPU idle share", max(idle, default=None), "<", MOST_IDLE),
        (f"{model} batch {size}: ms per step", ms, "<=", most_ms),
    ]
    return [
        {
            "target": f"{words} {sign} {limit:g}",
            "form": form,
            "value": value if on_gpu else None,
            "reached": _holds(value, sign, limit) if on_gpu and not lacking else None,
        }
        for words, value, sign, limit in judged
    ]


def _holds(value: float | None, sign: str, limit: float) -> bool | None:
    if value is None:
        return None
    return value >= limit if sign == ">=" else value < limit or (sign == "<=" and value == limit)


def print_report(report: Report) -> None:
    """Tables on stdout: forms, one per model, targets."""
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 160  # a file or a pipe has no edge to wrap at

    def table(title: str, *headings: str) -> Table:
        made = Table(title=title, title_justify="left")
        for heading in headings:
            made.add_column(heading)
        return made

    for check, found in report.device.items():
        out.print(f"{check}: {found}")
    for model, facts in report.env["engines"].items():
        for line in _memory(model, facts["fusedstep"].get("graph_memory") or {}):
            out.print(line)
    forms = table("Tokens against stock", "form", "ran", "equal", "requests", "near-ties", "reason")
    for asked, form in report.forms.items():
        equal = {None: "not compared", True: "yes", False: "NO"}[form.equal]
        counts = str(form.requests), str(form.near_ties)
        forms.add_row(asked, form.ran, equal, *counts, form.reason)
    out.print(forms)
    headings = ("engine", "batch", "temperature", "ms/step p50 [p20-p80]", "host ms/step", "idle")
    for model in dict.fromkeys(row.model for row in report.rows):
        shown = table(f"{model}, {report.env['device']}", *headings, "ratio")
        for row in report.rows:
            if row.model == model:
                point = str(row.batch_size), f"{row.temperature:g}"
                shown.add_row("stock", *point, *_cells(row.stock), "")
                unequal = "" if row.equal else "outputs differ"
                ratio = unequal if row.ratio is None else f"{row.ratio:.2f}"
                shown.add_row(row.ran, *point, *_cells(row.fusedstep), ratio)
        out.print(shown)
    judged = table("To reach on an H100", "target", "form", "value", "reached")
    for target in report.targets():
        value = "" if target["value"] is None else f"{target['value']:.3f}"
        reached = {None: "not measured", True: "yes", False: "NO"}[target["reached"]]
        judged.add_row(target["target"], target["form"], value, reached)
    out.print(judged)
    for name, cost in (report.loop_cost_us or {}).items():
        text = f"{cost['p50']:.1f} us per step" if isinstance(cost, dict) else cost
        out.print(f"loop alone, {name}: {text}")
    for line in report.lacking():
        out.print(f"NOT THE STOCK TO COMPARE WITH: {line}")


def _memory(model: str, taken: dict[str, int]) -> list[str]:
    """Memory that vLLM left free for the graphs of the windows, and what they took."""
    if not taken:
        return []
    words = ", ".join(f"{name} {size / (1 << 30):.2f} GiB" for name, size in taken.items())
    return [f"{model}: memory of the recorded windows: {words}"]


def _cells(side: Side) -> tuple[str, str, str]:
    spread = side.ms_per_step
    return (
        f"{spread.p50:.3f} [{spread.p20:.3f}-{spread.p80:.3f}]",
        "" if side.host_ms_per_step is None else f"{side.host_ms_per_step:.3f}",
        side.idle_by if side.idle_share is None else f"{side.idle_share:.1%}",
    )
