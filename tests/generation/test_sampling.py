"""Sampling against the distribution it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nanomolmo2.generation.sampling import SamplingParams, sample

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.1, -torch.inf, 1.9, 0.0, 0.7, -0.4, 1.2])


def reference_distribution(temperature: float, top_k: int, top_p: float) -> Tensor:
    """What transformers' generate would draw from."""
    scores = LOGITS[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(dim=-1)[0]


def draw(params: SamplingParams, draws: int, logits: Tensor = LOGITS) -> Tensor:
    """Many rows with the same logits, a generator each."""
    rows = logits.expand(draws, -1)
    return sample(rows, params, [torch.Generator().manual_seed(seed) for seed in range(draws)])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (3.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 50, 1.0),
        (1.0, 0, 0.8),
        (1.0, 0, 0.35),
        (0.7, 5, 0.7),
        (2.0, 4, 0.9),
    ],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Chi-square, and no token outside the support."""
    expected = reference_distribution(temperature, top_k, top_p)
    draws = 4000
    chosen = draw(SamplingParams(temperature, top_k, top_p), draws)
    counts = chosen.bincount(minlength=len(LOGITS))
    inside = expected > 0
    assert not counts[~inside].any()
    wanted = draws * expected[inside]
    chi_square = ((counts[inside] - wanted).square() / wanted).sum().item()
    freedom = int(inside.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


@pytest.mark.parametrize("top_p", [0.2, 0.4, 0.6, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("top_k", [0, 1, 2, 6])
def test_the_support_is_exact(top_k: int, top_p: float) -> None:
    """Every token that may come does, the least likely too, and no other."""
    expected = reference_distribution(1.5, top_k, top_p).nonzero()[:, 0].tolist()
    assert draw(SamplingParams(1.5, top_k, top_p), 3000).unique().tolist() == expected


def test_one_generator_goes_on_from_step_to_step() -> None:
    params, generators = SamplingParams(temperature=1.0), [torch.Generator().manual_seed(0)]
    chosen = torch.cat([sample(LOGITS[None], params, generators) for _ in range(3000)])
    share = chosen.bincount(minlength=len(LOGITS)) / len(chosen)
    assert (share - LOGITS.softmax(-1)).abs().max() < 0.03


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1.0, 2.0, 2.0]])
    assert sample(logits, SamplingParams(), []).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=5.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-6),
    ],
)
def test_the_limits_are_greedy(params: SamplingParams) -> None:
    """A temperature near zero must not overflow, and the likeliest token is always kept."""
    logits = torch.tensor([-300.0, 200.0, 199.0, -torch.inf, 150.0])
    assert draw(params, 50, logits).unique().tolist() == [1]
    assert sample(logits[None], SamplingParams(), []).tolist() == [1]


def test_equal_logits_with_top_k_keep_exactly_k() -> None:
    assert draw(SamplingParams(1.0, top_k=2), 200, torch.zeros(5)).unique().tolist() == [0, 1]


def test_a_large_vocabulary() -> None:
    """Shares are summed over 151,936 tokens in float32 and still end at the last one."""
    logits = torch.zeros(151_936)
    chosen = draw(SamplingParams(temperature=1.0), 60, logits)
    assert chosen.min() >= 0
    assert chosen.max() < 151_936
    assert 0.3 < chosen.float().mean() / 151_936 < 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_float32(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    params = SamplingParams(temperature=0.7, top_p=0.9)
    assert torch.equal(draw(params, 100, logits), draw(params, 100, logits.float()))
    assert draw(params, 100, logits).dtype == torch.int64


def test_seeds() -> None:
    def numbers(params: SamplingParams, rows: int) -> list[float]:
        return [torch.rand(1, generator=g).item() for g in params.generators(rows)]

    one = numbers(SamplingParams(seed=7), 3)
    assert one[0] == one[1] == one[2]
    assert numbers(SamplingParams(seed=[5, 7, 6]), 3)[1] == one[0]
    assert len(set(numbers(SamplingParams(seed=[5, 7, 6]), 3))) == 3
    torch.manual_seed(0)
    fresh = numbers(SamplingParams(), 3)
    assert len(set(fresh)) == 3
    assert numbers(SamplingParams(), 3) != fresh
    torch.manual_seed(0)
    assert numbers(SamplingParams(), 3) == fresh
    with pytest.raises(ValueError, match="2 seeds for 3 rows: give one, or one a row"):
        SamplingParams(seed=[1, 2]).generators(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or more, found -0.1"),
        ({"temperature": float("nan")}, "temperature must be .* found nan"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or more tokens, found -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p must be above 0"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)
