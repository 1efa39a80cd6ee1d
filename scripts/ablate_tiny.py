"""What each idea in the recipe of `tiny` is worth: short runs, each without one of them.

    python scripts/ablate_tiny.py --vision runs/tiny --out runs/ablations --page docs/ablations.md

    decoder    presence and coarse again, from the vision of a finished scenes stage; every run has
               the same steps, pictures and seed as the baseline, and is asked about the same scenes
    optimiser  the crops stage from nothing, with Muon and with AdamW
    cost       the same questions in other batches: seconds a step, at the same loss

Each run has a folder with its settings and its log. A line of OUT/results.jsonl is a finished run;
those are skipped, and one that was stopped goes on, when the same command is given again.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, without install

import torch
import tyro
from torch import Tensor

from benchmarks.harness import take_turns
from benchmarks.report import put_into
from nanomolmo2.batch import Batch
from nanomolmo2.checks import sha256_of
from nanomolmo2.config import read_json_object
from nanomolmo2.data.packing import Packer, Waiting, join
from nanomolmo2.emoji import plans
from nanomolmo2.emoji.exam import ExamPlan, evaluate
from nanomolmo2.emoji.model import CONFIG, SCENES, WORD_DIRECTION, TinyForTraining
from nanomolmo2.emoji.question_stage import QuestionStage
from nanomolmo2.emoji.questions import BranchMix, make_branches
from nanomolmo2.emoji.scenes import SceneConfig, train_rng
from nanomolmo2.emoji.sprites import STYLE_GROUPS
from nanomolmo2.emoji.train import has_compiler, run_stages
from nanomolmo2.emoji.vision_stages import CROP_RATES, CropStage, render_scenes
from nanomolmo2.evaluation.exam import Scores
from nanomolmo2.files import atomic_path
from nanomolmo2.processor import Encoded, collate
from nanomolmo2.training.checkpoint import ABOUT, FILE, FOLDER
from nanomolmo2.training.loop import LoopConfig, Stage
from nanomolmo2.training.metrics import read_log
from nanomolmo2.training.optim import OptimConfig

RESULTS, SETTINGS = "results.jsonl", "settings.json"
STAGES = [field.name for field in fields(plans.Scale)]
# By number, and whether nouns hold `WORD_DIRECTION`, which the presence stage begins by adding.
# Presence leaves vision as it is; settle is vision alone.
VISION_STAGES = {STAGES.index(name): name != "scenes" for name in ("scenes", "presence", "settle")}
TASKS = ("presence", "count", "point")  # asked of the decoder runs
LEARNED, LEARNED_STEPS = "learned", 20  # last steps of the presence stage, all new pictures
TOKENS_AN_ANSWER = 3  # yes or no, and two that are always the same
COLUMNS = {
    LEARNED: "yes and no, at the end of its presence stage",
    "presence": "presence",
    "count_many": "count, two or more",
    "point_f1": "point F1",
    "blind": "blindness",
}
TEST_CROPS = 8  # batches that no step has learned from
QUESTIONS_A_BATCH = 32  # of rows with one question each
ROW_TOKENS, ROWS_A_BATCH = 1024, 4  # of packed rows


@dataclass(frozen=True)
class Options:
    """Short runs of tiny's recipe, each without one of its ideas.

    Attributes:
        out: folder of the results and of all runs.
        vision: a run of `nanomolmo2 train tiny` behind its scenes stage, or one checkpoint of it;
            only the decoder runs need it.
        scale: of that run; pictures are drawn, and asked about, as it had them.
        only: names of the runs to do; all if none are given.
        seed: of all runs.
        presence_steps: of the decoder runs.
        coarse_steps: of the decoder runs, behind those; with 0 they are not asked about scenes, and
            all that is measured is what the presence stage learned.
        pictures: a step of the decoder and cost runs.
        scenes: of the test set "seen" that the decoder runs are asked about.
        crop_steps: of the optimiser runs.
        crops: a step of the optimiser runs.
        rounds: of the cost runs, after one to warm up.
        compiled: whether the decoder's blocks are compiled where there is a compiler, as in the
            recipe; by default they are.
        workers: processes that prepare data; 0 = none.
        page: a page that the table is put into, between its marks.
        quiet: no progress bars.
    """

    out: Path
    vision: Path | None = None
    scale: Literal["full", "small", "smoke"] = "full"
    only: tuple[str, ...] = ()
    seed: int = 0
    presence_steps: int = 100
    coarse_steps: int = 100
    pictures: int = 16
    scenes: int = 200
    crop_steps: int = 300
    crops: int = 64
    rounds: int = 5
    compiled: bool = True
    workers: int = 1
    page: Path | None = None
    quiet: bool = False

    def loop(self) -> LoopConfig:
        """How runs are carried out."""
        return LoopConfig(
            log_every=1, save_every=50, keep=1, workers=self.workers, quiet=self.quiet
        )


# ---- decoder: presence and coarse on given vision ----


@dataclass(frozen=True)
class Ablation:
    """What a run of the decoder does, by default all as the recipe.

    Attributes:
        title: for the table.
        aligned: nouns keep the embeddings that the visual tokens were trained to point along.
        queries_as_keys: queries start as keys.
        image_mask: visual tokens see each other in both directions.
        presence: questions of the presence stage.
        snap: thousandths that points are rounded to in the coarse stage.
    """

    title: str
    aligned: bool = True
    queries_as_keys: bool = True
    image_mask: bool = True
    presence: BranchMix = plans.PRESENCE.mix
    snap: int = plans.COARSE.snap

    def start(self, seed: int, scenes: SceneConfig = SCENES) -> TinyForTraining:
        """Model and heads at the start of the presence stage, but for the vision."""
        config = replace(CONFIG, bidirectional_image_attention=self.image_mask)
        kind = TinyForTraining if self.aligned else Unaligned
        return kind(seed, config, scenes, queries_as_keys=self.queries_as_keys)

    def stages(self, tiny: TinyForTraining, options: Options) -> list[Stage]:
        """The presence and the coarse stage."""
        presence = replace(plans.PRESENCE, mix=self.presence)
        coarse = replace(plans.COARSE, snap=self.snap)
        steps = (options.presence_steps, options.coarse_steps)
        return [
            QuestionStage(tiny, options.seed, n, plan, options.pictures)
            for n, plan in zip(steps, (presence, coarse), strict=True)
        ]


class Unaligned(TinyForTraining):
    """Nouns are drawn anew; visual tokens point along the embeddings of before."""

    def set_nouns(self, rows: Tensor) -> None:
        self.before = rows
        generator = torch.Generator().manual_seed(2)
        super().set_nouns(0.1 * torch.randn(rows.shape, generator=generator))

    def visual_targets(self) -> Tensor:
        return self.before


DECODER = {
    "baseline": Ablation("the recipe"),
    "alignment": Ablation("visual tokens not aligned with words", aligned=False),
    "presence": Ablation("no presence stage: coarse's questions there", presence=plans.COARSE.mix),
    "branches": Ablation(
        "two presence questions a picture", presence=replace(plans.PRESENCE.mix, presence=2)
    ),
    "matcher": Ablation("queries do not start as keys", queries_as_keys=False),
    "snapping": Ablation("coarse points in thousandths, not on a grid", snap=1),
    "mask": Ablation("visual tokens see only those before them", image_mask=False),
}


def find_vision(folder: Path) -> Path:
    """The newest checkpoint of a run that has the vision of the scenes stage, or the one given.

    Reads only, so that the run may still be going on.
    Raises: ValueError if there is none, or it is damaged.
    """
    own = folder / FOLDER
    found = [folder] if (folder / ABOUT).exists() else sorted(own.glob("[0-9]*"), reverse=True)
    for checkpoint in found:
        about = read_json_object(checkpoint / ABOUT)
        if about["stage"] in VISION_STAGES:
            if sha256_of(checkpoint / FILE) != about["sha256"][FILE]:
                raise ValueError(f"{checkpoint / FILE} is not as it was written: take another")
            return checkpoint
    raise ValueError(
        f"{folder} has no checkpoint of the scenes, the presence or the settle stage: a run keeps "
        f"its newest only, so copy one aside while it is in them, and give the copy"
    )


def load_vision(tiny: TinyForTraining, checkpoint: Path) -> None:
    """Take all but the decoder from a checkpoint, and the nouns that its visual tokens point along.

    Raises: ValueError if it is of a model of another shape.
    """
    values = torch.load(checkpoint / FILE, weights_only=True, map_location="cpu")["weights"]
    nouns = values["model.llm.embed_tokens.weight"][tiny.noun_ids]
    if VISION_STAGES[read_json_object(checkpoint / ABOUT)["stage"]]:
        nouns = nouns - WORD_DIRECTION * tiny.words_direction()
    tiny.set_nouns(nouns)
    decoder = "model.llm."
    vision = {name: value for name, value in values.items() if not name.startswith(decoder)}
    missing, unexpected = tiny.load_state_dict(vision, strict=False)
    if wrong := unexpected + [name for name in missing if not name.startswith(decoder)]:
        raise ValueError(f"{checkpoint} has another shape of model: {wrong[0]} does not fit")


def run_decoder(name: str, options: Options, folder: Path) -> dict[str, Any]:
    """What the presence stage learned, and scores behind the coarse stage."""
    ablation = DECODER[name]
    look = plans.SCALES[options.scale].look
    tiny = ablation.start(options.seed, look)
    assert options.vision is not None
    load_vision(tiny, find_vision(options.vision))
    if options.compiled and has_compiler():
        tiny.compile_decoder()
    run_stages(tiny, ablation.stages(tiny, options), folder, options.loop(), resume=True)
    learned = {}
    if ablation.presence.bare == 1:  # else other questions were asked
        learned[LEARNED] = answers_right(folder)
    if not options.coarse_steps:
        return {"scores": learned, "counts": {}, "intervals": {}}
    scores: Scores = evaluate(
        tiny.model,
        tiny.processor,
        ExamPlan(
            scenes=options.scenes,
            pairs=0,
            clips=0,
            styles=[style for style in STYLE_GROUPS["seen"] if style in look.styles],
            tasks=TASKS,
        ),
    )
    return {
        "scores": learned | scores.means,
        "counts": scores.counts,
        "intervals": scores.intervals,
    }


def answers_right(folder: Path) -> float:
    """Share of yes and no right in the last steps of a run's presence stage."""
    steps = [line for line in read_log(folder) if line["stage"] == plans.PRESENCE.name]
    tokens = [line["token_accuracy_s"] for line in steps if "loss" in line][-LEARNED_STEPS:]
    return 1 - TOKENS_AN_ANSWER * (1 - statistics.mean(tokens))


# ---- optimiser: the crops stage ----

OPTIMISERS = {
    "muon": CROP_RATES,
    # Its best rate is not Muon's, so it gets several.
    "adamw-5e-4": replace(CROP_RATES, lr=5e-4, matrix_lr=0.0),
    "adamw-1e-3": replace(CROP_RATES, lr=1e-3, matrix_lr=0.0),
    "adamw-2e-3": replace(CROP_RATES, lr=2e-3, matrix_lr=0.0),
}


def optimiser_title(rates: OptimConfig) -> str:
    """For the table."""
    if rates.matrix_lr:
        return f"Muon at {rates.matrix_lr:g}, AdamW at {rates.lr:g} for the rest"
    return f"AdamW at {rates.lr:g}"


def crop_stage(name: str, tiny: TinyForTraining, options: Options) -> CropStage:
    """The crops stage of a run."""
    rates = OPTIMISERS[name]
    return CropStage(tiny, options.seed, options.crop_steps, options.crops, rates)


@torch.no_grad()
def run_optimiser(name: str, options: Options, folder: Path) -> dict[str, Any]:
    """Accuracy on the crops of steps that were not taken."""
    tiny = TinyForTraining(options.seed)
    stage = crop_stage(name, tiny, options)
    with torch.enable_grad():
        run_stages(tiny, [stage], folder, options.loop(), resume=True)
    tiny.eval()
    test = range(options.crop_steps, options.crop_steps + TEST_CROPS)
    accuracies = [stage.loss(stage.batch(step))[1]["accuracy"] for step in test]
    return {"accuracy": statistics.mean(accuracies), "crops": TEST_CROPS * options.crops}


# ---- cost: the same questions, laid out otherwise ----


@dataclass(frozen=True)
class Layouts:
    """Two ways to learn the same answers: batches whose gradients are summed."""

    sides: dict[str, list[Batch]]
    steps: int
    questions: int


def tree_layouts(tiny: TinyForTraining, options: Options) -> Layouts:
    """A coarse step: all questions about a picture in a row, and a row for each question."""
    processor, plan = tiny.processor, plans.COARSE
    mix = replace(plan.mix, unknown=0)  # as in most steps
    rng = train_rng(options.seed, 100 + plan.stream, 0)
    trees, rows = [], []
    for scene in render_scenes(options.seed, plan.stream, 0, options.pictures):
        branches = [b.messages for b in make_branches(scene, rng, mix, plan.snap)]
        trees.append(processor.encode_tree([scene.image], branches))
        rows += [processor.encode_tree([scene.image], [branch]) for branch in branches]
    rows.sort(key=lambda row: len(row.input_ids))  # so that they need little padding
    sides = {
        "a tree for each picture": [_collate(tiny, trees)],
        "a row for each question": _batches(tiny, rows, QUESTIONS_A_BATCH),
    }
    return Layouts(sides, 1, len(rows))


def packing_layouts(tiny: TinyForTraining, options: Options) -> Layouts:
    """Fine steps, one of each kind in turn: padded to the longest of a step, and packed.

    Step 0 is left out: it is one of the few that ask for unknown things.
    """
    plan = plans.FINE
    steps = len(plan.kinds)
    stage = QuestionStage(tiny, options.seed, steps, plan, options.pictures)
    by_step = [stage.encode(step)[0] for step in range(1, steps + 1)]
    examples = [Example(e) for step in by_step for e in step]
    packer: Packer[Example] = Packer(
        max_tokens=max(ROW_TOKENS, *(e.tokens for e in examples)),
        max_crops=sum(e.crops for e in examples),
        packing_buffer=len(examples),
    )
    for example in examples:
        packer.add(example)
    packed = []
    while packer.waiting:
        packed.append(join([example.encoded for example in packer.take()]))
    sides = {
        "rows padded to the longest": [_collate(tiny, encoded) for encoded in by_step],
        "packed rows": _batches(tiny, packed, ROWS_A_BATCH),
    }
    return Layouts(sides, steps, sum(e.branches for e in examples))


@dataclass(frozen=True)
class Example(Waiting):
    """An encoded message tree, as `Packer` takes it."""

    @property
    def branches(self) -> int:
        assert self.encoded.subsegment_ids is not None
        return len(set(self.encoded.subsegment_ids.tolist())) - 1  # the prefix is none


def _collate(tiny: TinyForTraining, rows: Sequence[Encoded]) -> Batch:
    return collate(rows, tiny.processor.pad_token_id)


def _batches(tiny: TinyForTraining, rows: Sequence[Encoded], size: int) -> list[Batch]:
    return [_collate(tiny, rows[i : i + size]) for i in range(0, len(rows), size)]


LAYOUTS: dict[str, Callable[[TinyForTraining, Options], Layouts]] = {
    "trees": tree_layouts,
    "packing": packing_layouts,
}


def run_cost(name: str, options: Options, folder: Path) -> dict[str, Any]:
    """Seconds of forward and backward; the sides take turns, the median counts.

    Raises: ValueError if the sides do not have the same loss.
    """
    tiny = TinyForTraining(options.seed)
    layouts = LAYOUTS[name](tiny, options)
    losses: dict[str, float] = {}

    def learn(side: str, batches: Sequence[Batch]) -> Callable[[], None]:
        def work() -> None:
            tiny.zero_grad()
            total = 0.0
            for batch in batches:
                inputs: dict[str, Any] = batch.tensors()
                loss = tiny.model.loss(**inputs, reduction="sum")
                loss.backward()
                total += loss.item()
            losses[side] = total

        return work

    work = {side: learn(side, batches) for side, batches in layouts.sides.items()}
    times = take_turns(work, options.rounds)
    ours, *others = losses.values()
    if not all(math.isclose(ours, other, rel_tol=1e-3) for other in others):
        raise ValueError(f"the sides do not learn the same: their losses are {losses}")
    seconds = {side: statistics.median(values) for side, values in times.items()}
    return {
        "seconds_per_step": {side: value / layouts.steps for side, value in seconds.items()},
        "questions_per_second": {s: layouts.questions / value for s, value in seconds.items()},
        "real_tokens": {side: share_of_real(b) for side, b in layouts.sides.items()},
        "losses": losses,
    }


def share_of_real(batches: Sequence[Batch]) -> float:
    """How much of the batches is no padding."""
    masks = [batch.attention_mask for batch in batches if batch.attention_mask is not None]
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


# ---- all of them ----


@dataclass(frozen=True)
class Part:
    """Runs of one kind, and the options that change their numbers."""

    names: tuple[str, ...]
    do: Callable[[str, Options, Path], dict[str, Any]]
    options: tuple[str, ...]


PARTS = (
    Part(
        tuple(DECODER),
        run_decoder,
        ("seed", "scale", "presence_steps", "coarse_steps", "pictures", "scenes"),
    ),
    Part(tuple(OPTIMISERS), run_optimiser, ("seed", "crop_steps", "crops")),
    Part(tuple(LAYOUTS), run_cost, ("seed", "pictures", "rounds")),
)
NAMES = tuple(name for part in PARTS for name in part.names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs that are not done, then print the table."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        ablate(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = table(read_results(options.out))
    print(text)
    if options.page is not None:
        put_into(options.page, text)
    return 0


def ablate(options: Options) -> None:
    """Do the runs that are not done.

    Raises: ValueError for unknown names, no vision where it is needed, and a folder whose runs
        have other settings.
    """
    if unknown := [name for name in options.only if name not in NAMES]:
        raise ValueError(f"no run {unknown[0]!r}: choose from {', '.join(NAMES)}")
    chosen = [n for n in NAMES if n in (options.only or NAMES)]
    vision = None
    if set(chosen) & set(DECODER):
        if options.vision is None:
            raise ValueError(
                "the runs of the decoder start from trained vision: give --vision, a run of "
                "`nanomolmo2 train tiny` behind its scenes stage"
            )
        checkpoint = find_vision(options.vision)
        options = replace(options, vision=checkpoint)  # whatever the run there does meanwhile
        vision = sha256_of(checkpoint / FILE)
        about = read_json_object(checkpoint / ABOUT)
        stage = STAGES[about["stage"]]
        print(f"vision: {checkpoint}, {stage} step {about['step']}", file=sys.stderr)
    for part in PARTS:
        settings = {name: getattr(options, name) for name in part.options}
        if part.do is run_decoder:
            settings["vision"] = vision
        for name in part.names:
            if name in chosen:
                _do(name, part, options, settings)


def _do(name: str, part: Part, options: Options, settings: dict[str, Any]) -> None:
    folder = options.out / name
    if (folder / SETTINGS).exists():
        found = read_json_object(folder / SETTINGS)
        if found != settings:
            raise ValueError(
                f"{folder} was begun with {found}, and is now to have {settings}: give the same "
                f"options, or another --out"
            )
    else:
        with atomic_path(folder / SETTINGS) as aside:
            aside.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    results = read_results(options.out)
    if name in results:
        return
    print(f"{name} ...", file=sys.stderr, flush=True)
    results[name] = {"name": name, "settings": settings, **part.do(name, options, folder)}
    with atomic_path(options.out / RESULTS) as aside:
        lines = [json.dumps(result) + "\n" for result in results.values()]
        aside.write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(
        folder / FOLDER, ignore_errors=True
    )  # the log stays, weights are no longer needed


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by name."""
    if not (out / RESULTS).exists():
        return {}
    lines = (out / RESULTS).read_text(encoding="utf-8").splitlines()
    return {result["name"]: result for result in map(json.loads, lines)}


# ---- the page ----


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of the finished runs: a table for each kind."""
    parts = []
    if done := [results[name] for name in DECODER if name in results]:
        s = done[0]["settings"]
        steps = f"{s['presence_steps']} steps of presence"
        asked = ""
        if s["coarse_steps"]:
            steps += f" and {s['coarse_steps']} of coarse"
            asked = f"; {s['scenes']} test scenes of seen art, with 95 % intervals"
        of = f"{s['pictures']} pictures each, scale {s['scale']}, seed {s['seed']}"
        parts.append(f"{steps}, {of}{asked}:")
        columns = [c for c in COLUMNS if any(c in result["scores"] for result in done)]
        rows = [
            [result["name"], DECODER[result["name"]].title, *(_cell(result, c) for c in columns)]
            for result in done
        ]
        head = ["run", "what is different", *(COLUMNS[c] for c in columns)]
        parts.append(_markdown(head, rows))
    if done := [results[name] for name in OPTIMISERS if name in results]:
        s = done[0]["settings"]
        parts.append(
            f"{s['crop_steps']} steps of {s['crops']} crops, seed {s['seed']}; accuracy on "
            f"{done[0]['crops']} new ones:"
        )
        rows = [
            [r["name"], optimiser_title(OPTIMISERS[r["name"]]), f"{r['accuracy']:.3f}"]
            for r in done
        ]
        parts.append(_markdown(["run", "encoder learns with", "crop accuracy"], rows))
    if done := [results[name] for name in LAYOUTS if name in results]:
        s = done[0]["settings"]
        parts.append(
            f"{s['pictures']} pictures a step, forward and backward, median of {s['rounds']} "
            f"rounds:"
        )
        rows = [
            [
                result["name"],
                side,
                f"{seconds:.3g}",
                f"{result['questions_per_second'][side]:.3g}",
                f"{result['real_tokens'][side]:.0%}",
            ]
            for result in done
            for side, seconds in result["seconds_per_step"].items()
        ]
        head = ["run", "layout", "seconds a step", "questions a second", "not padding"]
        parts.append(_markdown(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def _cell(result: dict[str, Any], row: str) -> str:
    """A score, with its interval if it has one; a dash where there was no such question."""
    if row not in result["scores"]:
        return "-"
    text = f"{result['scores'][row]:.3f}"
    if row not in result["intervals"]:
        return text
    low, high = result["intervals"][row]
    return f"{text} ({low:.2f} to {high:.2f})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
