"""The loss of a model that points, against what the training code of MolmoPoint computed, and under
packing: the same numbers however the examples are put together.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from nanomolmo2.batch import NO_MORE_POINTS, PACK_SUBSEGMENT, Batch
from nanomolmo2.models import NanoMolmo2
from tests.training.golden_points import (
    EOS,
    EXAMPLES,
    Z_LOSS,
    consistent,
    golden_batch,
    golden_model,
    golden_tensors,
    goldens,
    gradient_norms,
    with_rule,
)

CLOSE = {"rel": 1e-4}
PATCH, SUBPATCH, LOCATION = 267, 268, 269


@pytest.fixture(scope="module")
def released() -> NanoMolmo2:
    return golden_model()


@pytest.fixture(scope="module")
def ours() -> NanoMolmo2:
    return consistent(golden_model())


def model_of(name: str, released: NanoMolmo2) -> NanoMolmo2:
    """The training code lets overviews share the image token's row, but for one example."""
    return with_rule(
        released, overview_embedding="own" if name == "single_own_low_row" else "shared"
    )


def by_label(model: NanoMolmo2, batch: Batch) -> Tensor:
    """(B, T) what each label adds to the summed loss: the gradient of its weight."""
    assert batch.loss_weights is not None
    weights = batch.loss_weights.clone().requires_grad_()
    batch = dataclasses.replace(batch, loss_weights=weights)
    model.loss(**batch.tensors(), reduction="sum", z_loss=Z_LOSS).backward()
    assert weights.grad is not None
    return weights.grad * weights.detach()


# ---- against the training code ----


@pytest.mark.parametrize("name", EXAMPLES)
def test_losses_are_those_of_molmopoints_training(released: NanoMolmo2, name: str) -> None:
    """Traps 7 to 10, 22 and 30: the row of overviews, SUBPATCH added to its embedding, cells of the
    normed state, rows divided by the root of the pack's keys, empty slots among the classes, and
    markers among the tokens that are written, as the training has them.
    """
    model, expected, batch = model_of(name, released), goldens()[name], golden_batch(name)
    with torch.no_grad():
        plain, terms = (model.loss_terms(batch, z_loss) for z_loss in (0.0, Z_LOSS))
        mean = model.loss(**batch.tensors(), z_loss=Z_LOSS)
    assert float(plain.text) == pytest.approx(expected["lm_loss"], **CLOSE)
    assert float(terms.text - plain.text) == pytest.approx(expected["z_loss"], rel=1e-3)
    for found, term in (
        (terms.row, "patch"),
        (terms.slot, "subpatch"),
        (terms.cell, "location"),
    ):
        assert float(found) == pytest.approx(expected[f"{term}_loss"], **CLOSE)
    assert float(terms.weights.sum()) == pytest.approx(expected["weight_sum"], **CLOSE)
    assert terms.counts.tolist() == [
        *(expected[key] for key in ("patches", "subpatches", "locations"))
    ]
    assert float(terms.right[0]) == expected["patch_accuracy_sum"]
    assert float(mean) == pytest.approx(expected["total"], **CLOSE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_are_those_of_molmopoints_training(released: NanoMolmo2, name: str) -> None:
    model, expected = model_of(name, released), goldens()[name]
    model.loss(**golden_batch(name).tensors(), z_loss=Z_LOSS).backward()
    for part, norm in gradient_norms(model).items():
        assert norm == pytest.approx(expected["gradient_norms"][part], **CLOSE), part


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "single_own_low_row"])
def test_the_loss_of_a_label_is_that_of_its_token_and_its_selection(
    released: NanoMolmo2, name: str
) -> None:
    """What the sum gains by a label's weight is how losses are told by task. Repeated targets
    (trap 21), two points in one ViT patch, stay in the loss.
    """
    model, batch, tensors = model_of(name, released), golden_batch(name), golden_tensors()
    text_alone = dataclasses.replace(batch)
    found = by_label(model, batch)
    assert float(found.sum()) == pytest.approx(
        goldens()[name]["total"] * goldens()[name]["weight_sum"], **CLOSE
    )
    assert batch.point_targets is not None and batch.labels is not None
    assert batch.loss_weights is not None
    row, slot, cell = batch.point_targets.unbind(dim=1)
    row = row.where(row != NO_MORE_POINTS, tensors[f"{name}.patch_logits"].shape[1] - 1)
    with torch.no_grad():
        logits = model(**text_alone.tensors())[0][0]  # (T, V)
    losses = torch.nn.functional.cross_entropy(
        logits[:-1], batch.input_ids[0, 1:], reduction="none"
    )
    losses = losses + Z_LOSS * logits[:-1].logsumexp(-1).square()
    for marker, scores, target in (
        (PATCH, tensors[f"{name}.patch_logits"], row),
        (SUBPATCH, tensors[f"{name}.subpatch_logits"], slot[slot >= 0]),
        (LOCATION, tensors[f"{name}.location_logits"], cell[cell >= 0]),
    ):
        places = (batch.labels[0] == marker).nonzero()[:, 0]
        of_selection = torch.nn.functional.cross_entropy(scores, target, reduction="none")
        expected = (losses[places - 1] + of_selection) * batch.loss_weights[0, places]
        torch.testing.assert_close(found[0, places], expected, rtol=1e-4, atol=1e-5)
    if name == "pack":
        assert batch.point_targets[1].tolist() == batch.point_targets[2].tolist() == [11, 0, 7]
    rest = batch.labels[0] == EOS  # of tokens that are no marker the loss is that of the text
    places = rest.nonzero()[:, 0]
    torch.testing.assert_close(
        found[0, places], losses[places - 1] * batch.loss_weights[0, places], rtol=1e-4, atol=1e-5
    )


def test_trap_7_overviews_read_the_row_that_the_config_says(released: NanoMolmo2) -> None:
    batch = golden_batch("single")
    for kind, name in (("own", "single_own_low_row"), ("shared", "single")):
        with torch.no_grad():
            loss = with_rule(released, overview_embedding=kind).loss(
                **batch.tensors(), z_loss=Z_LOSS
            )
        assert float(loss) == pytest.approx(goldens()[name]["total"], **CLOSE)
    assert goldens()["single"]["total"] != pytest.approx(
        goldens()["single_own_low_row"]["total"], **CLOSE
    )


@pytest.mark.parametrize(
    "rule", [{"subpatch_embedding": "add"}, {"location_input": "norm"}], ids=["trap 8", "trap 9"]
)
def test_traps_8_and_9_training_is_one_whatever_use_does(released: NanoMolmo2, rule: dict) -> None:
    """SUBPATCH is added and cells are read from the normed state in training, under either rule."""
    batch = golden_batch("tree").tensors()
    with torch.no_grad():
        expected = released.loss(**batch)
        assert torch.equal(with_rule(released, **rule).loss(**batch), expected)


def test_trap_22_empty_slots_are_classes_or_they_are_not(released: NanoMolmo2) -> None:
    """From the golden scores of slots, with those of empty slots taken out."""
    batch, name = golden_batch("multi"), "multi"
    assert batch.point_targets is not None and batch.image_token_pooling is not None
    scores = golden_tensors()["multi.subpatch_logits"]
    rows, slots = batch.point_targets[:-1, 0], batch.point_targets[:-1, 1]
    filled = batch.image_token_pooling[rows] >= 0
    assert filled.sum(dim=1).tolist() == [4, 4, 2]
    weight = goldens()[name]["weight_sum"] / int((batch.labels >= 0).sum())  # type: ignore[operator]
    for masks, seen in ((False, scores), (True, scores.masked_fill(~filled, -1e9))):
        model = with_rule(model_of(name, released), loss_masks_empty_slots=masks)
        with torch.no_grad():
            found = float(model.loss_terms(batch).slot)
        losses = torch.nn.functional.cross_entropy(seen, slots, reduction="none")
        assert found == pytest.approx(float(losses.sum()) * weight, **CLOSE)


def test_trap_30_the_head_learns_to_write_the_markers(released: NanoMolmo2) -> None:
    batch = golden_batch("single")
    model = with_rule(released)
    marker = torch.isin(batch.input_ids, torch.tensor([PATCH, SUBPATCH, LOCATION]))
    assert batch.loss_weights is not None
    weights = batch.loss_weights.masked_fill(~marker, 0.0)
    batch = dataclasses.replace(batch, loss_weights=weights)
    before = model.loss_terms(batch)
    before.text.backward()
    head = model.llm.lm_head
    assert head is not None and head.weight.grad is not None
    with torch.no_grad():
        head.weight[256:] -= 0.05 * head.weight.grad[256:]
        assert float(model.loss_terms(batch).text) < 0.9 * float(before.text)
    llm = dataclasses.replace(model.config.llm_config, predict_additional_vocab=False)
    with pytest.raises(ValueError, match="predict_additional_vocab"):
        dataclasses.replace(model.config, llm_config=llm)


# ---- under packing ----


def part(batch: Batch, keep: Tensor, visual: Tensor, points: slice) -> Batch:
    """Positions ``keep`` (T,) of a batch of one row, with some of its visual tokens and points."""
    columns = {
        name: value[:, keep]
        for name, value in batch.tensors().items()
        if value.shape == batch.input_ids.shape
    }
    assert batch.point_targets is not None and batch.image_token_pooling is not None
    targets = batch.point_targets[points].clone()
    is_row = targets[:, 0] != NO_MORE_POINTS
    targets[:, 0] -= is_row * int(visual[0])
    index = batch.image_token_pooling[visual]
    first = int(index[index >= 0].min()) // 25  # crops have 25 patches
    assert batch.pixel_values is not None
    crops = batch.pixel_values[first : int(index.max()) // 25 + 1]
    index = torch.where(index < 0, index, index - 25 * first)
    return Batch(**columns, pixel_values=crops, image_token_pooling=index, point_targets=targets)


def halves() -> tuple[Batch, Batch, Batch]:
    """The golden pack and its two examples: a picture, and a tree of three questions on another."""
    pack = golden_batch("pack")
    assert pack.subsegment_ids is not None
    second = pack.subsegment_ids[0] >= PACK_SUBSEGMENT
    first = part(pack, ~second, torch.arange(25), slice(0, 5))
    return pack, first, part(pack, second, torch.arange(25, 46), slice(5, 10))


def test_the_examples_of_the_pack_are_those_of_the_goldens() -> None:
    _, first, second = halves()
    for found, name in ((first, "single"), (second, "tree")):
        expected = golden_batch(name)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.image_token_pooling, expected.image_token_pooling)


def test_trap_10_the_divisor_of_rows_is_the_packs_or_it_is_not(
    released: NanoMolmo2, ours: NanoMolmo2
) -> None:
    """Released: the root of the number of keys, so an example has another loss in a pack.
    Consistent: the root of their width, so it has the same.
    """
    pack, *alone = halves()
    for model, same in ((released, False), (ours, True)):
        with torch.no_grad():
            together = model.loss_terms(pack)
            apart = [model.loss_terms(batch) for batch in alone]
        total = sum(float(terms.row) for terms in apart)
        assert (float(together.row) == pytest.approx(total, rel=1e-5)) == same
        for term in ("text", "slot", "cell"):
            total = sum(float(getattr(terms, term)) for terms in apart)
            assert float(getattr(together, term)) == pytest.approx(total, rel=1e-5)


def test_an_example_has_the_same_loss_alone_and_packed(ours: NanoMolmo2) -> None:
    """Every label of it, and with them the gradients: rows of other examples are masked, numbers
    for the rotation start anew, and so does the order in every list.
    """
    pack, *alone = halves()
    expected = torch.cat([by_label(ours, batch) for batch in alone], dim=1)
    grads = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    torch.testing.assert_close(by_label(ours, pack), expected, rtol=1e-4, atol=1e-5)
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4)
    ours.zero_grad()


def stacked(first: Batch, second: Batch) -> Batch:
    """Two examples as two rows, the shorter one padded."""
    T = max(first.input_ids.shape[1], second.input_ids.shape[1])
    fills = {"input_ids": 0, "position_ids": 0, "labels": -100, "loss_weights": 0.0}
    fills |= {"subsegment_ids": -1, "attention_mask": 0}
    rows: dict[str, list[Tensor]] = {name: [] for name in fills}
    for batch in (first, second):
        filled = dataclasses.replace(
            batch,
            subsegment_ids=torch.zeros_like(batch.input_ids)
            if batch.subsegment_ids is None
            else batch.subsegment_ids % PACK_SUBSEGMENT,
            attention_mask=torch.ones_like(batch.input_ids, dtype=torch.bool),
        ).tensors()
        for name, fill in fills.items():
            width = T - batch.input_ids.shape[1]
            rows[name].append(torch.nn.functional.pad(filled[name], (0, width), value=fill))
    n, crops = len(first.image_token_pooling), len(first.pixel_values)  # type: ignore[arg-type]
    targets = second.point_targets.clone()  # type: ignore[union-attr]
    targets[:, 0] += (targets[:, 0] != NO_MORE_POINTS) * n
    index = second.image_token_pooling
    index = torch.where(index < 0, index, index + 25 * crops)  # type: ignore[arg-type, operator]
    return Batch(
        **{name: torch.cat(values) for name, values in rows.items()},
        pixel_values=torch.cat((first.pixel_values, second.pixel_values)),  # type: ignore[arg-type]
        image_token_pooling=torch.cat((first.image_token_pooling, index)),  # type: ignore[arg-type]
        point_targets=torch.cat((first.point_targets, targets)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_rows_of_a_batch_are_rows_alone(ours: NanoMolmo2, swapped: bool) -> None:
    """Padded beside a longer row or not."""
    _, first, second = halves()
    pair = (second, first) if swapped else (first, second)
    found = by_label(ours, stacked(*pair))
    for row, batch in zip(found, pair, strict=True):
        alone = by_label(ours, batch)[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert not row[len(alone) :].any()
    ours.zero_grad()


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_trap_33_an_answer_that_was_cut_off_learns_what_is_left(
    ours: NanoMolmo2, length: int
) -> None:
    """A cut example may end at any token of a point: what was cut has no target, and the labels
    before it lose nothing. Behind it another example follows in the pack.
    """
    pack, first, second = halves()
    whole = by_label(ours, first)
    places = (first.input_ids[0] == PATCH).nonzero()[:, 0]
    end = int(places[1]) + length  # behind PATCH, SUBPATCH, LOCATION, the digit of the second
    targets = first.point_targets[:2].clone()  # type: ignore[index]
    targets[1, length:] = -1
    cut = part(first, torch.arange(first.input_ids.shape[1]) < end, torch.arange(25), slice(0, 2))
    assert cut.input_ids.shape[1] == end
    cut = dataclasses.replace(cut, point_targets=targets)
    alone = by_label(ours, cut)
    torch.testing.assert_close(alone, whole[:, :end], rtol=1e-4, atol=1e-5)

    keep = torch.ones(pack.input_ids.shape[1], dtype=torch.bool)
    keep[end : first.input_ids.shape[1]] = False
    columns = {n: v[:, keep] for n, v in pack.tensors().items() if v.shape == pack.input_ids.shape}
    rest = pack.point_targets[5:]  # type: ignore[index]
    packed = dataclasses.replace(pack, **columns, point_targets=torch.cat((targets, rest)))
    expected = torch.cat((alone, by_label(ours, second)), dim=1)
    torch.testing.assert_close(by_label(ours, packed), expected, rtol=1e-4, atol=1e-5)
    ours.zero_grad()


def test_lists_of_an_answer_start_anew_where_they_are_told(ours: NanoMolmo2) -> None:
    """Order and rotation are of a list: without `point_lists` a list ends with no-more-points."""
    tree = golden_batch("tree")
    assert tree.point_targets is not None
    lists = torch.tensor([0, 0, 0, 1, 1])
    with torch.no_grad():
        expected = ours.loss_terms(tree)
        told = ours.loss_terms(dataclasses.replace(tree, point_lists=lists))
        apart = ours.loss_terms(dataclasses.replace(tree, point_lists=torch.arange(5)))
    assert torch.equal(told.row, expected.row)
    assert not torch.equal(apart.row, expected.row)
