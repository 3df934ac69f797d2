"""The same requests through stock vLLM and through fusedstep, token for token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fusedstep.bench.adapters import Adapter
from fusedstep.bench.engine import Engine, Kind
from fusedstep.bench.images import ImagePrompt
from fusedstep.bench.progress import NO_PROGRESS, Progress
from fusedstep.bench.prompts import Request
from fusedstep.bench.wanted import Wanted
from fusedstep.options import Options
from fusedstep.vllm_plugin.launch import wiring

# Two engines that sum in another order differ by rounding: an argmax may then fall either way
# when the two best logits are this close (natural-log units).
NEAR_TIE = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05}

Verdict = Literal["identical", "near-tie", "DIFFERENT"]


@dataclass(frozen=True)
class Item:
    """The comparison of one request; ``at`` is the first token that differs."""

    prompt: str
    verdict: Verdict
    tokens: int
    at: int | None = None
    stock_token: int | None = None
    fusedstep_token: int | None = None
    top_logprobs: list[float] | None = None  # stock's two best at ``at``, where they are known


@dataclass(frozen=True)
class Report:
    """All comparisons of one run, how long the windows were, and what ran them."""

    oracle: Kind
    items: list[Item]
    steps_per_window_mean: float
    stock_steps: dict[str, int]
    ops: str | None
    loop: str
    num_drafts: int = 0  # of a speculative round

    def count(self, verdict: Verdict) -> int:
        return sum(item.verdict == verdict for item in self.items)

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items)

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": len(self.items),
            "identical": self.count("identical"),
            "near_tie": self.count("near-tie"),
            "different": self.count("DIFFERENT"),
            "tokens": self.tokens,
            "steps_per_window_mean": self.steps_per_window_mean,
            "oracle": self.oracle,
            "stock_steps": self.stock_steps,
            "ops": self.ops,
            "loop": self.loop,
            "num_drafts": self.num_drafts,
            "items": [asdict(item) for item in self.items],
        }


def verify(
    model: str,
    requests: list[Request],
    max_tokens: int,
    options: Options,
    dtype: str,
    vllm_args: tuple[str, ...],
    progress: Progress = NO_PROGRESS,
    adapters: tuple[Adapter, ...] = (),
) -> Report:
    """Run both engines, one after the other, and compare.

    Greedy requests are held against stock vLLM as it comes. Where a request samples, the oracle
    is stock vLLM's Model Runner V2: its random numbers are the ones that a seed promises. Requests
    take ``adapters`` in turn, and none. With speculative decoding both have the same drafter.
    """
    wiring.check(options)
    params = [{"max_tokens": max_tokens, "temperature": 0.0} | r.sampling for r in requests]
    for request_params in params:  # the gap between the two best, to judge a divergence
        request_params["logprobs"] = max(2, request_params.get("logprobs") or 0)
        if request_params["temperature"] > 0:
            request_params.setdefault("seed", 0)
    oracle: Kind = "oracle" if any(p["temperature"] > 0 for p in params) else "stock"
    prompts = [r.prompt if r.image is None else ImagePrompt(r.prompt, r.image) for r in requests]
    has_images = any(r.image is not None for r in requests)
    vllm_args = (*vllm_args, "--dtype", dtype)

    def asked(num_drafts: int) -> list[dict[str, Any]]:
        """Of ours: a request that asks for logprobs decodes in no speculative round."""
        ours = [dict(fields) for fields in params]
        for request, fields in zip(requests, ours, strict=True):
            if num_drafts and "logprobs" not in request.sampling:
                del fields["logprobs"]
        return ours

    def run(kind: Kind) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        progress.say(f"{kind}: starting the engine")
        wanted = Wanted(
            requests=list(zip(requests, params, strict=True)),
            images=has_images,
            adapters=adapters,
        )
        with Engine(kind, model, options, vllm_args, wanted) as engine:
            progress.say(f"{kind}: {len(prompts)} requests")
            num_drafts = engine.call("num_drafts")
            fields = asked(num_drafts) if kind == "fusedstep" else params
            outputs = engine.call("generate", prompts=prompts, params=fields)
            for request, output in zip(requests, outputs, strict=True):
                output["prompt"] = request.name
            stats = engine.call("rpc", method="window_stats") if kind == "fusedstep" else {}
            return outputs, stats | {"num_drafts": num_drafts}

    expected, _ = run(oracle)
    progress.keep({"oracle": oracle, "requests": len(expected), "expected": expected})
    actual, stats = run("fusedstep")
    gap = NEAR_TIE.get(dtype, NEAR_TIE["bfloat16"])
    return Report(
        oracle=oracle,
        items=[
            compare(want, have, completion, gap)
            for want, have in zip(expected, actual, strict=True)
            for completion in range(len(want["completions"]))
        ],
        steps_per_window_mean=stats["steps"] / max(stats["windows"], 1),
        stock_steps=stats["stock_steps"],
        ops=stats["ops"],
        loop=stats["loop"],
        num_drafts=stats["num_drafts"],
    )


def compare(want: dict[str, Any], have: dict[str, Any], completion: int, gap: float) -> Item:
    """One completion of stock's against ours."""
    stock, ours = want["completions"][completion], have["completions"][completion]
    prompt, tokens = want["prompt"] or "", len(stock["token_ids"])
    same_end = stock["finish_reason"] == ours["finish_reason"]
    if stock["token_ids"] == ours["token_ids"] and same_end:
        return Item(prompt, "identical", tokens)
    pairs = zip(stock["token_ids"], ours["token_ids"], strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return Item(prompt, "DIFFERENT", tokens, at=min(tokens, len(ours["token_ids"])))
    a, b = stock["token_ids"][at], ours["token_ids"][at]
    step = stock["logprobs"][at] if stock["logprobs"] else {}
    top = sorted((logprob for logprob, _ in step.values()), reverse=True)[:2]
    near = len(top) == 2 and top[0] - top[1] <= gap and {a, b} <= set(step)
    return Item(prompt, "near-tie" if near else "DIFFERENT", tokens, at, a, b, top)
