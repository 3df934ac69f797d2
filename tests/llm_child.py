"""A user's program that generates for ever; its first argument: the options of LLM, in JSON."""

import json
import sys


def main() -> None:
    from fusedstep import LLM  # before vllm

    llm = LLM(**json.loads(sys.argv[1]))
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=200, ignore_eos=True, detokenize=False)
    while True:
        llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 4, params, use_tqdm=False)
        print("GENERATED", flush=True)


if __name__ == "__main__":
    main()
