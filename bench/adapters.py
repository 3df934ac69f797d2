"""LoRA adapters for requests: named and read before an engine starts, used by its process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from fusedstep.errors import ConfigError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

OPTION = "--lora-modules"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """``rank``: as its folder says, None for one that vLLM fetches by its name on the hub."""

    name: str
    path: str
    rank: int | None

    def request(self, number: int) -> LoRARequest:
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.name, number, self.path)


def find(named: Sequence[str]) -> tuple[Adapter, ...]:
    """Adapters given as NAME=PATH, as vLLM's server takes them.

    Raises ConfigError for another form, a name given twice, or a folder without an adapter.
    """
    found: dict[str, Adapter] = {}
    for word in named:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{OPTION}: {word!r} is not NAME=PATH")
        if name in found:
            raise ConfigError(f"{OPTION}: {name} is given twice")
        found[name] = Adapter(name, path, _rank(path))
    return tuple(found.values())


def options(adapters: Sequence[Adapter], vllm_args: Sequence[str]) -> tuple[str, ...]:
    """Options for vLLM's engine; what ``vllm_args`` say already is left to them.

    One place more than there are adapters: vLLM's CPU kernels give a request without an adapter
    the one in the last place.
    """
    if not adapters:
        return ()
    ranks = [adapter.rank for adapter in adapters if adapter.rank is not None]
    wanted = {"--enable-lora": "", "--max-loras": str(len(adapters) + 1)}
    if ranks:
        wanted["--max-lora-rank"] = str(_allowed_rank(max(ranks)))
    said = {arg.partition("=")[0].replace("_", "-") for arg in vllm_args}
    given: list[str] = []
    for option, value in wanted.items():
        if option not in said:
            given += [option, value] if value else [option]
    return tuple(given)


def in_turn(adapters: Sequence[Adapter], num_requests: int) -> list[LoRARequest | None]:
    """The adapter of each request; every round ends with one that has none."""
    requests = [adapter.request(number) for number, adapter in enumerate(adapters, 1)]
    round_: list[LoRARequest | None] = [*requests, None]
    return [round_[number % len(round_)] for number in range(num_requests)]


def _rank(path: str) -> int | None:
    folder = Path(path).expanduser()
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return None  # a name on the hub
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return int(config["r"])
    except OSError as error:
        raise ConfigError(f"{OPTION}: no adapter in {path}: {error.strerror}, {CONFIG}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{OPTION}: {folder / CONFIG} has no rank (r)") from None


def _allowed_rank(rank: int) -> int:
    """The smallest that vLLM takes for ``--max-lora-rank`` and that is not below."""
    from vllm.config.lora import MaxLoRARanks

    return next((each for each in sorted(get_args(MaxLoRARanks)) if each >= rank), rank)
