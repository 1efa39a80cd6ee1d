"""Candidates that are judged together: what is known of two by hand, and what may not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nanomolmo2.models.finder import APART, PAIRS, Finder, Judge, Patches, pairs_of

E, D, F = 64, 16, 8


def patches_of(grid: list[tuple[float, float]], ways: list[tuple[float, float, float]]) -> Patches:
    """Looks along an axis each, but for the last two, which are equal."""
    n = len(grid)
    look = torch.eye(n, E)
    look[-1] = look[-2]
    return Patches(look, look, look, torch.zeros(n), torch.tensor(ways), torch.tensor(grid))


def test_numbers_about_two_candidates_are_those_found_by_hand() -> None:
    """Middles at (2.5, 0.5), (3.5, 0.5) and, in the second picture, (0.5, 0.5) patches."""
    ways = [(1.0, 0.0, math.log(2.0)), (0.0, 0.0, math.log(4.0)), (0.0, 0.0, 0.0)]
    patches = patches_of([(1.0, 0.0), (3.0, 0.0), (APART, 0.0)], ways)
    pairs = pairs_of(patches, torch.tensor([[0, 1, 2]]))
    assert pairs.shape == (1, 3, 3, PAIRS)
    away, larger = 1.0, 4.0
    assert pairs[0, 0, 1].tolist() == pytest.approx(
        [
            *(0.0, 0.0),  # unlike
            math.exp(-((2 * away / larger) ** 2)),
            math.exp(-away / 2),
            math.log(2) / 2,
            math.log(2.0) - math.log(4.0),
        ]
    )
    assert pairs[0, 1, 0, :5].tolist() == pytest.approx(pairs[0, 0, 1, :5].tolist())
    assert pairs[0, 1, 0, 5].item() == pytest.approx(math.log(2.0))
    assert pairs[0, 1, 2, 0].item() == 1  # alike
    assert pairs[0, 1, 2, 2:4].tolist() == pytest.approx([0, 0])  # of two pictures: far away
    assert pairs[0, 0, 0].tolist() == pytest.approx([1, 1, 1, 1, 0, 0])


@pytest.fixture
def judge() -> Judge:
    torch.manual_seed(0)
    made = Judge(D, E)
    torch.nn.init.normal_(made.decide.weight)
    return made


def asked(number: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return (
        torch.randn(2, number, 4 * E + 8),
        torch.randn(2, number, number, PAIRS),
        torch.randn(2, D),
    )


def test_the_order_of_candidates_does_not_matter(judge: Judge) -> None:
    candidates, pairs, states = asked(6)
    shown = torch.tensor([[True] * 6, [True, False, True, True, True, False]])
    said = judge(candidates, pairs, states, shown)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    again = judge(candidates[:, order], pairs[:, order][:, :, order], states, shown[:, order])
    torch.testing.assert_close(again, said[:, order], rtol=1e-4, atol=1e-5)


def test_what_is_no_candidate_changes_nothing(judge: Judge) -> None:
    candidates, pairs, states = asked(6)
    shown = torch.tensor([[True, True, True, True, False, False]] * 2)
    said = judge(candidates, pairs, states, shown)[:, :4]
    alone = judge(candidates[:, :4], pairs[:, :4, :4], states, shown[:, :4])
    torch.testing.assert_close(said, alone, rtol=1e-4, atol=1e-5)
    seen = shown | True
    assert not torch.allclose(judge(candidates, pairs, states, seen)[:, :4], alone, atol=1e-3)


def test_what_is_known_of_two_candidates_counts(judge: Judge) -> None:
    candidates, pairs, states = asked(6)
    shown = torch.ones(2, 6, dtype=torch.bool)
    said = judge(candidates, pairs, states, shown)
    assert not torch.allclose(judge(candidates, 0 * pairs, states, shown), said, atol=1e-3)


def test_at_first_the_judge_changes_no_score() -> None:
    torch.manual_seed(0)
    finder = Finder(F, D, E)
    tokens = torch.randn(2, D), torch.zeros(2, D), torch.tensor([0, 0, 1, 1])
    grid = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0]])
    patches = finder.patches(torch.randn(4, F), *tokens, grid)
    nothing, first = torch.zeros(1, D), torch.tensor([0])
    wanted = finder.wanted(patches, nothing, None, first, first, gates=torch.ones(1))
    scores = finder(wanted, patches, torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(scores.first, scores.final)
