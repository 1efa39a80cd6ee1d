"""Finding by example without words: pictures, examples, and what is like them.

A step with questions spends most of its time in the decoder. Which things are alike does not depend
on words, so most pictures can be shown without: the decoder's states are then nothing, and how far
an example is meant is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanomolmo2.data.example import Branch
from nanomolmo2.emoji.heads import strongest
from nanomolmo2.generation.finding import MEANT, grid_places, patch_at
from nanomolmo2.models.finder import Patches
from nanomolmo2.models.pointing import PointingNanoMolmo2
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.things.cell_labels import SAMPLES, CellLabels, label_cells
from nanomolmo2.things.contrast import compared, like_loss, some_cells
from nanomolmo2.things.find_labels import MARGIN, FindLabels
from nanomolmo2.things.scenes import Scene
from nanomolmo2.training.find_terms import Scored


class Wordless(NamedTuple):
    """Pictures of several examples, of one or two pictures each.

    Attributes:
        pixel_values: (M, N, 3*P*P) tiles. windows: (m, S) patches of each visual token.
        labels: as of questions, whose positions say nothing.
        gates: (J,) 1 for an example, -1 for what is not meant.
        cells: what the patches show. Pictures of one example are one picture.
        looks: (K,) of each kind, equal for equal looks.
        kept: (B, N, 3*P*P) other pictures, whose visual tokens are not to change.
    """

    pixel_values: Tensor
    windows: Tensor
    labels: FindLabels
    gates: Tensor
    cells: CellLabels
    looks: Tensor
    kept: Tensor | None = None


def wordless(
    examples: Sequence[tuple[Sequence[Scene], Sequence[Branch]]], crops: MultiCrop
) -> Wordless:
    """Args: examples: pictures, and questions by example about them, of which the truth is read."""
    made = _Maker(crops)
    for scenes, branches in examples:
        made.add(scenes, branches)
    return made.batch()


class _Maker:
    """Puts the columns of a batch together, picture by picture."""

    def __init__(self, crops: MultiCrop) -> None:
        self.crops = crops
        self.pixels: list[np.ndarray] = []
        self.windows: list[np.ndarray] = []
        self.columns: dict[str, list[np.ndarray]] = {}
        self.asked: list[tuple[int, set[int]]] = []  # example, numbers of things
        self.likes: list[tuple[int, int, float]] = []  # patch of n, question, gate
        self.names: dict[str, int] = {}  # of looks
        self.looks: list[int] = []  # that of each kind
        self.examples = self.patches = self.tiles = self.rows = self.things = 0

    def add(self, scenes: Sequence[Scene], branches: Sequence[Branch]) -> None:
        """The pictures of an example, and what is asked about them."""
        kinds: dict[str, set[int]] = {}
        numbers: dict[str, int] = {}  # of kinds, which the pictures of an example share
        grids: list[tuple[int, tuple[int, int], tuple[int, int]]] = []
        for scene in scenes:
            for kind in scene.kinds:
                if kind.id not in numbers:
                    numbers[kind.id] = len(self.looks)
                    self.looks.append(self.names.setdefault(kind.look.id, len(self.names)))
            for i, thing in enumerate(scene.things):
                kinds.setdefault(scene.kinds[thing.kind].id, set()).add(self.things + i)
            of_kinds = np.array([numbers[kind.id] for kind in scene.kinds], np.int64)
            height, width = scene.image.shape[:2]
            first, grid = self.patches, self._picture(scene, of_kinds, len(grids))
            grids.append((first, grid, (width, height)))
        for branch in branches:
            truth = branch.truth or {}
            for places, gate in ((truth["examples"], 1.0), (truth["unlike"], -1.0)):
                for x, y, image in places:
                    first, grid, size = grids[int(image) - 1]
                    patch = first + patch_at(x, y, grid, size)
                    self.likes.append((patch, len(self.asked), gate))
            self.asked.append((self.examples, kinds.get(str(truth["kind"]), set())))
        self.examples += 1

    def _picture(self, scene: Scene, kinds: np.ndarray, number: int) -> tuple[int, int]:
        """Add a picture, its kinds by number. Returns: rows and columns of its patches.

        Args: number: of the picture among those of its example.
        """
        tiles, index, (lines, across) = self.crops.tiles(scene.image)
        side = self.crops.pooling_size
        rows, cols = lines * side, across * side
        patch = index.reshape(lines, across, side, side).swapaxes(1, 2).ravel()
        r, c = np.divmod(np.arange(rows * cols), cols)
        labels = label_cells(scene, rows, cols, SAMPLES, MARGIN)
        owner, kind = labels["owner"], labels["kind"]
        owner[owner >= 0] += self.things
        kind[kind >= 0] = kinds[kind[kind >= 0]]
        found = {
            "patch": patch + self.tiles * self.crops.num_patches,
            "row": self.rows + r // side * across + c // side,
            "grid": grid_places(rows, cols, number),
            "example": np.full(len(patch), self.examples),
            **labels,
        }
        for name, values in found.items():
            self.columns.setdefault(name, []).append(values)
        self.pixels.append(tiles)
        self.windows.append(index + self.tiles * self.crops.num_patches)
        self.tiles += len(tiles)
        self.rows += len(index)
        self.things += len(scene.things)
        self.patches += len(patch)
        return rows, cols

    def batch(self) -> Wordless:
        """All that was added."""
        mask = np.zeros((len(self.asked), self.things), bool)
        for question, (_, numbers) in enumerate(self.asked):
            mask[question, list(numbers)] = True
        like, question_of, gates = (np.array(part) for part in zip(*self.likes, strict=True))
        nowhere = torch.zeros(0, dtype=torch.long)
        columns = {name: torch.from_numpy(np.concatenate(x)) for name, x in self.columns.items()}
        kind = columns.pop("kind")
        labels = FindLabels(
            **columns,
            shows=kind >= 0,
            asked=torch.from_numpy(mask),
            of=torch.tensor([example for example, _ in self.asked]),
            state_at=nowhere,
            like_at=nowhere,
            like=torch.from_numpy(like),
            question=torch.from_numpy(question_of),
        )
        pixels, windows = (np.concatenate(x) for x in (self.pixels, self.windows))
        of_tiles = torch.from_numpy(pixels), torch.from_numpy(windows)
        cells = CellLabels(labels.example, labels.owner, kind, labels.way)
        looks = torch.tensor(self.looks)
        return Wordless(*of_tiles, labels, torch.from_numpy(gates).float(), cells, looks)


def wordless_scores(model: PointingNanoMolmo2, batch: Wordless) -> Scored:
    """What the finder says, without a decoder."""
    finder, labels = model.finder, batch.labels
    assert finder is not None
    layers = model.config.connector.vit_layers
    features = model.vision_encoder.features(batch.pixel_values, layers)
    tokens = model.connector(features, batch.windows).flatten(0, -2)
    of_patches = features.flatten(0, 1)[labels.patch]
    patches = finder.patches(of_patches, tokens, torch.zeros_like(tokens), labels.row, labels.grid)
    nothing = tokens.new_zeros(len(labels.of), tokens.shape[1])
    given = labels.like, labels.question
    wanted = finder.wanted(patches, nothing, None, *given, gates=MEANT * batch.gates)
    mine = labels.of[:, None] == labels.example
    return Scored(finder(wanted, patches, mine), mine, patches)


def contrast_loss(model: PointingNanoMolmo2, batch: Wordless, patches: Patches) -> Tensor:
    """How well what shows one kind is told from what shows another, in all pictures of a batch.

    A question tells an example from what else is in its pictures; here are many times more rivals.
    """
    finder = model.finder
    assert finder is not None
    centred = strongest(patches.claim.detach()[None], batch.cells.owner[None])[0]
    some = some_cells(batch.cells, centred)
    pairs = compared(batch.cells.of_cells(some), batch.looks)
    total = patches.claim.new_zeros(())
    for reader, looks in ((finder.patch, patches.look), (finder.token, patches.token_look)):
        similar = looks[some] @ looks[some].T
        total = total + like_loss(reader.scale() * similar, pairs)
    return total
