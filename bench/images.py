"""Images for prompts: found and read before an engine starts, put into prompts by its process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fusedstep.bench.prompts import Request
from fusedstep.errors import ConfigError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import ModelConfig

OPTION = "--images"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt, text or token ids, that begins with an image."""

    prompt: str | list[int]
    image: Path

    def for_model(self, llm: LLM) -> dict[str, Any]:
        """In vLLM's form, with what stands for an image in prompts of this model."""
        stands_for_it = placeholder(llm.llm_engine.model_config)
        data = {"multi_modal_data": {"image": _read(self.image)}}
        if isinstance(self.prompt, str):
            return {"prompt": stands_for_it + self.prompt, **data}
        token_ids = llm.get_tokenizer().encode(stands_for_it, add_special_tokens=False)
        return {"prompt_token_ids": [*token_ids, *self.prompt], **data}


def find(paths: Sequence[Path]) -> tuple[Path, ...]:
    """These image files, and those in these folders; all can be read.

    Raises ConfigError where there is none, or one cannot be read.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not inside:
            raise ConfigError(f"{OPTION}: the folder {path} holds no image: name files, or another")
        found += inside
    for path in found:
        _read(path)
    return tuple(found)


def beside(requests: list[Request], images: Sequence[Path]) -> list[Request]:
    """The requests, and for each image one more, which asks about it with a prompt of theirs."""
    more = [
        replace(requests[number % len(requests)], image=image)
        for number, image in enumerate(images)
    ]
    return [*requests, *more]


def check_model(config: ModelConfig) -> None:
    """Raises ConfigError if prompts of this model cannot have an image."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    takes = config.supports_multimodal_inputs
    if takes:
        limits = MULTIMODAL_REGISTRY.get_processing_info(config).allowed_mm_limits
        takes = limits.get("image", 0) > 0
    if not takes:
        raise ConfigError(f"{OPTION}: {config.model} takes no images: leave it out")
    placeholder(config)


def placeholder(config: ModelConfig) -> str:
    """Text that stands for an image in a prompt. Raises ConfigError if the model has none."""
    from vllm.model_executor.model_loader import get_model_cls

    text = get_model_cls(config).get_placeholder_str("image", 1)
    if text is None:
        raise ConfigError(f"{OPTION}: vLLM knows no text for an image in prompts of {config.model}")
    return str(text)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow has many kinds
        reason = getattr(error, "strerror", None) or "it is no image that Pillow reads"
        raise ConfigError(f"{OPTION}: cannot read {path} ({reason})") from None
