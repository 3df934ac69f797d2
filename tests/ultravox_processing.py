"""What vLLM asks of Ultravox's processor, which a checkpoint brings: a part of ``tiny_sounds``."""

from __future__ import annotations

from typing import Any

import torch
import transformers


class UltravoxProcessor(transformers.ProcessorMixin):  # type: ignore[misc]
    """Sound in chunks of thirty seconds: an encoder's batch, and the tokens that each becomes."""

    attributes = ("audio_processor", "tokenizer")
    audio_processor_class = "WhisperFeatureExtractor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self, audio_processor: Any = None, tokenizer: Any = None, stack_factor: int = 8
    ) -> None:
        self.stack_factor = stack_factor
        super().__init__(audio_processor=audio_processor, tokenizer=tokenizer)

    def __call__(
        self, text: Any = None, audios: Any = None, sampling_rate: int = 16000, **_: Any
    ) -> Any:
        found = {}
        if audios:
            size = 30 * sampling_rate
            chunks = [
                [audio[at : at + size] for at in range(0, len(audio), size)] for audio in audios
            ]
            flat = [chunk for each in chunks for chunk in each]
            frames = [-(-len(chunk) // 160) for chunk in flat]
            found["audio_values"] = self.audio_processor(
                flat, sampling_rate=sampling_rate, padding="max_length", return_tensors="pt"
            )["input_features"]
            found["audio_lens"] = torch.tensor(frames)
            found["audio_token_len"] = torch.tensor(
                [-(-frame // (2 * self.stack_factor)) for frame in frames]
            )
            found["audio_num_chunks"] = torch.tensor([len(each) for each in chunks])
        texts = [text] if isinstance(text, str) else text
        found["input_ids"] = torch.tensor([self.tokenizer.encode(each) for each in texts])
        return transformers.BatchFeature(found)
