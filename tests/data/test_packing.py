"""Packing: in a row the model computes for every example what it does alone, and no row overflows.

Letters: N patches a crop, K patches a pooling window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomolmo2.batch import IGNORED_LABEL, PACK_SUBSEGMENT, PREFIX_SUBSEGMENT
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.packing import Packer, choose, join
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.attention import tree_positions
from nanomolmo2.processor import (
    Encoded,
    MultiCrop,
    Processor,
    ProcessorConfig,
    VideoConfig,
    collate,
)
from nanomolmo2.processor.tokenizer import molmo2_tokenizer
from tests import small_model as plain
from tests.data.sources import picture
from tests.nets import LLM, VISION, greatest_difference, randomize, small_config
from tests.processor.helpers import assistant, small_backend, user

N = 4
FIELDS = ("input_ids", "position_ids", "labels", "loss_weights")


# --- join ----------------------------------------------------------------------------------------


@st.composite
def encoded(draw: st.DrawFn) -> Encoded:
    """Any example: with pictures or not, with weights or not, a tree or a conversation."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    crops = draw(st.integers(0, 3))
    prefix = 1 + crops
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    is_tree = draw(st.booleans()) or len(lengths) > 1
    subsegments = np.repeat([PREFIX_SUBSEGMENT, *range(len(lengths))], [prefix, *lengths])
    inside = [np.arange(prefix), *(prefix + np.arange(n) for n in lengths)]
    T = prefix + sum(lengths)
    # A label may stand anywhere, even where nothing comes before it.
    labels = np.where(rng.random(T) < 0.5, rng.integers(0, 50, T), IGNORED_LABEL)
    has_labels = draw(st.booleans())
    weights = np.where(labels == IGNORED_LABEL, 0, rng.random(T)).astype(np.float32)
    width = draw(st.sampled_from([2, 3]))
    return Encoded(
        input_ids=rng.integers(0, 50, T),
        position_ids=np.concatenate(inside) if is_tree else np.arange(T),
        labels=labels if has_labels else None,
        loss_weights=weights if has_labels and draw(st.booleans()) else None,
        subsegment_ids=subsegments if is_tree else None,
        pixel_values=rng.random((crops, N, 6), dtype=np.float32) if crops else None,
        image_token_pooling=rng.integers(-1, crops * N, (crops, width)) if crops else None,
    )


@given(st.lists(encoded(), min_size=1, max_size=5))
def test_a_row_falls_apart_into_its_examples(examples: list[Encoded]) -> None:
    row = join(examples)
    assert row.subsegment_ids is not None
    numbers = row.subsegment_ids // PACK_SUBSEGMENT
    assert numbers.tolist() == sorted(numbers)
    crops = windows = 0
    for k, example in enumerate(examples):
        here = numbers == k
        assert np.array_equal(row.input_ids[here], example.input_ids)
        assert np.array_equal(row.position_ids[here], example.position_ids)
        own = example.subsegment_ids
        expected = np.zeros(here.sum(), dtype=np.int64) if own is None else own
        assert np.array_equal(row.subsegment_ids[here] - PACK_SUBSEGMENT * k, expected)
        if row.labels is not None:
            labels = example.labels
            labels = np.full(here.sum(), IGNORED_LABEL) if labels is None else labels
            assert row.labels[here][0] == IGNORED_LABEL
            assert np.array_equal(row.labels[here][1:], labels[1:])
        if row.loss_weights is not None:
            weights = example.loss_weights
            if weights is None:
                weights = np.zeros(here.sum())
                if example.labels is not None:
                    weights = (example.labels != IGNORED_LABEL).astype(np.float32)
            assert row.loss_weights[here][0] == 0
            assert np.array_equal(row.loss_weights[here][1:], weights[1:])
        if example.pixel_values is None or example.image_token_pooling is None:
            continue
        assert row.pixel_values is not None and row.image_token_pooling is not None
        pixels = example.pixel_values
        assert np.array_equal(row.pixel_values[crops:][: len(pixels)], pixels)
        index = example.image_token_pooling
        found = row.image_token_pooling[windows:][: len(index)]
        moved = np.where(found >= 0, found - N * crops, -1)
        assert np.array_equal(moved[:, : index.shape[1]], index)
        assert (found[:, index.shape[1] :] == -1).all()
        crops, windows = crops + len(pixels), windows + len(index)
    assert (0 if row.pixel_values is None else len(row.pixel_values)) == crops
    for name in ("labels", "loss_weights"):
        present = any(getattr(e, name) is not None for e in examples)
        assert (getattr(row, name) is not None) == present


@given(st.lists(encoded(), min_size=1, max_size=5))
def test_positions_of_a_row_follow_from_its_subsegments(examples: list[Encoded]) -> None:
    row = join(examples)
    assert row.subsegment_ids is not None
    found = tree_positions(torch.from_numpy(row.subsegment_ids)[None])[0]
    assert found.tolist() == row.position_ids.tolist()


@given(encoded())
def test_joining_leaves_the_examples_as_they_were(example: Encoded) -> None:
    """The first label is taken away in the row, not in the example."""
    before = {name: np.copy(getattr(example, name)) for name in FIELDS}
    join([example, example])
    for name in FIELDS:
        assert np.array_equal(getattr(example, name), before[name])


def test_nothing_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="nothing to join"):
        join([])


# --- the model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cropped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Processor, NanoMolmo2]:
    """The Molmo2 design in small: crops of 4 x 4 patches, videos with wider windows."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    small_backend(("<|endoftext|>", "<|im_start|>", "<|im_end|>")).save(str(path))
    tokenizer = molmo2_tokenizer(path, vocab_size=512)
    crops = MultiCrop(4, image_size=28, patch_size=7, overlap_margins=(1, 1))
    config = ProcessorConfig.molmo2(
        multicrop=crops, video=VideoConfig(max_frames=4, pooling_size=3)
    )
    processor = Processor(config, tokenizer)
    names = (config.image_start_token, config.image_end_token, "<im_start>", "<im_col>")
    model = small_config(
        "pooling",
        vision_config=replace(VISION, image_size=28),
        llm_config=replace(
            LLM, vocab_size=512, additional_vocab_size=128, max_position_embeddings=2048
        ),
        image_token_id=processor.image_token_id,
        image_special_token_ids=tuple(tokenizer.special_id(name) for name in names),
        bidirectional_image_attention=True,
    )
    return processor, randomize(NanoMolmo2(model)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def whole() -> tuple[Processor, NanoMolmo2]:
    """Uncut pictures of four visual tokens each."""
    processor = plain.small_processor()
    model = NanoMolmo2(plain.small_config(processor))
    return processor, randomize(model).eval().requires_grad_(False)


BRANCHES = [
    [user("Is there a dog?"), assistant("yes")],
    [user("x"), assistant("No, there is not."), user("y"), assistant("yes")],
]


def kinds_of_examples(processor: Processor) -> list[Encoded]:
    """Trees and a conversation; two pictures, one, none; a video where there are crops."""
    examples = [
        processor.encode_tree([picture(0), picture(1, 90, 40)], BRANCHES),
        processor.encode(BRANCHES[1]),
        processor.encode_tree([picture(2)], BRANCHES[:1], loss_weighting="molmo2"),
        processor.encode_tree([], BRANCHES, branch_weights=[0.5, 2.0]),
    ]
    if processor.config.video is not None:
        frames = [np.asarray(picture(seed)) for seed in (3, 4)]
        examples.insert(1, processor.encode_tree(None, BRANCHES, video=(frames, [0.0, 0.5])))
    return examples


def run(model: NanoMolmo2, rows: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, sum of the weighted losses)."""
    batch = collate(rows, pad)
    inputs = batch.tensors()
    labels, weights = inputs.pop("labels"), inputs.pop("loss_weights", None)
    logits = model(**inputs)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return logits, losses.sum() if weights is None else losses @ weights[:, 1:].flatten()


@pytest.mark.parametrize("design", ["cropped", "whole"])
def test_a_row_equals_its_examples_alone(design: str, request: pytest.FixtureRequest) -> None:
    """To rounding of float32; in a batch with a shorter row, so with padding too."""
    processor, model = request.getfixturevalue(design)
    pad = processor.pad_token_id
    examples = kinds_of_examples(processor)
    rows = [join(examples), join(examples[:2])]
    together, loss = run(model, rows, pad)
    expected = torch.tensor(0.0)
    for row, members in enumerate([examples, examples[:2]]):
        start = 0
        for example in members:
            alone, own_loss = run(model, [example], pad)
            found = together[row, start : start + alone.shape[1]]
            assert greatest_difference(found, alone[0]) < 2e-5
            start += alone.shape[1]
            expected += own_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() > 1


def test_pictures_of_a_row_do_not_see_each_other(cropped: tuple[Processor, NanoMolmo2]) -> None:
    """Nothing of an example moves by one bit when the pictures of its neighbours change."""
    processor, model = cropped

    def row(*seeds: int) -> list[Encoded]:
        trees = [processor.encode_tree([picture(s, 80, 60)], BRANCHES) for s in seeds]
        return [join(trees)]

    before, _ = run(model, row(0, 1, 2), processor.pad_token_id)
    after, _ = run(model, row(5, 1, 6), processor.pad_token_id)
    third = before.shape[1] // 3
    assert torch.equal(before[:, third : 2 * third], after[:, third : 2 * third])
    assert greatest_difference(before[:, :third], after[:, :third]) > 0.01
    assert greatest_difference(before[:, 2 * third :], after[:, 2 * third :]) > 0.01


# --- choose --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """What a packer packs."""

    tokens: int
    crops: int
    number: int = 0


def value_of(chosen: list[int], value: Callable[[int], float]) -> float:
    return sum(value(i) for i in chosen)


@given(data=st.data())
@settings(max_examples=150)
def test_the_best_row_is_chosen(data: st.DataObject) -> None:
    """Against every set that there is: below 1024 tokens, where no length is rounded."""
    max_tokens = data.draw(st.integers(1, 60) | st.integers(900, 1023), label="max_tokens")
    max_crops = data.draw(st.integers(0, 9), label="max_crops")
    size = st.tuples(st.integers(1, max_tokens), st.integers(0, max_crops))
    sizes = data.draw(st.lists(size, min_size=1, max_size=7), label="sizes")
    weight = data.draw(st.sampled_from([0.0, 1.0, 2.5, 30.0]), label="crop_weight")
    tokens, crops = [t for t, _ in sizes], [c for _, c in sizes]

    def value(i: int) -> float:
        return tokens[i] + weight * crops[i]

    best = 0.0
    for others in itertools.product([False, True], repeat=len(sizes) - 1):
        row = [0, *(i + 1 for i, taken in enumerate(others) if taken)]
        if sum(tokens[i] for i in row) <= max_tokens and sum(crops[i] for i in row) <= max_crops:
            best = max(best, value_of(row, value))
    chosen = choose(tokens, crops, max_tokens, max_crops, weight)
    assert chosen == sorted(set(chosen)) and chosen[0] == 0
    assert sum(tokens[i] for i in chosen) <= max_tokens
    assert sum(crops[i] for i in chosen) <= max_crops
    assert value_of(chosen, value) == best


def test_a_crop_is_worth_its_weight() -> None:
    tokens, crops = [10, 60, 50], [0, 1, 3]
    assert choose(tokens, crops, 80, 9, crop_weight=1) == [0, 1]
    assert choose(tokens, crops, 80, 9, crop_weight=30) == [0, 2]


@pytest.mark.parametrize("max_tokens", [1537, 36864])
def test_long_rows_round_up_and_never_overflow(max_tokens: int) -> None:
    """1537 is no multiple of its quantum: an example of that length still fits, alone."""
    assert choose([max_tokens, 1], [0, 0], max_tokens, 0) == [0]
    quantum = max_tokens // 512
    half = max_tokens // 2 // quantum * quantum
    assert choose([half, half, 1], [0, 0, 0], max_tokens, 0)[:2] == [0, 1]
    assert choose([half + quantum, half, 1], [0, 0, 0], max_tokens - 1, 0)[0] == 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.integers(1, max_tokens, 30).tolist()
        chosen = choose(tokens, [0] * 30, max_tokens, 0)
        assert sum(tokens[i] for i in chosen) <= max_tokens


# --- the packer ----------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)), min_size=1, max_size=60),
    packing_buffer=st.integers(1, 8),
    weight=st.sampled_from([1.0, 30.0]),
)
def test_no_example_is_lost_doubled_or_kept_waiting(
    sizes: list[tuple[int, int]], packing_buffer: int, weight: float
) -> None:
    packer: Packer[Box] = Packer(40, 6, packing_buffer, weight)
    rows: list[list[Box]] = []
    arrived: dict[int, int] = {}  # how many rows there were when an example came
    for number, (tokens, crops) in enumerate(sizes):
        while packer.full:
            rows.append(packer.take())
        packer.add(Box(tokens, crops, number))
        arrived[number] = len(rows)
    while packer.waiting:
        rows.append(packer.take())
    assert sorted(box.number for row in rows for box in row) == list(range(len(sizes)))
    for number, row in enumerate(rows):
        assert sum(box.tokens for box in row) <= 40 and sum(box.crops for box in row) <= 6
        assert [box.number for box in row] == sorted(box.number for box in row)
        for box in row:
            assert (box.tokens, box.crops) == sizes[box.number]
            assert number - arrived[box.number] < packing_buffer


def test_an_example_that_fits_no_row_is_bad_and_not_cut_off() -> None:
    packer: Packer[Box] = Packer(40, 6)
    for box in (Box(41, 0), Box(1, 7)):
        with pytest.raises(BadExample, match=r"a row holds 40 and 6") as caught:
            packer.add(box)
        assert caught.value.cause == "too long"
    assert not packer.waiting
    packer.add(Box(40, 6))
    assert packer.take() == [Box(40, 6)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "max_tokens is 0, expected at least 1"),
        ((1, 1, 0), "packing_buffer is 0, expected at least 1"),
        ((1, -1), "max_crops is -1"),
        ((1, 1, 1, -0.5), "crop_weight -0.5, expected 0 or more"),
    ],
)
def test_limits_that_hold_nothing(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packer(*arguments)
