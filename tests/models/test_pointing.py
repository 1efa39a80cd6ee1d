"""Points by selection against golden values of AI2's own code, and against ourselves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanomolmo2.batch import NO_MORE_POINTS, PACK_SUBSEGMENT, Batch
from nanomolmo2.models import NanoMolmo2, PointConfig, preset
from nanomolmo2.models.forms import check_batch, check_points
from nanomolmo2.models.pointing import PointTerms
from tests.molmo_point import (
    CASES,
    LOCATION,
    PATCH,
    SUBPATCH,
    TRAINING,
    V,
    golden_model,
    images_of,
    markers_of,
    table,
    tensors,
    training_batch,
)

CONSISTENT = {"row_divisor": "width", "subpatch_embedding": "add", "location_input": "norm"}
CONSISTENT |= {"loss_masks_empty_slots": True}


def close(found: Tensor, expected: Tensor, bound: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


# ---- the forward pass: goldens of the released code ----


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_prefill(case: str) -> None:
    """Traps 2, 3, 7: no output projection, masked pooling, a row of its own for overviews."""
    model, golden, ids = golden_model(), tensors("cases"), table("cases")[case]["input_ids"]
    logits = model(torch.tensor([ids]), **images_of(case))
    assert logits.shape == (1, len(ids), V)
    expected = golden[f"{case}.prefill_logits"].clone()
    found = logits[0, -len(expected) :].clone()
    assert (expected[:, [PATCH, SUBPATCH, LOCATION]] == -1e5).all()  # the grammar's alone
    close(found, expected)


@torch.no_grad()
def test_an_index_that_begins_anew_with_every_picture() -> None:
    """Trap 25: the released processor counts patches per picture, for the model alone."""
    model, ids = golden_model(), torch.tensor([table("cases")["two"]["input_ids"]])
    images = images_of("two")
    relative = tensors("cases")["two.image_token_pooling"].long()
    assert not torch.equal(relative, images["image_token_pooling"])
    expected = model.batch_of(ids, **images)
    found = model.batch_of(ids, **{**images, "image_token_pooling": relative})
    assert torch.equal(found.image_token_pooling, images["image_token_pooling"])
    assert torch.equal(expected.image_token_pooling, images["image_token_pooling"])
    both = torch.cat((ids, ids))  # two rows, four pictures
    twice = {
        "pixel_values": images["pixel_values"].repeat(2, 1, 1),
        "image_token_pooling": relative.repeat(2, 1),
    }
    second = torch.where(expected.image_token_pooling < 0, -1, expected.image_token_pooling + 250)
    whole = model.batch_of(both, **twice).image_token_pooling
    assert torch.equal(whole, torch.cat((expected.image_token_pooling, second)))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_keys(case: str) -> None:
    """Traps 4, 5, 6, 11, 12, 13: states before the last norm, NMP last and not turned, ids that
    count selectable tokens over all images."""
    model, golden = golden_model(), tensors("cases")
    batch = Batch(torch.tensor([table("cases")[case]["input_ids"]]), **images_of(case))
    seen, points = model.see(batch), model.point_predictor
    assert torch.equal(seen.position_ids, golden[f"{case}.image_pos_ids"].long())
    mask = golden[f"{case}.patch_k_mask"].bool()
    assert torch.equal(seen.selectable, mask[:-1])
    assert mask[-1]
    torch.testing.assert_close(
        seen.tokens, golden[f"{case}.image_features"][:, 0], rtol=1e-5, atol=5e-5
    )
    close(
        points.row_keys(model.states(batch)[0][seen.places], seen.position_ids),
        golden[f"{case}.patch_k"],
    )
    windows = seen.windows(torch.arange(len(seen.tokens)))
    close(points.slot_keys(windows), golden[f"{case}.subpatch_k"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_forced_answer(case: str) -> None:
    """Traps 8, 9, 10, 14: what is read back, cells of the raw state, divisors, the first query."""
    model, golden, known = golden_model(), tensors("cases"), table("cases")[case]
    ids, lines = markers_of(known["forced_ids"], known["bounds"])
    prompt = len(known["input_ids"])
    batch = Batch(
        torch.tensor([known["input_ids"] + ids]),
        point_targets=torch.tensor(lines),
        **images_of(case),
    )
    check_points(batch, model.config)
    states, seen, points = model.states(batch)[0], model.see(batch), model.point_predictor
    before = states[prompt - 1 : -1]  # row t chooses token t of the answer
    logits = model.llm.head(model.llm.norm(before))
    expected = golden[f"{case}.forced_logits"][:, :V]
    text = [i for i in range(V) if i not in (PATCH, SUBPATCH, LOCATION)]
    close(logits[:, text], expected[:, text])

    keys = points.row_keys(states[seen.places], seen.position_ids)
    selectable = torch.cat((seen.selectable, torch.ones(1, dtype=torch.bool)))
    last, newest, chosen, turned = 0, 0, [], []
    at = iter(lines)
    for id in ids:
        turned.append(last)
        last = newest  # there a row counts from the step behind its PATCH on
        if id == PATCH:
            row = next(at)[0]
            chosen.append(row)
            newest = newest if row == NO_MORE_POINTS else int(seen.position_ids[row])
    rows = points.row_logits(before[1:], keys, torch.tensor(turned[1:]), selectable)
    close(rows, golden[f"{case}.forced_patch_logits"])

    steps = [i for i, id in enumerate(ids) if id == SUBPATCH]
    assert steps == known["forced_subpatch_steps"]
    of_points = torch.tensor([row for row in chosen if row != NO_MORE_POINTS])
    slots = points.slot_logits(before[steps], points.slot_keys(seen.windows(of_points)))
    slots = slots.masked_fill(~seen.filled[of_points], -1e5)
    # In float64 one of them lies 2.4e-5 from the golden value, at 4.8: rounding of the reference.
    expected = golden[f"{case}.forced_subpatch_logits"]
    torch.testing.assert_close(slots, expected, rtol=5e-6, atol=2e-5)
    steps = [i for i, id in enumerate(ids) if id == LOCATION]
    assert steps == known["forced_location_steps"]
    close(points.cell_logits(before[steps]), golden[f"{case}.forced_location_logits"])


# ---- the loss: goldens of the training code ----

# Their names that are not ours behind point_predictor.
GRADIENTS = {
    "transformer.wte.new_embedding": ("llm.embed_tokens.weight", 256),
    "transformer.ff_out.new_weight": ("llm.lm_head.weight", 256),
    "connector.image_projector.w2.weight": ("connector.layers.image_projector.down_proj.weight", 0),
    "vit.patch_embedding.weight": ("vision_encoder.patch_embedding.weight", 0),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_losses_and_gradients(name: str) -> None:
    """Traps 7, 8, 9, 10, 21, 22: training adds at SUBPATCH, reads cells from the normed state,
    divides by the keys of the whole pack, and knows no masks but order, example and overview."""
    known = table("training")[name]
    shared = "own" if name == "single_own_low_row" else "shared"
    model, batch = golden_model(overview_embedding=shared), training_batch(name)
    model.vision_encoder.unfreeze()
    check_batch(batch, model.config)
    with torch.no_grad():
        terms = model.loss_terms(batch, z_loss=1e-4)

    def near(found: float, expected: float) -> None:
        assert found == pytest.approx(expected, rel=1e-4)

    near(float(terms.weights.sum()), known["weight_sum"])
    near(float(terms.text), known["lm_loss"] + known["z_loss"])
    near(float(terms.row), known["patch_loss"])
    near(float(terms.slot), known["subpatch_loss"])
    near(float(terms.cell), known["location_loss"])
    assert terms.counts.tolist() == [known["patches"], known["subpatches"], known["locations"]]
    assert int(terms.right[0]) == known["patch_accuracy_sum"]

    loss = model.loss(batch, z_loss=1e-4)
    near(float(loss.detach()), known["total"])
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for theirs, norm in known["gradient_norms"].items():
        ours, first = GRADIENTS.get(theirs, (f"point_predictor.{theirs}", 0))
        near(float(gradients[ours][first:].norm()), norm)


# ---- twins ----


def with_loss(model: NanoMolmo2, *batches: Batch) -> list[float]:
    with torch.no_grad():
        return [float(model.loss(batch)) for batch in batches]


def joined(*batches: Batch) -> Batch:
    """A pack of examples in one row."""
    cat = {
        name: torch.cat([getattr(b, name) for b in batches], dim=1)
        for name in ("input_ids", "labels", "loss_weights")
    }
    cat["position_ids"] = torch.cat([positions_of(b) for b in batches], dim=1)
    cat["subsegment_ids"] = torch.cat(
        [subsegments_of(b) + k * PACK_SUBSEGMENT for k, b in enumerate(batches)], dim=1
    )
    cat["labels"] = cat["labels"].clone()
    cat["labels"][0, batches[0].input_ids.shape[1]] = -100
    return Batch(**cat, **images_joined(batches), point_targets=targets_joined(batches))


def stacked(*batches: Batch) -> Batch:
    """The examples as padded rows of one batch."""
    T = max(b.input_ids.shape[1] for b in batches)

    def pad(name: str, value: float) -> Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(part(b, name), (0, T - b.input_ids.shape[1]), value=value)
                for b in batches
            ]
        )

    def part(batch: Batch, name: str) -> Tensor:
        found = {"position_ids": positions_of, "subsegment_ids": subsegments_of}.get(name)
        return found(batch) if found else getattr(batch, name)

    parts = {
        name: pad(name, value)
        for name, value in (
            ("input_ids", 0),
            ("labels", -100),
            ("loss_weights", 0),
            ("position_ids", 0),
            ("subsegment_ids", -1),
        )
    }
    mask = torch.cat([(torch.arange(T) < b.input_ids.shape[1])[None] for b in batches])
    return Batch(
        **parts,
        attention_mask=mask,
        **images_joined(batches),
        point_targets=targets_joined(batches),
    )


def positions_of(batch: Batch) -> Tensor:
    return batch.position_ids


def subsegments_of(batch: Batch) -> Tensor:
    if batch.subsegment_ids is None:
        return torch.zeros_like(batch.input_ids)
    return batch.subsegment_ids


def images_joined(batches: tuple[Batch, ...]) -> dict[str, Tensor]:
    pooling, before = [], 0
    for batch in batches:
        index = batch.image_token_pooling
        pooling.append(torch.where(index < 0, index, index + before))
        before += batch.pixel_values.shape[0] * batch.pixel_values.shape[1]
    pixels = torch.cat([b.pixel_values for b in batches])
    return {"pixel_values": pixels, "image_token_pooling": torch.cat(pooling)}


def targets_joined(batches: tuple[Batch, ...]) -> Tensor:
    lines, before = [], 0
    for batch in batches:
        own = batch.point_targets.clone()
        own[:, 0] += before * (own[:, 0] != NO_MORE_POINTS)
        lines.append(own)
        before += len(batch.image_token_pooling)
    return torch.cat(lines)


@pytest.mark.parametrize("together", [joined, stacked])
def test_an_example_has_its_loss_alone_and_among_others(together: Any) -> None:
    """With a divisor that does not count the pack's keys."""
    model = golden_model(**CONSISTENT)
    batches = [training_batch(name) for name in ("single", "tree", "multi")][
        : 2 if together is joined else 3
    ]
    single = [model.loss_terms(b) for b in batches]
    whole = model.loss_terms(together(*batches))
    for name in ("text", "row", "slot", "cell"):
        expected = sum(float(getattr(terms, name).detach()) for terms in single)
        assert float(getattr(whole, name).detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(whole.counts, sum(terms.counts for terms in single))
    assert torch.equal(whole.right, sum(terms.right for terms in single))


def test_the_released_divisor_counts_the_keys_of_the_pack() -> None:
    """Trap 10: so the same example has another temperature alone and packed."""
    model = golden_model()
    batches = [training_batch("single"), training_batch("tree")]
    alone: list[PointTerms] = [model.loss_terms(b) for b in batches]
    packed = model.loss_terms(joined(*batches))
    assert float(packed.slot) == pytest.approx(sum(float(t.slot) for t in alone), rel=1e-5)
    assert abs(float(packed.row) - sum(float(t.row) for t in alone)) > 0.01


def test_the_released_divisor_counts_the_keys_of_one_row_of_a_batch() -> None:
    """Trap 10: rows of a batch are packs of their own, padded to the keys of the one with most."""
    model = golden_model()
    few, many = training_batch("single"), training_batch("multi")
    n, most = (len(batch.image_token_pooling) for batch in (few, many))
    assert n < most
    alone = [model.loss_terms(b).row.item() for b in (few, many)]
    assert model.loss_terms(stacked(many, many)).row.item() == pytest.approx(2 * alone[1], rel=1e-5)
    beside = model.loss_terms(stacked(few, many)).row.item() - alone[1]
    assert beside != pytest.approx(alone[0], rel=1e-3)
    with torch.no_grad():  # scores are products with queries, so these can take the divisor
        for parameter in model.point_predictor.patch_q.parameters():
            parameter *= math.sqrt((n + 1) / (most + 1))
    assert beside == pytest.approx(model.loss_terms(few).row.item(), rel=1e-4)


def test_forward_gives_the_loss_too_and_features_take_the_place_of_pixels() -> None:
    model, batch = golden_model(**CONSISTENT), training_batch("tree")
    with torch.no_grad():
        expected = float(model.loss(batch))
        assert float(model(batch).loss) == pytest.approx(expected, rel=1e-6)
        features = model.vision_encoder.features(batch.pixel_values, (-3, -9))
        instead = replace(batch, pixel_values=None, visual_features=features)
        assert float(model.loss(instead)) == pytest.approx(expected, rel=1e-6)
        parts = batch.tensors()
        assert float(model(**parts)[1]) == pytest.approx(expected, rel=1e-6)
        parts = {**parts, "z_loss": 0.0}
        assert float(model.loss(**parts)) == pytest.approx(expected, rel=1e-6)
        parts["point_targets"] = parts["point_targets"].int()
        assert float(model.loss(**parts)) == pytest.approx(expected, rel=1e-6)


def test_points_of_a_question_are_read_and_carry_no_loss() -> None:
    model, batch = golden_model(**CONSISTENT), training_batch("single")
    places = (batch.input_ids[0] == PATCH).nonzero()[:, 0]
    labels = batch.labels.clone()
    labels[0, places[0] : places[0] + 3] = -100  # the first point belongs to the question now
    lists = torch.tensor([0, 1, 1, 1, 1])
    asked = replace(batch, labels=labels, point_lists=lists)
    terms = model.loss_terms(asked)
    assert terms.counts.tolist() == [4, 3, 3]
    moved = batch.point_targets.clone()
    moved[0, 0] = 23  # behind all others: forbids rows only in a list of its own
    other = model.loss_terms(replace(asked, point_targets=moved))
    assert torch.isfinite(other.total)
    assert float(other.row) < 100  # as part of the list it would mask the targets behind it
    assert float(other.row) != pytest.approx(float(terms.row), rel=1e-6)  # it is read


def test_a_batch_without_points_still_reaches_every_weight() -> None:
    """Ranks that share weights need a gradient of each, whatever their data."""
    model = golden_model()
    batch = training_batch("single")
    keep = batch.input_ids[0] < 266
    text = replace(
        batch,
        input_ids=batch.input_ids[:, keep],
        labels=batch.labels[:, keep],
        loss_weights=batch.loss_weights[:, keep],
        position_ids=None,
        point_targets=None,
    )
    model.loss(text).backward()
    ids = torch.arange(20)[None]
    model.loss(Batch(ids, labels=ids)).backward()
    for name, parameter in model.point_predictor.named_parameters():
        assert parameter.grad is not None, name


# ---- configuration ----


def test_rules_are_fields() -> None:
    ids = {"patch_token_id": 5, "subpatch_token_id": 6, "location_token_id": 7}
    assert PointConfig(**ids).rule == "released"
    assert PointConfig.consistent(**ids).rule == "consistent"
    assert PointConfig.consistent(**ids, first_may_be_none=True).rule == "own"
    stored = PointConfig.consistent(**ids).to_dict()
    assert PointConfig.from_dict(stored) == PointConfig.consistent(**ids)


def test_presets_have_the_parameters_of_the_released_files() -> None:
    for name, number in (("molmo-point-8b", 8_677_855_065), ("molmo-point-vid-4b", 4_471_625_561)):
        with torch.device("meta"):
            model = NanoMolmo2(preset(name))
        assert sum(p.numel() for p in model.parameters()) == number
    tiny = preset("tiny-point")
    assert tiny.point_config.rule == "consistent"
    with torch.device("meta"):
        more = sum(p.numel() for p in NanoMolmo2(tiny).point_predictor.parameters())
    assert more == 113_737


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm": {"predict_additional_vocab": False}}, "predict_additional_vocab"),
        ({"connector": {"connector_type": "linear"}}, "pooling connector"),
        ({"point": {"location_token_id": 747}}, "different"),
        ({"point": {"patch_embed_dim": 63}}, "even"),
        ({"point": {"image_non_indexable_patch_id": 752}}, "outside the vocabulary of 752"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    tiny = preset("tiny-point")
    with pytest.raises(ValueError, match=message):
        replace(
            tiny,
            llm_config=replace(tiny.llm_config, **changes.get("llm", {})),
            connector_config=replace(tiny.connector, **changes.get("connector", {})),
            point_config=replace(tiny.point_config, **changes.get("point", {})),
        )


# ---- bad input ----


def changed(line: int, column: int, value: int) -> dict[str, Tensor]:
    targets = training_batch("single").point_targets.clone()
    targets[line, column] = value
    return {"point_targets": targets}


def cut_behind(marker: int) -> dict[str, Tensor]:
    """The token behind the first such marker is another one."""
    ids = training_batch("single").input_ids.clone()
    ids[0, int((ids[0] == marker).nonzero()[0]) + 1] = 65
    return {"input_ids": ids}


def emptied(row: int, slot: int) -> dict[str, Tensor]:
    """A slot that a point selects holds no patch."""
    index = training_batch("single").image_token_pooling.clone()
    index[row, slot] = -1
    return {"image_token_pooling": index}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"point_targets": None}, "5 points .* but point_targets has 0 lines"),
        ({"point_targets": torch.zeros(4, 3, dtype=torch.long)}, "has 4 lines"),
        ({"point_targets": torch.zeros(5, 3)}, "integer type"),
        ({"point_targets": torch.zeros(5, 2, dtype=torch.long)}, "row, slot and cell"),
        ({"point_lists": torch.zeros(4, dtype=torch.long)}, "must have 5 numbers"),
        (changed(0, 0, 25), "rows from .* to 25, but the batch has 0 to 24"),
        (changed(0, 0, 3), "selects row 3, a visual token of an overview"),
        (emptied(15, 3), r"patch 3 of visual token 15, which has only \[0, 1, 2\]"),
        (changed(0, 1, 4), "slots from .* to 4"),
        (changed(0, 2, 9), "cells from .* to 9"),
        (changed(0, 1, -1), "cut off"),
        (changed(0, 2, -1), "cut off"),
        (cut_behind(PATCH), "cut off"),
        (cut_behind(SUBPATCH), "cut off"),
    ],
)
def test_points_that_do_not_fit_their_tokens(parts: dict[str, Any], message: str) -> None:
    """A truncated triple, a class of another prompt, an overview's row: one clear error each."""
    model = golden_model()
    batch = replace(training_batch("single"), **parts)
    with pytest.raises(ValueError, match=message):
        check_batch(batch, model.config)
    with pytest.raises(ValueError, match=message):
        model.loss(**batch.tensors())


def test_a_triple_that_was_cut_at_the_end_is_learned_as_far_as_it_goes() -> None:
    """Trap 33."""
    model, batch = golden_model(), training_batch("single")
    places = (batch.input_ids[0] == PATCH).nonzero()[:, 0]
    for kept, counts in ((1, [3, 2, 2]), (2, [3, 3, 2]), (3, [3, 3, 3])):
        end = int(places[2]) + kept
        targets = batch.point_targets[:3].clone()
        targets[2, kept:] = -1
        cut = {n: getattr(batch, n)[:, :end] for n in ("input_ids", "labels", "loss_weights")}
        short = replace(batch, **cut, position_ids=None, point_targets=targets)
        check_batch(short, model.config)
        assert model.loss_terms(short).counts.tolist() == counts


def test_points_for_a_model_that_has_none() -> None:
    with torch.device("meta"):
        model = NanoMolmo2(preset("tiny"))
    batch = Batch(torch.zeros(1, 3, dtype=torch.long), point_targets=torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match="no point_config"):
        check_points(batch, model.config)


@pytest.mark.parametrize("rule", [{}, CONSISTENT], ids=["released", "consistent"])
def test_a_list_may_end_where_nothing_is_shown(rule: dict[str, Any]) -> None:
    """Without an image no-more-points is the only row: certain, so it costs nothing."""
    model = golden_model(**rule)
    ids = torch.tensor([[5, 6, PATCH, 7, PATCH, 8]])
    ends = torch.tensor([[NO_MORE_POINTS, -1, -1]] * 2)
    batch = Batch(ids, labels=ids.clone(), point_targets=ends)
    check_batch(batch, model.config)
    terms = model.loss_terms(batch)
    assert (float(terms.row), float(terms.slot), float(terms.cell)) == (0, 0, 0)
    assert terms.counts.tolist() == [2, 0, 0] and terms.right.tolist() == [2, 0, 0]
    text = model.llm.loss(ids, labels=ids.clone(), reduction="sum")
    assert float(terms.text.detach()) == pytest.approx(float(text.detach()), rel=1e-6)
    model.loss(batch).backward()
    assert all(p.grad is not None for p in model.point_predictor.parameters())


# ---- what looks right and is not ----


@torch.no_grad()
def test_traps_4_5_11_and_13_keys_that_a_plausible_version_would_make() -> None:
    """Of the normed states, of the embeddings, with NMP's vector rotated, by the decoder's theta:
    each is far from the golden keys, so the bound of 2e-5 tells them apart."""
    model, golden = golden_model(), tensors("cases")["two.patch_k"]
    batch = Batch(torch.tensor([table("cases")["two"]["input_ids"]]), **images_of("two"))
    seen, points = model.see(batch), model.point_predictor
    states, ids = model.states(batch)[0][seen.places], seen.position_ids
    right = points.row_keys(states, ids)
    close(right, golden)

    def far(keys: Tensor) -> bool:
        return float((keys - golden)[: len(keys) - 1].abs().max()) > 0.01

    assert far(points.row_keys(model.llm.norm(states), ids))  # trap 4
    assert far(points.row_keys(model.embed(batch)[0][seen.places], ids))  # trap 5
    assert torch.equal(right[-1], points.add_no_point_class_embed.vector)  # trap 11
    assert len(seen.tokens) == table("cases")["two"]["bounds"]["no_more_points"] - V
    numbers = torch.tensor([int(ids[-1]) + 1])
    rotated = points._rotated(points.add_no_point_class_embed.vector[None], numbers)
    assert float((rotated[0] - golden[-1]).abs().max()) > 0.01
    theta = points.config.token_prediction_rotary_theta  # trap 13
    assert theta == 50_000 != model.config.llm_config.rope_theta
    points.config = replace(points.config, token_prediction_rotary_theta=1e6)
    assert far(points.row_keys(states, ids))
