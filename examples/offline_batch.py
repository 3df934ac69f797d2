"""A batch of prompts, no server: ``python examples/offline_batch.py [MODEL]``."""

from __future__ import annotations

import sys

from fusedstep import LLM  # before vllm: on the CPU vLLM picks its platform at import
from fusedstep.demo import demo_model

PROMPTS = (
    "The capital of France is",
    "The opposite of hot is",
    "A robot walks into a bar and says:",
    "1, 2, 3, 4,",
)


def main(model: str) -> None:
    from vllm import SamplingParams

    llm = LLM(model, decode_steps=16, dtype="float32", max_model_len=512, enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=32)
    for output in llm.generate(list(PROMPTS), params, use_tqdm=False):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    stats = llm.window_stats()
    print(f"{stats['steps']} steps in {stats['windows']} windows")


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo_model()))
