"""The stages of `tiny` that teach the decoder to answer questions, vision with it or frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanomolmo2.batch import Batch
from nanomolmo2.data.example import Branch
from nanomolmo2.emoji.clips import Clip, ask_about_clip, render_clip
from nanomolmo2.emoji.heads import SceneLabels, cell_owners, label_scenes
from nanomolmo2.emoji.model import (
    CELL_SIZE,
    CONFIG,
    MAX_FRAMES,
    PATCH_SIZE,
    TinyForTraining,
)
from nanomolmo2.emoji.pairs import ask_about_pair, render_pair
from nanomolmo2.emoji.plans import QuestionPlan
from nanomolmo2.emoji.questions import make_branches
from nanomolmo2.emoji.scenes import Scene, train_rng
from nanomolmo2.emoji.sprites import Sprites
from nanomolmo2.emoji.vision_stages import TinyStage, render_scenes
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.processor import Encoded, Processor
from nanomolmo2.training.optim import OptimConfig

ROW_FRAME, BRANCH_FRAME = 4, 3  # most tokens around the pictures, and around a branch
ROW_LENGTH = 384  # tokens of a scene and its questions: what goes beyond is left out
UNKNOWN_EVERY = 10  # steps that ask for things without emoji
CLAIM_LAYERS = 3  # of the decoder: behind them, image tokens have agreed who claims an object
CLAIM_WEIGHT = 2.0

Evaluate = Callable[[NanoMolmo2, Processor], dict[str, float]]


class QuestionBatch(NamedTuple):
    """Questions, and what is where in their pictures, as far as a plan teaches that too."""

    questions: Batch
    owners: Tensor | None = None  # (I, n) `SceneLabels.cell_owner` of all pictures and frames
    labels: SceneLabels | None = None  # none of videos


class QuestionStage(TinyStage):
    """Answer questions about scenes: message trees of many short branches a picture."""

    def __init__(
        self,
        tiny: TinyForTraining,
        seed: int,
        steps: int,
        plan: QuestionPlan,
        batch_size: int = 32,
        evaluate: Evaluate | None = None,
    ) -> None:
        super().__init__(tiny, seed, steps, batch_size)
        self.plan, self.name, self.scores = plan, plan.name, evaluate
        self.look = replace(tiny.scenes, **plan.look)

    def encode(self, step: int) -> tuple[list[Encoded], Sequence[Scene | Clip]]:
        """The examples of a step, and the pictures or the videos in them."""
        kind = self.kind(step)
        if kind == "c":
            return self._clips(step)
        if kind == "p":
            return self._pairs(step)
        asked = self.asked(step)
        return [encoded for encoded, _, _ in asked], [scene for _, scene, _ in asked]

    def kind(self, step: int) -> str:
        """What a step shows: s scenes, p pairs, c clips."""
        return self.plan.kinds[step % len(self.plan.kinds)]

    def batch(self, step: int) -> QuestionBatch:
        encoded, shown = self.encode(step)
        batch = collate(encoded, self.tiny.processor.pad_token_id)
        if not (self.plan.vision_rate or self.plan.claims):
            return QuestionBatch(batch)
        scenes = [one for one in shown if isinstance(one, Scene)]
        if scenes:
            labels = label_scenes(scenes, PATCH_SIZE, CELL_SIZE, self.plan.margin)
            return QuestionBatch(batch, labels.cell_owner, labels)
        clips = [one for one in shown if isinstance(one, Clip)]
        owners = [self._owners(clip, i) for clip in clips for i in range(len(clip.video.frames))]
        return QuestionBatch(batch, torch.from_numpy(np.stack(owners)))

    def _owners(self, clip: Clip, frame: int) -> np.ndarray:
        centres = [c for o in clip.objects if (c := o.center(frame)) is not None]
        side = len(clip.video.frames[frame]) // CELL_SIZE
        return cell_owners(centres, side, CELL_SIZE, self.plan.margin)

    def asked(self, step: int) -> list[tuple[Encoded, Scene, list[Branch]]]:
        """The scenes of a step, and what is asked about each in the order of its branches."""
        plan, processor = self.plan, self.tiny.processor
        rng = train_rng(self.seed, 100 + plan.stream, step)
        # The answer to these is long, and all rows of a step are as long as the longest.
        mix = replace(plan.mix, unknown=plan.mix.unknown * (step % UNKNOWN_EVERY == 0))
        capacity = ROW_LENGTH - CONFIG.num_visual_tokens - ROW_FRAME
        scenes = render_scenes(self.seed, plan.stream, step, self.batch_size, self.look)
        asked = []
        for scene in scenes:
            branches = make_branches(scene, rng, mix, plan.snap)
            branches = self._fitting(branches, rng, capacity)
            encoded = processor.encode_tree([scene.image], [b.messages for b in branches])
            asked.append((encoded, scene, branches))
        return asked

    def _fitting(
        self, branches: list[Branch], rng: np.random.Generator, capacity: int
    ) -> list[Branch]:
        """Branches in random order as far as they fit, or a quarter of a step would be padding.

        Args:
            capacity: tokens that they may have together.
        """
        tokenizer = self.tiny.processor.tokenizer
        fitting: list[Branch] = []
        for branch in (branches[i] for i in rng.permutation(len(branches))):
            texts = [str(message["content"]) for message in branch.messages]
            capacity -= sum(len(tokenizer.encode_text(text)) for text in texts) + BRANCH_FRAME
            if capacity < 0:
                break
            fitting.append(branch)
        return fitting

    def _pairs(self, step: int) -> tuple[list[Encoded], list[Scene]]:
        """Half as many pairs as a step has pictures."""
        processor = self.tiny.processor
        config = replace(self.plan.pairs, scene=self.look)
        rng, sprites = train_rng(self.seed, 200 + self.plan.stream, step), Sprites.load()
        encoded: list[Encoded] = []
        scenes: list[Scene] = []
        for _ in range(max(1, self.batch_size // 2)):
            pair = render_pair(rng, sprites, config)
            branches = ask_about_pair(pair, rng, config)
            images = [scene.image for scene in pair]
            encoded.append(processor.encode_tree(images, [b.messages for b in branches]))
            scenes += pair
        return encoded, scenes

    def _clips(self, step: int) -> tuple[list[Encoded], list[Clip]]:
        """Videos of as many frames, together, as a step has pictures, or a multiple of them."""
        processor = self.tiny.processor
        scene = replace(self.look, min_px=36, max_px=64)
        long = step // len(self.plan.kinds) % 2
        config = replace(self.plan.clips, scene=scene, max_frames=MAX_FRAMES if long else 8)
        rng, sprites = train_rng(self.seed, 300 + self.plan.stream, step), Sprites.load()
        encoded, clips, frames = [], [], 0
        while frames < self.plan.frames * self.batch_size:
            clip = render_clip(rng, sprites, config)
            clips.append(clip)
            branches = ask_about_clip(clip, rng, config, self.plan.snap)
            if self.plan.clip_capacity:
                branches = self._fitting(branches, rng, self.plan.clip_capacity)
            messages = [b.messages for b in branches]
            encoded.append(processor.encode_tree(None, messages, video=clip.video))
            frames += len(clip.video.frames)
        return encoded, clips

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        model, plan = self.tiny.model, self.plan

        def rates(lr: float, matrix_lr: float) -> OptimConfig:
            return OptimConfig(
                lr=lr, matrix_lr=matrix_lr, warmup_steps=50, final_ratio=plan.final_ratio
            )

        parts: dict[str, tuple[nn.Module, OptimConfig]] = {
            "llm": (model.llm, rates(plan.llm_rate, plan.llm_matrix_rate))
        }
        if plan.vision_rate:
            vision = rates(plan.vision_rate / 10, plan.vision_rate)
            parts |= {
                "vision": (model.vision_encoder, vision),
                "connector": (model.connector, vision),
            }
            parts["heads"] = (self.tiny.heads, rates(plan.vision_rate / 10, 0.0))
        return parts

    def begin(self) -> None:
        # On resume the checkpoint then replaces what this does to weights.
        for part in (self.tiny.model.vision_encoder, self.tiny.model.connector):
            part.requires_grad_(self.plan.vision_rate > 0)
        self.tiny.freeze_queries_and_keys(self.plan.first)
        for layer in self.tiny.grown_layers():
            layer.requires_grad_(self.plan.depth != "shallow")
        if self.plan.depth == "growing":
            self.tiny.grow()
        if self.plan.claims:
            heads = self.tiny.heads
            heads.claim.load_state_dict(heads.cell_object.state_dict())
        if self.plan.first:
            self.tiny.weaken_attention_between_words()

    def gradients(self, batch: QuestionBatch) -> dict[str, float | Tensor]:
        metrics = super().gradients(batch)
        gradient = self.tiny.model.llm.embed_tokens.weight.grad
        if self.plan.first and gradient is not None:
            gradient[self.tiny.noun_ids] = 0
        return metrics

    def loss(self, batch: QuestionBatch) -> tuple[Tensor, dict[str, float]]:
        questions, owners, labels = batch.questions.prepared(), batch.owners, batch.labels
        model, heads, plan = self.tiny.model, self.tiny.heads, self.plan
        assert questions.pixel_values is not None
        patches = self.tiny.patches(questions.pixel_values)
        tokens = model.connector(patches)
        # The tokens in place of the images: the heads learn from the same ones.
        questions = replace(questions, pixel_values=None, visual_tokens=tokens.flatten(0, 1))
        shallow = self.tiny.without_grown_layers() if plan.depth == "shallow" else nullcontext()
        with shallow, self.tiny.layer_outputs(CLAIM_LAYERS - 1, -1) as outputs:
            loss = model.loss(questions)
        kind = {1: "s", 2: "p"}.get(len(patches) // len(questions.input_ids), "c")
        metrics = {
            f"answers_{kind}": loss.item(),
            f"token_accuracy_{kind}": self._token_accuracy(outputs[-1], questions),
        }
        if plan.claims:
            assert owners is not None
            image_tokens = questions.input_ids == model.config.image_token_id
            hidden = outputs[CLAIM_LAYERS - 1][image_tokens].view(tokens.shape)
            claims, claim_metrics = heads.claim_loss(hidden, owners)
            loss = loss + CLAIM_WEIGHT * claims
            metrics |= claim_metrics
        if plan.vision_rate and labels is not None:
            # The visual tokens keep what the decoder reads off them.
            dense, dense_metrics = heads(patches, tokens, self.tiny.visual_targets(), labels)
            loss = loss + dense
            metrics |= dense_metrics
        return loss, metrics

    @torch.no_grad()
    def _token_accuracy(self, hidden: Tensor, batch: Batch) -> float:
        """How many labels the decoder would write, of the last layer's output (B, T, D)."""
        llm, rows = self.tiny.model.llm, batch.loss_rows
        assert rows is not None and batch.labels is not None
        logits = llm.head(llm.norm(hidden.flatten(0, 1)[rows]))
        return (logits.argmax(-1) == batch.labels.flatten()[rows + 1]).float().mean().item()

    def after_step(self) -> None:
        self.tiny.clear_placeholder()

    def evaluate(self) -> dict[str, float]:
        if self.scores is None:
            return {}
        return self.scores(self.tiny.model, self.tiny.processor)
