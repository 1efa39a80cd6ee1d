"""Training checkpoints: complete or not there, and read without running anything from the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanomolmo2.files import atomic_path

FILE = "checkpoint.pt"


@dataclass
class Checkpoint:
    """Where a run stands: ``step`` steps of stage number ``stage`` are done."""

    stage: int
    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]  # empty at the start of a stage

    def save(self, folder: Path) -> None:
        """Replace the folder's checkpoint."""
        with atomic_path(folder / FILE) as temporary:
            torch.save(vars(self), temporary)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint | None:
        """The folder's checkpoint, or None.

        Raises: ValueError for a file that is damaged or not a checkpoint.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            return cls(**torch.load(path, weights_only=True, map_location="cpu"))
        except Exception as error:  # torch raises many kinds: zip, pickle, type, end of file
            raise ValueError(
                f"{path} is no readable training checkpoint ({type(error).__name__}): delete it to "
                f"start again, or bring back a copy"
            ) from None
