"""How sure a mean score is: intervals from resampled scenes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 1000


def bootstrap_interval(
    values: Sequence[float], scenes: Sequence[int], *, seed: int = 0
) -> tuple[float, float]:
    """The interval of `LEVEL` around the mean of some scores.

    Answers about one scene are not independent: a scene is drawn again with all of its answers.
    The same seed gives the same interval. Where all scores are equal, the interval has no width:
    resampling cannot know what it never saw.

    Args:
        values: (n,) scores, n at least 1.
        scenes: (n,) the number of each score's scene.
    Returns: its lower and upper end (percentiles of the `RESAMPLES` means).
    """
    found, index = np.unique(np.asarray(scenes), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=float))
    sizes = np.bincount(index)
    draws = _draws(len(found), seed)
    means = (draws @ sums) / (draws @ sizes)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=8)
def _draws(num_scenes: int, seed: int) -> NDArray[np.float64]:
    """(`RESAMPLES`, num_scenes) how often each scene was drawn."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_scenes, np.full(num_scenes, 1 / num_scenes), size=RESAMPLES)
    return draws.astype(np.float64)
