"""``--html FILE``: what was measured as one page of pictures that needs nothing beside it.

The pictures are plotly's, as those of vLLM's own ``--plot-timeline``; its script is in the page.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fusedstep.bench import latency, serving_result
from fusedstep.bench.server import KINDS
from fusedstep.errors import ConfigError

COLOURS = {"stock": "#7f7f7f", "fusedstep": "#1f77b4"}
WAITING = {"stock": "#c7c7c7", "fusedstep": "#aec7e8"}  # until the first token
TIMES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "E2EL"}

Data = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One picture: plotly's traces and layout."""

    title: str
    note: str
    traces: list[Data]
    layout: Data


def check() -> None:
    """Raises ConfigError where plotly is not installed."""
    try:
        import plotly.offline  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--html needs plotly: pip install plotly (or fusedstep with its extra `report`)"
        ) from None


def of_latency(result: latency.Result) -> str:
    """The page of ``bench latency``."""
    figures = [
        Figure(
            "Time per decode step",
            "Every repeat is a point; the box is their quartiles. Lower is better.",
            _with_one_legend(_box(row) for row in result.rows),
            {
                "yaxis": _from_zero("ms per step"),
                "boxmode": "group",
            },
        ),
        Figure(
            "Throughput over batch size",
            "Of the median repeat; the bars are the extremes. Higher is better.",
            list(_throughput(result)),
            {
                "xaxis": {
                    "title": {"text": "batch size"},
                    "type": "log",
                    "tickvals": sorted({row.batch_size for row in result.rows}),
                },
                "yaxis": _from_zero("tokens/s"),
            },
        ),
    ]
    differing = [f"batch {row.batch_size}" for row, _ in result.pairs() if not row.same_tokens]
    notes = [f"Outputs differ at {', '.join(differing)}: no speed-up."] if differing else []
    return _page("fusedstep bench latency", result.env, figures, notes)


def _box(row: latency.Row) -> Data:
    point = f"batch {row.batch_size}, temperature {row.temperature:g}"
    return {
        "type": "box",
        "name": row.engine,
        "legendgroup": row.engine,
        "offsetgroup": row.engine,
        "x": [point] * len(row.repeats_ms),
        "y": list(row.repeats_ms),
        "boxpoints": "all",
        "marker": {"color": COLOURS[row.engine]},
    }


def _from_zero(title: str) -> Data:
    return {"title": {"text": title}, "rangemode": "tozero"}


def _with_one_legend(boxes: Iterable[Data]) -> list[Data]:
    """A name per engine, not per box."""
    named: set[str] = set()
    shown = []
    for box in boxes:
        shown.append({**box, "showlegend": box["name"] not in named})
        named.add(box["name"])
    return shown


def _throughput(result: latency.Result) -> Iterable[Data]:
    for temperature in dict.fromkeys(row.temperature for row in result.rows):
        for engine in KINDS:
            rows = [r for r in result.rows if (r.engine, r.temperature) == (engine, temperature)]
            tokens = [row.tokens_per_s for row in rows]
            best = [1e3 * row.batch_size / row.ms_per_step.min for row in rows]
            worst = [1e3 * row.batch_size / row.ms_per_step.max for row in rows]
            yield {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"{engine}, temperature {temperature:g}",
                "x": [row.batch_size for row in rows],
                "y": tokens,
                "error_y": _errors(tokens, worst, best),
                "line": {"color": COLOURS[engine], "dash": "dash" if temperature else "solid"},
            }


def _errors(values: list[float], low: list[float], high: list[float]) -> Data:
    return {
        "type": "data",
        "symmetric": False,
        "array": [b - a for a, b in zip(values, high, strict=True)],
        "arrayminus": [a - b for a, b in zip(values, low, strict=True)],
    }


def of_serving(result: serving_result.Result) -> str:
    """The page of ``bench serve``."""
    figures = [
        Figure(
            f"{words} of each request",
            "All requests of all repeats; the box is their quartiles. Lower is better.",
            _with_one_legend(_box_of_requests(row, name) for row in result.rows),
            {"yaxis": _from_zero("ms"), "boxmode": "group"},
        )
        for name, words in TIMES.items()
    ]
    figures.append(
        Figure(
            "Throughput over the load",
            "Medians of the repeats; the bars are the extremes. Higher is better.",
            [_bars_of_load(engine, result) for engine in KINDS],
            {
                "yaxis": _from_zero("output tokens/s"),
                "barmode": "group",
            },
        )
    )
    figures += [_timeline(row) for row in result.rows]
    return _page("fusedstep bench serve", result.env, figures, [])


def _load(row: serving_result.Row) -> str:
    return f"{row.rate:g} requests/s, {row.concurrency:g} at once"


def _box_of_requests(row: serving_result.Row, name: str) -> Data:
    values = [getattr(request, name) for request in row.requests]
    known = [value for value in values if value is not None]
    return {
        "type": "box",
        "name": row.engine,
        "legendgroup": row.engine,
        "offsetgroup": row.engine,
        "x": [_load(row)] * len(known),
        "y": known,
        "boxpoints": "all" if len(known) <= 200 else "outliers",
        "marker": {"color": COLOURS[row.engine], "size": 3},
    }


def _bars_of_load(engine: str, result: serving_result.Result) -> Data:
    rows = [row for row in result.rows if row.engine == engine]
    rates = [row.output_tokens_per_s for row in rows]
    medians = [rate.median for rate in rates]
    return {
        "type": "bar",
        "name": engine,
        "x": [_load(row) for row in rows],
        "y": medians,
        "error_y": _errors(medians, [rate.min for rate in rates], [rate.max for rate in rates]),
        "marker": {"color": COLOURS[engine]},
    }


def _timeline(row: serving_result.Row) -> Figure:
    """The requests of the first repeat as bars: until the first token, and then."""
    requests = sorted(
        (one for one in row.requests if one.repeat == 0 and one.ttft_ms is not None),
        key=lambda one: one.start_s,
    )
    began = min((one.start_s for one in requests), default=0.0)
    starts = [one.start_s - began for one in requests]
    first = [(one.ttft_ms or 0.0) / 1e3 for one in requests]
    rest = [one.e2el_ms / 1e3 - first[n] for n, one in enumerate(requests)]
    common = {"type": "bar", "orientation": "h", "y": list(range(len(requests)))}
    labels = [f"{one.output_tokens} tokens" for one in requests]
    return Figure(
        f"Requests: {row.engine}, {_load(row)}",
        "The first repeat. Light: until the first token.",
        [
            {
                **common,
                "name": "until the first token",
                "base": starts,
                "x": first,
                "marker": {"color": WAITING[row.engine]},
            },
            {
                **common,
                "name": "the others",
                "base": [a + b for a, b in zip(starts, first, strict=True)],
                "x": rest,
                "text": labels,
                "textposition": "none",
                "marker": {"color": COLOURS[row.engine]},
            },
        ],
        {
            "barmode": "overlay",
            "xaxis": {"title": {"text": "s"}},
            "yaxis": {
                "title": {"text": "request"},
                "autorange": "reversed",
                "showticklabels": False,
            },
        },
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }}
td {{ padding: 0 1.5em 0 0; vertical-align: top }}
.figure {{ height: 420px }}
</style>
<script>{script}</script>
</head>
<body>
<h1>{title}</h1>
{notes}
{figures}
<h2>Where and how</h2>
<table>{env}</table>
<script type="application/json" id="data">{data}</script>
<script>
JSON.parse(document.getElementById("data").textContent).forEach((figure, n) =>
  Plotly.newPlot("figure-" + n, figure.traces, figure.layout,
    {{responsive: true, displaylogo: false}}));
</script>
</body>
</html>
"""


def _page(title: str, env: Data, figures: list[Figure], notes: list[str]) -> str:
    from plotly.offline import get_plotlyjs

    escape = html.escape
    data: list[Data] = [
        {
            "traces": figure.traces,
            "layout": figure.layout | {"template": "none", "margin": {"t": 30}},
        }
        for figure in figures
    ]
    # A script ends at the first "</": no text of the data may have one.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return PAGE.format(
        title=escape(title),
        script=get_plotlyjs(),
        notes="\n".join(f"<p><strong>{escape(note)}</strong></p>" for note in notes),
        figures="\n".join(
            f"<h2>{escape(figure.title)}</h2>\n<p>{escape(figure.note)}</p>\n"
            f'<div class="figure" id="figure-{n}"></div>'
            for n, figure in enumerate(figures)
        ),
        env="".join(
            f"<tr><td>{escape(str(name))}</td><td>{escape(_words(value))}</td></tr>"
            for name, value in env.items()
        ),
        data=text,
    )


def _words(value: object) -> str:
    """Options as they were typed; all else as it is."""
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value)
