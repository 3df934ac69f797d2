"""Compiles a step's kernel for gfx942 with and without its wait; prints what ``compiled`` says.

    cd tests && python -m races.compile_mutants

A process of its own, because Triton compiles nothing where its interpreter is switched on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from ops.compile_kernels import PLAIN
from ops.world import build_world
from races.compiled import order_of
from races.mutants import Mutant, mutated

from fusedstep.bench.kernels import absent_gpu
from fusedstep.ops.triton_step import TritonStep

VOCAB_SIZE = 4096
MUTANTS = [
    Mutant("none", "winner.py", "if is_gfx9():", "if is_gfx9():"),
    Mutant("no-wait", "winner.py", "if is_gfx9():", "if False:"),
]


def main() -> None:
    driver = absent_gpu.install()
    logits = torch.zeros(1, VOCAB_SIZE, dtype=torch.bfloat16)
    world = build_world(VOCAB_SIZE, 1)
    for mutant in MUTANTS:
        with tempfile.TemporaryDirectory() as folder, mutated(mutant, Path(folder)):
            (launch,) = world.bind(TritonStep).launches(logits, world.rows, 1, PLAIN, True)
            compiled = absent_gpu.compiled(driver, "gfx942", launch)
            print(mutant.name, *order_of(compiled.asm["amdgcn"]).disorders, sep="\t")


if __name__ == "__main__":
    main()
