"""The complete model: pictures in their places, the loss by hand, gradients, message trees."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.models import ConnectorConfig, NanoMolmo2, NanoMolmo2Config
from nanomolmo2.models.attention import PACK_SUBSEGMENT
from nanomolmo2.models.connector import window_index
from nanomolmo2.models.nanomolmo2 import as_ids
from tests.nets import (
    EOS,
    IMAGE,
    LLM,
    PAD,
    VISION,
    greatest_difference,
    pictures,
    randomize,
    small_config,
    small_model,
    text_ids,
    visual_tokens,
)

TOLERANCE = 1e-5
CONNECTORS = ["linear", "mlp", "resampler", "pooling"]
IGNORED = -100


@pytest.fixture(scope="module")
def model() -> NanoMolmo2:
    return small_model().requires_grad_(False)


def rows_of(*rows: str, seed: int = 0) -> Tensor:
    """Ids of rows such as ``i..i.-``: ``i`` a picture, ``.`` random text, ``-`` padding."""
    ids = text_ids(len(rows), len(rows[0]), seed=seed)
    cells = torch.tensor([[ord(c) for c in row] for row in rows])
    return ids.masked_fill(cells == ord("i"), IMAGE).masked_fill(cells == ord("-"), PAD)


def embed_by_hand(model: NanoMolmo2, row: Tensor, images: list[Tensor]) -> Tensor:
    """(1, T, D): the row token by token, each picture in its token's place."""
    left, parts = list(images), []
    for token in row.tolist():
        word = model.llm.embed_tokens.weight[token]
        if token == IMAGE:
            picture = visual_tokens(model, left.pop(0))
            added = model.config.connector.connector_type == "pooling"
            parts.append(picture + word if added else picture)
        else:
            parts.append(word[None])
    assert not left
    return torch.cat(parts)[None]


# --- sizes ---------------------------------------------------------------------------------------


def counts(model: NanoMolmo2) -> list[int]:
    parts = (model.vision_encoder, model.connector, model.llm)
    return [sum(p.numel() for p in part.parameters()) for part in parts]


def test_the_defaults_are_the_base_design() -> None:
    with torch.device("meta"):
        model = NanoMolmo2()
    assert counts(model) == [412_987_248, 1_180_672, 596_049_920]
    assert sum(p.numel() for p in model.parameters()) == 1_010_217_840
    assert model.config.num_visual_tokens == 729
    assert model.config.image_token_id == 151_655
    assert model.config.freeze_vision


def test_all_parameters_belong_to_the_three_parts() -> None:
    for connector_type in CONNECTORS:
        model = small_model(connector_type)
        homes = {name.split(".")[0] for name, _ in model.named_parameters()}
        assert homes == {"vision_encoder", "connector", "llm"}
        assert not list(model.buffers())  # so that a checkpoint is its parameters
        assert sum(counts(model)) == sum(p.numel() for p in model.parameters())


def test_vision_blocks_that_are_never_read_are_not_built() -> None:
    connector = ConnectorConfig(
        vision_dim=24,
        llm_dim=36,
        connector_type="pooling",
        num_attention_heads=4,
        vit_layers=(-2, 0),
    )
    model = small_model(connector_config=connector)
    assert len(model.vision_encoder.layers) == 2
    assert model.vision_encoder.post_layernorm is None
    assert model(rows_of("i."), pictures(1)).shape == (1, 5, 89)


def test_parameter_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of the base design, from the real counts."""
    with torch.device("meta"):
        model = NanoMolmo2()
    table = model.parameter_summary()
    assert capsys.readouterr().out == table + "\n"
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[0] == ["Component", "Trainable", "Parameters", "Gradient memory"]
    assert cells[2:] == [
        ["Vision Encoder", "no", "412,987,248", "0.0 MB"],
        ["Connector", "yes", "1,180,672", "4.7 MB"],
        ["Language Model", "yes", "596,049,920", "2,384.2 MB"],
        ["Total", "-", "1,010,217,840", "2,388.9 MB"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    model.vision_encoder.unfreeze()
    assert "| Vision Encoder | yes " in model.parameter_summary()


# --- pictures in their places --------------------------------------------------------------------


@pytest.mark.parametrize("connector_type", CONNECTORS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both ways"])
def test_rows_equal_sequences_built_by_hand(connector_type: str, bidirectional: bool) -> None:
    """No, one and several pictures a row; every row alone, embedded token by token."""
    model = small_model(connector_type, bidirectional_image_attention=bidirectional)
    rows = ["..i..i.", ".......", "i......", "......i"]
    ids, images = rows_of(*rows), pictures(4)
    n = model.config.num_visual_tokens
    with torch.no_grad():
        logits = model(ids, images)
        assert logits.shape == (4, 7 + 2 * (n - 1), 89)
        own = list(images)
        for row, row_ids, found in zip(rows, ids, logits, strict=True):
            mine = [own.pop(0) for _ in range(row.count("i"))]
            embeds = embed_by_hand(model, row_ids, mine)
            T = embeds.shape[1]
            mask = None
            if bidirectional:
                is_image = torch.tensor([w == "i" for c in row for w in c * (n if c == "i" else 1)])
                mask = torch.ones(T, T, dtype=torch.bool).tril()
                mask = (mask | (is_image[:, None] & is_image[None, :]))[None, None]
            expected = model.llm(inputs_embeds=embeds, attention_mask=mask)[0]
            assert greatest_difference(found[:T], expected) < TOLERANCE
    assert not own


@pytest.mark.parametrize(
    ("rows", "expected_length"),
    [
        (["--i..", "i...i"], 5 + 16),
        (["i..--", "i...i"], 5 + 16),
        (["-i...", "--i.."], 5 + 8),
        (["....-", "i..--"], 5 + 8),
        (["-----", "i...."], 5 + 8),
    ],
)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both ways"])
def test_a_padded_batch_equals_its_rows_alone(
    rows: list[str], expected_length: int, bidirectional: bool
) -> None:
    model = small_model(bidirectional_image_attention=bidirectional)
    ids, images = rows_of(*rows), pictures(3)[: sum(r.count("i") for r in rows)]
    mask = ids != PAD
    with torch.no_grad():
        logits = model(ids, images, attention_mask=mask)
        assert torch.isfinite(logits).all()
        assert logits.shape[1] == expected_length
        own = list(images)
        for row, row_ids, found in zip(rows, ids, logits, strict=True):
            real = row_ids[row_ids != PAD][None]
            if not real.numel():
                continue
            mine = [own.pop(0) for _ in range(row.count("i"))]
            alone = model(real, mine)[0]
            # The row keeps its padding's side: in a batch padded left it ends at the end.
            start = len(found) - len(alone) if any(r[0] == "-" for r in rows) else 0
            assert greatest_difference(found[start : start + len(alone)], alone) < TOLERANCE


def test_every_form_of_pictures_gives_the_same_logits(model: NanoMolmo2) -> None:
    ids, images = rows_of("i.i..", ".....", "..i.."), pictures(3)
    rows = torch.zeros(3, 2, *images.shape[1:])
    rows[0], rows[2, 0] = images[:2], images[2]
    expected = model(ids, images)
    forms: list[Any] = [list(images), rows, [images[:2], None, images[2:]]]
    for form in forms:
        assert torch.equal(model(ids, form), expected)
    features = model.encode_images(images)
    assert greatest_difference(model(ids, visual_tokens=features), expected) < TOLERANCE
    assert greatest_difference(model(ids, images.flip(0)), expected) > 0.1


def test_pictures_of_different_sizes(model: NanoMolmo2) -> None:
    """Each picture brings as many tokens as it has patches."""
    small, large = pictures(2), torch.randn(3, 35, 28, generator=torch.Generator().manual_seed(1))
    ids = rows_of("i.i", ".i.")
    logits = model(ids, [small[0], large, small[1]])
    assert logits.shape[1] == 1 + 9 + 20
    alone = model(ids[:1], [small[0], large])
    assert greatest_difference(logits[:1], alone) < TOLERANCE
    with pytest.raises(ValueError, match=r"4 image tokens .* but 3 picture\(s\) with 38 visual"):
        model(rows_of("i.i", ".ii"), [small[0], large, small[1]])


@pytest.mark.parametrize("connector_type", CONNECTORS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both ways"])
def test_written_out_tokens_equal_placeholders(connector_type: str, bidirectional: bool) -> None:
    model = small_model(connector_type, bidirectional_image_attention=bidirectional)
    n = model.config.num_visual_tokens
    ids, images = rows_of("i.i.", "..i-"), pictures(3)
    ids[1, 3] = PAD
    written = torch.full((2, 2 + 2 * n), PAD)
    written[0] = torch.cat([t.repeat(n if t == IMAGE else 1) for t in ids[0]])
    written[1, : n + 2] = torch.cat([t.repeat(n if t == IMAGE else 1) for t in ids[1, :3]])
    labels = written.masked_fill(written == PAD, IGNORED).masked_fill(written == IMAGE, IGNORED)
    short_labels = ids.masked_fill(ids == PAD, IGNORED).masked_fill(ids == IMAGE, IGNORED)
    with torch.no_grad():
        found, loss = model(written, images, labels, written != PAD)
        expected, same_loss = model(ids, images, short_labels, ids != PAD)
        assert torch.equal(found[written != PAD], expected[written != PAD])
        assert torch.equal(loss, same_loss)
        padded = torch.stack([images[:2], torch.stack([images[2], torch.zeros_like(images[0])])])
        again = model(written, padded, attention_mask=written != PAD)
    assert torch.equal(again, found)


def test_start_and_end_tokens_count_as_image_tokens_if_named() -> None:
    """Molmo2: they see, and are seen by, the whole picture."""
    ids, images = rows_of("..i.."), pictures(1)
    ids[0, 1], ids[0, 3] = 84, 85
    plain = small_model(bidirectional_image_attention=True)
    named = small_model(bidirectional_image_attention=True, image_special_token_ids=(84, 85))
    changed = ids.clone()
    changed[0, 3] = 86  # behind the picture
    with torch.no_grad():
        assert torch.equal(plain(ids, images)[:, :11], plain(changed, images)[:, :11])
        named_before = named(ids, images)[:, 1:11], named(changed, images)[:, 1:11]
    assert greatest_difference(*named_before) > 1e-3


def test_text_alone_is_the_language_model(model: NanoMolmo2) -> None:
    ids = text_ids(2, 6)
    assert torch.equal(model(ids), model.llm(ids))
    both_ways = small_model(bidirectional_image_attention=True)
    with torch.no_grad():
        assert greatest_difference(both_ways(ids), both_ways.llm(ids)) < TOLERANCE


# --- the loss ------------------------------------------------------------------------------------


def loss_by_hand(logits: Tensor, targets: dict[tuple[int, int], int]) -> Tensor:
    """Mean of -log p over {(row, position of the token): token}: the position before says it."""
    terms = [-logits[b, t - 1].log_softmax(-1)[token] for (b, t), token in targets.items()]
    return torch.stack(terms).mean()


def test_the_loss_is_the_mean_over_all_labels_of_the_batch(model: NanoMolmo2) -> None:
    """Positions move with the picture, the shift happens inside, rows of more labels weigh more."""
    ids, images = rows_of(".i...", "....."), pictures(1)
    labels = torch.full_like(ids, IGNORED)
    labels[0, 3:] = torch.tensor([11, 12])
    labels[1, 0] = 13  # nothing comes before the first token
    labels[1, 2] = 14
    logits, loss = model(ids, images, labels=labels)
    grown = model.config.num_visual_tokens - 1
    targets = {(0, 3 + grown): 11, (0, 4 + grown): 12, (1, 2): 14}
    assert greatest_difference(loss, loss_by_hand(logits, targets)) < 1e-6
    assert greatest_difference(logits, model(ids, images)) == 0


def test_hidden_states_are_those_of_the_decoder(model: NanoMolmo2) -> None:
    ids, images = rows_of("i...", "i..."), pictures(2)
    logits, states = model(ids, images, output_hidden_states=True)
    same, loss, again = model(
        ids, images, labels=ids.masked_fill(ids == IMAGE, IGNORED), output_hidden_states=True
    )
    assert torch.equal(logits, same) and loss > 0
    assert len(states) == LLM.num_hidden_layers + 2
    for one, other in zip(states, again, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(model.llm.head(states[-1]), logits)
    merged = embed_by_hand(model, ids[0], [images[0]])
    assert greatest_difference(states[0][:1], merged) < TOLERANCE


def test_the_last_visual_token_predicts_the_text_behind_it(model: NanoMolmo2) -> None:
    ids, images = rows_of("i.."), pictures(1)
    labels = torch.tensor([[IGNORED, 7, IGNORED]])
    logits, loss = model(ids, images, labels=labels)
    n = model.config.num_visual_tokens
    assert greatest_difference(loss, loss_by_hand(logits, {(0, n): 7})) < 1e-6


def test_pictures_and_padding_never_carry_loss(model: NanoMolmo2) -> None:
    """A label at an image token or at padding is a token like any other, and still not learned."""
    ids, images = rows_of("..i..", "i..--"), pictures(2)
    mask = ids != PAD
    logits, loss = model(ids, images, labels=ids, attention_mask=mask)
    n = model.config.num_visual_tokens
    targets = {(0, 1): ids[0, 1], (0, n + 2): ids[0, 3], (0, n + 3): ids[0, 4]}
    targets |= {(1, n): ids[1, 1], (1, n + 1): ids[1, 2]}
    by_hand = loss_by_hand(logits, {at: int(token) for at, token in targets.items()})
    assert greatest_difference(loss, by_hand) < 1e-6


def test_padding_on_the_left_gives_the_same_loss(model: NanoMolmo2) -> None:
    right, left = rows_of("i...--", "..i..."), rows_of("--i...", "..i...")
    left[0, 2:] = right[0, :4]
    left[1] = right[1]
    images = pictures(2)
    losses = []
    for ids in (right, left):
        mask = ids != PAD
        labels = ids.masked_fill(~mask | (ids == IMAGE), IGNORED)
        # What the first token of a row follows is padding or nothing: no loss on either side.
        labels[0, int(mask[0].long().argmax())] = IGNORED
        losses.append(model(ids, images, labels=labels, attention_mask=mask)[1])
    assert greatest_difference(*losses) < 1e-6


def test_loss_weights(model: NanoMolmo2) -> None:
    ids, images = rows_of("i....", "....."), pictures(1)
    labels = ids.masked_fill(ids == IMAGE, IGNORED)
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    weights[1, 2:4] = 0
    logits, loss = model(ids, images, labels=labels, loss_weights=weights)
    grown = model.config.num_visual_tokens - 1
    total = weight_sum = 0.0
    for b, t in [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4)]:
        at = t + (grown if b == 0 else 0)
        term = -logits[b, at - 1].log_softmax(-1)[labels[b, t]]
        total, weight_sum = total + weights[b, t] * term, weight_sum + weights[b, t]
    assert greatest_difference(loss, total / weight_sum) < 1e-6
    ones = model(ids, images, labels=labels, loss_weights=torch.ones(2, 5))[1]
    assert greatest_difference(ones, model(ids, images, labels=labels)[1]) < 1e-6
    assert model(ids, images, labels=labels, loss_weights=torch.zeros(2, 5))[1] == 0


def test_only_minus_100_is_ignored(model: NanoMolmo2) -> None:
    ids = text_ids(1, 4)
    for label in (PAD, EOS, IMAGE, 0, 88):  # the pad token is often the end of text: it is learned
        labels = torch.tensor([[IGNORED, IGNORED, label, IGNORED]])
        logits, loss = model(ids, labels=labels)
        assert greatest_difference(loss, loss_by_hand(logits, {(0, 2): label})) < 1e-6
    for label in (-1, -99, 89):
        labels = torch.tensor([[IGNORED, 3, label, IGNORED]])
        with pytest.raises(ValueError, match=rf"{label}.* writes tokens 0\.\.88; .* marked -100"):
            model(ids, labels=labels)


def test_a_row_without_labels_warns_once_and_adds_nothing() -> None:
    model = small_model()
    ids = text_ids(2, 5)
    labels = ids.clone()
    labels[1, 1:] = IGNORED  # the first token is never predicted
    with pytest.warns(UserWarning, match="a row has no label to learn from"):
        _, loss = model(ids, labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = model(ids[:1], labels=labels[:1])[1]
        assert greatest_difference(model(ids, labels=labels)[1], alone) < 1e-6
    assert greatest_difference(loss, alone) < 1e-6


def test_no_label_at_all_is_loss_zero_with_gradients_of_zero() -> None:
    """The mean of nothing is NaN, and one step with it would end a training run."""
    model = small_model()
    ids = rows_of("i...", "i...")
    for weights in (None, torch.ones(2, 4)):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            labels = torch.full_like(ids, IGNORED)
            _, loss = model(ids, pictures(2), labels=labels, loss_weights=weights)
        assert loss.item() == 0.0
        loss.backward()
        for p in model.parameters():
            assert not p.requires_grad or not p.grad.any()


def test_a_sequence_of_one_token_has_no_loss() -> None:
    with pytest.warns(UserWarning, match="no label"):
        assert small_model()(text_ids(1, 1), labels=text_ids(1, 1))[1] == 0


# --- gradients and precision ---------------------------------------------------------------------


def invariant(name: str) -> bool:
    """A bias shared by all keys shifts all scores alike: the softmax does not see it."""
    return name.endswith("k_proj.bias")


@pytest.mark.parametrize("connector_type", CONNECTORS)
def test_gradients_reach_exactly_the_trainable_parameters(connector_type: str) -> None:
    model = small_model(connector_type).train()
    ids, images = text_ids(2, 40), pictures(2)
    ids[:, 0] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, IGNORED)
    model(ids, images, labels=labels)[1].backward()
    for name, p in model.named_parameters():
        if name.startswith("vision_encoder."):
            assert not p.requires_grad and p.grad is None, name
        else:
            assert p.requires_grad and p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
            assert p.grad.any() or invariant(name), name


@pytest.mark.parametrize("connector_type", ["linear", "pooling"])
def test_an_unfrozen_vision_encoder_learns_too(connector_type: str) -> None:
    model = small_model(connector_type, freeze_vision=False).train()
    assert model.vision_encoder.training
    ids = rows_of("i...", "i...")
    labels = ids.masked_fill(ids == IMAGE, IGNORED)
    model(ids, pictures(2), labels=labels)[1].backward()
    for name, p in model.vision_encoder.named_parameters():
        assert p.grad is not None and (p.grad.any() or invariant(name)), name


def test_frozen_vision_stays_in_evaluation_mode_and_leaves_no_graph() -> None:
    model = small_model().train()
    assert model.llm.training and model.connector.training
    assert not any(m.training for m in model.vision_encoder.modules())
    seen: list[Tensor] = []
    model.vision_encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = model.encode_images(pictures(1).requires_grad_())
    assert seen[0].grad_fn is None and not seen[0].requires_grad
    assert tokens.requires_grad  # the connector learns


def test_a_few_steps_learn() -> None:
    """Which of two pictures is shown decides the answer; vision itself does not move."""
    model = small_model().train()
    frozen = {k: v.clone() for k, v in model.vision_encoder.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    ids = torch.tensor([[IMAGE, 3, 10], [IMAGE, 3, 20]])
    labels = torch.tensor([[IGNORED, IGNORED, 10], [IGNORED, IGNORED, 20]])
    for _ in range(40):
        loss = model(ids, pictures(2), labels=labels)[1]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1
    answers = model.generate(ids[:, :2], pictures(2), max_new_tokens=1)
    assert answers[:, 2].tolist() == [10, 20]
    for name, weight in model.vision_encoder.state_dict().items():
        assert torch.equal(weight, frozen[name])


@pytest.mark.parametrize("connector_type", CONNECTORS)
@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_bfloat16_trains_with_a_float32_loss(connector_type: str, way: str) -> None:
    model = small_model(connector_type, bidirectional_image_attention=True).train()
    ids, images = rows_of("--i...", "i....."), pictures(2)
    arguments: dict[str, Tensor] = {
        "labels": ids.masked_fill((ids == IMAGE) | (ids == PAD), IGNORED),
        "attention_mask": ids != PAD,
    }
    with torch.no_grad():
        exact = model(ids, images, **arguments)[1]
    if way == "cast":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        logits, loss = model(ids, images, **arguments)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.1
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.dtype == p.dtype, name
            assert torch.isfinite(p.grad).all(), name


def test_the_loss_is_computed_in_float32() -> None:
    """A log-probability near 5 has steps of 0.03 in bfloat16."""
    model = small_model().bfloat16()
    ids = text_ids(2, 30)
    with torch.no_grad():
        logits, loss = model(ids, labels=ids)
    exact = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.double() - exact) < 1e-5


# --- message trees -------------------------------------------------------------------------------


def tree(
    prefix: Tensor, branches: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[slice]]:
    """ids, positions, subsegments, labels of one tree, and where each branch lies."""
    P = len(prefix)
    ids = torch.cat([prefix, *branches])
    positions = torch.cat([torch.arange(P), *[torch.arange(P, P + len(b)) for b in branches]])
    segments = [torch.full((len(b),), i) for i, b in enumerate(branches)]
    subsegments = torch.cat([torch.full((P,), 10_000), *segments])
    labels = torch.full_like(ids, IGNORED)
    places, start = [], P
    for branch in branches:
        places.append(slice(start, start + len(branch)))
        labels[start + 1 : start + len(branch)] = branch[1:]  # the first token follows a question
        start += len(branch)
    return ids, positions, subsegments, labels, places


@pytest.mark.parametrize("connector_type", ["linear", "pooling"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both ways"])
def test_a_tree_equals_its_branches_alone(connector_type: str, bidirectional: bool) -> None:
    """Branches share pictures and do not see each other; a plain row and padding stand beside."""
    model = small_model(connector_type, bidirectional_image_attention=bidirectional)
    n = model.config.num_visual_tokens
    images = pictures(3)
    prefix = torch.tensor([5, *[IMAGE] * n, 6, *[IMAGE] * n, 7])
    branches = [text_ids(length, seed=length) for length in (4, 7, 3)]
    ids, positions, subsegments, labels, places = tree(prefix, branches)
    other = torch.tensor([5, *[IMAGE] * n, *text_ids(6, seed=9).tolist()])
    T, own = len(ids) + 2, len(other)

    def row(values: Tensor, others: Tensor, fill: int) -> Tensor:
        """Two rows padded on the right to T."""
        pair = [F.pad(v, (0, T - len(v)), value=fill) for v in (values, others)]
        return torch.stack(pair)

    arguments = {
        "input_ids": row(ids, other, PAD),
        "attention_mask": row(torch.ones_like(ids), torch.ones_like(other), 0).bool(),
        "position_ids": row(positions, torch.arange(own), 0),
        "subsegment_ids": row(subsegments, torch.full((own,), 10_000), -1),
        "labels": row(labels, other.masked_fill(other == IMAGE, IGNORED), IGNORED),
    }
    with torch.no_grad():
        logits, loss = model(pixel_values=images, **arguments)
        losses = []
        for branch, place in zip(branches, places, strict=True):
            alone = torch.cat([prefix, branch])[None]
            alone_labels = alone.clone()
            alone_labels[:, : len(prefix) + 1] = IGNORED
            expected, branch_loss = model(alone, images[:2], labels=alone_labels)
            assert greatest_difference(logits[0, place], expected[0, len(prefix) :]) < TOLERANCE
            losses.append(branch_loss * (len(branch) - 1))
        assert greatest_difference(logits[0, : len(prefix)], expected[0, : len(prefix)]) < TOLERANCE
        other_labels = other.masked_fill(other == IMAGE, IGNORED)[None]
        expected, other_loss = model(other[None], images[2:], labels=other_labels)
        assert greatest_difference(logits[1, :own], expected[0]) < TOLERANCE
        # The other row's first label has nothing before it.
        total = sum(losses) + other_loss * 6
    count = sum(len(b) - 1 for b in branches) + 6
    assert greatest_difference(loss, total / count) < 1e-6


def test_without_subsegments_a_branch_would_see_the_one_before() -> None:
    model = small_model()
    branches = [text_ids(4, seed=1), text_ids(4, seed=2)]
    ids, positions, subsegments, _, places = tree(text_ids(3), branches)
    with torch.no_grad():
        apart = model(ids[None], position_ids=positions[None], subsegment_ids=subsegments[None])
        together = model(ids[None], position_ids=positions[None])
    assert greatest_difference(apart[0, places[0]], together[0, places[0]]) < TOLERANCE
    assert greatest_difference(apart[0, places[1]], together[0, places[1]]) > 0.1


def test_trap_16_the_divisor_is_the_weight_of_the_whole_batch() -> None:
    """A row with one label and one with five: a mean of the rows' means is another number."""
    model = small_model().requires_grad_(False)
    ids = text_ids(2, 6)
    labels = ids.clone()
    labels[0, :5] = IGNORED
    weights = torch.tensor([[1.0] * 6, [0.25] * 6])
    _, loss = model(ids, labels=labels, loss_weights=weights)
    apart = [model(ids[b : b + 1], labels=labels[b : b + 1])[1] for b in range(2)]
    assert greatest_difference(loss, (apart[0] + 0.25 * 5 * apart[1]) / (1 + 0.25 * 5)) < 1e-6
    assert abs(loss - (apart[0] + apart[1]) / 2) > 1e-3


def test_trap_22_here_the_base_embedding_learns() -> None:
    """Molmo2 never trains its base rows. Here they learn like the rest unless they are frozen."""
    model = small_model()
    ids = text_ids(1, 6)
    model(ids, labels=ids)[1].backward()
    gradient = model.llm.embed_tokens.weight.grad
    assert gradient is not None
    assert bool((gradient[ids[0]].abs().sum(dim=1) > 0).all())
    model.zero_grad()
    model.llm.embed_tokens.weight.requires_grad_(False)
    model(ids, labels=ids)[1].backward()
    assert model.llm.embed_tokens.weight.grad is None
    assert model.llm.layers[0].mlp.up_proj.weight.grad is not None


# --- crops: pixels as patches, visual tokens by index ---------------------------------------------


def patchify(images: Tensor) -> Tensor:
    """(M, 3, H, W) -> (M, N, 3*P*P): rows of patches; in a patch row, column, channel."""
    P = VISION.patch_size
    side = VISION.patches_per_side * P
    cells = images[..., :side, :side].unflatten(3, (-1, P)).unflatten(2, (-1, P))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


WINDOWS = window_index(VISION.patches_per_side, VISION.patches_per_side, 2)  # (4, 4), some -1


def windows_of(*crops: int) -> Tensor:
    """The windows of whole crops in this order, counted over all of the batch."""
    first = VISION.num_patches
    return torch.cat([torch.where(WINDOWS < 0, WINDOWS, WINDOWS + first * c) for c in crops])


@pytest.fixture(scope="module")
def pooling() -> NanoMolmo2:
    return small_model("pooling").requires_grad_(False)


def test_patches_equal_the_picture() -> None:
    """A picture and its patches are one to the encoder: the convolution is a matrix."""
    model = small_model("pooling")
    found = model.vision_encoder(patchify(pictures(2)))
    assert greatest_difference(found, model.vision_encoder(pictures(2))) < TOLERANCE


def test_trap_05_patches_run_row_column_channel() -> None:
    """Channel first, as a convolution's weight or unfold has it, is another picture."""
    model = small_model("pooling")
    P = VISION.patch_size
    swapped = patchify(pictures(1)).unflatten(2, (P * P, 3)).transpose(2, 3).flatten(2)
    difference = model.vision_encoder(swapped) - model.vision_encoder(pictures(1))
    assert difference.abs().max() > 0.1


def test_crops_with_an_index_equal_whole_pictures(pooling: NanoMolmo2) -> None:
    ids = rows_of("iiii..iiii.", "..iiii.----")
    real = ids != PAD
    whole = pooling(ids, pictures(3), attention_mask=real)
    crops = pooling(
        ids,
        patchify(pictures(3)),
        attention_mask=real,
        image_token_pooling=windows_of(0, 1, 2),
    )
    assert greatest_difference(crops[real], whole[real]) < TOLERANCE


def test_windows_may_mix_crops_and_be_padded(pooling: NanoMolmo2) -> None:
    """Every row of the index is one visual token, of any patches; an empty row is none."""
    index = torch.tensor([[0, 17, -1], [5, -1, -1], [-1, -1, -1], [8, 9, 10]])
    ids = rows_of("i.ii.")
    crops = patchify(pictures(2))
    found = pooling(ids, crops, image_token_pooling=index)
    tokens = pooling.encode_images(crops, index)
    assert tokens.shape == (3, LLM.hidden_size)
    embeddings = pooling.llm.embed_tokens(ids)
    embeddings[ids == IMAGE] += tokens
    assert greatest_difference(found, pooling.llm(inputs_embeds=embeddings)) < TOLERANCE


def test_trap_03_features_are_added_to_the_placeholder() -> None:
    model = small_model("pooling").requires_grad_(False)
    ids, crops, index = rows_of("iiii."), patchify(pictures(1)), windows_of(0)
    with_row = model(ids, crops, image_token_pooling=index)
    model.llm.embed_tokens.weight[IMAGE] = 0  # replacing the row and adding to it are one now
    without = model(ids, crops, image_token_pooling=index)
    assert greatest_difference(with_row[:, :4], without[:, :4]) > 0.01
    embeddings = model.llm.embed_tokens(ids)
    embeddings[ids == IMAGE] = model.encode_images(crops, index)
    assert greatest_difference(without, model.llm(inputs_embeds=embeddings)) < TOLERANCE


def test_the_placeholder_of_a_new_model_is_zero() -> None:
    model = NanoMolmo2(small_config("pooling"))
    assert model.llm.embed_tokens.weight[IMAGE].abs().max() == 0
    assert NanoMolmo2(small_config()).llm.embed_tokens.weight[IMAGE].abs().max() > 0


def test_generating_from_crops(pooling: NanoMolmo2) -> None:
    """One by one, in a batch with padding on the left, and with whole pictures."""
    rows = rows_of("iiii..", "--iiii")
    real = rows != PAD
    crops = patchify(pictures(2))
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None}
    together = pooling.generate(rows, crops, real, image_token_pooling=windows_of(0, 1), **options)
    for b in range(2):
        alone = pooling.generate(
            rows[b : b + 1, 2 * b :], crops[b : b + 1], image_token_pooling=windows_of(0), **options
        )
        whole = pooling.generate(rows[b : b + 1, 2 * b :], pictures(2)[b : b + 1], **options)
        assert torch.equal(alone, whole)
        assert torch.equal(alone[0], together[b, 2 * b :])


def test_gradients_reach_vision_through_crops() -> None:
    model = small_model("pooling", freeze_vision=False)
    ids = rows_of("iiii..")
    labels = torch.where(ids == IMAGE, IGNORED, ids)
    _, loss = model(ids, patchify(pictures(1)), labels, image_token_pooling=windows_of(0))
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in model.named_parameters()
        if not name.startswith("vision_encoder.post_layernorm")
        # A key bias moves all scores of a query alike.
        and not name.endswith("k_proj.bias")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_token_pooling": windows_of(0)}, "holds 8 image tokens, but .* makes 4 visual"),
        ({"image_token_pooling": windows_of(0, 2)}, "runs from -1 to 26, but 2 crop"),
        ({"pixel_values": None}, r"needs pixel_values \(M, N, 3\*P\*P\), .* found None"),
        ({"image_token_pooling": None}, r"crops \(M, N, 3\*P\*P\) come with image_token"),
        ({"pixel_values": patchify(pictures(2))[:, :8]}, "a square grid .* found 8"),
        ({"pixel_values": patchify(pictures(2))[:, :, :9]}, r"found \(2, 9, 9\)"),
    ],
)
def test_crops_that_do_not_fit_stop(
    pooling: NanoMolmo2, arguments: dict[str, Any], message: str
) -> None:
    fitting: dict[str, Any] = {
        "input_ids": rows_of("iiii..", ".iiii."),
        "pixel_values": patchify(pictures(2)),
        "image_token_pooling": windows_of(0, 1),
    }
    with pytest.raises(ValueError, match=message):
        pooling(**{**fitting, **arguments})


def test_positions_follow_from_the_subsegments() -> None:
    model = small_model()
    branches = [text_ids(4, seed=1), text_ids(4, seed=2)]
    ids, positions, subsegments, _, _ = tree(text_ids(3), branches)
    with torch.no_grad():
        given = model(ids[None], position_ids=positions[None], subsegment_ids=subsegments[None])
        found = model(ids[None], subsegment_ids=subsegments[None])
    assert torch.equal(found, given)


def test_a_pack_equals_its_examples_alone() -> None:
    """Two examples with crops and trees in one row: pictures of the other are never seen."""
    model = small_model("pooling", bidirectional_image_attention=True).requires_grad_(False)
    crops = patchify(pictures(2))
    examples = []
    for seed in range(2):
        prefix = rows_of(".iiii", seed=seed)[0]
        branches = [text_ids(3, seed=seed + 5), text_ids(4, seed=seed + 9)]
        ids, _, subsegments, _, _ = tree(prefix, branches)
        examples.append((ids, subsegments))
    row = torch.cat([ids for ids, _ in examples])[None]
    packed = torch.cat([sub + PACK_SUBSEGMENT * e for e, (_, sub) in enumerate(examples)])[None]
    together = model(row, crops, subsegment_ids=packed, image_token_pooling=windows_of(0, 1))
    start = 0
    for e, (ids, subsegments) in enumerate(examples):
        alone = model(
            ids[None],
            crops[e : e + 1],
            subsegment_ids=subsegments[None],
            image_token_pooling=windows_of(0),
        )
        found = together[:, start : start + len(ids)]
        assert greatest_difference(found, alone) < TOLERANCE
        start += len(ids)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_values": pictures(1)}, r"2 image tokens \(by row: 1, 1\), but 1 picture"),
        ({"pixel_values": pictures(3)}, r"2 image tokens \(by row: 1, 1\), but 3 picture"),
        ({"pixel_values": None}, r"2 image tokens \(by row: 1, 1\), but 0 picture"),
        ({"pixel_values": [pictures(2), None]}, r"row 0 holds 1 image tokens, .* 2 picture"),
        ({"pixel_values": pictures(2)[:, :1]}, r"shape \(B, 3, H, W\) .* found \(2, 1, 22, 22\)"),
        ({"pixel_values": pictures(2)[:, :, :5]}, r"at least 7 pixels, found \(2, 3, 5, 22\)"),
        ({"pixel_values": pictures(1)[0]}, r"expected pixel_values .* found \(3, 22, 22\)"),
        (
            {"labels": torch.zeros(2, 13).long()},
            r"labels \(2, 13\) must have the shape of input_ids \(2, 5\)",
        ),
        ({"labels": torch.zeros(1, 5).long()}, r"labels \(1, 5\) must have the shape"),
        ({"attention_mask": torch.ones(2, 13)}, r"attention_mask \(2, 13\) must have the shape"),
        ({"loss_weights": torch.ones(2, 4)}, r"loss_weights \(2, 4\) must have the shape"),
        ({"position_ids": torch.zeros(2, 4).long()}, r"position_ids \(2, 4\) must have"),
        ({"subsegment_ids": torch.zeros(1, 5).long()}, r"subsegment_ids \(1, 5\) must have"),
        ({"position_ids": torch.zeros(2, 5).long()}, "need image tokens written out"),
        ({"subsegment_ids": torch.zeros(2, 5).long()}, "need image tokens written out"),
        ({"visual_tokens": torch.zeros(2, 9, 36)}, "pixel_values or visual_tokens, not both"),
        ({"input_ids": torch.full((2, 5), 89)}, "token ids run from 89 to 89"),
        ({"input_ids": torch.tensor([[IMAGE, -1], [IMAGE, 2]])}, "token ids run from -1 to 80"),
        (
            {"input_ids": torch.cat([torch.full((2, 1), IMAGE), text_ids(2, 120)], dim=1)},
            "the sequence has 129 positions, the model's context holds 128",
        ),
    ],
)
def test_what_does_not_fit_stops(
    model: NanoMolmo2, arguments: dict[str, Any], message: str
) -> None:
    fitting: dict[str, Any] = {"input_ids": rows_of(".i...", "i...."), "pixel_values": pictures(2)}
    with pytest.raises(ValueError, match=message):
        model(**{**fitting, **arguments})


def test_features_of_the_wrong_count_stop(model: NanoMolmo2) -> None:
    features = model.encode_images(pictures(3))
    with pytest.raises(ValueError, match=r"2 image tokens .* but 3 picture\(s\) with 27 visual"):
        model(rows_of("i.", "i."), visual_tokens=features)


def test_one_id_or_several() -> None:
    assert as_ids(None) == ()
    assert as_ids(5) == (5,)
    assert as_ids([5, 6]) == (5, 6)
    assert small_config(eos_token_id=None).eos_token_ids == ()
    assert NanoMolmo2Config.from_dict({"eos_token_id": [1, 2]}).eos_token_ids == (1, 2)
    assert NanoMolmo2Config(eos_token_id=[1, 2]).eos_token_id == (1, 2)  # type: ignore[arg-type]


def test_a_config_without_a_connector_gets_the_linear_one() -> None:
    config = NanoMolmo2Config(vision_config=VISION, llm_config=LLM, image_token_id=IMAGE)
    assert config.connector == ConnectorConfig(vision_dim=24, llm_dim=36, connector_type="linear")
    larger = NanoMolmo2Config(
        vision_config=replace(VISION, image_size=28), llm_config=LLM, image_token_id=IMAGE
    )
    assert larger.num_visual_tokens == 16
    model = randomize(NanoMolmo2(larger))
    assert model(torch.tensor([[IMAGE, 3]]), torch.zeros(1, 3, 28, 28)).shape == (1, 17, 89)


@pytest.mark.parametrize("connector_type", ["linear", "pooling"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_generation_equals_the_oracle_without_any_cache(
    connector_type: str, both_ways: bool
) -> None:
    model = small_model(connector_type, bidirectional_image_attention=both_ways)
    ids = text_ids(2, 8)
    ids[:, 2] = IMAGE
    expected = model.generate_naively(model.batch_of(ids, pictures(2)), 6)
    found = model.generate(ids, pictures(2), max_new_tokens=6, eos_token_id=None)
    assert torch.equal(found[:, 8:], expected)
