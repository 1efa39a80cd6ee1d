"""Engine: prefill, then a token or more a step, for rows that join and leave between steps.

Knows token ids and embeddings, nothing of pictures or text. B rows, T prompt positions, N new
positions of all rows in a step, D width, V vocabulary.

A step computes the new positions of all rows behind one another, as one row of N: linear layers see
no padding. Keys and values of a row are its own, and so is its attention.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from nanomolmo2.generation.invariant import FixedBlocks
from nanomolmo2.generation.lookup import MAX_NGRAM, AdaptiveWidth, Drafter, Guide, Shares, StepCosts
from nanomolmo2.generation.prefix_cache import Keys, Prefix, PrefixCache, reach_of
from nanomolmo2.generation.sampling import Sampled, Sampler, SamplingParams, sample_rows
from nanomolmo2.models.attention import causal_mask
from nanomolmo2.models.kv_cache import RaggedStep, RowCache
from nanomolmo2.models.language_model import LanguageModel

# Slots allocated behind a prompt at once, if the answer may be that long; more are added as needed.
_ANSWER_SLOTS = 512

# Ids of earlier answers that are looked at for guesses: how a model begins and ends an answer.
_EARLIER_IDS = 512


class _Learned:
    """What all engines of a model learn together: most answers are too short to learn it anew."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.shares = Shares()
        self.answers: deque[int] = deque(maxlen=_EARLIER_IDS)  # each behind the end of its prompt


_LEARNED: WeakKeyDictionary[LanguageModel, _Learned] = WeakKeyDictionary()


@dataclass
class Request:
    """A prompt and how to continue it.

    Attributes:
        input_ids: (T,) ids; may be left out where ``inputs_embeds`` is given.
        inputs_embeds: (T, D), in place of the embeddings of the ids.
        attention_mask: (T, T) bool, True = see, where it is more than causal.
        position_ids: (T,) rotary positions; by default 0 .. T - 1.
        prefix_keys: (T,) numbers that tell positions apart by their content, for the prefix cache;
            by default the ids. With embeddings: see `prefix_cache.position_keys`; without any,
            nothing is reused. A mask must follow from them.
        max_new_tokens: longest answer.
        sampling: how to choose; one seed. ``sampling.stop`` is for a layer that knows text: here it
            needs ``stops``.
        eos_token_ids: any of them, or of ``sampling.stop_token_ids``, ends the answer and is its
            last token.
        stops: called with every new id, in order; True ends the answer there.
        guide: knows likely continuations, for lookup; it belongs to this request alone.
    """

    input_ids: Sequence[int] | Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    prefix_keys: Keys | None = None
    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    stops: Callable[[int], bool] | None = None
    guide: Guide | None = None


@dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
        token_ids: with the id that ended it.
        finish_reason: ``stop`` (an end token, or ``stops``), ``length`` (max_new_tokens).
        prompt_tokens: T.
        reused_tokens: those of them whose keys and values were there already.
        sampled: every token with its log-probabilities, if ``sampling.logprobs`` asks for them.
    """

    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    sampled: tuple[Sampled, ...] = ()


@dataclass(frozen=True)
class Event:
    """A new token of a request; with ``result`` it is the last.

    ``sampled`` is the token with its log-probabilities; None only where an answer ends without one.
    """

    request_id: int
    sampled: Sampled | None
    result: Result | None = None

    @property
    def token(self) -> int | None:
        return None if self.sampled is None else self.sampled.token

    @property
    def finished(self) -> bool:
        return self.result is not None


class _Row:
    """A request under way."""

    def __init__(self, id: int, request: Request, llm: LanguageModel) -> None:
        self.id = id
        self.request = request
        if request.sampling.stop and request.stops is None:
            raise ValueError(
                f"sampling has the stop texts {list(request.sampling.stop)}, but the engine knows "
                f"only token ids: use Pipeline.ask(stop=...), or pass `stops`, which is called "
                f"with every new id"
            )
        ids = request.input_ids
        self.ids = None if ids is None else torch.as_tensor(ids, dtype=torch.long).flatten()
        embeds = request.inputs_embeds
        if embeds is None:
            if self.ids is None:
                raise ValueError("a request needs input_ids or inputs_embeds: neither was given")
            embeds = llm.embed(self.ids[None].to(llm.embed_tokens.weight.device))[0]
        self.embeds = embeds  # (T, D)
        self.T = len(embeds)
        _check_length(llm, self.T, request.max_new_tokens)
        self.mask = _more_than_causal(request.attention_mask, self.T)
        self.reach = reach_of(self.mask)
        self.keys = request.prefix_keys
        if self.keys is None and request.inputs_embeds is None and request.position_ids is None:
            assert self.ids is not None
            self.keys = self.ids.cpu().numpy()
        positions = request.position_ids
        self.positions = torch.arange(self.T) if positions is None else positions.flatten()
        self.next_position = int(self.positions.max()) + 1
        self.sampler = Sampler(request.sampling, () if self.ids is None else self.ids.tolist())
        self.stop_ids = {*request.eos_token_ids, *request.sampling.stop_token_ids}
        self.cache = RowCache(0)
        self.drafter: Drafter | None = None
        self.tokens: list[int] = []
        self.sampled: list[Sampled] = []
        self.reused = 0

    def prefix(self) -> Prefix:
        """What the row's cache holds, the answer included."""
        assert self.keys is not None
        keys = np.concatenate([self.keys, np.array(self.tokens, dtype=np.int64)])
        return Prefix(keys[: self.cache.length], self.reach, self.cache)

    def choose(self, logits: Tensor) -> Sampled:
        """(1, V) -> the next token."""
        (sampled,) = sample_rows(logits, [self.sampler])
        self.tokens.append(sampled.token)
        if self.request.sampling.logprobs is not None:
            self.sampled.append(sampled)
        return sampled

    def finish_reason(self) -> str | None:
        """Why the answer ends with the newest token; None if it goes on."""
        newest, stops = self.tokens[-1], self.request.stops
        stopped = stops is not None and stops(newest)
        if stopped or newest in self.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_new_tokens else None

    def result(self, reason: str) -> Result:
        return Result(self.tokens, reason, self.T, self.reused, tuple(self.sampled))


class Engine:
    """Continues prompts, several at a time.

    A row's result does not depend on the rows beside it; in float32 and other precisions whose
    kernels round differently for other numbers of rows, only within rounding, unless
    ``batch_invariant``.

    One thread at a time. The model stays as it is, and must not change while rows run.
    """

    def __init__(
        self,
        llm: LanguageModel,
        *,
        max_rows: int = 8,
        batch_invariant: bool = False,
        prefix_cache: PrefixCache | None = None,
        lookup: bool = True,
    ) -> None:
        """
        Args:
            max_rows: most rows in a step; other requests wait.
            batch_invariant: bit-identical logits for a row, alone and in any batch, with and
                without reuse and lookup, at every precision. Slower: see docs/generation.md.
            prefix_cache: where to look for, and leave, keys and values of prompts; None: nowhere.
            lookup: let rows guess several tokens from what was read and written before, and check
                them in one step, where that is faster. The answer is the same, also a drawn one.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, found {max_rows}")
        self.llm = llm
        self.max_rows = max_rows
        self.batch_invariant = batch_invariant
        self.prefix_cache = prefix_cache
        self.lookup = lookup
        learned = _LEARNED.setdefault(llm, _Learned())
        self._costs, self._shares, self._answers = learned.costs, learned.shares, learned.answers
        self._numbers = itertools.count()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._rows)

    @torch.no_grad()
    def submit(self, request: Request) -> int:
        """Take a request; it starts with the next step that has room. Returns: its number.

        Raises: ValueError for an empty prompt, ids outside the vocabulary, masks of other shapes,
            or if prompt and answer cannot fit the context.
        """
        row = _Row(next(self._numbers), request, self.llm)
        self._waiting.append(row)
        return row.id

    def cancel(self, request_id: int) -> bool:
        """Drop a request. Returns: whether it was waiting or running."""
        for row in self._waiting:
            if row.id == request_id:
                self._waiting.remove(row)
                return True
        for row in self._rows:
            if row.id == request_id:
                self._leave(row)
                return True
        return False

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Start what waits, as far as there is room, and continue every other row.

        Returns: the new tokens in order, at least one of every row.
        """
        events: list[Event] = []
        running = list(self._rows)
        while self._waiting and len(self._rows) < self.max_rows:
            self._start(self._waiting.popleft(), events)
        if running:
            self._continue(running, events)
        return events

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Submit the requests and step until everything has ended, event by event."""
        for request in requests:
            self.submit(request)
        while self.busy:
            yield from self.step()

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """The results of the requests, in their order; events of others pass unseen."""
        ids = [self.submit(request) for request in requests]
        results: dict[int, Result] = {}
        while self.busy and not results.keys() >= set(ids):
            results |= {e.request_id: e.result for e in self.step() if e.result is not None}
        return [results[id] for id in ids]

    def _start(self, row: _Row, events: list[Event]) -> None:
        """Prefill: the prompt alone, without padding, as far as it is not known yet."""
        if not row.request.max_new_tokens:
            events.append(Event(row.id, None, row.result("length")))
            return
        capacity = row.T + min(row.request.max_new_tokens, _ANSWER_SLOTS)
        cache = self.prefix_cache
        if cache is not None and row.keys is not None:
            cache.check("llm", self.llm)
            running = (other.prefix() for other in self._rows if other.keys is not None)
            prefix, row.reused = cache.find(row.keys, row.reach, running)
            row.cache = prefix.row.fork(row.reused, capacity) if row.reused else self._new(capacity)
        else:
            row.cache = self._new(capacity)
        mask = row.mask if row.mask is not None and row.reused < row.reach else None
        hidden = self._transform(
            [row],
            [row.T - row.reused],
            row.positions[row.reused :],
            row.embeds[row.reused :],
            mask,
            last_only=True,
        )
        row.embeds = row.embeds[:0]  # not needed any more
        self._rows.append(row)
        logits = self._head(hidden)
        if self.lookup and row.ids is not None:
            width = AdaptiveWidth(self._costs, shares=self._shares)
            row.drafter = Drafter(
                [*self._answers, *row.ids.tolist()], width, guide=row.request.guide
            )
        self._take(row, logits, [], events)

    def _continue(self, rows: list[_Row], events: list[Event]) -> None:
        """Decode: the last token of every row, and behind it what it guesses."""
        start = time.perf_counter()
        drafts: list[list[int]] = []
        others = len(rows) - 1  # positions of the other rows, as far as they are known
        for row in rows:
            drafts.append(self._draft(row, others))
            others += len(drafts[-1])
        counts = [1 + len(draft) for draft in drafts]
        ids = [id for row, d in zip(rows, drafts, strict=True) for id in (row.tokens[-1], *d)]
        positions = [
            row.next_position + len(row.tokens) - 1 + i
            for row, count in zip(rows, counts, strict=True)
            for i in range(count)
        ]
        device = self.llm.embed_tokens.weight.device
        embeds = self.llm.embed(torch.tensor([ids], device=device))[0]
        hidden = self._transform(rows, counts, torch.tensor(positions), embeds)
        logits = self._head(hidden)
        for row, draft, own in zip(rows, drafts, logits.split(counts), strict=True):
            self._take(row, own, draft, events)
        self._costs.record(len(ids), time.perf_counter() - start)

    @staticmethod
    def _draft(row: _Row, others: int) -> list[int]:
        if row.drafter is None:
            return []
        room = row.request.max_new_tokens - len(row.tokens) - 1
        return row.drafter.draft(room, other_positions=others)

    def _take(self, row: _Row, logits: Tensor, draft: list[int], events: list[Event]) -> None:
        """Choose from logits (n, V) as long as the draft holds; forget what was read behind.

        Penalty, constraint and generator of the row see only tokens that stay: nothing is chosen
        behind the first one that differs from the draft.
        """
        new: list[int] = []
        reason: str | None = None
        for i in range(len(logits)):
            sampled = row.choose(logits[i : i + 1])
            new.append(sampled.token)
            reason = row.finish_reason()
            result = None if reason is None else row.result(reason)
            events.append(Event(row.id, sampled, result))
            if reason is not None or i == len(draft) or draft[i] != new[-1]:
                break
        row.cache.truncate(row.T + len(row.tokens) - 1)  # all but the newest token
        if row.drafter is not None:
            row.drafter.accept(new)
        if reason is not None:
            self._leave(row)

    def _leave(self, row: _Row) -> None:
        self._rows.remove(row)
        if row.drafter is not None:
            assert row.ids is not None
            self._answers.extend([*row.ids[-MAX_NGRAM:].tolist(), *row.tokens])
        if self.prefix_cache is not None and row.keys is not None:
            self.prefix_cache.keep(row.prefix())

    def _new(self, capacity: int) -> RowCache:
        return RowCache(self.llm.config.num_hidden_layers, capacity, self.llm.cache_dtype)

    def _transform(
        self,
        rows: list[_Row],
        counts: list[int],
        positions: Tensor,
        embeds: Tensor,
        mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """(N, D) embeddings of the rows' new positions -> (N, D) states, or (1, D) of the last."""
        step = RaggedStep(
            [row.cache for row in rows], counts, mask=mask, fixed_blocks=self.batch_invariant
        )
        with FixedBlocks() if self.batch_invariant else nullcontext():
            return self.llm.transform(
                inputs_embeds=embeds[None],
                position_ids=positions[None].to(embeds.device),
                past_key_values=step,
                last_only=last_only,
            )[0]

    def _head(self, hidden: Tensor) -> Tensor:
        with FixedBlocks() if self.batch_invariant else nullcontext():
            return self.llm.head(hidden)


@torch.no_grad()
def generate(
    llm: LanguageModel,
    inputs_embeds: Tensor,
    *,
    input_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    sampling: SamplingParams,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
    on_token: Callable[[Tensor], None] | None = None,
    on_result: Callable[[int, Result], None] | None = None,
    stops: Callable[[int, int], bool] | None = None,
    prefix_cache: PrefixCache | None = None,
    prefix_keys: Sequence[Keys] | None = None,
    lookup: bool = True,
    guide: Callable[[], Guide] | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Continue a batch of prompts, all rows at once.

    Args:
        inputs_embeds: (B, T, D), rows padded on either side.
        input_ids: (B, T) of the same positions, for lookup; None: no lookup.
        key_mask: (B, T) bool, False = padding; None = no padding.
        attention_mask: (B, 1, T, T) bool of the prompt, where it is more than causal.
        on_token: called with the new ids (B,) as soon as every row has its next one.
        on_result: called with (row, its result) as soon as a row ends.
        stops: called with (row, new id); True ends the row there.
        guide: makes the guide of a row, see :class:`Request`.
        prefix_keys: of every row's real positions, see :class:`Request`.
        prefix_cache, lookup, batch_invariant: see :class:`Engine`.
    Returns: (B, new) ids, new <= max_new_tokens; a row that ended is filled with ``pad_token_id``.
    Raises: ValueError for an empty prompt, or if prompt and answer cannot fit the context.
    """
    B, T = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    _check_length(llm, T, max_new_tokens)
    engine = Engine(
        llm,
        max_rows=max(B, 1),
        batch_invariant=batch_invariant,
        prefix_cache=prefix_cache,
        lookup=lookup,
    )
    for b, seed in enumerate(sampling.seeds(B)):
        real = slice(None) if key_mask is None else key_mask[b]
        mask = None if attention_mask is None else attention_mask[b % len(attention_mask), 0]
        request = Request(
            input_ids=None if input_ids is None else input_ids[b][real],
            inputs_embeds=inputs_embeds[b][real],
            attention_mask=None if mask is None else mask[real][:, real],
            prefix_keys=None if prefix_keys is None else prefix_keys[b],
            max_new_tokens=max_new_tokens,
            sampling=sampling.with_seed(seed),
            eos_token_ids=eos_token_ids,
            stops=None if stops is None else partial(stops, b),
            guide=None if guide is None else guide(),
        )
        engine.submit(request)
    rows: list[list[int]] = [[] for _ in range(B)]
    ended = [False] * B
    columns: list[Tensor] = []
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                rows[event.request_id].append(event.token)
            if event.result is not None:
                ended[event.request_id] = True
                if on_result is not None:
                    on_result(event.request_id, event.result)
        # A column is whole once every row has its token, or has ended before.
        while any(len(row) > len(columns) for row in rows) and all(
            end or len(row) > len(columns) for row, end in zip(rows, ended, strict=True)
        ):
            at = len(columns)
            column = [row[at] if at < len(row) else pad_token_id for row in rows]
            columns.append(torch.tensor(column, device=device))
            if on_token is not None:
                on_token(columns[-1])
    if not columns:
        return torch.empty(B, 0, dtype=torch.long, device=device)
    return torch.stack(columns, dim=1)


def _check_length(llm: LanguageModel, T: int, max_new_tokens: int) -> None:
    context = llm.config.max_position_embeddings
    if T == 0:
        raise ValueError("the prompt is empty: pass at least one token to continue")
    if max_new_tokens < 0 or max_new_tokens + T > context:
        raise ValueError(
            f"the prompt has {T} positions and max_new_tokens is {max_new_tokens}, but the context "
            f"holds {context}: max_new_tokens may be 0 to {context - T}"
        )


def _more_than_causal(mask: Tensor | None, T: int) -> Tensor | None:
    """The mask (T, T), or None where the causal flag says the same and costs less."""
    if mask is None:
        return None
    if tuple(mask.shape) != (T, T) or mask.dtype != torch.bool:
        raise ValueError(
            f"the attention mask of a prompt of {T} positions must be ({T}, {T}) bool, found "
            f"{tuple(mask.shape)} {mask.dtype}"
        )
    return None if torch.equal(mask, causal_mask(T, T, mask.device)) else mask
