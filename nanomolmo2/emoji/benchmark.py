"""The public benchmark: two settings of emoji scenes, three art groups, and what chance scores.

    exam = make_benchmark("crowded", "seen")
    answer_all(model, processor, exam, batch_size=64)  # or fill in every `Asked.answer` yourself
    print(leaderboard_row("my model", score(exam)))

Chance answers like the training data, without a look at the image: every answer is that to a
question of the same task about another scene, drawn at random. What a question itself gives away
is used: points get the noun that was asked for, and of two things to compare one is chosen.
"""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np

from nanomolmo2.data.example import Branch, Example
from nanomolmo2.emoji.exam import EMOJI, ROWS
from nanomolmo2.emoji.questions import EVERYTHING, NONE_ANSWER
from nanomolmo2.emoji.scenes import setting
from nanomolmo2.emoji.write import draw_example
from nanomolmo2.evaluation.exam import Asked, Exam, Scores

BENCHMARK_SETTINGS = ("easy", "crowded")
BENCHMARK_SCENES = 1000
# Rows of `ROWS` that the one number of the leaderboard is the mean of.
BENCHMARK_ROWS = (
    *("presence", "count", "number", "point_f1", "point_absent", "points", "everything"),
    *("caption_f1", "spatial", "size", "at", "unknown"),
)
SHOWN_ROWS = ("presence", "count", "count_many", "point_f1", "caption_f1", "spatial", "at")

CHANCE_STREAM = 6  # first word of the seeds of answers by chance
PRIOR_SCENES = 300  # training scenes that answers are drawn from
NOUN_TASKS = ("presence", "count", "number", "point", "unknown")  # one is asked like the other


def make_benchmark(
    name: str, group: str = "seen", scenes: int = BENCHMARK_SCENES, seed: int = 0
) -> Exam:
    """The first test scenes of a setting of `SETTINGS` and all questions about them.

    Raises: ValueError for an unknown setting or art group.
    """
    config = setting(name)
    exam = Exam(EMOJI, group)
    for i in range(scenes):
        scene, branches = draw_example(i, config, seed=seed, split="test", group=group)
        exam.examples.append(Example([scene.image], branches))
        exam.names.append(f"scene {i}")
        exam.asked += [Asked(i, branch) for branch in branches]
    return exam


def overall(scores: Scores) -> float:
    """The number that models are ranked by, 0 to 1: the mean of `BENCHMARK_ROWS`.

    Raises: ValueError where a row is missing: a few scenes need not have all kinds of questions.
    """
    if missing := [name for name in BENCHMARK_ROWS if name not in scores.means]:
        raise ValueError(f"no question of the rows {', '.join(missing)}: ask about more scenes")
    return float(np.mean([scores.means[name] for name in BENCHMARK_ROWS]))


def leaderboard_head() -> str:
    """The two first lines of the Markdown table."""
    titles = ["model", "art", "score", *(ROWS[name].title for name in SHOWN_ROWS)]
    return f"| {' | '.join(titles)} |\n|---|---|{'---|' * (1 + len(SHOWN_ROWS))}"


def leaderboard_row(model: str, scores: Scores) -> str:
    """A line of the Markdown table: the art group, `overall`, then some of the rows."""
    values = [overall(scores), *(scores.means[name] for name in SHOWN_ROWS)]
    return f"| {model} | {scores.group} | {' | '.join(f'{value:.3f}' for value in values)} |"


# ---- chance ----


class Prior:
    """Answers of the training scenes of a setting, by task."""

    def __init__(self, name: str, scenes: int = PRIOR_SCENES, seed: int = 0) -> None:
        config = setting(name)
        self._answers: dict[str, list[str]] = defaultdict(list)
        for i in range(scenes):
            for branch in draw_example(i, config, seed=seed)[1]:
                self._answers[_kind(branch)].append(branch.truth["answer"])

    def answer(self, branch: Branch, rng: np.random.Generator) -> str:
        """An answer to a question, drawn at random."""
        task, truth = branch.task, branch.truth
        if task == "size":
            return f"The {rng.choice(truth['nouns'])}."
        if task == "points" and _kind(branch) != EVERYTHING:
            found = [_label(self._draw(rng, "point"), noun) for noun in truth["nouns"]]
            return " ".join(a for a in found if a != NONE_ANSWER) or NONE_ANSWER
        if task == "unknown":  # who does not look cannot tell that the noun is unknown
            return self._draw(rng, *NOUN_TASKS)
        return _label(self._draw(rng, _kind(branch)), truth.get("noun") or EVERYTHING)

    def _draw(self, rng: np.random.Generator, *kinds: str) -> str:
        answers = [answer for kind in kinds for answer in self._answers[kind]]
        return answers[rng.integers(len(answers))]


def answer_by_chance(exam: Exam, prior: Prior, seed: int = 0) -> None:
    """Fill in the answers."""
    rng = np.random.default_rng([CHANCE_STREAM, seed])
    for one in exam.asked:
        one.answer = prior.answer(one.branch, rng)


def _kind(branch: Branch) -> str:
    """The task; pointing at everything is one of its own."""
    return EVERYTHING if branch.truth.get("nouns") == [EVERYTHING] else branch.task


def _label(answer: str, noun: str) -> str:
    """Points with another label; other answers as they are."""
    return re.sub(r'(">)[^<]*(</points>)', rf"\g<1>{noun}\g<2>", answer)
