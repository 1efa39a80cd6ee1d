"""The first stage of finding by example: encoder and connector learn what is alike, no words."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanomolmo2.config import Config
from nanomolmo2.emoji.heads import FEATURE_RMS, TOKEN_RMS, SceneLabels, scale_loss
from nanomolmo2.emoji.model import PATCH_SIZE, SCENES, labelled
from nanomolmo2.emoji.plans import MARGIN
from nanomolmo2.emoji.vision_stages import render_scenes
from nanomolmo2.things.match_heads import MatchConfig
from nanomolmo2.things.match_labels import MatchBatch, match_batch
from nanomolmo2.things.match_model import CROPS, MatchModel
from nanomolmo2.things.match_scores import NUM_SCENES, match_scores
from nanomolmo2.things.source import ThingsConfig
from nanomolmo2.training.distributed import World
from nanomolmo2.training.loop import Stage
from nanomolmo2.training.optim import OptimConfig

EMOJI_STREAM = 20  # of `emoji.scenes.train_rng`; the recipe of `tiny` has those below
THINGS_SEED = 1_000_000  # added to the seed: other scenes than those that questions are asked about


@dataclass(frozen=True)
class MatchPlan(Config):
    """What a step shows, and how fast is learned.

    things, emoji: pictures of each in a step.
    source: how scenes of things look.
    match: the loss on them.
    emoji_weight: of the loss on scenes of emoji.
    vision, connector, heads: peak rates; the first two are those of Muon, AdamW's a tenth.
    scored: held-out scenes of each set that it is measured on.
    """

    steps: int
    things: int = 12
    emoji: int = 8
    source: ThingsConfig = field(
        default_factory=lambda: ThingsConfig(sides=(192, 256, 320, 384, 448), pairs=0.0)
    )
    match: MatchConfig = field(default_factory=MatchConfig)
    emoji_weight: float = 0.3
    vision: float = 0.004
    connector: float = 0.004
    heads: float = 2e-3
    warmup_steps: int = 100
    final_ratio: float = 0.02
    scored: int = NUM_SCENES


class StepBatch(NamedTuple):
    """Pictures of things and of emoji."""

    things: MatchBatch
    emoji: Tensor  # (B, N, 3*P*P)
    labels: SceneLabels


class MatchStage(Stage):
    """Which patches and tokens hold a thing's middle, and which show things of one kind."""

    name = "match"

    def __init__(
        self, model: MatchModel, seed: int, plan: MatchPlan, world: World | None = None
    ) -> None:
        self.model, self.seed, self.plan, self.steps = model, seed, plan, plan.steps
        self.world = world or World()
        self.source = plan.source.open(seed + THINGS_SEED)
        self.taken = 0  # steps of this process

    def batch(self, step: int) -> StepBatch:
        plan = self.plan
        first = step * plan.things
        mine = self.world.share(range(first, first + plan.things))
        scenes = [self.source.scenes(i)[0][0] for i in mine]
        emoji = render_scenes(self.seed, EMOJI_STREAM, step, plan.emoji, SCENES)
        emoji = [*self.world.share(emoji)]
        images, labels = labelled(emoji, MARGIN)
        return StepBatch(match_batch(scenes, CROPS, MARGIN), as_patches(images, PATCH_SIZE), labels)

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        plan, model = self.plan, self.model
        rates = OptimConfig(
            lr=plan.vision / 10,
            matrix_lr=plan.vision,
            warmup_steps=plan.warmup_steps,
            final_ratio=plan.final_ratio,
        )
        heads = replace(rates, lr=plan.heads, matrix_lr=0.0, warmup_steps=plan.warmup_steps // 10)
        return {
            "vision": (model.vision_encoder, rates),
            "connector": (
                model.connector,
                replace(rates, lr=plan.connector / 10, matrix_lr=plan.connector),
            ),
            "emoji": (model.emoji, heads),
            "match_patches": (model.match_patches, heads),
            "match_tokens": (model.match_tokens, heads),
        }

    def loss(self, batch: StepBatch) -> tuple[Tensor, dict[str, float]]:
        model, plan, things = self.model, self.plan, batch.things
        # One pass: tiles of things, then pictures of emoji, which are a single tile each.
        features = model.features(torch.cat([things.pixel_values, batch.emoji]))
        tiles, emoji = features.split([len(things.pixel_values), len(batch.emoji)])
        tokens = model.connector(tiles, things.tokens.index)
        patches = tiles.flatten(0, 1)[things.patches.index[:, 0]]
        total = 0.1 * (scale_loss(tiles, FEATURE_RMS) + scale_loss(tokens, TOKEN_RMS))
        metrics: dict[str, float] = {}
        for name, head, cells, labels in (
            ("patch", model.match_patches, patches, things.patches),
            ("token", model.match_tokens, tokens, things.tokens),
        ):
            loss, found = head(cells, labels, things.looks)
            total = total + loss
            metrics |= {f"{name}_{key}": value for key, value in found.items()}
        dense, found = model.emoji(emoji, model.connector(emoji), model.nouns, batch.labels)
        metrics |= {f"emoji_{key}": found[key] for key in ("noun_accuracy", "object_f1")}
        metrics["emoji_loss"] = dense.item()
        return total + plan.emoji_weight * dense, metrics

    def after_step(self) -> None:
        self.taken += 1

    def evaluate(self) -> dict[str, float]:
        return match_scores(self.model, self.plan.scored) if self.plan.scored else {}


def as_patches(images: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, 3*P*P), each patch row by row, channels innermost."""
    grid = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, rows, P, cols, P)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
