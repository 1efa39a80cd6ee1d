"""What a model that finds all at once learns from the lists of points that its data have.

An answer that lists points says of every patch of its pictures whether the middle of what was asked
for lies there, and so does "There are none.". From a photo with ten things a list has ten places to
learn from, one after the other; the finder has some hundred patches at a time, and the same answer
for every wording. So few annotated photos go a long way.

All is read off a packed batch: its markers of points, in questions and in answers. It is asked at
the end of a question, and where an answer begins a list: there the decoder looks up what it lists.

n patches that can be selected, of all pictures of a batch; Q questions, J examples of all of them,
H places that they ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nanomolmo2.batch import IGNORED_LABEL, NO_MORE_POINTS, Batch
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.finder import APART, Patches, Scores
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.models.pointing import PointingNanoMolmo2, example_of
from nanomolmo2.processor import Processor
from nanomolmo2.processor.point_space import CELLS_PER_SIDE
from nanomolmo2.processor.points import NOTHING_THERE
from nanomolmo2.training.checkpoint import is_sharded
from nanomolmo2.training.recipe import Recipe

HITS_WEIGHT = 2.0  # of a patch that holds what is asked for, beside one that does not
FIRST_WEIGHT = 0.5  # of the scores of patches by themselves, beside those among the others
WAY_WEIGHT = 0.5  # of how far it is to a middle
LOCATION = 2  # the marker of a cell stands so far behind that of its row
CELL = 1 / CELLS_PER_SIDE  # of a patch: as exact as a middle is known


@dataclass
class FindPlaces:
    """Where a batch asks, and with which examples.

    Attributes:
        patch, row: (n,) number of the patch among those of all crops, and of its visual token.
        grid: (n, 2) column and row of the patch in its picture; pictures lie `finder.APART`.
        example: (n,) which example of the batch it is of.
        of: (Q,) the example of a question. state_at: (Q,) its last position, of all B * T.
        like_at: (J,) the last positions of its points. like: (J,) the patches (of n) that they
            select. question: (J,) the question that they are of.
    """

    patch: Tensor
    row: Tensor
    grid: Tensor
    example: Tensor
    of: Tensor
    state_at: Tensor
    like_at: Tensor
    like: Tensor
    question: Tensor


class Scored(NamedTuple):
    """What the finder says about a batch."""

    scores: Scores
    mine: Tensor  # (Q, n) bool: the patch is in a picture of the question's example
    patches: Patches


def scores_of(
    model: PointingNanoMolmo2, batch: Batch, states: Tensor, places: FindPlaces
) -> Scored:
    """Args: batch: encoded. states: (B, T, D) of the decoder, before its last norm."""
    finder, seen = model.finder, model.see(batch)
    assert finder is not None
    flat = states.flatten(0, 1)
    features = seen.features[places.patch]
    patches = finder.patches(features, seen.tokens, flat[seen.places], places.row, places.grid)
    at_points = flat[places.like_at], places.like, places.question
    wanted = finder.wanted(patches, flat[places.state_at], *at_points)
    mine = places.of[:, None] == places.example
    return Scored(finder(wanted, patches, mine), mine, patches)


@dataclass
class FindTargets(FindPlaces):
    """Targets of a batch.

    Attributes:
        hits: (Q, n) bool, whether it holds the middle of what is asked for.
        unsure: (Q, n) bool, whether such a middle lies near its edge: it may say either.
        place: (H, 2) question and patch (of n) of every hit. way: (H, 2) from the patch's middle to
            the thing's, right and down, in patches.
    """

    hits: Tensor
    unsure: Tensor
    place: Tensor
    way: Tensor

    def __len__(self) -> int:
        return len(self.of)

    def to(self, device: torch.device) -> FindTargets:
        """The same on a device."""
        return FindTargets(**{name: value.to(device) for name, value in vars(self).items()})


class FindSums(NamedTuple):
    """Of all questions of a batch: the loss, and how many patches were found, said and right."""

    loss: Tensor
    hits: Tensor
    said: Tensor
    right: Tensor


def find_targets(batch: Batch, config: NanoMolmo2Config, none: Sequence[int]) -> FindTargets | None:
    """The targets of a batch on the CPU; None where nothing in it asks where things are.

    Args:
        none: the ids of the answer that says that there are none.
    """
    rule = config.point_config
    if batch.labels is None or batch.image_token_pooling is None or rule is None:
        return None
    ids, labels = (x.flatten().numpy() for x in (batch.input_ids, batch.labels))
    branch = example_of(batch, branches=True).flatten().numpy()
    seen = _Seen(batch, config)
    markers = np.flatnonzero(ids == rule.patch_token_id)
    targets = np.zeros((0, 3), np.int64)
    if batch.point_targets is not None:
        targets = batch.point_targets.numpy()
    lists = _lists(batch, targets)
    read = [
        found
        for number in np.unique(branch[labels != IGNORED_LABEL])
        for found in _questions(branch == number, labels, _Points(markers, targets, lists), none)
    ]
    if not read or not len(seen.patch):
        return None
    hits = np.zeros((len(read), len(seen.patch)), bool)
    unsure = np.zeros_like(hits)
    places, ways = [], []
    like: list[tuple[int, int, int]] = []  # question, position, patch of n
    for q, (_, asked, given) in enumerate(read):
        for row, slot, cell in asked:
            at = seen.number[row, slot]
            hits[q, at] = True
            across, down = np.divmod(max(cell, 0), CELLS_PER_SIDE) - np.array(1)
            unsure[q, seen.beside(at, int(across), int(down))] = True
            places.append((q, at))
            ways.append((across * CELL, down * CELL))
        like += [(q, at, int(seen.number[row, slot])) for at, (row, slot, _) in given]
    first = example_of(batch).flatten().numpy()
    state_at = np.array([state for state, _, _ in read])
    of_like = np.array(like, np.int64).reshape(-1, 3).T
    return FindTargets(
        patch=torch.from_numpy(seen.patch),
        row=torch.from_numpy(seen.row),
        grid=torch.from_numpy(seen.grid),
        example=torch.from_numpy(seen.example),
        hits=torch.from_numpy(hits),
        unsure=torch.from_numpy(unsure & ~hits),
        of=torch.from_numpy(first[state_at]),
        state_at=torch.from_numpy(state_at),
        like_at=torch.from_numpy(of_like[1]),
        like=torch.from_numpy(of_like[2]),
        question=torch.from_numpy(of_like[0]),
        place=torch.tensor(places, dtype=torch.long).reshape(-1, 2),
        way=torch.tensor(ways, dtype=torch.float32).reshape(-1, 2),
    )


class _Seen:
    """The patches of a batch that can be selected.

    Attributes:
        index: (rows, S) the patches of every visual token, -1 where there is none.
        number: (rows, S) which of the n patches each is; -1 for those of overviews.
        patch, row, grid, example: as of `FindPlaces`.
    """

    def __init__(self, batch: Batch, config: NanoMolmo2Config) -> None:
        assert batch.image_token_pooling is not None
        index = batch.image_token_pooling.numpy()
        self.index = index[(index >= 0).any(axis=1)]
        ids = batch.input_ids.flatten()
        places = config.is_visual(ids).nonzero()[:, 0]
        can = (ids[places] == config.image_token_id).numpy()
        self.row, slot = np.nonzero((self.index >= 0) & can[:, None])
        self.patch = self.index[self.row, slot]
        self.grid = _grid(places.numpy(), can, self.row, slot, self.index.shape[1])
        self.example = example_of(batch).flatten()[places].numpy()[self.row]
        self.number = np.full(self.index.shape, -1)
        self.number[self.row, slot] = np.arange(len(self.patch))
        self.side = config.vision_config.image_size // config.vision_config.patch_size
        self._at = {patch: i for i, patch in enumerate(self.patch.tolist())}

    def beside(self, at: int, across: int, down: int) -> list[int]:
        """The patches (of n) of the same crop that lie to one side, or to two, of a patch."""
        crop, place = divmod(int(self.patch[at]), self.side**2)
        y, x = divmod(place, self.side)
        found = []
        for dy, dx in {(0, across), (down, 0), (down, across)} - {(0, 0)}:
            if 0 <= y + dy < self.side and 0 <= x + dx < self.side:
                patch = (crop * self.side + y + dy) * self.side + x + dx
                found.append(self._at.get(patch, at))
        return found


def _grid(
    places: NDArray[np.int64],
    can: NDArray[np.bool_],
    row: NDArray[np.int64],
    slot: NDArray[np.int64],
    slots: int,
) -> NDArray[np.float32]:
    """(n, 2) column and row of patches, see `FindPlaces`.

    Visual tokens stand line by line, a token between two lines and more between two pictures.

    Args:
        places: (rows,) positions of the visual tokens. can: (rows,) whether a row can be selected.
        row, slot: (n,) of the patches.
    """
    at = places[can]
    gap = np.diff(at, prepend=at[:1])
    new_line = np.cumsum(gap > 1)
    new_view = np.cumsum(gap > 2)
    first_of_line = np.searchsorted(new_line, new_line)  # where the line of each begins
    first_line = new_line[np.searchsorted(new_view, new_view)]
    column = np.arange(len(at)) - first_of_line
    side = round(slots**0.5)
    number = np.cumsum(can)[row] - 1
    x = column[number] * side + slot % side + new_view[number] * APART
    y = (new_line - first_line)[number] * side + slot // side
    return np.stack([x, y], axis=1).astype(np.float32)


def _lists(batch: Batch, targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P,) the list of every marker; if nothing else is said each ends with its last."""
    if batch.point_lists is not None:
        return batch.point_lists.numpy()
    ends = targets[:, 0] == NO_MORE_POINTS
    return np.concatenate([[0], np.cumsum(ends)[:-1]]) if len(ends) else np.zeros(0, np.int64)


class _Points(NamedTuple):
    """Where rows are marked in a batch, what is selected there, and in which list."""

    markers: NDArray[np.int64]
    targets: NDArray[np.int64]
    lists: NDArray[np.int64]


_Target = tuple[int, int, int]
_Question = tuple[int, list[_Target], list[tuple[int, _Target]]]


def _questions(
    mine: NDArray[np.bool_], labels: NDArray[np.int64], points: _Points, none: Sequence[int]
) -> Iterator[_Question]:
    """Of a branch where it is asked, what for, and the points of its questions with the positions
    where they end; nothing for one that does not ask where things are.

    Args:
        mine: (B * T,) the positions of the branch.
    """
    markers, targets, lists = points
    learned = np.flatnonzero(mine & (labels != IGNORED_LABEL))
    breaks = np.flatnonzero(np.diff(learned) > 1)
    start = int(learned[breaks[-1] + 1] if len(breaks) else learned[0])
    own, whole = mine[markers], (targets[:, 1:] >= 0).all(axis=1)
    like = np.flatnonzero(own & whole & (markers < start) & (labels[markers] == IGNORED_LABEL))
    given = [(int(markers[i]) + LOCATION, _target(targets[i])) for i in like]
    answered = own & (markers >= start)
    if not answered.any():
        said = labels[learned[learned >= start]].tolist()
        if said[: len(none)] == list(none) and len(said) <= len(none) + 1:  # the end of the turn
            yield start - 1, [], given
        return
    numbers = np.unique(lists[answered])
    for number in numbers:
        of_list = answered & (lists == number)
        asked = [_target(target) for target in targets[of_list & whole]]
        if len(numbers) == 1:
            yield start - 1, asked, given
        yield int(markers[of_list][0]) - 1, asked, given


def _target(values: NDArray[np.int64]) -> _Target:
    row, slot, cell = (int(value) for value in values)
    return row, slot, cell


def scores_loss(scores: Scores, hits: Tensor, asked: Tensor) -> Tensor:
    """(Q,) the loss of both scores, summed over the patches that are asked.

    Args: hits, asked: (Q, n) bool.
    """
    weights = torch.where(hits, HITS_WEIGHT, 1.0) * asked
    summed = weights.new_zeros(len(hits))
    for logits, weight in ((scores.final, 1.0), (scores.first, FIRST_WEIGHT)):
        each = F.binary_cross_entropy_with_logits(logits.float(), hits.float(), reduction="none")
        summed = summed + weight * (each * weights).sum(dim=1)
    return summed


def find_loss(model: NanoMolmo2, batch: Batch, states: Tensor, targets: FindTargets) -> FindSums:
    """The loss of all questions of a batch, summed; that of one is a sum over the patches of its
    pictures, over 1 and the number of things that are asked for.

    Args:
        batch: encoded. states: (B, T, D) of the decoder, before its last norm.
    """
    scores, of_mine, patches = scores_of(model, batch, states, targets)
    hits = targets.hits
    mine = of_mine & ~targets.unsure
    summed = scores_loss(scores, hits, mine)
    question, patch = targets.place.T
    # Where in its ninth of the patch a middle lies is not known, so nothing is asked of it there.
    off = ((patches.way[patch, :2].float() - targets.way).abs() - CELL / 2).clamp(min=0)
    summed = summed.index_add(0, question, WAY_WEIGHT * off.sum(dim=1))
    with torch.no_grad():
        said = (scores.final > 0) & mine
        counts = [x.sum() for x in (hits & mine, said, said & hits)]
    return FindSums((summed / (1 + hits.sum(dim=1))).sum(), *counts)


# ---- in a run ----


@dataclass(frozen=True)
class Finding:
    """What a run adds to the loss of its answers.

    Attributes:
        weight: of the mean loss of a question, beside the mean loss of a label.
        config: of the model.
        none: the ids of the answer that says that there are none.
    """

    weight: float
    config: NanoMolmo2Config
    none: tuple[int, ...]

    @classmethod
    def of(cls, recipe: Recipe, model: NanoMolmo2, processor: Processor) -> Self | None:
        """That of a run; None where it has none, or the model is spread over processes."""
        if not recipe.find_weight or model.finder is None or is_sharded(model):
            return None
        if "points" not in recipe.train:
            return None
        none = processor.tokenizer.encode_text(NOTHING_THERE)
        return cls(recipe.find_weight, model.config, tuple(none))


@dataclass
class FindPart:
    """What a micro-batch asks, and what was found of it."""

    targets: FindTargets
    sums: FindSums | None = None


class FindStep:
    """The finder's part in a step of several micro-batches."""

    def __init__(self, finding: Finding | None, micro_batches: Sequence[Batch]) -> None:
        self.weight = 0.0 if finding is None else finding.weight
        self.parts = dict[int, FindPart]()
        for number, micro in enumerate(micro_batches if finding is not None else ()):
            assert finding is not None
            if (targets := find_targets(micro, finding.config, finding.none)) is not None:
                self.parts[number] = FindPart(targets)
        self.questions = sum(len(part.targets) for part in self.parts.values())

    def of(self, number: int) -> FindPart | None:
        """Of a micro-batch; None where nothing is asked."""
        return self.parts.get(number)

    def add(self, number: int, loss: Tensor) -> Tensor:
        """The loss of a micro-batch with what its questions cost."""
        part = self.parts.get(number)
        if part is None or part.sums is None:
            return loss
        found, part.sums = part.sums, FindSums(*(x.detach() for x in part.sums))
        return loss + self.weight * found.loss / self.questions

    def metrics(self) -> dict[str, float | Tensor]:
        """What was found of what is there (recall), and how much of it is right (precision)."""
        sums = [part.sums for part in self.parts.values() if part.sums is not None]
        if not sums:
            return {}
        loss, hits, said, right = (torch.stack(x).sum() for x in zip(*sums, strict=True))
        return {
            "finder_loss": loss / self.questions,
            "finder_recall": right / hits,
            "finder_precision": right / said,
        }
