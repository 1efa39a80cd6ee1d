"""What the engine takes and gives: token ids and embeddings, nothing of images or text.

T prompt positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nanomolmo2.generation.pointing import PointPrompt
from nanomolmo2.generation.prefix_cache import Keys
from nanomolmo2.generation.sampling import Sampled, SamplingParams
from nanomolmo2.generation.speculative import DraftProposer


@dataclass
class Request:
    """A prompt and how to continue it.

    Attributes:
        input_ids: (T,) ids; may be left out where ``inputs_embeds`` is given.
        inputs_embeds: (T, D), in place of the embeddings of the ids.
        attention_mask: (T, T) bool, True = see, where it is more than causal.
        bidirectional: (T,) bool, the positions that see each other in both directions, in place of
            a mask; nothing of size T x T is made where they are known from the prefix cache.
        position_ids: (T,) rotary positions; by default 0 .. T - 1.
        prefix_keys: (T,) numbers that tell positions apart by their content, for the prefix cache;
            by default the ids. With embeddings: see `prefix_cache.visual_keys`; without any,
            nothing is reused. A mask must follow from them.
        max_new_tokens: longest answer.
        sampling: how to choose; one seed. ``sampling.stop`` is for a layer that knows text: here it
            needs ``stops``.
        eos_token_ids: any of them, or of ``sampling.stop_token_ids``, ends the answer and is its
            last token.
        stops: called with every new id, in order; True ends the answer there.
        proposer: knows likely continuations, for drafts; it belongs to this request alone. Parts of
            points come to it as their markers, and are not drafted.
        points: what can be pointed at by selecting it (MolmoPoint); with it ``inputs_embeds`` and
            ``input_ids`` with markers in place of the prompt's own points.
    """

    input_ids: Sequence[int] | Tensor | NDArray[np.int64] | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    prefix_keys: Keys | None = None
    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    stops: Callable[[int], bool] | None = None
    proposer: DraftProposer | None = None
    bidirectional: NDArray[np.bool_] | None = None
    points: PointPrompt | None = None


@dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
        token_ids: with the id that ended it; parts of points are ids behind the vocabulary, see
            `nanomolmo2.generation.pointing`.
        finish_reason: ``stop`` (an end token, or ``stops``), ``length`` (max_new_tokens).
        prompt_tokens: T.
        reused_tokens: those of them whose keys and values were there already.
        sampled: every token with its log-probabilities, if ``sampling.logprobs`` asks for them.
        confidences: of every complete point, in order, the probabilities of its visual token, of
            the patch in it and of the place in the patch, each among those it was chosen from.
        confidence: geometric mean of the probabilities of all that was chosen, tokens and parts of
            points, the model's own; 1 where nothing was.
    """

    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    sampled: tuple[Sampled, ...] = ()
    confidences: tuple[tuple[float, float, float], ...] = ()
    confidence: float = field(default=1.0, compare=False)  # other rows beside it round otherwise


@dataclass(frozen=True)
class Event:
    """A new token of a request; with ``result`` it is the last.

    ``sampled`` is the token with its log-probabilities; None only where an answer ends without one.
    ``error`` is what went wrong with this request alone; it ends there, others go on.
    """

    request_id: int
    sampled: Sampled | None
    result: Result | None = None
    error: Exception | None = None

    @property
    def token(self) -> int | None:
        return None if self.sampled is None else self.sampled.token

    @property
    def finished(self) -> bool:
        return self.result is not None or self.error is not None
