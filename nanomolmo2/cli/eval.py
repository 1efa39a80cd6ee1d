"""``nanomolmo2 eval``: scores on a fixed test set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from nanomolmo2 import __version__
from nanomolmo2.checks import named_errors, written
from nanomolmo2.cli.loading import files_of, load_pipeline, precision
from nanomolmo2.cli.options import (
    ArtGroup,
    AtLeast,
    CacheDir,
    Debug,
    DType,
    ModelName,
    Precision,
    UsageError,
)
from nanomolmo2.cli.output import OnProgress, check_writable, progress_bars, say

if TYPE_CHECKING:
    from nanomolmo2.evaluation.exam import Scores
    from nanomolmo2.generation.pipeline import Pipeline


@dataclass(frozen=True)
class Eval:
    """Measure a model on a fixed test set.

    There is one so far: emoji, scenes of one to six emoji, pairs of them and videos of 8 frames.
    Answers are greedy. Art groups: seen (styles of the training, in new scenes), mild and openmoji
    (styles it was never shown). Prints scores with 95 % intervals and the goals.
    """

    task: Annotated[Positional[Literal["emoji"]], arg(help="what to measure")]
    model: ModelName = "tiny"
    group: Annotated[Literal[ArtGroup, "all"], arg(help="art group, or all three")] = "all"
    styles: Annotated[
        tuple[str, ...],
        arg(
            metavar="STYLE",
            help="only these styles of the group, such as noto; none = all. Goals are for all",
        ),
    ] = ()
    scenes: Annotated[
        int,
        arg(metavar="N", help="pictures a group, about 15 questions each; the first N of the set"),
        AtLeast(1),
    ] = 1000
    pairs: Annotated[
        int | None,
        arg(metavar="N", help="pairs of pictures a group; none = half of --scenes"),
        AtLeast(0),
    ] = None
    clips: Annotated[
        int | None,
        arg(
            metavar="N",
            help="videos a group; none = a tenth of --scenes, and no videos where the model takes "
            "pictures only",
        ),
        AtLeast(0),
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        arg(metavar="TASK", help="only these questions, such as: presence count point; none = all"),
    ] = ()
    batch_size: Annotated[
        int,
        arg(metavar="N", help="questions answered together; changes the speed only"),
        AtLeast(1),
    ] = 64
    json: Annotated[
        Path | None, arg(metavar="FILE", help="also write the scores to this file (.json)")
    ] = None
    report: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="also write a page with the scores and pictures of the worst answers into this "
            "new or empty folder",
        ),
    ] = None
    failures: Annotated[
        int,
        arg(metavar="N", help="with --report: pictures of bad answers, of each group"),
        AtLeast(0),
    ] = 24
    dtype: DType = None
    quantize: Precision = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        if self.json is not None:
            check_writable(self.json, (".json",), files_of(self.model))
        self._check()
        from nanomolmo2.emoji.exam import EMOJI, ROWS
        from nanomolmo2.emoji.scenes import TEST_GROUPS
        from nanomolmo2.evaluation import report

        groups = TEST_GROUPS if self.group == "all" else (self.group,)
        options = precision(self.dtype, self.quantize)
        pipeline = load_pipeline(self.model, self.cache_dir, **options)
        with progress_bars() as add_bar:
            scores = [self._evaluate(pipeline, group, add_bar(group)) for group in groups]
        met, goals = report.goals_met(scores, ROWS)
        say(report.score_table(scores, ROWS))
        say(f"\n{report.LEGEND}\n{met} of {goals} goals are met")
        about = {"task": self.task, "model": self.model, "scenes": self.scenes}
        if self.styles:
            about["styles"] = ", ".join(self.styles)
        about["version"] = __version__
        if self.json is not None:
            content = {**about, "groups": report.scores_to_json(scores, ROWS)}
            with written(self.json) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if self.report is not None:
            with named_errors(self.report):
                report.write_report(self.report, scores, about, EMOJI)
            say(f"wrote {self.report / report.PAGE}")

    def _check(self) -> None:
        """Raises: UsageError for what evaluation would refuse after the model was loaded."""
        from nanomolmo2.emoji.scenes import TEST_GROUPS, art_of
        from nanomolmo2.emoji.scorers import SCORERS
        from nanomolmo2.evaluation import report

        for task in self.tasks:
            if task not in SCORERS:
                raise UsageError(f"--tasks has {task!r}, choose from {', '.join(SCORERS)}")
        try:
            for group in TEST_GROUPS if self.group == "all" else (self.group,):
                art_of(group, self.styles)
        except ValueError as error:
            raise UsageError(f"--styles: {error}") from None
        if self.report is not None:
            try:
                report.check_report_folder(self.report)
            except ValueError as error:
                raise UsageError(f"--report: {error}") from None

    def _evaluate(self, pipeline: Pipeline, group: str, on_progress: OnProgress) -> Scores:
        from nanomolmo2.emoji.exam import ExamPlan, evaluate

        plan = ExamPlan(
            group,
            self.scenes,
            self.pairs,
            self.clips,
            styles=self.styles,
            tasks=self.tasks or None,
        )
        return evaluate(
            pipeline.model,
            pipeline.processor,
            plan,
            batch_size=self.batch_size,
            failures=0 if self.report is None else self.failures,
            on_progress=on_progress,
        )
