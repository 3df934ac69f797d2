"""Somebody's script: it has never heard of fusedstep. Prints the tokens of some requests."""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256)
    params = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=25, logprobs=2),
        SamplingParams(temperature=0, max_tokens=9, min_tokens=9),
    ]
    prompts = [{"prompt_token_ids": list(range(10, 20 + 3 * n))} for n in range(3)]
    answers = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(each.token_ids) for answer in answers for each in answer.outputs]
    with open(sys.argv[2], "w") as file:
        json.dump(tokens, file)
