"""Finding by example, from a prompt to places: one pass of the decoder, then `models.finder`.

Every patch of a picture says how likely it holds the middle of such a thing, where that is and how
large the thing. Several patches may speak of one thing; the surest is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanomolmo2.batch import Batch
from nanomolmo2.generation.pointing import PointPrompt, Selected, given_points
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.prompt import embed_points, request_of
from nanomolmo2.generation.request import Request
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Encoded, Point
from nanomolmo2.processor.point_space import PointSpace, Target

LEAST_CONFIDENCE = 0.05  # candidates below are not told
SUREST = 0.999
LIKELY = 0.5  # from here on it is listed
LEAST_CROPS, MOST_CROPS = 4, 16
NEAREST = 0.55  # of their size: two middles nearer to each other are of one thing
NEAREST_PATCHES = 0.75  # and by so many patches at least


class Found(NamedTuple):
    """A thing that may be like the examples.

    x, y: pixels of the picture, its middle. size: its longer side, pixels, a guess. confidence: 0
    to 1; from .5 on it is more likely meant than not.
    """

    x: float
    y: float
    size: float
    confidence: float


def find_in(
    model: NanoMolmo2, encoded: Encoded, cache: PrefixCache | None = None
) -> list[list[Found]]:
    """Of every picture of a prompt what is like the points of its question, the likeliest first.

    Args: encoded: ends with a question such as "Point to everything like <point>."
    Raises: ValueError for a model that has not learned to find, and a question without a point.
    """
    if model.finder is None:
        raise ValueError(
            "this model cannot find by example (its point_config has no finder_dim): use one that "
            "has learned it, such as `nanomolmo2 train find` makes"
        )
    request = request_of(model, encoded, cache)
    points, space = request.points, encoded.point_space
    if space is None or points is None or not len(points.targets):
        raise ValueError("found no point in the question: say which thing is meant")
    assert request.inputs_embeds is not None
    ids = np.asarray(request.input_ids)
    return _found(model, ids, request.inputs_embeds, points, space)


def finding_request(
    model: NanoMolmo2, encoded: Encoded, cache: PrefixCache | None = None
) -> Request:
    """`prompt.request_of`, whose lists of points are found all at once where the model can.

    That is done for one picture; what is in which of several, or in a video, the decoder says point
    by point.
    """
    request = request_of(model, encoded, cache)
    space, points = encoded.point_space, request.points
    if model.finder is None or space is None or points is None or len(space.image_sizes) != 1:
        return request

    def find(answer: Sequence[int], targets: Sequence[Target]) -> list[Selected]:
        """See `PointPrompt.find`: one more pass over the prompt and the answer so far."""
        assert request.inputs_embeds is not None
        known = len(points.targets)
        whole = replace(points, targets=np.concatenate([points.targets, _array(targets)]))
        ids = np.concatenate([np.asarray(request.input_ids), np.array(answer, dtype=np.int64)])
        embeds = embed_points(model, ids, whole)
        (found,) = _found(model, ids, embeds, whole, space, given=known)
        chosen: dict[tuple[int, int], Selected] = {}
        for thing in found:
            if thing.confidence >= LIKELY:
                target = space.target(Point(thing.x, thing.y))
                chosen.setdefault(target[:2], Selected(target, thing.confidence))
        return sorted(chosen.values())

    return replace(request, points=replace(points, find=find))


def _array(targets: Sequence[Target]) -> NDArray[np.int64]:
    return np.array(targets, dtype=np.int64).reshape(-1, 3)


@torch.no_grad()
def _found(
    model: NanoMolmo2,
    ids: NDArray[np.int64],
    embeds: Tensor,
    points: PointPrompt,
    space: PointSpace,
    given: int | None = None,
) -> list[list[Found]]:
    """Of every picture what is asked for at the last position.

    Args: ids: (T,) with markers. embeds: (T, D). given: so many targets are the prompt's.
    """
    finder = model.finder
    assert finder is not None
    device = embeds.device

    def on_device(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    batch = Batch(on_device(ids)[None])
    T = torch.arange(len(ids), device=device)[None]
    states = model.llm.states(embeds[None], T, model.attention_mask(batch), None)[0]
    grids = [grid_of(space, view) for view in range(len(space.views))]
    rows, patches = (np.concatenate([grid[i].ravel() for grid in grids]) for i in (0, 1))
    of_tokens = points.tokens, states[on_device(points.places)]
    seen = finder.patches(points.features[on_device(patches)], *of_tokens, on_device(rows))
    is_question = given_points(ids, points)[:given]
    like_rows, slots, _ = points.targets[:given][is_question].T
    like = points.index[like_rows, slots]
    examples = on_device(np.flatnonzero(like[:, None] == patches) % len(patches))
    at = np.flatnonzero(ids == points.rule.patch_token_id)[:given][is_question] + 2
    question = torch.zeros(len(at), dtype=torch.long, device=device)
    wanted = finder.wanted(seen, states[-1:], states[on_device(at)], examples, question)
    mine = torch.ones(1, len(patches), dtype=torch.bool, device=device)
    scores = finder(wanted, seen, mine).final[0].float().sigmoid().cpu().numpy()
    ways = seen.way.float().cpu().numpy()
    found, first = [], 0
    for (row, _), size in zip(grids, space.image_sizes, strict=True):
        last = first + row.size
        found.append(things_of(scores[first:last], ways[first:last], row.shape, size))
        first = last
    return found


def grid_of(space: PointSpace, view: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows, columns) of a picture's patches: the visual token of each, and its own number."""
    grid = space.views[view]
    row, slot = grid.row_and_slot(*np.indices((grid.rows, grid.cols)))
    return row, space.token_pooling[row, slot]


def things_of(
    scores: NDArray[np.float32],
    ways: NDArray[np.float32],
    grid: tuple[int, ...],
    size: tuple[int, int],
) -> list[Found]:
    """The candidates of one picture, without doubles.

    Args: scores: (n,) probabilities, line by line. ways: (n, 3). size: of the picture, pixels.
    """
    (lines, across), (width, height) = grid, size
    some = np.flatnonzero(scores >= LEAST_CONFIDENCE / 2)
    some = some[np.argsort(-scores[some], kind="stable")]
    y, x = np.divmod(some, across)
    step = np.clip(ways[some, :2], -1, 1)  # a middle lies in its patch, or just beside
    middles = np.stack([x + 0.5 + step[:, 0], y + 0.5 + step[:, 1]], axis=1)
    sides = np.exp(np.clip(ways[some, 2], -2, math.log(max(grid))))  # in patches
    kept: list[int] = []
    sure: list[float] = []
    for i in range(len(some)):
        near = np.maximum(NEAREST_PATCHES, NEAREST * np.minimum(sides[i], sides[kept]))
        closeness = near - np.hypot(*(middles[kept] - middles[i]).T)
        chance = float(scores[some[i]])
        if (closeness > 0).any():
            # Patches that speak of one thing share its chance: one of them holds its middle.
            best = int(closeness.argmax())
            sure[best] = min(sure[best] + chance, SUREST)
        else:
            kept.append(i)
            sure.append(chance)
    pixels = width / across, height / lines
    return [
        Found(
            float(np.clip(middles[i, 0] * pixels[0], 0, width)),
            float(np.clip(middles[i, 1] * pixels[1], 0, height)),
            float(sides[i] * max(pixels)),
            chance,
        )
        for i, chance in sorted(zip(kept, sure, strict=True), key=lambda one: -one[1])
    ]


def crops_for(sizes: Sequence[tuple[int, int]], crop: int) -> int:
    """How many tiles show the largest of some pictures in its own size, or larger.

    Args: sizes: (width, height), pixels. crop: side of a tile without its margins.
    Returns: `LEAST_CROPS` to `MOST_CROPS`.
    """
    most = max(math.ceil(width / crop) * math.ceil(height / crop) for width, height in sizes)
    return min(max(most, LEAST_CROPS), MOST_CROPS)
