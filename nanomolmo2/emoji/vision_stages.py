"""The stages of `tiny` that teach vision: no words yet, so no decoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.emoji.heads import FEATURE_RMS, SceneLabels, scale_loss
from nanomolmo2.emoji.model import SCENES, TinyForTraining, labelled, normalise
from nanomolmo2.emoji.plans import MARGIN
from nanomolmo2.emoji.scenes import (
    Scene,
    SceneConfig,
    render_crop,
    render_mosaic,
    render_scene,
    train_rng,
)
from nanomolmo2.emoji.sprites import Sprites
from nanomolmo2.training.loop import Stage
from nanomolmo2.training.optim import OptimConfig

CROP_SIZE = 64
CROP_RATES = OptimConfig(lr=2e-3, matrix_lr=0.02)  # of the encoder
VARIED_RATES = OptimConfig(lr=1e-3, matrix_lr=0.01, warmup_steps=20, final_ratio=0.02)


class TinyStage(Stage):
    """A stage of `tiny`."""

    def __init__(self, tiny: TinyForTraining, seed: int, steps: int, batch_size: int = 32) -> None:
        self.tiny, self.seed, self.steps, self.batch_size = tiny, seed, steps, batch_size


class CropStage(TinyStage):
    """Name the emoji of a crop."""

    name, stream = "crops", 0

    def __init__(
        self,
        tiny: TinyForTraining,
        seed: int,
        steps: int,
        batch_size: int = 128,
        rates: OptimConfig = CROP_RATES,
    ) -> None:
        super().__init__(tiny, seed, steps, batch_size)
        self.rates = rates
        self.scene = replace(tiny.scenes, variation=1.0)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rng, sprites = train_rng(self.seed, self.stream, step), Sprites.load()
        crops = [render_crop(rng, sprites, self.scene, CROP_SIZE) for _ in range(self.batch_size)]
        images = normalise(np.stack([image for image, _, _ in crops]))
        return images, torch.tensor([category for _, category, _ in crops])

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        return {
            "vision": (self.tiny.model.vision_encoder, self.rates),
            "heads": (self.tiny.heads.patch_class, OptimConfig(lr=2e-3, matrix_lr=0.0)),
        }

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        images, categories = batch
        patches = self.tiny.patches(images)
        logits = self.tiny.heads.classify(patches.mean(dim=1))[:, 1:]  # 0 is the background
        accuracy = (logits.argmax(-1) == categories).float().mean()
        loss = F.cross_entropy(logits, categories) + 0.1 * scale_loss(patches, FEATURE_RMS)
        return loss, {"accuracy": accuracy.item()}


class VariedStage(CropStage):
    """The same with the drawings varied as in all stages behind it."""

    name, stream = "varied", 6

    def __init__(self, tiny: TinyForTraining, seed: int, steps: int, batch_size: int = 128) -> None:
        super().__init__(tiny, seed, steps, batch_size, VARIED_RATES)
        self.scene = tiny.scenes


class MosaicStage(TinyStage):
    """Name what each patch of a mosaic of emoji shows."""

    name = "mosaics"

    def batch(self, step: int) -> tuple[Tensor, SceneLabels]:
        rng, sprites = train_rng(self.seed, 7, step), Sprites.load()
        mosaics = [render_mosaic(rng, sprites, self.tiny.scenes) for _ in range(self.batch_size)]
        return labelled(mosaics)

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        model, heads = self.tiny.model, self.tiny.heads
        rates = OptimConfig(lr=2e-3, matrix_lr=0.02, warmup_steps=20, final_ratio=0.05)
        return {
            "vision": (model.vision_encoder, rates),
            "heads": (heads.patch_class, replace(rates, matrix_lr=0.0)),
        }

    def loss(self, batch: tuple[Tensor, SceneLabels]) -> tuple[Tensor, dict[str, float]]:
        images, labels = batch
        patches = self.tiny.patches(images)
        loss, metrics = self.tiny.heads.patch_loss(patches, labels)
        return loss + 0.1 * scale_loss(patches, FEATURE_RMS), metrics


def render_scenes(
    seed: int, stage: int, step: int, batch_size: int, config: SceneConfig = SCENES
) -> list[Scene]:
    """The scenes of a step."""
    rng, sprites = train_rng(seed, stage, step), Sprites.load()
    return [render_scene(rng, sprites, config) for _ in range(batch_size)]


class SceneStage(TinyStage):
    """Find and name everything in a scene, without words yet."""

    name = "scenes"

    def batch(self, step: int) -> tuple[Tensor, SceneLabels]:
        scenes = render_scenes(self.seed, 1, step, self.batch_size, self.tiny.scenes)
        return labelled(scenes)

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        model = self.tiny.model
        return {
            "vision": (model.vision_encoder, OptimConfig(lr=5e-4, matrix_lr=0.005)),
            "connector": (model.connector, OptimConfig(lr=1e-3, matrix_lr=0.005)),
            "heads": (self.tiny.heads, OptimConfig(lr=2e-3, matrix_lr=0.0)),
        }

    def loss(self, batch: tuple[Tensor, SceneLabels]) -> tuple[Tensor, dict[str, float]]:
        images, labels = batch
        patches = self.tiny.patches(images)
        tokens = self.tiny.model.connector(patches)
        return self.tiny.heads(patches, tokens, self.tiny.visual_targets(), labels)


class SettleStage(SceneStage):
    """The same with mosaics in turn; tokens settle which of them an object's is.

    An object whose centre is near the line between two cells may count in either.
    """

    name = "settle"

    def batch(self, step: int) -> tuple[Tensor, SceneLabels]:
        rng, sprites, look = train_rng(self.seed, 9, step), Sprites.load(), self.tiny.scenes
        draw = render_mosaic if step % 2 else render_scene
        scenes = [draw(rng, sprites, look) for _ in range(self.batch_size)]
        return labelled(scenes, MARGIN)

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        rates = OptimConfig(lr=1e-3, matrix_lr=0.008, warmup_steps=50, final_ratio=0.05)
        model = self.tiny.model
        return {
            "vision": (model.vision_encoder, replace(rates, lr=5e-4)),
            "connector": (model.connector, rates),
            "heads": (self.tiny.heads, replace(rates, lr=2e-3, matrix_lr=0.0)),
        }
