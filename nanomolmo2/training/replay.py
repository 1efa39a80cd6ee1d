"""What a model already knows, while it learns something else.

A model's processor names the built-in sources that the model learned from
(`ProcessorConfig.trained_on`, which its card shows). Of those a run does two things:

    replay    a share of the examples drawn comes from them: `with_replay`
    report    a short exam of each before the first step and behind the last: `Abilities`

Only names in `data.registry.SOURCES` count, so what a stranger wrote into a card opens no file and
no address. Neither thing touches the person's own data: their fingerprints, their share of bad
examples and what their weights say of each other are as without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanomolmo2.config import read_json_object
from nanomolmo2.convert.pretrained import load, load_processor
from nanomolmo2.data.example import Example, Source
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.registry import SOURCES
from nanomolmo2.data.sources import SourceConfig, open_source
from nanomolmo2.evaluation import exam as exams
from nanomolmo2.evaluation.exam import BENCHMARKS
from nanomolmo2.files import atomic_path
from nanomolmo2.processor import Processor
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.run_folder import MODEL_FOLDER, Info

ABILITIES_FILE = "abilities.json"
TASK = "replay"  # of every replayed example: its loss is logged as loss_replay
NOTABLE = 0.1  # a score that fell by more is called forgotten


# ---- what is mixed in ----


class Replayed:
    """A source whose examples are about what a model knows already.

    Attributes:
        is_replay: its examples are not the person's data: the loader does not count them there.
    """

    is_replay = True

    def __init__(self, source: Source) -> None:
        self.source, self.name = source, f"{source.name} (replay)"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        example = self.source[i]
        branches = [dataclasses.replace(branch, task=TASK) for branch in example.branches]
        return dataclasses.replace(example, branches=branches)


def replayed_sources(recipe: Recipe, processor: Processor) -> list[str]:
    """Names of the sources that a run mixes in: of those that the start model learned from, the
    built-in ones that are not among the run's own data.
    """
    if not recipe.replay or recipe.architecture is not None:
        return []
    own = {config.registered for config in recipe.data}
    return [name for name in known_sources(processor) if name not in own]


def known_sources(processor: Processor) -> list[str]:
    """Which of the sources that a model was trained on are there."""
    return [name for name in dict.fromkeys(processor.config.trained_on) if name in SOURCES]


def with_replay(mixture: Mixture, recipe: Recipe, processor: Processor) -> Mixture:
    """The data of a run: its own, and the share of `Recipe.replay` of what the start model was
    trained on. Among each other the own sources keep their shares.
    """
    names = replayed_sources(recipe, processor)
    if not names:
        return mixture
    assert recipe.replay is not None
    shares = [(1 - recipe.replay) * weight for weight in mixture.weights]
    shares += [recipe.replay / len(names)] * len(names)
    configs = [SourceConfig(n, options=SOURCES[n].for_replay().to_dict()) for n in names]
    replayed = [Replayed(open_source(config)) for config in configs]
    return Mixture([*mixture.sources, *replayed], shares, mixture.seed)


def with_sources_of(recipe: Recipe, processor: Processor) -> Processor:
    """The processor of a trained model: it names the built-in sources that the run learned from."""
    before = () if recipe.architecture is not None else processor.config.trained_on
    learned = [config.registered for config in recipe.data if config.registered]
    names = tuple(dict.fromkeys((*before, *learned)))
    if names == processor.config.trained_on:
        return processor
    return processor.with_settings(trained_on=names)


def replay_note(recipe: Recipe, processor: Processor) -> str:
    """A sentence on what is mixed in, or on why nothing is; empty where nobody would miss it."""
    if recipe.replay is None or recipe.architecture is not None:
        return ""
    model, names = recipe.model, replayed_sources(recipe, processor)
    if names:
        return (
            f"mixing in {recipe.replay:.0%} of what {model} was trained on ({', '.join(names)}), "
            f"so that it keeps what it knows; --replay 0 turns it off"
        )
    unknown = [name for name in processor.config.trained_on if name not in SOURCES]
    if not recipe.replay:
        return f"nothing of what {model} was trained on is mixed in: it may forget what it knows"
    if unknown:
        return (
            f"nothing of what {model} was trained on is mixed in: its card names "
            f"{', '.join(unknown[:5])}, and only built-in sources can be mixed in "
            f"({', '.join(SOURCES)})"
        )
    if processor.config.trained_on:
        return ""  # the own data are of that kind
    return f"the card of {model} does not say what it was trained on: nothing of that is mixed in"


# ---- the report ----


@dataclass
class Abilities:
    """How well a model does what it could do before a run, before and after; kept in the run's
    folder, so that a run that is resumed asks the start model only once.

    Attributes:
        before, after: benchmark -> row -> mean score, 0 to 1.
        questions: benchmark -> how many were asked.
        steps: of the run, when ``after`` was measured.
    """

    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    questions: dict[str, int] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def load(cls, folder: Path) -> Abilities | None:
        """What a run's folder holds; None where it holds nothing, or nothing readable."""
        try:
            found = cls(**read_json_object(folder / ABILITIES_FILE))
            return found if found.before and found.table() is not None else None
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None  # it is asked again

    def save(self, folder: Path) -> None:
        with atomic_path(folder / ABILITIES_FILE) as temporary:
            text = json.dumps(dataclasses.asdict(self), indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")

    def forgotten(self, benchmark: str) -> list[str]:
        """Rows whose score fell by more than `NOTABLE`."""
        after = self.after.get(benchmark, {})
        return [
            row
            for row, value in self.before[benchmark].items()
            if row in after and value - after[row] > NOTABLE
        ]

    def table(self) -> list[str]:
        """Lines for people: a head and a row for each score of every benchmark."""
        lines = []
        for name, before in self.before.items():
            after, benchmark = self.after.get(name, {}), BENCHMARKS[name]
            titles = {row: benchmark.rows[row].title for row in before if row in after}
            width = max(map(len, titles.values()), default=0)
            head = f"what it could do before ({name}, {self.questions[name]} questions)"
            lines.append(f"{head}: before -> after")
            lost = self.forgotten(name)
            lines += [
                f"  {title:<{width}}  {before[row]:.2f} -> {after[row]:.2f}"
                + ("  forgotten" if row in lost else "")
                for row, title in titles.items()
            ]
        return lines

    def verdict(self, replays: bool) -> str:
        """A sentence on what was lost."""
        lost = {name: self.forgotten(name) for name in self.before}
        rows = [BENCHMARKS[name].rows[row].title for name in lost for row in lost[name]]
        if not rows:
            return "it kept what it could do before"
        remedy = "a larger --replay share, a lower --lr" if replays else "--replay 0.3"
        return f"it forgot some of what it could do before: {', '.join(rows)}; try {remedy}"


def start_abilities(
    recipe: Recipe, folder: Path, cache_dir: str | Path, info: Info, device: torch.device
) -> Abilities | None:
    """How well the start model of a run does what it was trained on, asked once a run.

    Returns: None where the recipe wants no report, or nothing is known that could be asked.
    """
    if recipe.replay is None or recipe.architecture is not None or recipe.model == "base":
        return None
    if (found := Abilities.load(folder)) is not None:
        return found
    if not (names := _asked(load_processor(recipe.model))):
        return None
    info(f"asking {recipe.model} what it can do before ({', '.join(names)})")
    scores, questions = measure(recipe.model, cache_dir, device=device)
    found = Abilities(before=scores, questions=questions)
    found.save(folder)
    return found


def report_abilities(
    abilities: Abilities, recipe: Recipe, out: Path, info: Info, device: torch.device
) -> None:
    """Ask the finished model of a run the same, as it was written, and say what became of it.

    It is asked once for a length of the run.
    """
    if not abilities.after or abilities.steps != recipe.steps:
        model, names = str(out / MODEL_FOLDER), list(abilities.before)
        abilities.after, _ = measure(model, names=names, device=device)
        abilities.steps = recipe.steps
        abilities.save(out)
    for line in (*abilities.table(), abilities.verdict(bool(recipe.replay))):
        info(line)


def measure(
    model: str,
    cache_dir: str | Path = "checkpoints",
    names: Sequence[str] | None = None,
    device: torch.device | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """(scores by benchmark and row, numbers of questions) of a model's short exams. No random
    number that a training draws from is taken.

    Args:
        names: of benchmarks; None = those of what the model was trained on.
        device: of the run; None = the best there is.
    """
    scores: dict[str, dict[str, float]] = {}
    questions: dict[str, int] = {}
    with _random_states_kept():
        net, processor = load(model, cache_dir=cache_dir, dtype=torch.float32, device=device)
        for name in _asked(processor) if names is None else names:
            benchmark = BENCHMARKS[name]
            assert benchmark.make_short_exam is not None
            exam = benchmark.make_short_exam()
            means = exams.evaluate(net, processor, exam).means
            scores[name] = {row: means[row] for row in benchmark.short_rows if row in means}
            questions[name] = sum(not one.probe for one in exam.asked)
    return scores, questions


def _asked(processor: Processor) -> list[str]:
    """The benchmarks of what a model was trained on that have a short exam."""
    return [
        name
        for name in known_sources(processor)
        if name in BENCHMARKS and BENCHMARKS[name].make_short_exam is not None
    ]


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    states: Mapping[str, Any] = {"numpy": np.random.get_state(), "python": random.getstate()}
    with torch.random.fork_rng(devices=[]):  # greedy answers draw from no GPU's
        try:
            yield
        finally:
            np.random.set_state(states["numpy"])
            random.setstate(states["python"])
