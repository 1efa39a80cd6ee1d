"""``nanomolmo2 data``: pictures made up, labels taken over, data split, predictions given back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from nanomolmo2.checks import named_errors, written
from nanomolmo2.cli.options import (
    ArtGroup,
    AtLeast,
    Debug,
    PictureFolder,
    PointsScale,
    UsageError,
    check_ranges,
)
from nanomolmo2.cli.output import check_writable, note, progress_bars, say


@dataclass(frozen=True)
class Emoji:
    """Draw emoji scenes with exact truth, to train and test any model on.

    Scenes with questions, answers, boxes, masks and counts, which `nanomolmo2 train --data` and
    `nanomolmo2 inspect` read. The same options give the same files, and a larger count begins with
    what a smaller one gives. The fields are in docs/emoji-data.md.
    """

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


@dataclass(frozen=True)
class Things:
    """Draw scenes of things that are to be found by example, with exact truth.

    Each picture comes with questions such as "Point to everything like <point>." and their answers,
    and with the boxes, masks and kinds of all things, which `nanomolmo2 train --data` and
    `nanomolmo2 inspect` read. The same options give the same files, and a larger count begins with
    what a smaller one gives. The fields are in docs/things-data.md.
    """

    out: Annotated[
        Path, arg(metavar="DIR", help="new or empty folder, written whole or not at all")
    ]
    count: Annotated[int, arg(metavar="N", help="how many examples"), AtLeast(1)] = 100
    seed: Annotated[
        int, arg(metavar="SEED", help="another one gives other pictures"), AtLeast(0)
    ] = 0
    test_set: Annotated[
        Literal["few", "crowded", "alike", "made"] | None,
        arg(help="a set of things that training never has; none = scenes to train on"),
    ] = None
    width: Annotated[int, arg(metavar="PX", help="of the pictures, pixels"), AtLeast(64)] = 384
    height: Annotated[int, arg(metavar="PX", help="of the pictures, pixels"), AtLeast(64)] = 384
    pairs: Annotated[
        float | None,
        arg(
            metavar="SHARE",
            help="share of the questions about another picture than the one with the examples; "
            "none = 0.15, of a test set 0; there all or none, 1 or 0",
        ),
    ] = None
    drawings: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="drawings that scripts/build_drawings.py gathered; none = those of emoji",
        ),
    ] = None
    debug: Debug = False

    def run(self) -> None:
        pairs = self.pairs
        if pairs is None:
            pairs = 0.0 if self.test_set else 0.15
        if not 0 <= pairs <= 1 or (self.test_set and pairs not in (0, 1)):
            expected = "0 or 1 of a test set" if self.test_set else "a share of 0 to 1"
            raise UsageError(f"--pairs is {pairs:g}, expected {expected}")
        if self.test_set and self.drawings is not None:
            raise UsageError("--drawings is for scenes to train on: leave out --test-set")
        from nanomolmo2.things.settings import TEST_SETS, ThingScene
        from nanomolmo2.things.source import sized
        from nanomolmo2.things.write import write_things

        folder = "" if self.drawings is None else str(self.drawings)
        scene = TEST_SETS[self.test_set] if self.test_set else ThingScene(drawings=folder)
        with named_errors(self.out), progress_bars() as add_bar:
            records = write_things(
                self.out,
                self.count,
                seed=self.seed,
                scene=sized(scene, self.width, self.height),
                pairs=pairs,
                test_set=self.test_set or "",
                on_progress=add_bar("examples"),
            )
        say(f"wrote {self.count} examples and their records, {records}")


@dataclass(frozen=True)
class Import:
    """Take labels over from another program, into a file of records to train and evaluate on.

    Pictures are named, not copied. Of each picture it is asked where the things of a label are, how
    many there are, and what else the labels say. All that was left out is told with its cause. The
    formats are in docs/labels.md.
    """

    labels: Annotated[
        Positional[Path], arg(metavar="IN", help="file or folder as the other program exports it")
    ]
    out: Annotated[
        Positional[Path], arg(metavar="OUT.jsonl", help="file of records to write, or to replace")
    ]
    format: Annotated[
        Literal["coco", "label-studio", "cvat", "yolo", "fiftyone", "csv"],
        arg(name="from", help="program, or format, that the labels are from"),
    ]
    images: Annotated[
        Path | None,
        arg(
            aliases=("--pictures",),
            metavar="DIR",
            help="folder of the pictures, looked through with all below; none = the pictures lie "
            "around the labels",
        ),
    ] = None
    ask: Annotated[
        tuple[Literal["point", "count", "presence", "class", "caption", "question"], ...],
        arg(help="what is asked, as far as the labels know it"),
    ] = ("point", "count", "class", "caption", "question")
    negatives: Annotated[
        int,
        arg(
            metavar="N",
            help="labels that a picture has nothing of, and that are asked for all the same, so "
            "that a model learns to say so",
        ),
        AtLeast(0),
    ] = 1
    max_things: Annotated[
        int | None,
        arg(metavar="N", help="ask about no label with more things in a picture; none = any"),
        AtLeast(1),
    ] = None
    seed: Annotated[
        int, arg(metavar="SEED", help="another one draws other negatives"), AtLeast(0)
    ] = 0
    points_scale: Annotated[
        PointsScale, arg(help="csv: what places are in; unit: 0 to 1 of each side")
    ] = "pixels"
    part: Annotated[
        str,
        arg(
            metavar="NAME",
            help="yolo: only this split (train, val, test); fiftyone: the field with the labels; "
            "none = all splits, or the field ground_truth",
        ),
    ] = ""
    report: Annotated[
        Path | None, arg(metavar="FILE", help="write the report as JSON too (.json)")
    ] = None
    debug: Debug = False

    def run(self) -> None:
        check_writable(self.out, (".jsonl",), [self.labels])
        if self.report is not None:
            check_writable(self.report, (".json",), [self.labels])
        if self.points_scale != "pixels" and self.format != "csv":
            raise UsageError(f"--points-scale is for csv: {self.format} says itself what it is in")
        if self.part and self.format not in ("yolo", "fiftyone"):
            raise UsageError(f"--part is for yolo and fiftyone, and {self.format} has no parts")
        if not self.ask:
            raise UsageError("--ask names nothing: say what is to be asked, such as point count")
        from nanomolmo2.data.labels.importing import import_labels
        from nanomolmo2.data.labels.questions import Asking

        asking = Asking(self.ask, self.negatives, self.max_things, self.seed)
        report = import_labels(
            self.labels,
            self.out,
            self.format,
            images=self.images,
            asking=asking,
            points_scale=self.points_scale,
            part=self.part,
        )
        if self.report is not None:
            with written(self.report) as temporary:
                temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n", "utf-8")
        for line in report.lines():
            say(line)


@dataclass(frozen=True)
class Split:
    """Split a file of records by picture: no picture, nor a copy of one, is on both sides.

    DIR gets train.jsonl, val.jsonl, with a second share test.jsonl, and split.json, which says how
    it was split. Labels are spread over the parts. Paths of pictures are rewritten.
    """

    data: Annotated[
        Positional[Path], arg(metavar="IN.jsonl", help="records of any layout (.jsonl, .json)")
    ]
    out: Annotated[
        Path, arg(metavar="DIR", help="new or empty folder, or that of an earlier split")
    ]
    share: Annotated[
        tuple[float, ...],
        arg(metavar="SHARE", help="of the records: of val, or of val and of test (0 to 1)"),
    ] = (0.1,)
    seed: Annotated[int, arg(metavar="SEED", help="another one splits otherwise"), AtLeast(0)] = 0
    pictures: PictureFolder = None
    debug: Debug = False

    def run(self) -> None:
        from nanomolmo2.data.split_file import split_file

        with named_errors(self.out), progress_bars() as add_bar:
            about = split_file(
                self.data,
                self.out,
                self.share,
                seed=self.seed,
                images=self.pictures,
                on_progress=add_bar("records"),
            )
        for name, part in about["parts"].items():
            say(
                f"wrote {part['records']} records about {part['pictures']} pictures to "
                f"{self.out / name}.jsonl"
            )
        if missing := about["missing_pictures"]:
            note(
                f"warning: {len(missing)} pictures are not there, first {missing[0]}: copies of "
                f"them may be on both sides"
            )


@dataclass(frozen=True)
class Export:
    """Give predictions of points back to a labelling program, so that people correct them.

    PREDICTIONS is the predictions.jsonl that `nanomolmo2 eval --out` writes, or what `nanomolmo2
    ask --json` prints, one answer a line. What the other program needs is in docs/labels.md.
    """

    predictions: Annotated[
        Positional[Path],
        arg(metavar="PREDICTIONS.jsonl", help="answers with points, one JSON object a line"),
    ]
    out: Annotated[
        Positional[Path], arg(metavar="OUT.json", help="file to write, or to replace (.json)")
    ]
    to: Annotated[
        Literal["coco", "label-studio"],
        arg(help="format; label-studio also writes OUT.label_config.xml, for the project"),
    ]
    root: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="folder that the names of pictures go out from, as the document root of Label "
            "Studio; none = that of OUT.json",
        ),
    ] = None
    debug: Debug = False

    def run(self) -> None:
        check_writable(self.out, (".json",), [self.predictions])
        from nanomolmo2.data.labels.export import export_predictions

        report = export_predictions(self.predictions, self.out, self.to, root=self.root)
        for line in report.lines():
            say(line)


Action = (
    Annotated[Emoji, subcommand("emoji")]
    | Annotated[Things, subcommand("things")]
    | Annotated[Import, subcommand("import")]
    | Annotated[Split, subcommand("split")]
    | Annotated[Export, subcommand("export")]
)


@dataclass(frozen=True)
class Data:
    """Make up data, take labels over from other programs, split data, give predictions back.

    `nanomolmo2 data emoji --help` and the like tell all about one of them.
    """

    action: Annotated[
        OmitArgPrefixes[OmitSubcommandPrefixes[Action]], arg(help="what is done with data")
    ]

    def run(self) -> None:
        check_ranges(self.action)
        self.action.run()
