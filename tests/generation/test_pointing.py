"""Points that an answer selects, against what AI2's two codes do with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.generation.engine import Engine
from nanomolmo2.generation.pointing import Classes, PointGrammar, Pointing
from nanomolmo2.generation.sampling import Sampled, Sampler, SamplingParams
from nanomolmo2.models import NanoMolmo2, PointConfig
from tests.generation.point_model import (
    QUOTE,
    TRAINING_REPOSITORY,
    Forced,
    consistent,
    prompt_of,
    released,
    request,
)
from tests.molmo_point import (
    CASES,
    LOCATION,
    PATCH,
    SUBPATCH,
    V,
    golden_model,
    images_of,
    markers_of,
    table,
    tensors,
)


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_of_the_released_code(name: str) -> None:
    """Its ids exactly: classes of rows, slots and cells are counted on behind the vocabulary."""
    prompt = prompt_of(name)
    found = released().generate(
        prompt.ids[None],
        pixel_values=prompt.pixels,
        image_token_pooling=prompt.pooling,
        max_new_tokens=22,
        temperature=0,
        eos_token_id=None,
    )
    assert found[0, : len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert found[0, len(prompt.ids) :].tolist() == table("cases")[name]["greedy_ids"]


@pytest.mark.parametrize("answer", ["greedy", "forced"])
@pytest.mark.parametrize("name", CASES)
def test_raw_logits_of_the_released_code(name: str, answer: str) -> None:
    """Traps 4, 5, 8 and 19: text, rows, slots and cells of every step, within 2e-5.

    With states behind the final norm, keys of the input embeddings or an added SUBPATCH they differ
    by more than 1. The first step offers no point: all classes are -1e5 there.
    """
    case, golden = table("cases")[name], tensors("cases")
    (prepared,) = request(released(), prompt_of(name))
    forced = Forced(released(), prepared, case[f"{answer}_ids"])
    raw = torch.stack([forced.raw(i) for i in range(len(forced.steps))])
    # The reference itself is 2.4e-5 from float64 at one slot's 4.8.
    torch.testing.assert_close(raw, golden[f"{name}.{answer}_logits"], rtol=6e-6, atol=2e-5)
    rows = torch.stack([step.rows for step in forced.steps[1:]])
    torch.testing.assert_close(rows, golden[f"{name}.{answer}_patch_logits"], rtol=0, atol=2e-5)
    slots = [i for i, step in enumerate(forced.steps) if step.slots is not None]
    cells = [i for i, step in enumerate(forced.steps) if step.cells is not None]
    if answer == "forced":
        assert slots == case["forced_subpatch_steps"] and cells == case["forced_location_steps"]
    assert len(slots) == len(cells) == len(forced.result.confidences) > 1


@pytest.mark.parametrize("name", CASES)
def test_keys_of_the_released_code(name: str) -> None:
    """Traps 5, 11 and 12: of the last block's states; NMP's learned vector last and not turned."""
    golden = tensors("cases")
    (prepared,) = request(released(), prompt_of(name))
    pointing = Forced(released(), prepared, [97]).pointing
    assert pointing.keys is not None
    torch.testing.assert_close(pointing.keys, golden[f"{name}.patch_k"], rtol=0, atol=2e-5)
    predictor, prompt = pointing.prompt.predictor, pointing.prompt
    assert torch.equal(pointing.keys[-1], predictor.add_no_point_class_embed.vector)
    assert prompt.position_ids.tolist() == golden[f"{name}.image_pos_ids"].flatten().tolist()
    mask = [*prompt.selectable.tolist(), True]
    assert mask == golden[f"{name}.patch_k_mask"].bool().flatten().tolist()


@pytest.mark.parametrize("overview", ["own", "shared"])
@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_of_the_training_repository(name: str, overview: str) -> None:
    """Traps 7, 8 and 20: its own ``generate`` is one more setting of the same fields.

    Overviews read the row of `<im_low>` or share the image token's, SUBPATCH is added, rows before
    the last one are masked in front of the argmax, and a list has a point.
    """
    model = golden_model(**TRAINING_REPOSITORY, overview_embedding=overview)
    (prepared,) = request(model, prompt_of(name))
    (result,) = Engine(model.llm).run([prepared])
    tokens, targets = markers_of(result.token_ids, table("cases")[name]["bounds"])
    known = table("training_repo_greedy")[f"{name}_{overview}"]
    assert tokens == known["token_ids"]
    whole = [line for line in targets if line[0] != NO_MORE_POINTS and line[2] >= 0]
    assert whole == known["targets"]


def test_trap_8_subpatch_is_added_or_stands_alone() -> None:
    """The logits of its place differ by more than 1: by 3.6 in the reference's answers."""
    case = table("cases")["one"]
    at = case["forced_location_steps"][0]
    found = []
    for way in ("replace", "add"):
        model = golden_model(subpatch_embedding=way)
        (prepared,) = request(model, prompt_of("one"))
        found.append(Forced(model, prepared, case["forced_ids"]).steps[at].text)
    assert float((found[0] - found[1])[:PATCH].abs().max()) > 1


def test_trap_9_cells_of_the_state_or_of_the_normed_state() -> None:
    """What the fields of the two rules say: another input of one linear map."""
    case = table("cases")["one"]
    at = case["forced_location_steps"][0]
    found = []
    for way in ("state", "norm"):
        model = golden_model(location_input=way)
        (prepared,) = request(model, prompt_of("one"))
        found.append(Forced(model, prepared, case["forced_ids"]).steps[at].cells)
    assert float((found[0] - found[1]).abs().max()) > 0.1


def test_trap_10_the_divisor_of_rows() -> None:
    """Root of the number of keys, NMP's included, or of their width: 26 and 32 here."""
    found = []
    for divisor in ("keys", "width"):
        model = golden_model(row_divisor=divisor)
        (prepared,) = request(model, prompt_of("one"))
        forced = Forced(model, prepared, table("cases")["one"]["forced_ids"])
        found.append(forced.steps[2].rows[9:])
    torch.testing.assert_close(found[0] * 26**0.5, found[1] * 32**0.5)


# ---- the grammar ----

RELEASED = PointConfig(patch_token_id=1, subpatch_token_id=2, location_token_id=3)
CONSISTENT = PointConfig.consistent(patch_token_id=1, subpatch_token_id=2, location_token_id=3)


def grammar_of(
    rule: PointConfig, rows: int = 10, slots: int = 4, *points: tuple[int, int]
) -> PointGrammar:
    """After points (row, slot)."""
    grammar = PointGrammar(rule, np.ones((rows, slots), dtype=np.bool_))
    for row, slot in points:
        for kind, number in (("row", row), ("slot", slot), ("cell", 0)):
            grammar.advance(kind, number)  # type: ignore[arg-type]
    return grammar


SETTINGS = ("prevent_repeats", "patch_sorted", "subpatch_sorted")
LINES: list[Any] = [line for line in table("grammar") if all(line[name] for name in SETTINGS)]


@pytest.mark.parametrize("entry", LINES, ids=lambda entry: "-".join(map(str, entry["history"])))
def test_what_the_released_grammar_allows(entry: Any) -> None:
    """AI2's logits processor, range by range; where it stops with an assertion, nothing may come.

    Left out are two lines with repeats or any order allowed: settings of no released model.
    """
    assert len(LINES) == 12
    vocabulary, rows, slots = entry["vocab"], entry["n_patches"], entry["n_subpatches"]
    classes = Classes(vocabulary, rows, slots)
    grammar = grammar_of(RELEASED, rows, slots)
    for id in entry["history"]:
        if id >= vocabulary:
            grammar.advance(*classes.read(id))
    allowed = np.zeros(classes.end, dtype=np.bool_)
    if grammar.expects == "slot":
        allowed[classes.id("slot") :][:slots] = grammar.slots()
    elif grammar.expects == "cell":
        allowed[classes.id("cell") :] = True
    else:
        allowed[:vocabulary] = True
        allowed[classes.id("row") :][: rows + 1] = grammar.rows()
    expected = np.zeros_like(allowed)
    if entry["allowed_ranges"] != "assertion":
        for begin, end in entry["allowed_ranges"]:
            expected[begin:end] = True
    assert (allowed == expected).all()


def test_trap_19_the_released_prefill_offers_no_point() -> None:
    """Of a prompt that ends inside of ``coords="``; by the other rule a point comes at once."""
    prompt = prompt_of("one").then(QUOTE)
    with torch.no_grad():
        batch = released().batch_of(prompt.ids[None], **images_of("one"))
        # The head's own scores: those that the model gives are of text alone.
        logits = released().llm.head(released().hidden_states(batch))[0, -1]
    assert int(logits.argmax()) == PATCH
    first = Engine(released().llm).run(request(released(), prompt, max_new_tokens=1))[0]
    logits[[PATCH, SUBPATCH, LOCATION]] = -torch.inf
    assert first.token_ids == [int(logits.argmax())]
    first = Engine(consistent().llm).run(request(consistent(), prompt, max_new_tokens=1))[0]
    assert V + 9 <= first.token_ids[0] < V + 25, "a row of the details"


def pointing_of(rule: NanoMolmo2, name: str = "one", *points: tuple[int, int]) -> Pointing:
    """The engine's state of an answer that has written points (row, slot)."""
    (prepared,) = request(rule, prompt_of(name))
    assert prepared.points is not None
    pointing = Pointing(prepared.points, [], None, Sampler(SamplingParams()))
    for row, slot in points:
        for kind, number in (("row", row), ("slot", slot), ("cell", 0)):
            pointing.take(pointing.classes.id(kind, number))  # type: ignore[arg-type]
    return pointing


def scores_of(pointing: Pointing, *best: int) -> Tensor:
    """(N + 1,) scores that fall from row to row in this order; all others are -5."""
    scores = torch.full((len(pointing.prompt.places) + 1,), -5.0)
    for i, row in enumerate(best):
        scores[row] = 5.0 - i
    return scores


MARKER = Sampled(PATCH)


def test_trap_20_argmax_before_the_mask_or_behind_it() -> None:
    """Likeliest is a row before the last: the released rule writes no point, the other the next."""
    for rule, expected in ((released(), None), (consistent(), V + 22)):
        pointing = pointing_of(rule, "one", (20, 1))
        chosen = pointing.choose(scores_of(pointing, 15, 22, 24), MARKER)
        assert (chosen and chosen.token) == expected
        # Of an overview it is none of the likeliest to begin with.
        chosen = pointing.choose(scores_of(pointing, 3, 23, 24), MARKER)
        assert chosen is not None and chosen.token == V + 23


def test_trap_20_a_list_without_points() -> None:
    """First may be NMP by the released rule alone; behind a point by both."""
    none = 25
    for rule, expected in ((released(), V + none), (consistent(), V + 12)):
        pointing = pointing_of(rule)
        chosen = pointing.choose(scores_of(pointing, none, 12), MARKER)
        assert chosen is not None and chosen.token == expected
        pointing = pointing_of(rule, "one", (11, 0))
        chosen = pointing.choose(scores_of(pointing, none, 12), MARKER)
        assert chosen is not None and chosen.token == V + none


def test_trap_21_a_patch_is_selected_once() -> None:
    """Two points of one patch are legal targets, and can never be answered: slots go up."""
    for rule in (released(), consistent()):
        pointing = pointing_of(rule, "one", (16, 1))
        chosen = pointing.choose(scores_of(pointing, 16), MARKER)
        assert chosen is not None and chosen.token == V + 16
        pointing.take(chosen.token)
        assert pointing.grammar.slots().tolist() == [False, False, True, True]
        chosen = pointing.choose(torch.tensor([9.0, 8.0, 1.0, 2.0]), None)
        assert chosen is not None and chosen.token == pointing.classes.id("slot", 3)
        for id in (chosen.token, pointing.classes.id("cell", 8)):
            pointing.take(id)
        assert not pointing.grammar.rows()[16], "its last slot is used up"
    chosen = pointing_of(released(), "one", (16, 3)).choose(scores_of(pointing, 16), MARKER)
    assert chosen is None


def test_trap_22_empty_slots_win_only_where_nothing_else_is_left() -> None:
    """Row 48 of the two pictures has patches in its first two slots alone.

    The released rule selects an empty slot behind them, which is no place. By the consistent rule
    the row is used up.
    """
    for rule in (released(), consistent()):
        pointing = pointing_of(rule, "two")
        assert pointing.prompt.filled[48].tolist() == [True, True, False, False]
        pointing.take(V + 48)
        chosen = pointing.choose(torch.tensor([-3.0, -2.0, 7.0, 7.0]), None)
        assert chosen is not None and chosen.token == pointing.classes.id("slot", 1)
        pointing.take(chosen.token)
        pointing.take(pointing.classes.id("cell"))
        chosen = pointing.choose(scores_of(pointing, 48, 50), MARKER)
        assert chosen is not None
        if rule is consistent():
            assert chosen.token == V + 50
            continue
        assert chosen.token == V + 48
        pointing.take(chosen.token)
        chosen = pointing.choose(torch.tensor([-3.0, -2.0, 6.0, 7.0]), None)
        assert chosen is not None and chosen.token == pointing.classes.id("slot", 2)


def test_trap_23_one_list_or_several() -> None:
    """Behind NMP the released rule writes no marker; by the other order and turn begin anew."""
    for rule in (released(), consistent()):
        pointing = pointing_of(rule, "one", (20, 1))
        pointing.take(pointing.classes.id("none"))
        assert (PATCH in pointing.forbidden(first=False)) == (rule is released())
        assert pointing.grammar.rows().any() == (rule is consistent())
    assert pointing.grammar.previous_row is None
    chosen = pointing.choose(scores_of(pointing, 25, 12), MARKER)
    assert chosen is not None and chosen.token == V + 12, "before row 20, and not NMP"


@torch.no_grad()
def test_trap_14_the_first_row_of_a_list_is_looked_for_without_a_turn() -> None:
    """Not from the last row's position; nor is one from an overview's, -1."""
    (prepared,) = request(released(), prompt_of("one"))
    forced = Forced(released(), prepared, [97])
    pointing, predictor = forced.pointing, released().point_predictor
    assert predictor is not None and pointing.keys is not None
    state = torch.randn(64, generator=torch.Generator().manual_seed(3))
    unturned = predictor.patch_q(predictor.x_norm(state[None])) @ pointing.keys.T / 26**0.5
    last = int(pointing.prompt.position_ids[-1])
    turned = predictor.row_logits(
        state[None], pointing.keys, torch.tensor([last]), torch.ones(26, dtype=torch.bool)
    )
    assert pointing.grammar.previous_row is None
    torch.testing.assert_close(pointing.scores(state), unturned[0])
    pointing.grammar.previous_row = 0  # of the overview
    torch.testing.assert_close(pointing.scores(state), unturned[0])
    pointing.grammar.previous_row = 24
    torch.testing.assert_close(pointing.scores(state), turned[0])
    assert float((turned - unturned).abs().max()) > 0.1


def test_trap_24_classes_belong_to_their_prompt() -> None:
    """A class of a wider prompt is an error; one that fits means another thing there."""
    one, video = Classes(V, 25, 4), Classes(V, 12, 9)
    assert [one.read(V + n) for n in (24, 25, 26, 29, 30, 38)] == [
        ("row", 24),
        ("none", 0),
        ("slot", 0),
        ("slot", 3),
        ("cell", 0),
        ("cell", 8),
    ]
    assert video.read(V + 24) == ("cell", 2)
    for classes in (one, video):
        for id in range(V, classes.end):
            assert classes.id(*classes.read(id)) == id
        with pytest.raises(ValueError, match=rf"token {classes.end} is no class of this prompt"):
            classes.read(classes.end)
