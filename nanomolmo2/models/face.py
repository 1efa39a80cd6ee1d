"""What people call: the forms of input that the nets take, and methods that lead to other folders.

    llm(input_ids, use_cache=True)      model(input_ids, pixel_values, labels=labels)
    model.generate(prompt_ids, images)  NanoMolmo2.from_pretrained("tiny")

The three nets as they are exported: subclasses that bring every call to the nets' own terms,
embeddings, positions and masks, or a `Batch`, and check it here, once. Nothing in this file is
needed to follow the mathematics.

This is the only file of models/ with imports from above it, each inside a method.

B rows, L tokens a row, T positions after images took their place, I images, n visual tokens of an
image, D width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from nanomolmo2.batch import IGNORED_LABEL, Batch
from nanomolmo2.models import language_model, pointing, vision_encoder
from nanomolmo2.models.attention import Cache, causal_mask
from nanomolmo2.models.connector import checked_pooling
from nanomolmo2.models.forms import (
    POINT_PARTS,
    Images,
    check_ids,
    check_labels,
    check_points,
    collect_states,
    expand_image_tokens,
    full_mask,
    key_mask_of,
    list_images,
    new_positions,
    over_all_crops,
    place,
)
from nanomolmo2.models.loss import Reduction, next_tokens
from nanomolmo2.models.nanomolmo2 import Output

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from nanomolmo2.accelerate.quantization import Modes
    from nanomolmo2.generation.generate import ImageKeywords, RowKeywords
    from nanomolmo2.generation.kv_cache import KVCache


class Quantizable(nn.Module):
    """A net whose linear layers can get 8-bit or 16-bit weights."""

    def quantize(self, mode: Modes, **options: Any) -> Self:
        """8-bit or 16-bit weights, in place; see :func:`nanomolmo2.accelerate.quantize`.

        The head of a tied decoder gets a quantised copy; the table stays for reading. ``mode`` of a
        whole model may be by part: ``{"vision_encoder": "int8", "llm": "fp16-weights"}``.
        """
        from nanomolmo2.accelerate.quantization import quantize

        return quantize(self, mode, **options)


class VisionEncoder(Quantizable, vision_encoder.VisionEncoder):
    """The vision encoder; its forward is the net's own."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | None = None, **options: Any) -> VisionEncoder:
        """Load weights; see :func:`nanomolmo2.convert.pretrained.load_vision_encoder`."""
        from nanomolmo2.convert.pretrained import load_vision_encoder

        return load_vision_encoder(name_or_path, **options)


class LanguageModel(Quantizable, language_model.LanguageModel):
    """Token ids, or embeddings in their place, to logits."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """Run the decoder.

        Args:
            input_ids: (B, T) int64 below ``num_embeddings``; or
            inputs_embeds: (B, T, D).
            attention_mask: (B, T) or, with a past, (B, S): 1 = real token, 0 = padding on either
                side; or (B or 1, 1, T, S): True = may attend, or additive floats, used as it is; or
                a FlexAttention block mask, without a past.
            position_ids: (B, T); by default real tokens are counted from 0, the past included.
            past_key_values: the cache of earlier calls; the new positions are appended to it.
            use_cache: also return the cache (a new one if none was given).
            output_hidden_states: also return the embeddings, every block's output, and last the
                normed output: ``num_hidden_layers + 2`` tensors.
        Returns: logits (B, T, V); then, if asked for, the cache; then the hidden states.
        Raises: ValueError for ids outside the vocabulary, masks of other shapes, a sequence longer
            than ``max_position_embeddings``.
        """
        from nanomolmo2.accelerate.quantization import cache_dtype
        from nanomolmo2.generation.kv_cache import KVCache, PaddedStep

        x = self._embeddings(input_ids, inputs_embeds)
        cache = past_key_values
        if use_cache and cache is None:
            cache = KVCache(self.config.num_hidden_layers, dtype=cache_dtype(self))
        given_mask, key_mask, position_ids = self._places(x, attention_mask, position_ids, cache)
        mask, step = _attention_of(given_mask)
        if cache is not None:
            step = PaddedStep(cache, mask)
        states: list[Tensor] = []
        with collect_states(self, states) if output_hidden_states else nullcontext():
            hidden = self.hidden_states(x, position_ids, mask, step)
        if cache is not None:
            last = position_ids.amax(dim=1, keepdim=True).expand(len(x), 1)
            cache.advance(x.shape[1], key_mask, last + 1)
        results: list[Any] = [self.head(hidden)]
        if use_cache:
            results.append(cache)
        if output_hidden_states:
            results.append(tuple(states))
        return results[0] if len(results) == 1 else tuple(results)

    def loss(
        self,
        input_ids: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor | None = None,
        *,
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Weighted cross-entropy of the next token; only positions that carry loss pass the head.

        Args:
            input_ids, inputs_embeds, attention_mask, position_ids: as in :meth:`forward`.
            labels: (B, T), the token at its own position (shifted inside); -100 = no loss.
            loss_weights: (B, T) float, 0 or more, aligned with labels; 1 by default.
            reduction: the weighted sum, or the mean: that divided by the sum of the weights.
            z_loss: times the square of each softmax's log-sum is added; 1e-4 keeps logits small.
            chunk_size: logits that exist at a time, about, with `accelerate.chunked_loss`.
        Returns: scalar, float32; 0 where nothing is labelled, which still leads back.
        Raises: ValueError where shapes or ids do not fit.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is not None and labels.shape != given.shape[:2]:
            raise ValueError(
                f"labels {tuple(labels.shape)} must have the shape of the text "
                f"{tuple(given.shape[:2])}: one for every position"
            )
        check_labels(labels, self.config.num_logits)
        x = self._embeddings(input_ids, inputs_embeds)
        given_mask, _, position_ids = self._places(x, attention_mask, position_ids, None)
        mask, step = _attention_of(given_mask)
        hidden = self.hidden_states(x, position_ids, mask, step)
        targets = next_tokens(labels, loss_weights)
        return self.targets_loss(hidden, targets, reduction, z_loss, chunk_size)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, D). Raises: ValueError for ids outside the vocabulary."""
        check_ids(input_ids, self.config.num_embeddings)
        return self.embed_tokens(input_ids)

    def _embeddings(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        return self.embed(input_ids)

    def _places(
        self,
        x: Tensor,
        attention_mask: Tensor | BlockMask | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor | BlockMask | None, Tensor | None, Tensor]:
        """The mask (B or 1, 1, T, S), None = causal; the keys' mask (B, S); positions."""
        B, T = x.shape[:2]
        past = 0 if cache is None else cache.length
        S = past + T
        if self.config.max_position_embeddings < S:
            raise ValueError(
                f"the sequence has {S} positions, the model's context holds "
                f"{self.config.max_position_embeddings}: shorten the text or send fewer pictures"
            )
        mask: Tensor | BlockMask | None = None
        key_mask: Tensor | None = None
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            if cache is not None:
                raise ValueError("a FlexAttention block mask is for whole sequences: pass no cache")
            mask = attention_mask
        elif attention_mask is not None and attention_mask.ndim == 4:
            mask = full_mask(attention_mask, B, T, S, x.dtype)
            key_mask = key_mask_of(None, B, T, cache)
        else:
            key_mask = key_mask_of(attention_mask, B, T, cache)
            if key_mask is not None:
                allowed = causal_mask(T, S, x.device)[None] & key_mask[:, None, :]
                # A padding query attends to itself, so that no softmax is over nothing.
                mask = (allowed | torch.eye(S, dtype=torch.bool, device=x.device)[past:])[:, None]
            elif past and T > 1:
                mask = causal_mask(T, S, x.device)[None, None]
        if position_ids is None:
            position_ids = new_positions(key_mask, T, cache, x.device)
        elif tuple(position_ids.shape) not in ((1, T), (B, T)):
            raise ValueError(
                f"position_ids of shape {tuple(position_ids.shape)} do not fit {B} rows of {T} "
                f"positions: pass one for every new position"
            )
        return mask, key_mask, position_ids

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **options: Unpack[RowKeywords],
    ) -> Tensor:
        """Continue every row until an end token or ``max_new_tokens`` (512 by default).

        Args:
            input_ids: (B, L); attention_mask: (B, L), 0 = padding on either side.
            options: as in :meth:`NanoMolmo2.generate`; without an ``eos_token_id`` nothing ends a
                row, and ``pad_token_id`` is by default the (first) end token.
        Returns: (B, L + new) prompt and new ids.
        Raises: ValueError for an empty prompt, shapes or ids that do not fit, too long a text.
        """
        from nanomolmo2.generation.generate import generate_text

        return generate_text(self, input_ids, attention_mask, **options)

    @classmethod
    def from_pretrained(cls, name_or_path: str | None = None, **options: Any) -> LanguageModel:
        """Load weights; see :func:`nanomolmo2.convert.pretrained.load_language_model`."""
        from nanomolmo2.convert.pretrained import load_language_model

        return load_language_model(name_or_path, **options)


class MoreParts(TypedDict, total=False):
    """Parts of a `Batch` that few calls need; see :meth:`NanoMolmo2.forward`."""

    position_ids: Tensor | None
    subsegment_ids: Tensor | None
    loss_weights: Tensor | None
    visual_tokens: Tensor | Sequence[Tensor] | None
    image_token_pooling: Tensor | None
    visual_features: Tensor | None
    point_targets: Tensor | None
    point_lists: Tensor | None
    loss_rows: Tensor | None


class NanoMolmo2(Quantizable, pointing.PointingNanoMolmo2):
    """Token ids and images, in any of their forms, to logits and losses."""

    vision_class: type[VisionEncoder] = VisionEncoder
    llm_class: type[LanguageModel] = LanguageModel
    vision_encoder: VisionEncoder
    llm: LanguageModel
    _warned_unlabelled = False

    @overload
    def forward(self, input_ids: Batch) -> Output: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Images = None,
        labels: None = None,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: Literal[False] = False,
        **more: Unpack[MoreParts],
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Images = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        **more: Unpack[MoreParts],
    ) -> tuple[Any, ...]: ...

    def forward(
        self,
        input_ids: Tensor | Batch,
        pixel_values: Images = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        **more: Unpack[MoreParts],
    ) -> Output | Tensor | tuple[Any, ...]:
        """Logits of text and images, and the loss if there are labels.

        Args:
            input_ids: (B, L) int64 with image tokens, one an image or one a visual token. Or a
                `Batch` alone, which is used as it is, unchecked.
            pixel_values: normalised images; the forms are listed in :func:`list_images`. In the
                Molmo2 design (M, N, 3*P*P): the crops of all images (or frames) of the batch, cut
                into patches.
            labels: (B, L), the token at its own position (shifted inside); -100 = no loss.
            attention_mask: (B, L), 0 = padding on either side.
            output_hidden_states: also return, last, what the decoder's :meth:`forward` then does.
            position_ids, subsegment_ids: (B, L), message trees and packs; only where the image
                tokens are already written out one a visual token. Positions follow from the
                subsegments if they are not given.
            loss_weights: (B, L) float, aligned with labels; 1 by default.
            visual_tokens: (I, n, D), what :meth:`encode_images` gave for the images, in their
                place.
            image_token_pooling: (n, W), patches of each visual token of the batch, counted over all
                M * N, -1 = empty slot; one row for every image token in reading order.
            visual_features: (I, N, F) or (M, N, F), what the vision encoder's ``features`` gave for
                ``pixel_values``, in their place: the connector still learns from them.
            point_targets, point_lists: (P, 3), (P,), see `Batch` and `check_points`.
        Returns: logits (B, T, V), T = L + n - 1 for one image a row; with labels (logits, loss):
            the weighted mean cross-entropy over all labelled tokens of the batch. Of a `Batch` an
            `Output`.
        Raises: ValueError where image tokens and images, shapes, ids or the context disagree.
        """
        if isinstance(input_ids, Batch):
            return super().forward(input_ids)
        batch = self.batch_of(input_ids, pixel_values, labels, attention_mask, **more)
        states: list[Tensor] = []
        with collect_states(self.llm, states) if output_hidden_states else nullcontext():
            output = super().forward(batch)
        results: list[Any] = [output.logits]
        if labels is not None:
            results.append(output.loss)
        if output_hidden_states:
            results.append(tuple(states))
        return results[0] if len(results) == 1 else tuple(results)

    def loss(  # type: ignore[override]
        self,
        input_ids: Tensor | Batch,
        pixel_values: Images = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
        **more: Unpack[MoreParts],
    ) -> Tensor:
        """The loss alone, a float32 scalar: only positions that carry loss pass the head.

        Args: as in :meth:`forward`, with labels; ``reduction`` and ``z_loss`` as in
            :meth:`LanguageModel.loss`.
        """
        if isinstance(input_ids, Batch):
            return super().loss(input_ids, reduction, z_loss)
        if labels is None:
            raise ValueError("the loss needs labels, found None: pass (B, L), -100 where none is")
        batch = self.batch_of(input_ids, pixel_values, labels, attention_mask, **more)
        return super().loss(batch, reduction, z_loss)

    def batch_of(
        self,
        input_ids: Tensor,
        pixel_values: Images = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Unpack[MoreParts],
    ) -> Batch:
        """The checked `Batch` of a call, with one image token for every visual token.

        Arguments as in :meth:`forward`.
        """
        llm_config = self.config.llm_config
        features, given = more.pop("visual_features", None), more.pop("visual_tokens", None)
        index = more.pop("image_token_pooling", None)
        beside = {"labels": labels, "attention_mask": attention_mask, **more}
        for name, value in beside.items():
            if not isinstance(value, Tensor) or name in ("loss_rows", *POINT_PARTS):
                continue
            if value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} {tuple(value.shape)} must have the shape of input_ids "
                    f"{tuple(input_ids.shape)}: one value for every token, pictures not counted"
                )
        check_ids(input_ids, llm_config.num_embeddings)
        if labels is not None:
            check_labels(labels, llm_config.num_logits)
        if sum(x is not None for x in (pixel_values, given, features)) > 1:
            raise ValueError(
                "pass pixel_values or visual_tokens, not both; or visual_features alone"
            )
        batch = Batch(input_ids, attention_mask, labels=labels, **more)  # type: ignore[arg-type]
        is_visual = self.config.is_visual(input_ids)
        counts = is_visual.sum(dim=1).tolist()
        if index is not None:
            visual = input_ids[is_visual]
            index, pixel_values = self._check_crops(pixel_values, features, index, visual)
            batch = replace(batch, image_token_pooling=index, visual_features=features)
            batch = replace(batch, pixel_values=pixel_values)
            visual_counts, by_row = [1] * len(index), None
        else:
            batch, visual_counts, by_row = self._with_images(
                batch, pixel_values, features, given, counts
            )
        one_kind = input_ids.masked_fill(is_visual, self.config.image_token_id)
        batch, places = expand_image_tokens(
            replace(batch, input_ids=one_kind), self.config.image_token_id, visual_counts, by_row
        )
        if places.source.shape == input_ids.shape:
            batch = replace(batch, input_ids=input_ids)
        check_points(batch, self.config)
        T, limit = batch.input_ids.shape[1], llm_config.max_position_embeddings
        if limit < T:
            raise ValueError(
                f"the sequence has {T} positions, the model's context holds {limit}: shorten the "
                f"text or send fewer pictures"
            )
        if labels is not None:
            self._warn_of_unlabelled(places.expand(labels, IGNORED_LABEL))
        return batch

    def parameter_summary(self) -> str:
        """Print, and return, the table of parts: what trains, parameters, gradient memory."""
        from nanomolmo2.accelerate.quantization import count_weights

        rows, names = [], {"llm": "Language Model", "point_predictor": "Pointing"}
        for key, part in self.named_children():
            name = names.get(key, key.replace("_", " ").title())
            trainable = [p for p in part.parameters() if p.requires_grad]
            gradient = sum(p.numel() * p.element_size() for p in trainable)
            rows.append((name, "yes" if trainable else "no", count_weights(part), gradient))
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

    def generate(
        self,
        prompt_ids: Tensor,
        pixel_values: Images = None,
        attention_mask: Tensor | None = None,
        **options: Unpack[ImageKeywords],
    ) -> Tensor:
        """Continue every row until its end token or ``max_new_tokens`` (512 by default).

        Args:
            prompt_ids: (B, L); pixel_values, attention_mask, visual_tokens, image_token_pooling: as
                in :meth:`forward`.
            options: fields of :class:`nanomolmo2.generation.options.GenerateOptions` and of its
                ``sampling`` (``temperature``, ``top_p``, ``seed``: one, or one a row, ...) by name,
                and those of :class:`nanomolmo2.generation.generate.Rows`: ``pad_token_id`` (by
                default the config's), ``on_token``, ``on_result``, ``stops``, ``proposer``,
                ``prefix_cache``.
        Returns: (B, L + new) prompt and new ids.
        Source: behaves like transformers' ``generate``.
        """
        from nanomolmo2.generation.generate import generate

        return generate(self, prompt_ids, pixel_values, attention_mask, **options)

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

    def _with_images(
        self,
        batch: Batch,
        pixel_values: Images,
        features: Tensor | None,
        given: Tensor | Sequence[Tensor] | None,
        counts: list[int],
    ) -> tuple[Batch, list[int], list[int] | None]:
        """The batch with whole images; visual tokens of every image; images of every row, if known.

        Images are encoded here only where they have several sizes.
        """
        connector = self.config.connector
        if given is not None:
            tokens = list(given)  # of every image (n, D)
            visual = torch.cat(tokens) if tokens else None
            return replace(batch, visual_tokens=visual), [len(t) for t in tokens], None
        if features is not None:
            n = connector.num_visual_tokens(features.shape[1])
            return replace(batch, visual_features=features), [n] * len(features), None
        images, by_row = list_images(pixel_values, counts, self._tokens_of(pixel_values))
        visual_counts = [self._tokens_of(image) for image in images]
        if len({image.shape for image in images}) > 1:
            place(self.config.is_visual(batch.input_ids), visual_counts, None, by_row)
            return replace(batch, visual_tokens=self._encode_by_size(images)), visual_counts, by_row
        whole = isinstance(pixel_values, Tensor) and pixel_values.ndim == 4
        if images:
            batch = replace(batch, pixel_values=pixel_values if whole else torch.stack(images))  # type: ignore[arg-type]
        return batch, visual_counts, by_row

    def _tokens_of(self, images: Images) -> int:
        """n of an image of the size that a tensor of images has; of the configured size else."""
        if not isinstance(images, Tensor):
            return self.config.num_visual_tokens
        P = self.config.vision_config.patch_size
        rows, columns = (side // P for side in images.shape[-2:])
        return self.config.connector.num_visual_tokens(rows * columns)

    def _encode_by_size(self, images: list[Tensor]) -> Tensor:
        """Visual tokens (n, D) of images of several sizes; one pass a size."""
        tokens: list[Tensor] = [torch.empty(0)] * len(images)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            by_shape.setdefault(tuple(image.shape), []).append(i)
        for indices in by_shape.values():
            encoded = self.encode_images(torch.stack([images[i] for i in indices]))
            for i, own in zip(indices, encoded, strict=True):
                tokens[i] = own
        return torch.cat(tokens)

    def _check_crops(
        self, pixel_values: Images, features: Tensor | None, index: Tensor, visual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The index without empty rows, and the crops, as many as the image tokens (n,) want."""
        crops = features if features is not None else pixel_values
        if not isinstance(crops, Tensor) or crops.ndim < 3:
            found = None if crops is None else type(crops).__name__
            if isinstance(crops, Tensor):
                found = str(tuple(crops.shape))
            raise ValueError(
                f"image_token_pooling needs pixel_values (M, N, 3*P*P), the crops whose patches it "
                f"counts, found {found}: pass both as the processor made them"
            )
        if features is None:
            self.vision_encoder.check(crops)
        N = crops.shape[1] if crops.ndim == 3 else self.config.vision_config.num_patches
        index = checked_pooling(index, len(crops), N)
        if len(index) != len(visual):
            raise ValueError(
                f"the prompt holds {len(visual)} image tokens, but image_token_pooling makes "
                f"{len(index)} visual tokens: was the prompt cut off, or made with another "
                f"max_crops?"
            )
        if self.config.point_config is not None:
            index = over_all_crops(index, visual != self.config.image_token_id, len(crops), N)
        return index, None if features is not None else crops

    def _warn_of_unlabelled(self, labels: Tensor) -> None:
        labelled = (labels[:, 1:] != IGNORED_LABEL).any(dim=1)
        if not self._warned_unlabelled and not bool(labelled.all()):
            self._warned_unlabelled = True
            warnings.warn(
                "a row has no label to learn from: it adds nothing to the loss (was the answer cut "
                "off, or every label -100?)",
                stacklevel=4,
            )


def _attention_of(mask: Tensor | BlockMask | None) -> tuple[Tensor | None, Cache | None]:
    """A dense mask for the layers, or what attends in their place by a block mask."""
    if mask is None or isinstance(mask, Tensor):
        return mask, None
    from nanomolmo2.accelerate.flex import FlexAttention

    return None, FlexAttention(mask)
