"""Pointing by selection: which visual token, which ViT patch of it, which ninth of the patch.

    state before PATCH  -> x_norm -> patch_q -> rotated by the last chosen row . row keys -> row
    state at PATCH      -> x_norm -> subpatch_q . slot keys of the row                    -> slot
    state at SUBPATCH   -> (x_norm) -> subpatch_loc_k                                     -> cell

    row keys: states of the visual tokens -> x_norm -> patch_k -> rotated by their number, and
              behind them one learned vector: no more points (NMP)
    slot keys: ViT features of the row's patches -> subpatch_k

States are those before the decoder's final norm. N rows (visual tokens of a prompt), S slots of a
row, Q queries, D width of the decoder, F of the ViT features, E of keys and queries.

Source: allenai/molmo2, olmo/hf_model/modeling_molmo_point.py and olmo/models/molmo_point.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nanomolmo2.models.layers import RMSNorm, apply_rope, rope_table
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config

CELLS = 9  # of a ViT patch, 3 x 3, column by column
MASKED = -1e8  # logit of a row or slot that cannot be selected


class NoMorePoints(nn.Module):
    """The key of the class that ends a list."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(size))


class PointPredictor(nn.Module):
    """Scores of rows, slots and cells, and what is read back of a chosen patch."""

    def __init__(self, config: NanoMolmo2Config) -> None:
        super().__init__()
        assert config.point_config is not None
        self.config = config.point_config
        D, F, E = (
            config.llm_config.hidden_size,
            config.connector.feature_dim,
            self.config.patch_embed_dim,
        )
        self.x_norm = RMSNorm(D, config.llm_config.rms_norm_eps)
        self.patch_q = nn.Linear(D, E)
        self.patch_k = nn.Linear(D, E)
        self.subpatch_q = nn.Linear(D, E)
        self.subpatch_k = nn.Linear(F, E)
        self.subpatch_loc_k = nn.Linear(D, CELLS)
        self.add_no_point_class_embed = NoMorePoints(E)
        self.build_vit_embedding = nn.Linear(F, D)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    # ---- rows ----

    def row_keys(self, states: Tensor, position_ids: Tensor) -> Tensor:
        """Keys (N + 1, E) of the visual tokens and, last and not rotated, of no-more-points.

        Args:
            states: (N, D) of the visual tokens. position_ids: (N,) number among the selectable.
        """
        keys = self._rotated(self.patch_k(self.x_norm(states)), position_ids)
        end = self.add_no_point_class_embed.vector.to(keys.dtype)
        return torch.cat((keys, end[None]))

    def row_logits(
        self,
        states: Tensor,
        keys: Tensor,
        last_position_ids: Tensor,
        selectable: Tensor,
        num_keys: Tensor | None = None,
    ) -> Tensor:
        """Scores (Q, N + 1) of all rows, the last that of no-more-points.

        Args:
            states: (Q, D) of the tokens before PATCH. keys: (N + 1, E).
            last_position_ids: (Q,) of the row that was chosen before; 0 for a list's first.
            selectable: (N + 1,) or (Q, N + 1) bool; others get `MASKED`.
            num_keys: scalar, of one sequence with NMP, where ``keys`` are those of several.
        """
        queries = self._rotated(self.patch_q(self.x_norm(states)), last_position_ids)
        scores = queries @ keys.T
        if self.config.row_divisor == "keys" and num_keys is not None:
            scores = scores / num_keys.to(scores.dtype).sqrt()
        else:
            size = len(keys) if self.config.row_divisor == "keys" else keys.shape[1]
            scores = scores / math.sqrt(size)
        return scores.float().masked_fill(~selectable, MASKED)

    def _rotated(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """(n, E) by rotary positions (n,), all E dimensions as one head."""
        theta = self.config.token_prediction_rotary_theta
        rope = rope_table(position_ids[None], x.shape[1], theta)
        return apply_rope(x[None, None], rope)[0, 0]

    # ---- slots ----

    def slot_keys(self, windows: Tensor) -> Tensor:
        """ViT features (..., F) of patches, 0 in empty slots -> keys (..., E)."""
        return self.subpatch_k(windows)

    def slot_logits(self, states: Tensor, slot_keys: Tensor) -> Tensor:
        """Scores (Q, S) of slots. states: (Q, D) at PATCH. slot_keys: (Q, S, E) of the rows."""
        queries = self.subpatch_q(self.x_norm(states))
        scores = (slot_keys @ queries[:, :, None])[:, :, 0]
        return scores.float() / math.sqrt(slot_keys.shape[-1])

    def embed_slot(self, features: Tensor) -> Tensor:
        """ViT features (Q, F) of the chosen patches -> what SUBPATCH reads, (Q, D)."""
        return self.build_vit_embedding(features)

    # ---- cells ----

    def cell_logits(self, states: Tensor, normed: bool | None = None) -> Tensor:
        """Scores (Q, 9). states: (Q, D) at SUBPATCH. normed: through x_norm; None = by the rule."""
        if normed is None:
            normed = self.config.location_input == "norm"
        return self.subpatch_loc_k(self.x_norm(states) if normed else states).float()
