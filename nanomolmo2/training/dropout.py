"""Residual dropout: part of what attention and MLP add to the residual stream is left out.

B rows, T positions, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.models import LanguageModel
from nanomolmo2.models.language_model import DecoderLayer


class ResidualDropout(nn.Module):
    """Dropout in training, everywhere or at some positions.

    Attributes:
        p: share that is left out.
        positions: (B, T, 1) bool, where it is left out; None = everywhere.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.positions: Tensor | None = None

    def forward(self, y: Tensor) -> Tensor:
        if not self.training or not self.p:
            return y
        dropped = F.dropout(y, self.p)
        return dropped if self.positions is None else torch.where(self.positions, dropped, y)

    def at_rows(self, rows: Tensor, shape: torch.Size) -> None:
        """Only at flat positions ``rows`` (N,) of ``shape`` (B, T), as `next_tokens` names them."""
        at = torch.zeros(shape.numel(), dtype=torch.bool, device=rows.device)
        self.positions = at.index_fill(0, rows, True).view(*shape, 1)


def residual_dropout(llm: LanguageModel, p: float) -> ResidualDropout:
    """Put residual dropout into every block of a decoder. Returns: the one module that they share.

    Source: Molmo2, pre-training, where it is for positions whose next token is learned.
    """
    dropout = ResidualDropout(p).train(llm.training)
    for layer in llm.layers:
        assert isinstance(layer, DecoderLayer)
        layer.dropout = dropout
    return dropout
