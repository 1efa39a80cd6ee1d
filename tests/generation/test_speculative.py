"""Drafts against a plain scan, and the width against the best one for known costs."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomolmo2.generation.speculative import (
    AcceptanceRate,
    AdaptiveWidth,
    Drafter,
    NgramLookup,
    StepCosts,
    propose,
)
from tests.generation.threads import run_together

IDS = st.lists(st.integers(0, 3), max_size=60)  # few ids, so that much repeats
NGRAMS = st.tuples(st.integers(1, 3), st.integers(0, 3)).map(lambda t: (t[0], t[0] + t[1]))


def test_by_hand() -> None:
    assert propose([5, 6, 7, 8, 9, 5, 6], 2) == [7, 8]
    assert propose([1, 2, 3, 9, 2, 4, 1, 2], 2) == [3, 9]  # two tokens match farther back
    assert propose([1, 2, 3, 9, 2, 4, 1, 2], 2, max_ngram=1) == [4, 1]  # the latest one
    assert propose([1, 2, 3], 4) == []
    assert propose([], 4) == [] == propose([1], 4)
    assert propose([7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]  # goes on with itself
    assert propose([7, 7], 0) == [] == propose([7, 7], -1)
    assert propose([4, 9, 4], 3, min_ngram=2) == []
    assert propose(torch.tensor([5, 6, 7, 5]), 1) == [6]


@given(IDS, st.integers(0, 8), NGRAMS)
@settings(max_examples=300, deadline=None)
def test_a_draft_is_a_continuation_that_occurred(
    ids: list[int], width: int, ngrams: tuple[int, int]
) -> None:
    low, high = ngrams
    found = propose(ids, width, min_ngram=low, max_ngram=high)
    whole = ids + found
    # All places where the end of the history occurred before, with what follows there.
    matches = {
        n: [i for i in range(n, len(ids)) if ids[i - n : i] == ids[len(ids) - n :]]
        for n in range(low, high + 1)
        if n < len(ids)
    }
    longest = max((n for n, places in matches.items() if places), default=None)
    if longest is None:
        assert found == []
    else:
        place = max(matches[longest])
        assert len(found) == width
        assert found == whole[place : place + width]


@given(st.lists(IDS, max_size=6), st.integers(0, 8), NGRAMS)
@settings(max_examples=300, deadline=None)
def test_the_index_is_the_scan(parts: list[list[int]], width: int, ngrams: tuple[int, int]) -> None:
    low, high = ngrams
    lookup = NgramLookup(min_ngram=low, max_ngram=high)
    history: list[int] = []
    for part in parts:
        lookup.extend(part)
        history += part
        expected = propose(history, width, min_ngram=low, max_ngram=high)
        assert lookup.propose(width) == expected
        assert lookup.history == history
        if expected:
            assert low <= lookup.matched <= high
        elif width:
            assert lookup.matched == 0


def test_a_draft_costs_no_scan() -> None:
    """In 30,000 ids that do not repeat a scan takes milliseconds."""
    ids = random.Random(0).sample(range(10**6), 30_000)
    lookup = NgramLookup(ids)
    start = time.perf_counter()
    for id in range(1000):
        lookup.extend([10**7 + id])
        lookup.propose(8)
    assert (time.perf_counter() - start) / 1000 < 200e-6


@pytest.mark.parametrize(("low", "high"), [(0, 3), (3, 2), (-1, -1)])
def test_ngrams_that_make_no_sense(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"{low} to {high} tokens make no sense"):
        propose([1, 2], 3, min_ngram=low, max_ngram=high)
    with pytest.raises(ValueError, match="make no sense"):
        NgramLookup(min_ngram=low, max_ngram=high)


# ---- costs and width ----


def test_costs_are_medians_and_straight_lines_between_them() -> None:
    costs = StepCosts()
    assert costs.seconds(3) / costs.seconds(1) == pytest.approx(1.1)  # nothing known
    for seconds in (9.0, 1.0, 1.0, 1.0):  # the first step was a cold one
        costs.record(1, seconds)
    assert costs.seconds(1) == 1.0
    assert costs.seconds(5) == pytest.approx(1.2)
    for _ in range(3):
        costs.record(5, 2.0)
    assert [costs.seconds(n) for n in (1, 2, 3, 5, 9)] == pytest.approx([1, 1.25, 1.5, 2, 3])
    costs.record(5, 50.0)  # a pause
    assert costs.seconds(5) == 2.0
    costs.record(3, 70.0)  # not trusted yet
    assert costs.seconds(3) == 1.5
    with pytest.raises(ValueError, match="at least one position, found 0"):
        costs.seconds(0)


def test_costs_below_the_smallest_measured_number() -> None:
    costs = StepCosts({4: 2.0, 6: 2.2})
    assert costs.seconds(2) == pytest.approx(1.8)
    assert StepCosts({2: 1.0, 3: 9.0}).seconds(1) == 0.5  # never free, never negative
    assert StepCosts({2: 9.0, 3: 1.0}).seconds(8) == 9.0  # noise: more positions are not cheaper


def test_costs_that_were_not_seen_for_long_are_forgotten() -> None:
    costs = StepCosts({1: 1.0, 4: 100.0})
    assert costs.seconds(4) == 100
    for _ in range(1001):
        costs.record(1, 1.0)
    assert costs.seconds(4) == pytest.approx(1.15)


def rate(share: float, width: int, costs: StepCosts) -> float:
    return sum(share**i for i in range(width + 1)) / costs.seconds(1 + width)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(
    "seconds",
    [
        {1: 40e-3, 2: 38e-3, 4: 42e-3, 8: 65e-3},
        {1: 81e-3, 2: 85e-3, 4: 97e-3, 8: 175e-3},
        {1: 132e-3, 2: 230e-3, 4: 391e-3, 8: 780e-3},
    ],
    ids=["int8", "fp16", "fp32"],
)
def test_the_width_gives_the_most_tokens_a_second(
    share: float, seconds: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = StepCosts(seconds)
    width = AdaptiveWidth(costs, max_width=7)
    monkeypatch.setattr(width, "acceptance", lambda matched: share)
    chosen = width.choose(2)
    best = max(rate(share, w, costs) for w in range(8))
    assert rate(share, chosen, costs) == pytest.approx(best)
    assert width.choose(2, room=2) <= 2
    assert width.choose(2, room=0) == 0


def test_no_drafts_where_they_do_not_pay() -> None:
    dear = AdaptiveWidth(StepCosts({1: 1.0, 2: 2.0, 8: 8.0}))
    assert dear.choose(3) == 0
    cheap = AdaptiveWidth(StepCosts({1: 1.0, 8: 1.01}))
    assert cheap.choose(3) == 7
    # With many rows in the step one position more costs as much as a row.
    costs = StepCosts({1: 1.0, 8: 1.2, 9: 1.5, 16: 3.0})
    assert AdaptiveWidth(costs).choose(3) > 0
    assert AdaptiveWidth(costs).choose(3, other_positions=8) == 0


def test_acceptance_rates_follow_what_came() -> None:
    width = AdaptiveWidth()
    for _ in range(60):
        width.record(1, 4, 0)
        width.record(4, 4, 4)
    assert width.acceptance(1) < 0.15
    assert width.acceptance(4) > 0.95
    assert 0.4 < width.acceptance(3) < 0.8  # one n-gram length says nothing of another
    generator = random.Random(0)
    total = 0.0
    for step in range(4000):
        right = next((i for i in range(5) if generator.random() > 0.7), 5)
        width.record(2, 5, right)
        total += width.acceptance(2) if step >= 1000 else 0
    assert total / 3000 == pytest.approx(0.7, abs=0.03)
    with pytest.raises(ValueError, match="5 of 4 drafted tokens"):
        width.record(1, 4, 5)
    with pytest.raises(ValueError, match="max_width must be 0"):
        AdaptiveWidth(max_width=-1)


def test_a_new_row_begins_with_what_others_learned_and_learns_for_itself() -> None:
    rates = AcceptanceRate()
    for _ in range(20):  # rows of one draft each
        AdaptiveWidth(acceptance=rates).record(0, 1, 0)
    width = AdaptiveWidth(acceptance=rates)
    assert width.acceptance(0) == pytest.approx(rates.expected(0))
    assert width.acceptance(0) < 0.1
    assert width.acceptance(1) == AdaptiveWidth().acceptance(1)
    for _ in range(5):
        width.record(0, 1, 1)
    assert width.acceptance(0) > 0.6
    assert rates.expected(0) < 0.4


# ---- the drafter in a loop of steps ----


class Steps:
    """Writes an answer as an engine would: verifies drafts, counts steps and their time."""

    def __init__(self, costs: StepCosts, truth: dict[int, float]) -> None:
        self.costs, self.truth = costs, truth
        self.seconds = 0.0
        self.steps = self.drafted = 0

    def write(self, drafter: Drafter, answer: list[int]) -> list[int]:
        written: list[int] = []
        while len(written) < len(answer):
            draft = drafter.draft(len(answer) - len(written) - 1)
            assert len(written) + len(draft) < len(answer)
            right = 0
            while right < len(draft) and draft[right] == answer[len(written) + right]:
                right += 1
            new = answer[len(written) : len(written) + right + 1]
            drafter.accept(new)
            written += new
            seconds = self.truth[1 + len(draft)]
            self.costs.record(1 + len(draft), seconds)
            self.seconds += seconds
            self.steps += 1
            self.drafted += len(draft)
        return written


CHEAP = {n: 1 + 0.05 * (n - 1) for n in range(1, 9)}
DEAR = {n: float(n) for n in range(1, 9)}


def test_repetition_is_written_in_fewer_steps() -> None:
    costs = StepCosts()
    steps = Steps(costs, CHEAP)
    answer = list(range(20)) * 5
    drafter = Drafter([50, 51], AdaptiveWidth(costs))
    assert steps.write(drafter, answer) == answer
    assert drafter.lookup.history == [50, 51, *answer]
    assert steps.steps < 45
    assert steps.seconds < 0.6 * len(answer)


def test_what_does_not_repeat_costs_next_to_nothing() -> None:
    """Random ids of a small vocabulary match all the time, and wrongly."""
    generator = random.Random(3)
    for truth in (CHEAP, DEAR):
        costs = StepCosts()
        steps = Steps(costs, truth)
        answer = [generator.randrange(40) for _ in range(600)]
        assert steps.write(Drafter([], AdaptiveWidth(costs)), answer) == answer
        assert steps.seconds < 1.06 * len(answer)


def test_a_row_notices_when_drafts_pay_again() -> None:
    """Where none is drafted, the draft is still compared with what came."""
    costs = StepCosts(CHEAP)
    steps = Steps(costs, CHEAP)
    generator = random.Random(3)
    drafter = Drafter([], AdaptiveWidth(costs))
    steps.write(drafter, [generator.randrange(40) for _ in range(600)])
    before = steps.steps
    steps.write(drafter, list(range(100, 130)) * 4)
    assert steps.steps - before < 70


def test_costs_that_do_not_favour_it_turn_it_off() -> None:
    costs = StepCosts()
    steps = Steps(costs, DEAR)
    answer = list(range(20)) * 20
    assert steps.write(Drafter([], AdaptiveWidth(costs)), answer) == answer
    assert steps.drafted < 60  # a few steps to learn what they cost


def test_the_draft_that_promises_more_is_taken() -> None:
    """The proposer's at first, as they promise the same; then the one that is right."""

    class Wrong:
        def extend(self, ids: list[int]) -> None:
            pass

        def propose(self, width: int) -> list[int]:
            return [99] * width

    costs = StepCosts(CHEAP)
    drafter = Drafter([1, 2, 3, 4], AdaptiveWidth(costs), proposer=Wrong())
    drafter.accept([1])
    assert drafter.draft(3) == [99, 99, 99]
    for id in [2, 3, 4, 1] * 4:
        drafter.accept([id])
        draft = drafter.draft(3)
    assert draft == [2, 3, 4]
    assert drafter.width.acceptance(0) < 0.2


def test_a_proposer_is_asked_first() -> None:
    class Counts:
        """Knows that the numbers run on, up to 9."""

        def __init__(self) -> None:
            self.last = 0

        def extend(self, ids: list[int]) -> None:
            self.last = ids[-1]

        def propose(self, width: int) -> list[int]:
            return list(range(self.last + 1, 10))[:width]

    proposer = Counts()
    costs = StepCosts(CHEAP)
    drafter = Drafter([9, 8, 7], AdaptiveWidth(costs), proposer=proposer)
    steps = Steps(costs, CHEAP)
    answer = [*range(1, 10), 8, 7]
    assert steps.write(drafter, answer) == answer
    assert steps.steps <= 4
    assert proposer.last == 7
    assert drafter.width.acceptance(0) > 0.6
    assert drafter.draft(0) == []


def test_threads_share_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pipelines of a model learn together, while old numbers of positions are forgotten."""
    monkeypatch.setattr(StepCosts, "_FORGET_AFTER", 20)
    costs = StepCosts()

    def work(first: int) -> None:
        for i in range(1500):
            positions = 1 + (first + i * i) % 40
            costs.record(positions, 0.001 * positions)
            assert costs.seconds(1 + i % 50) > 0

    assert run_together(work, 8) == []
    assert set(costs._trusted) <= costs._median.keys() == costs._recent.keys()
