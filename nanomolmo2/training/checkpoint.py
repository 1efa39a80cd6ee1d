"""Checkpoints of a run: complete or not there, checked when read, the last ones and the best kept.

    DIR/checkpoints/000000012/    steps done, over all stages
        checkpoint.pt             weights, optimiser, random states (several ranks: their shards);
                                  of weights that stay as the run found them a digest
        about.json                the position, the SHA-256 of every other file, and a digest of
                                  all that

Nothing of a file is run when it is read.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nanomolmo2.checks import FULL_DISK, read_with_digest, sha256_of, with_digest
from nanomolmo2.files import atomic_path
from nanomolmo2.training.distributed import (
    STATE_FILE,
    World,
    gather_objects,
    load_sharded,
    save_sharded,
    stored_checksums,
)
from nanomolmo2.training.optim import Optimizers

FOLDER, FILE, ABOUT = "checkpoints", "checkpoint.pt", "about.json"
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Start:
    """Weights that come from the model that a run starts from, and stay.

    Attributes:
        model: its name, for messages.
        names: of the weights, in the state dict.
        digest: of their values.
    """

    model: str = ""
    names: frozenset[str] = frozenset()
    digest: str = ""


@dataclass
class Position:
    """Where a run stands: ``step`` steps of stage number ``stage``, ``done`` of all stages.

    Attributes:
        data: position of the data, as the stage gave it with its last batch; plain JSON types.
        log: sums of the steps behind the last line of the log.
        score: what the best checkpoint of a stage has least of; None = not scored.
        scored_by: what the score is; scores of other kinds, or on other data, are not compared.
        sources: digest of the files of every source of data, by its path; None = not known.
        watch: what the stage remembers of its losses, see `training.watch`; plain JSON types.
    Raises: ValueError for values of other types.
    """

    stage: int
    step: int
    done: int
    data: Any = None
    log: dict[str, Any] | None = None
    score: float | None = None
    sources: dict[str, str] | None = None
    scored_by: str = ""
    watch: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("stage", "step", "done"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}, expected a number of 0 or more")
        if self.step > self.done:
            raise ValueError(f"step {self.step} of a stage comes behind all {self.done} steps")
        score = self.score
        if score is not None and type(score) not in (int, float):
            raise ValueError(f"score is {score!r}, expected a number")
        for name, kinds in (("sums", (int, float)), ("counts", (int,))):
            numbers = _object_in(self.log, "log").get(name, {})
            if any(type(value) not in kinds for value in _object_in(numbers, name).values()):
                raise ValueError(f"{name} of the log holds {numbers!r:.80}, expected numbers")
        if any(type(value) is not str for value in _object_in(self.sources, "sources").values()):
            raise ValueError(f"sources is {self.sources!r:.80}, expected digests")
        _object_in(self.watch, "watch")

    @property
    def name(self) -> str:
        """Folder of the checkpoint."""
        return f"{self.done:09d}"


class Checkpoints:
    """The checkpoints of a run, by the number of steps done. Every rank calls every method."""

    def __init__(
        self,
        run: Path,
        keep: int = 2,
        info: Callable[[str], None] = lambda text: None,
        world: World | None = None,
        start: Start | None = None,
    ) -> None:
        """
        Args:
            keep: how many of the newest stay; the best stays too.
            info: told of damaged files.
            world: with more than one rank, each writes its shards; where each holds all weights,
                the first writes them.
            start: weights that are left out: the model has them before anything is restored.
        """
        self.folder, self.keep, self.info = run / FOLDER, keep, info
        self.world, self.start = world or World(), start or Start()

    def save(self, position: Position, model: nn.Module, optimizers: Optimizers) -> None:
        """Write a checkpoint, then delete those that are neither new nor the best.

        Raises: OSError, with all earlier checkpoints as they were.
        """
        try:
            if is_sharded(model):
                self._save_shards(position, model, optimizers)
            elif self.world.is_main:
                with atomic_path(self.folder / position.name) as aside:
                    aside.mkdir(parents=True)
                    self._write(aside, model, optimizers)
                    self._describe(position, aside, {FILE: sha256_of(aside / FILE)})
        except (OSError, RuntimeError, ValueError) as error:
            # torch's writers turn the system's error into kinds of their own.
            raise OSError(self._not_written(position, error)) from error
        if self.world.is_main:
            best = self.best()
            for name in self.names()[: -self.keep]:
                if name != best:
                    shutil.rmtree(self.folder / name)

    def newest(self) -> Position | None:
        """The position of the newest intact checkpoint; None if there is no checkpoint at all.

        Damaged ones are moved aside, and `info` is told.
        Raises: ValueError if all are damaged.
        """
        found, problem = None, ""
        if self.world.is_main:  # it alone moves files
            found, problem = self._newest()
        if self.world.size > 1:
            found, problem = gather_objects((found, problem))[0]
        if found is None and problem:
            raise ValueError(
                f"{problem}, and no other checkpoint is left: bring back a copy, or start again in "
                f"another folder"
            )
        return found

    def restore(self, position: Position, model: nn.Module, optimizers: Optimizers | None) -> None:
        """Read weights, random states and, unless None, moments of a checkpoint in place."""
        folder = self.folder / position.name
        if not (folder / FILE).exists():
            parts = optimizers.parts if optimizers else {}
            self._check_start(load_sharded(folder, model, parts, self.start.names))
            return
        values = torch.load(folder / FILE, weights_only=True, map_location="cpu")
        self._check_start(values)
        stay = frozenset() if values.get("start") is None else self.start.names
        found = model.load_state_dict(values["weights"], strict=False)
        if wrong := [*(set(found.missing_keys) - stay), *found.unexpected_keys]:
            raise ValueError(
                f"{folder} is of another model: {min(wrong)} and {len(wrong) - 1} other weights "
                f"are in one of the two alone; go on with the recipe and the version of nanomolmo2 "
                f"that wrote it"
            )
        if optimizers is not None:
            optimizers.load_state_dict(values["optimizer"])
        set_random_state(values["random"])

    def _check_start(self, values: Mapping[str, Any]) -> None:
        """Raises: ValueError if the weights that a checkpoint left out are no longer the same."""
        if values.get("start") not in (None, self.start.digest):
            raise ValueError(
                f"the weights of {self.start.model} are not those that this run started from, and "
                f"its checkpoints hold only what learns: bring that model back, or start again in "
                f"another folder"
            )

    def _write(self, folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
        weights = model.state_dict()
        values = {
            "weights": {n: t for n, t in weights.items() if n not in self.start.names},
            "optimizer": optimizers.state_dict(),
            "random": random_state(),
            "start": self.start.digest or None,
        }
        with open(folder / FILE, "wb") as stream:
            torch.save(values, stream)
            stream.flush()
            os.fsync(stream.fileno())  # else the new name may outlive a power cut, and this not

    def _save_shards(self, position: Position, model: nn.Module, optimizers: Optimizers) -> None:
        folder = self.folder / position.name
        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        state = {"start": self.start.digest or None}
        save_sharded(folder, model, optimizers.parts, state, self.start.names)
        if self.world.is_main:
            self._describe(position, folder, stored_checksums(folder))

    def _describe(self, position: Position, folder: Path, sums: dict[str, str]) -> None:
        """Write ``about.json``, which makes a folder a checkpoint."""
        with atomic_path(folder / ABOUT) as aside:
            text = json.dumps(with_digest({**vars(position), "sha256": sums}))
            aside.write_text(text + "\n", encoding="utf-8")

    def _newest(self) -> tuple[Position | None, str]:
        for leftover in self.folder.glob(".*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        problem = ""
        names = self.names()
        for name in reversed(names):
            folder = self.folder / name
            try:
                return self._verify(folder), problem
            except Exception as error:  # missing files, JSON, checksums
                problem = f"the checkpoint {folder} is damaged ({error})"
                if name != names[0]:
                    os.replace(folder, folder.with_name(f"{name}-{os.getpid()}{DAMAGED}"))
                    self.info(f"{problem}: going on from the one before it")
        return None, problem

    def _verify(self, folder: Path) -> Position:
        position, sums = _read_about(folder)
        for file, expected in sums.items():
            if sha256_of(folder / file) != expected:
                raise ValueError(f"{file} is not as it was written")
        return position

    def names(self) -> list[str]:
        """Folders of the checkpoints, oldest first."""
        return sorted(path.name for path in self.folder.glob("[0-9]*") if path.name.isdigit())

    def best(self) -> str | None:
        """Folder with the least score, among those of the newest one's stage and kind of score."""
        scored: list[tuple[Position, str]] = []
        for name in self.names():
            try:
                position, _ = _read_about(self.folder / name)
            except (OSError, ValueError, TypeError):
                continue
            if position.score is not None:
                scored.append((position, name))
        if not scored:
            return None
        newest, _ = scored[-1]
        kind = newest.stage, newest.scored_by
        return min((p.score, name) for p, name in scored if (p.stage, p.scored_by) == kind)[1]

    def at(self, done: int) -> Position:
        """The position of the checkpoint behind so many steps, if that is intact.

        Raises: OSError, ValueError, TypeError if it is not.
        """
        return self._verify(self.folder / f"{done:09d}")

    def _not_written(self, position: Position, error: Exception) -> str:
        number = getattr(error, "errno", None)
        cause = os.strerror(number) if number else str(error).splitlines()[0]
        names = self.names()
        left = f"the one of step {int(names[-1])} is intact" if names else "there is none before it"
        advice = "free some space" if number in FULL_DISK else "see that the folder can be written"
        return (
            f"the checkpoint of step {position.done} could not be written to {self.folder} "
            f"({cause}); {left}: {advice} and resume"
        )


def _read_about(folder: Path) -> tuple[Position, dict[str, str]]:
    """What a checkpoint says of itself: its position, and the SHA-256 of its files.

    Those of before the digest have none; the types of their values are checked all the same.

    Raises: OSError, ValueError, TypeError if it is not as it was written.
    """
    about = read_with_digest(folder / ABOUT, since="sources")
    sums = _object_in(about.pop("sha256", None), "sha256")
    if not sums.keys() & {FILE, STATE_FILE} or any(Path(name).name != name for name in sums):
        raise ValueError(f"{ABOUT} does not name its files")
    position = Position(**about)
    if position.name != folder.name:
        raise ValueError(f"{ABOUT} is of step {position.done}")
    return position, sums


def _object_in(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} is {value!r:.80}, expected an object")
    return value or {}


def is_sharded(model: nn.Module) -> bool:
    """Whether every rank holds but a part of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def random_state() -> dict[str, Any]:
    """States of all generators, as types that a checkpoint may hold."""
    name, key, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, [int(word) for word in key], *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where `random_state` was taken."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():  # else it goes on on another machine
        torch.cuda.set_rng_state_all(state["cuda"])
