"""From logits to the next token of every row. B rows, V vocabulary.

The settings act in this order, which is that of transformers:

    logits -> logit_bias -> repetition_penalty -> constraint -> greedy, or
              temperature -> top_k -> top_p -> min_p -> a draw

A row is computed by itself, in float32 on the CPU, with a generator of its own: with equal logits
it gives the same token alone, in any batch and with any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_FIRST_CANDIDATES = 256  # likeliest tokens among which top_p mostly finds its share


class ConstraintState(Protocol):
    """Where one answer stands in a grammar."""

    def allowed(self) -> Tensor | None:
        """(tokens,) bool on the CPU, False = must not come next; None = anything may."""

    def advance(self, id: int) -> None:
        """Take the next id of the answer."""


class Constraint(Protocol):
    """A grammar; several rows share it. See `nanomolmo2.generation.constraint`."""

    def start(self) -> ConstraintState:
        """The beginning of an answer."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and where to stop.

    Attributes:
        temperature: 0 = greedy (the likeliest, the first of equals). Usual values are 0.2 to 1.
        top_k: only the likeliest k tokens; 0 = off.
        top_p: only the likeliest tokens that together have this share; 1 = off.
        seed: makes draws repeatable; one, or one a row; None = others each time.
        min_p: only tokens with at least this share of the likeliest one's probability; 0 = off.
        repetition_penalty: above 1 makes tokens of prompt and answer less likely: their logits are
            divided by it where positive and multiplied where negative; 1 = off.
        logit_bias: id -> what is added to its logit; -inf forbids the token.
        logprobs: how many of the likeliest tokens are reported with their log-probabilities; 0 =
            only the chosen one's; None = nothing. They are the model's own, in front of all of the
            above, so they do not depend on the settings.
        stop: texts that end the answer; they are no part of it. For a layer that knows text, such
            as `Pipeline`.
        stop_token_ids: tokens that end the answer, besides the model's own.
        constraint: a grammar of the answer, such as `PointsConstraint`; None = off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or more, found {self.temperature}: usual values "
                f"are 0.2 to 1"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more tokens, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (off), found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be 0 (off) to 1, found {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be above 0, 1 is off, found {self.repetition_penalty}: "
                f"usual values are 1 to 1.3"
            )
        for id, bias in (self.logit_bias or {}).items():
            if id < 0 or not bias < math.inf:  # not true for nan either
                raise ValueError(
                    f"logit_bias gives token {id} the bias {bias}, expected ids from 0 on and "
                    f"numbers: -inf forbids a token, 100 all but forces it"
                )
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be 0 or more tokens, or None, found {self.logprobs}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(stop):
            raise ValueError(
                "a stop text is empty, it would end every answer at once: leave it out"
            )
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def greedy_only(self) -> bool:
        """Nothing but the likeliest token is asked for, so a whole batch needs one argmax."""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1
            and not self.logit_bias
            and self.logprobs is None
            and self.constraint is None
        )

    def seeds(self, rows: int) -> list[int]:
        """One seed a row: the one given for all of them, each row's own, or fresh ones."""
        if self.seed is None:
            return [int(torch.randint(2**62, ())) for _ in range(rows)]
        if isinstance(self.seed, int):
            return [self.seed] * rows
        seeds = list(self.seed)
        if len(seeds) != rows:
            raise ValueError(f"{len(seeds)} seeds for {rows} rows: give one, or one a row")
        return seeds

    def with_seed(self, seed: int) -> SamplingParams:
        """The same settings for one row."""
        return replace(self, seed=seed)

    def generators(self, rows: int) -> list[torch.Generator]:
        """One generator a row: what a row draws does not depend on the others."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds(rows)]


def settings(
    sampling: SamplingParams | None,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] | None = None,
) -> SamplingParams:
    """The settings of a call that takes them as one object, or the usual four by name.

    Raises: ValueError if both are given.
    """
    if sampling is None:
        return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    named = {
        name: value
        for name, value, off in (
            ("temperature", temperature, 0),
            ("top_p", top_p, 1),
            ("top_k", top_k, 0),
            ("seed", seed, None),
        )
        if value != off
    }
    if named:
        found = ", ".join(f"{name}={value}" for name, value in named.items())
        raise ValueError(
            f"found sampling and beside it {found}: sampling holds all settings, put them there"
        )
    return sampling


class Sampled(NamedTuple):
    """A chosen token; ``logprob`` and ``top`` [(id, log-probability), ...] only where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one row, in order, and remembers what its settings need.

    Drafts are verified with it too: `sample` for each position as long as the tokens agree. As it
    draws once a token, the answer is the same as without drafts, also at a temperature.
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
        raw = logits.detach().float().cpu()
        row = self._process(raw)
        if self.params.temperature == 0:
            token = int(row.argmax())
            _check_best(float(row[token]))
        else:
            token = _draw(row, self.params, self._generator)
        self.take(token)
        return Sampled(token, *_logprobs(raw, token, self.params.logprobs))

    def take(self, token: int) -> None:
        """Count a token as chosen, without choosing it."""
        if self.params.repetition_penalty != 1:
            self._seen.add(token)
        if self._state is not None:
            self._state.advance(token)

    def _process(self, row: Tensor) -> Tensor:
        """(V,) -> (V,): everything in front of the temperature."""
        params, size = self.params, len(row)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias))
            if int(ids.max()) >= size:
                raise ValueError(
                    f"logit_bias names token {int(ids.max())}, but the model has {size} tokens"
                )
            row = row.clone()
            row[ids] += torch.tensor(list(params.logit_bias.values()))
        if params.repetition_penalty != 1 and self._seen:
            # A prompt may hold ids that can not be written: those of pictures.
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


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of every row, the first of equals: (B, V) -> (B,) int64.

    Raises: ValueError for logits with nan or +inf, and for a row without any token.
    """
    tokens = logits.argmax(dim=-1)
    best = logits.gather(-1, tokens[:, None])[:, 0]
    if not bool(best.isfinite().all()):  # argmax finds nan and inf before all else
        for value in best.tolist():
            _check_best(value)
    return tokens


def sample_rows(logits: Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
    """Choose a token for each row, rows that are simply greedy in one go.

    Args:
        logits: (B, V).
        samplers: one a row.
    """
    plain = [b for b, sampler in enumerate(samplers) if sampler.params.greedy_only]
    tokens: dict[int, int] = {}
    if plain:
        rows = logits if len(plain) == len(samplers) else logits[plain]
        tokens = dict(zip(plain, greedy(rows).tolist(), strict=True))
    return [
        Sampled(tokens[b]) if b in tokens else sampler.sample(logits[b])
        for b, sampler in enumerate(samplers)
    ]


def sample(logits: Tensor, params: SamplingParams, generators: list[torch.Generator]) -> Tensor:
    """Choose one token a row, by settings that need no memory of earlier tokens.

    Args:
        logits: (B, V) of any floating type.
        generators: one a row, on the CPU; unused when greedy.
    Returns: (B,) int64.
    """
    if params.greedy_only:
        return greedy(logits)
    pairs = zip(logits, generators, strict=True)
    tokens = [Sampler(params, (), generator).sample(row).token for row, generator in pairs]
    return torch.tensor(tokens, device=logits.device)


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
        weights = weights.masked_fill(before >= share, 0.0)
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
    if number is None:
        return None, ()
    logprobs = raw.log_softmax(dim=-1)
    values, ids = _likeliest(logprobs, min(number, len(raw))) if number else (raw[:0], raw[:0])
    return float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _check_best(value: float) -> None:
    """Refuse a row by its largest logit (nan counts as larger than all)."""
    if math.isnan(value) or value == math.inf:
        raise ValueError(
            f"the logits of a row hold {value}, expected finite numbers: are the weights damaged, "
            f"or does 16-bit arithmetic overflow (load the model with dtype float32)?"
        )
    if value == -math.inf:
        raise ValueError(
            "every token of a row is excluded: logit_bias, the constraint and the model leave none "
            "to choose; loosen one of them"
        )
