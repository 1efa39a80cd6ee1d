"""What each idea in the recipe of finding is worth: short runs, each without one of them.

Every run has the steps, the number of pictures and the seed of the baseline, begins with the same
weights, and is asked about the same pictures of the fixed sets, a click each. The bundled `tiny`
has learned all of it: give one that has not (`train tiny` makes it, and so does the repository's
history). The budget is small, so differences are of how fast something is learned, not of where it
ends; one that is smaller than the intervals beside it has not been shown.


    python -m benchmarks.finding --drawings DRAWINGS --start DIR    # goes on where it stopped
    python -m benchmarks.finding --runs baseline no-crops           # these only
    python -m benchmarks.finding --page docs/find.md                # into the page, between marks
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import write_json
from benchmarks.report import put_into
from nanomolmo2.evaluation import breakdown
from nanomolmo2.evaluation.finding import click, outcomes, summarize, written
from nanomolmo2.evaluation.report import markdown_table
from nanomolmo2.generation.vlm import VLM
from nanomolmo2.things.find_model import CROPS, FindModel
from nanomolmo2.things.find_sets import open_set
from nanomolmo2.things.find_stage import FindPlan, FindStage
from nanomolmo2.things.settings import ThingScene
from nanomolmo2.things.source import ThingsConfig
from nanomolmo2.things.train import ANSWERS, SMALL, with_drawings
from nanomolmo2.training.loop import LoopConfig, run

SEED = 0
RUN, RESULT = "run", "result.json"
FIGURES = {"f1": "point F1", "exact": "exact"}


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        steps: of a run.
        pictures: of each set that is asked about.
        sets: which.
        small: steps of two pictures, to see whether it runs.
    """

    steps: int = 300
    pictures: int = 60
    sets: tuple[str, ...] = ("few", "alike", "crowded", "photos")
    small: bool = False


SHORT = Budget(steps=2, pictures=1, sets=("few",), small=True)


@dataclass(frozen=True)
class Variant:
    """A run that differs from the baseline in one thing.

    Attributes:
        scene: how its scenes of training look, made of the recipe's.
        max_crops: most tiles of a picture, in training and when it is asked.
        contrast: weight of what is told apart in all pictures of a step.
        written: it learns to write lists, token by token, and is asked to.
    """

    title: str
    scene: Callable[[ThingScene], ThingScene] = lambda scene: scene
    max_crops: int = CROPS.max_crops
    contrast: float = SMALL.contrast
    written: bool = False


VARIANTS: dict[str, Variant] = {
    "baseline": Variant("the recipe, at this budget"),
    "no-look-alikes": Variant(
        "no look-alikes, no cousins among the others",
        lambda scene: replace(scene, alike=0.0, cousins=0.0),
    ),
    "drawings-only": Variant(
        "no procedural things, drawings only", lambda scene: replace(scene, made=0.0)
    ),
    "made-only": Variant(
        "no drawings, procedural things only", lambda scene: replace(scene, made=1.0)
    ),
    "no-crops": Variant("an overview and one tile, no further crops", max_crops=1),
    "no-contrast": Variant("nothing told apart in all pictures of a step", contrast=0.0),
    "written": Variant(
        "lists written token by token, nothing found at once", contrast=0.0, written=True
    ),
}


def plan_of(variant: Variant, budget: Budget, drawings: str) -> FindPlan:
    """The only stage of a run: the recipe's first."""
    plan = replace(
        SMALL,
        steps=budget.steps,
        source=source_of(SMALL.source, variant, drawings),
        max_crops=variant.max_crops,
        contrast=variant.contrast,
        scored=0,
    )
    if variant.written:
        rates = {"llm": ANSWERS.llm, "llm_matrix": ANSWERS.llm_matrix}
        plan = replace(plan, kinds="t", finder=0.0, keep=0, **rates)
    if budget.small:
        plan = replace(plan, pictures=2, keep=min(plan.keep, 2), capacity=60)
    return plan


def source_of(source: ThingsConfig, variant: Variant, drawings: str) -> ThingsConfig:
    found = with_drawings(source, drawings)
    return replace(found, scene=variant.scene(found.scene))


def learn(
    folder: Path, variant: Variant, budget: Budget, drawings: str, start: str, workers: int
) -> VLM:
    """Train a run, or go on with it."""
    config = LoopConfig(workers=workers, quiet=True)
    find = FindModel(SEED, start=start)
    find.start_from_tiny()
    crops = replace(CROPS, max_crops=variant.max_crops)
    find.processor = find.processor.with_settings(multicrop=crops)
    find.accelerate()
    stage = FindStage(find, SEED, plan_of(variant, budget, drawings))
    run(find, [stage], folder / RUN, config, resume=(folder / RUN).exists())
    return VLM(find.model.eval(), find.processor)


def ask(vlm: VLM, variant: Variant, budget: Budget) -> dict[str, Any]:
    """Figures of each set, see `breakdown.figures`."""

    def clicked(vlm: VLM, case: Any) -> Any:
        return click(vlm, case, variant.max_crops)

    found = {}
    for name in budget.sets:
        cases = open_set(name, budget.pictures)
        answers = list(outcomes(vlm, cases, written if variant.written else clicked))
        found[name] = summarize(name, variant.title, answers).figures
    return found


def measure(
    out: Path,
    names: Sequence[str],
    budget: Budget,
    drawings: str = "",
    start: str = "tiny",
    workers: int = 1,
) -> dict[str, Any]:
    """Results of the runs by name; what is in the folder is not done again."""
    results = {}
    for name in names:
        path = out / name / RESULT
        if not path.is_file():
            began = time.monotonic()
            (out / name).mkdir(parents=True, exist_ok=True)
            vlm = learn(out / name, VARIANTS[name], budget, drawings, start, workers)
            sets = ask(vlm, VARIANTS[name], budget)
            vlm.close()
            minutes = round((time.monotonic() - began) / 60, 1)
            write_json(path, {"run": name, "minutes": minutes, "sets": sets})
        results[name] = json.loads(path.read_text(encoding="utf-8"))
        print(f"{name}: {results[name]['minutes']} minutes", file=sys.stderr, flush=True)
    return results


def table(results: Mapping[str, Any]) -> str:
    """A line a run: F1 and exact counts of each set, with their intervals."""
    sets = list(next(iter(results.values()))["sets"])
    head = ["run", "", *(f"{name}: {title}" for name in sets for title in FIGURES.values())]
    lines = [
        [
            name,
            VARIANTS[name].title,
            *(breakdown.cell(result["sets"][s], figure) for s in sets for figure in FIGURES),
        ]
        for name, result in results.items()
    ]
    return markdown_table(head, lines, left=2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finding", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    add("--runs", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="RUN")
    add("--out", type=Path, default=Path("runs/find-ablations"), metavar="DIR")
    add("--drawings", default="", metavar="DIR", help="to train on; without it those of emoji")
    add("--start", default="tiny", metavar="DIR", help="a tiny that has not learned to find yet")
    add("--steps", type=int, default=Budget.steps, metavar="N", help="of each run")
    add("--pictures", type=int, default=Budget.pictures, metavar="N", help="of each set")
    add("--workers", type=int, default=1, metavar="N", help="processes that draw scenes")
    add("--short", action="store_true", help="two steps of each: does it work?")
    add("--page", type=Path, metavar="FILE", help="put the table between the marks of this page")
    given = parser.parse_args(arguments)
    budget = Budget(given.steps, given.pictures)
    budget = SHORT if given.short else budget
    found = table(
        measure(given.out, given.runs, budget, given.drawings, given.start, given.workers)
    )
    print(found)
    if given.page is not None:
        put_into(given.page, found)


if __name__ == "__main__":
    main()
