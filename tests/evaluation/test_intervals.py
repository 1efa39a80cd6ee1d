from __future__ import annotations

import numpy as np
import pytest

from nanomolmo2.evaluation.intervals import bootstrap_interval


def test_the_interval_of_independent_answers_is_the_textbooks():
    """1.96 standard errors to either side of a share of .8 of 1,000."""
    values = [1.0] * 800 + [0.0] * 200
    low, high = bootstrap_interval(values, range(1000))
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert low == pytest.approx(0.8 - half, abs=0.003)
    assert high == pytest.approx(0.8 + half, abs=0.003)


def test_answers_of_one_scene_count_together():
    """Four equal answers a scene say no more than one."""
    rng = np.random.default_rng(1)
    values = rng.random(100) < 0.7
    once = bootstrap_interval(values, range(100))
    again = bootstrap_interval(np.repeat(values, 4), np.repeat(np.arange(100), 4))
    assert again == pytest.approx(once)
    low, high = bootstrap_interval(np.repeat(values, 4), range(400))
    assert high - low < 0.6 * (once[1] - once[0])


def test_it_is_the_same_every_time_and_whatever_the_scenes_are_called():
    values = np.random.default_rng(2).random(60)
    scenes = np.arange(60) // 3
    first = bootstrap_interval(values, scenes)
    assert first == bootstrap_interval(values, scenes)
    assert first == bootstrap_interval(values, scenes + 1000)
    assert first != bootstrap_interval(values, scenes, seed=1)
    assert first[0] < values.mean() < first[1]


def test_what_never_varied_has_no_width():
    assert bootstrap_interval([1.0, 1.0, 1.0], [0, 1, 1]) == (1, 1)
    assert bootstrap_interval([0.5], [7]) == (0.5, 0.5)
