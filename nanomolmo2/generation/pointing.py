"""Pointing by selection in an answer: what a prompt offers, what may come, and where it stands.

    text PATCH -> SUBPATCH -> LOCATION text ...      as the model knows them
         row      slot        cell                   what is selected there

A row is a visual token of the prompt, a slot a ViT patch of it, a cell one of 3 x 3 places in the
patch. In place of a row may come no-more-points (NMP), which ends a list. In answers the selected
classes have ids behind the vocabulary of V tokens, with N rows and S slots of the prompt:

    V + row      V + N (NMP)      V + N + 1 + slot      V + N + 1 + S + cell

so they mean another thing in every prompt. Scores come to the host: the grammar of points and the
choice are there. Nothing of this file runs in a step in which no point is written.

Source: rules of allenai/molmo2, olmo/hf_model (MolmoPointLogitProcessor) and
olmo/models/molmo_point (generate), which differ in fields of `PointConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.generation.prefix_cache import Keys, point_key
from nanomolmo2.generation.sampling import Sampled, Sampler
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.models.point_predictor import CELLS, MASKED, PointPredictor
from nanomolmo2.processor.point_space import END_OF_LIST, Target

_EMPTY_SLOT = -1e5  # score of a slot without a patch: it is chosen only where nothing else may be
# Most tokens of an object's number, which follows a point: behind more a list is not being written.
_LONGEST_NUMBER = 3

Kind = Literal["none", "row", "slot", "cell"]
_KINDS: tuple[Kind, ...] = ("none", "row", "slot", "cell")
Part = tuple[int, ...]  # of a point: (), which is NMP, (row,), (row, slot) or (row, slot, cell)


class Classes(NamedTuple):
    """The ids of what can be selected in one prompt."""

    first: int  # V
    rows: int  # N
    slots: int  # S

    @property
    def end(self) -> int:
        """The first id that is none."""
        return self.first + self.rows + 1 + self.slots + CELLS

    def id(self, kind: Kind, number: int = 0) -> int:
        """The id of a class."""
        before = {"row": 0, "none": self.rows, "slot": self.rows + 1}
        return self.first + before.get(kind, self.rows + 1 + self.slots) + number

    def read(self, id: int) -> tuple[Kind, int]:
        """The class of an id that is not of the vocabulary.

        Raises: ValueError for an id behind the classes of this prompt.
        """
        number = id - self.first
        if number < self.rows:
            return "row", number
        number -= self.rows + 1
        if number < 0:
            return "none", 0
        if number < self.slots:
            return "slot", number
        if number < self.slots + CELLS:
            return "cell", number - self.slots
        raise ValueError(
            f"token {id} is no class of this prompt: its {self.rows} visual tokens of "
            f"{self.slots} patches have the ids {self.first} to {self.end - 1}; ids of points "
            f"belong to the prompt that they were written for"
        )


class Selected(NamedTuple):
    """A point that was found: what selects it, and how sure that is, 0 to 1."""

    target: Target
    confidence: float


@dataclass(frozen=True, eq=False)
class PointPrompt:
    """What a prompt of N visual tokens offers to point at; it does not change.

    Attributes:
        predictor: of the model.
        classes: ids behind the vocabulary.
        places: (N,) positions of the visual tokens in the prompt.
        selectable: (N,) bool; those of an overview are not.
        index: (N, S) patches of each, -1 = empty slot.
        tokens: (N, D) visual tokens: they are read back where one is selected.
        features: (patches, F) of the vision encoder, likewise.
        targets: (P, 3) row, slot and cell behind every PATCH token of the prompt, as in `Batch`.
        goes_on: whether the prompt ends within a list of points; None: it does if it ends with a
            point, or with one and a few tokens that may be its number.
        find: what a list should hold, where a model finds all at once: from the tokens of the
            answer so far, as markers, and their targets -> `Selected`, in order; None: it selects
            one point after the other.
    """

    predictor: PointPredictor
    classes: Classes
    places: NDArray[np.int64]
    selectable: NDArray[np.bool_]
    index: NDArray[np.int64]
    tokens: Tensor
    features: Tensor
    targets: NDArray[np.int64]
    goes_on: bool | None = None
    find: Callable[[Sequence[int], Sequence[Target]], list[Selected]] | None = None

    @property
    def rule(self) -> PointConfig:
        return self.predictor.config

    @cached_property
    def filled(self) -> NDArray[np.bool_]:
        """(N, S) bool, False = empty slot."""
        return self.index >= 0

    @cached_property
    def position_ids(self) -> NDArray[np.int64]:
        """(N,) rotary position of every row: its number among the selectable ones."""
        return np.cumsum(self.selectable) - 1


class PointGrammar:
    """Which part of a point may come next in one sequence.

    Attributes:
        expects: a token of the text (PATCH is one), a slot of ``row``, or a cell of ``slot``.
        last: row and slot of the last complete point of the list; None before its first.
        previous_row: the last selected row of the list, whose position rotates the next query;
            None before its first.
        ended: no point may follow, see ``several_lists`` of the rule.
    """

    def __init__(self, rule: PointConfig, filled: NDArray[np.bool_]) -> None:
        """
        Args:
            filled: (N, S) bool, False = empty slot.
        """
        self.rule = rule
        self.filled = filled
        self.expects: Literal["text", "slot", "cell"] = "text"
        self.row = self.slot = -1
        self.ended = False
        self.new_list()

    def new_list(self) -> None:
        """The order and the rotation of queries begin anew."""
        self.last: tuple[int, int] | None = None
        self.previous_row: int | None = None

    def advance(self, kind: Kind, number: int) -> None:
        """Take the next part of a point."""
        if kind == "none":
            if self.rule.several_lists:
                self.new_list()
            else:
                self.ended = True
        elif kind == "row":
            self.row = self.previous_row = number
            self.expects = "slot"
        elif kind == "slot":
            self.slot, self.expects = number, "cell"
        else:
            self.last, self.expects = (self.row, self.slot), "text"

    def rows(self) -> NDArray[np.bool_]:
        """(N + 1,) which rows, and last NMP, may come: in order, and none whose slots are used."""
        allowed = np.full(len(self.filled) + 1, not self.ended)
        if self.last is not None:
            row, _ = self.last
            allowed[:row] = False
            allowed[row] &= not self._used_up()
        elif not self.rule.first_may_be_none:
            allowed[-1] = False
        return allowed

    def slots(self) -> NDArray[np.bool_]:
        """(S,) which slots of the row may come: only later ones if it is that of the last point."""
        allowed = np.ones(self.filled.shape[1], dtype=np.bool_)
        if self.last is not None and self.last[0] == self.row:
            allowed[: self.last[1] + 1] = False
        return allowed

    def _used_up(self) -> bool:
        """Whether no slot is left in the row of the last point."""
        assert self.last is not None
        row, slot = self.last
        left = self.filled[row, slot + 1 :]
        return not (left.any() if self.rule.loss_masks_empty_slots else len(left))


class Pointing:
    """The points of one answer, from its prompt on.

    Attributes:
        grammar: where the answer stands.
        keys: (N + 1, E) of the rows and of NMP, from the prefill on.
        confidences: of every point that is complete the probabilities of its row, slot and cell.
    """

    def __init__(
        self, prompt: PointPrompt, ids: Sequence[int], content: Keys | None, sampler: Sampler
    ) -> None:
        """
        Args:
            ids: (T,) of the prompt, with markers.
            content: (T,) numbers of the prompt's positions for the prefix cache, if it has any.
            sampler: of the answer.
        """
        self.prompt = prompt
        self.rule, self.classes = prompt.rule, prompt.classes
        self.grammar = PointGrammar(prompt.rule, prompt.filled)
        self.keys: Tensor | None = None
        self.confidences: list[tuple[float, float, float]] = []
        self._content = None if content is None else content[prompt.places]
        self._sampler = sampler
        self._chances: list[float] = []  # of the parts of the point that is being written
        self._written: list[int] = []  # the answer, as markers, where a list may be found
        self._targets: list[Target] = []  # of its PATCH tokens, likewise
        self._found: list[Selected] | None = None  # what the list is to hold, see `PointPrompt`
        for part in parts_of(prompt.targets):
            self.grammar.advance(_KINDS[len(part)], part[-1] if part else 0)
        if not ids or ids[-1] not in self.rule.marker_ids:
            self.grammar.expects = "text"  # a point that an earlier answer broke off is not gone on
        # Points of the question restrict no answer; a list that is being written goes on.
        open_ = prompt.goes_on
        if open_ is None:
            open_ = not set(self.rule.marker_ids).isdisjoint(ids[-1 - _LONGEST_NUMBER :])
        if self.rule.several_lists and not open_:
            self.grammar.new_list()

    # ---- ids ----

    @property
    def patch(self) -> int:
        """The text's token at which a point begins, or a list ends."""
        return self.rule.patch_token_id

    def marker(self, id: int) -> int:
        """What embedding and head know of a token of the answer."""
        if id < self.classes.first:
            return id
        kind, _ = self.classes.read(id)
        patch, subpatch, location = self.rule.marker_ids
        return {"slot": subpatch, "cell": location}.get(kind, patch)

    def symbols(self, tokens: Iterable[int]) -> list[int]:
        """Tokens of the answer as other answers can know them: markers, and V in place of NMP."""
        none = self.classes.id("none")
        return [self.classes.first if id == none else self.marker(id) for id in tokens]

    def drafted(self, draft: list[int]) -> list[int]:
        """A draft up to its first point, which nothing that was read before tells."""
        markers, first = self.rule.marker_ids, self.classes.first
        ends = (i for i, id in enumerate(draft) if id in markers or id >= first)
        return draft[: next(ends, len(draft))]

    def forbidden(self, first: bool) -> list[int]:
        """Markers that cannot be the text's next token; ``first``: of the answer."""
        patch, *others = self.rule.marker_ids
        # What a prompt shows is known only behind its prefill, in which the released rule does not
        # point yet.
        too_early = first and not self.rule.points_in_prompt
        nothing = self.grammar.ended or not self.prompt.selectable.any()
        return [patch, *others] if too_early or nothing else others

    def take(self, id: int) -> int:
        """Count a token as written. Returns: its number for the prefix cache, by content."""
        finds = self.prompt.find is not None
        if finds:
            self._written.append(self.marker(id))
        if id < self.classes.first:
            return id
        kind, number = self.classes.read(id)
        self.grammar.advance(kind, number)
        if finds:
            self._note(kind, number)
        if kind == "cell" and len(self._chances) == 3:
            row, slot, cell = self._chances
            self.confidences.append((row, slot, cell))
        if kind in ("none", "cell"):
            self._chances = []
        if self._content is None:
            return 0
        row, slot = self.grammar.row, self.grammar.slot
        parts = {"none": (), "row": (row,), "slot": (row, slot)}
        return content_of(parts.get(kind, (row, slot, number)), self._content, self.rule)

    def _note(self, kind: Kind, number: int) -> None:
        """Keep what is selected, in place of what was known of the same point."""
        row, slot = self.grammar.row, self.grammar.slot
        targets: dict[Kind, Target] = {"none": END_OF_LIST, "row": (number, -1, -1)}
        if kind in targets:
            self._targets.append(targets[kind])
        elif self._targets:  # else the prompt ended within the point
            self._targets[-1] = (row, slot, number if kind == "cell" else -1)
        if kind == "none":
            self._found = None

    # ---- what is computed, on the device ----

    def num_known(self, reused: int) -> int:
        """Visual tokens among the first ``reused`` positions of the prompt."""
        return int((self.prompt.places < reused).sum())

    def knows_all(self, reused: int) -> bool:
        """Whether no visual token stands behind them."""
        return self.num_known(reused) == len(self.prompt.places)

    def make_keys(self, states: Tensor, reused: int, known: Tensor | None) -> None:
        """Make the keys that are not known, in the prefill.

        Args:
            states: (T - reused, D) of the prompt's positions, before the final norm; read only if
                there are visual tokens among them.
            known: (k + 1, E) keys of another prompt's visual tokens, with which this one shares
                the first ``reused`` positions, and of NMP.
        """
        places, seen = self.prompt.places, self.num_known(reused)
        if known is not None and seen and self.knows_all(reused):
            # The other prompt may have more images behind these.
            self.keys = known if len(known) == seen + 1 else torch.cat((known[:seen], known[-1:]))
        elif len(places):
            device = states.device
            at = torch.from_numpy(places[seen:] - reused).to(device, non_blocking=True)
            numbers = torch.from_numpy(self.prompt.position_ids[seen:])
            numbers = numbers.to(device, non_blocking=True)
            keys = self.prompt.predictor.row_keys(states[at], numbers)
            self.keys = keys if known is None else torch.cat((known[:seen], keys))

    def read_back(self, x: Tensor) -> Tensor:
        """The embedding (D,) of the newest token's marker -> what is read of it."""
        grammar, prompt = self.grammar, self.prompt
        if grammar.expects == "slot":
            return x + prompt.tokens[grammar.row].to(x.dtype)
        if grammar.expects == "cell":
            patch = int(prompt.index[grammar.row, grammar.slot])
            features = prompt.features[max(patch, 0)][None] * (patch >= 0)
            of_slot = prompt.predictor.embed_slot(features)[0].to(x.dtype)
            return x + of_slot if self.rule.subpatch_embedding == "add" else of_slot
        return x

    def scores(self, state: Tensor) -> Tensor:
        """Of rows and NMP (N + 1,), where the text has come to PATCH; of slots (S,); of cells (9,).

        Nothing is excluded yet. ``state``: (D,) of the newest token, before the final norm.
        """
        predictor, grammar, prompt = self.prompt.predictor, self.grammar, self.prompt
        if grammar.expects == "cell":
            return predictor.cell_logits(state[None])[0]
        if grammar.expects == "slot":
            patches = torch.from_numpy(prompt.index[grammar.row])
            patches = patches.to(state.device, non_blocking=True)
            windows = prompt.features[patches.clamp(min=0)] * (patches >= 0)[:, None]
            return predictor.slot_logits(state[None], predictor.slot_keys(windows)[None])[0]
        assert self.keys is not None
        row = grammar.previous_row
        last_id = 0 if row is None else max(int(prompt.position_ids[row]), 0)
        last_ids = torch.full((1,), last_id, device=state.device)
        anything = torch.ones((), dtype=torch.bool, device=state.device)
        return predictor.row_logits(state[None], self.keys, last_ids, anything)[0]

    # ---- what is chosen, on the host ----

    def choose(self, scores: Tensor, marker: Sampled | None) -> Sampled | None:
        """The next part of a point; None: no point may begin here.

        Args:
            scores: see :meth:`scores`. marker: PATCH as it was chosen in the text, if it was.
        """
        before = 0.0 if marker is None else self._sampler.logprob
        if marker is not None and self.prompt.find is not None and self.grammar.last is None:
            self._found = self.prompt.find(self._written, self._targets) or None
        if self._found is not None:
            return self._choose_found(scores, marker, before)
        sampled = self._choose_part(scores) if marker is None else self._choose_row(scores, marker)
        if sampled is not None:
            self._sampler.logprob = before + math.log(max(self._chances[-1], 1e-30))
        return sampled

    def _choose_found(self, scores: Tensor, marker: Sampled | None, before: float) -> Sampled:
        """The next part of the list as it was found; behind its last point, the end."""
        found, grammar = self._found or [], self.grammar
        kind: Kind = grammar.expects if grammar.expects != "text" else "row"
        if kind == "row" and not found:
            kind, number, chance = "none", self.classes.rows, 1.0
        else:
            number = found[0].target[("row", "slot", "cell").index(kind)]
            chance = found[0].confidence if kind == "row" else 1.0
        if kind == "cell":
            self._found = found[1:]
        self._chances.append(chance)
        self._sampler.logprob = before + math.log(max(chance, 1e-30))
        token = self.classes.id(kind, 0 if kind == "none" else number)
        return self._sampled(token, number, scores, marker)

    def _choose_row(self, scores: Tensor, marker: Sampled) -> Sampled | None:
        selectable = np.append(self.prompt.selectable, True)
        allowed = self.grammar.rows()
        if self.rule.mask_before_argmax:
            selectable &= allowed
            if not selectable.any():
                return None
        scores = scores.masked_fill(torch.from_numpy(~selectable), MASKED)
        row = self._sampler.select(scores)
        if not allowed[row]:
            return None
        self._chances = [float(scores.softmax(dim=-1)[row])]
        return self._sampled(self.classes.first + row, row, scores, marker)  # N is NMP in both

    def _choose_part(self, scores: Tensor) -> Sampled:
        grammar = self.grammar
        kind: Kind = "cell"
        if grammar.expects == "slot":
            kind = "slot"
            filled = torch.from_numpy(self.prompt.filled[grammar.row])
            scores = scores.masked_fill(~filled, _EMPTY_SLOT)
            scores = scores.masked_fill(~torch.from_numpy(grammar.slots()), -math.inf)
        number = self._sampler.select(scores)
        self._chances.append(float(scores.softmax(dim=-1)[number]))
        return self._sampled(self.classes.id(kind, number), number, scores)

    def _sampled(
        self, token: int, number: int, scores: Tensor, marker: Sampled | None = None
    ) -> Sampled:
        """With log-probabilities: among the classes, and of a row also that of its PATCH."""
        asked = self._sampler.params.logprobs
        if asked is None:
            return Sampled(token)
        before = 0.0 if marker is None else marker.logprob or 0.0
        logprobs = before + scores.log_softmax(dim=-1)
        first = token - number
        best = logprobs.sort(descending=True, stable=True).indices[:asked]
        top = [(first + int(i), float(logprobs[i])) for i in best]
        if marker is not None:
            top += [one for one in marker.top if one[0] != self.rule.patch_token_id]
        top.sort(key=lambda one: -one[1])
        return Sampled(token, float(logprobs[number]), tuple(top[:asked]))


def parts_of(targets: NDArray[np.int64]) -> Iterator[Part]:
    """The parts of points (P, 3) in the order of their tokens."""
    for row, slot, cell in targets.tolist():
        if row == NO_MORE_POINTS:
            yield ()
            continue
        yield (row,)
        if slot >= 0:
            yield row, slot
            if cell >= 0:
                yield row, slot, cell


def content_of(part: Part, visual: Keys, rule: PointConfig) -> int:
    """A number for the prefix cache that tells points apart by what they select, in any prompt.

    ``visual``: (N,) numbers of the visual tokens.
    """
    if not part:
        return rule.patch_token_id
    row, *places = part
    return point_key(int(visual[row]), *places)


def num_slots(index: NDArray[np.int64], pooling_size: int) -> int:
    """S of a prompt: a whole square that holds the patches of each of its visual tokens (n, W).

    It does not count the columns that a batch with other prompts adds.
    """
    used = np.flatnonzero((index >= 0).any(axis=0))
    last = int(used[-1]) + 1 if len(used) else 0
    return max(pooling_size, math.ceil(math.sqrt(last))) ** 2


def read_classes(
    ids: NDArray[np.int64], classes: Classes, rule: PointConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids of a prompt with points -> with markers, and the targets (P, 3) behind them.

    Raises: ValueError for classes of another prompt, and out of their order.
    """
    patch, subpatch, location = rule.marker_ids
    markers: dict[Kind, int] = {"row": patch, "none": patch, "slot": subpatch, "cell": location}
    ids, targets = ids.copy(), []
    expected = 0  # 1 and 2: a slot, a cell
    for at, id in enumerate(ids.tolist()):
        kind: Kind | None = None
        number = 0
        if id >= classes.first:
            kind, number = classes.read(id)
            ids[at] = markers[kind]
        fits = kind in ((None, "row", "none"), ("slot",), ("cell",))[expected]
        if not fits:
            wanted = ("text or a visual token", "a patch of it", "a place in the patch")[expected]
            raise ValueError(
                f"token {id} at position {at} is out of order: expected {wanted}; a point has the "
                f"ids of a visual token, of a patch in it and of a place in that"
            )
        if kind in ("row", "none"):
            targets.append([number if kind == "row" else NO_MORE_POINTS, -1, -1])
        elif kind is not None:
            targets[-1][expected] = number
        expected = {"row": 1, "slot": 2}.get(kind or "", 0)
    return ids, np.array(targets, dtype=np.int64).reshape(-1, 3)


def check_targets(prompt: PointPrompt) -> PointPrompt:
    """Raises: ValueError for points of the prompt that select what cannot be selected there."""
    N, S = prompt.index.shape
    for row, slot, cell in prompt.targets.tolist():
        if row == NO_MORE_POINTS:
            continue
        if not 0 <= row < N or not prompt.selectable[row]:
            raise ValueError(
                f"a point of the prompt selects visual token {row}, but of its {N} only "
                f"{int(prompt.selectable.sum())} can be selected: those of images that it shows, "
                f"without their overviews"
            )
        if not -1 <= slot < S or (slot >= 0 and not prompt.filled[row, slot]):
            raise ValueError(
                f"a point of the prompt selects patch {slot} of visual token {row}, which has only "
                f"{np.flatnonzero(prompt.filled[row]).tolist()}"
            )
        if not -1 <= cell < CELLS:
            raise ValueError(
                f"a point of the prompt selects place {cell} of a patch, expected 0 to {CELLS - 1}"
            )
    return prompt


def fetch_scores(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores of several answers on the host, float32, in a single transfer."""
    if not scores:
        return []
    host = torch.cat([one.float() for one in scores]).cpu()
    return list(host.split([len(one) for one in scores]))


def given_points(ids: NDArray[np.int64], prompt: PointPrompt) -> NDArray[np.bool_]:
    """(P,) which points of the text were given in questions; the others were listed in answers.

    A list goes on with its next point right behind a number, and ends with no-more-points.
    """
    rule, rows = prompt.rule, prompt.targets[:, 0]
    at = np.flatnonzero(ids == rule.patch_token_id)
    given = np.ones(len(at), dtype=np.bool_)
    for i in range(len(at) - 1, -1, -1):
        behind = i + 1 < len(at) and at[i + 1] - at[i] <= 3 + _LONGEST_NUMBER
        given[i] = rows[i] != NO_MORE_POINTS and not (behind and not given[i + 1])
    return given
