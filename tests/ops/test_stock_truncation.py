"""Top-k and top-p on a GPU: our step against stock vLLM's own function, its kernels interpreted.

Our step calls that function, so the logits it draws from must be stock's, bit for bit. The child
(``interpret_truncation.py``) runs both on the stand-in GPU, which also refuses, while a step is
recorded, whatever would wait for the device.

The large vocabularies, with batches of either side of 64 rows (by hand, some minutes):

    pytest tests/ops/test_stock_truncation.py -m exhaustive
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from ops.interpret_truncation import Case, Found

from fusedstep.ops.reference import apply_top_k, apply_top_p, first_argmax

TESTS = Path(__file__).resolve().parent.parent
LIMITS = {
    "top-k": ([1, 5, 20, 50], [1.0] * 4),
    "top-p": ([0] * 4, [0.1, 0.5, 0.9, 0.95]),
    "both": ([5, 10, 20, 50], [0.3, 0.9, 0.8, 0.95]),
}
SMALL, LARGE = 4, 66  # batches: stock's top-p has kernels of its own up to 64 rows


def make_case(
    vocab_size: int, kind: str, limits: str, num_rows: int = SMALL, temperature: float = 1.0
) -> Case:
    """Rows with these limits in turn; a top_k of 0 is none."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 2 + 12
    if kind == "tied":
        logits = (logits * 2).round() / 2
    if kind == "bfloat16":
        logits = logits.bfloat16()
    top_k, top_p = ((values * num_rows)[:num_rows] for values in LIMITS[limits])
    params = {
        "top_k": [float(k or vocab_size) for k in top_k],
        "top_p": top_p,
        "temperature": [temperature] * num_rows,
    }
    return Case(f"{vocab_size} {kind} {limits} of {num_rows}", logits, params)


def mixed() -> Case:
    """Rows of all kinds in one batch: each is truncated by its own limits or not at all."""
    case = make_case(300, "tied", "both", 9)
    params = {
        "top_k": [5, 300, 20, 300, 300, 300, 40, 300, 7],
        "top_p": [1.0, 0.6, 0.7, 1.0, 1.0, 0.8, 0.9, 1.0, 1.0],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.1, 0.05, 0.3, 0.0, 0.2],
        "frequency_penalty": [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        "temperature": [1.0, 0.7, 0.8, 1.0, 1.0, 1.3, 1.0, 0.0, 0.5],
    }
    return Case("mixed", case.logits, params, idle=(5,), recorded=True)


def among_others(num_rows: int, vocab_size: int, kind: str) -> Case:
    """Two rows with top-p, in a batch of rows that take no step."""
    case = make_case(vocab_size, kind, "top-p", num_rows)
    top_p = [0.5, 0.9] + [1.0] * (num_rows - 2)
    params = case.params | {"top_p": top_p}
    return Case(f"top-p of {num_rows}", case.logits, params, idle=tuple(range(2, num_rows)))


def odd() -> Case:
    """Rows that stock's search does not resolve: it keeps more than k, or all."""
    logits = make_case(300, "float32", "both", 8).logits
    logits[0] = 3.0  # all equal
    logits[1, 4:] = -torch.inf  # fewer than k
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    logits[4, 100:] = -1e30  # the search's range is too long for its steps
    logits[5] = 1.0 + 1e-7 * logits[5]  # neighbours in float32
    logits[6, 17] = torch.nan
    logits[7] *= 1e-10  # neighbours that stock takes for equal
    params = {"top_k": [9.0] * 8, "top_p": [1.0, 0.9] * 4, "temperature": [1.0] * 8}
    return Case("odd", logits, params)


@cache
def cases() -> tuple[Case, ...]:
    return (
        make_case(1000, "tied", "top-k", temperature=0.7),
        make_case(5000, "tied", "both"),
        among_others(64, 1000, "bfloat16"),
        among_others(65, 64, "tied"),
        mixed(),
        odd(),
    )


def large_cases() -> tuple[Case, ...]:
    found = [make_case(64, "tied", limits, LARGE) for limits in LIMITS]
    for vocab_size in (4000, 32768, 152064):
        for kind in ("tied", "bfloat16", "float32"):
            found += [make_case(vocab_size, kind, limits) for limits in LIMITS]
    found.append(make_case(32768, "bfloat16", "top-p", LARGE))
    found.append(make_case(20000, "bfloat16", "both", LARGE, 0.7))
    return tuple(found)


def interpret(folder: Path, chosen: tuple[Case, ...]) -> dict[str, tuple[Case, Found]]:
    """By the name of the case."""
    torch.save(chosen, folder / "cases.pt")
    paths = [str(folder / name) for name in ("cases.pt", "results.pt")]
    command = [sys.executable, "-W", "ignore", "-m", "ops.interpret_truncation", *paths]
    done = subprocess.run(command, cwd=TESTS, env=os.environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(paths[1], weights_only=False)
    return {case.name: (case, found) for case, found in zip(chosen, results, strict=True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Found]]:
    return interpret(tmp_path_factory.mktemp("truncation"), cases())


def check(case: Case, found: Found) -> None:
    """Logits and tokens are stock's; a row with NaN has no best token."""
    vocab_size = case.logits.shape[1]
    for row in range(len(case.logits)):
        top_k, top_p = (case.params[name][row] for name in ("top_k", "top_p"))
        if row in case.idle or case.params["temperature"][row] == 0:
            top_k, top_p = vocab_size, 1.0
        assert int(found.top_k[row]) == top_k
        assert float(found.top_p[row]) == pytest.approx(top_p)
        if row in case.idle:
            assert int(found.tokens[row]) == -1
            continue
        if top_k < vocab_size or top_p < 1:
            torch.testing.assert_close(
                found.ours[row], found.stock[row], rtol=0, atol=0, equal_nan=True
            )
        scores = found.scores[row]
        if not scores.isnan().any():
            token = int(found.tokens[row])
            assert token == first_argmax(scores)
            logprob = case.logits[row].float().log_softmax(-1)[token]
            torch.testing.assert_close(
                found.logprobs[row], logprob, rtol=1e-5, atol=1e-5, equal_nan=True
            )
    assert found.replayed is None or torch.equal(found.replayed, found.tokens)


@pytest.mark.parametrize("name", [case.name for case in cases()])
def test_our_step_draws_from_stocks_logits(
    results: dict[str, tuple[Case, Found]], name: str
) -> None:
    check(*results[name])


def test_the_rule_of_a_sort_gives_other_tokens(results: dict[str, tuple[Case, Found]]) -> None:
    """The control: with that rule the tokens of tied rows are not stock's."""
    differ = {
        name for name, (_, found) in results.items() if not torch.equal(found.sort, found.tokens)
    }
    assert {"5000 tied both of 4", "odd"} <= differ


def test_no_rule_for_ties_is_stocks(results: dict[str, tuple[Case, Found]]) -> None:
    """Why our step calls stock's function: neither all that equal the k-th, nor the lowest ids."""
    case, found = results["5000 tied both of 4"]
    sort = case.logits.clone()
    for row, logits in enumerate(case.logits):
        limited = apply_top_k(logits, int(case.params["top_k"][row]))
        sort[row] = apply_top_p(limited, torch.tensor(case.params["top_p"][row]))
    assert not torch.equal(sort, found.stock)
    case, found = results["odd"]
    assert case.params["top_k"][0] == 9
    assert torch.equal(found.stock[0], case.logits[0])  # all equal: all are kept


@pytest.mark.exhaustive
def test_large_vocabularies(tmp_path: Path) -> None:
    for case, found in interpret(tmp_path, large_cases()).values():
        check(case, found)
