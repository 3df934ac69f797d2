"""Requests that an engine will be asked, checked before anything is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusedstep.bench import images
from fusedstep.bench.adapters import Adapter
from fusedstep.bench.prompts import Request
from fusedstep.errors import ConfigError
from fusedstep.vllm_plugin import startup
from fusedstep.vllm_plugin.launch import early

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Wanted:
    """Work for an engine, as far as its configuration can be too small for it."""

    lengths: dict[str, int] = field(default_factory=dict)  # by option; they share a context
    batch_size: int = 0  # of requests that must run at the same time
    requests: list[tuple[Request, dict[str, Any]]] = field(default_factory=list)  # and sampling
    images: bool = False  # in prompts
    adapters: tuple[Adapter, ...] = ()  # that requests take in turn

    def check(self, config: VllmConfig) -> None:
        """Raises ConfigError for the first thing that vLLM would refuse, or that would wait."""
        limit = config.model_config.max_model_len
        if sum(self.lengths.values()) > limit:
            raise ConfigError(early.too_long(self.lengths, limit))
        if self.batch_size > config.scheduler_config.max_num_seqs:
            raise ConfigError(
                early.batch_too_large(self.batch_size, config.scheduler_config.max_num_seqs)
            )
        if self.images:
            images.check_model(config.model_config)
        if self.requests:
            self._check_requests(config)

    def _check_requests(self, config: VllmConfig) -> None:
        from vllm.tokenizers import cached_tokenizer_from_config

        tokenizer = cached_tokenizer_from_config(config.model_config)
        limit = config.model_config.max_model_len
        for request, params in self.requests:
            try:
                asked: SamplingParams = sampling_params(params)
                asked.verify(
                    config.model_config,
                    config.speculative_config,
                    config.structured_outputs_config,
                    tokenizer,
                )
            except Exception as error:
                raise ConfigError(f"{request.where}: {startup.first_line(error)}") from None
            tokens = 0 if tokenizer is None else len(tokenizer.encode(request.prompt))
            if tokens >= limit:
                raise ConfigError(
                    f"{request.where}: the prompt has {tokens} tokens, the model's context {limit}:"
                    " shorten it, or raise --max-model-len if the model can"
                )

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """While vLLM makes an engine: ``check`` comes between its configuration and its start."""
        from vllm.engine.arg_utils import EngineArgs

        create = EngineArgs.create_engine_config

        def create_and_check(args: Any, *given: Any, **named: Any) -> Any:
            config = create(args, *given, **named)
            self.check(config)
            return config

        EngineArgs.create_engine_config = create_and_check
        try:
            yield
        finally:
            EngineArgs.create_engine_config = create


def sampling_params(fields: dict[str, Any]) -> SamplingParams:
    """vLLM's SamplingParams; ``structured_outputs`` is an object, as in the API."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    structured = fields.get("structured_outputs")
    if isinstance(structured, dict):
        fields = fields | {"structured_outputs": StructuredOutputsParams(**structured)}
    params: SamplingParams = SamplingParams(**fields)
    return params
