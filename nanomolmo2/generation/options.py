"""How a prompt is continued: one object from the command line to the sampler.

Loads without torch, so that a command line can declare the same options.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Unpack

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
            above, so they do not depend on the settings. Those of a point that is selected: of a
            visual token, that of its marker in the text plus its own among the visual tokens; of a
            patch or a place in it, its own among those there are.
        stop: texts that end the answer; they are no part of it. For a layer that knows text, such
            as `VLM`.
        stop_token_ids: tokens that end the answer, besides the model's own.
        constraint: a grammar of the answer, such as `PointsConstraint`; None = off.
        sample_points: at a temperature, also draw the parts of a point that a model selects
            (MolmoPoint: visual token, patch, place in it), each by its own scores; by default only
            whether a point comes is drawn, and where it is are the likeliest parts.
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
    sample_points: bool = False

    def __post_init__(self) -> None:
        self._check_kinds()
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
        for seed in self.seed if isinstance(self.seed, Sequence) else (self.seed or 0,):
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"a seed must be below 2**64, found {str(seed)[:30]}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(stop):
            raise ValueError(
                "a stop text is empty, it would end every answer at once: leave it out"
            )
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def _check_kinds(self) -> None:
        """Numbers are numbers and texts texts, told before they are compared and computed with."""
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not hasattr(value := getattr(self, name), "__float__"):
                raise ValueError(f"{name} must be a number, found {value!r}")
        _check_whole("top_k", self.top_k)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs)
        seeds = [*self.seed] if isinstance(self.seed, Sequence) else [self.seed or 0]
        for seed in seeds:
            _check_whole("seed", seed)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Iterable) or not all(isinstance(text, str) for text in stop):
            raise ValueError(f"stop must be a text or a list of texts, found {self.stop!r}")
        if any(not hasattr(id, "__index__") for id in self.logit_bias or {}):
            raise ValueError("logit_bias must give ids of tokens their bias, as in {42: -100}")

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
            import torch

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
        import torch

        return [torch.Generator().manual_seed(seed) for seed in self.seeds(rows)]


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, found {value!r}")


class GenerateKeywords(TypedDict, total=False):
    """The names by which calls take the fields of `GenerateOptions` and of its sampling."""

    max_new_tokens: int
    sampling: SamplingParams | None
    eos_token_id: int | Sequence[int] | Literal["config"] | None
    lookup: bool
    batch_invariant: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int | Sequence[int] | None
    min_p: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    constraint: Constraint | None
    sample_points: bool


@dataclass(frozen=True)
class GenerateOptions:
    """Everything that decides how a prompt is continued.

    ``VLM.ask`` and the ``generate`` of the nets take the fields by name, and those of
    ``sampling`` beside them: ``ask(image, question, max_new_tokens=64, temperature=0.5)``.

    Attributes:
        max_new_tokens: longest answer; it is cut off there.
        sampling: how to choose tokens, and where to stop.
        eos_token_id: ends the answer, any of several; None = nothing does; ``config`` = those of
            the model, and in the `VLM` of the chat format.
        lookup: draft tokens that repeat earlier text and check several in a step, where that is
            faster; the answer is the same.
        batch_invariant: bit-identical logits alone, in any batch, with and without reuse and
            drafts; slower.
    """

    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_id: int | Sequence[int] | Literal["config"] | None = "config"
    lookup: bool = True
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        _check_whole("max_new_tokens", self.max_new_tokens)

    def updated(self, **changes: Unpack[GenerateKeywords]) -> GenerateOptions:
        """With other values for some fields, those of ``sampling`` included.

        Raises: ValueError if ``sampling`` and one of its fields are both given; TypeError for names
            that there are not.
        """
        options: dict[str, Any] = {**changes}
        sampling = options.pop("sampling", None)
        off = {f.name: f.default for f in fields(SamplingParams)}
        named = {name: options.pop(name) for name in off if name in options}
        if sampling is None:
            sampling = replace(self.sampling, **named) if named else self.sampling
        elif beside := [f"{name}={named[name]}" for name in named if named[name] != off[name]]:
            raise ValueError(
                f"found sampling and beside it {', '.join(beside)}: sampling holds all settings, "
                f"put them there"
            )
        known = [f.name for f in fields(GenerateOptions)]
        for name in options:
            if name not in known:
                near = get_close_matches(name, [*known, *off], n=1)
                said = f": did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"got an unexpected keyword argument {name!r}{said}")
        return replace(self, sampling=sampling, **options)

    def end_ids(self, config: Iterable[int] = ()) -> tuple[int, ...]:
        """The ids that end an answer; ``config`` are those of the model."""
        if self.eos_token_id == "config":
            return tuple(config)
        if self.eos_token_id is None:
            return ()
        ids = self.eos_token_id
        return (ids,) if isinstance(ids, int) else tuple(int(id) for id in ids)
