"""A running server through the openai client: ``python examples/openai_client.py [URL]``.

Start the server in another terminal: ``fusedstep serve``.
"""

from __future__ import annotations

import sys

import openai


def main(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=24,
            stream=True,
        )
        for chunk in chunks:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
        answer = client.completions.create(
            model=model, prompt="The opposite of hot is", temperature=0, max_tokens=4, logprobs=1
        ).choices[0]
        assert answer.logprobs and answer.logprobs.tokens and answer.logprobs.token_logprobs
        for token, logprob in zip(
            answer.logprobs.tokens, answer.logprobs.token_logprobs, strict=True
        ):
            print(f"{token!r:12} {logprob:.4f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
