"""The stages in which the whole model learns to find by example, emoji questions mixed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from nanomolmo2.batch import Batch
from nanomolmo2.config import Config
from nanomolmo2.data.example import Branch, Example, Message
from nanomolmo2.emoji import plans
from nanomolmo2.emoji.model import SCENES, TinyForTraining
from nanomolmo2.emoji.plans import QuestionPlan
from nanomolmo2.emoji.question_stage import QuestionStage
from nanomolmo2.emoji.vision_stages import render_scenes
from nanomolmo2.models.loss import reduce
from nanomolmo2.models.pointing import PointTerms
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.tokenizer import Tokenizer
from nanomolmo2.things.find_labels import (
    Asked,
    FindLabels,
    find_labels,
    find_loss,
    of_emoji,
    wanted_of,
)
from nanomolmo2.things.find_model import CROPS, FindModel
from nanomolmo2.things.find_scores import find_scores
from nanomolmo2.things.questions import FindMix, make_branches
from nanomolmo2.things.scenes import Scene, train_rng
from nanomolmo2.things.source import Things, ThingsConfig
from nanomolmo2.things.wordless import Wordless, contrast_loss, wordless, wordless_scores
from nanomolmo2.training.distributed import World
from nanomolmo2.training.find_terms import scores_of
from nanomolmo2.training.loop import Stage
from nanomolmo2.training.optim import OptimConfig

KINDS = {
    "t": "things",
    "p": "two pictures of things",
    "e": "emoji",
    "w": "things without words, in some of the examples two pictures",
}
WORDLESS_MIX = FindMix(like=6, count_like=0, same=0, named=0, count_named=0)
TERMS = ("text", "row", "slot", "cell")
# Around a message, around a list of points, and of each of these.
FRAME_TOKENS, LIST_TOKENS, TOKENS_A_POINT = 5, 10, 5


@dataclass(frozen=True)
class FindPlan(Config):
    """What a stage asks, and who learns at which rate.

    name, stream: of the stage, and of its random numbers.
    kinds: what the steps show in turn, see `KINDS`.
    pictures: of things in a step, half as many pairs; emoji: of emoji.
    source: how scenes of things look and what is asked; ``pairs`` and ``length`` say nothing.
    pairs: share of the examples without words that have two pictures.
    max_crops: tiles of a picture, at most.
    capacity: tokens of the questions about a picture; what goes beyond is left out.
    same_weight: of a question with a short answer, beside one token of a list.
    llm, llm_matrix: rates of the decoder, of AdamW and of Muon (0 = AdamW for all).
    points: of the modules that point and find, AdamW.
    vision: of encoder and connector, Muon; AdamW's is a tenth. 0 = frozen.
    by_looks: points begin as a search for what looks the same.
    finder: weight of what is found all at once, beside the answers.
    contrast: weight of what is told apart in all pictures of a step without words.
    keep: scenes of emoji in a step without words, whose visual tokens are to stay as those of the
        bundled `tiny`: what its decoder knows of them then holds.
    keep_weight: of that.
    emoji_plan: what is asked about emoji.
    scored: questions of each set that it is measured on, 0 = none.
    """

    name: str
    stream: int
    steps: int
    kinds: str = "ttept"
    pictures: int = 12
    emoji: int = 16
    source: ThingsConfig = field(default_factory=lambda: ThingsConfig(sides=(192, 256, 320, 384)))
    pairs: float = 0.5
    max_crops: int = 4
    capacity: int = 500
    same_weight: float = 4.0
    llm: float = 4e-4
    llm_matrix: float = 0.004
    points: float = 1e-3
    vision: float = 0.0008
    by_looks: bool = False
    warmup_steps: int = 100
    final_ratio: float = 0.1
    finder: float = 1.0
    contrast: float = 0.0
    keep: int = 0
    keep_weight: float = 1.0
    emoji_plan: QuestionPlan = plans.LAST
    scored: int = 60

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds are {self.kinds!r}, expected letters of {', '.join(KINDS)}")


class FindBatch(NamedTuple):
    """Questions, and what is where in their pictures; None for pairs and clips of emoji."""

    questions: Batch
    labels: FindLabels | None
    of_emoji: bool


ANSWERS_MIX = FindMix(invented=0.4)


class FindStage(Stage):
    """Answer questions about scenes of things and of emoji, points as selections."""

    def __init__(
        self, find: FindModel, seed: int, plan: FindPlan, world: World | None = None
    ) -> None:
        self.find, self.seed, self.plan, self.world = find, seed, plan, world or World()
        self.name, self.steps = plan.name, plan.steps
        self.crops = replace(CROPS, max_crops=plan.max_crops)
        self.processor = find.processor.with_settings(multicrop=self.crops)
        emoji_plan = replace(plan.emoji_plan, stream=100 + plan.stream)
        # It makes examples only: of the model it asks for its processor and the look of its scenes.
        of_emoji = cast(TinyForTraining, find)
        self.emoji = QuestionStage(of_emoji, seed, plan.steps, emoji_plan, plan.emoji)

    def kind(self, step: int) -> str:
        return self.plan.kinds[step % len(self.plan.kinds)]

    def batch(self, step: int) -> FindBatch | Wordless:
        if self.kind(step) == "w":
            return self.wordless(step)
        kind, pad = self.kind(step), self.find.processor.pad_token_id
        if kind != "e":
            asked = self.encode(step, kind == "p")
        elif self.emoji.kind(number := step // len(self.plan.kinds)) == "s":
            asked = [of_emoji(*one) for one in self.world.share(self.emoji.asked(number))]
        else:
            encoded, _ = self.emoji.encode(number)
            return FindBatch(collate(self.world.share(encoded), pad).prepared(), None, True)
        batch = collate([one.encoded for one in asked], pad).prepared()
        return FindBatch(batch, find_labels(asked, batch.input_ids.shape[1]), kind == "e")

    def wordless(self, step: int) -> Wordless:
        """The pictures of a step with examples, for the finder alone."""
        rng = train_rng(self.seed, self.plan.stream, step)
        config = replace(self.plan.source, pairs=self.plan.pairs)
        source = Things(config, int(rng.integers(2**31)))
        examples = []
        for i in self.world.share(range(self.plan.pictures)):
            scenes, scene_rng = source.scenes(i)
            examples.append((scenes, make_branches(scenes, scene_rng, WORDLESS_MIX)))
        return wordless(examples, self.crops)._replace(kept=self.kept(step))

    def kept(self, step: int) -> Tensor | None:
        """(B, N, 3*P*P) scenes of emoji."""
        scenes = render_scenes(self.seed, self.plan.stream, step, self.plan.keep, SCENES)
        tiles = [self.crops.tiles(scene.image)[0] for scene in self.world.share(scenes)]
        return torch.from_numpy(np.concatenate(tiles)) if tiles else None

    def encode(self, step: int, pairs: bool) -> list[Asked]:
        """The pictures of a step with their questions."""
        plan = self.plan
        rng = train_rng(self.seed, plan.stream, step)
        config = replace(plan.source, pairs=float(pairs))
        number = max(1, plan.pictures // (1 + pairs))
        source = Things(config, int(rng.integers(2**31)))
        mine = self.world.share(range(number))
        return [self.encode_example(*source.scenes(i), rng) for i in mine]

    def encode_example(
        self, scenes: list[Scene], scene_rng: np.random.Generator, rng: np.random.Generator
    ) -> Asked:
        """As many of its questions as there is room for, in random order, at least one."""
        processor = self.processor
        example = Example(
            [scene.image for scene in scenes],
            make_branches(scenes, scene_rng, self.plan.source.mix),
        )
        chosen: list[Branch] = []
        left = self.plan.capacity
        for i in rng.permutation(len(example.branches)).tolist():
            branch = example.branches[i]
            left -= num_tokens(branch, processor.tokenizer)
            if left < 0 and chosen:
                continue
            chosen.append(branch)
        messages = [spaced(branch.messages, rng) for branch in chosen]
        weights = [self.plan.same_weight if b.task == "same" else 1.0 for b in chosen]
        encoded = processor.encode_tree(example.images, messages, branch_weights=weights)
        return Asked(encoded, scenes, [wanted_of(branch) for branch in chosen])

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        model, plan = self.find.model, self.plan
        assert model.point_predictor is not None and model.finder is not None

        def rates(lr: float, matrix_lr: float) -> OptimConfig:
            return OptimConfig(
                lr=lr,
                matrix_lr=matrix_lr,
                warmup_steps=plan.warmup_steps,
                final_ratio=plan.final_ratio,
            )

        parts: dict[str, tuple[nn.Module, OptimConfig]] = {
            "llm": (model.llm, rates(plan.llm, plan.llm_matrix)),
            "points": (model.point_predictor, rates(plan.points, 0.0)),
            "finder": (model.finder, rates(plan.points, 0.0)),
        }
        if plan.vision:
            vision = rates(plan.vision / 10, plan.vision)
            parts |= {
                "vision": (model.vision_encoder, vision),
                "connector": (model.connector, vision),
            }
        return parts

    def begin(self) -> None:
        model = self.find.model
        if self.plan.by_looks:
            self.find.point_by_looks()
        if self.plan.keep:
            self.before = self.find.tokens_at_start()
        for part in (model.vision_encoder, model.connector):
            part.requires_grad_(self.plan.vision > 0)

    def loss(self, batch: FindBatch | Wordless) -> tuple[Tensor, dict[str, float]]:
        model = self.find.model
        if isinstance(batch, Wordless):
            scored = wordless_scores(model, batch)
            loss, metrics = find_loss(scored, batch.labels)
            if self.plan.contrast:
                contrast = contrast_loss(model, batch, scored.patches)
                loss = loss + self.plan.contrast * contrast
                metrics["contrast_loss"] = float(contrast.detach())
            if batch.kept is not None:
                changed = self.changed(batch.kept)
                loss = loss + self.plan.keep_weight * changed
                metrics["changed"] = float(changed.detach())
            return self.plan.finder * loss, {f"{name}_w": x for name, x in metrics.items()}
        questions = model.encoded(batch.questions)
        states = model.states(questions)
        terms = model.loss_terms(questions, states=states)
        loss = reduce(terms.total, terms.weights, "mean")
        labels, kind = batch.labels, "e" if batch.of_emoji else "t"
        metrics = metrics_of(terms, kind)
        if labels is not None and len(labels.of):
            found, of_find = find_loss(scores_of(model, questions, states, labels), labels)
            loss = loss + self.plan.finder * found
            metrics |= {f"{name}_{kind}": value for name, value in of_find.items()}
        return loss, metrics

    def changed(self, kept: Tensor) -> Tensor:
        """How far visual tokens are from those of `tiny`, beside their size."""
        tokens, before = self.find.model.encode_images(kept), self.before(kept)
        return (tokens - before).square().sum() / before.square().sum()

    def after_step(self) -> None:
        self.find.clear_placeholders()

    def evaluate(self) -> dict[str, float]:
        if not self.plan.scored:
            return {}
        return find_scores(self.find.model, self.crops, self.plan.scored)


def metrics_of(terms: PointTerms, kind: str) -> dict[str, float]:
    """Shares of what is right, by term; what a batch has none of is left out."""
    numbers = [len(terms.weights), *terms.counts.tolist()]
    right = [float(terms.right_text), *terms.right.tolist()]
    found = zip(TERMS, right, numbers, strict=True)
    return {f"{term}_right_{kind}": hits / number for term, hits, number in found if number}


def num_tokens(branch: Branch, tokenizer: Tokenizer) -> int:
    """How many tokens a branch will have, or a few more: known before its picture is."""
    found = 0
    for message in branch.messages:
        content = message["content"]
        text_alone = [{"type": "text", "text": content}]
        parts: Sequence[Any] = text_alone if isinstance(content, str) else content
        found += FRAME_TOKENS
        for part in parts:
            if part["type"] == "point":
                found += 3
            elif "</points>" not in part["text"]:
                found += len(tokenizer.encode_text(part["text"]))
            else:
                truth = branch.truth or {}
                label = len(tokenizer.encode_text(str(truth["noun"])))
                found += TOKENS_A_POINT * int(truth["count"]) + label + LIST_TOKENS
    return found


def spaced(messages: Sequence[Message], rng: np.random.Generator) -> list[Message]:
    """The same messages, half of them without spaces beside points: the format has its own there,
    and people write it either way.
    """
    if rng.random() < 0.5:
        return list(messages)
    made: list[Message] = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = [
                {**part, "text": part["text"].strip()} if part["type"] == "text" else part
                for part in content
            ]
            message = cast(Message, {**message, "content": parts})
        made.append(message)
    return made
