"""What a run learns from and what it is measured on: two parts without a picture in common.

    --val FILE         other files; how much of them is in the training data is said
    --val-share 0.1    a share of the pictures of the training data, with all records about them,
                       is held out; ``split.json`` of the run's folder says which

Pictures are compared by the bytes of their files, see `data.split`; records without a picture by
their content.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanomolmo2.checks import read_with_digest, with_digest
from nanomolmo2.data.example import Example, Source
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.records import Row, Rows
from nanomolmo2.data.sources import RecordSource, SourceConfig, open_source
from nanomolmo2.data.split import OnProgress, PictureReader, group_by_picture, split_groups
from nanomolmo2.files import atomic_path
from nanomolmo2.training.distributed import World, gather_objects
from nanomolmo2.training.fingerprint import changed, fingerprints
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.run_folder import Info

SPLIT_FILE = "split.json"
ABOUT = (
    "Records, counted from 0, that this run does not learn from but is measured on, and the "
    "SHA-256 of their pictures' files."
)
LOOKED_AT = 20_000  # records of the training data that are compared with the validation data
MANY_RECORDS = 1000  # take a while to be looked at
ENDLESS = 20_000  # examples; a source that makes more is no set to measure on


class ChosenRows:
    """Some records of a file, in the order of their numbers."""

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        self.rows, self.numbers = rows, list(numbers)
        self.is_cheap = getattr(rows, "is_cheap", False)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Row:
        return self.rows[self.numbers[i]]


@dataclass
class Split:
    """The data of a run.

    Attributes:
        mixture: what is learned from.
        validation: what is measured on; empty = nothing.
        held_out: what ``split.json`` says; None where nothing is taken from the training data.
        notes: sentences for people.
    """

    mixture: Mixture
    validation: list[Source] = field(default_factory=list)
    held_out: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write ``split.json`` if there is anything to say."""
        if self.held_out is None:
            return
        with atomic_path(folder / SPLIT_FILE) as temporary:
            text = json.dumps(with_digest({"about": ABOUT, **self.held_out}), indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")


def open_split(
    recipe: Recipe, stored: dict[str, Any] | None = None, on_progress: OnProgress | None = None
) -> Split:
    """Open the data of a recipe and part it.

    Args:
        stored: what `read_split` found in the run's folder, or another rank's ``held_out``.
        on_progress: told how many records were looked at, of how many.
    Raises: as `open_source`; ValueError where one of the parts would be empty, or the data cannot
        be split.
    """
    sources = [open_source(config) for config in recipe.data]
    weights = [config.sampling_weight for config in recipe.data]
    validation = recipe.validation
    if validation is not None and not validation.data:
        return _take_share(recipe, sources, stored, on_progress)
    held = [_measurable(config) for config in validation.data] if validation else []
    return Split(Mixture(sources, weights, recipe.seed), held)


def shared_split(recipe: Recipe, out: Path, world: World, info: Info) -> Split:
    """The data of a run, the same on every rank; call it on all of them.

    Raises: as `open_split`.
    """
    split, problem = None, None

    def progress(done: int, total: int) -> None:
        if done == 1 and total > MANY_RECORDS:
            info(f"looking at the pictures of {total:,} records, once, to split them")

    if world.is_main:
        try:
            split = open_split(recipe, read_split(out, recipe), progress)
        except (OSError, ValueError) as error:
            problem = error
    if world.size > 1:
        held_out, text = gather_objects(
            (split.held_out if split else None, str(problem) if problem else "")
        )[0]
        if text and problem is None:
            problem = ValueError(text)
        if problem is None and split is None:
            split = open_split(recipe, held_out)
    if problem is not None:
        raise problem
    assert split is not None
    for note in split.notes:
        info(note)
    return split


def read_split(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The split of an earlier call, if it is of the same share, seed and files.

    Raises: ValueError if the file is not as it was written.
    """
    path, validation = folder / SPLIT_FILE, recipe.validation
    if validation is None or validation.data or not path.exists():
        return None
    try:
        found = read_with_digest(path, since="pictures")
        paths = [one["path"] for one in found["sources"]]
        is_same = (found["share"], found["seed"]) == (validation.share, recipe.seed)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), and says what this run does not learn from: bring "
            f"back a copy, or start a new run"
        ) from None
    return found if is_same and paths == [c.path for c in recipe.data if _is_of_files(c)] else None


def _measurable(config: SourceConfig) -> Source:
    source = open_source(config)
    if getattr(source, "in_order", False) or (config.registered and len(source) > ENDLESS):
        raise ValueError(
            f"{config.path} has {len(source):,} examples and is no file: to measure on it, save "
            f"some of them as a file, or give it a 'length' in the recipe"
        )
    return source


# ---- a share of the training data ----


def _take_share(
    recipe: Recipe,
    sources: Sequence[Source],
    stored: dict[str, Any] | None,
    on_progress: OnProgress | None,
) -> Split:
    assert recipe.validation is not None
    places = [k for k, config in enumerate(recipe.data) if _is_of_files(config)]
    if not places:
        raise ValueError(
            f"{recipe.data[0].path} is no file that could be split: give other data to measure on "
            f"(--val FILE)"
        )
    of_files, notes = [sources[k] for k in places], list[str]()
    now = fingerprints(recipe.data[k] for k in places)
    if stored is None:
        held = _deal(of_files, recipe.validation.share, recipe.seed, on_progress)
        digests = _pictures(of_files, held)
    else:
        held, digests = [one["held_out"] for one in stored["sources"]], set(stored["pictures"])
        if changed(stored["fingerprints"], now):
            held = [_with_pictures(source, digests) for source in of_files]
            notes.append(
                f"the data are not those that {SPLIT_FILE} was made of: records about its pictures "
                f"are measured on, all others are learned from"
            )
    mixture, measured = _parts(recipe, sources, dict(zip(places, held, strict=True)))
    described = {
        "share": recipe.validation.share,
        "seed": recipe.seed,
        "sources": [
            {"path": recipe.data[k].path, "records": len(sources[k]), "held_out": numbers}
            for k, numbers in zip(places, held, strict=True)
        ],
        "pictures": sorted(digests),
        "fingerprints": now,
    }
    return Split(mixture, measured, described, notes)


def _parts(
    recipe: Recipe, sources: Sequence[Source], held: dict[int, list[int]]
) -> tuple[Mixture, list[Source]]:
    """What is learned from, and what is measured on; ``held``: number of a source -> records."""
    learned, measured = list(sources), []
    for k, numbers in held.items():
        learned[k], part = _parted(sources[k], numbers)
        measured += [part] if len(part) else []
    kept = [k for k, source in enumerate(learned) if len(source)]
    if not measured or not held.keys() & set(kept):
        missing = "learn from" if measured else "measure on"
        raise ValueError(
            f"no record is left to {missing}: the data have other pictures than {SPLIT_FILE} of "
            f"this run; start a new one"
        )
    weights = [recipe.data[k].sampling_weight for k in kept]
    return Mixture([learned[k] for k in kept], weights, recipe.seed), measured


def _is_of_files(config: SourceConfig) -> bool:
    return config.registered is None and not config.path.startswith("hub:")


def _deal(
    sources: Sequence[Source], share: float, seed: int, on_progress: OnProgress | None
) -> list[list[int]]:
    """For each source the numbers of its records that are held out."""
    groups = group_by_picture(*sources, on_progress=on_progress)
    try:
        _, chosen = split_groups(groups, share, seed)
    except ValueError:
        records = sum(len(source) for source in sources)
        raise ValueError(
            f"--val-share {share:g} of {records} records about {len(groups)} different pictures "
            f"leaves an empty split: give a larger or smaller share, more pictures, or --val FILE"
        ) from None
    held: list[list[int]] = [[] for _ in sources]
    for number in chosen:
        k = 0
        while number >= len(sources[k]):
            number, k = number - len(sources[k]), k + 1
        held[k].append(number)
    return held


def _parted(source: Source, numbers: Sequence[int]) -> tuple[Source, Source]:
    """(the other records, those of the numbers): as two files would be read."""
    assert isinstance(source, RecordSource)
    chosen = set(numbers)
    others = [i for i in range(len(source)) if i not in chosen]
    rest, part = (
        RecordSource(ChosenRows(source.rows, which), source.config) for which in (others, numbers)
    )
    return rest, part


def _pictures(sources: Sequence[Source], held: Sequence[Sequence[int]]) -> set[str]:
    reader = PictureReader()
    return {
        picture.hex()
        for source, numbers in zip(sources, held, strict=True)
        for i in numbers
        for picture in reader.look(source, i)[0]
    }


def _with_pictures(source: Source, digests: set[str]) -> list[int]:
    reader = PictureReader()
    return [
        i
        for i in range(len(source))
        if any(picture.hex() in digests for picture in reader.look(source, i)[0])
    ]


# ---- other files ----


def overlap_warning(validation: Sequence[Source], training: Sequence[Source]) -> str:
    """A sentence with the share of the validation records whose pictures are trained on; or ""."""
    reader = PictureReader()
    looked = [source for source in training if _comparable(source)]
    records = sum(len(source) for source in looked)
    stride = -(-records // LOOKED_AT) or 1
    seen = {
        picture
        for source in looked
        for i in range(0, len(source), stride)
        for picture in reader.look(source, i)[0]
    }
    compared = [source for source in validation if _comparable(source)]
    total = sum(len(source) for source in compared)
    both = sum(
        not seen.isdisjoint(reader.look(source, i)[0])
        for source in compared
        for i in range(len(source))
    )
    if not both:
        return ""
    of = "" if stride == 1 else f", of which every {stride}th was looked at"
    return (
        f"{both} of {total} validation records ({both / total:.0%}) show pictures that are in the "
        f"training data too{of} (the same bytes): what is learned by heart scores there; leave "
        f"them out, or split by picture (--val-share)"
    )


def _comparable(source: Source) -> bool:
    return isinstance(source, RecordSource) and not source.in_order


# ---- all validation data as one source ----


class Together:
    """Several sources, one after the other, as one."""

    def __init__(self, sources: Sequence[Source], name: str = "validation") -> None:
        self.sources, self.name = list(sources), name
        self.places = [(k, i) for k, source in enumerate(sources) for i in range(len(source))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Example:
        k, number = self.places[i]
        return self.sources[k][number]

    def some(self, limit: int) -> Together:
        """At most ``limit`` of its examples, drawn at random, always the same."""
        thinned = Together(self.sources, self.name)
        if len(self) > limit:  # not every n-th: records often come in pairs
            chosen = np.random.default_rng(len(self)).permutation(len(self))[:limit]
            thinned.places = [self.places[n] for n in sorted(chosen)]
        return thinned
