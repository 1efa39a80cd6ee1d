"""Sampling against the distribution it promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanomolmo2.generation.sampling import (
    Sampled,
    Sampler,
    SamplingParams,
    _distribution,
    sample,
    sample_rows,
)

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
        ({"temperature": float("inf")}, "temperature must be .* found inf"),
        ({"min_p": -0.1}, r"min_p must be 0 \(off\) to 1, found -0.1"),
        ({"min_p": 1.1}, "min_p must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be above 0"),
        ({"logit_bias": {-1: 2.0}}, "gives token -1 the bias 2.0"),
        ({"logit_bias": {1: float("nan")}}, "gives token 1 the bias nan"),
        ({"logit_bias": {1: float("inf")}}, "-inf forbids a token"),
        ({"logprobs": -1}, "logprobs must be 0 or more"),
        ({"stop": ""}, "a stop text is empty"),
        ({"stop": ["a", ""]}, "a stop text is empty"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)


# ---- a row with its memory, against transformers ----


def reference_scores(params: SamplingParams, logits: Tensor, seen: list[int]) -> Tensor:
    """transformers' processors in the order of its generate: (V,) with -inf where excluded."""
    scores, ids = logits[None].clone(), torch.tensor([seen])
    if params.logit_bias:
        bias = {(id,): value for id, value in params.logit_bias.items()}
        scores = SequenceBiasLogitsProcessor(bias)(ids, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    if params.temperature > 0:
        scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
        if params.top_k:
            scores = TopKLogitsWarper(params.top_k)(ids, scores)
        if params.top_p < 1:
            scores = TopPLogitsWarper(params.top_p)(ids, scores)
        if params.min_p:
            scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores[0]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"min_p": 0.05},
    {"min_p": 0.3, "temperature": 0.7},
    {"top_p": 0.9},
    {"top_k": 7, "top_p": 0.8, "min_p": 0.1},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "top_k": 20},
    {"logit_bias": {3: 4.0, 5: -3.0, 8: -math.inf}, "min_p": 0.01},
    {"logit_bias": {3: 4.0, 30: 2.0}, "repetition_penalty": 1.7, "top_p": 0.95, "temperature": 2.0},
    {"temperature": 0.0, "logit_bias": {3: 4.0}, "repetition_penalty": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [40, 3000])
def test_a_row_is_processed_as_by_transformers(settings: dict[str, Any], size: int) -> None:
    params = SamplingParams(**{"temperature": 1.0, **settings})
    generator = torch.Generator().manual_seed(size)
    for _ in range(20):
        logits = 3 * torch.randn(size, generator=generator)
        seen = torch.randint(size, (12,), generator=generator).tolist()
        expected = reference_scores(params, logits, seen)
        sampler = Sampler(params, seen[:5])
        for id in seen[5:]:
            sampler.take(id)
        row = sampler._process(logits)
        if params.temperature == 0:
            torch.testing.assert_close(row, expected)
            assert sampler.sample(logits).token == int(expected.argmax())
            continue
        weights, ids = _distribution(row, params)
        found = torch.zeros(size)
        found[torch.arange(size) if ids is None else ids] = weights / weights.sum()
        wanted = expected.softmax(dim=-1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(found > 0, wanted > 0)


def test_the_penalty_counts_prompt_and_answer_once_each() -> None:
    logits = torch.tensor([2.0, 1.8, 1.5, -1.0])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [3, 3, 900])  # 900: a picture
    assert [sampler.sample(logits).token for _ in range(5)] == [0, 1, 2, 0, 0]
    torch.testing.assert_close(sampler._process(logits), torch.tensor([1.0, 0.9, 0.75, -2.0]))
    assert torch.equal(logits, torch.tensor([2.0, 1.8, 1.5, -1.0]))


def test_bias_forces_and_forbids() -> None:
    logits = torch.tensor([0.0, 5.0, 1.0])
    assert Sampler(SamplingParams(logit_bias={0: 100.0})).sample(logits).token == 0
    assert Sampler(SamplingParams(logit_bias={1: -math.inf})).sample(logits).token == 2
    drawn = Sampler(SamplingParams(1.0, seed=0, logit_bias={1: -math.inf}))
    assert {drawn.sample(logits).token for _ in range(200)} == {0, 2}
    with pytest.raises(ValueError, match="names token 3, but the model has 3 tokens"):
        Sampler(SamplingParams(logit_bias={3: 1.0})).sample(logits)


def test_logprobs_are_the_models_own() -> None:
    settings: dict[str, Any] = {"logit_bias": {2: -9.0}, "repetition_penalty": 1.5, "seed": 3}
    params = SamplingParams(temperature=0.4, top_k=5, logprobs=3, **settings)
    expected = LOGITS.log_softmax(dim=-1)
    found = Sampler(params, [1, 5]).sample(LOGITS)
    assert found.logprob == pytest.approx(float(expected[found.token]))
    assert [id for id, _ in found.top] == [2, 5, 9]
    assert [value for _, value in found.top] == pytest.approx(expected[[2, 5, 9]].tolist())
    only = Sampler(SamplingParams(logprobs=0)).sample(LOGITS)
    assert (only.token, only.top) == (2, ())
    assert only.logprob == pytest.approx(float(expected[2]))
    everything = Sampler(SamplingParams(logprobs=50)).sample(LOGITS)
    assert len(everything.top) == len(LOGITS)
    assert Sampler(SamplingParams()).sample(LOGITS) == Sampled(2)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_row_draws_the_same_alone_and_in_any_batch(settings: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **settings})
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(6, 4, 500, generator=generator)  # (steps, rows, V)

    def samplers(rows: list[int]) -> list[Sampler]:
        return [Sampler(params, [row], torch.Generator().manual_seed(row)) for row in rows]

    together = samplers([0, 1, 2, 3])
    answers = [[s.token for s in sample_rows(logits, together)] for logits in steps]
    for rows in ([2], [3, 1], [1, 0, 3]):
        some = samplers(rows)
        found = [[s.token for s in sample_rows(logits[rows], some)] for logits in steps]
        assert found == [[answer[row] for row in rows] for answer in answers]


def test_rows_with_different_settings() -> None:
    logits = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(),
        SamplingParams(1.0, seed=1),
        SamplingParams(logprobs=2),
        SamplingParams(),
        SamplingParams(repetition_penalty=9.0),
    ]
    assert [p.greedy_only for p in params] == [True, False, False, True, False]
    found = sample_rows(logits, [Sampler(p) for p in params])
    assert found == [Sampler(p).sample(row) for p, row in zip(params, logits, strict=True)]
    assert [s.token for s in found][::3] == logits.argmax(dim=-1)[::3].tolist()
    assert sample_rows(logits[:0], []) == []


def test_the_share_of_top_p_may_lie_in_thousands_of_tokens() -> None:
    """More than the candidates looked at first."""
    logits = torch.zeros(5000)
    logits[7] = 0.5
    weights, ids = _distribution(logits, SamplingParams(1.0, top_p=0.5))
    assert ids is not None
    assert 2490 < int((weights > 0).sum()) < 2510
    assert ids[0] == 7
    assert ids[1:4].tolist() == [0, 1, 2]
    few, ids = _distribution(20 * torch.eye(5000)[9], SamplingParams(1.0, top_p=0.5))
    assert ids is not None
    assert ids[few > 0].tolist() == [9]


class Only:
    """A constraint: the ids 0, 1, ... in turn; then anything."""

    def __init__(self, tokens: int, last: int = 2) -> None:
        self.tokens, self.last, self.next = tokens, last, 0

    def start(self) -> Only:
        return Only(self.tokens, self.last)

    def allowed(self) -> Tensor | None:
        return None if self.next > self.last else torch.arange(self.tokens) == self.next

    def advance(self, id: int) -> None:
        assert self.next > self.last or id == self.next
        self.next += 1


@pytest.mark.parametrize("tokens", [4, 10, 15])  # a tokenizer may have fewer or more than the head
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_constraint_excludes(tokens: int, temperature: float) -> None:
    params = SamplingParams(temperature, seed=0, constraint=Only(tokens), logprobs=1)
    for _ in range(2):  # each row starts anew
        sampler = Sampler(params)
        found = [sampler.sample(LOGITS) for _ in range(3)]
        assert [s.token for s in found] == [0, 1, 2]
        assert found[0].top[0][0] == 2  # the model's own favourite
    if not temperature:
        assert sampler.sample(LOGITS).token == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers(temperature: float, value: float) -> None:
    logits = LOGITS.clone()
    logits[3] = value
    message = f"hold {value}, expected finite numbers"
    with pytest.raises(ValueError, match=message):
        sample(torch.stack([LOGITS, logits]), SamplingParams(temperature), [torch.Generator()] * 2)
    with pytest.raises(ValueError, match=message):
        Sampler(SamplingParams(temperature, constraint=Only(10))).sample(logits)
    with pytest.raises(ValueError, match=message):
        Sampler(SamplingParams(temperature, repetition_penalty=2.0), [1]).sample(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_left(temperature: float) -> None:
    with pytest.raises(ValueError, match="every token of a row is excluded"):
        sample(torch.full((1, 4), -math.inf), SamplingParams(temperature), [torch.Generator()])
    bias = dict.fromkeys(range(3), -math.inf)
    params = SamplingParams(temperature, logit_bias=bias, constraint=Only(10))
    with pytest.raises(ValueError, match="every token of a row is excluded"):
        Sampler(params).sample(torch.zeros(10))


def test_verifying_drafts_draws_as_plain_steps_do() -> None:
    """A draft ends at its first wrong token; nothing behind it was drawn."""
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(5))
    params = SamplingParams(1.5, seed=9, repetition_penalty=1.3, top_p=0.9)
    plain = Sampler(params)
    expected = [plain.sample(row).token for row in logits]
    drafted = Sampler(params)
    found: list[int] = []
    generator = torch.Generator().manual_seed(2)
    while len(found) < 30:
        guess = [
            expected[at] if torch.rand((), generator=generator) < 0.7 else 0
            for at in range(len(found), min(len(found) + 4, 29))
        ]
        for row, drafted_id in zip(logits[len(found) :], [*guess, None], strict=False):
            found.append(drafted.sample(row).token)
            if found[-1] != drafted_id:
                break
    assert found == expected


def test_stop_settings() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop_token_ids == (3,)
    assert SamplingParams().with_seed(4) == SamplingParams(seed=4)


def test_the_likeliest_token_stays_however_small_the_share() -> None:
    """1e-320 of the mass of two rounds to 0, which no token would be below."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for top_p in (1e-9, 1e-300, 5e-324):
        params = SamplingParams(temperature=1.0, top_p=top_p, seed=0)
        assert sample(logits, params, params.generators(1)).tolist() == [1]
        tiny = SamplingParams(temperature=1e-300, top_p=top_p, seed=0)
        assert sample(logits, tiny, tiny.generators(1)).tolist() == [1]
