"""An exam: questions of a benchmark, a model's answers to them, and what the answers are worth.

    benchmark.make_exam(...) -> answer_all(model, processor, exam) -> score(exam) -> Scores

Nothing here knows what is asked: a `Benchmark` says how answers are scored, by task, and which rows
of its table they count for. Benchmarks are known by name, see `BENCHMARKS`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanomolmo2.data.example import Branch, Example
from nanomolmo2.evaluation.intervals import bootstrap_interval
from nanomolmo2.evaluation.questions import shown_in as shown_in
from nanomolmo2.evaluation.scorers import Scorer, Shown
from nanomolmo2.generation.answer import in_coordinates
from nanomolmo2.generation.generate import generate_encoded
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor.chat import Message
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.processor import Encoded, Processor
from nanomolmo2.registry import Registry


@dataclass(frozen=True)
class Row:
    """A line of the table: its name for people, and the score to reach for some of the groups."""

    title: str
    goals: Mapping[str, float] = field(default_factory=dict)

    def goal(self, group: str) -> float | None:
        return self.goals.get(group)


@dataclass(frozen=True)
class Benchmark:
    """How answers are scored and reported.

    Attributes:
        title: for the head of a report.
        groups: of test sets, such as art groups.
        rows: what is reported, in this order.
        scorers: score of an answer by task, in the order of a report.
        rows_of_answer: the rows that one answer counts for, of its branch, text and score.
        rows_of_example: further rows, of all answers about one example.
        make_exam: the questions of a test set.
        max_new_tokens: where answers to a task are cut off; to other tasks after
            ``default_max_new_tokens``.
        make_short_exam: some questions of each main kind, seconds to answer: what a fine-tuning
            asks before and after. None: there are none.
        short_rows: what is reported of them; more is better in all.
    """

    name: str
    title: str
    groups: tuple[str, ...]
    rows: Mapping[str, Row]
    scorers: Mapping[str, Scorer]
    rows_of_answer: Callable[[Branch, str, float], dict[str, float]]
    rows_of_example: Callable[[Sequence[Asked]], dict[str, float]]
    make_exam: Callable[..., Exam]
    max_new_tokens: Mapping[str, int] = field(default_factory=dict)
    default_max_new_tokens: int = 96
    make_short_exam: Callable[[], Exam] | None = None
    short_rows: tuple[str, ...] = ()

    def limit(self, task: str) -> int:
        """Most tokens of an answer to a task."""
        return self.max_new_tokens.get(task, self.default_max_new_tokens)

    def score(self, branch: Branch, answer: str, shown: Shown) -> float:
        """Score of an answer, 0 to 1."""
        return self.scorers[branch.task](branch.truth, answer.strip(), shown)


BENCHMARKS: Registry[Benchmark] = Registry(emoji="nanomolmo2.emoji.exam:EMOJI")


@dataclass
class Asked:
    """A question about one example of a test set, and what the model said."""

    example: int
    branch: Branch
    answer: str = ""
    probe: bool = False  # asked only to see whether the answer depends on the noun


@dataclass
class Exam:
    """Test examples of one group, and all that is asked about them.

    Attributes:
        names: of the examples, such as ``"scene 12"``: kind and number in the fixed set.
    """

    benchmark: Benchmark
    group: str
    examples: list[Example] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)


@dataclass(frozen=True)
class Failure:
    """An answer that is not all right: ``score`` is below 1."""

    name: str
    example: Example
    branch: Branch
    answer: str
    score: float


@dataclass
class Scores:
    """Scores of one group by row of a benchmark.

    Attributes:
        means: mean scores. counts: how many answers each rests on.
        intervals: 95 % intervals of the means, see `bootstrap_interval`.
        failures: some of the worst answers, by task.
    """

    group: str
    means: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


def evaluate(
    model: NanoMolmo2,
    processor: Processor,
    exam: Exam,
    *,
    batch_size: int = 64,
    failures: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Answer the questions of an exam, greedy, and score the answers.

    Args:
        failures: how many bad answers to return, shared out among the tasks, the worst first.
        on_progress: called with (answers so far, all answers).
    """
    model.eval()
    answer_all(model, processor, exam, batch_size, on_progress)
    return score(exam, failures)


# ---- answers ----


@torch.no_grad()
def answer_all(
    model: NanoMolmo2,
    processor: Processor,
    exam: Exam,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill in the answers. Questions of one kind share a batch.

    Every image and frame is encoded once, unless the processor cuts images into crops, or the model
    points by selecting what it sees.
    """
    visual = None
    if processor.config.multicrop is None and processor.config.points is None:
        visual = _encode_examples(model, processor, exam.examples, batch_size)
    tasks = list(exam.benchmark.scorers)
    order = sorted(exam.asked, key=lambda one: tasks.index(one.branch.task))
    done = 0
    for rows in _batches(order, batch_size, exam.benchmark.limit):
        limits = [exam.benchmark.limit(row.branch.task) for row in rows]
        blank = visual is not None
        encoded = [_encode_question(processor, exam, row, blank=blank) for row in rows]
        known = [visual[row.example] for row in rows] if visual else None
        answers = _answers(model, processor, encoded, max(limits), known)
        for row, prompt, new, limit in zip(rows, encoded, answers, limits, strict=True):
            row.answer = in_coordinates(processor.decode(new[:limit]), prompt.point_space)
        done += len(rows)
        if on_progress is not None:
            on_progress(done, len(order))


def _answers(
    model: NanoMolmo2,
    processor: Processor,
    encoded: Sequence[Encoded],
    max_new_tokens: int,
    visual: Sequence[Tensor] | None,
) -> list[list[int]]:
    """The new ids for each prompt. ``visual``: of each, where they are known."""
    # A batch this large has nothing to gain from guesses.
    if processor.config.points is not None:
        return generate_encoded(model, encoded, max_new_tokens=max_new_tokens, lookup=False)
    device = next(model.parameters()).device
    batch = collate(encoded, processor.pad_token_id, padding_side="left").to(device)
    ids = model.generate(
        batch.input_ids,
        batch.pixel_values,
        attention_mask=batch.attention_mask,
        visual_tokens=None if visual is None else torch.cat(list(visual)),
        image_token_pooling=batch.image_token_pooling,
        max_new_tokens=max_new_tokens,
        lookup=False,
    )
    answers: list[list[int]] = ids[:, batch.input_ids.shape[1] :].tolist()
    return answers


def _batches(
    asked: Sequence[Asked], batch_size: int, limit: Callable[[str], int]
) -> Iterator[list[Asked]]:
    """Runs of questions, sorted by task; those with a limit of their own are not mixed."""
    batch: list[Asked] = []
    for one in asked:
        limits = {limit(row.branch.task) for row in (*batch[:1], one)}
        if len(batch) == batch_size or len(limits) > 1:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _encode_examples(
    model: NanoMolmo2, processor: Processor, examples: Sequence[Example], batch_size: int
) -> list[Tensor]:
    """Visual tokens (m, n, D) of every example of m images or frames."""
    weight = model.vision_encoder.patch_embedding.weight
    question: list[Message] = [{"role": "user", "content": "?"}]
    visual: list[Tensor] = []
    for start in range(0, len(examples), batch_size):
        encoded = [
            processor.encode(question, example.images, video=example.video)
            for example in examples[start : start + batch_size]
        ]
        pixels = [torch.from_numpy(e.pixel_values).to(weight) for e in encoded]
        numbers = [len(own) for own in pixels]
        tokens = [model.encode_images(part) for part in torch.cat(pixels).split(batch_size)]
        visual += torch.cat(tokens).split(numbers)
    return visual


def _encode_question(
    processor: Processor, exam: Exam, asked: Asked, *, blank: bool = False
) -> Encoded:
    """A prompt; with ``blank`` without its images, which are known to be encoded already."""
    example = exam.examples[asked.example]
    images = example.images
    if blank:  # without crops all images stand in the prompt alike: nothing is resized for it
        side = processor.config.image_size
        images = [np.broadcast_to(np.float32(0), (3, side, side))] * len(images)
    encoded = processor.encode(asked.branch.messages[:1], images, video=example.video)
    return dataclasses.replace(encoded, pixel_values=None) if blank else encoded


# ---- scores ----


def score(exam: Exam, failures: int = 0) -> Scores:
    """Score the answers of one art group; keep some of the worst, see `evaluate`."""
    benchmark = exam.benchmark
    rows: dict[str, list[tuple[float, int]]] = defaultdict(list)  # values and their examples
    by_example: dict[int, list[Asked]] = defaultdict(list)
    bad: dict[str, list[Failure]] = defaultdict(list)
    for one in exam.asked:
        by_example[one.example].append(one)
        if one.probe:
            continue
        example = exam.examples[one.example]
        shown = shown_in(example)
        value = benchmark.score(one.branch, one.answer, shown)
        for name, points in benchmark.rows_of_answer(one.branch, one.answer, value).items():
            rows[name].append((points, one.example))
        if failures and value < 1:
            name = exam.names[one.example]
            bad[one.branch.task].append(Failure(name, example, one.branch, one.answer, value))
    for number, answers in by_example.items():
        for name, value in benchmark.rows_of_example(answers).items():
            rows[name].append((value, number))
    scores = Scores(exam.group, failures=_share_out(bad, failures, list(benchmark.scorers)))
    for name in benchmark.rows:
        if rows[name]:
            values, numbers = zip(*rows[name], strict=True)
            scores.means[name] = float(np.mean(values))
            scores.counts[name] = len(values)
            scores.intervals[name] = bootstrap_interval(values, numbers)
    return scores


def _share_out(bad: dict[str, list[Failure]], number: int, tasks: Sequence[str]) -> list[Failure]:
    """The worst of every task in turn, then the second worst, ...; returned by task."""
    ranked = {
        task: sorted(bad[task], key=lambda failure: failure.score)  # stable: in order of the set
        for task in tasks
        if task in bad
    }
    taken = dict.fromkeys(ranked, 0)
    while sum(taken.values()) < number and any(taken[t] < len(ranked[t]) for t in ranked):
        for task, failures in ranked.items():
            if taken[task] < len(failures) and sum(taken.values()) < number:
                taken[task] += 1
    return [failure for task, count in taken.items() for failure in ranked[task][:count]]
