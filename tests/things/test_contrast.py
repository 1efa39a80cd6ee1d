"""What patches show and which of them are alike: labels by hand, the loss against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanomolmo2.emoji.heads import NO_LABEL
from nanomolmo2.things.cell_labels import (
    GROUND,
    SAMPLES,
    CellLabels,
    label_cells,
    middle_owners,
)
from nanomolmo2.things.contrast import Compared, compared, like_loss, some_cells
from nanomolmo2.things.drawings import Drawings
from nanomolmo2.things.kinds import Kind
from nanomolmo2.things.looks import drawn_look
from nanomolmo2.things.scenes import Scene, Thing


def scene_of(size: int, *boxes: tuple[int, int, int, int, int], factor: int = 1) -> Scene:
    """A square picture with filled boxes (kind, x0, y0, x1, y1); things of 3 kinds at most."""
    drawings = Drawings.for_training()
    looks = [drawn_look(np.random.default_rng(i), drawings, i) for i in range(3)]
    image = np.zeros((size, size, 3), np.uint8)
    image[..., 0], image[..., 1] = np.indices((size, size)) % 251
    instances = np.full((size, size), -1, np.int16)
    things = []
    for number, (kind, *corners) in enumerate(boxes):
        x0, y0, x1, y1 = (factor * corner for corner in corners)
        instances[y0:y1, x0:x1] = number
        box = tuple(map(float, (x0, y0, x1, y1)))
        things.append(Thing(kind, box, ((x0 + x1) / 2, (y0 + y1) / 2), 1.0, float(x1 - x0)))
    kinds = tuple(Kind(look, (8, 16)) for look in looks)
    return Scene(image, tuple(things), kinds, instances, "plain")


# A picture of 352 pixels is its own canvas: 2 x 2 tiles, 22 x 22 patches, 11 x 11 tokens.
BOXES = (
    (0, 40, 40, 72, 72),  # middle 56, 56: patch (3, 3), token (1, 1)
    (1, 168, 168, 180, 180),  # middle 174, 174: patch (10, 10), token (5, 5), two pixels off (5, 5)
    (2, 210, 36, 218, 44),  # middle 214, 40: patch (2, 13), token (1, 6)
    (1, 200, 40, 208, 48),  # middle 204, 44: patch (2, 12), token (1, 6) too, another kind
)


@pytest.mark.parametrize("factor", [1, 2])  # of the second, the grid is half as fine
def test_labels_of_a_drawn_scene_are_those_found_by_hand(factor: int) -> None:
    scene = scene_of(352 * factor, *BOXES, factor=factor)
    patches = label_cells(scene, 22, 22, SAMPLES, margin=0.25)
    owner, kind = (patches[name].reshape(22, 22) for name in ("owner", "kind"))
    assert owner[3, 3] == 0 and owner[2, 13] == 2 and kind[3, 3] == 0
    assert owner[2, 12] == 3 and kind[2, 12] == 1
    assert owner[10, 10] == 1
    assert owner[10, 11] == 1  # 174 is 2 px off its column: it may count there
    assert kind[20, 20] == GROUND and owner[20, 20] == NO_LABEL
    # From the patch (2, 2), whose middle is (40, 40), the first thing's is one patch away; it is
    # two patches large.
    assert patches["way"][22 * 2 + 2].tolist() == pytest.approx([1.0, 1.0, math.log(2)])
    assert patches["way"][22 * 20 + 20].tolist() == [0, 0, 0]
    coarse = label_cells(scene, 11, 11, SAMPLES, margin=0.25)
    owner, kind = (coarse[name].reshape(11, 11) for name in ("owner", "kind"))
    # 8 of its 32 columns are the first thing, as are 8 of its rows: a sixteenth is not a third,
    # and more than nothing. Its middle is 8 px away: it may count there.
    assert kind[2, 2] == NO_LABEL and owner[2, 2] == NO_LABEL
    assert owner[1, 2] == NO_LABEL  # 56 is a quarter of a cell off 64, and no nearer
    assert kind[1, 2] == NO_LABEL  # 8 of 32 columns, in 24 of 32 rows: under a third
    assert kind[1, 6] == NO_LABEL  # two kinds have their middle there
    assert owner[1, 6] == 3  # the nearer one to 208, 48
    assert owner[5, 5] == 1 and kind[5, 5] == 1
    assert set(owner.ravel().tolist()) == {0, 1, 3, NO_LABEL}


def test_of_two_middles_in_a_cell_the_nearer_one_may_count() -> None:
    owners = middle_owners(np.array([[0.9, 0.5], [0.4, 0.5], [1.2, 0.5]]), 1, 3, margin=0.25)
    assert owners.tolist() == [1, 2, NO_LABEL]
    assert middle_owners(np.empty((0, 2)), 1, 2, 0.25).tolist() == [NO_LABEL, NO_LABEL]


def some_labels() -> tuple[CellLabels, torch.Tensor]:
    """Two pictures; kinds 0 and 1 in the first, 2 and 3 in the second. 2 looks as 0 does."""
    kind = torch.tensor([0, 0, 1, GROUND, 0, 2, 3, 3, NO_LABEL, GROUND])
    picture = torch.tensor([0] * 5 + [1] * 5)
    n = len(kind)
    labels = CellLabels(picture, torch.full((n,), NO_LABEL), kind, torch.zeros(n, 3))
    return labels, torch.tensor([7, 8, 7, 9])


def test_what_is_compared() -> None:
    labels, looks = some_labels()
    pairs = compared(labels, looks)

    def listed(which: torch.Tensor, row: int) -> list[int]:
        return torch.nonzero(which[row])[:, 0].tolist()

    assert listed(pairs.alike, 0) == [1, 4] and listed(pairs.alike, 6) == [7]
    assert listed(pairs.alike, 5) == [] and listed(pairs.alike, 3) == []
    assert listed(pairs.rivals, 0) == [2] and listed(pairs.rivals, 5) == [6, 7]
    assert listed(pairs.ground, 0) == [3] and listed(pairs.ground, 3) == []
    assert listed(pairs.others, 0) == [6, 7]  # not 5, of an equal look
    assert listed(pairs.others, 2) == [5, 6, 7]


def test_the_loss_is_that_of_a_plain_loop() -> None:
    labels, looks = some_labels()
    scores = 4 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).double()
    kind, picture, s = labels.kind.tolist(), labels.picture.tolist(), scores.tolist()
    contrastive = []
    for i in range(10):
        if kind[i] < 0:
            continue
        against, losses = 0.0, []
        for j in range(10):
            here = picture[i] == picture[j]
            if kind[j] >= 0 and kind[j] != kind[i] and here:
                against += 3 * math.exp(s[i][j])
            elif kind[j] == GROUND and here:
                against += 0.5 * math.exp(s[i][j])
            elif kind[j] >= 0 and not here and looks[kind[j]] != looks[kind[i]]:
                against += math.exp(s[i][j])
        for j in range(10):
            if j != i and kind[j] == kind[i]:
                own = math.exp(s[i][j])
                losses.append(-math.log(own / (own + against)))
        if losses:
            contrastive.append(sum(losses) / len(losses))
    pairs = compared(labels, looks)
    expected = sum(contrastive) / len(contrastive)
    assert like_loss(scores, pairs, 3, 0.5).item() == pytest.approx(expected, rel=1e-9)


def test_nothing_to_compare_is_no_loss() -> None:
    none = torch.zeros(2, 2, dtype=torch.bool)
    scores = torch.ones(2, 2, requires_grad=True)
    pairs = Compared(none, none, none, none)
    loss = like_loss(scores, pairs)
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None and scores.grad.abs().max() == 0


def test_too_many_cells_are_thinned_out_but_no_middles() -> None:
    labels, _ = some_labels()
    centred = torch.zeros(10, dtype=torch.bool)
    centred[[5, 6, 7]] = True
    some = some_cells(labels, centred, 6).tolist()
    assert len(some) <= 6 and {5, 6, 7} <= set(some) and 8 not in some
