"""Evaluation on anything that training reads: ask, score, sum up.

find_questions(sources) -> answer each, in batches -> summarize -> Report
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanomolmo2 import __version__
from nanomolmo2.checks import written
from nanomolmo2.data.example import BadExample, Branch, Example, Source, brief
from nanomolmo2.data.record import short
from nanomolmo2.data.sources import RecordSource, SourceConfig, open_source
from nanomolmo2.evaluation.breakdown import LEGEND as PART_LEGEND
from nanomolmo2.evaluation.exam import Failure
from nanomolmo2.evaluation.measures import DEFAULT_RADIUS, SCORERS
from nanomolmo2.evaluation.questions import Choice, Question, Questions, find_questions
from nanomolmo2.evaluation.remarks import remarks
from nanomolmo2.evaluation.report import PAGE, PICTURES, html_page, html_rows, worst_answers
from nanomolmo2.evaluation.store import PREDICTIONS, Refused, Store, digest_of, open_folder
from nanomolmo2.evaluation.summary import (
    BASELINES,
    LEGEND,
    UNTRAINED,
    Prediction,
    Report,
    judge,
    summarize,
)
from nanomolmo2.files import atomic_path
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.pipeline import Question as Asked

OnProgress = Callable[[int, int], None]
Data = str | Path | SourceConfig | Source


def evaluate(
    pipeline: Pipeline,
    source: Data | Sequence[Data],
    *,
    scorer: Choice = None,
    batch_size: int = 16,
    limit: int | None = None,
    radius: float | None = None,
    baselines: bool | Pipeline = True,
    out: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Ask a model the questions of some data, greedy, and score its answers.

    What cannot be asked is left out, with a warning for each cause, and counted in the report.
    Nothing of the model and no global random state changes.

    Args:
        source: what training reads: a path, several, or an opened source.
        scorer: of all questions, or ``{task: scorer}``; None = by the fields of each record. See
            `SCORERS`.
        batch_size: questions that are answered together; changes the speed only.
        limit: only the first records of each source.
        radius: pixels around true points of which nothing else is known; None = `DEFAULT_RADIUS` of
            the picture's diagonal.
        baselines: also score what is answered without looking; another model, such as the one
            that a fine-tuning began with, is asked too.
        out: a folder for every prediction, the scores and a page; what is there of the same
            evaluation is not asked again.
        about: what else to say in the report, such as the name of the model.
        on_progress: called with (answers so far, all answers).
    Raises: ValueError where nothing can be scored, a scorer is unknown or does not fit, or ``out``
        holds something else; TypeError for records in place of a source; errors of `open_source`.
    """
    sources = opened(source)
    other = baselines if isinstance(baselines, Pipeline) else None
    questions = find_questions(sources, scorer, limit, radius)
    described = {**(about or {}), **_about(sources, questions, scorer, limit, radius)}
    folder = None if out is None else Path(out)
    if folder is not None:
        pictures = json.dumps([question.picture for question in questions.asked])
        digests = {
            "model_digest": digest_of(pipeline),
            "untrained_digest": digest_of(other) if other is not None else "",
            "pictures_digest": hashlib.blake2b(pictures.encode(), digest_size=12).hexdigest(),
        }
        open_folder(folder, {**described, **digests})
    asked, steps = questions.asked, len(questions.asked) * (1 if other is None else 2)

    def progress(begin: int) -> Callable[[int], None]:
        return lambda done: on_progress(begin + done, steps) if on_progress else None

    answers = _ask_all(pipeline, sources, asked, batch_size, folder, PREDICTIONS, progress(0))
    predictions = [one for one in answers if isinstance(one, Prediction)]
    for question, one in zip(asked, answers, strict=True):
        if isinstance(one, Refused):
            bad = BadExample("not encodable", f"{question.where}: {brief(one)}")
            questions.leave_out(bad)
    others: dict[str, list[Prediction]] = {}
    if baselines:
        known = [one.question for one in predictions]
        others = {name: answer(known) for name, answer in BASELINES.items()}
    if other is not None:
        file = PREDICTIONS.replace(".", "-untrained.")
        found = _ask_all(other, sources, asked, batch_size, folder, file, progress(len(asked)))
        others[UNTRAINED] = [one for one in found if isinstance(one, Prediction)]
    if not predictions:
        raise ValueError(f"no question could be asked: {questions.first_bad['not encodable']}")
    report = summarize(questions, predictions, {name: a for name, a in others.items() if a})
    report.about, report.predictions = described, predictions
    warn_of(questions)
    if folder is not None:
        _write(folder, report, sources)
    return report


def opened(source: Data | Sequence[Data]) -> list[Source]:
    """What is evaluated on: records need no answer in words.

    Raises: ValueError where there is nothing, TypeError for records in place of a source.
    """
    given: list[Any] = list(source) if isinstance(source, (list, tuple)) else [source]
    if not given:
        raise ValueError("there is no data to evaluate on: give a file, a folder or a source")
    found_all: list[Source] = []
    for one in given:
        found = open_source(one) if isinstance(one, (str, Path, SourceConfig)) else one
        if isinstance(found, RecordSource):
            found = RecordSource(found.rows, found.config)
            found.needs_answer = False
        if isinstance(found, Mapping) or not hasattr(found, "__len__"):
            raise TypeError(
                f"found {short(found)} to evaluate on, expected a path or a source: write records "
                f"to a file, a line each (.jsonl)"
            )
        if not len(found):
            raise ValueError(f"{found.name} is empty: there is nothing to evaluate on")
        found_all.append(found)
    return found_all


def _about(
    sources: Sequence[Source],
    questions: Questions,
    scorer: Choice,
    limit: int | None,
    radius: float | None,
) -> dict[str, Any]:
    near = f"{radius:g} pixels" if radius is not None else f"{DEFAULT_RADIUS:.0%} of the diagonal"
    return {
        "data": [source.name for source in sources],
        "records": questions.records,
        "questions": len(questions.asked),
        "scorer": "by the fields of the records" if scorer is None else scorer,
        "limit": limit,
        "radius": f"{near}, around true points of which nothing else is known",
        "version": __version__,
    }


def warn_of(questions: Questions) -> None:
    """One warning for each cause of what was left out, and for what is hardly meant."""
    for cause, count in questions.bad.items():
        number = "1 record was" if count == 1 else f"{count} records were"
        warnings.warn(f"{number} left out ({cause}): {questions.first_bad[cause]}", stacklevel=3)
    for remark in remarks(questions):
        warnings.warn(remark, stacklevel=3)


# ---- answers ----


def _ask_all(
    pipeline: Pipeline,
    sources: Sequence[Source],
    asked: Sequence[Question],
    batch_size: int,
    folder: Path | None,
    file: str,
    on_done: Callable[[int], None],
) -> list[Prediction | Refused]:
    """One for each question, in order; those of an earlier call come from the folder."""
    with contextlib.ExitStack() as stack:
        store = None
        if folder is not None:
            store = stack.enter_context(contextlib.closing(Store(folder / file, asked)))
        answers = [] if store is None else list(store.known)
        rest = asked[len(answers) :]
        if answers:
            on_done(len(answers))
        stack.enter_context(frozen(pipeline))
        for question, found in zip(
            rest,
            pipeline.ask_many(_examples(pipeline, sources, rest), batch_size=batch_size),
            strict=True,
        ):
            one: Prediction | Refused
            if isinstance(found, ValueError):
                one = Refused(str(found))
            else:
                one = judge(question, found.coordinates, found.finish_reason == "stop")
            answers.append(one)
            if store is not None:
                store.add(question, one)
            on_done(len(answers))
        pipeline.prefix_cache.clear()
    return answers


def _examples(
    pipeline: Pipeline, sources: Sequence[Source], asked: Sequence[Question]
) -> Iterator[Asked]:
    """What the model is asked; an example is read once for all of its questions."""
    place, example, picture = (-1, -1), Example([], []), ""
    for question in asked:
        if picture != question.picture:  # what was computed for another will not come again
            pipeline.prefix_cache.clear()
            picture = question.picture
        if place != (question.source, question.record):
            place = question.source, question.record
            example = sources[question.source][question.record]
        yield Asked(question.messages, example.images, example.video, max_new_tokens(question))


def max_new_tokens(question: Question) -> int:
    """Where an answer is cut off: by its kind, and room for twice as much as is true."""
    truth = question.truth
    places = sum(
        len(value)
        for name in ("points", "boxes", "masks", "frames", "tracks")
        if isinstance(value := truth.get(name), list)
    )
    return SCORERS[question.scorer].max_new_tokens + 24 * places


@contextlib.contextmanager
def frozen(pipeline: Pipeline) -> Iterator[None]:
    """The model in evaluation mode, and afterwards every part of it as it was."""
    modes = [(module, module.training) for module in pipeline.model.modules()]
    pipeline.model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---- files ----


def _write(folder: Path, report: Report, sources: Sequence[Source]) -> None:
    """report.json, table.md and the page; each whole or not at all."""
    with written(folder / "report.json") as temporary:
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    with written(folder / "table.md") as temporary:
        texts = [report.table(), LEGEND]
        if parts := report.part_table():
            texts += [parts, PART_LEGEND]
        temporary.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    with atomic_path(folder / PICTURES) as pictures:
        pictures.mkdir()
        failures = [failure_of(one, sources) for one in report.worst]
        sections = worst_answers(pictures, ", ".join(map(str, report.about["data"])), failures)
    page = html_page(
        name="data",
        title="Evaluation",
        about={name: value for name, value in report.about.items() if value is not None},
        table=html_rows(*report.cells()) + "\n</table><table>\n" + html_rows(*report.part_cells()),
        legend=f"{LEGEND}. Second table: {PART_LEGEND}",
        sections=sections,
    )
    with written(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def failure_of(one: Prediction, sources: Sequence[Source]) -> Failure:
    """An answer with its example, as it is drawn on a page."""
    question = one.question
    truth = {**question.truth, "answer": question.reference or "the places in the picture"}
    branch = Branch([{"role": "user", "content": question.text}], question.task, truth)
    example = sources[question.source][question.record]
    return Failure(question.where, example, branch, one.answer, one.score)
