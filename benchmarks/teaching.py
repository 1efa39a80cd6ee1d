"""A word taught by one to three examples in another picture: which way of knowing it is the best?

    find       what is like the examples is found: what `nanomolmo2 teach` writes
    prompt     the model is told before the question what the word stands for
    embedding  the word has a row of the embedding, made of the visual tokens at the examples
    unknown    the word was not taught

    python -m benchmarks.teaching --model tiny --pictures 100

Pictures are pairs of the fixed test sets of `things` (held-out drawings): the first shows the
examples, the second is asked about, in the wordings that training never uses.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nanomolmo2.evaluation.intervals import bootstrap_interval
from nanomolmo2.evaluation.measures import Thing, matched
from nanomolmo2.evaluation.regions import Box
from nanomolmo2.evaluation.report import markdown_table
from nanomolmo2.evaluation.scorers import f1
from nanomolmo2.generation.answer import Answer
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.taught import ask_with_samples
from nanomolmo2.generation.words import Sample, Word, Words, picture_name
from nanomolmo2.things.source import test_scenes
from nanomolmo2.training.seen_words import seen_row, with_seen_word

NAME, NAMES = "walnut", "walnuts"
QUESTIONS = {"point": f"Point to the {NAMES}.", "count": f"How many {NAMES} are there?"}
SETS = ("few", "alike")


@dataclass(frozen=True)
class Case:
    """Where a thing was shown, and where it is in the picture that is asked about."""

    shown: Image.Image
    places: list[tuple[float, float]]
    asked: Image.Image
    things: list[Thing]


def cases(name: str, number: int) -> Iterator[Case]:
    """Those of a test set, one a pair of pictures."""
    for index in range(number):
        scenes, branches = test_scenes(index, name, pair=True)
        branch = next(branch for branch in branches if branch.task == "named")
        truth = branch.truth
        yield Case(
            Image.fromarray(scenes[0].image),
            [(x, y) for x, y, _ in truth["examples"]],
            Image.fromarray(scenes[1].image),
            [Thing(Box(*box)) for box in truth["boxes"]],
        )


Ask = Callable[[Case, str], Answer]


def ways(vlm: Pipeline) -> dict[str, Ask]:
    """How a question about a case is answered, by name."""

    def words_of(case: Case) -> tuple[Words, Word]:
        stream = io.BytesIO()
        case.shown.save(stream, "PNG")
        name = picture_name(stream.getvalue(), "png")
        word = Word(NAME, NAMES, tuple(Sample(name, x, y) for x, y in case.places))
        return Words({}, {}).with_word(word, {name: stream.getvalue()}), word

    def find(case: Case, question: str) -> Answer:
        vlm.words = words_of(case)[0]
        try:
            return vlm.ask(case.asked, question)
        finally:
            vlm.words = None

    def prompt(case: Case, question: str) -> Answer:
        words, word = words_of(case)
        return ask_with_samples(vlm, words, word, case.asked, question)

    some_row = torch.ones(vlm.model.config.llm_config.hidden_size)  # replaced at once
    copied = copy.deepcopy(vlm.model)
    with_word = Pipeline(*with_seen_word(copied, vlm.processor, NAME, some_row))

    def embedding(case: Case, question: str) -> Answer:
        row = seen_row(vlm.model, vlm.processor, case.shown, case.places)
        with_seen_word(with_word.model, with_word.processor, NAME, row)
        return with_word.ask(case.asked, question, reuse=False)

    def unknown(case: Case, question: str) -> Answer:
        return vlm.ask(case.asked, question)

    return {"find": find, "prompt": prompt, "embedding": embedding, "unknown": unknown}


def scores(ask: Ask, given: list[Case]) -> dict[str, list[float]]:
    """Point F1, exact counts and errors of one way, a number for each case."""
    found: dict[str, list[float]] = {"F1": [], "exact": [], "error": []}
    for case in given:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            points = ask(case, QUESTIONS["point"]).points
            count = ask(case, QUESTIONS["count"]).count
        own = [dataclasses.replace(point, image=1) for point in points]
        hits = matched(case.things, own)
        found["F1"].append(f1(hits, len(own), len(case.things)))
        found["exact"].append(float(count == len(case.things)))
        found["error"].append(float(abs((count or 0) - len(case.things))))
    return found


def table(vlm: Pipeline, number: int, sets: tuple[str, ...] = SETS) -> tuple[str, dict[str, Any]]:
    """The table, and its numbers."""
    lines, numbers = [], dict[str, Any]()
    for name in sets:
        given = list(cases(name, number))
        for way, ask in ways(vlm).items():
            found = scores(ask, given)
            cells, row = [name, way], dict[str, Any]()
            for measure, values in found.items():
                low, high = bootstrap_interval(values, list(range(len(values))))
                mean = float(np.mean(values))
                row[measure] = [mean, low, high]
                cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
            numbers[f"{name} {way}"] = row
            lines.append(cells)
            print(f"{name}, {way}: {cells[2:]}", file=sys.stderr)
    head = ["test set", "way", "point F1", "count exact", "mean absolute error"]
    return markdown_table(head, lines, left=2), numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="that can find (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=100, help="a set (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="test sets")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    given = parser.parse_args()
    text, numbers = table(Pipeline(given.model), given.pictures, tuple(given.sets))
    print(text)
    if given.out is not None:
        given.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
