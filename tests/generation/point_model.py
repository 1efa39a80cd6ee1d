"""The golden checkpoint that points, its prompts, and two ways to answer beside the engine's own.

`naive_answer` computes everything again for every token, by the model's own forward, and follows
the rules as they are written down; `Forced` drives the engine with tokens that are given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.generation.engine import Engine, Request
from nanomolmo2.generation.pointing import Pointing
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.prompt import requests_of
from nanomolmo2.generation.sampling import Sampled, Sampler
from nanomolmo2.models import NanoMolmo2, PointConfig
from nanomolmo2.models.point_config import CONSISTENT
from tests.molmo_point import LOCATION, PATCH, SUBPATCH, V, golden_model, images_of, table

QUOTE = 34  # behind it the golden net points
# The training repository's own generate, as settings of the released rule.
TRAINING_REPOSITORY: dict[str, Any] = {
    "mask_before_argmax": True,
    "first_may_be_none": False,
    "subpatch_embedding": "add",
}


@cache
def released() -> NanoMolmo2:
    """The golden model as it is loaded."""
    return golden_model()


@cache
def consistent() -> NanoMolmo2:
    """The golden weights by the other rule."""
    return golden_model(**CONSISTENT)


def causal(model: NanoMolmo2) -> NanoMolmo2:
    """The same rule, where no image token sees ahead: any beginning of a prompt can be reused."""
    rule = model.config.point_config
    assert rule is not None
    changed = golden_model(**{name: getattr(rule, name) for name in CONSISTENT})
    changed.config = replace(changed.config, bidirectional_image_attention=False)
    return changed


@dataclass(frozen=True)
class Prompt:
    """Ids (T,) without padding, and images; points as markers with targets (P, 3)."""

    ids: Tensor
    pixels: Tensor | None = None
    pooling: Tensor | None = None
    targets: Tensor | None = None
    num_rows: int = 0
    num_slots: int = 4

    def then(self, *ids: int) -> Prompt:
        """With more text behind."""
        return replace(self, ids=torch.cat([self.ids, torch.tensor(ids)]))

    def point(self, *target: int) -> Prompt:
        """With a point behind: row, slot, cell; or NMP."""
        markers = (PATCH, SUBPATCH, LOCATION) if target else (PATCH,)
        line = torch.tensor([target or (NO_MORE_POINTS, -1, -1)])
        old = self.targets if self.targets is not None else line[:0]
        return replace(self.then(*markers), targets=torch.cat([old, line]))

    def answered(self, classes: list[int]) -> Prompt:
        """With an answer behind, as the engine gave it."""
        prompt, waiting = self, list(classes)
        while waiting:
            id = waiting.pop(0)
            if id < V:
                prompt = prompt.then(id)
            elif id == V + self.num_rows:
                prompt = prompt.point()
            else:
                slot, cell = waiting.pop(0), waiting.pop(0)
                first = V + self.num_rows + 1
                prompt = prompt.point(id - V, slot - first, cell - first - self.num_slots)
        return prompt

    def ids_with_classes(self) -> Tensor:
        """(T,) points as ids behind the vocabulary."""
        found, lines = [], [] if self.targets is None else self.targets.tolist()
        row, slot, cell = 0, 0, 0
        first = V + self.num_rows + 1
        for id in self.ids.tolist():
            if id == PATCH:
                row, slot, cell = lines.pop(0)
                id = V + min(row, self.num_rows)
            elif id == SUBPATCH:
                id = first + slot
            elif id == LOCATION:
                id = first + self.num_slots + cell
            found.append(id)
        return torch.tensor(found)


@cache
def prompt_of(name: str) -> Prompt:
    """A golden prompt: ``one`` picture, ``two``, ``video``; or ``text`` alone."""
    if name == "text":
        return Prompt(torch.tensor([1, *b"how are you? 5="]))
    case, images = table("cases")[name], images_of(name)
    return Prompt(
        torch.tensor(case["input_ids"]),
        images["pixel_values"],
        images["image_token_pooling"],
        num_rows=case["n_patches"],
        num_slots=case["n_subpatches"],
    )


def batch_of(*prompts: Prompt, pad: int = 0) -> dict[str, Any]:
    """Keywords of ``generate`` and ``requests_of``: left-padded, the slots of all as wide."""
    T = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), T), pad)
    mask = torch.zeros(len(prompts), T, dtype=torch.bool)
    pixels, pooling, targets = [], [], []
    patches = rows = 0
    width = max((p.pooling.shape[1] for p in prompts if p.pooling is not None), default=4)
    for b, prompt in enumerate(prompts):
        ids[b, T - len(prompt.ids) :] = prompt.ids
        mask[b, T - len(prompt.ids) :] = True
        if prompt.targets is not None:
            moved = prompt.targets.clone()
            moved[moved[:, 0] != NO_MORE_POINTS, 0] += rows
            targets.append(moved)
        if prompt.pixels is not None:
            pixels.append(prompt.pixels)
        if prompt.pixels is not None and prompt.pooling is not None:
            own = torch.full((len(prompt.pooling), width), -1)
            own[:, : prompt.pooling.shape[1]] = prompt.pooling
            pooling.append(own.where(own < 0, own + patches))
            patches += prompt.pixels.shape[0] * prompt.pixels.shape[1]
            rows += len(own)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat(pixels) if pixels else None,
        "image_token_pooling": torch.cat(pooling) if pooling else None,
        "point_targets": torch.cat(targets) if targets else None,
    }


def request(
    model: NanoMolmo2, *prompts: Prompt, cache: PrefixCache | None = None, **changes: Any
) -> list[Request]:
    """Requests of prompts in one batch; 22 new tokens."""
    given = {"max_new_tokens": 22, **changes}
    return [replace(r, **given) for r in requests_of(model, **batch_of(*prompts), cache=cache)]


# ---- everything again for every token ----


@torch.no_grad()
def naive_answer(model: NanoMolmo2, prompt: Prompt, new: int = 22, bias: float = 0.0) -> list[int]:
    """Greedy, in the released numbering, without engine, cache or grammar class.

    Rules are those of the format's description: C.2 to C.4, D.4, D.6. A list goes on over the end
    of the prompt where it is being written there: not more than a number stands behind its point.
    ``bias`` of PATCH makes a net point that says other things.
    """
    rule, points = model.config.point_config, model.point_predictor
    assert rule is not None and points is not None
    N, S, V = prompt.num_rows, prompt.num_slots, model.config.llm_config.num_embeddings
    PATCH, SUBPATCH, LOCATION = rule.marker_ids
    ids = prompt.ids.tolist()
    lines: list[list[int]] = [] if prompt.targets is None else prompt.targets.tolist()
    answer: list[int] = []
    last: tuple[int, int] | None = None  # row and slot of the list's last complete point
    turn: int | None = None  # the list's last row
    ended = False
    for row, slot, _ in lines:
        ended |= row == NO_MORE_POINTS and not rule.several_lists
        last, turn = (row, slot), row
        if row == NO_MORE_POINTS:
            last, turn = None, None
    if rule.several_lists and not set(ids[-4:]) & {PATCH, SUBPATCH, LOCATION}:
        last, turn = None, None
    features = None
    if prompt.pixels is not None:
        layers = model.config.connector.vit_layers
        features = model.vision_encoder.features(prompt.pixels, layers)
    for step in range(new):
        targets = torch.tensor(lines).view(-1, 3) if lines else None
        again = replace(prompt, ids=torch.tensor(ids), targets=targets)
        keywords = batch_of(again)
        if features is not None:  # of all that does not change only these are kept
            keywords |= {"pixel_values": None, "visual_features": features}
        batch = model.batch_of(keywords.pop("input_ids"), **keywords)
        seen, states = model.see(batch), model.states(batch)[0]
        state, filled = states[-1:], seen.filled[:, :S]
        if ids[-1] == PATCH and lines[-1][0] != NO_MORE_POINTS:
            row = lines[-1][0]
            scores = points.slot_logits(state, points.slot_keys(seen.windows(torch.tensor([row]))))
            scores = scores[0, :S].masked_fill(~filled[row], -1e5)
            if last is not None and last[0] == row:
                scores[: last[1] + 1] = -torch.inf
            lines[-1][1] = int(scores.argmax())
            ids.append(SUBPATCH)
            answer.append(V + N + 1 + lines[-1][1])
        elif ids[-1] == SUBPATCH:
            lines[-1][2] = int(points.cell_logits(state)[0].argmax())
            last = lines[-1][0], lines[-1][1]
            ids.append(LOCATION)
            answer.append(V + N + 1 + S + lines[-1][2])
        else:
            logits = model.llm.head(model.llm.norm(state))[0]
            logits[[SUBPATCH, LOCATION]] = -torch.inf
            logits[PATCH] += bias
            too_early = step == 0 and not rule.points_in_prompt
            if too_early or ended or not bool(seen.selectable.any()):
                logits[PATCH] = -torch.inf
            chosen = None
            if int(logits.argmax()) == PATCH:
                keys = points.row_keys(states[seen.places], seen.position_ids)
                turned = 0 if turn is None else max(int(seen.position_ids[turn]), 0)
                offered = torch.cat([seen.selectable, torch.tensor([True])])
                scores = points.row_logits(state, keys, torch.tensor([turned]), offered)[0]
                chosen = _row(scores, offered, filled, last, rule)
            if chosen is None:
                logits[PATCH] = -torch.inf
                ids.append(int(logits.argmax()))
                answer.append(ids[-1])
                continue
            ids.append(PATCH)
            answer.append(V + chosen)
            lines.append([NO_MORE_POINTS if chosen == N else chosen, -1, -1])
            turn = chosen
            if chosen == N:
                ended, last, turn = not rule.several_lists, None, None
    return answer


def _row(
    scores: Tensor,
    offered: Tensor,
    filled: Tensor,
    last: tuple[int, int] | None,
    rule: PointConfig,
) -> int | None:
    """The row or NMP that may be written, if any."""
    allowed = torch.ones_like(offered)
    if last is not None:
        later = filled[last[0], last[1] + 1 :]
        used_up = not later.any() if rule.loss_masks_empty_slots else not len(later)
        allowed[: last[0] + used_up] = False
    elif not rule.first_may_be_none:
        allowed[-1] = False
    if rule.mask_before_argmax:
        offered = offered & allowed
        if not offered.any():
            return None
    best = int(scores.masked_fill(~offered, -torch.inf).argmax())
    return best if allowed[best] else None


# ---- the engine with given tokens ----


@dataclass
class Step:
    """Raw logits of what may come at one place."""

    text: Tensor  # (V,), markers -1e5
    rows: Tensor  # (N + 1,), masked ones -1e8
    marker: float  # logit of PATCH
    slots: Tensor | None = None  # (S,)
    cells: Tensor | None = None  # (9,)


class _GivenTokens(Sampler):
    """Chooses what is given, and remembers what it chose from."""

    def __init__(self, forced: Forced) -> None:
        super().__init__(forced.request.sampling)
        self.forced = forced

    def pick(self, logits: Any) -> Sampled:
        id = self.forced.next_token()
        return Sampled(PATCH if id >= V else id)

    def select(self, scores: Tensor) -> int:
        kind, number = self.forced.pointing.classes.read(self.forced.next_token())
        self.forced.chosen_from.append(scores)
        return len(scores) - 1 if kind == "none" else number


@dataclass
class Forced:
    """An engine's answer of given tokens, and the raw logits of every place."""

    model: NanoMolmo2
    request: Request
    tokens: list[int]
    steps: list[Step] = field(default_factory=list)
    chosen_from: list[Tensor] = field(default_factory=list)
    _turn: int | None = None  # the last row one place before

    def __post_init__(self) -> None:
        engine = Engine(self.model.llm, lookup=False)
        self.request = replace(self.request, max_new_tokens=len(self.tokens))
        engine.submit(self.request)
        self.row: Any = engine._waiting[-1]
        self.row.sampler = _GivenTokens(self)
        self.pointing: Pointing = self.row.pointing
        self.pointing._sampler = self.row.sampler
        run = engine._next

        def recorded(rows: Any, counts: Any, states: Tensor, *rest: Any) -> None:
            self._record(engine, states[-1])
            run(rows, counts, states, *rest)

        engine._next = recorded  # type: ignore[method-assign]
        while engine.busy:
            for event in engine.step():
                self.result = event.result

    def next_token(self) -> int:
        return self.tokens[len(self.row.tokens)]

    @torch.no_grad()
    def _record(self, engine: Engine, state: Tensor) -> None:
        pointing = self.pointing
        text = engine._head(state[None])[0]
        marker = float(text[PATCH])
        text[[PATCH, SUBPATCH, LOCATION]] = -1e5
        grammar, prompt = pointing.grammar, pointing.prompt
        scores, expects = pointing.scores(state), grammar.expects
        # Rows have scores everywhere. The released code counts a row as chosen one place later.
        grammar.expects, turn = "text", grammar.previous_row
        grammar.previous_row = self._turn if expects == "slot" else turn
        offered = torch.cat([torch.from_numpy(prompt.selectable), torch.tensor([True])])
        step = Step(text, pointing.scores(state).masked_fill(~offered, -1e8), marker)
        grammar.expects, grammar.previous_row, self._turn = expects, turn, turn
        if expects == "slot":
            filled = torch.from_numpy(prompt.filled[grammar.row])
            step.slots = scores.masked_fill(~filled, -1e5)
        elif expects == "cell":
            step.cells = scores
        self.steps.append(step)

    def raw(self, number: int) -> Tensor:
        """(width,) of a step as the released code has it: rows are -1e5 but the likeliest."""
        step, classes = self.steps[number], self.pointing.classes
        whole = torch.full((classes.end,), -1e5)
        whole[:V] = step.text
        if number:
            whole[V + int(step.rows.argmax())] = step.marker
        if step.slots is not None:
            whole[classes.id("slot") :][: classes.slots] = step.slots
        if step.cells is not None:
            whole[classes.id("cell") :] = step.cells
        return whole
