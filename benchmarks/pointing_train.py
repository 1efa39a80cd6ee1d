"""What `benchmarks.pointing` trains: the common start, and the runs that go on from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanomolmo2.accelerate import bf16_matmul
from nanomolmo2.batch import Batch
from nanomolmo2.convert.pretrained import load
from nanomolmo2.data.example import Branch
from nanomolmo2.emoji.model import GROWN_LAYERS, TinyForTraining, normalise
from nanomolmo2.emoji.questions import BranchMix, make_branches
from nanomolmo2.emoji.scenes import Scene, SceneObject, render_scene, train_rng
from nanomolmo2.emoji.sprites import Sprites
from nanomolmo2.files import atomic_path
from nanomolmo2.models import NanoMolmo2, NanoMolmo2Config, preset
from nanomolmo2.processor import Encoded, Processor, collate
from nanomolmo2.training.optim import OptimConfig, Optimizers

SCENES_STREAM, PRESENCE_STREAM, WORDS_STREAM, ORDER_STREAM, ASK_STREAM = range(900, 905)
PRESENCE = BranchMix(16, *(0,) * 8, unknown=0, bare=1.0)
WORDS = BranchMix(presence=4, count=0, number=3, point=0, caption=1, spatial=0, points=0, size=0)
WORDS = replace(WORDS, at=0, unknown=0)
MORE_WORDS = replace(WORDS, presence=3, spatial=2, size=1)
POINTS = BranchMix(*(0,) * 3, point=4, caption=0, spatial=0, points=0, size=0, at=0, unknown=0)
MAX_NORM = 1.0  # of gradients


@dataclass(frozen=True)
class Plan:
    """How much of everything; see `PLANS`."""

    scenes: int = 4000  # for the common start, and as many for the runs
    presence_steps: int = 180
    words_steps: int = 160
    words: BranchMix = WORDS  # what they ask
    start_batch: int = 16  # scenes
    batch: int = 8  # scenes of a step of a run
    answers: tuple[int, ...] = (1000, 2000, 4000, 8000, 16000)  # after which is evaluated
    seeds: tuple[int, ...] = (0, 1, 2)
    tests: int = 200  # held-out scenes
    max_new_tokens: int = 96  # of an answer
    timed: int = 40  # questions whose seconds are measured
    rate: float = 1e-3  # of AdamW, for all that learns
    warmup: int = 20  # steps


# One with a start that has learned more of the language, though no coordinates either; one that
# only shows that the program works.
LONGER = Plan(words_steps=640, words=MORE_WORDS)
SHORT = Plan(
    scenes=8,
    presence_steps=1,
    words_steps=1,
    start_batch=4,
    batch=2,
    answers=(8, 16),
    seeds=(0,),
    tests=1,
    max_new_tokens=6,
    timed=1,
)
PLANS = {"usual": Plan(), "longer": LONGER, "short": SHORT}


class Pool:
    """Training scenes, drawn and seen by the frozen encoder once.

    features: (S, N, Dv) float16. objects: of each scene.
    """

    def __init__(self, folder: Path, number: int, note: Callable[[str], None]) -> None:
        self.path = folder / f"scenes-{number}.npy"
        labels = self.path.with_suffix(".json")
        if not labels.exists():
            note(f"draws {number} scenes")
            _draw_pool(self.path, labels, number)
        self.features: NDArray[np.float16] = np.load(self.path, mmap_mode="r")
        self.objects = [
            tuple(SceneObject(*map(_as_tuple, one)) for one in scene)
            for scene in json.loads(labels.read_text(encoding="utf-8"))
        ]

    def scene(self, i: int) -> Scene:
        """The objects of a scene on a blank image."""
        size = preset("tiny").vision_config.image_size
        return Scene(
            np.zeros((size, size, 3), np.uint8), self.objects[i], np.zeros((0, 0), np.int8)
        )

    def batch(
        self, processor: Processor, numbers: Sequence[int], asked: list[list[Branch]]
    ) -> Batch:
        """Message trees about some scenes, with their features in place of the images."""
        encoded: list[Encoded] = [
            processor.encode_tree([self.scene(i).image], [branch.messages for branch in branches])
            for i, branches in zip(numbers, asked, strict=True)
        ]
        features = torch.from_numpy(self.features[np.asarray(numbers)].astype(np.float32))
        batch = collate(encoded, processor.pad_token_id)
        return replace(batch, pixel_values=None, visual_features=features).prepared()


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@torch.no_grad()
def _draw_pool(path: Path, labels: Path, number: int) -> None:
    model, _ = load("tiny", dtype=torch.float32, device="cpu")
    sprites = Sprites.load()
    features, objects = [], []
    for start in range(0, number, 50):
        rows = range(start, min(start + 50, number))
        scenes = [render_scene(train_rng(0, SCENES_STREAM, i), sprites) for i in rows]
        images = normalise(np.stack([scene.image for scene in scenes]))
        seen = model.vision_encoder.features(images, model.config.connector.vit_layers)
        features.append(seen.numpy().astype(np.float16))
        objects += [[(o.category, o.style, o.box, o.center) for o in s.objects] for s in scenes]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(features))
    with atomic_path(labels) as temporary:
        temporary.write_text(json.dumps(objects), encoding="utf-8")


# ---- the common start ----


def small_config() -> NanoMolmo2Config:
    """`tiny`'s with four decoder layers."""
    config = replace(preset("tiny"), finder_dim=None)
    layers = config.llm_config.num_hidden_layers - len(GROWN_LAYERS)
    return replace(config, llm_config=replace(config.llm_config, num_hidden_layers=layers))


@torch.no_grad()
def untrained() -> tuple[NanoMolmo2, TinyForTraining]:
    """The shipped encoder, connector and embeddings of nouns, and a decoder that knows nothing.

    It starts as `tiny`'s own recipe starts it.
    """
    tiny = TinyForTraining(0)
    shipped, _ = load("tiny", dtype=torch.float32, device="cpu")
    tiny.weaken_attention_between_words()
    tiny.set_nouns(shipped.llm.embed_tokens.weight[tiny.noun_ids])
    tiny.model.vision_encoder.load_state_dict(shipped.vision_encoder.state_dict())
    tiny.model.connector.load_state_dict(shipped.connector.state_dict())
    depth = len(tiny.model.llm.layers)
    kept = [i for i in range(depth) if i not in GROWN_LAYERS]
    tiny.model.llm.layers = torch.nn.ModuleList(tiny.model.llm.layers[i] for i in kept)
    model = NanoMolmo2(small_config())
    model.load_state_dict(tiny.model.state_dict())
    tiny.model = model
    return model, tiny


def make_start(path: Path, pool: Pool, plan: Plan, note: Callable[[str], None]) -> None:
    """Presence, then presence, numbers and captions: no coordinates. Writes the state dict."""
    model, tiny = untrained()
    freeze_vision(model)
    bf16_matmul(model)
    for name, stream, mix, steps, first in (
        ("presence", PRESENCE_STREAM, PRESENCE, plan.presence_steps, True),
        ("words", WORDS_STREAM, plan.words, plan.words_steps, False),
    ):
        tiny.freeze_queries_and_keys(first)
        rates = OptimConfig(lr=plan.rate, matrix_lr=0.0, warmup_steps=plan.warmup, final_ratio=0.3)
        optimizers = Optimizers({"llm": (model.llm, rates)})
        for step in range(steps):
            rng = train_rng(0, stream, step)
            numbers = rng.permutation(plan.scenes)[: plan.start_batch].tolist()
            asked = [make_branches(pool.scene(i), rng, mix) for i in numbers]
            optimizers.set_rates(step, steps)
            loss = model.loss(pool.batch(tiny.processor, numbers, asked))
            loss.backward()
            gradient = model.llm.embed_tokens.weight.grad
            if first and gradient is not None:
                gradient[tiny.noun_ids] = 0
            optimizers.clip(MAX_NORM)
            optimizers.step()
            tiny.clear_placeholder()
            if step % 20 == 19 or step + 1 == steps:
                note(f"start, {name}: step {step + 1} of {steps}, loss {loss.item():.3f}")
    save(model.state_dict(), path)


def freeze_vision(model: NanoMolmo2) -> None:
    """Nothing but the decoder and what points learns."""
    model.requires_grad_(True)
    model.vision_encoder.requires_grad_(False)
    model.connector.requires_grad_(False)


# ---- a run ----


@dataclass(frozen=True)
class Way:
    """One of the two ways of writing points: a model, its processor, and how answers are made."""

    name: str
    config: NanoMolmo2Config
    processor: Processor
    snap: int  # thousandths that points of answers are rounded to


class Run:
    """One way and one seed, from the common start to the last number of answers; resumable.

    Leaves the weights after each of ``plan.answers`` in ``folder``, see `weights_path`.
    """

    def __init__(self, folder: Path, way: Way, seed: int, plan: Plan) -> None:
        self.folder, self.way, self.seed, self.plan = folder, way, seed, plan
        self.name = f"{way.name}-{seed}"

    def weights_path(self, answers: int) -> Path:
        return self.folder / f"{self.name}-{answers}.pt"

    def model_after(self, answers: int) -> NanoMolmo2:
        """The model as it was after so many answers."""
        model = NanoMolmo2(self.way.config)
        model.load_state_dict(torch.load(self.weights_path(answers)))
        return model.eval()

    def model_at_start(self) -> NanoMolmo2:
        """The common start, what points with numbers of the seed."""
        torch.manual_seed(self.seed)
        model = NanoMolmo2(self.way.config)
        start = torch.load(self.folder / "start.pt")
        missing, unexpected = model.load_state_dict(start, strict=False)
        assert not unexpected and all(name.startswith("point_predictor.") for name in missing)
        return model

    def batch(self, pool: Pool, step: int) -> Batch:
        return pool.batch(self.way.processor, *self.questions(step, pool))

    def questions(self, step: int, pool: Pool) -> tuple[list[int], list[list[Branch]]]:
        """Scenes of a step and what is asked about them; the same whatever the way."""
        plan = self.plan
        order = plan.scenes + train_rng(self.seed, ORDER_STREAM).permutation(plan.scenes)
        numbers = order[step * plan.batch : (step + 1) * plan.batch].tolist()
        asked = []
        for i in numbers:
            rng = train_rng(self.seed, ASK_STREAM, i)
            asked.append(make_branches(pool.scene(i), rng, POINTS, self.way.snap))
        return numbers, asked

    def train(self, pool: Pool, note: Callable[[str], None]) -> None:
        """Go on to the last number of answers."""
        plan = self.plan
        if self.weights_path(plan.answers[-1]).exists():
            return
        model = bf16_matmul(self.model_at_start())
        freeze_vision(model)
        rates = OptimConfig(lr=plan.rate, matrix_lr=0.0, warmup_steps=plan.warmup, final_ratio=1.0)
        learns: dict[str, tuple[torch.nn.Module, OptimConfig]] = {"llm": (model.llm, rates)}
        if model.point_predictor is not None:
            learns["points"] = (model.point_predictor, rates)
        optimizers, first = Optimizers(learns), 0
        state_path = self.folder / f"{self.name}.pt"
        if state_path.exists():
            state = torch.load(state_path)
            model.load_state_dict(state["model"])
            optimizers.load_state_dict(state["optimizers"])
            first = state["step"]
        ends = {round(answers / plan.batch / POINTS.point): answers for answers in plan.answers}
        losses = []
        for step in range(first, max(ends)):
            optimizers.set_rates(step, max(ends))
            loss = model.loss(self.batch(pool, step))
            loss.backward()
            optimizers.clip(MAX_NORM)
            optimizers.step()
            losses.append(loss.item())
            if answers := ends.get(step + 1):
                state = {"model": model.state_dict(), "optimizers": optimizers.state_dict()}
                save({**state, "step": step + 1}, state_path)
                save(model.state_dict(), self.weights_path(answers))
                note(f"{self.name}: {answers} answers, loss {np.mean(losses[-10:]):.3f}")


def save(value: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        torch.save(value, temporary)
