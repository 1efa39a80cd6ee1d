"""Which way of writing points is learned from fewer answers: text coordinates, or grounding tokens?

Design. One start, then two runs a seed that differ in nothing but how points are written.

- Start, common: `tiny`'s shipped vision encoder and connector, both frozen from here on, and the
  shipped embeddings of its 64 nouns; a new decoder of four layers (6 M parameters in all). It
  learns presence ("dog?"), then presence, numbers and captions: no coordinates and no markers.
- Runs: 4 pointing questions about each of 4,000 new scenes (a quarter asks for what is not there),
  every scene once, 8 scenes a step. For a seed both ways see the same scenes and the same
  questions in the same order. AdamW at a constant 1e-3 (the rate of `tiny`'s own recipe where it
  first learns coordinates), 20 steps of warm-up, gradients clipped at 1, every label weighs 1.
- Text: Molmo2's html-v2, multiples of 50 of 1000, as `tiny` is taught: finer ones come later.
- Grounding: row, slot and cell of the exact centres, `consistent` rule, E = 64; its 113,737
  parameters start at random, learn at the same rate, and are the only ones that the other has not.
- Favours: the shipped encoder was once taught where centres are, for both: visual tokens hold the
  digits that text writes, patches the way to the centre that slots need. Nothing was tuned here.
- Evaluation after 1, 2, 4, 8 and 16 thousand answers: 200 scenes of the fixed test set, in wordings
  that training never uses, greedy: F1 inside boxes, "There are none.", and whether points move
  with the noun.

    python -m benchmarks.pointing                # all; goes on where it stopped
    python -m benchmarks.pointing --docs docs    # and writes JSON and chart for docs/points.md
    python -m benchmarks.pointing --plan longer  # from a start that knows more of the language
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, write_json
from benchmarks.pointing_train import PLANS, Plan, Pool, Run, Way, make_start, small_config
from benchmarks.report import put_into
from nanomolmo2.accelerate import defaults
from nanomolmo2.checks import written
from nanomolmo2.convert.pretrained import load
from nanomolmo2.emoji.exam import make_exam
from nanomolmo2.emoji.scenes import test_scene as render_test_scene
from nanomolmo2.evaluation.exam import Exam, score, shown_in
from nanomolmo2.generation.options import GenerateOptions
from nanomolmo2.generation.pipeline import Pipeline, Question
from nanomolmo2.models import NanoMolmo2, preset
from nanomolmo2.models.presets import POINT_LOCATION, POINT_PATCH, POINT_SUBPATCH
from nanomolmo2.processor import Processor
from nanomolmo2.processor.config import PointTokens
from nanomolmo2.training.plot import new_figure

SCORES = {
    "point_f1": "point F1, things that are there",
    "point_absent": "“There are none.”, things that are not",
    "on_things": "points that lie on anything at all",
    "same_point": "same points for two different nouns",
}
PLAN_HELP = "longer: a common start of more steps and questions; short: does the program work?"
DOCS_HELP = "also write pointing-PLAN.json and images/pointing-PLAN.png here, and points.md's table"
BATCH_SIZE = 64  # questions that are answered together
TITLES = {"text": "text coordinates", "grounding": "grounding tokens"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pointing", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--plan", choices=list(PLANS), default="usual", help=PLAN_HELP)
    add("--out", type=Path, metavar="DIR", help="runs and results (default: runs/pointing-PLAN)")
    add("--ways", nargs="+", choices=list(TITLES), default=list(TITLES), help="by default both")
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    add("--docs", type=Path, metavar="DIR", help=DOCS_HELP)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = arguments.out or Path("runs") / f"pointing-{arguments.plan}"
    results = learn(out, PLANS[arguments.plan], arguments.ways)
    print(table(results))
    if arguments.docs is not None:
        name = f"pointing-{arguments.plan}"
        write_json(arguments.docs / f"{name}.json", results)
        chart(results, arguments.docs / "images" / f"{name}.png")
        if arguments.plan == "usual":
            put_into(arguments.docs / "points.md", table(results))
    return 0


def learn(folder: Path, plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    """Do what is not done yet, and return all that was found.

    Raises: ValueError where the folder holds runs of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_plan(folder / "plan.json", plan)
    pool = Pool(folder, 2 * plan.scenes, note)
    if not (folder / "start.pt").exists():
        make_start(folder / "start.pt", pool, plan, note)
    ways = {name: make_way(name) for name in names}
    runs = [Run(folder, way, seed, plan) for seed in plan.seeds for way in ways.values()]
    for run in runs:
        run.train(pool, note)
    exam = make_exam("seen", plan.tests, tasks=("point",))
    scores = {run.name: [scores_of(run, answers, exam) for answers in plan.answers] for run in runs}
    seconds = folder / "seconds.json"
    if not seconds.exists():
        write_json(seconds, seconds_of(runs[: len(ways)], exam, plan))
    return {
        "machine": machine(),
        "plan": asdict(plan),
        "parameters": {run.way.name: parameters(run.model_at_start()) for run in runs},
        "runs": scores,
        "seconds": json.loads(seconds.read_text(encoding="utf-8")),
    }


def check_plan(path: Path, plan: Plan) -> None:
    """Runs of two plans are not to be mixed."""
    own = json.loads(json.dumps(asdict(plan)))
    if not path.exists():
        write_json(path, own)
    elif json.loads(path.read_text(encoding="utf-8")) != own:
        raise ValueError(f"{path.parent} holds runs of another plan: name another folder (--out)")


def make_way(name: str) -> Way:
    """The model's config and the processor of a way."""
    _, processor = load("tiny", device="cpu")
    config = small_config()
    if name == "text":
        return Way(name, config, processor, snap=50)
    base, vision = config.llm_config.vocab_size, config.vision_config
    offsets = (POINT_PATCH, POINT_SUBPATCH, POINT_LOCATION)
    names = [processor.tokenizer.backend.id_to_token(base + offset) for offset in offsets]
    points = PointTokens(
        *names,
        overview_token=None,
        points_in_prompt=True,
        patch_size=vision.patch_size,
        pooling_size=config.connector.pooling_size,
    )
    config = replace(
        config,
        llm_config=replace(config.llm_config, predict_additional_vocab=True),
        point_config=preset("tiny-point").point_config,
    )
    grounded = Processor(replace(processor.config, points=points), processor.tokenizer)
    return Way(name, config, grounded, snap=1)


def parameters(model: NanoMolmo2) -> int:
    return sum(p.numel() for p in model.parameters())


def scores_of(run: Run, answers: int, exam: Exam) -> dict[str, float]:
    """The rows of `SCORES` after so many answers; found once."""
    path = run.weights_path(answers).with_suffix(".json")
    if not path.exists():
        model = defaults(run.model_after(answers))
        answer_all(Pipeline(model, run.way.processor), exam, run.plan.max_new_tokens)
        found = {**score(exam).means, "on_things": on_things(exam)}
        means = {name: found[name] for name in SCORES if name in found}
        write_json(path, {"answers": answers, **means})
        note(f"{run.name}: {json.dumps(means)}")
    scores: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return scores


def answer_all(pipeline: Pipeline, exam: Exam, max_new_tokens: int) -> None:
    """Fill in the answers, greedy, as text coordinates whatever the model writes."""
    questions = (
        Question(str(one.branch.messages[0]["content"]), exam.examples[one.example].images)
        for one in exam.asked
    )
    options = GenerateOptions(max_new_tokens=max_new_tokens, lookup=False)
    answers = pipeline.ask_many(questions, batch_size=BATCH_SIZE, options=options)
    for one, answer in zip(exam.asked, answers, strict=True):
        if isinstance(answer, ValueError):
            raise answer
        one.answer = answer.coordinates


def on_things(exam: Exam) -> float:
    """Share of the points, of answers about what is there, that lie in the box of any object."""
    hits = total = 0
    for one in exam.asked:
        if one.branch.truth["count"] and not one.probe:
            boxes = [o.box for o in render_test_scene(one.example, exam.group).objects]
            points = shown_in(exam.examples[one.example]).points(one.answer)
            total += len(points)
            hits += sum(
                any(x0 <= p.x <= x1 and y0 <= p.y <= y1 for x0, y0, x1, y1 in boxes) for p in points
            )
    return hits / max(1, total)


def seconds_of(runs: Sequence[Run], exam: Exam, plan: Plan) -> dict[str, dict[str, list[float]]]:
    """Seconds, tokens and points of single answers, one after the other; the ways take turns.

    Every question is about a picture that was not seen before, for what is in it.
    """
    asked = [one for one in exam.asked if one.branch.truth["count"] and not one.probe]
    found: dict[str, dict[str, list[float]]] = {}
    pipelines = {
        run.way.name: Pipeline(defaults(run.model_after(plan.answers[-1])), run.way.processor)
        for run in runs
    }
    for one in [*asked[:1], *asked[: plan.timed]]:  # the first warms up
        image = exam.examples[one.example].images[0]
        question = str(one.branch.messages[0]["content"])
        for way, pipeline in pipelines.items():
            start = time.perf_counter()
            answer = pipeline.ask(image, question, reuse=False, max_new_tokens=plan.max_new_tokens)
            values = {
                "seconds": time.perf_counter() - start,
                "tokens": float(answer.output_tokens),
                "points": float(len(answer.points)),
            }
            for name, value in values.items():
                found.setdefault(way, {}).setdefault(name, []).append(value)
    return {way: {name: v[1:] for name, v in values.items()} for way, values in found.items()}


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ---- what is shown ----


def values_at(results: dict[str, Any], way: str, answers: int, name: str) -> list[float]:
    """A score of every seed after so many answers."""
    return [
        scores[name]
        for run, found in results["runs"].items()
        for scores in found
        if run.rpartition("-")[0] == way and scores["answers"] == answers and name in scores
    ]


def cell(values: Sequence[float]) -> str:
    """The mean, and the range over the seeds."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each number of answers, then the seconds of an answer."""
    ways = [way for way in TITLES if any(n.startswith(f"{way}-") for n in results["runs"])]
    parts = []
    for name, title in SCORES.items():
        lines = [f"| {title} | {' | '.join(TITLES[way] for way in ways)} |"]
        lines.append("|---|" + "---|" * len(ways))
        for answers in results["plan"]["answers"]:
            cells = [cell(values_at(results, way, answers, name)) for way in ways]
            lines.append(f"| {answers:,} answers | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    lines = [f"| one answer, one thread | {' | '.join(TITLES[way] for way in ways)} |"]
    lines.append("|---|" + "---|" * len(ways))
    for what, digits in (("seconds", 3), ("tokens", 1), ("points", 2)):
        found = [statistics.mean(results["seconds"][way][what]) for way in ways]
        lines.append(f"| {what} | {' | '.join(f'{value:.{digits}f}' for value in found)} |")
    return "\n\n".join([*parts, "\n".join(lines)])


def chart(results: dict[str, Any], path: Path) -> None:
    """A PNG: scores by the number of answers, the mean as a line, every seed as a dot.

    Raises: ImportError naming the extra.
    """
    shown = ("point_f1", "on_things", "same_point")
    figure = new_figure(13, 4)
    for name, axis in zip(shown, figure.subplots(1, len(shown)), strict=True):
        for way, title in TITLES.items():
            budgets = [a for a in results["plan"]["answers"] if values_at(results, way, a, name)]
            found = [values_at(results, way, answers, name) for answers in budgets]
            (line,) = axis.plot(budgets, [statistics.mean(v) for v in found], label=title)
            for answers, values in zip(budgets, found, strict=True):
                dots = [answers] * len(values)
                axis.plot(dots, values, "o", markersize=3, color=line.get_color())
        axis.set_title(SCORES[name], fontsize=10)
        axis.set_xscale("log", base=2)
        budgets = results["plan"]["answers"]
        axis.set_xticks(budgets, [f"{answers:,}" for answers in budgets], fontsize=8)
        axis.set_xlabel("pointing answers learned from", fontsize=8)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
