"""``nanomolmo2 eval``: scores on own data, on public benchmarks, and on the emoji test set."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from nanomolmo2 import __version__
from nanomolmo2.checks import MOST_JSON, named_errors, written
from nanomolmo2.cli.eval_find import run_find
from nanomolmo2.cli.loading import files_of, load_pipeline, precision
from nanomolmo2.cli.options import (
    AdapterFolders,
    ArtGroup,
    AtLeast,
    CacheDir,
    Debug,
    DeviceName,
    DType,
    ModelName,
    PictureFolder,
    PointsScale,
    Precision,
    UsageError,
    option,
)
from nanomolmo2.cli.output import OnProgress, check_writable, note, progress_bars, say
from nanomolmo2.files import read_regular

if TYPE_CHECKING:
    from nanomolmo2.data.example import Source
    from nanomolmo2.evaluation.exam import Scores
    from nanomolmo2.generation.pipeline import Pipeline


EMOJI, FIND = "emoji", "find"

# Options of some of the things to measure only.
OF_DATA = (
    *("scorer", "radius", "limit", "baseline", "out", "pictures", "points_scale"),
    *("files", "split"),
)
OF_EMOJI = ("group", "styles", "scenes", "pairs", "clips", "tasks")
OF_FIND = ("sets", "clicks", "also", "max_crops", "min_confidence")


@dataclass(frozen=True)
class Eval:
    """Measure a model on your data, or on a benchmark.

    nanomolmo2 eval my.jsonl --model runs/mine/model --out runs/eval asks every question of what
    `train --data` reads, and scores the answers by what the records know: points by F1, counts,
    texts, choices, captions. Beside each score stands what is reached without looking. Records are
    described in docs/evaluation.md. With --out every answer is kept, and the same command goes on
    where it was ended.

    nanomolmo2 eval emoji asks about fixed test scenes: one to six emoji, pairs of them and videos
    of 8 frames; art groups: seen (styles of the training, in new scenes), mild and openmoji (styles
    it was never shown). Answers are greedy.

    nanomolmo2 eval find shows a thing and measures how well the others like it are found, a click a
    picture, on fixed sets of 500 pictures; eval find my.jsonl on your own: see docs/find.md.
    """

    data: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="DATA...",
            help="files, folders or patterns of examples; or the name of a benchmark: emoji, "
            "find (also with files of your own), or a public one with --files",
        ),
    ] = ()
    more_data: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(name="data", metavar="DATA", help="the same as DATA without --data"),
    ] = ()
    model: ModelName = "tiny"
    scorer: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="NAME",
            help="in place of what the records say: points, count, exact, vqa, anls, relaxed, "
            "choice, categories, tracks; or TASK=NAME for one task, and again for another",
        ),
    ] = ()
    radius: Annotated[
        float | None,
        arg(
            metavar="PIXELS",
            help="around true points that have no box or mask; none = 5 % of the picture's "
            "diagonal",
        ),
    ] = None
    limit: Annotated[
        int | None,
        arg(
            metavar="N",
            help="only the first N records of each DATA, or pictures of each set of find; none = "
            "all, of find 500",
        ),
        AtLeast(1),
    ] = None
    baseline: Annotated[
        str | None,
        arg(
            metavar="MODEL",
            help="also ask this model, to compare with; none = what the run began with, where "
            "--model is RUN/model; off = no other model",
        ),
    ] = None
    out: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="of own data: write every answer, the scores and a page of the worst into this "
            "folder; of find: every answer; the same command goes on with it",
        ),
    ] = None
    pictures: PictureFolder = None
    points_scale: Annotated[
        PointsScale,
        arg(help="of the points of records that do not say it; unit: 0 to 1 of a side"),
    ] = "pixels"
    files: Annotated[
        Path | None,
        arg(metavar="DIR", help="of a public benchmark: the folder of its downloaded files"),
    ] = None
    split: Annotated[
        str | None, arg(metavar="NAME", help="of a public benchmark; none = its usual one")
    ] = None
    group: Annotated[Literal[ArtGroup, "all"], arg(help="of emoji: art group, or all three")] = (
        "all"
    )
    styles: Annotated[
        tuple[str, ...],
        arg(
            metavar="STYLE",
            help="of emoji: only these styles of the group, such as noto; none = all, which "
            "the goals are for",
        ),
    ] = ()
    scenes: Annotated[
        int,
        arg(
            metavar="N",
            help="of emoji: pictures a group, about 15 questions each; the first N of the set",
        ),
        AtLeast(1),
    ] = 1000
    pairs: Annotated[
        int | None,
        arg(metavar="N", help="of emoji: pairs of pictures a group; none = half of --scenes"),
        AtLeast(0),
    ] = None
    clips: Annotated[
        int | None,
        arg(
            metavar="N",
            help="of emoji: videos a group; none = a tenth of --scenes, and no videos where the "
            "model takes pictures only",
        ),
        AtLeast(0),
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        arg(
            metavar="TASK",
            help="of emoji: only these questions, such as: presence count point; none = all",
        ),
    ] = ()
    sets: Annotated[
        tuple[str, ...],
        arg(
            metavar="SET",
            help="of find: only these, of few crowded photos pair alike made coins; none = all",
        ),
    ] = ()
    clicks: Annotated[
        int,
        arg(metavar="N", help="of find: examples of each picture, one after the other"),
        AtLeast(1),
    ] = 1
    also: Annotated[
        tuple[Literal["int8", "int8-weight-only", "fp16-weights", "written"], ...],
        arg(
            help="of find: further rows, of the same model with smaller weights, and of lists that "
            "it writes token by token"
        ),
    ] = ()
    max_crops: Annotated[
        int | None,
        arg(metavar="N", help="of find: most tiles of a picture; none = by its size"),
        AtLeast(1),
    ] = None
    min_confidence: Annotated[
        float, arg(metavar="P", help="of find: points count from this confidence on, 0 to 1")
    ] = 0.5
    batch_size: Annotated[
        int | None,
        arg(
            metavar="N",
            help="questions answered together; changes the speed only; none = 16, of emoji 64",
        ),
        AtLeast(1),
    ] = None
    json: Annotated[
        Path | None, arg(metavar="FILE", help="also write the scores to this file (.json)")
    ] = None
    report: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="of emoji and find: also write a page with the scores and pictures of the worst "
            "answers into this new or empty folder",
        ),
    ] = None
    failures: Annotated[
        int,
        arg(metavar="N", help="with --report: pictures of bad answers, of each group or set"),
        AtLeast(0),
    ] = 24
    device: DeviceName = None
    dtype: DType = None
    quantize: Precision = None
    adapter: AdapterFolders = ()
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        if self.more_data:
            joined = dataclasses.replace(self, data=self.data + self.more_data, more_data=())
            return joined.run()
        if not self.data:
            raise UsageError("expected data, as in: nanomolmo2 eval my.jsonl --model tiny")
        if self.json is not None:
            check_writable(self.json, (".json",), [*files_of(self.model), *self.data])
        if self.data[0] == FIND and (len(self.data) == 1 or not os.path.exists(FIND)):
            run_find(self)
        elif self.data == (EMOJI,):
            self._run_emoji()
        else:
            self._run_data()

    # ---- own data and public benchmarks ----

    def _run_data(self) -> None:
        self._check_data()
        sources = [self.open_source(name) for name in self.data]
        from nanomolmo2.evaluation import evaluate
        from nanomolmo2.evaluation.breakdown import LEGEND as PART_LEGEND
        from nanomolmo2.evaluation.summary import LEGEND

        options = precision(self.dtype, self.quantize, self.device, self.adapter)
        pipeline = load_pipeline(self.model, self.cache_dir, **options)
        other = self._baseline({name: o for name, o in options.items() if name != "adapter"})
        with progress_bars() as add_bar:
            report = evaluate(
                pipeline,
                sources,
                scorer=self._scorers(),
                batch_size=self.batch_size or 16,
                limit=self.limit,
                radius=self.radius,
                baselines=True if other is None else other[1],
                out=self.out,
                about={"model": self.model, "untrained": None if other is None else other[0]},
                on_progress=add_bar("questions"),
            )
        say(f"{report.table()}\n\n{LEGEND}")
        if parts := report.part_table():
            say(f"\n{parts}\n\n{PART_LEGEND}")
        for task, count in report.unscored.items():
            say(f"{task}: {count} answers were not scored, nothing tells what they should hold")
        if self.json is not None:
            with written(self.json) as temporary:
                text = json.dumps(report.flat(), indent=2)
                temporary.write_text(text + "\n", encoding="utf-8")
        if self.out is not None:
            say(f"wrote {self.out / 'index.html'} and every answer to predictions.jsonl beside it")

    def _check_data(self) -> None:
        """Raises: UsageError for what would be refused after the model was loaded."""
        self.refuse(OF_EMOJI, "is of the benchmark emoji: leave it out")
        self.refuse(
            ("report",), "is of the benchmark emoji: leave it out, and name a folder by --out"
        )
        self.refuse(OF_FIND, "is of the benchmark find: leave it out")
        if EMOJI in self.data:
            raise UsageError("emoji is a benchmark of its own: measure it by itself")
        if self.radius is not None and not 0 < self.radius < 1e9:
            raise UsageError(f"--radius must be above 0 pixels, found {self.radius}")
        self._scorers()
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file: name a folder")

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Raises: UsageError for the first of these options that was given."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UsageError(f"{option(name)} {why}")

    def _scorers(self) -> str | dict[str, str] | None:
        """What evaluation takes. Raises: UsageError for unknown names, and several for all."""
        from nanomolmo2.evaluation import SCORERS

        if not self.scorer:
            return None
        pairs = [name.rpartition("=") for name in self.scorer]
        for _, _, name in pairs:
            if name not in SCORERS:
                raise UsageError(f"--scorer has {name!r}, choose from {', '.join(SCORERS)}")
        if len(pairs) == 1 and not pairs[0][1]:
            return pairs[0][2]
        if not all(equals for _, equals, _ in pairs):
            raise UsageError(
                "several --scorer need their tasks, as in: --scorer count=count qa=vqa"
            )
        return {task: name for task, _, name in pairs}

    def open_source(self, name: str) -> Source:
        """A public benchmark by its name, or what training reads."""
        from nanomolmo2.data.sources import SourceConfig, open_source

        public = public_benchmarks()
        if name in public and (self.files is not None or not os.path.exists(name)):
            if self.files is None:
                raise UsageError(
                    f"{name} is a public benchmark: give the folder of its downloaded files by "
                    f"--files DIR"
                )
            return public[name].open(self.files, self.split)
        if self.files is not None or self.split is not None:
            known = ", ".join(public) or "none"
            raise UsageError(
                f"--files and --split are of public benchmarks ({known}), and {name} is none"
            )
        folder = str(self.pictures or "")
        config = SourceConfig(name, image_folder=folder, points_scale=self.points_scale)
        try:
            return open_source(config)
        except FileNotFoundError as error:
            known = ", ".join((EMOJI, FIND, *public))
            raise FileNotFoundError(f"{error}, or a benchmark ({known})") from None

    def _baseline(self, options: dict[str, Any]) -> tuple[str, Pipeline] | None:
        """(name, model) to compare with."""
        name = self.baseline
        if name == "off":
            return None
        if name is None:
            name = began_with(self.model)
            if name is None:
                return None
            if name != "tiny" and not os.path.isdir(name):  # nothing is downloaded unasked
                note(f"{name}, which the run began with, is not asked: --baseline {name} does")
                return None
        return name, load_pipeline(name, self.cache_dir, **options)

    # ---- emoji ----

    def _run_emoji(self) -> None:
        self._check()
        from nanomolmo2.emoji.exam import EMOJI as BENCHMARK
        from nanomolmo2.emoji.exam import ROWS
        from nanomolmo2.emoji.scenes import TEST_GROUPS
        from nanomolmo2.evaluation import report

        groups = TEST_GROUPS if self.group == "all" else (self.group,)
        options = precision(self.dtype, self.quantize, self.device, self.adapter)
        pipeline = load_pipeline(self.model, self.cache_dir, **options)
        with progress_bars() as add_bar:
            scores = [self._evaluate(pipeline, group, add_bar(group)) for group in groups]
        met, goals = report.goals_met(scores, ROWS)
        say(report.score_table(scores, ROWS))
        say(f"\n{report.LEGEND}\n{met} of {goals} goals are met")
        about = {"task": EMOJI, "model": self.model, "scenes": self.scenes}
        if self.styles:
            about["styles"] = ", ".join(self.styles)
        about["version"] = __version__
        if self.json is not None:
            content = {**about, "groups": report.scores_to_json(scores, ROWS)}
            with written(self.json) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if self.report is not None:
            with named_errors(self.report):
                report.write_report(self.report, scores, about, BENCHMARK)
            say(f"wrote {self.report / report.PAGE}")

    def _check(self) -> None:
        """Raises: UsageError for what evaluation would refuse after the model was loaded."""
        from nanomolmo2.emoji.scenes import TEST_GROUPS, art_of
        from nanomolmo2.emoji.scorers import SCORERS
        from nanomolmo2.evaluation import report

        self.refuse((*OF_DATA, *OF_FIND), "is not of the benchmark emoji: leave it out")
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
            batch_size=self.batch_size or 64,
            failures=0 if self.report is None else self.failures,
            on_progress=on_progress,
        )


def public_benchmarks() -> Mapping[str, Any]:
    """The public benchmarks that are known, by name."""
    from nanomolmo2.evaluation.public import PUBLIC

    return PUBLIC


def began_with(model: str) -> str | None:
    """The model that a run began with, of the folder RUN/model; None for any other."""
    recipe = Path(model).resolve().parent / "recipe.json"
    if not os.path.isdir(model) or not recipe.is_file():
        return None
    try:
        content = json.loads(read_regular(recipe, MOST_JSON))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("architecture") is not None:
        return None  # weights of parts, or none: it could not answer yet
    name = content.get("model")
    return name if isinstance(name, str) and name else None
