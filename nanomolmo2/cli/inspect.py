"""``nanomolmo2 inspect``: what a model sees of a data source, and what is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from nanomolmo2.checks import written
from nanomolmo2.cli.options import (
    MODEL_HELP,
    AtLeast,
    Debug,
    PointsScale,
    UsageError,
    library_name,
)
from nanomolmo2.cli.output import check_writable, note, print_json, progress_bars

if TYPE_CHECKING:
    from nanomolmo2.data.audit import Report
    from nanomolmo2.data.inspect import Fault, View
    from nanomolmo2.data.sources import Source
    from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
    from nanomolmo2.processor import Processor
    from nanomolmo2.processor.encode import EncodeTree


@dataclass(frozen=True)
class Inspect:
    """Show what a model will see of a data source, or audit the source.

    Of each example: its tokens by who speaks, with what is learned underlined, positions and loss
    weights, crops, and the points of its answers on their pictures.

    With --audit, every record is read as training reads it. A fatal finding (nothing to learn,
    image tokens cut off, answers longer than the sequence, more crops than a row holds, points
    outside, too many broken pictures, records that cannot be read) makes the exit code 1.
    """

    source: Annotated[
        Positional[str],
        arg(
            metavar="SOURCE",
            help="file, folder or pattern of files with examples (.jsonl, .json, .parquet, .tar), "
            "hub:NAME of a data set on the Hugging Face hub, emoji or things",
        ),
    ]
    pictures: Annotated[
        Path | None,
        arg(metavar="DIR", help="folder of the pictures; none = paths go out from the file"),
    ] = None
    model: Annotated[
        str,
        arg(metavar="MODEL", help="whose tokenizer, pictures and context: " + MODEL_HELP),
    ] = "tiny"
    count: Annotated[int, arg(metavar="N", help="how many examples are shown"), AtLeast(1)] = 3
    start: Annotated[
        int, arg(metavar="RECORD", help="number of the first one that is shown, from 0"), AtLeast(0)
    ] = 0
    html: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="write one page with pictures instead (.html); with --audit it shows the "
            "findings and the records that they name",
        ),
    ] = None
    audit: Annotated[
        bool, arg(help="look for what is wrong in all records instead of showing some")
    ] = False
    limit: Annotated[
        int | None,
        arg(metavar="N", help="audit the first N records only; none = all of them"),
        AtLeast(1),
    ] = None
    sequence_length: Annotated[
        int | None,
        arg(
            metavar="TOKENS",
            help="tokens that a row of the training holds, for the audit; none = as nanomolmo2 "
            "train --data chooses for the model",
        ),
        AtLeast(1),
    ] = None
    max_crops: Annotated[
        int | None,
        arg(
            metavar="N",
            help="crops (pictures, where they are not cut; frames) that a row of the training "
            "holds, for the audit; none = likewise",
        ),
        AtLeast(1),
    ] = None
    max_frames: Annotated[
        int | None,
        arg(
            metavar="N",
            help="most frames of a video, to look at; none = as the model's processor says, which "
            "is what training takes",
        ),
        AtLeast(1),
    ] = None
    points_scale: Annotated[
        PointsScale,
        arg(help="of the points of records that do not say it; unit: 0 to 1 of each side"),
    ] = "pixels"
    max_bad_share: Annotated[
        float,
        arg(
            aliases=("--bad-share",),
            metavar="SHARE",
            help="audit: more missing and broken pictures than this share of the records (0 to 1) "
            "are fatal, as in training",
        ),
    ] = 0.05
    loss_weighting: Annotated[
        Literal["token", "sqrt", "molmo2"],
        arg(
            help="weight of a label in a branch with n of them: 1, 1 / sqrt(n), or Molmo2's "
            "2 / sqrt(n times the number of branches)"
        ),
    ] = "token"
    json: Annotated[bool, arg(help="print one JSON object instead, without the pictures")] = False
    debug: Debug = False

    def run(self) -> None:
        self._check()
        from nanomolmo2.convert.pretrained import load_config, load_processor
        from nanomolmo2.data.fields import RowLimits
        from nanomolmo2.data.inspect import look
        from nanomolmo2.data.sources import SourceConfig, open_source
        from nanomolmo2.processor.encode import EncodeTree

        given = SourceConfig(
            self.source, image_folder=str(self.pictures or ""), points_scale=self.points_scale
        )
        source = open_source(given)
        name = library_name(self.model)
        processor, config = self._with_frames(load_processor(name)), load_config(name)
        encode = EncodeTree(processor, self.loss_weighting)
        report = None
        records = list(range(self.start, min(self.start + self.count, len(source))))
        if self.audit:
            report = self._audit(source, encode, config)
            named = sorted({record for found in report.findings for record in found.records})
            records = named[: self.count] or records
        elif not records:
            raise ValueError(
                f"{self.source} has {len(source)} records, numbered from 0: there is none to show "
                f"from {self.start} on"
            )
        page, show = self.html is not None, not self.audit
        limits = RowLimits.of(processor, config.llm_config.max_position_embeddings, 2**62)
        views = [look(source, i, encode, processor, limits) for i in records if page or show]
        self._show(views, report)
        if report is not None and report.fatal:
            causes = ", ".join(f"{found.cause} ({found.count})" for found in report.fatal)
            raise ValueError(
                f"{self.source} is not fit for training: {causes}; correct or remove these records"
            )

    def _audit(
        self,
        source: Source,
        encode: EncodeTree,
        config: NanoMolmo2Config,
    ) -> Report:
        """Read every record as training reads it, into rows as training has them."""
        from nanomolmo2.data.audit import audit
        from nanomolmo2.recipes import finetune

        rows = finetune((self.source,), self.model, steps=1)  # only its rows count
        positions = config.llm_config.max_position_embeddings
        if (self.sequence_length or 0) > positions:
            raise ValueError(
                f"--sequence-length is {self.sequence_length}, but the model {self.model} has "
                f"{positions} positions, and training has no longer rows: name {positions} or less"
            )
        settings = encode.processor.config
        expands = settings.multicrop is None and settings.image_tokens is None
        with progress_bars() as add_bar:
            return audit(
                source,
                encode,
                encode.processor,
                max_tokens=self.sequence_length or min(rows.sequence_length, positions),
                max_crops=self.max_crops or rows.max_crops,
                visual_tokens=config.num_visual_tokens if expands else 1,
                max_bad_fraction=self.max_bad_share,
                limit=self.limit,
                on_progress=add_bar("records"),
            )

    def _with_frames(self, processor: Processor) -> Processor:
        config = processor.config
        if self.max_frames is None:
            return processor
        if config.video is None:
            raise ValueError(f"--max-frames is for videos, and {self.model} takes pictures only")
        video = dataclasses.replace(config.video, max_frames=self.max_frames)
        return processor.with_settings(video=video)

    def _show(self, views: Sequence[View | Fault], report: Report | None) -> None:
        """Write the page if one is wanted, and print examples or findings."""
        from rich.console import Console

        from nanomolmo2.data.show import make_page, print_report, print_views

        if self.html is not None:
            text = make_page(views, self.source, self.model, report)
            with written(self.html) as temporary:
                temporary.write_text(text, encoding="utf-8")
            note(f"wrote {self.html}")
        if self.json:
            found = report.to_dict() if report else {"examples": [v.to_dict() for v in views]}
            print_json({"source": self.source, "model": self.model, **found})
        elif report is not None:
            print_report(report, Console())
        elif self.html is None:
            print_views(views, Console())

    def _check(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise UsageError(f"--max-bad-share must be 0 to 1, found {self.max_bad_share}")
        if self.html is not None:
            check_writable(self.html, (".html", ".htm"), [self.source])
        if self.limit is not None and not self.audit:
            raise UsageError("--limit is for --audit; --start and --count choose what is shown")
