"""The recipe of ``tiny``: a Molmo2 model of 7.6 M parameters, trained from scratch on emoji scenes.

Stages, in the order in which each makes the next one easy:

    crops     vision encoder: name the emoji of a small crop
    varied    the same with drawings stretched, sheared and recoloured, as in all that follows:
              what is known by heart gives way to what other artists draw alike
    mosaics   the same for each patch of nine emoji side by side: patches learn to look near by
    scenes    + connector: every visual token points along the embedding of the noun centred in its
              cell, and holds size and position of the object
    presence  decoder on frozen vision: many short yes/no questions a picture teach it to look for
              the noun that was asked
    coarse    decoder, all questions about one picture, points on a grid of 50 thousandths; not at
              twice the rate: the decoder would learn to speak and no longer look
    fine      all weights, also pairs of pictures and videos, until the rates are near zero
    finish    the same once more, the decoder's matrices with Muon: it learns more from a step than
              AdamW, and by now has nothing to wipe out
    settle    vision alone: visual tokens settle which of them an object between two cells counts in
    last      as finish, and two layers of the decoder wake that did nothing before
    agree     the same once more; image tokens inside of the decoder, where they see each other,
              learn which of them counts an object: what settle leaves open, a tenth of the objects
    several   decoder alone at lower rates: pictures with several things of a kind beside others,
              and videos, where most of what is still wrong is asked
    again     as several, the encoder with it: what its tokens name wrongly is counted wrongly
    counts    the same once more, mostly pictures: fuller ones, counted, with drawings varied less

Artwork: the vendors of the group "seen", line drawings and icons of the group "extra", and the
seen drawings with dark outlines ("inked"), so that shapes are learned and not one way of drawing.

What was measured on the way is in docs/tiny.md and docs/log.md.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.batch import IGNORED_LABEL, Batch
from nanomolmo2.data.emoji.clips import Clip, ClipConfig, ask_about_clip, render_clip
from nanomolmo2.data.emoji.pairs import PairConfig, ask_about_pair, render_pair
from nanomolmo2.data.emoji.questions import BranchMix, make_branches
from nanomolmo2.data.emoji.scenes import (
    Scene,
    SceneConfig,
    render_crop,
    render_mosaic,
    render_scene,
    train_rng,
)
from nanomolmo2.data.emoji.sprites import STYLE_GROUPS, Sprites
from nanomolmo2.data.emoji.vocabulary import (
    build_tokenizer,
    noun_ids,
    plural_ids,
)
from nanomolmo2.data.example import Branch
from nanomolmo2.models import NanoMolmo2, NanoMolmo2Config, preset
from nanomolmo2.models.kernels import bfloat16_products
from nanomolmo2.models.language_model import Attention, DecoderLayer
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.processor import Encoded, Processor, ProcessorConfig, VideoConfig
from nanomolmo2.processor.tokenizer import Tokenizer
from nanomolmo2.training.loop import LoopConfig, Stage, run
from nanomolmo2.training.optim import OptimConfig
from nanomolmo2.training.vision_heads import (
    FEATURE_RMS,
    SceneLabels,
    VisionHeads,
    cell_owners,
    label_scenes,
    scale_loss,
)

CONFIG = preset("tiny")
SLEEPERS = (2, 5)  # layers of the decoder that pass everything on until a plan wakes them
PATCH_SIZE, POOLING_SIZE = CONFIG.vision_config.patch_size, CONFIG.connector.pooling_size
CELL_SIZE = PATCH_SIZE * POOLING_SIZE  # of a visual token
CROP_SIZE = 64
CROP_RATES = OptimConfig(lr=2e-3, matrix_lr=0.02)  # of the encoder
# The vendors twice: they are drawn twice as often as a style of the other groups.
STYLES = tuple(s for group in ("seen", "seen", "extra", "inked") for s in STYLE_GROUPS[group])
SCENES = SceneConfig(styles=STYLES, variation=3.0)
VARIED_RATES = OptimConfig(lr=1e-3, matrix_lr=0.01, warmup_steps=20, final_ratio=0.02)
ROW_FRAME, BRANCH_FRAME = 4, 3  # most tokens around the pictures, and around a branch
ROW_LENGTH = 384  # tokens of a scene and its questions: what goes beyond is left out
WORDS_PART = 0.8  # of the embeddings, which have a length of 1.6
UNKNOWN_EVERY = 10  # steps that ask for things without emoji
MARGIN = 0.25  # of a cell: so near to a line, centres belong to either side
CLAIM_LAYERS = 3  # of the decoder: behind them, image tokens have agreed who claims an object
CLAIM_WEIGHT = 2.0
MAX_FRAMES = 16  # of a video; longer ones are thinned out


def tiny_processor() -> Processor:
    """Processor of ``tiny``: one 192 px picture is 36 image tokens, Molmo2's chat format."""
    config = ProcessorConfig.molmo2(
        image_size=CONFIG.vision_config.image_size,
        resample="bilinear",
        image_tokens=CONFIG.num_visual_tokens,
        video=VideoConfig(max_frames=MAX_FRAMES),
    )
    return Processor(config, Tokenizer(build_tokenizer()))


class Learner(nn.Module):
    """The model and the heads that only training needs."""

    def __init__(
        self,
        seed: int,
        config: NanoMolmo2Config = CONFIG,
        scenes: SceneConfig = SCENES,
        *,
        matcher: bool = True,
    ) -> None:
        """
        Args:
            config: ``tiny``'s, but for what changes no shape.
            scenes: what the pictures look like that it learns from.
            matcher: whether attention starts as a search for equal content; changes nothing else.
        """
        super().__init__()
        self.scenes = scenes
        self.processor = tiny_processor()
        torch.manual_seed(seed)
        self.model = NanoMolmo2(config)
        torch.manual_seed(seed + 1)  # from here on numbers depend on the vocabulary no more
        self.heads = VisionHeads(config.vision_config.hidden_size, config.llm_config.hidden_size)
        tokenizer = build_tokenizer()
        self.noun_ids = noun_ids(tokenizer)
        self.plural_ids = plural_ids(tokenizer)
        self._initialise()
        if matcher:
            self._match()
        for layer in self.sleepers():
            put_to_sleep(layer)

    @torch.no_grad()
    def _initialise(self) -> None:
        embedding = self.model.llm.embed_tokens.weight
        nn.init.normal_(embedding, std=0.1)  # row by row, nouns first
        self.set_nouns(embedding[self.noun_ids])
        self.clear_placeholder()

    @torch.no_grad()
    def set_nouns(self, rows: Tensor) -> None:
        """Give nouns their embeddings (C, D), plurals the same: "wolves" starts as "wolf"."""
        embedding = self.model.llm.embed_tokens.weight
        embedding[self.noun_ids] = rows
        for category, plural in self.plural_ids.items():
            embedding[plural] = rows[category]

    @torch.no_grad()
    def _match(self) -> None:
        """Start queries as the keys of their group: attention begins as a search for the same."""
        for module in self.model.llm.modules():
            if isinstance(module, Attention):
                heads = module.k_proj.weight.unflatten(0, (-1, module.head_dim))
                group = module.q_proj.out_features // module.k_proj.out_features
                module.q_proj.weight.copy_(heads.repeat_interleave(group, dim=0).flatten(0, 1))

    @torch.no_grad()
    def clear_placeholder(self) -> None:
        """Hold the image token's embedding at zero: adding to it and replacing it are then one."""
        self.model.llm.embed_tokens.weight[self.model.config.image_token_id] = 0

    @torch.no_grad()
    def set_words_apart(self) -> None:
        """Let words attend to words less than to pictures from the start.

        A noun's query fits the key of its own token better than that of its emoji, so at first a
        question hardly looks at the picture. So all words get a part in common, and in each head
        one number of the slowest rotary pair holds it, negative in keys: that takes between 1 and
        2 off a word's score for words. Visual tokens are left as they are: what they have in common
        is in the background more than in the objects.
        """
        embedding = self.model.llm.embed_tokens.weight
        of_words = self.words_direction()
        embedding += WORDS_PART * of_words
        self.clear_placeholder()
        for module in self.model.llm.modules():
            if isinstance(module, Attention):
                slowest = module.head_dim // 2 - 1
                for projection, part in ((module.k_proj, -0.5), (module.q_proj, 0.31)):
                    rows = projection.weight.unflatten(0, (-1, module.head_dim))
                    rows[:, slowest] = part * of_words

    def words_direction(self) -> Tensor:
        """(D,) of length 1: `set_words_apart` adds it, `WORDS_PART` long, to all embeddings."""
        width = self.model.llm.embed_tokens.weight.shape[1]
        return F.normalize(torch.randn(width, generator=_seeded(5)), dim=0)

    def sleepers(self) -> list[DecoderLayer]:
        """The layers `SLEEPERS`."""
        return [self.model.llm.layers[i] for i in SLEEPERS]  # type: ignore[misc]

    @contextmanager
    def without_sleepers(self) -> Iterator[None]:
        """Leave sleeping layers, a third of all, out of what is computed: they add nothing."""
        llm = self.model.llm
        layers = llm.layers
        llm.layers = nn.ModuleList(own for i, own in enumerate(layers) if i not in SLEEPERS)
        try:
            yield
        finally:
            llm.layers = layers

    def wake(self) -> None:
        """Let sleeping layers start as the ones before them, but for what they add: nothing yet."""
        for i, layer in zip(SLEEPERS, self.sleepers(), strict=True):
            layer.load_state_dict(self.model.llm.layers[i - 1].state_dict())
            put_to_sleep(layer)

    def freeze_matcher(self, frozen: bool) -> None:
        """Keep (or let go) what finds equal content: Adam's first steps would wipe it out."""
        for module in self.model.llm.modules():
            if isinstance(module, Attention):
                for part in (module.q_proj, module.k_proj, module.q_norm, module.k_norm):
                    part.requires_grad_(not frozen)

    def compile_decoder(self) -> None:
        """Compile its blocks: a third less time a step. The encoder's gain nothing."""
        for layer in self.model.llm.layers:
            layer.compile(dynamic=True)  # rows of pairs and videos have many lengths

    def noun_embeddings(self) -> Tensor:
        """(C, D) rows of the nouns."""
        return self.model.llm.embed_tokens.weight[self.noun_ids]

    def visual_targets(self) -> Tensor:
        """(C, D) what visual tokens are to point along where a noun's emoji is."""
        return self.noun_embeddings().detach()

    def patches(self, pixel_values: Tensor) -> Tensor:
        """(B, N, Dv) features of the encoder's last block."""
        return self.model.vision_encoder(pixel_values, layers=(-1,))[0]


def put_to_sleep(layer: DecoderLayer) -> None:
    """Let a layer add nothing to what comes in."""
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        nn.init.zeros_(projection.weight)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalise(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), as the processor does it at the same size."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def labelled(scenes: list[Scene], margin: float = 0.0) -> tuple[Tensor, SceneLabels]:
    """Pictures (B, 3, H, W) and what `VisionHeads` is to find in them; see `label_scenes`."""
    images = normalise(np.stack([scene.image for scene in scenes]))
    return images, label_scenes(scenes, PATCH_SIZE, CELL_SIZE, margin)


class CropStage(Stage):
    """Name the emoji of a crop."""

    name, stream = "crops", 0

    def __init__(
        self,
        learner: Learner,
        seed: int,
        steps: int,
        batch_size: int = 128,
        rates: OptimConfig = CROP_RATES,
    ) -> None:
        self.learner, self.seed, self.steps, self.batch_size = learner, seed, steps, batch_size
        self.rates = rates
        self.scene = replace(learner.scenes, variation=1.0)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rng, sprites = train_rng(self.seed, self.stream, step), Sprites.load()
        crops = [render_crop(rng, sprites, self.scene, CROP_SIZE) for _ in range(self.batch_size)]
        images = normalise(np.stack([image for image, _, _ in crops]))
        return images, torch.tensor([category for _, category, _ in crops])

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        return {
            "vision": (self.learner.model.vision_encoder, self.rates),
            "heads": (self.learner.heads.patch_class, OptimConfig(lr=2e-3, matrix_lr=0.0)),
        }

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        images, categories = batch
        patches = self.learner.patches(images)
        logits = self.learner.heads.classify(patches.mean(dim=1))[:, 1:]  # 0 is the background
        accuracy = (logits.argmax(-1) == categories).float().mean()
        loss = F.cross_entropy(logits, categories) + 0.1 * scale_loss(patches, FEATURE_RMS)
        return loss, {"accuracy": accuracy.item()}


class VariedStage(CropStage):
    """The same with the drawings varied as in all stages behind it."""

    name, stream = "varied", 6

    def __init__(self, learner: Learner, seed: int, steps: int, batch_size: int = 128) -> None:
        super().__init__(learner, seed, steps, batch_size, VARIED_RATES)
        self.scene = learner.scenes


class MosaicStage(Stage):
    """Name what each patch of a mosaic of emoji shows."""

    name = "mosaics"

    def __init__(self, learner: Learner, seed: int, steps: int, batch_size: int = 32) -> None:
        self.learner, self.seed, self.steps, self.batch_size = learner, seed, steps, batch_size

    def batch(self, step: int) -> tuple[Tensor, SceneLabels]:
        rng, sprites = train_rng(self.seed, 7, step), Sprites.load()
        mosaics = [render_mosaic(rng, sprites, self.learner.scenes) for _ in range(self.batch_size)]
        return labelled(mosaics)

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        model, heads = self.learner.model, self.learner.heads
        rates = OptimConfig(lr=2e-3, matrix_lr=0.02, warmup_steps=20, final_ratio=0.05)
        return {
            "vision": (model.vision_encoder, rates),
            "heads": (heads.patch_class, replace(rates, matrix_lr=0.0)),
        }

    def loss(self, batch: tuple[Tensor, SceneLabels]) -> tuple[Tensor, dict[str, float]]:
        images, labels = batch
        patches = self.learner.patches(images)
        loss, metrics = self.learner.heads.patch_loss(patches, labels)
        return loss + 0.1 * scale_loss(patches, FEATURE_RMS), metrics


def render_scenes(
    seed: int, stage: int, step: int, batch_size: int, config: SceneConfig = SCENES
) -> list[Scene]:
    """The scenes of a step."""
    rng, sprites = train_rng(seed, stage, step), Sprites.load()
    return [render_scene(rng, sprites, config) for _ in range(batch_size)]


class SceneStage(Stage):
    """Find and name everything in a scene, without words yet."""

    name = "scenes"

    def __init__(self, learner: Learner, seed: int, steps: int, batch_size: int = 32) -> None:
        self.learner, self.seed, self.steps, self.batch_size = learner, seed, steps, batch_size

    def batch(self, step: int) -> tuple[Tensor, SceneLabels]:
        scenes = render_scenes(self.seed, 1, step, self.batch_size, self.learner.scenes)
        return labelled(scenes)

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        model = self.learner.model
        return {
            "vision": (model.vision_encoder, OptimConfig(lr=5e-4, matrix_lr=0.005)),
            "connector": (model.connector, OptimConfig(lr=1e-3, matrix_lr=0.005)),
            "heads": (self.learner.heads, OptimConfig(lr=2e-3, matrix_lr=0.0)),
        }

    def loss(self, batch: tuple[Tensor, SceneLabels]) -> tuple[Tensor, dict[str, float]]:
        images, labels = batch
        patches = self.learner.patches(images)
        tokens = self.learner.model.connector(patches)
        return self.learner.heads(patches, tokens, self.learner.visual_targets(), labels)


class SettleStage(SceneStage):
    """The same with mosaics in turn; tokens settle which of them an object's is.

    An object whose centre is near the line between two cells may count in either.
    """

    name = "settle"

    def batch(self, step: int) -> tuple[Tensor, SceneLabels]:
        rng, sprites, look = train_rng(self.seed, 9, step), Sprites.load(), self.learner.scenes
        draw = render_mosaic if step % 2 else render_scene
        scenes = [draw(rng, sprites, look) for _ in range(self.batch_size)]
        return labelled(scenes, MARGIN)

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        rates = OptimConfig(lr=1e-3, matrix_lr=0.008, warmup_steps=50, final_ratio=0.05)
        model = self.learner.model
        return {
            "vision": (model.vision_encoder, replace(rates, lr=5e-4)),
            "connector": (model.connector, rates),
            "heads": (self.learner.heads, replace(rates, lr=2e-3, matrix_lr=0.0)),
        }


@dataclass(frozen=True)
class QuestionPlan:
    """What a question stage asks, and who learns at which rate.

    The decoder learns with AdamW alone at first: Muon's full-size steps would wipe out its
    initialisation while there is not yet anything to learn from.
    """

    name: str
    stream: int
    mix: BranchMix
    snap: int
    llm_rate: float
    llm_matrix_rate: float = 0.0  # Muon's; 0 = AdamW for matrices too
    vision_rate: float = 0.0  # Muon's; AdamW's is a tenth. 0 = vision and connector are frozen
    final_ratio: float = 0.3
    kinds: str = "s"  # what the steps show in turn: scenes, pairs, clips
    first: bool = False  # the first that the decoder learns: its matcher is made ready, and frozen
    margin: float = 0.0  # of `label_scenes`
    sleepers: Literal["asleep", "waking", "awake"] = "asleep"  # the layers `SLEEPERS`
    claims: bool = False  # image tokens learn to agree inside of the decoder
    pairs: PairConfig = field(default_factory=PairConfig)  # but for its scenes
    clips: ClipConfig = field(default_factory=ClipConfig)  # but for its scenes and most frames
    clip_room: int = 0  # tokens of the questions about a video, the rest is left out; 0 = all
    frames: int = 1  # of the videos of a step, for each picture of other steps
    look: Mapping[str, Any] = field(default_factory=dict)  # how its pictures differ from others


class QuestionBatch(NamedTuple):
    """Questions, and what is where in their pictures, as far as a plan teaches that too."""

    questions: Batch
    owners: Tensor | None = None  # (I, n) `SceneLabels.cell_owner` of all pictures and frames
    labels: SceneLabels | None = None  # none of videos


class QuestionStage(Stage):
    """Answer questions about scenes: message trees of many short branches a picture."""

    def __init__(
        self,
        learner: Learner,
        seed: int,
        steps: int,
        plan: QuestionPlan,
        batch_size: int = 32,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.learner, self.seed, self.steps, self.plan = learner, seed, steps, plan
        self.batch_size, self.name, self.scores = batch_size, plan.name, evaluate
        self.look = replace(learner.scenes, **plan.look)

    def encode(self, step: int) -> tuple[list[Encoded], Sequence[Scene | Clip]]:
        """The examples of a step, and the pictures or the videos in them."""
        kind = self.plan.kinds[step % len(self.plan.kinds)]
        if kind == "c":
            return self._clips(step)
        return self._pairs(step) if kind == "p" else self._scenes(step)

    def batch(self, step: int) -> QuestionBatch:
        encoded, shown = self.encode(step)
        batch = collate(encoded, self.learner.processor.pad_token_id)
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

    def _scenes(self, step: int) -> tuple[list[Encoded], list[Scene]]:
        plan, processor = self.plan, self.learner.processor
        rng = train_rng(self.seed, 100 + plan.stream, step)
        # The answer to these is long, and all rows of a step are as long as the longest.
        mix = replace(plan.mix, unknown=plan.mix.unknown * (step % UNKNOWN_EVERY == 0))
        room = ROW_LENGTH - CONFIG.num_visual_tokens - ROW_FRAME
        scenes = render_scenes(self.seed, plan.stream, step, self.batch_size, self.look)
        encoded = []
        for scene in scenes:
            branches = make_branches(scene, rng, mix, plan.snap)
            branches = self._fitting(branches, rng, room)
            encoded.append(processor.encode_tree([scene.image], [b.messages for b in branches]))
        return encoded, scenes

    def _fitting(self, branches: list[Branch], rng: np.random.Generator, room: int) -> list[Branch]:
        """Branches in random order as far as there is room, or a quarter of a step is padding."""
        tokenizer = self.learner.processor.tokenizer
        fitting: list[Branch] = []
        for branch in (branches[i] for i in rng.permutation(len(branches))):
            texts = [str(message["content"]) for message in branch.messages]
            room -= sum(len(tokenizer.encode_text(text)) for text in texts) + BRANCH_FRAME
            if room < 0:
                break
            fitting.append(branch)
        return fitting

    def _pairs(self, step: int) -> tuple[list[Encoded], list[Scene]]:
        """Half as many pairs as a step has pictures."""
        processor = self.learner.processor
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
        processor = self.learner.processor
        scene = replace(self.look, min_px=36, max_px=64)
        long = step // len(self.plan.kinds) % 2
        config = replace(self.plan.clips, scene=scene, max_frames=MAX_FRAMES if long else 8)
        rng, sprites = train_rng(self.seed, 300 + self.plan.stream, step), Sprites.load()
        encoded, clips, frames = [], [], 0
        while frames < self.plan.frames * self.batch_size:
            clip = render_clip(rng, sprites, config)
            clips.append(clip)
            branches = ask_about_clip(clip, rng, config, self.plan.snap)
            if self.plan.clip_room:
                branches = self._fitting(branches, rng, self.plan.clip_room)
            messages = [b.messages for b in branches]
            encoded.append(processor.encode_tree(None, messages, video=clip.video))
            frames += len(clip.video.frames)
        return encoded, clips

    def components(self) -> dict[str, tuple[nn.Module, OptimConfig]]:
        model, plan = self.learner.model, self.plan

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
            parts["heads"] = (self.learner.heads, rates(plan.vision_rate / 10, 0.0))
        return parts

    def begin(self) -> None:
        # On resume the checkpoint then replaces what this does to weights.
        for part in (self.learner.model.vision_encoder, self.learner.model.connector):
            part.requires_grad_(self.plan.vision_rate > 0)
        self.learner.freeze_matcher(self.plan.first)
        for layer in self.learner.sleepers():
            layer.requires_grad_(self.plan.sleepers != "asleep")
        if self.plan.sleepers == "waking":
            self.learner.wake()
        if self.plan.claims:
            heads = self.learner.heads
            heads.claim.load_state_dict(heads.cell_object.state_dict())
        if self.plan.first:
            self.learner.set_words_apart()

    def gradients(self, batch: QuestionBatch) -> dict[str, float]:
        metrics = super().gradients(batch)
        gradient = self.learner.model.llm.embed_tokens.weight.grad
        if self.plan.first and gradient is not None:
            gradient[self.learner.noun_ids] = 0
        return metrics

    def loss(self, batch: QuestionBatch) -> tuple[Tensor, dict[str, float]]:
        questions, owners, labels = batch
        model, heads = self.learner.model, self.learner.heads
        inputs = questions.tensors()
        patches = self.learner.patches(inputs.pop("pixel_values"))
        tokens = model.connector(patches)
        asleep = self.plan.sleepers == "asleep"
        with self.learner.without_sleepers() if asleep else nullcontext():
            logits, loss, states = model(**inputs, visual_tokens=tokens, output_hidden_states=True)
        kind = {1: "s", 2: "p"}.get(patches.shape[0] // inputs["input_ids"].shape[0], "c")
        metrics = {f"answers_{kind}": loss.item()}
        assert questions.labels is not None
        with torch.no_grad():
            targets = questions.labels[:, 1:]
            known = targets != IGNORED_LABEL
            right = logits[:, :-1].argmax(-1)[known] == targets[known]
            metrics[f"token_accuracy_{kind}"] = right.float().mean().item()
        if self.plan.claims:
            assert owners is not None
            image_tokens = inputs["input_ids"] == model.config.image_token_id
            hidden = states[CLAIM_LAYERS][image_tokens].view(tokens.shape)
            claims, claim_metrics = heads.claim_loss(hidden, owners)
            loss = loss + CLAIM_WEIGHT * claims
            metrics |= claim_metrics
        if self.plan.vision_rate and labels is not None:
            # The visual tokens keep what the decoder reads off them.
            dense, dense_metrics = heads(patches, tokens, self.learner.visual_targets(), labels)
            loss = loss + dense
            metrics |= dense_metrics
        return loss, metrics

    def after_step(self) -> None:
        self.learner.clear_placeholder()

    def evaluate(self) -> dict[str, float]:
        if self.scores is None:
            return {}
        return self.scores(self.learner.model, self.learner.processor)


PRESENCE = QuestionPlan(
    name="presence",
    stream=2,
    mix=BranchMix(16, *(0,) * 9, bare=1.0),
    snap=50,
    llm_rate=1e-3,
    first=True,
)
COARSE = QuestionPlan(
    name="coarse",
    stream=3,
    mix=BranchMix(presence=3, count=2, number=1, point=4, spatial=1, at=2, unknown=1),
    snap=50,
    llm_rate=1e-3,
)
FINE = QuestionPlan(
    name="fine",
    stream=4,
    mix=BranchMix(presence=4, count=3, number=1, point=3, spatial=3, unknown=1),
    snap=50,
    llm_rate=6e-4,
    vision_rate=0.0015,
    final_ratio=0.02,
    kinds="sspssc",
)

FINISH = QuestionPlan(
    name="finish",
    stream=8,
    mix=BranchMix(
        presence=3, count=3, number=1, point=3, spatial=3, size=2, unknown=1, repeated_first=0.8
    ),
    snap=50,
    llm_rate=5e-4,
    llm_matrix_rate=0.006,
    vision_rate=0.001,
    final_ratio=0.02,
    kinds="sspsc",
)
LAST = replace(
    FINISH,
    name="last",
    stream=10,
    mix=replace(FINISH.mix, presence=2, point=4, points=2),
    vision_rate=0.002,
    kinds="spsc",
    margin=MARGIN,
    sleepers="waking",
    pairs=PairConfig(more=6, difference=3),
)
AGREE = replace(LAST, name="agree", stream=11, sleepers="awake", claims=True)
SEVERAL = QuestionPlan(
    name="several",
    stream=12,
    mix=BranchMix(presence=2, count=5, number=1, point=3, spatial=3, unknown=1, repeated_first=1.0),
    snap=50,
    llm_rate=2e-4,
    llm_matrix_rate=0.0025,
    final_ratio=0.02,
    kinds="scspscsc",
    sleepers="awake",
    pairs=LAST.pairs,
    clips=ClipConfig(track=4, appears=3, video_point=3),
    clip_room=896,
    frames=2,
    look={"repeats": 0.9, "min_objects": 2, "variation": 2.0},
)
AGAIN = replace(
    SEVERAL,
    name="again",
    stream=13,
    mix=replace(SEVERAL.mix, number=2, spatial=4, size=2),
    llm_rate=3e-4,
    llm_matrix_rate=0.004,
    vision_rate=0.001,
    margin=MARGIN,
    claims=True,
    look={"repeats": 0.85, "min_objects": 2, "variation": 2.5},
)
COUNTS = replace(
    AGAIN,
    name="counts",
    stream=14,
    mix=replace(SEVERAL.mix, count=6, number=2, point=4),
    llm_rate=1.5e-4,
    llm_matrix_rate=0.002,
    vision_rate=0.0005,
    kinds="ssscsssp",
    look={"repeats": 0.9, "min_objects": 3, "variation": 1.5},
)

# To tell a place in one digit a side, of ten, is learned in minutes, and good enough to hit most
# things. Vision stays as the scenes stage left it: steps are shorter, so there are more of them.
SMALL_MIX = BranchMix(
    presence=2, count=2, number=0, point=5, points=2, spatial=0, size=0, at=2, unknown=1
)
SMALL_COARSE = replace(COARSE, mix=SMALL_MIX, snap=100)
SMALL_FINISH = replace(FINISH, mix=SMALL_MIX, snap=100, vision_rate=0.0, kinds="s")


@dataclass(frozen=True)
class Scale:
    """Steps of each stage, in order, pictures a step (four times as many crops), their look.

    ``plans``: question stages that are otherwise than at full scale.
    ``compiled``: whether it is long enough to compile for, where there is a compiler.
    """

    crops: int
    varied: int
    mosaics: int
    scenes: int
    presence: int
    coarse: int
    fine: int
    finish: int
    settle: int
    last: int
    agree: int
    several: int
    again: int
    counts: int
    batch_size: int = 32
    look: SceneConfig = SCENES
    plans: tuple[QuestionPlan, ...] = ()
    compiled: bool = True


SCALES: dict[str, Scale] = {
    "full": Scale(
        *(2500, 1500, 1000, 800),
        presence=450,
        coarse=1000,
        fine=1200,
        finish=1300,
        settle=1400,
        last=1950,
        agree=1450,
        several=540,
        again=2100,
        counts=350,
    ),
    # Smaller steps, so that there are more of them; one artist, single pictures: all six and the
    # rest are not learned so soon.
    "small": Scale(
        *(0, 0, 350, 220),
        presence=100,
        coarse=120,
        fine=0,
        finish=560,
        settle=0,
        last=0,
        agree=0,
        several=0,
        again=0,
        counts=0,
        batch_size=16,
        look=SceneConfig(styles=("fluent-3d",)),
        plans=(SMALL_COARSE, SMALL_FINISH),
    ),
    "smoke": Scale(
        *(2, 2, 2, 2),
        presence=2,
        coarse=2,
        fine=2,
        finish=2,
        settle=2,
        last=4,
        agree=4,
        several=4,
        again=4,
        counts=4,
        batch_size=4,
        compiled=False,
    ),
}

Evaluate = Callable[[NanoMolmo2, Processor], dict[str, float]]


def _sizes(scale: str) -> Scale:
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
    return SCALES[scale]


def tiny_stages(
    learner: Learner, seed: int, scale: str, evaluate: Evaluate | None = None
) -> list[Stage]:
    """All stages of a run."""
    sizes = _sizes(scale)
    stages: list[Stage] = [
        CropStage(learner, seed, sizes.crops, 4 * sizes.batch_size),
        VariedStage(learner, seed, sizes.varied, 4 * sizes.batch_size),
        MosaicStage(learner, seed, sizes.mosaics, sizes.batch_size),
        SceneStage(learner, seed, sizes.scenes, sizes.batch_size),
    ]

    own = {plan.name: plan for plan in sizes.plans}

    def asks(plan: QuestionPlan) -> Stage:
        plan = own.get(plan.name, plan)
        steps = getattr(sizes, plan.name)
        return QuestionStage(learner, seed, steps, plan, sizes.batch_size, evaluate)

    stages += [asks(plan) for plan in (PRESENCE, COARSE, FINE, FINISH)]
    settle = SettleStage(learner, seed, sizes.settle, sizes.batch_size)
    return [*stages, settle, *map(asks, (LAST, AGREE, SEVERAL, AGAIN, COUNTS))]


def train_tiny(
    out: str | Path,
    *,
    scale: str = "full",
    seed: int = 0,
    resume: bool = False,
    config: LoopConfig | None = None,
    evaluate: Evaluate | None = None,
) -> bool:
    """Train ``tiny`` from nothing in ``out``; when done, write the model to ``out/model`` in bf16.

    Args:
        evaluate: scores of the model, logged behind each stage that asks questions.
    Returns: whether the run finished (it may be stopped early by ``config.stop_after``).
    """
    out = Path(out)
    learner = Learner(seed, scenes=_sizes(scale).look)
    stages = tiny_stages(learner, seed, scale, evaluate)
    if _sizes(scale).compiled and has_compiler():
        learner.compile_decoder()
    with bfloat16_products():
        finished = run(learner, stages, out, config, resume=resume)
    if finished:
        save_tiny(learner, out / "model")
    return finished


def has_compiler() -> bool:
    """Whether there are a C++ compiler and Python's headers: ``torch.compile`` needs them."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.exists() and any(name and shutil.which(name) for name in names)


def save_tiny(learner: Learner, folder: Path) -> None:
    """Write the model, without the heads of training, in bf16."""
    learner.model.to(torch.bfloat16).save_pretrained(folder, processor=learner.processor)
