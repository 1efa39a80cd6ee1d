"""An embedding table, and a head, of which the last rows alone learn, or at a rate of their own."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.accelerate.linear import linear
from nanomolmo2.models import language_model
from nanomolmo2.models.language_model import TiedHead

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


class NewRowsHead(nn.Linear):
    """A head, ``weight`` (V, D), and behind it rows of their own, ``new_rows`` (A, D)."""

    new_rows: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> logits (..., V + A)."""
        return torch.cat((linear(x, self.weight), _logits_of_rows(x, self.new_rows)), dim=-1)


class NewRowsTiedHead(TiedHead):
    """The head of a `NewRowsEmbedding` whose new rows are written too."""

    _tables: tuple[NewRowsEmbedding]  # in a tuple: it is no module of the head
    _before: type[TiedHead]

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """(..., D), (V, D) -> (..., V + A)."""
        old = self._before.forward(self, hidden, table)
        return torch.cat((old, _logits_of_rows(hidden, self._tables[0].new_rows)), dim=-1)


def _logits_of_rows(x: Tensor, rows: Tensor) -> Tensor:
    return F.linear(x, rows.to(x.dtype))


def has_new_rows(llm: language_model.LanguageModel) -> bool:
    """Whether :func:`split_new_rows` let rows of the table or of the head stand apart."""
    head: Any = llm.lm_head
    return isinstance(llm.embed_tokens, NewRowsEmbedding) or isinstance(head, NewRowsHead)


@torch.no_grad()
def split_new_rows(llm: LLM, *, table: bool = True, head: bool = True) -> LLM:
    """Let the rows beyond the base vocabulary stand apart, in place.

    Args:
        table: those of the embedding table, and with it of a tied head that writes them.
        head: those of a head of its own, where it writes them.
    """
    config, layer = llm.config, llm.lm_head
    if table:
        _split(llm.embed_tokens, NewRowsEmbedding, config.vocab_size, learns=False)
        if layer is None and config.predict_additional_vocab:
            tied: Any = llm.tied_head
            tied._before, tied.__class__ = type(tied), NewRowsTiedHead
            tied._tables = (llm.embed_tokens,)
    if head and layer is not None and config.predict_additional_vocab:
        _split(layer, NewRowsHead, config.vocab_size, learns=layer.weight.requires_grad)
        layer.out_features = config.vocab_size
    return llm


@torch.no_grad()
def join_new_rows(llm: LLM) -> LLM:
    """Undo :func:`split_new_rows`: the rows that learned are where they were."""
    tied: Any = llm.tied_head
    if isinstance(llm.tied_head, NewRowsTiedHead):
        tied.__class__ = tied._before
        del tied._before, tied._tables
    table: Any = llm.embed_tokens
    if isinstance(table, NewRowsEmbedding):
        _join(table, nn.Embedding)
    head: Any = llm.lm_head
    if isinstance(head, NewRowsHead):
        _join(head, nn.Linear)
        head.out_features = len(head.weight)
    return llm


def _split(layer: Any, new: type[nn.Module], base: int, *, learns: bool) -> None:
    whole = layer.weight
    layer.__class__ = new
    layer.weight = nn.Parameter(whole[:base].clone(), requires_grad=learns)
    layer.register_parameter("new_rows", nn.Parameter(whole[base:].clone()))


def _join(layer: Any, plain: type[nn.Module]) -> None:
    whole = torch.cat((layer.weight, layer.new_rows.to(layer.weight)))
    layer.weight = nn.Parameter(whole, requires_grad=False)
    del layer.new_rows
    layer.__class__ = plain
