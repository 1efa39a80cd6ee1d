"""From logits to the next token of every row. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to choose: temperature 0 = greedy; top_k 0 and top_p 1 = off; one seed, or one a row."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature must be 0 (greedy) or more, found {self.temperature}: usual values "
                f"are 0.2 to 1"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more tokens, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (off), found {self.top_p}")

    def generators(self, rows: int) -> list[torch.Generator]:
        """One generator a row: what a row draws does not depend on the others."""
        if self.seed is None:
            seeds = [int(torch.randint(2**62, ())) for _ in range(rows)]
        elif isinstance(self.seed, int):
            seeds = [self.seed] * rows
        else:
            seeds = list(self.seed)
            if len(seeds) != rows:
                raise ValueError(f"{len(seeds)} seeds for {rows} rows: give one, or one a row")
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(logits: Tensor, params: SamplingParams, generators: list[torch.Generator]) -> Tensor:
    """Choose one token a row.

    Args:
        logits: (B, V) of any floating type; computed in float32.
        generators: one a row, on the CPU; unused when greedy.
    Returns: (B,) int64.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.float()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / params.temperature  # cannot overflow
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    if params.top_k:
        scores[:, params.top_k :] = -torch.inf
    probabilities = scores.softmax(dim=-1)
    if params.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    mass = probabilities.cumsum(dim=-1)
    drawn = torch.cat([torch.rand(1, generator=g) for g in generators])[:, None].to(mass)
    # Inverse of the distribution function: the first token whose mass passes the drawn share.
    chosen = torch.searchsorted(mass, drawn * mass[:, -1:], right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(chosen, last))[:, 0]
