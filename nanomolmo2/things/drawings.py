"""Drawings of things as arrays: thousands to train on, in a folder of their own; a few to test on.

`scripts/build_drawings.py` makes both. The package ships the held-out ones only; where no folder
of drawings is named, training takes the emoji styles that are trained on anyway.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.emoji.sprites import CATEGORIES, STYLE_GROUPS, Sprites
from nanomolmo2.files import read_regular

ASSETS = Path(__file__).parents[1] / "assets" / "things"
HELD_OUT_SETS = ("openmoji", "twemoji")  # never in training
EMOJI_PX = 72  # side of the cells that emoji sprites are brought to
LARGEST_INDEX = 64_000_000  # bytes
THUMB_PX = 8  # side of a thumbnail


@dataclass(frozen=True, eq=False)
class Drawings:
    """Drawings of one or more sets.

    Attributes:
        cells: uint8 (n, px, px, 4), RGBA; may be mapped from a file.
        sets, names: of each drawing.
    """

    cells: np.ndarray
    sets: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def set_names(self) -> frozenset[str]:
        """Each set once."""
        return frozenset(self.sets)

    @cached_property
    def _numbers(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """The numbers of each set's drawings, and how often a set is drawn from."""
        numbers = tuple(self.of_set(name) for name in dict.fromkeys(self.sets))
        weights = np.sqrt([len(n) for n in numbers])
        return numbers, np.cumsum(weights / weights.sum())

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a drawing at random, of large sets less often than there are more of it."""
        numbers, chances = self._numbers
        mine = numbers[min(int(np.searchsorted(chances, rng.random())), len(numbers) - 1)]
        return int(mine[rng.integers(len(mine))])

    def of_set(self, name: str) -> np.ndarray:
        """Numbers of the drawings of a set."""
        return np.flatnonzero(np.array(self.sets) == name)

    def cell(self, number: int) -> np.ndarray:
        """uint8 (px, px, 4), RGBA."""
        return np.asarray(self.cells[number])

    @classmethod
    def load(cls, folder: str | Path) -> Drawings:
        """The drawings of a folder that `scripts/build_drawings.py` wrote; once per process.

        Raises: ValueError for a folder without drawings, and for files that do not fit together.
        """
        return _load(Path(folder))

    @classmethod
    def for_training(cls, folder: str = "") -> Drawings:
        """What training may draw: a folder's drawings, or by default the emoji for training.

        Raises: ValueError as `load`, and for a folder that holds sets that are held out.
        """
        if not folder:
            return _emoji()
        found = _load(Path(folder).expanduser())
        if held_out := sorted(found.set_names & set(HELD_OUT_SETS)):
            raise ValueError(
                f"{folder} holds drawings of {', '.join(held_out)}, which are for tests only: name "
                f"a folder without them"
            )
        return found

    @classmethod
    def held_out(cls, name: str) -> Drawings:
        """Those of a held-out set, which the package ships."""
        if name not in HELD_OUT_SETS:
            raise ValueError(f"unknown set {name!r}; held out are {', '.join(HELD_OUT_SETS)}")
        found = _load(ASSETS)
        mine = found.of_set(name)
        return _cut(found, tuple(mine.tolist()))


@functools.cache
def _cut(drawings: Drawings, numbers: tuple[int, ...]) -> Drawings:
    sets, names = (tuple(column[i] for i in numbers) for column in (drawings.sets, drawings.names))
    return Drawings(drawings.cells[list(numbers)], sets, names)


@functools.cache
def _load(folder: Path) -> Drawings:
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no drawings (no index.json): make them with "
            f"scripts/build_drawings.py, or name no folder"
        )
    index = json.loads(read_regular(path, LARGEST_INDEX))
    sets = tuple(drawing["set"] for drawing in index["drawings"])
    names = tuple(drawing["name"] for drawing in index["drawings"])
    px = index["cell_px"]
    files = list(dict.fromkeys(info["file"] for info in index["sets"].values()))
    parts = []
    for file in files:
        number = sum(index["sets"][name]["file"] == file for name in sets)
        parts.append(_cells(folder / file, number, px))
    cells = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return Drawings(cells, sets, names)


def _cells(path: Path, number: int, px: int) -> np.ndarray:
    """The cells of one file, (number, px, px, 4)."""
    if path.suffix == ".npy":
        cells: np.ndarray = np.load(path, mmap_mode="r")
    else:
        with Image.open(path) as file:
            sheet = np.asarray(file.convert("RGBA"))
        rows, columns = (side // px for side in sheet.shape[:2])
        sheet = sheet[: rows * px, : columns * px].reshape(rows, px, columns, px, 4)
        cells = sheet.swapaxes(1, 2).reshape(-1, px, px, 4)[:number]
    if cells.shape != (number, px, px, 4) or cells.dtype != np.uint8:
        raise ValueError(
            f"{path} holds {cells.dtype} {cells.shape}, but index.json speaks of {number} drawings "
            f"of {px} px: build both anew with scripts/build_drawings.py"
        )
    return cells


@functools.cache
def _emoji() -> Drawings:
    """The emoji of the styles for training, as drawings."""
    sprites = Sprites.load()
    cells, sets, names = [], [], []
    for style in (*STYLE_GROUPS["seen"], *STYLE_GROUPS["extra"]):
        for category, name in enumerate(CATEGORIES):
            if sprites.has(category, style):
                image = sprites.images[category, style][0]
                small = image.resize((EMOJI_PX, EMOJI_PX), Image.Resampling.LANCZOS)
                cells.append(np.asarray(small.convert("RGBA")))
                sets.append(f"emoji-{style}")
                names.append(name)
    return Drawings(np.array(cells), tuple(sets), tuple(names))


def facts_of(folder: str | Path) -> dict[str, Any]:
    """Set -> package, version, title, author, licence and source, as the index states them."""
    return json.loads(read_regular(Path(folder) / "index.json", LARGEST_INDEX))["sets"]


def thumbnail(rgba: np.ndarray) -> np.ndarray:
    """Float32 (8, 8, 4), 0 to 1: colours multiplied by alpha, and alpha.

    Args: rgba: uint8 (n, n, 4), colours not multiplied.
    """
    small = Image.fromarray(rgba).convert("RGBa").resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255
