"""NanoMolmo2: vision encoder, connector and language model as one.

B rows, T positions, I images (or M crops of N patches), n visual tokens of the batch, D width,
V vocabulary. A `Batch` holds one image token for every visual token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanomolmo2.batch import Batch
from nanomolmo2.config import Config
from nanomolmo2.models.attention import Cache, sequence_mask, tree_positions
from nanomolmo2.models.connector import ConnectorConfig, MultimodalConnector
from nanomolmo2.models.language_model import LanguageModel, LLMConfig
from nanomolmo2.models.loss import Reduction, next_tokens, reduce, weighted_loss
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.models.vision_encoder import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class NanoMolmo2Config(Config):
    """The three parts and how they meet; the defaults are the base design (1,010 M parameters).

    image_token_id: the placeholder; the default reuses Qwen3's ``<|image_pad|>``.
    eos_token_id: ends a generated row, one id or several; None = nothing does.
    bidirectional_image_attention: image tokens attend to each other in both directions (Molmo2).
    image_special_token_ids: start, end and column tokens that count as image tokens in that mask.
    point_config: pointing by selecting visual tokens (MolmoPoint); None = coordinates as text.
    finder_dim: width of the looks by which things are found all at once; None = it does not find.
    """

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    connector_config: ConnectorConfig | None = None
    llm_config: LLMConfig = field(default_factory=LLMConfig)
    image_token_id: int = 151655
    freeze_vision: bool = True
    eos_token_id: int | tuple[int, ...] | None = 151643
    pad_token_id: int = 151643
    bidirectional_image_attention: bool = False
    image_special_token_ids: tuple[int, ...] = ()
    point_config: PointConfig | None = None
    finder_dim: int | None = None

    def __post_init__(self) -> None:
        if self.connector_config is None:
            made = ConnectorConfig(
                vision_dim=self.vision_config.hidden_size, llm_dim=self.llm_config.hidden_size
            )
            object.__setattr__(self, "connector_config", made)
        if not isinstance(self.eos_token_id, int | None):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        connector = self.connector
        for name, found, expected in (
            ("vision_dim", connector.vision_dim, self.vision_config.hidden_size),
            ("llm_dim", connector.llm_dim, self.llm_config.hidden_size),
        ):
            if found != expected:
                raise ValueError(
                    f"connector_config.{name} is {found}, but the part it joins has hidden_size "
                    f"{expected}: the two must be equal"
                )
        depth, layers = self.vision_config.num_hidden_layers, connector.vit_layers
        if layers is not None and (not layers or not all(-depth <= i < depth for i in layers)):
            raise ValueError(
                f"connector_config.vit_layers is {layers}, but the vision encoder has {depth} "
                f"blocks: name at least one of {-depth}..{depth - 1}, or None for the last"
            )
        size = self.llm_config.num_embeddings
        if not all(0 <= token_id < size for token_id in self.visual_token_ids):
            raise ValueError(
                f"image_token_id {self.image_token_id} is outside the vocabulary of {size} tokens"
            )
        if self.point_config is not None:
            self.point_config.check(self.llm_config.num_logits, connector.connector_type)

    @property
    def connector(self) -> ConnectorConfig:
        """``connector_config``, which is never None once built."""
        assert self.connector_config is not None
        return self.connector_config

    @property
    def num_visual_tokens(self) -> int:
        """n of an image at the configured size."""
        return self.connector.num_visual_tokens(self.vision_config.num_patches)

    @property
    def visual_token_ids(self) -> tuple[int, int]:
        """What stands for a visual token, and for one that cannot be selected (or the same id)."""
        low = None if self.point_config is None else self.point_config.image_non_indexable_patch_id
        return self.image_token_id, self.image_token_id if low is None else low

    def is_visual(self, input_ids: Tensor) -> Tensor:
        """Which ids stand for a visual token, bool."""
        image, low = self.visual_token_ids
        return (input_ids == image) | (input_ids == low)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """``eos_token_id`` as a tuple, empty for None."""
        return as_ids(self.eos_token_id)


def as_ids(token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """One id, several or none, as a tuple."""
    ids = () if token_id is None else token_id
    return (ids,) if isinstance(ids, int) else tuple(ids)


@dataclass(frozen=True)
class Output:
    """What the model makes of a batch."""

    logits: Tensor  # (B, T, V)
    loss: Tensor | None  # scalar, where the batch has labels


class NanoMolmo2(nn.Module):
    """The complete vision-language model.

    What people call, ``model(input_ids, pixel_values, labels=...)``, ``model.generate(...)``, is in
    face.py: a subclass that makes a `Batch` of every form of input.
    """

    vision_class: type[VisionEncoder] = VisionEncoder
    llm_class: type[LanguageModel] = LanguageModel

    def __init__(self, config: NanoMolmo2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or NanoMolmo2Config()
        layers, depth = config.connector.vit_layers, config.vision_config.num_hidden_layers
        if layers is None:
            self.vision_encoder = self.vision_class(config.vision_config)
        else:
            # Nothing behind the deepest layer that is read gets built.
            deepest = max(i + depth if i < 0 else i for i in layers)
            self.vision_encoder = self.vision_class(
                config.vision_config, num_layers=deepest + 1, post_layernorm=False
            )
        self.connector = MultimodalConnector(config.connector)
        self.llm = self.llm_class(config.llm_config)
        if config.connector.connector_type == "pooling":
            # Features are added to this row; at zero, programs that replace it do the same.
            with torch.no_grad():
                self.llm.embed_tokens.weight[config.image_token_id].zero_()
        # Ranks that share their weights run the same parts, also where a batch has no image.
        self.run_vision_without_images = False
        if config.freeze_vision:
            self.vision_encoder.freeze()

    def forward(self, batch: Batch) -> Output:
        """Logits of every position, and the loss where there are labels."""
        logits = self.llm.head(self.hidden_states(batch))
        return Output(logits, None if batch.labels is None else mean_loss(logits, batch))

    def loss(self, batch: Batch, reduction: Reduction = "mean", z_loss: float = 0.0) -> Tensor:
        """The loss alone: only positions that carry loss pass the head."""
        assert batch.labels is not None
        targets = next_tokens(batch.labels, batch.loss_weights, batch.loss_rows)
        return self.llm.targets_loss(self.hidden_states(batch), targets, reduction, z_loss)

    def hidden_states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Everything but the head: (B, T, D)."""
        return self.llm.norm(self.states(batch, cache))

    def states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """:meth:`hidden_states` before the final norm."""
        mask = self.attention_mask(batch) if cache is None else None
        return self.llm.states(self.embed(batch), positions(batch), mask, cache)

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings (B, T, D), with the visual tokens in their places."""
        x = self.llm.embed_tokens(batch.input_ids)
        visual = self.visual_tokens(batch)  # (n, D)
        if visual is None or not len(visual):
            return x
        places = self.config.is_visual(batch.input_ids)  # (B, T), n of them
        number = places.flatten().cumsum(dim=0).sub(1).clamp(min=0)  # of a place in reading order
        visual = visual.to(x.dtype).index_select(0, number).view_as(x)
        if self.config.connector.connector_type == "pooling":
            visual = visual + x  # Molmo2 adds to the embedding of the placeholder
        return torch.where(places[:, :, None], visual, x)

    def visual_tokens(self, batch: Batch) -> Tensor | None:
        """(n, D) of all images; a batch may hold its features, or the tokens themselves."""
        if batch.visual_tokens is not None:
            return batch.visual_tokens
        if batch.visual_features is not None:
            return self.connector(batch.visual_features, batch.image_token_pooling).flatten(0, -2)
        if batch.pixel_values is not None:
            return self.encode_images(batch.pixel_values, batch.image_token_pooling).flatten(0, -2)
        if self.run_vision_without_images:
            vision, weight = self.config.vision_config, self.llm.embed_tokens.weight
            blank = weight.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)
            return self.encode_images(blank)[0]  # no position takes any of its tokens
        return None

    def encode_images(
        self, pixel_values: Tensor, image_token_pooling: Tensor | None = None
    ) -> Tensor:
        """Images (I, 3, H, W) -> visual tokens (I, n, D); frozen vision leaves no graph.

        With an index (n, W) over the patches of all images or crops (M, N, 3*P*P) -> (n, D).
        """
        features = self.vision_encoder.features(pixel_values, self.config.connector.vit_layers)
        return self.connector(features, image_token_pooling)

    def attention_mask(self, batch: Batch) -> Tensor | None:
        """(B, 1, T, T) bool, True = may attend; None = causal."""
        parts = self.mask_parts(batch)
        if all(part is None for part in parts.values()):
            return None
        ids = batch.input_ids
        return sequence_mask(ids.shape[1], **parts, device=ids.device)

    def mask_parts(self, batch: Batch) -> dict[str, Any]:
        """What the mask follows from, each (B, T) or None; see `sequence_mask`."""
        image_tokens = None
        if self.config.bidirectional_image_attention:
            image_tokens = self.config.is_visual(batch.input_ids)
            for token_id in self.config.image_special_token_ids:
                image_tokens = image_tokens | (batch.input_ids == token_id)
            if batch.attention_mask is not None:
                image_tokens = image_tokens & batch.attention_mask
        return {
            "key_mask": batch.attention_mask,
            "image_tokens": image_tokens,
            "subsegment_ids": batch.subsegment_ids,
        }


def positions(batch: Batch) -> Tensor:
    """Rotary positions (B or 1, T): given, of message trees, or real tokens counted from 0."""
    if batch.position_ids is not None:
        return batch.position_ids
    if batch.subsegment_ids is not None:
        return tree_positions(batch.subsegment_ids)
    if batch.attention_mask is not None:
        return (batch.attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]


def mean_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Weighted mean cross-entropy of the next token, of logits (B, T, V)."""
    assert batch.labels is not None
    rows, tokens, weights = next_tokens(batch.labels, batch.loss_weights, batch.loss_rows)
    return reduce(weighted_loss(logits.flatten(0, 1)[rows], tokens, weights), weights, "mean")
