"""``nanomolmo2 data``: made-up images with exact truth, as files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from nanomolmo2.checks import named_errors
from nanomolmo2.cli.options import ArtGroup, AtLeast, Debug, UsageError
from nanomolmo2.cli.output import progress_bars, say


@dataclass(frozen=True)
class Data:
    """Write pictures with exact truth to train and test any model on.

    There is one kind so far: emoji, scenes with questions, answers, boxes, masks and counts, which
    `nanomolmo2 train --data` and `nanomolmo2 inspect` read. The same options give the same files,
    and a larger count begins with what a smaller one gives. The fields are in docs/emoji-data.md.
    """

    kind: Annotated[Positional[Literal["emoji"]], arg(help="what to draw")]
    out: Annotated[
        Path, arg(metavar="DIR", help="new or empty folder, written whole or not at all")
    ]
    count: Annotated[int, arg(metavar="N", help="how many pictures"), AtLeast(1)] = 100
    seed: Annotated[
        int, arg(metavar="SEED", help="another one gives other pictures"), AtLeast(0)
    ] = 0
    format: Annotated[
        Literal["jsonl", "parquet"],
        arg(help="jsonl has its pictures beside it, parquet inside (extra data)"),
    ] = "jsonl"
    setting: Annotated[
        Literal["easy", "crowded", "occluded", "clutter", "photos", "wide384", "wide768"],
        arg(help="how hard the scenes are; easy is what tiny is trained on"),
    ] = "easy"
    split: Annotated[
        Literal["train", "test"], arg(help="test: scenes and wordings that training never has")
    ] = "train"
    size: Annotated[
        Literal[192, 384, 768] | None,
        arg(help="side of the pictures in pixels, emoji keep theirs; none = that of the setting"),
    ] = None
    group: Annotated[
        ArtGroup,
        arg(help="art group; mild and openmoji are for the test split only"),
    ] = "seen"
    backgrounds: Annotated[
        Path | None,
        arg(metavar="FOLDER", help="pictures whose pieces lie behind the emoji; none = made up"),
    ] = None
    debug: Debug = False

    def run(self) -> None:
        if self.split == "train" and self.group != "seen":
            raise UsageError(f"--group {self.group} is for tests only: add --split test")
        from nanomolmo2.emoji.scenes import setting
        from nanomolmo2.emoji.write import write_scenes

        config = setting(self.setting, self.size)
        if self.backgrounds is not None:
            folder = str(self.backgrounds)
            config = dataclasses.replace(config, background="photo", photos=folder)
        with named_errors(self.out), progress_bars() as add_bar:
            records = write_scenes(
                self.out,
                self.count,
                seed=self.seed,
                format=self.format,
                scene=config,
                split=self.split,
                group=self.group,
                on_progress=add_bar("pictures"),
            )
        say(f"wrote {self.count} pictures and their records, {records}")
