"""A sampling parameter's off-value changes nothing, its on-value something."""

import pytest
import torch

from fusedstep.ops.reference import first_argmax, gumbel_noise, sample_row
from fusedstep.ops.types import RequestState, SamplingState, dtypes

VOCAB = 50
ON = {name: spec.on for name, spec in SamplingState.parameters().items() if spec.on is not None}


def tokens(**changes):
    """One sampled token of each of 256 requests, and the same from temperature and seed alone."""
    sampling = SamplingState.off(256, VOCAB)
    sampling.temperature.fill_(1.0)
    sampling.seeds.copy_(torch.arange(256))
    for name, value in changes.items():
        getattr(sampling, name).fill_(value)
    requests = RequestState(
        **{
            name: torch.zeros(256, VOCAB, dtype=dtype)
            for name, dtype in dtypes(RequestState).items()
        }
        | {name: torch.ones(256, dtype=torch.int32) for name in ("prompt_len", "total_len")}
    )
    requests.output_bin_counts.fill_(1)
    logits = 2 * torch.randn(256, VOCAB, generator=torch.Generator().manual_seed(0))
    sampled = [sample_row(row, req, 0, requests, sampling) for req, row in enumerate(logits)]
    plain = [
        first_argmax(row + gumbel_noise(req, 0, torch.arange(VOCAB)))
        for req, row in enumerate(logits)
    ]
    return sampled, plain


def test_off_changes_nothing():
    sampled, plain = tokens()
    assert sampled == plain


@pytest.mark.parametrize("name", ON)
def test_on_changes_something(name):
    sampled, plain = tokens(**{name: ON[name]})
    assert sampled != plain
