"""Engine: prefill, then a token or more a step, for rows that join and leave between steps.

Knows token ids and embeddings, nothing of images or text. B rows, T prompt positions, N new
positions of all rows in a step, D width, V vocabulary.

A step computes the new positions of all rows behind one another, as one row of N: linear layers see
no padding. Keys and values of a row are its own, and so is its attention.

A decoding step sends one tensor of ids and positions to the device and waits for one that comes
back: what the samplers need of the logits. Only a part of a point that is being selected waits for
one more, see `nanomolmo2.generation.pointing`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from nanomolmo2.accelerate.prefill import last_state
from nanomolmo2.accelerate.quantization import cache_dtype
from nanomolmo2.generation.invariant import FixedBlocks
from nanomolmo2.generation.kv_cache import RaggedStep, RowCache
from nanomolmo2.generation.pointing import Pointing, fetch_scores
from nanomolmo2.generation.prefix_cache import Prefix, PrefixCache, lookahead_of
from nanomolmo2.generation.request import Event as Event
from nanomolmo2.generation.request import Request as Request
from nanomolmo2.generation.request import Result as Result
from nanomolmo2.generation.sampling import Likeliest, Sampled, Sampler, fetch
from nanomolmo2.generation.speculative import (
    MAX_NGRAM,
    AcceptanceRate,
    AdaptiveWidth,
    Drafter,
    StepCosts,
)
from nanomolmo2.models import LanguageModel
from nanomolmo2.models.attention import causal_mask, sequence_mask
from nanomolmo2.models.forms import check_ids

# Slots allocated behind a prompt at once, if the answer may be that long; more are added as needed.
_ANSWER_SLOTS = 512

# Ids of earlier answers that are looked through for drafts: how a model begins and ends an answer.
_EARLIER_IDS = 512


class _Learned:
    """What all engines of a model learn together: most answers are too short to learn it anew."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.acceptance = AcceptanceRate()
        self.answers: deque[int] = deque(maxlen=_EARLIER_IDS)  # each behind the end of its prompt


_LEARNED: WeakKeyDictionary[LanguageModel, _Learned] = WeakKeyDictionary()


class _Row:
    """A request under way."""

    def __init__(self, id: int, request: Request, llm: LanguageModel) -> None:
        self.id = id
        self.request = request
        if request.sampling.stop and request.stops is None:
            raise ValueError(
                f"sampling has the stop texts {list(request.sampling.stop)}, but the engine knows "
                f"only token ids: use VLM.ask(stop=...), or pass `stops`, which is called "
                f"with every new id"
            )
        ids = request.input_ids
        self.ids: list[int] | None = None  # (T,)
        if ids is not None:
            on_host = torch.as_tensor(ids, dtype=torch.long).flatten().cpu()
            check_ids(on_host[None], llm.config.num_embeddings)
            self.ids = on_host.tolist()
        self.embeds = request.inputs_embeds  # (T, D); None = those of the ids
        if self.embeds is not None:
            self.T = len(self.embeds)
        elif self.ids is not None:
            self.T = len(self.ids)
        else:
            raise ValueError("a request needs input_ids or inputs_embeds: neither was given")
        self._check_length(llm.config.max_position_embeddings)
        self._mask = _more_than_causal(request.attention_mask, self.T)
        self.lookahead = lookahead_of(self._mask)
        if request.bidirectional is not None:
            at = np.flatnonzero(request.bidirectional)
            self.lookahead = int(at[-1]) + 1 if len(at) > 1 else 0
        self.keys = request.prefix_keys
        if self.keys is None and request.inputs_embeds is None and request.position_ids is None:
            self.keys = np.array(self.ids, dtype=np.int64)
        positions = request.position_ids
        self.positions = torch.arange(self.T) if positions is None else positions.flatten().cpu()
        self.next_position = int(self.positions.max()) + 1
        written = self.ids or []  # what the repetition penalty counts
        if request.points is not None:
            written = [id for id in written if id not in request.points.rule.marker_ids]
        self.sampler = Sampler(request.sampling, written)
        self.pointing: Pointing | None = None
        if request.points is not None:
            self.pointing = Pointing(request.points, self.ids or [], self.keys, self.sampler)
        self.stop_ids = {*request.eos_token_ids, *request.sampling.stop_token_ids}
        self.cache = RowCache(0)
        self.drafter: Drafter | None = None
        self.tokens: list[int] = []
        self.content: list[int] = []  # of the tokens, for the prefix cache
        self.settled = 0  # tokens of the steps before
        self.sampled: list[Sampled] = []
        self.logprob = 0.0  # of all tokens together
        self.reused = 0
        self.reason: str | None = None  # why the answer ended
        self.at_point: tuple[int, Sampled] | None = None  # a position of this step, and its PATCH

    def _check_length(self, context: int) -> None:
        T, new = self.T, self.request.max_new_tokens
        if T == 0:
            raise ValueError("the prompt is empty: pass at least one token to continue")
        if new < 0 or new + T > context:
            raise ValueError(
                f"the prompt has {T} positions and max_new_tokens is {new}, but the context "
                f"holds {context}: max_new_tokens may be 0 to {context - T}"
            )

    def mask(self, device: torch.device) -> Tensor | None:
        """(T - reused, T) of the positions to compute; None where they see nothing ahead."""
        if self.reused >= self.lookahead:
            return None
        if self.request.bidirectional is None:
            return None if self._mask is None else self._mask[self.reused :]
        both = torch.from_numpy(self.request.bidirectional).to(device, non_blocking=True)
        new = slice(self.reused, None)
        return sequence_mask(self.T, image_tokens=both[None], device=device, queries=new)[0, 0]

    def prefix(self) -> Prefix:
        """What the row's cache holds, the answer included."""
        assert self.keys is not None
        keys = np.concatenate([self.keys, np.array(self.content, dtype=np.int64)])
        point_keys = None if self.pointing is None else self.pointing.keys
        return Prefix(keys[: self.cache.length], self.lookahead, self.cache, point_keys)

    @property
    def selects(self) -> bool:
        """Whether the next token is a part of a point that has begun, and needs no head."""
        return self.pointing is not None and self.pointing.grammar.expects != "text"

    def forbid(self, logits: Tensor) -> None:
        """Exclude from logits (n, V) of the next text tokens what cannot come: markers, mostly."""
        if self.pointing is not None:
            for marker in self.pointing.forbidden(first=not self.tokens):
                logits[:, marker] = -torch.inf

    @property
    def newest(self) -> int:
        """The newest token, as the embedding knows it."""
        token = self.tokens[-1]
        return token if self.pointing is None else self.pointing.marker(token)

    def symbols(self, tokens: list[int]) -> list[int]:
        """Tokens of the answer as other answers can know them."""
        return tokens if self.pointing is None else self.pointing.symbols(tokens)

    def write(self, sampled: Sampled) -> Event:
        """Append the next token."""
        token = sampled.token
        is_class = self.pointing is not None and token >= self.pointing.classes.first
        self.tokens.append(token)
        self.logprob += self.sampler.logprob
        self.sampler.take(self.newest, repeats=not is_class)
        self.content.append(token if self.pointing is None else self.pointing.take(token))
        if self.request.sampling.logprobs is not None:
            self.sampled.append(sampled)
        self.reason = self.finish_reason()
        return Event(self.id, sampled, None if self.reason is None else self.result(self.reason))

    def finish_reason(self) -> str | None:
        """Why the answer ends with the newest token; None if it goes on."""
        newest, stops = self.tokens[-1], self.request.stops
        stopped = stops is not None and stops(newest)
        if stopped or newest in self.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_new_tokens else None

    def result(self, reason: str) -> Result:
        points = () if self.pointing is None else tuple(self.pointing.confidences)
        confidence = math.exp(self.logprob / max(1, len(self.tokens)))
        sampled = tuple(self.sampled)
        return Result(self.tokens, reason, self.T, self.reused, sampled, points, confidence)


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
                without reuse and drafts, at every precision. Slower: see docs/generation.md.
            prefix_cache: where to look for, and leave, keys and values of prompts; None: nowhere.
            lookup: let rows draft several tokens from what was read and written before, and check
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
        self._costs, self._answers = learned.costs, learned.answers
        self._acceptance = learned.acceptance
        self._numbers = itertools.count()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._rows)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self._rows)

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

        What goes wrong with one row, such as logits that are no numbers, ends that row alone.

        Returns: the new tokens in order, at least one of every row, or its error.
        """
        events: list[Event] = []
        running = list(self._rows)
        while self._waiting and len(self._rows) < self.max_rows:
            row = self._waiting.popleft()
            with self._alone(row, events):
                self._start(row, events)
        if running:
            self._continue(running, events)
        return events

    @contextmanager
    def _alone(self, row: _Row, events: list[Event]) -> Iterator[None]:
        """Whatever is raised ends the row, and nothing else."""
        try:
            yield
        except Exception as error:
            if row in self._rows:
                self._rows.remove(row)
            events.append(Event(row.id, None, error=error))

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Submit the requests, then step until everything has ended, event by event.

        Raises, while it is iterated: what went wrong with a row.
        """
        for request in requests:
            self.submit(request)
        return self._events()

    def _events(self) -> Iterator[Event]:
        while self.busy:
            for event in self.step():
                yield checked(event)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """The results of the requests, in their order; events of others pass unseen."""
        ids = [self.submit(request) for request in requests]
        results: dict[int, Result] = {}
        while self.busy and not results.keys() >= set(ids):
            ended = [checked(event) for event in self.step()]
            results |= {e.request_id: e.result for e in ended if e.result is not None}
        return [results[id] for id in ids]

    def _start(self, row: _Row, events: list[Event]) -> None:
        """Prefill: the prompt alone, without padding, as far as it is not known yet."""
        if not row.request.max_new_tokens:
            events.append(Event(row.id, None, row.result("length")))
            return
        known = self._begin(row)
        points = row.pointing
        # The keys of points are made of the last states of the visual tokens.
        new_keys = points is not None and not points.knows_all(row.reused)
        states = self._transform(
            [row],
            [row.T - row.reused],
            row.positions[row.reused :].to(self._device, non_blocking=True),
            self._prompt_embeds(row),
            row.mask(self._device),
            last_only=not new_keys,
        )
        if points is not None:
            with self._blocks():
                points.make_keys(states, row.reused, known)
        row.embeds = None  # not needed any more
        self._rows.append(row)
        if self.lookup and row.ids is not None:
            width = AdaptiveWidth(self._costs, acceptance=self._acceptance)
            row.drafter = Drafter([*self._answers, *row.ids], width, proposer=row.request.proposer)
        self._next([row], [1], states[-1:], [[]], events)

    def _begin(self, row: _Row) -> Tensor | None:
        """Give a row its cache, with what is known of its prompt. Returns: keys of points there."""
        capacity = row.T + min(row.request.max_new_tokens, _ANSWER_SLOTS)
        cache = self.prefix_cache
        if cache is not None and row.keys is not None:
            cache.check("llm", self.llm)
            running = (other.prefix() for other in self._rows if other.keys is not None)
            prefix, row.reused = cache.find(row.keys, row.lookahead, running)
            points = row.pointing
            known = 0 if points is None else points.num_known(row.reused)
            if known and prefix.point_keys is None:
                row.reused = 0  # kept by a request that could not point: no key was made
            if row.reused:
                row.cache = prefix.row.fork(row.reused, capacity)
                return prefix.point_keys
        row.cache = RowCache(self.llm.config.num_hidden_layers, capacity, cache_dtype(self.llm))
        return None

    def _continue(self, rows: list[_Row], events: list[Event]) -> None:
        """Decode: the last token of every row, and behind it its draft."""
        start = time.perf_counter()
        drafts: list[list[int]] = []
        others = len(rows) - 1  # positions of the other rows, as far as they are known
        for row in rows:
            drafts.append(self._draft(row, others))
            others += len(drafts[-1])
        counts = [1 + len(draft) for draft in drafts]
        ids = [id for row, d in zip(rows, drafts, strict=True) for id in (row.newest, *d)]
        positions = [
            row.next_position + len(row.tokens) - 1 + i
            for row, count in zip(rows, counts, strict=True)
            for i in range(count)
        ]
        on_host = torch.tensor([ids, positions])
        check_ids(on_host[:1], self.llm.config.num_embeddings)  # a proposer may say anything
        new = on_host.to(self._device, non_blocking=True)
        embeds = self._embed(new[0])
        for row, own in zip(rows, embeds.split(counts), strict=True):
            if row.pointing is not None and row.selects:
                own[0] = row.pointing.read_back(own[0])
        states = self._transform(rows, counts, new[1], embeds)
        self._next(rows, counts, states, drafts, events)
        self._costs.record(len(ids), time.perf_counter() - start)

    @staticmethod
    def _draft(row: _Row, others: int) -> list[int]:
        if row.drafter is None or row.selects:
            return []
        room = row.request.max_new_tokens - len(row.tokens) - 1
        draft = row.drafter.draft(room, other_positions=others)
        return draft if row.pointing is None else row.pointing.drafted(draft)

    def _next(
        self,
        rows: list[_Row],
        counts: list[int],
        states: Tensor,
        drafts: list[list[int]],
        events: list[Event],
    ) -> None:
        """Choose from the states (N, D) of the rows' new positions, before the final norm."""
        of_row = {row.id: own for row, own in zip(rows, states.split(counts), strict=True)}
        pending = [row for row in rows if row.selects]
        text = [(row, draft) for row, draft in zip(rows, drafts, strict=True) if not row.selects]
        logits: dict[int, Tensor] = {}
        if text:
            if pending:
                states = torch.cat([of_row[row.id] for row, _ in text])
            of_all = self._head(states)
            own_logits = of_all.split([1 + len(draft) for _, draft in text])
            for (row, _), own in zip(text, own_logits, strict=True):
                logits[row.id] = own
                row.forbid(own)
            samplers = [row.sampler for row, draft in text for _ in range(1 + len(draft))]
            fetched = iter(fetch(of_all, samplers))
            for row, draft in text:
                of_positions = list(itertools.islice(fetched, 1 + len(draft)))
                with self._alone(row, events):
                    self._take(row, of_positions, draft, events)
        pending += [row for row, _ in text if row.at_point is not None]
        if pending:
            self._select(pending, of_row, logits, events)

    def _take(
        self, row: _Row, logits: list[Likeliest | Tensor], draft: list[int], events: list[Event]
    ) -> None:
        """Choose from the logits of n positions as long as the draft holds; forget the rest.

        Penalty, constraint and generator of the row see only tokens that stay: nothing is chosen
        behind the first one that differs from the draft. Nor behind the beginning of a point:
        ``at_point`` of the row says where it is, and what it selects is still to be chosen.
        """
        for i, of_position in enumerate(logits):
            sampled = row.sampler.pick(of_position)
            if row.pointing is not None and sampled.token == row.pointing.patch:
                row.at_point = i, sampled
                return
            events.append(row.write(sampled))
            if row.reason is not None or i == len(draft) or draft[i] != sampled.token:
                break
        self._settle(row)

    def _select(
        self,
        rows: list[_Row],
        states: dict[int, Tensor],
        logits: dict[int, Tensor],
        events: list[Event],
    ) -> None:
        """Choose the next part of rows that write a point.

        Args:
            states, logits: (n, D) and (n, V) of the new positions, by row.
        """
        scores = []
        with self._blocks():
            for row in rows:
                assert row.pointing is not None
                at = 0 if row.at_point is None else row.at_point[0]
                scores.append(row.pointing.scores(states[row.id][at]))
        refused: list[tuple[_Row, Tensor]] = []
        for row, of_classes in zip(rows, fetch_scores(scores), strict=True):
            assert row.pointing is not None
            at, marker = row.at_point or (0, None)
            with self._alone(row, events):
                sampled = row.pointing.choose(of_classes, marker)
                if sampled is None:
                    logits[row.id][at, row.pointing.patch] = -torch.inf
                    refused.append((row, logits[row.id][at]))
                else:
                    events.append(row.write(sampled))
                    self._settle(row)
        if refused:  # text goes on in place of a point
            again = fetch(torch.stack([own for _, own in refused]), [r.sampler for r, _ in refused])
            for (row, _), of_text in zip(refused, again, strict=True):
                with self._alone(row, events):
                    events.append(row.write(row.sampler.pick(of_text)))
                    self._settle(row)

    def _settle(self, row: _Row) -> None:
        """A row's step is over: forget positions of a draft that did not hold."""
        row.at_point = None
        row.cache.truncate(row.T + len(row.tokens) - 1)  # all but the newest token
        if row.drafter is not None:
            row.drafter.accept(row.symbols(row.tokens[row.settled :]))
        row.settled = len(row.tokens)
        if row.reason is not None:
            self._leave(row)

    def _leave(self, row: _Row) -> None:
        self._rows.remove(row)
        if row.drafter is not None:
            assert row.ids is not None
            self._answers.extend([*row.ids[-MAX_NGRAM:], *row.symbols(row.tokens)])
        if self.prefix_cache is not None and row.keys is not None:
            self.prefix_cache.keep(row.prefix())

    # ---- all calls into the language model ----

    @property
    def _device(self) -> torch.device:
        return self.llm.embed_tokens.weight.device

    def _embed(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, D); what the ids are was checked on the host."""
        return self.llm.embed_tokens(ids)

    def _prompt_embeds(self, row: _Row) -> Tensor:
        """(T - reused, D) of what is to be computed."""
        if row.embeds is not None:
            return row.embeds[row.reused :]
        assert row.ids is not None
        return self._embed(torch.tensor(row.ids[row.reused :]).to(self._device, non_blocking=True))

    def _transform(
        self,
        rows: list[_Row],
        counts: list[int],
        positions: Tensor,
        embeds: Tensor,
        mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """(N, D) embeddings of new positions -> their states before the final norm, or the last."""
        step = RaggedStep(
            [row.cache for row in rows], counts, mask=mask, fixed_blocks=self.batch_invariant
        )
        with self._blocks():
            run = partial(last_state, self.llm) if last_only else self.llm.states
            states = run(embeds[None], positions[None], cache=step)
        step.advance()
        return states[0]

    def _head(self, states: Tensor) -> Tensor:
        with self._blocks():
            return self.llm.head(self.llm.norm(states))

    def _blocks(self) -> AbstractContextManager[object]:
        """What makes results batch-invariant, if they are to be."""
        return FixedBlocks() if self.batch_invariant else nullcontext()


def checked(event: Event) -> Event:
    """Raises: the error of a row."""
    if event.error is not None:
        raise event.error
    return event


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
