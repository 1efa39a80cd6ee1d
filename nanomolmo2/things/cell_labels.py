"""What the patches of pictures show, for what learns to find.

A picture is cut into tiles as the processor cuts it; overviews are left out: what is in them cannot
be pointed at. Tiles overlap, and what is left of them is one grid of patches, here called cells.

Things are numbered through all pictures of a batch, and so are kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanomolmo2.emoji.heads import NO_LABEL
from nanomolmo2.things.scenes import Scene, Thing

GROUND = -1  # kind of a cell with nothing in it; NO_LABEL where it is not clear what it shows
SAMPLES = 8  # places a patch and axis at which it is looked what it shows
LEAST_SHARE = 0.3  # of a cell: from here on it shows a kind
MOST_COVERED = 0.02  # of a cell: up to here it shows the ground


@dataclass
class CellLabels:
    """Targets of n cells, those of all pictures one after another.

    picture: (n,) int64, which picture a cell is of.
    owner: (n,) int64, number of the thing that may count here, or NO_LABEL.
    kind: (n,) int64, number of the kind that it shows, `GROUND`, or NO_LABEL.
    way: (n, 3), of cells that show a thing: how far its middle is, right and down, and the
        logarithm of its longer side, all in cells.
    """

    picture: Tensor
    owner: Tensor
    kind: Tensor
    way: Tensor

    def of_cells(self, numbers: Tensor) -> CellLabels:
        """Those of some cells."""
        return CellLabels(*(column[numbers] for column in vars(self).values()))


def label_cells(
    scene: Scene, rows: int, cols: int, samples: int, margin: float
) -> dict[str, np.ndarray]:
    """``owner``, ``kind`` and ``way`` of rows x cols cells of one picture; see `CellLabels`.

    Args: samples: places a cell and axis at which it is looked what it shows.
    """
    shown = things_shown(scene.instance_map, len(scene.things), rows, cols, samples)
    return labels_of(scene, shown, margin)


def labels_of(scene: Scene, shown: np.ndarray, margin: float) -> dict[str, np.ndarray]:
    """`label_cells` of the cells that ``shown`` is about, see `things_shown`."""
    rows, cols = shown.shape[:2]
    height, width = scene.image.shape[:2]
    scale = np.array([cols / width, rows / height])
    centres = np.array([thing.center for thing in scene.things]).reshape(-1, 2) * scale
    inside = np.minimum(centres.astype(np.int64), (cols - 1, rows - 1)) @ (1, cols)
    shown = shown.reshape(rows * cols, -1)
    return {
        "owner": middle_owners(centres, rows, cols, margin),
        "kind": kinds_shown(shown, scene, inside),
        "way": ways(shown, scene.things, inside, scale, cols),
    }


def cell_middles(rows: int, cols: int) -> np.ndarray:
    """(rows * cols, 2) middles x, y of a grid's cells, in cells."""
    y, x = np.divmod(np.arange(rows * cols), cols)
    return np.stack([x, y], axis=1) + 0.5


def middle_owners(centres: np.ndarray, rows: int, cols: int, margin: float) -> np.ndarray:
    """(rows * cols,) number of the thing that may count in each cell, NO_LABEL where none may.

    A cell is the nearest thing's, and a middle in it is nearer than one beside it.

    Args: centres: (T, 2) middles of the things, x and y in cells.
    """
    if not len(centres):
        return np.full(rows * cols, NO_LABEL, np.int64)
    right = np.abs(np.arange(cols)[:, None] + 0.5 - centres[:, 0])  # (cols, T)
    down = np.abs(np.arange(rows)[:, None] + 0.5 - centres[:, 1])
    away = np.maximum(right, down[:, None]).reshape(rows * cols, -1)
    nearest = away.argmin(axis=1)
    return np.where(away.min(axis=1) < 0.5 + margin, nearest, NO_LABEL)


def things_shown(
    instance_map: np.ndarray, number: int, rows: int, cols: int, samples: int
) -> np.ndarray:
    """(rows, cols, number + 1) at how many places of each cell each of so many things is, and
    last the ground; there are samples x samples places in a cell.
    """
    height, width = instance_map.shape
    y = ((np.arange(rows * samples) + 0.5) * height / (rows * samples)).astype(np.int64)
    x = ((np.arange(cols * samples) + 0.5) * width / (cols * samples)).astype(np.int64)
    things = instance_map.take(y, 0).take(x, 1).astype(np.int64)
    things[things < 0] = number
    # Each place counts in the bin of its cell and of what it shows.
    cells = (np.arange(rows).repeat(samples) * cols)[:, None] + np.arange(cols).repeat(samples)
    bins = cells * (number + 1) + things
    counts = np.bincount(bins.ravel(), minlength=rows * cols * (number + 1))
    return counts.reshape(rows, cols, number + 1)


def kinds_shown(shown: np.ndarray, scene: Scene, inside: np.ndarray) -> np.ndarray:
    """(n,) the kind that most of each cell shows, `GROUND`, or NO_LABEL.

    A small thing is shown by the cell of its middle, unless one of another kind is too.

    Args: shown: (n, T + 1) of `things_shown`. inside: (T,) cell of each thing's middle.
    """
    kinds = np.array([thing.kind for thing in scene.things], np.int64)
    of_kind = np.arange(len(scene.kinds)) == kinds[:, None]  # (T, K)
    # In float64 counts are exact, and products are faster than those of integers.
    shares = shown[:, :-1].astype(np.float64) @ of_kind / shown[0].sum()
    found = np.where(shares.sum(axis=1) <= MOST_COVERED, GROUND, NO_LABEL)
    lowest, highest = np.full(len(shown), len(scene.kinds)), np.full(len(shown), -1)
    np.minimum.at(lowest, inside, kinds)
    np.maximum.at(highest, inside, kinds)
    found = np.where(shares.max(axis=1) >= LEAST_SHARE, shares.argmax(axis=1), found)
    found = np.where(lowest == highest, highest, found)
    return np.where(lowest < highest, NO_LABEL, found)


def ways(
    shown: np.ndarray, things: Sequence[Thing], inside: np.ndarray, scale: np.ndarray, cols: int
) -> np.ndarray:
    """(n, 3) float32, `CellLabels.way`, of the thing that each cell shows most; 0 without one.

    Args:
        shown: (n, T + 1) of `things_shown`. inside: (T,) cell of each thing's middle.
        scale: (2,) cells a pixel, across and down.
    """
    n, number = len(shown), len(things)
    counts = shown.copy()
    counts[:, -1] = 0  # the ground
    most = np.where(counts.max(axis=1) > 0, counts.argmax(axis=1), -1)
    most[inside] = np.where(most[inside] < 0, np.arange(number), most[inside])
    of_things = np.zeros((number + 1, 3))
    for i, thing in enumerate(things):
        x0, y0, x1, y1 = thing.box
        of_things[i, :2] = thing.center * scale
        of_things[i, 2] = np.log(max((x1 - x0) * scale[0], (y1 - y0) * scale[1]))
    found = of_things[most]
    found[:, :2] -= cell_middles(n // cols, cols)
    found[most < 0] = 0
    return found.astype(np.float32)
