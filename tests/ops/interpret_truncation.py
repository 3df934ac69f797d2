"""Steps with stock vLLM's own top-k and top-p, interpreted: ``interpret_truncation IN OUT``.

A process of its own, because the interpreter must be switched on before vLLM is imported, and
because vLLM here takes the stand-in GPU for an H100: its own function chooses the kernels and their
constants. IN is a list of ``Case``, OUT a list of ``Found``.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ops.world import World, build_world
from standin import graphs
from standin.modes import on_device

from fusedstep.ops.reference import apply_min_p, apply_penalties
from fusedstep.ops.types import BatchNeeds
from fusedstep.vllm_plugin.cpu import triton_stand_in
from fusedstep.window.arrivals import ArrivalCounter
from fusedstep.window.recorder import CudaRecorder

NUM_SMS = 132  # of an H100
NAME = "vllm.v1.sample.ops.topk_topp_triton"


@dataclass(frozen=True)
class Case:
    """Logits [n, V], and parameters of each row by their names in SamplingState."""

    name: str
    logits: torch.Tensor
    params: dict[str, list[float]]
    idle: tuple[int, ...] = ()  # rows that take no step
    recorded: bool = False


@dataclass(frozen=True)
class Found:
    """Of one case, row by row."""

    stock: torch.Tensor  # [n, V] float32: the logits that stock vLLM draws from
    ours: torch.Tensor  # [n, V] float32: those that our step draws from
    scores: torch.Tensor  # [n, V] float32: ``stock`` and the noise of the row's seed
    tokens: torch.Tensor  # [n]: our step's
    logprobs: torch.Tensor  # [n]: of these tokens
    replayed: torch.Tensor | None  # [n]: of a recorded step, recorded with other logits
    sort: torch.Tensor  # [n]: of our step with the rule of a sort
    top_k: torch.Tensor  # [n]: as it was handed over
    top_p: torch.Tensor  # [n]


def load_stock(folder: Path) -> None:
    """vLLM's module, but for one expression: ``tl.range`` gives ints in the interpreter."""
    from vllm.v1.sample import ops

    source = Path(ops.__path__[0], "topk_topp_triton.py").read_text(encoding="utf-8")
    assert source.count("row_id.to(tl.int64)") == 1
    path = folder / "topk_topp_triton.py"
    path.write_text(source.replace("row_id.to(tl.int64)", "row_id"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    module.num_compute_units = lambda *_: NUM_SMS
    module.current_platform = SimpleNamespace(is_cuda_alike=lambda: True)


def make_world(case: Case) -> World:
    num_reqs, vocab_size = case.logits.shape
    world = build_world(vocab_size, num_reqs)
    reqs = world.rows.idx_mapping[:num_reqs]
    for name, values in case.params.items():
        tensor = getattr(world.sampling, name)
        tensor[reqs] = torch.tensor(values).to(tensor.dtype)
    world.rows.steps_allowed[list(case.idle)] = 0
    return world


def truncate_as_stock(world: World, logits: torch.Tensor) -> torch.Tensor:
    """As ``Sampler.sample``: penalties, temperature, min-p, top-k and top-p, if any."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    sampling, reqs = world.sampling, world.rows.idx_mapping[: world.num_reqs]
    processed = logits.float().clone()
    for row, req in enumerate(reqs):
        processed[row] = apply_penalties(processed[row], int(req), world.requests, sampling)
        if sampling.temperature[req] != 0:
            processed[row] /= sampling.temperature[req]
            processed[row] = apply_min_p(processed[row], sampling.min_p[req])
    top_k, top_p = sampling.top_k[reqs], sampling.top_p[reqs]
    limits = (
        top_k.to("cuda") if (top_k != world.vocab_size).any() else None,
        top_p.to("cuda") if (top_p != 1).any() else None,
    )
    masked: torch.Tensor = apply_top_k_top_p(processed.to("cuda"), *limits)
    return masked.cpu()


def find(case: Case, recorder: CudaRecorder) -> Found:
    from fusedstep.ops.reference import gumbel_noise
    from fusedstep.ops.triton_step import TritonStep
    from fusedstep.vllm_plugin.runner import truncation

    world, n = make_world(case), len(case.logits)
    theirs = world.clone("cuda")
    logits = case.logits.to("cuda")
    scratch = TritonStep.allocate_scratch(n + 3, world.vocab_size, torch.device("cuda"))
    truncation.allocate_buffers(scratch.adjusted, scratch.limit_k, scratch.limit_p)
    step = TritonStep(theirs, scratch, truncation.truncate_as_stock)
    scratch.limit_k.fill_(1)  # as a step before has left them
    scratch.limit_p.fill_(0.5)
    needs = BatchNeeds(adjustment=case.recorded, logprobs=True)

    def sampled(step: TritonStep) -> torch.Tensor:
        theirs.rows.sampled.fill_(-1)
        step.sample(logits, theirs.rows, n, needs)
        return theirs.rows.sampled[:n].cpu()

    step.prepare(theirs.rows, n)
    tokens = sampled(step)
    ours = scratch.adjusted[:n].cpu()
    logprobs = theirs.rows.logprobs[:n].cpu()
    limits = scratch.limit_k[:n].cpu(), scratch.limit_p[:n].cpu()
    sort = sampled(TritonStep(theirs, scratch))
    replayed = None
    if case.recorded:
        logits.zero_()
        graph = recorder.record(lambda: step.sample(logits, theirs.rows, n, needs))
        logits.copy_(case.logits.to("cuda"))
        theirs.rows.sampled.fill_(-1)
        graph.replay()
        replayed = theirs.rows.sampled[:n].cpu()

    stock = truncate_as_stock(world, case.logits)
    token_ids, reqs = torch.arange(world.vocab_size), world.rows.idx_mapping[:n]
    scores = stock.clone()
    for row, req in enumerate(reqs):
        if world.sampling.temperature[req] != 0:
            position = int(world.requests.num_computed_tokens[req])
            scores[row] += gumbel_noise(int(world.sampling.seeds[req]), position, token_ids)
    return Found(stock, ours, scores, tokens, logprobs, replayed, sort, *limits)


def main(cases_path: str, results_path: str) -> None:
    triton_stand_in.install()
    with tempfile.TemporaryDirectory() as folder:
        load_stock(Path(folder))
        graphs.install()
        arrivals = ArrivalCounter(f"truncation-{Path(results_path).parent.name}")
        arrivals.unlink()
        with torch.inference_mode(), on_device(), graphs.Stream():
            recorder = CudaRecorder(torch.device("cuda"), arrivals)
            cases = torch.load(cases_path, weights_only=False)
            torch.save([find(case, recorder) for case in cases], results_path)


if __name__ == "__main__":
    from ops import interpret_truncation  # not __main__: what is saved names its classes

    interpret_truncation.main(*sys.argv[1:])
