"""Speculative decoding by prompt lookup: drafts of the next tokens from earlier text.

Answers repeat: labels, the shape of point lists, names from the question. So what followed the last
time is a good draft of what follows now. The engine lets the model read the draft in one step with
the token before it and keeps what the model would have written itself: the same answer in fewer
steps (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; drafts by n-gram as in
https://github.com/apoorvumang/prompt-lookup-decoding).

    Drafter.draft(room)  -> draft, as long as it pays (AdaptiveWidth, StepCosts); [] = plain step
    Drafter.accept(new)  <- the tokens that the step really gave

Plain Python on ints: a draft costs microseconds, a step milliseconds.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Protocol

from torch import Tensor

MAX_NGRAM = 4
MIN_NGRAM = 1  # how far a short one can be trusted is learned


def propose(
    history: Sequence[int] | Tensor,
    max_width: int,
    *,
    max_ngram: int = MAX_NGRAM,
    min_ngram: int = MIN_NGRAM,
) -> list[int]:
    """What followed the latest earlier occurrence of the history's end.

    The longest n-gram at the end that occurred before wins. A continuation that reaches the end of
    the history goes on with itself: after ``a b a b`` comes ``a b a b a ...``.

    Args:
        history: ids of prompt and answer so far; a tensor has one dimension.
        max_width: length of the draft.
        max_ngram: longest n-gram looked for. min_ngram: shortest, at least 1.
    Returns: ``max_width`` ids, or none where nothing matches.
    Raises: ValueError for n-gram lengths that make no sense.
    """
    _check_ngrams(max_ngram, min_ngram)
    ids = history.tolist() if isinstance(history, Tensor) else list(history)
    for n in range(min(max_ngram, len(ids) - 1), min_ngram - 1, -1):
        end = ids[-n:]
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == end:
                return _continuation(ids, start + n, max_width)
    return []


class NgramLookup:
    """`propose` with an index, for a history that grows.

    Attributes:
        history: the ids so far.
        matched: length of the n-gram that the last proposal followed; 0 if nothing matched.
    """

    def __init__(
        self, ids: Iterable[int] = (), *, max_ngram: int = MAX_NGRAM, min_ngram: int = MIN_NGRAM
    ) -> None:
        _check_ngrams(max_ngram, min_ngram)
        self.history: list[int] = []
        self.matched = 0
        self._lengths = range(max_ngram, min_ngram - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest continuation is
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append ids to the history."""
        history, after = self.history, self._after
        for id in ids:
            # The n-grams at the end get their continuation, so only now they enter the index: the
            # end of the history never finds itself.
            here = len(history)
            for n in self._lengths:
                if n <= here:
                    after[tuple(history[-n:])] = here
            history.append(id)

    def propose(self, width: int) -> list[int]:
        """See :func:`propose`."""
        for n in self._lengths:
            # An n-gram longer than the history gives a shorter tuple, which is found as a match of
            # its own length; it can not be in the index before the history is longer than it.
            place = self._after.get(tuple(self.history[-n:]))
            if place is not None:
                self.matched = n
                return _continuation(self.history, place, width)
        self.matched = 0
        return []


class StepCosts:
    """Seconds of a decoding step by the number of token positions in it, learned as they come.

    One for a model, whose engines may run in several threads. A median of the last steps, so that a
    pause of the machine does not count; between the measured numbers of positions on a straight
    line. What was not seen for a while is forgotten, and so is tried again: the machine may have
    been busy, contexts grow.
    """

    _KEPT = 7  # steps of each number of positions
    _TRUSTED = (
        3  # a number of positions counts from this many steps on: the first may be a cold one
    )
    _FORGET_AFTER = 1000  # steps
    _SLOPE = 0.05  # of the cost of the smallest step for each more position; before it is measured

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        """
        Args:
            seconds: positions -> seconds, to begin with.
        """
        self._recent: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}  # positions -> number of the last such step
        self._median: dict[int, float] = {}
        self._trusted: list[int] = []  # sorted
        self._steps = 0
        self._lock = threading.RLock()
        for positions, value in (seconds or {}).items():
            for _ in range(self._TRUSTED):
                self.record(positions, value)

    def record(self, positions: int, seconds: float) -> None:
        """Take the time of one step. Steps with a part of a prompt in them do not belong here."""
        with self._lock:
            self._steps += 1
            recent = self._recent.setdefault(positions, deque(maxlen=self._KEPT))
            recent.append(seconds)
            self._seen[positions] = self._steps
            self._median[positions] = median(recent)
            old = [p for p, seen in self._seen.items() if self._steps - seen > self._FORGET_AFTER]
            for p in old:
                del self._recent[p], self._seen[p], self._median[p]
            if old or len(recent) == self._TRUSTED:
                self._trusted = sorted(
                    p for p, r in self._recent.items() if len(r) >= self._TRUSTED
                )

    def seconds(self, positions: int) -> float:
        """Expected seconds of a step; before the first measurement in units of a single position.

        Raises: ValueError for less than one position.
        """
        if positions < 1:
            raise ValueError(f"a step has at least one position, found {positions}")
        with self._lock:
            return self._seconds(positions)

    def _seconds(self, positions: int) -> float:
        known = self._trusted
        if not known:
            return 1 + self._SLOPE * (positions - 1)
        above = bisect_left(known, positions)
        if above < len(known) and known[above] == positions:
            return self._median[positions]
        if len(known) == 1:
            least = self._median[known[0]] / (1 + self._SLOPE * (known[0] - 1))
            return least * (1 + self._SLOPE * (positions - 1))
        low = min(max(above - 1, 0), len(known) - 2)  # outside: the line of the nearest two
        a, b = known[low], known[low + 1]
        slope = max(0.0, (self._median[b] - self._median[a]) / (b - a))
        return max(self._median[a] + slope * (positions - a), 0.5 * self._median[known[0]])


class AcceptanceRate:
    """How often drafted tokens were right, as an exponential average.

    Attributes:
        before: gives what is expected before anything is known; None: 0.6.
    """

    _FIRST_RATE = 0.6
    _FIRST_WEIGHT = 2.0  # tokens that the expectation counts as

    def __init__(self, keep: float = 0.99, before: AcceptanceRate | None = None) -> None:
        """
        Args:
            keep: weight of the steps before.
        """
        self.before = before
        self._keep = keep
        self._counts: dict[int, tuple[float, float]] = {}  # matched -> tokens (right, judged)

    def expected(self, matched: int) -> float:
        """How often a drafted token was right, if those before it in the draft were.

        Args:
            matched: length of the n-gram that the draft followed (0 = the proposer's): a longer one
                is more to be trusted, and how much more is learned.
        """
        right, judged = self._counts.get(matched, (0.0, 0.0))
        first = self.before.expected(matched) if self.before else self._FIRST_RATE
        return (right + self._FIRST_WEIGHT * first) / (judged + self._FIRST_WEIGHT)

    def record(self, matched: int, proposed: int, accepted: int) -> None:
        """Take how many of the proposed tokens were right: those before the first wrong one."""
        if not 0 <= accepted <= proposed:
            raise ValueError(f"{accepted} of {proposed} drafted tokens cannot have been right")
        right, judged = self._counts.get(matched, (0.0, 0.0))
        self._counts[matched] = (
            self._keep * right + accepted,
            self._keep * judged + min(accepted + 1, proposed),
        )
        if self.before:
            self.before.record(matched, proposed, accepted)


class AdaptiveWidth:
    """How many drafted tokens pay, from how many were right and from what steps cost.

    One of these objects a row; ``costs`` and ``acceptance`` are common to the rows of an engine.
    """

    def __init__(
        self,
        costs: StepCosts | None = None,
        max_width: int = 7,
        acceptance: AcceptanceRate | None = None,
    ) -> None:
        """
        Args:
            max_width: most drafted tokens a step.
            acceptance: of all rows so far. Most answers are too short to learn from them alone.
        """
        if max_width < 0:
            raise ValueError(f"max_width must be 0 (no drafts) or more tokens, found {max_width}")
        self.costs = costs or StepCosts()
        self.max_width = max_width
        self._acceptance = AcceptanceRate(0.9, acceptance)

    def acceptance(self, matched: int) -> float:
        """See :meth:`AcceptanceRate.expected`."""
        return self._acceptance.expected(matched)

    def choose(self, matched: int, *, other_positions: int = 0, room: int | None = None) -> int:
        """Number of tokens to draft: the most tokens a second; 0 where a plain step is faster.

        Args:
            matched: length of the n-gram behind the draft.
            other_positions: positions that other rows have in the same step.
            room: most tokens that may be drafted, where that is less than max_width.
        """
        return self.best(matched, other_positions=other_positions, room=room)[1]

    def best(
        self, matched: int, *, other_positions: int = 0, room: int | None = None
    ) -> tuple[float, int]:
        """(tokens a second, number of tokens to draft for it), see :meth:`choose`."""
        limit = self.max_width if room is None else min(room, self.max_width)
        acceptance = self.acceptance(matched)
        best, best_speed = 0, 0.0
        tokens, likely = 1.0, 1.0  # expected of this row; chance that the next draft is right
        for width in range(max(limit, 0) + 1):
            speed = (other_positions + tokens) / self.costs.seconds(other_positions + 1 + width)
            if speed > best_speed:
                best, best_speed = width, speed
            likely *= acceptance
            tokens += likely
        return best_speed, best

    def record(self, matched: int, proposed: int, accepted: int) -> None:
        """See :meth:`AcceptanceRate.record`."""
        self._acceptance.record(matched, proposed, accepted)


class DraftProposer(Protocol):
    """Knows some continuations from elsewhere: a grammar, say."""

    def extend(self, ids: Iterable[int]) -> None:
        """Take the ids that were written."""

    def propose(self, width: int) -> list[int]:
        """Up to ``width`` ids that are likely to come next; none where it does not know."""


class Drafter:
    """The drafts for one row: looks up, decides how much of it pays, learns from what came."""

    def __init__(
        self,
        prompt_ids: Iterable[int],
        width: AdaptiveWidth | None = None,
        *,
        proposer: DraftProposer | None = None,
        max_ngram: int = MAX_NGRAM,
        min_ngram: int = MIN_NGRAM,
    ) -> None:
        """
        Args:
            prompt_ids: of the row, also those whose embeddings are an image.
            width: of this row; give those of one engine the same ``costs``.
            proposer: is asked too; the draft that promises more tokens a second is taken, the
                proposer's where they promise the same. It takes the ids of the answer only.
        """
        self.lookup = NgramLookup(prompt_ids, max_ngram=max_ngram, min_ngram=min_ngram)
        self.width = width or AdaptiveWidth()
        self.proposer = proposer
        # The last drafts, and from where: length of the n-gram; 0 = the proposer.
        self._drafts: list[tuple[int, list[int]]] = []

    def draft(self, room: int | None = None, *, other_positions: int = 0) -> list[int]:
        """Ids to read behind the last one; empty for a plain step.

        Args:
            room: most ids that fit (context, max_new_tokens: one less than what is left to write).
            other_positions: positions that other rows have in the same step.
        """
        most = self.width.max_width if room is None else max(0, min(room, self.width.max_width))
        # One token is looked up even if none is drafted: whether it was right costs nothing to see,
        # so a row whose drafts did not pay notices when they would.
        proposed = self.proposer.propose(max(most, 1)) if self.proposer else []
        found = self.lookup.propose(max(most, 1))
        self._drafts = []
        draft: list[int] = []
        best_speed = 0.0
        for source, ids in ((0, proposed), (self.lookup.matched, found)):
            if ids:
                room = min(most, len(ids))
                speed, width = self.width.best(source, other_positions=other_positions, room=room)
                self._drafts.append((source, ids[: max(width, 1)]))
                if speed > best_speed:
                    best_speed, draft = speed, ids[:width]
        return draft

    def accept(self, new_ids: Sequence[int]) -> None:
        """Take what the step gave: the drafted ids that were right and one more."""
        for source, ids in self._drafts:
            shared = min(len(ids), len(new_ids))
            pairs = zip(ids, new_ids, strict=False)
            right = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
            self.width.record(source, shared, right)
        self._drafts = []
        self.lookup.extend(new_ids)
        if self.proposer:
            self.proposer.extend(new_ids)


def _continuation(ids: list[int], place: int, width: int) -> list[int]:
    """``width`` ids from ``place`` on; past the end it goes on with itself."""
    found = ids[place : place + max(width, 0)]
    period = len(ids) - place
    while len(found) < width:
        found.append(found[len(found) - period])
    return found


def _check_ngrams(max_ngram: int, min_ngram: int) -> None:
    if not 1 <= min_ngram <= max_ngram:
        raise ValueError(
            f"n-grams of {min_ngram} to {max_ngram} tokens make no sense: expected "
            f"1 <= min_ngram <= max_ngram"
        )
