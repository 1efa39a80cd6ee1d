"""NanoMolmo2: vision encoder, connector and language model as one.

B rows, L tokens a row, T positions after pictures took their place, n visual tokens a picture,
V vocabulary. In the Molmo2 design M crops of N patches of P x P pixels; a visual token pools up to
W patches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.batch import IGNORED_LABEL
from nanomolmo2.config import Config
from nanomolmo2.models.attention import sequence_mask, tree_positions
from nanomolmo2.models.connector import ConnectorConfig, MultimodalConnector
from nanomolmo2.models.language_model import LanguageModel, LLMConfig
from nanomolmo2.models.loss import Reduction, TiedGradient, next_tokens, reduce
from nanomolmo2.models.merge import Pictures, Placement, list_pictures, place
from nanomolmo2.models.quantized import Modes, count_weights, quantize
from nanomolmo2.models.vision_encoder import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class NanoMolmo2Config(Config):
    """The three parts and how they meet; the defaults are the base design (1,010 M parameters).

    image_token_id: the placeholder; the default reuses Qwen3's ``<|image_pad|>``.
    eos_token_id: ends a generated row, one id or several; None = nothing does.
    bidirectional_image_attention: image tokens see each other in both directions (Molmo2).
    image_special_token_ids: start, end and column tokens that count as image tokens in that mask.
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
        depth = self.vision_config.num_hidden_layers
        layers = connector.vit_layers
        if layers is not None and (not layers or not all(-depth <= i < depth for i in layers)):
            raise ValueError(
                f"connector_config.vit_layers is {layers}, but the vision encoder has {depth} "
                f"blocks: name at least one of {-depth}..{depth - 1}, or None for the last"
            )
        if not 0 <= self.image_token_id < self.llm_config.num_embeddings:
            raise ValueError(
                f"image_token_id {self.image_token_id} is outside the vocabulary of "
                f"{self.llm_config.num_embeddings} tokens"
            )

    @property
    def connector(self) -> ConnectorConfig:
        """``connector_config``, which is never None once built."""
        assert self.connector_config is not None
        return self.connector_config

    @property
    def num_visual_tokens(self) -> int:
        """n of a picture at the configured size."""
        return self.connector.num_visual_tokens(self.vision_config.num_patches)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """``eos_token_id`` as a tuple, empty for None."""
        return as_ids(self.eos_token_id)


def as_ids(token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """One id, several or none, as a tuple."""
    if token_id is None:
        return ()
    return (token_id,) if isinstance(token_id, int) else tuple(token_id)


@dataclass
class Merged:
    """A prompt ready for the decoder: (B, T, D) embeddings and what belongs to each position."""

    inputs_embeds: Tensor
    attention_mask: Tensor | None  # (B, 1, T, T) where the mask is more than causal and padding
    key_mask: Tensor | None  # (B, T) bool, False = padding
    position_ids: Tensor | None
    placement: Placement


def _prefix_keys(merged: Merged, ids: Tensor) -> list[Any]:
    """Numbers of every row's real positions by content, for the prefix cache. ids: (B, T)."""
    from nanomolmo2.generation.prefix_cache import position_keys

    keys = []
    for b, visual in enumerate(merged.placement.visual):
        real = slice(None) if merged.key_mask is None else merged.key_mask[b]
        keys.append(position_keys(ids[b][real], merged.inputs_embeds[b][real], visual[real]))
    return keys


class NanoMolmo2(nn.Module):
    """The complete vision-language model."""

    def __init__(self, config: NanoMolmo2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or NanoMolmo2Config()
        layers, depth = config.connector.vit_layers, config.vision_config.num_hidden_layers
        if layers is None:
            self.vision_encoder = VisionEncoder(config.vision_config)
        else:
            # Nothing behind the deepest layer that is read gets built.
            deepest = max(i + depth if i < 0 else i for i in layers)
            self.vision_encoder = VisionEncoder(
                config.vision_config, num_layers=deepest + 1, post_layernorm=False
            )
        self.connector = MultimodalConnector(config.connector)
        self.llm = LanguageModel(config.llm_config)
        if config.connector.connector_type == "pooling":
            # Features are added to this row; at zero, programs that replace it do the same.
            with torch.no_grad():
                self.llm.embed_tokens.weight[config.image_token_id].zero_()
        # Ranks that share their weights run the same parts, also where a batch has no picture.
        self.always_sees = False
        self._warned_unlabelled = False
        if config.freeze_vision:
            self.vision_encoder.freeze()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Pictures = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        subsegment_ids: Tensor | None = None,
        loss_weights: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        image_token_pooling: Tensor | None = None,
        visual_features: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Logits of text and pictures, and the loss if there are labels.

        Args:
            input_ids: (B, L) int64 with image tokens, one a picture or one a visual token.
            pixel_values: normalised pictures; the forms are listed in
                :func:`nanomolmo2.models.merge.list_pictures`. In the Molmo2 design (M, N, 3*P*P):
                the crops of all pictures (or frames) of the batch, cut into patches.
            labels: (B, L), the token at its own position (shifted inside); -100 = no loss.
            attention_mask: (B, L), 0 = padding on either side.
            position_ids, subsegment_ids: (B, L), message trees and packs; only where the image
                tokens are already written out one a visual token. Positions follow from the
                subsegments if they are not given.
            loss_weights: (B, L) float, aligned with labels; 1 by default.
            visual_tokens: (I, n, D), what :meth:`encode_images` gave for the pictures, in their
                place.
            image_token_pooling: (n, W), patches of each visual token of the batch, counted over all
                M * N, -1 = empty slot; one row for every image token in reading order.
            visual_features: (I, N, F) or (M, N, F), what the vision encoder's ``features`` gave for
                ``pixel_values``, in their place: the connector still learns from them.
            output_hidden_states: also return, last, what the decoder's :meth:`forward` then does.
        Returns: logits (B, T, V), T = L + n - 1 for one picture a row; with labels (logits, loss):
            the weighted mean cross-entropy over all labelled tokens of the batch.
        Raises: ValueError where image tokens and pictures, shapes, ids or the context disagree.
        """
        decoder, targets, weights = self._prepare(
            input_ids,
            pixel_values,
            labels,
            attention_mask,
            position_ids,
            subsegment_ids,
            loss_weights,
            visual_tokens,
            image_token_pooling,
            visual_features,
        )
        results = self.llm(**decoder, output_hidden_states=output_hidden_states)
        logits, *states = results if output_hidden_states else (results,)
        if targets is None:
            return (logits, *states) if states else logits
        rows, tokens, weight = next_tokens(targets, weights)
        losses = F.cross_entropy(logits.flatten(0, 1)[rows].float(), tokens, reduction="none")
        return logits, reduce((losses * weight).sum(), weight, "mean"), *states

    def loss(
        self,
        input_ids: Tensor,
        pixel_values: Pictures = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        subsegment_ids: Tensor | None = None,
        loss_weights: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        image_token_pooling: Tensor | None = None,
        visual_features: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
    ) -> Tensor:
        """The loss alone, a float32 scalar: all logits never exist at once.

        Args: as in :meth:`forward`, with labels; ``reduction`` and ``z_loss`` as in
            :meth:`LanguageModel.loss`.
        """
        if labels is None:
            raise ValueError("the loss needs labels, found None: pass (B, L), -100 where none is")
        tied = self.llm.tied_gradient()
        decoder, targets, weights = self._prepare(
            input_ids,
            pixel_values,
            labels,
            attention_mask,
            position_ids,
            subsegment_ids,
            loss_weights,
            visual_tokens,
            image_token_pooling,
            visual_features,
            tied,
        )
        assert targets is not None
        return self.llm.loss(
            None, targets, weights, **decoder, reduction=reduction, z_loss=z_loss, tied=tied
        )

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        pixel_values: Pictures = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] | None = None,
        sampling: Any = None,
        eos_token_id: int | Sequence[int] | Literal["config"] | None = "config",
        pad_token_id: int | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        on_result: Callable[[int, Any], None] | None = None,
        stops: Callable[[int, int], bool] | None = None,
        visual_tokens: Tensor | None = None,
        image_token_pooling: Tensor | None = None,
        prefix_cache: Any = None,
        lookup: bool = True,
        guide: Callable[[], Any] | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Continue every row until its end token or ``max_new_tokens``.

        Args:
            prompt_ids: (B, L); pixel_values, attention_mask, visual_tokens, image_token_pooling: as
                in :meth:`forward`.
            temperature: 0 = greedy. top_p: 1 = off. top_k: 0 = off.
            seed: of every row's own generator, or one a row: a row draws the same alone and in any
                batch. None = a fresh one.
            sampling: a :class:`nanomolmo2.generation.sampling.SamplingParams` with these and all
                other settings, in place of the four above.
            eos_token_id: by default the config's; None never stops.
            pad_token_id: fills rows that ended before the others; by default the config's.
            on_token: called with the new ids (B,) as soon as every row has its next one.
            on_result: called with (row, :class:`nanomolmo2.generation.engine.Result`) as soon as a
                row ends: why it did, log-probabilities.
            stops: called with (row, new id); True ends the row there.
            prefix_cache: a :class:`nanomolmo2.generation.prefix_cache.PrefixCache`; visual tokens,
                keys and values of earlier prompts are taken from it, and those of this one kept;
                None: everything is computed.
            lookup: guess repeated text and check it in one step, where that is faster; the answer
                is the same.
            guide: makes for each row what knows likely continuations, such as
                :class:`nanomolmo2.generation.constraint.PointsGuide`, for lookup.
            batch_invariant: bit-identical logits alone, in any batch and with reuse; slower.
        Returns: (B, L + new) prompt and new ids.
        Source: behaves like transformers' ``generate``.
        """
        from nanomolmo2.generation.engine import generate
        from nanomolmo2.generation.sampling import settings

        sampling = settings(sampling, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        self._check_text(prompt_ids, attention_mask=attention_mask)
        if prefix_cache is not None and visual_tokens is None:
            visual_tokens = self._remembered(
                prefix_cache, prompt_ids, pixel_values, image_token_pooling
            )
            if visual_tokens is not None:
                pixel_values = image_token_pooling = None
        merged = self._merge(
            prompt_ids,
            pixel_values,
            attention_mask,
            visual_tokens=visual_tokens,
            image_token_pooling=image_token_pooling,
        )
        ids = merged.placement.spread(prompt_ids)
        eos = self.config.eos_token_id if eos_token_id == "config" else eos_token_id
        new = generate(
            self.llm,
            merged.inputs_embeds,
            input_ids=ids,
            key_mask=merged.key_mask,
            attention_mask=merged.attention_mask,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            eos_token_ids=as_ids(eos),
            pad_token_id=self.config.pad_token_id if pad_token_id is None else pad_token_id,
            on_token=on_token,
            on_result=on_result,
            stops=stops,
            prefix_cache=prefix_cache,
            prefix_keys=None if prefix_cache is None else _prefix_keys(merged, ids),
            lookup=lookup,
            guide=guide,
            batch_invariant=batch_invariant,
        )
        return torch.cat([prompt_ids, new], dim=1)

    def encode_images(
        self, pixel_values: Tensor, image_token_pooling: Tensor | None = None
    ) -> Tensor:
        """Pictures (I, 3, H, W) -> visual tokens (I, n, D); frozen vision leaves no graph.

        With an index (n, W) over the patches of all pictures or crops (M, N, 3*P*P) -> (n, D).
        """
        features = self.vision_encoder.features(pixel_values, self.config.connector.vit_layers)
        return self.connector(features, image_token_pooling)

    def parameter_summary(self) -> str:
        """Print, and return, the table of parts: what trains, parameters, gradient memory."""
        rows = []
        for name, part in (
            ("Vision Encoder", self.vision_encoder),
            ("Connector", self.connector),
            ("Language Model", self.llm),
        ):
            total = count_weights(part)
            trainable = [p for p in part.parameters() if p.requires_grad]
            gradient = sum(p.numel() * p.element_size() for p in trainable)
            rows.append((name, "yes" if trainable else "no", total, gradient))
        rows.append(("Total", "-", sum(r[2] for r in rows), sum(r[3] for r in rows)))
        lines = [
            "| Component      | Trainable |    Parameters | Gradient memory |",
            "|----------------|-----------|---------------|-----------------|",
        ]
        for name, trains, total, gradient in rows:
            megabytes = f"{gradient / 1e6:,.1f} MB"
            lines.append(f"| {name:<14} | {trains:<9} | {total:>13,} | {megabytes:>15} |")
        text = "\n".join(lines)
        print(text)
        return text

    def quantize(self, mode: Modes, **options: Any) -> Self:
        """8-bit or 16-bit weights, in place; see :func:`nanomolmo2.models.quantized.quantize`.

        ``mode``: for all parts, or by part: ``{"vision_encoder": "int8", "connector": None,
        "llm": "fp16-weights"}``.
        """
        return quantize(self, mode, **options)

    @classmethod
    def from_pretrained(cls, name_or_path: str | None = None, **options: Any) -> NanoMolmo2:
        """Load weights; see :func:`nanomolmo2.convert.pretrained.load_nanomolmo2`."""
        from nanomolmo2.convert.pretrained import load_nanomolmo2

        return load_nanomolmo2(name_or_path, **options)

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write a folder that ``from_pretrained`` reads back bit for bit.

        See :func:`nanomolmo2.convert.pretrained.save_pretrained`.
        """
        from nanomolmo2.convert.pretrained import save_pretrained

        save_pretrained(self, directory, **options)

    def _remembered(
        self,
        cache: Any,
        prompt_ids: Tensor,
        pixel_values: Pictures,
        image_token_pooling: Tensor | None,
    ) -> Tensor | None:
        """Visual tokens (I, n, D), or (1, n, D) of all crops; only what is new is encoded.

        None for forms whose pictures are not known before they are placed: those are encoded.
        """
        if not isinstance(pixel_values, Tensor) or not len(pixel_values):
            return None
        cache.check("vision", self.vision_encoder)
        cache.check("connector", self.connector)
        if image_token_pooling is not None:
            if int((prompt_ids == self.config.image_token_id).sum()) != len(image_token_pooling):
                return None  # the error belongs to the merge
            features = cache.visual_tokens(
                [(pixel_values, image_token_pooling)],
                lambda new: [self.encode_images(*crops) for crops in new],
            )
        elif pixel_values.ndim == 4:
            features = cache.visual_tokens(
                [(picture,) for picture in pixel_values],
                lambda new: self.encode_images(torch.stack([picture for (picture,) in new])),
            )
        else:
            return None
        return torch.stack(features)

    def _prepare(
        self,
        input_ids: Tensor,
        pixel_values: Pictures,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        subsegment_ids: Tensor | None,
        loss_weights: Tensor | None,
        visual_tokens: Tensor | None,
        image_token_pooling: Tensor | None,
        visual_features: Tensor | None,
        tied: TiedGradient | None = None,
    ) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
        """What the decoder takes; labels (B, T) and weights (B, T) at their merged positions."""
        self._check_text(
            input_ids,
            labels=labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            subsegment_ids=subsegment_ids,
            loss_weights=loss_weights,
        )
        merged = self._merge(
            input_ids,
            pixel_values,
            attention_mask,
            position_ids,
            subsegment_ids,
            visual_tokens,
            image_token_pooling,
            visual_features,
            tied,
        )
        mask = merged.key_mask if merged.attention_mask is None else merged.attention_mask
        decoder = {
            "inputs_embeds": merged.inputs_embeds,
            "attention_mask": mask,
            "position_ids": merged.position_ids,
        }
        if labels is None:
            return decoder, None, None
        targets = merged.placement.spread(labels, IGNORED_LABEL)
        labelled = (targets[:, 1:] != IGNORED_LABEL).any(dim=1)
        if not self._warned_unlabelled and not bool(labelled.all()):
            self._warned_unlabelled = True
            warnings.warn(
                "a row has no label to learn from: it adds nothing to the loss (was the answer cut "
                "off, or every label -100?)",
                stacklevel=3,
            )
        if loss_weights is None:
            return decoder, targets, None
        return decoder, targets, merged.placement.spread(loss_weights, 0.0)

    def _merge(
        self,
        input_ids: Tensor,
        pixel_values: Pictures,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        subsegment_ids: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        image_token_pooling: Tensor | None = None,
        visual_features: Tensor | None = None,
        tied: TiedGradient | None = None,
    ) -> Merged:
        """Encode the pictures and put them where the image tokens are."""
        text = self.llm.embed(input_ids, tied)  # (B, L, D)
        is_image = input_ids == self.config.image_token_id
        counts = is_image.sum(dim=1).tolist()
        if sum(x is not None for x in (pixel_values, visual_tokens, visual_features)) > 1:
            raise ValueError(
                "pass pixel_values or visual_tokens, not both; or visual_features alone"
            )
        if visual_features is not None and image_token_pooling is None:
            visual_tokens = self.connector(visual_features)
        if image_token_pooling is not None:
            encoded = self._encode_crops(pixel_values, image_token_pooling, visual_features)
            features = [self._counted(encoded, sum(counts))]
            placement = place(is_image, [1] * sum(counts), attention_mask)
        else:
            pictures, by_row = list_pictures(
                pixel_values, counts, self._visual_tokens(pixel_values)
            )
            features = self._encode_list(pictures) if visual_tokens is None else list(visual_tokens)
            placement = place(is_image, [len(f) for f in features], attention_mask, by_row)
        moved = placement.source.shape[1] != input_ids.shape[1]
        if moved and (position_ids is not None or subsegment_ids is not None):
            raise ValueError(
                "position_ids and subsegment_ids need image tokens written out one a visual token: "
                "here each stands for a whole picture, so positions would move"
            )
        x = text.gather(1, placement.source[:, :, None].expand(-1, -1, text.shape[-1]))
        if not features and self.always_sees:
            features = [self._nothing(x)]
        if features:
            visual = torch.cat(features).to(x.dtype)
            if self.config.connector.connector_type == "pooling":
                visual = visual + x[placement.visual]  # Molmo2 adds to the placeholder's embedding
            x = x.masked_scatter(placement.visual[:, :, None], visual)
        mask = None
        if self.config.bidirectional_image_attention or subsegment_ids is not None:
            mask, position_ids = self._tree_mask(input_ids, placement, position_ids, subsegment_ids)
        return Merged(x, mask, placement.real, position_ids, placement)

    def _tree_mask(
        self,
        input_ids: Tensor,
        placement: Placement,
        position_ids: Tensor | None,
        subsegment_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The (B, 1, T, T) mask of bidirectional pictures and message trees, and positions."""
        image_tokens = None
        if self.config.bidirectional_image_attention:
            ids = torch.tensor(
                (self.config.image_token_id, *self.config.image_special_token_ids),
                device=input_ids.device,
            )
            image_tokens = torch.isin(placement.spread(input_ids), ids)
            if placement.real is not None:
                image_tokens &= placement.real
        if position_ids is None and subsegment_ids is not None:
            position_ids = tree_positions(subsegment_ids)
        elif position_ids is None and placement.real is not None:
            position_ids = (placement.real.long().cumsum(dim=1) - 1).clamp(min=0)
        mask = sequence_mask(
            placement.source.shape[1],
            key_mask=placement.real,
            image_tokens=image_tokens,
            subsegment_ids=subsegment_ids,
            device=input_ids.device,
        )
        return mask, position_ids

    def _encode_crops(
        self, pixel_values: Pictures, image_token_pooling: Tensor, visual_features: Tensor | None
    ) -> Tensor:
        """Visual tokens (n, D) of crops, or of their features."""
        if visual_features is not None:
            return self.connector(visual_features, image_token_pooling)
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim < 3:
            found = None if pixel_values is None else type(pixel_values).__name__
            if isinstance(pixel_values, Tensor):
                found = str(tuple(pixel_values.shape))
            raise ValueError(
                f"image_token_pooling needs pixel_values (M, N, 3*P*P), the crops whose patches it "
                f"counts, found {found}: pass both as the processor made them"
            )
        return self.encode_images(pixel_values, image_token_pooling)

    def _counted(self, features: Tensor, image_tokens: int) -> Tensor:
        """Visual tokens of crops (n, D), as many as there are image tokens."""
        if len(features) != image_tokens:
            raise ValueError(
                f"the prompt holds {image_tokens} image tokens, but image_token_pooling makes "
                f"{len(features)} visual tokens: was the prompt cut off, or made with another "
                f"max_crops?"
            )
        return features

    def _visual_tokens(self, pixel_values: Pictures) -> int:
        """n of a picture of the size that a tensor of pictures has, of the configured size else."""
        if not isinstance(pixel_values, Tensor):
            return self.config.num_visual_tokens
        P = self.config.vision_config.patch_size
        rows, columns = (side // P for side in pixel_values.shape[-2:])
        return self.config.connector.num_visual_tokens(rows * columns)

    def _nothing(self, like: Tensor) -> Tensor:
        """(0, D): a blank picture was encoded, and all of its visual tokens were left out."""
        vision = self.config.vision_config
        blank = like.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)
        return self.encode_images(blank)[0, :0]

    def _encode_list(self, pictures: list[Tensor]) -> list[Tensor]:
        """Visual tokens (n, D) of every picture; pictures of one size share a forward pass."""
        features: list[Tensor] = [torch.empty(0)] * len(pictures)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(pictures):
            by_shape.setdefault(tuple(picture.shape), []).append(i)
        for indices in by_shape.values():
            encoded = self.encode_images(torch.stack([pictures[i] for i in indices]))
            for i, tokens in zip(indices, encoded, strict=True):
                features[i] = tokens
        return features

    def _check_text(self, input_ids: Tensor, **beside: Tensor | None) -> None:
        """What stands beside the ids has their shape, and labels can be written."""
        for name, value in beside.items():
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} {tuple(value.shape)} must have the shape of input_ids "
                    f"{tuple(input_ids.shape)}: one value for every token, pictures not counted"
                )
        if (labels := beside.get("labels")) is not None:
            self.llm.check_labels(labels)
