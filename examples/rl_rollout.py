"""Reinforcement learning: sample with logprobs, score, train, load the new weights, sample again.

    python examples/rl_rollout.py [MODEL] [--rounds N]

The policy is trained by torch and sampled by fusedstep, with the weights in a file between them, as
``reload_weights`` of vLLM takes them. Each round prints the largest difference between the
engine's logprobs of its tokens and the trainer's: it stays near 0 only if the engine samples from
the trainer's weights. The reward is a toy: many letters "e".
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from fusedstep import LLM  # before vllm: on the CPU vLLM picks its platform at import
from fusedstep.demo import demo_model

PROMPT = "My favourite animal is"
LEARNING_RATE = 0.05


class NewWeights:
    """vLLM adds this to its worker (``worker_extension_cls``)."""

    reload_weights: Any
    get_model: Any

    def load_policy(self, folder: str) -> None:
        """Load the weights of a folder in place of those in use.

        On a CPU, vLLM keeps a packed copy of the output layer. Where its weights are the
        embedding's, vLLM 0.32 reloads the embedding and not the copy: it is packed again.
        """
        self.reload_weights(weights_path=folder)
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for layer in self.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


def logprobs_of(policy: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The trainer's logprobs of an answer's tokens, with gradients."""
    ids = torch.tensor([prompt + answer])
    scores = policy(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return scores[torch.arange(len(answer)), torch.tensor(answer)]


def train(policy: Any, rollout: Any) -> tuple[float, float, float]:
    """One step of REINFORCE.

    Returns the mean reward, the largest difference of logprobs between engine and trainer, and by
    how much the step moved a logprob at most.
    """
    answers = rollout.outputs
    rewards = torch.tensor([a.text.count("e") / max(len(a.text), 1) for a in answers])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    optimizer = torch.optim.SGD(policy.parameters(), LEARNING_RATE)
    largest = 0.0
    for answer, advantage in zip(answers, advantages, strict=True):
        ours = logprobs_of(policy, rollout.prompt_token_ids, list(answer.token_ids))
        tokens = zip(answer.token_ids, answer.logprobs, strict=True)
        engine = torch.tensor([step[token].logprob for token, step in tokens])
        largest = max(largest, float((ours.detach() - engine).abs().max()))
        (-advantage * ours.sum() / len(answers)).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():  # of the last answer
        new = logprobs_of(policy, rollout.prompt_token_ids, list(answer.token_ids))
    return float(rewards.mean()), largest, float((new - ours).abs().max())


def main() -> None:
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8, help="per round")
    parser.add_argument("--max-tokens", type=int, default=24)
    given = parser.parse_args()
    model = given.model or str(demo_model())
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        worker_extension_cls="rl_rollout.NewWeights",  # this file: its folder is on the path
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for number in range(given.rounds):
        params = SamplingParams(
            n=given.answers, temperature=1, max_tokens=given.max_tokens, seed=number, logprobs=0
        )
        rollout = llm.generate(PROMPT, params, use_tqdm=False)[0]
        reward, largest, moved = train(policy, rollout)
        print(
            f"round {number}: mean reward {reward:.3f}, logprobs differ by {largest:.1e} at most, "
            f"training moved them by {moved:.1e}"
        )
        with tempfile.TemporaryDirectory() as folder:
            policy.save_pretrained(Path(folder))
            llm.collective_rpc("load_policy", args=(folder,))
        assert llm.reset_prefix_cache()  # what the old weights left in the KV cache


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    main()
