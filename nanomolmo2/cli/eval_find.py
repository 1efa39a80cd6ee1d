"""``nanomolmo2 eval find``: how well a model finds by example, on fixed sets or on own pictures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nanomolmo2 import __version__
from nanomolmo2.checks import named_errors, written
from nanomolmo2.cli.loading import load_pipeline, precision
from nanomolmo2.cli.options import UsageError
from nanomolmo2.cli.output import OnProgress, note, progress_bars, say

if TYPE_CHECKING:
    from nanomolmo2.cli.eval import Eval
    from nanomolmo2.evaluation.finding import Cases, FindRow
    from nanomolmo2.evaluation.finding_store import FindStore
    from nanomolmo2.generation.pipeline import Pipeline

FIND, WRITTEN = "find", "written"
OWN = "own pictures"
# Options that have nothing to do with it; the next ones only without own data.
OTHERS = (
    *("scorer", "baseline", "files", "split", "group", "styles", "scenes", "pairs"),
    *("clips", "tasks", "batch_size"),
)
OF_OWN = ("radius", "pictures", "points_scale")
OF_SETS = ("sets", "clicks")
# What must be the same for an evaluation to go on; more pictures, sets and rows may be asked for.
SAME = ("clicks", "max_crops", "min_confidence", "radius")


def run_find(command: Eval) -> None:
    """Ask, print the tables, write what was asked for."""
    from nanomolmo2.evaluation.breakdown import cell

    _check(command)
    cases = _cases(command)
    rows: list[FindRow] = []
    asked: dict[str, Cases] = {}
    store = None
    with progress_bars() as add_bar:
        for way, pipeline in _ways(command):
            if store is None and command.out is not None:
                store = _store(command, pipeline, cases)
            for name, found in cases.items():
                title = name if way == "" else f"{name}, {way}"
                asked[title] = found
                row = _row(command, pipeline, way, name, found, (title, store), add_bar(title))
                rows.append(row)
                f1, exact = (cell(row.figures, figure) for figure in ("f1", "exact"))
                note(f"{title}: point F1 {f1}, exact count {exact}")
    _tell(command, rows, asked)


def _check(command: Eval) -> None:
    """Raises: UsageError for what would be refused after the model was loaded."""
    from nanomolmo2.evaluation.report import check_report_folder
    from nanomolmo2.things.find_sets import SET_NAMES

    command.refuse(OTHERS, "is not of the benchmark find: leave it out")
    own = len(command.data) > 1
    if own:
        command.refuse(OF_SETS, "is of the fixed sets: leave it out for pictures of your own")
    else:
        command.refuse(OF_OWN, "is of pictures of your own: name their file behind find")
    for name in command.sets:
        if name not in SET_NAMES:
            raise UsageError(f"--sets has {name!r}, choose from {', '.join(SET_NAMES)}")
    if command.radius is not None and not 0 < command.radius < 1e9:
        raise UsageError(f"--radius must be above 0 pixels, found {command.radius}")
    if command.out is not None and command.out.exists() and not command.out.is_dir():
        raise UsageError(f"{command.out} is a file: name a folder")
    if command.report is not None:
        try:
            check_report_folder(command.report)
        except ValueError as error:
            raise UsageError(f"--report: {error}") from None


def _cases(command: Eval) -> dict[str, Cases]:
    """What is asked, by the name of its row."""
    from nanomolmo2.things.find_sets import PICTURES, SET_NAMES, open_set

    if len(command.data) > 1:
        return {OWN: _own_cases(command)}
    pictures = command.limit or PICTURES
    names = [name for name in SET_NAMES if not command.sets or name in command.sets]
    return {name: open_set(name, pictures, command.clicks) for name in names}


def _own_cases(command: Eval) -> Cases:
    """Of the files behind the word find; what cannot be asked is told in a warning."""
    from nanomolmo2.evaluation.finding import OwnCases
    from nanomolmo2.evaluation.questions import find_questions
    from nanomolmo2.evaluation.run import opened, warn_of

    sources = opened([command.open_source(name) for name in command.data[1:]])
    questions = find_questions(sources, None, command.limit, command.radius)
    warn_of(questions)
    cases = OwnCases(sources, questions.asked)
    if left := cases.left_out:
        number = "1 question says" if left == 1 else f"{left} questions say"
        warnings.warn(f"{number} no places of things, and cannot be asked so", stacklevel=2)
    return cases


def _ways(command: Eval) -> Iterator[tuple[str, Pipeline]]:
    """(name of a way to ask, the model for it): as the model is, then what ``--also`` names."""
    options = precision(command.dtype, command.quantize, command.device, command.adapter)

    def load(**more: Any) -> Pipeline:
        return load_pipeline(command.model, command.cache_dir, **{**options, **more})

    pipeline = load()
    if WRITTEN in command.also and pipeline.model.config.point_config is None:
        raise UsageError(
            f"--also written asks in words, with points in the question, and {command.model} reads "
            f"none: leave it out, or name a model that selects points"
        )
    yield "", pipeline
    if WRITTEN in command.also:
        yield WRITTEN, pipeline
    for way in dict.fromkeys(command.also):
        if way != WRITTEN:
            yield way, load(quantize=way)


def _store(command: Eval, pipeline: Pipeline, cases: Mapping[str, Cases]) -> FindStore:
    """The folder of ``--out``: for the same model, options and, of own data, pictures."""
    from nanomolmo2.evaluation.finding import OwnCases
    from nanomolmo2.evaluation.finding_store import FindStore
    from nanomolmo2.evaluation.store import digest_of

    assert command.out is not None
    own = [c.digest for c in cases.values() if isinstance(c, OwnCases)]
    about = {
        "task": FIND,
        "model_digest": digest_of(pipeline),
        "pictures": own,
        **{name: getattr(command, name) for name in SAME},
        "version": __version__,
    }
    return FindStore(command.out, about)


def _row(
    command: Eval,
    pipeline: Pipeline,
    way: str,
    name: str,
    cases: Cases,
    kept: tuple[str, FindStore | None],
    on_progress: OnProgress,
) -> FindRow:
    """Args: kept: name of the row, and where its outcomes are kept."""
    from nanomolmo2.evaluation import finding
    from nanomolmo2.things.find_sets import FindSet, set_of

    def click(vlm: Pipeline, case: finding.FindCase) -> Any:
        return finding.click(vlm, case, command.max_crops, command.min_confidence)

    ask = finding.written if way == WRITTEN else click
    title, store = kept
    known = store.known(title) if store is not None else []
    new = finding.outcomes(pipeline, cases, ask, on_progress, start=len(known))
    if store is not None:
        new = store.adding(title, len(known), new)
    found = [*known, *new][: len(cases)]
    of = FindSet("a click each", {}) if name == OWN else set_of(name)
    goals = {} if way else of.goals  # they are for the model as it is
    return finding.summarize(title, of.title, found, goals, command.failures)


def _tell(command: Eval, rows: list[FindRow], cases: Mapping[str, Cases]) -> None:
    """Print the tables, write the JSON and the page."""
    import torch

    from nanomolmo2.evaluation import finding_report as report

    say(f"{report.tables(rows)}\n\n{report.LEGEND}")
    met, goals = report.goals_met(rows)
    if goals:
        say(f"{met} of {goals} goals are met")
    about: dict[str, Any] = {
        "task": FIND,
        "model": command.model,
        "data": list(command.data[1:]) or "fixed sets",
        "clicks": command.clicks,
        "max_crops": command.max_crops,
        "min_confidence": command.min_confidence,
        "threads": torch.get_num_threads(),
        "version": __version__,
    }
    if command.json is not None:
        with written(command.json) as temporary:
            text = json.dumps(report.to_json(rows, about), indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
    if command.report is not None:
        with named_errors(command.report):
            report.write_page(command.report, rows, cases, about)
        say(f"wrote {command.report / 'index.html'}")
