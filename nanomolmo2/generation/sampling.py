"""From logits to the next token of every row. B rows, V vocabulary.

The settings act in this order, which is that of transformers:

    logits -> logit_bias -> repetition_penalty -> constraint -> greedy, or
              temperature -> top_k -> top_p -> min_p -> a draw

A row is computed by itself, in float32 on the CPU, with a generator of its own: with equal logits
it gives the same token alone, in any batch and with any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanomolmo2.generation.options import Constraint as Constraint
from nanomolmo2.generation.options import ConstraintState as ConstraintState
from nanomolmo2.generation.options import SamplingParams as SamplingParams

_FIRST_CANDIDATES = 256  # likeliest tokens among which top_p mostly finds its share


class Sampled(NamedTuple):
    """A chosen token; ``logprob`` and ``top`` [(id, log-probability), ...] only where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Likeliest(NamedTuple):
    """All that a greedy choice needs of a row of logits."""

    token: int
    value: float
    logprob: float


class ChoiceError(ValueError):
    """The settings of a request leave nothing to choose, or name tokens that there are not."""


class DamagedError(ValueError):
    """What the model computed is no number."""


class Sampler:
    """Chooses the tokens of one row, in order, and remembers what its settings need.

    Drafts are verified with it too: `sample` for each position as long as the tokens agree. As it
    draws once a token, the answer is the same as without drafts, also at a temperature.

    ``logprob``: of the token, or the part of a point, that was picked last, the model's own, in
    front of all settings.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        """
        Args:
            prompt_ids: for the repetition penalty.
            generator: on the CPU; by default from the seed of params.
        """
        self.params = params
        self.logprob = 0.0
        self._generator = generator
        self._seen = set(prompt_ids) if params.repetition_penalty != 1 else set()
        self._state = params.constraint.start() if params.constraint else None
        if generator is None and params.temperature > 0:
            self._generator = params.generators(1)[0]

    def sample(self, logits: Tensor) -> Sampled:
        """Choose the next token.

        Args:
            logits: (V,) of any floating type and device; not changed.
        Raises: ValueError for logits with nan or +inf, and where no token is left to choose.
        """
        return self.choose(fetch(logits[None], [self])[0])

    def choose(self, logits: Likeliest | Tensor) -> Sampled:
        """`sample` from what `fetch` brought to the host."""
        sampled = self.pick(logits)
        self.take(sampled.token)
        return sampled

    def pick(self, logits: Likeliest | Tensor) -> Sampled:
        """`choose` a token that counts only once :meth:`take` is told."""
        if isinstance(logits, Likeliest):
            _check_best(logits.value)
            self.logprob = logits.logprob
            return Sampled(logits.token)
        row = self._process(logits)
        if self.params.temperature == 0:
            token = int(row.argmax())
            _check_best(float(row[token]))
        else:
            token = _draw(row, self.params, self._generator)
        self.logprob = float(logits[token] - logits.logsumexp(dim=-1))
        return Sampled(token, *_logprobs(logits, token, self.params.logprobs))

    def take(self, token: int, *, repeats: bool = True) -> None:
        """Count a token as chosen. ``repeats``: the repetition penalty counts it too."""
        if repeats and self.params.repetition_penalty != 1:
            self._seen.add(token)
        if self._state is not None:
            self._state.advance(token)

    def select(self, scores: Tensor) -> int:
        """The class of a point, from the scores (classes,) of all, those excluded far below.

        The likeliest, the first of equals; with ``sample_points`` a draw at the temperature.
        """
        _check_best(float(scores.max()))
        if self.params.temperature == 0 or not self.params.sample_points:
            return int(scores.argmax())
        return _draw(scores, SamplingParams(self.params.temperature), self._generator)

    def _process(self, row: Tensor) -> Tensor:
        """(V,) -> (V,): everything in front of the temperature."""
        params, size = self.params, len(row)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias))
            if int(ids.max()) >= size:
                raise ChoiceError(
                    f"logit_bias names token {int(ids.max())}, but the model has {size} tokens"
                )
            row = row.clone()
            row[ids] += torch.tensor(list(params.logit_bias.values()))
        if params.repetition_penalty != 1 and self._seen:
            # A prompt may hold ids that can not be written: those of images.
            seen = torch.tensor([id for id in self._seen if id < size], dtype=torch.long)
            before = row[seen]
            penalty = params.repetition_penalty
            row = row.index_put(
                (seen,), torch.where(before < 0, before * penalty, before / penalty)
            )
        if self._state is not None:
            allowed = self._state.allowed()
            if allowed is not None:
                # Rows of the head behind the last token of the tokenizer are never written.
                inside = min(len(allowed), size)
                excluded = torch.ones(size, dtype=torch.bool)
                excluded[:inside] = ~allowed[:inside]
                _check_best(float(row.max()))
                row = row.masked_fill(excluded, -torch.inf)
        return row


def fetch(logits: Tensor, samplers: Sequence[Sampler]) -> list[Likeliest | Tensor]:
    """What the samplers need of their rows, on the host, in a single transfer.

    Args:
        logits: (B, V) of any floating type and device.
        samplers: one a row.
    Returns: of a row that is simply greedy its likeliest token, else its logits (V,), float32.
    """
    B, V = logits.shape
    logits = logits.detach()
    whole = [b for b in range(B) if not samplers[b].params.greedy_only]
    greedy = [b for b in range(B) if samplers[b].params.greedy_only]
    parts = [logits[b].float() for b in whole]
    tokens = logits.new_empty(0, dtype=torch.int32)
    if greedy:
        rows = torch.stack([logits[b] for b in greedy]) if whole else logits
        likeliest = rows.argmax(dim=-1)  # finds nan and inf before all else, the first of equals
        value = rows.gather(-1, likeliest[:, None])[:, 0].float()
        parts += [value, value - rows.float().logsumexp(dim=-1)]
        tokens = likeliest.int()
    if not parts:
        return []
    # Ids and the bits of floats in one tensor of int32.
    host = torch.cat([*(part.view(torch.int32) for part in parts), tokens]).cpu()
    values = host[: len(host) - len(tokens)].view(torch.float32)
    ids = host[len(values) :].tolist()
    brought: dict[int, Likeliest | Tensor] = {}
    brought |= zip(whole, values[: len(whole) * V].view(len(whole), V), strict=True)
    best, logprobs = values[len(whole) * V :].view(2, -1).tolist()
    found = map(Likeliest, ids, best, logprobs)
    brought |= zip(greedy, found, strict=True)
    return [brought[b] for b in range(B)]


def sample_rows(logits: Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
    """Choose a token for each row, rows that are simply greedy in one go.

    Args:
        logits: (B, V).
        samplers: one a row.
    """
    pairs = zip(samplers, fetch(logits, samplers), strict=True)
    return [sampler.choose(row) for sampler, row in pairs]


def sample(logits: Tensor, params: SamplingParams, generators: list[torch.Generator]) -> Tensor:
    """Choose one token a row, by settings that need no memory of earlier tokens.

    Args:
        logits: (B, V) of any floating type.
        generators: one a row, on the CPU; unused when greedy.
    Returns: (B,) int64.
    """
    if params.greedy_only:
        samplers = [Sampler(params) for _ in range(len(logits))]
    else:
        samplers = [Sampler(params, (), generator) for generator in generators]
    tokens = [sampled.token for sampled in sample_rows(logits, samplers)]
    return torch.tensor(tokens, dtype=torch.long, device=logits.device)


# ---- the draw ----


def _draw(row: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """Draw from what the settings leave of a row, (V,)."""
    probabilities, ids = _distribution(row, params)
    mass = probabilities.double().cumsum(dim=0)
    # Inverse of the distribution function: the first token whose mass passes the drawn share.
    share = torch.rand(1, generator=generator).double() * mass[-1]
    place = int(torch.searchsorted(mass, share, right=True))
    # Rounding must not lead to a token behind the last one that may come.
    last = int(probabilities.nonzero()[-1])
    place = min(place, last)
    return place if ids is None else int(ids[place])


def _distribution(row: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Temperature, top_k, top_p and min_p.

    Returns: (probabilities, ids): relative ones, of the tokens ``ids``; None = of all by id.
    """
    best = row.max()
    _check_best(float(best))
    scores = (row - best) / params.temperature  # at most 0: cannot overflow
    ids = None
    if params.top_k:
        scores, ids = _likeliest(scores, params.top_k)
    weights = scores.exp()
    if params.top_p < 1:
        share = params.top_p * weights.sum(dtype=torch.float64)
        if ids is None:
            # Sorting a whole vocabulary costs as much as a small model's layer; a few hundred
            # tokens mostly have the share.
            scores, ids = _likeliest(scores, _FIRST_CANDIDATES)
            if scores.exp().sum(dtype=torch.float64) < share:
                scores, ids = _likeliest((row - best) / params.temperature, len(row))
            weights = scores.exp()
        before = weights.double().cumsum(dim=0) - weights  # of the likelier tokens
        # The likeliest always stays: a share may be so small that rounding makes it 0.
        weights[1:] = weights[1:].masked_fill(before[1:] >= share, 0.0)
    if params.min_p:
        weights = weights.masked_fill(weights < params.min_p, 0.0)  # the likeliest one has 1
    return weights, ids


def _likeliest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids) of the k largest, in order; of equals the smaller id comes first."""
    if k < len(scores):
        # topk alone may take any of equals at the border.
        ids = (scores >= scores.topk(k).values[-1]).nonzero()[:, 0]
    else:
        ids = torch.arange(len(scores))
    values, order = scores[ids].sort(descending=True, stable=True)
    return values[:k], ids[order[:k]]


def _logprobs(
    raw: Tensor, token: int, number: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """The log-probability of a token, and the likeliest tokens with theirs."""
    if number is None:
        return None, ()
    logprobs = raw.log_softmax(dim=-1)
    values, ids = _likeliest(logprobs, min(number, len(raw))) if number else (raw[:0], raw[:0])
    return float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _check_best(value: float) -> None:
    """Refuse a row by its largest logit (nan counts as larger than all)."""
    if math.isnan(value) or value == math.inf:
        raise DamagedError(
            f"the logits of a row hold {value}, expected finite numbers: are the weights damaged, "
            f"or does 16-bit arithmetic overflow (load the model with dtype float32)?"
        )
    if value == -math.inf:
        raise ChoiceError(
            "every token of a row is excluded: logit_bias, the constraint and the model leave none "
            "to choose; loosen one of them"
        )
