"""What `tiny`'s stages train: the model, beside it the heads that only training needs.

Its decoder starts as a search for equal content (queries are initialised as keys), and with a third
of its layers adding nothing: they are left out of what is computed until a stage grows the depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.emoji.heads import SceneLabels, VisionHeads, label_scenes
from nanomolmo2.emoji.scenes import Scene, SceneConfig
from nanomolmo2.emoji.sprites import STYLE_GROUPS
from nanomolmo2.emoji.vocabulary import build_tokenizer, noun_ids, plural_ids
from nanomolmo2.models import NanoMolmo2, NanoMolmo2Config, preset
from nanomolmo2.models.language_model import Attention, DecoderLayer
from nanomolmo2.processor.processor import Processor, ProcessorConfig, VideoConfig
from nanomolmo2.processor.tokenizer import Tokenizer

CONFIG = replace(preset("tiny"), finder_dim=None)  # it learns to find later, in `things`
GROWN_LAYERS = (2, 5)  # of the decoder: they pass everything on until a plan grows the depth
PATCH_SIZE, POOLING_SIZE = CONFIG.vision_config.patch_size, CONFIG.connector.pooling_size
CELL_SIZE = PATCH_SIZE * POOLING_SIZE  # of a visual token
# The vendors twice: they are drawn twice as often as a style of the other groups.
STYLES = tuple(s for group in ("seen", "seen", "extra", "inked") for s in STYLE_GROUPS[group])
SCENES = SceneConfig(styles=STYLES, variation=3.0)
WORD_DIRECTION = 0.8  # length of what all words have in common; embeddings have a length of 1.6
MAX_FRAMES = 16  # of a video; longer ones are thinned out


def tiny_processor() -> Processor:
    """Processor of ``tiny``: one 192 px image is 36 image tokens, Molmo2's chat format."""
    config = ProcessorConfig.molmo2(
        image_size=CONFIG.vision_config.image_size,
        resample="bilinear",
        image_tokens=CONFIG.num_visual_tokens,
        video=VideoConfig(max_frames=MAX_FRAMES),
        trained_on=("emoji",),
    )
    return Processor(config, Tokenizer(build_tokenizer()))


class TinyForTraining(nn.Module):
    """The model and the heads that only training needs."""

    def __init__(
        self,
        seed: int,
        config: NanoMolmo2Config = CONFIG,
        scenes: SceneConfig = SCENES,
        *,
        queries_as_keys: bool = True,
    ) -> None:
        """
        Args:
            config: ``tiny``'s, but for what changes no shape.
            scenes: what the images look like that it learns from.
            queries_as_keys: whether attention starts as a search for equal content; changes nothing
                else.
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
        if queries_as_keys:
            self._initialise_queries_as_keys()
        for layer in self.grown_layers():
            zero_residual_output(layer)

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
    def _initialise_queries_as_keys(self) -> None:
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
    def weaken_attention_between_words(self) -> None:
        """Let words attend to words less than to images from the start.

        A noun's query fits the key of its own token better than that of its emoji, so at first a
        question hardly looks at the image. So all words get a part in common, and in each head
        one number of the slowest rotary pair holds it, negative in keys: that takes between 1 and
        2 off a word's score for words. Visual tokens are left as they are: what they have in common
        is in the background more than in the objects.
        """
        embedding = self.model.llm.embed_tokens.weight
        of_words = self.words_direction()
        embedding += WORD_DIRECTION * of_words
        self.clear_placeholder()
        for module in self.model.llm.modules():
            if isinstance(module, Attention):
                slowest = module.head_dim // 2 - 1
                for projection, part in ((module.k_proj, -0.5), (module.q_proj, 0.31)):
                    rows = projection.weight.unflatten(0, (-1, module.head_dim))
                    rows[:, slowest] = part * of_words

    def words_direction(self) -> Tensor:
        """(D,) of length 1: `weaken_attention_between_words` adds it to all embeddings, of length
        `WORD_DIRECTION`.
        """
        width = self.model.llm.embed_tokens.weight.shape[1]
        return F.normalize(torch.randn(width, generator=_seeded(5)), dim=0)

    def grown_layers(self) -> list[DecoderLayer]:
        """The decoder layers `GROWN_LAYERS`, zero-initialised: they add nothing until `grow`."""
        return [self.model.llm.layers[i] for i in GROWN_LAYERS]  # type: ignore[misc]

    @contextmanager
    def without_grown_layers(self) -> Iterator[None]:
        """Leave layers that still add nothing, a third of all, out of what is computed."""
        llm = self.model.llm
        layers = llm.layers
        llm.layers = nn.ModuleList(own for i, own in enumerate(layers) if i not in GROWN_LAYERS)
        try:
            yield
        finally:
            llm.layers = layers

    @contextmanager
    def layer_outputs(self, *indices: int) -> Iterator[dict[int, Tensor]]:
        """What some decoder layers gave in the last pass, by the given indices.

        The layers are wrapped for as long. A forward hook would become part of what is compiled.
        """
        llm, outputs = self.model.llm, dict[int, Tensor]()
        layers = llm.layers
        llm.layers = nn.ModuleList(layers)
        for index in indices:
            llm.layers[index] = _KeepOutput(layers[index], outputs, index)
        try:
            yield outputs
        finally:
            llm.layers = layers

    def grow(self) -> None:
        """Start the `grown_layers` as the layers before them, but for what they add, nothing."""
        for i, layer in zip(GROWN_LAYERS, self.grown_layers(), strict=True):
            layer.load_state_dict(self.model.llm.layers[i - 1].state_dict())
            zero_residual_output(layer)

    def freeze_queries_and_keys(self, frozen: bool) -> None:
        """Freeze (or train) what finds equal content: Adam's first steps would wipe it out."""
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


class _KeepOutput(nn.Module):
    """A layer that leaves what it gives in a dict."""

    def __init__(self, layer: nn.Module, outputs: dict[int, Tensor], index: int) -> None:
        super().__init__()
        self.layer, self.outputs, self.index = layer, outputs, index

    def forward(self, *inputs: Any) -> Tensor:
        self.outputs[self.index] = output = self.layer(*inputs)
        return output


def zero_residual_output(layer: DecoderLayer) -> None:
    """Zero the last weights of both residual branches: the layer adds nothing to its input."""
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        nn.init.zeros_(projection.weight)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalise(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), as the processor does it at the same size."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def labelled(scenes: list[Scene], margin: float = 0.0) -> tuple[Tensor, SceneLabels]:
    """Images (B, 3, H, W) and what `VisionHeads` is to find in them; see `label_scenes`."""
    images = normalise(np.stack([scene.image for scene in scenes]))
    return images, label_scenes(scenes, PATCH_SIZE, CELL_SIZE, margin)
