"""NanoMolmo2 with points: what is read back where one is written, and the loss of selecting it.

    ... coords=" [PATCH][SUBPATCH][LOCATION] 1 [PATCH][SUBPATCH][LOCATION] 2 [PATCH] "> ...
                 row    slot     cell          row    slot     cell          NMP

`Batch.point_targets` says what stands behind every PATCH, in reading order. The token before each
marker is the one that selects. Read back are, in the markers' places,

    PATCH     embedding + visual token of the row     (no-more-points: the embedding alone)
    SUBPATCH  embedding + linear map of the ViT features of the patch (or that map alone)
    LOCATION  embedding

B rows of T positions, n visual tokens of the batch, P PATCH tokens, S slots, D width, F features.

Source: allenai/molmo2, olmo/models/molmo_point and its training data (launch_scripts, 2026-03).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.batch import NO_MORE_POINTS, PACK_SUBSEGMENT, Batch
from nanomolmo2.models import nanomolmo2
from nanomolmo2.models.finder import Finder
from nanomolmo2.models.loss import Reduction, Targets, next_tokens, reduce
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config, Output
from nanomolmo2.models.point_predictor import MASKED, PointPredictor

NOT_TEXT = -1e5  # logit of a marker, as in the released code
ROWS = 128  # that pass the head at a time only to be counted


@dataclass(frozen=True)
class Seen:
    """The visual tokens of a batch in reading order, as points see them."""

    tokens: Tensor  # (n, D), what the connector gave
    features: Tensor  # (patches of all images, F)
    index: Tensor  # (n, S) the patches of each, -1 = empty slot
    places: Tensor  # (n,) where they stand among the B * T positions
    selectable: Tensor  # (n,) bool; those of overviews are not
    position_ids: Tensor  # (n,) number among the selectable ones of its example, from 0
    examples: Tensor  # (n,) which example of the batch they belong to

    @property
    def filled(self) -> Tensor:
        """(n, S) bool, False = empty slot."""
        return self.index >= 0

    def windows(self, rows: Tensor) -> Tensor:
        """(Q,) rows -> (Q, S, F) features of their slots, 0 in empty ones."""
        index = self.index[rows]
        return self.features[index.clamp(min=0)] * (index >= 0)[:, :, None]


class PointTerms(NamedTuple):
    """Weighted sums of the loss, each a scalar, and what they are sums over."""

    text: Tensor  # every answer token, with its z-loss
    row: Tensor
    slot: Tensor
    cell: Tensor
    weights: Tensor  # (N,) of the answer's tokens: the divisor is their sum
    counts: Tensor  # (3,) selections of rows, slots and cells that carry loss
    right: Tensor  # (3,) those whose likeliest class is the target
    right_text: Tensor  # scalar: answer tokens that are the likeliest

    @property
    def total(self) -> Tensor:
        return self.text + self.row + self.slot + self.cell


class PointingNanoMolmo2(nanomolmo2.NanoMolmo2):
    """`nanomolmo2.NanoMolmo2`, which selects points where its config has a ``point_config``."""

    def __init__(self, config: NanoMolmo2Config | None = None) -> None:
        super().__init__(config)
        has_points = self.config.point_config is not None
        self.point_predictor = PointPredictor(self.config) if has_points else None
        size, kind = self.config.finder_dim, self.config.connector.connector_type
        if size is not None and kind != "pooling":
            raise ValueError(f"finder_dim needs the pooling connector, but it is {kind!r}")
        widths = self.config.connector.feature_dim, self.config.llm_config.hidden_size
        self.finder = Finder(*widths, size) if size else None

    def embed(self, batch: Batch) -> Tensor:
        points, rule = self.point_predictor, self.config.point_config
        if points is None or rule is None:
            return super().embed(batch)
        batch, ids = self.encoded(batch), batch.input_ids
        if rule.overview_embedding == "shared":
            ids = ids.masked_fill(self.config.is_visual(ids), self.config.image_token_id)
        x = super().embed(replace(batch, input_ids=ids))
        if batch.point_targets is None:
            return x
        adds = batch.labels is not None or rule.subpatch_embedding == "add"
        return self._read_back(x, self.see(batch), batch, adds)

    def forward(self, batch: Batch) -> Output:
        """Logits of the text and, where there are labels, the loss with that of the points.

        Without labels those of the markers are `NOT_TEXT`: what they stand for is selected.
        """
        if self.point_predictor is None:
            return super().forward(batch)
        if batch.labels is None:
            logits = super().forward(batch).logits
            markers = torch.tensor(self.point_predictor.config.marker_ids, device=logits.device)
            return Output(logits.index_fill(-1, markers, NOT_TEXT), None)
        batch = self.encoded(batch)
        states = self.states(batch)
        logits = self.llm.head(self.llm.norm(states))
        (row, slot, cell), _, _ = self._selections(states.flatten(0, 1), self.see(batch), batch)
        assert batch.labels is not None
        weights = next_tokens(batch.labels, batch.loss_weights, batch.loss_rows).weights
        selections = reduce(row + slot + cell, weights, "mean")
        return Output(logits, nanomolmo2.mean_loss(logits, batch) + selections)

    def loss(self, batch: Batch, reduction: Reduction = "mean", z_loss: float = 0.0) -> Tensor:
        """The loss of text and, with their weights, of the three selections of every point."""
        if self.point_predictor is None:
            return super().loss(batch, reduction, z_loss)
        terms = self.loss_terms(batch, z_loss, counts_text=False)
        return reduce(terms.total, terms.weights, reduction)

    def loss_terms(
        self,
        batch: Batch,
        z_loss: float = 0.0,
        *,
        counts_text: bool = True,
        states: Tensor | None = None,
    ) -> PointTerms:
        """The four terms of a batch with labels.

        A selection weighs what the label of its marker weighs: PATCH for the row, SUBPATCH for the
        slot, LOCATION for the cell; points without labels, such as a question's, weigh nothing.
        Without ``counts_text`` the tokens of the text that are right are not counted: 0.
        ``states`` are those of the batch, if they are known.
        """
        batch = self.encoded(batch)
        states = self.states(batch) if states is None else states
        assert batch.labels is not None
        targets = next_tokens(batch.labels, batch.loss_weights, batch.loss_rows)
        hidden = self.llm.norm(states)
        text = self.llm.targets_loss(hidden, targets, "sum", z_loss)
        terms, counts, right = self._selections(states.flatten(0, 1), self.see(batch), batch)
        right_text = self._right_tokens(hidden, targets) if counts_text else counts.new_zeros(())
        return PointTerms(text, *terms, targets.weights, counts, right, right_text)

    @torch.no_grad()
    def _right_tokens(self, hidden: Tensor, targets: Targets) -> Tensor:
        """How many tokens are the likeliest, some rows at a time: all logits would be large."""
        rows = hidden.flatten(0, 1).index_select(0, targets.rows)
        parts = zip(rows.split(ROWS), targets.tokens.split(ROWS), strict=True)
        right = [(self.llm.head(part).argmax(dim=-1) == tokens).sum() for part, tokens in parts]
        return torch.stack(right).sum() if right else rows.new_zeros((), dtype=torch.long)

    @torch.no_grad()
    def generate_naively(self, batch: Batch, max_new_tokens: int) -> Tensor:
        """Greedy, without any cache: everything again for every token. The oracle of the tests.

        Args:
            batch: without padding on the right.
        Returns: (B, max_new_tokens) new ids.
        """
        ids, prompt = batch.input_ids, batch.input_ids.shape[1]
        for _ in range(max_new_tokens):
            newest = self.llm.head(self.hidden_states(batch)[:, -1]).argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, newest], dim=1), batch.attention_mask
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=True)
            batch = replace(batch, input_ids=ids, attention_mask=mask)
        return ids[:, prompt:]

    def see(self, batch: Batch) -> Seen:
        """The visual tokens of a batch, and where they stand."""
        batch, ids = self.encoded(batch), batch.input_ids
        tokens, features = batch.visual_tokens, batch.visual_features
        if tokens is None or features is None:  # no image; nothing refers to these
            width = self.config.connector.feature_dim
            weight = self.llm.embed_tokens.weight
            tokens, features = weight.new_zeros(0, weight.shape[1]), weight.new_zeros(0, 1, width)
            index = ids.new_zeros(0, self.config.connector.pooling_size**2)
        else:
            index = self._windows(batch, features)
        places = first_true(self.config.is_visual(ids).flatten(), len(tokens))
        selectable = ids.flatten()[places] == self.config.image_token_id
        examples = example_of(batch).flatten()[places]
        counted = selectable.cumsum(dim=0)
        first = torch.ones_like(examples, dtype=torch.bool)
        first[1:] = examples[1:] != examples[:-1]
        before = ((counted - selectable.long()) * first).cummax(dim=0).values
        return Seen(
            tokens,
            features.flatten(0, 1),
            index,
            places,
            selectable,
            counted - 1 - before,
            examples,
        )

    def encoded(self, batch: Batch) -> Batch:
        """The batch with the features and tokens of its images, each computed once.

        One with labels gets targets, if only none: also without a point the loss leads back to all
        weights, since ranks share their gradients.
        """
        if batch.labels is not None and batch.point_targets is None:
            batch = replace(batch, point_targets=batch.input_ids.new_zeros(0, 3))
        if batch.visual_features is None and batch.pixel_values is not None:
            layers = self.config.connector.vit_layers
            features = self.vision_encoder.features(batch.pixel_values, layers)
            batch = replace(batch, visual_features=features)
        if batch.visual_tokens is None and batch.visual_features is not None:
            tokens = self.connector(batch.visual_features, batch.image_token_pooling)
            batch = replace(batch, visual_tokens=tokens.flatten(0, -2))
        return batch

    def _windows(self, batch: Batch, features: Tensor) -> Tensor:
        """(n, S) patches of every visual token, over all images."""
        if batch.image_token_pooling is not None:
            return batch.image_token_pooling.to(features.device)
        index: Tensor = self.connector.layers.square_windows(features)  # type: ignore[operator]
        return index

    def _read_back(self, x: Tensor, seen: Seen, batch: Batch, adds: bool) -> Tensor:
        """Embeddings (B, T, D) with what was selected."""
        assert self.point_predictor is not None and batch.point_targets is not None
        some = slice(None if len(seen.tokens) else 0)  # without an image nothing is read back
        row, slot, _ = batch.point_targets.long()[some].unbind(dim=1)
        flat, places = x.flatten(0, 1), self._patch_places(batch)[some]
        is_row = row != NO_MORE_POINTS
        of_row = seen.tokens[row.where(is_row, 0)].to(x.dtype) * is_row[:, None]
        flat = flat.index_add(0, places, of_row)
        has_slot = is_row & (slot >= 0)
        patch = seen.index[row.where(is_row, 0), slot.clamp(min=0)]
        features = seen.features[patch.clamp(min=0)] * (patch >= 0)[:, None]
        of_slot = self.point_predictor.embed_slot(features).to(x.dtype) * has_slot[:, None]
        behind = (places + 1).clamp(max=len(flat) - 1)  # the last token may be a cut off PATCH
        if not adds:
            kept = torch.ones_like(flat[:, 0]).index_put((behind,), (~has_slot).to(flat.dtype))
            flat = flat * kept[:, None]
        return flat.index_add(0, behind, of_slot).view_as(x)

    def _selections(
        self, states: Tensor, seen: Seen, batch: Batch
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Loss sums, counts and right answers of rows, slots and cells. states: (B * T, D)."""
        points, rule = self.point_predictor, self.config.point_config
        assert points is not None and rule is not None and batch.point_targets is not None
        row, slot, cell = batch.point_targets.long().unbind(dim=1)
        places, weights = self._patch_places(batch), _label_weights(batch).flatten()
        is_row, last = row != NO_MORE_POINTS, len(states) - 1
        n = len(seen.tokens)
        at_slot, at_cell = (places + 1).clamp(max=last), (places + 2).clamp(max=last)

        keys = points.row_keys(states[seen.places], seen.position_ids)
        previous = self._previous(batch, row, places)  # (P,), -1 = the first of its list
        last_ids = F.pad(seen.position_ids, (0, 1))[previous.where(previous >= 0, n)]
        examples = example_of(batch).flatten()[places]
        open_rows = seen.selectable & (seen.examples == examples[:, None])
        numbers = torch.arange(n, device=states.device)
        open_rows = F.pad(open_rows & (numbers >= previous[:, None]), (0, 1), value=True)
        before = states[(places - 1).clamp(min=0)]
        # In training, sequences of a batch are padded to the keys of the longest.
        num_keys = self.config.is_visual(batch.input_ids).sum(dim=1).amax() + 1
        scores = points.row_logits(before, keys, last_ids, open_rows, num_keys)
        of_rows = _term(scores, row.where(is_row, n), weights[places])

        some = slice(None if n else 0)  # without an image there is no slot
        chosen = row.where(is_row, 0)[some]
        has_slot = is_row & (slot >= 0)
        keys = points.slot_keys(seen.windows(chosen))
        scores = points.slot_logits(states[places[some]], keys)
        if rule.loss_masks_empty_slots:
            scores = scores.masked_fill(~seen.filled[chosen], MASKED)
        of_slots = _term(scores, slot.clamp(min=0)[some], (weights[at_slot] * has_slot)[some])

        has_cell = has_slot & (cell >= 0)
        scores = points.cell_logits(states[at_slot], normed=True)
        of_cells = _term(scores, cell.clamp(min=0), weights[at_cell] * has_cell)
        losses, counts, right = zip(of_rows, of_slots, of_cells, strict=True)
        return losses, torch.stack(counts), torch.stack(right)

    def _patch_places(self, batch: Batch) -> Tensor:
        """(P,) where PATCH tokens stand among the B * T positions."""
        assert self.config.point_config is not None and batch.point_targets is not None
        is_patch = batch.input_ids == self.config.point_config.patch_token_id
        return first_true(is_patch.flatten(), len(batch.point_targets))

    def _previous(self, batch: Batch, row: Tensor, places: Tensor) -> Tensor:
        """(P,) the row before in the same list; -1 for the first of a list."""
        branch = example_of(batch, branches=True).flatten()[places]
        previous = torch.full_like(row, -1)
        same = (row[:-1] != NO_MORE_POINTS) & (branch[1:] == branch[:-1])
        if batch.point_lists is not None:
            same = same & (batch.point_lists[1:] == batch.point_lists[:-1])
        previous[1:] = row[:-1].where(same, -1)
        return previous


def first_true(mask: Tensor, number: int) -> Tensor:
    """Indices (number,) of a flat mask that is True in so many places, found on its device."""
    return mask.int().sort(descending=True, stable=True).indices[:number]


def example_of(batch: Batch, branches: bool = False) -> Tensor:
    """(B, T) a number for every example of a batch, packed or not, or for each of its branches."""
    ids = batch.input_ids
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    if batch.subsegment_ids is None:
        return rows.expand_as(ids)
    subsegments = batch.subsegment_ids.clamp(min=0)
    if not branches:
        subsegments = subsegments // PACK_SUBSEGMENT
    return rows * (PACK_SUBSEGMENT * (ids.shape[1] + 1)) + subsegments


def _label_weights(batch: Batch) -> Tensor:
    """(B, T) of the label at each position; 0 where there is none, and at the first."""
    assert batch.labels is not None
    weights = (batch.labels >= 0).float()
    if batch.loss_weights is not None:
        weights = weights * batch.loss_weights
    return F.pad(weights[:, 1:], (1, 0))


def _term(scores: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of cross-entropies; how many weigh something, and how many of these are right.

    scores: (P, classes); target, weights: (P,).
    """
    losses = F.cross_entropy(scores, target, reduction="none")
    counted = weights.detach() > 0
    right = (scores.detach().argmax(dim=-1) == target) & counted
    return (losses * weights).sum(), counted.sum(), right.sum()
