"""An embedding table of which the last rows alone learn."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.models import language_model

LLM = TypeVar("LLM", bound=language_model.LanguageModel)


class NewRowsEmbedding(nn.Embedding):
    """A table, ``weight`` (V, D), and behind it rows of their own, ``new_rows`` (A, D), that learn.

    So the table needs neither a gradient nor moments: of 150,000 rows 128 learn.
    """

    new_rows: nn.Parameter

    @property
    def first_new(self) -> int:
        """V, the first id whose row learns."""
        return len(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Ids (...) -> (..., D)."""
        x = F.embedding(input.clamp(max=self.first_new - 1), self.weight)
        new = F.embedding((input - self.first_new).clamp(min=0), self.new_rows)
        return torch.where((input >= self.first_new)[..., None], new.to(x.dtype), x)


@torch.no_grad()
def split_new_rows(llm: LLM) -> LLM:
    """Let the rows beyond the base vocabulary stand apart, in place; the head never reads them."""
    table, base = llm.embed_tokens, llm.config.vocab_size
    whole = table.weight
    table.__class__ = NewRowsEmbedding
    table.weight = nn.Parameter(whole[:base].clone(), requires_grad=False)
    table.register_parameter("new_rows", nn.Parameter(whole[base:].clone()))
    return llm


@torch.no_grad()
def join_new_rows(llm: LLM) -> LLM:
    """Undo :func:`split_new_rows`: the rows that learned are in the table again."""
    table: nn.Module = llm.embed_tokens
    if isinstance(table, NewRowsEmbedding):
        whole = torch.cat((table.weight, table.new_rows.to(table.weight)))
        table.weight = nn.Parameter(whole, requires_grad=False)
        del table.new_rows
        table.__class__ = nn.Embedding  # type: ignore[assignment]
    return llm
