"""The attention call against its formula, and the masks against their rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nanomolmo2.accelerate.flex import FlexAttention, block_mask
from nanomolmo2.batch import PREFIX_SUBSEGMENT
from nanomolmo2.generation.kv_cache import FOLDED_QUERIES
from nanomolmo2.generation.kv_cache import attend as attend_to_past
from nanomolmo2.models.attention import (
    PACK_SUBSEGMENT,
    attend,
    causal_mask,
    sequence_mask,
    tree_positions,
)
from tests.nets import greatest_difference

CPU = torch.device("cpu")


def random_qkv(H: int, K: int, T: int, S: int, B: int = 2, Dh: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(H * K + T + S)
    return [
        torch.randn(B, heads, length, Dh, generator=generator)
        for heads, length in ((H, T), (K, S), (K, S))
    ]


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Query head h reads key/value head h // (H / K); softmax over what the mask shows."""
    group = q.shape[1] // k.shape[1]
    y = torch.zeros_like(q)
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // group].transpose(1, 2) / math.sqrt(q.shape[-1])  # (B, T, S)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], -torch.inf)
        y[:, h] = scores.softmax(dim=-1) @ v[:, h // group]
    return y


@pytest.mark.parametrize(("H", "K"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (3, 9), (1, 9), (1, 1)])
@pytest.mark.parametrize("kind", ["none", "shared", "by row"])
def test_attend(H: int, K: int, T: int, S: int, kind: str) -> None:
    q, k, v = random_qkv(H, K, T, S)
    mask = None
    if kind != "none":
        rows = 1 if kind == "shared" else 2
        mask = torch.rand(rows, 1, T, S, generator=torch.Generator().manual_seed(5)) < 0.5
        mask[..., 0] = True
    for way in (attend, attend_to_past):
        assert greatest_difference(way(q, k, v, mask), attend_by_hand(q, k, v, mask)) < 2e-6


@pytest.mark.parametrize(("H", "K"), [(3, 3), (6, 2)])
def test_causal_is_the_causal_mask(H: int, K: int) -> None:
    q, k, v = random_qkv(H, K, 7, 7)
    mask = causal_mask(7, 7, CPU)[None, None]
    assert greatest_difference(attend(q, k, v, None, causal=True), attend(q, k, v, mask)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("H", "K"), [(4, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("T", [1, 2, 8, FOLDED_QUERIES, FOLDED_QUERIES + 1])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "by row"])
def test_folded_heads_equal_repeated_keys(
    dtype: torch.dtype, H: int, K: int, T: int, kind: str
) -> None:
    """Queries as a projection makes them, keys as a cache holds them: views, not contiguous."""
    S = T + 5
    generator = torch.Generator().manual_seed(T)
    q = torch.randn(2, T, H, 16, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, K, 40, 16, generator=generator).to(dtype)[:, :, :, :S]
    mask = None if kind == "none" else causal_mask(T, S, CPU)[None, None]
    if kind == "by row":
        mask = mask & (torch.rand(2, 1, 1, S, generator=generator) < 0.7)
        mask[..., 0] = True
    if kind == "additive":
        mask = torch.randn(1, 1, T, S, generator=generator).to(dtype).masked_fill(~mask, -torch.inf)
    wide = [x.float() for x in (q, k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1))]
    by = mask.float() if kind == "additive" else mask
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=by)
    found = attend_to_past(q, k, v, mask)
    assert found.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    assert greatest_difference(found, expected) < tolerance


def test_folding_is_differentiable() -> None:
    leaves = [x.requires_grad_() for x in random_qkv(6, 2, 3, 9)]
    mask = causal_mask(3, 9, CPU)[None, None]
    attend_to_past(*leaves, mask).square().sum().backward()
    found = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    attend_by_hand(*leaves, mask).square().sum().backward()
    for x, gradient in zip(leaves, found, strict=True):
        assert greatest_difference(gradient, x.grad) < 1e-5


@pytest.mark.parametrize("T", [1, 2])
def test_softmax_statistics_are_float32(T: int) -> None:
    """A sum of ones in bfloat16 stops at 256: 4001 equal keys would weigh 16 together, not 1."""
    q = torch.zeros(1, 2, T, 8, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 4001, 8, dtype=torch.bfloat16)
    v = torch.ones_like(k)
    for way in (attend, attend_to_past):
        assert greatest_difference(way(q, k, v, None), torch.ones_like(q)) <= 2**-8


def test_causal_mask_behind_a_past() -> None:
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(causal_mask(3, 5, CPU), expected)


def test_sequence_mask_follows_its_rule() -> None:
    """Padding, two pictures and a message tree in one; every cell by the rule of the docstring."""
    sub = torch.tensor([[10000] * 6 + [0, 0, 0, 1, 1], [-1, -1, *[10000] * 4, 0, 0, 1, 2, 2]])
    image = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]])
    real = torch.tensor([[1] * 11, [0, 0, *[1] * 9]])
    found = sequence_mask(
        11,
        key_mask=real.bool(),
        image_tokens=image.bool(),
        subsegment_ids=sub,
        device=CPU,
    )
    assert found.shape == (2, 1, 11, 11)
    assert found.dtype == torch.bool
    for b in range(2):
        for q in range(11):
            for k in range(11):
                see = k <= q or bool(image[b, q] and image[b, k])
                see = see and bool(sub[b, q] <= sub[b, k]) and bool(real[b, k])
                assert bool(found[b, 0, q, k]) == (see or q == k), (b, q, k)


def test_sequence_mask_of_plain_text_is_causal() -> None:
    assert torch.equal(sequence_mask(4, device=CPU)[0, 0], causal_mask(4, 4, CPU))


def test_the_mask_of_a_message_tree() -> None:
    """Molmo2's example: BOS and a picture of three tokens, then two branches of two tokens."""
    sub = torch.tensor([[10000] * 4 + [0, 0, 1, 1]])
    image = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0]]).bool()
    found = sequence_mask(8, image_tokens=image, subsegment_ids=sub, device=CPU)
    rows = ["1.......", *["1111...."] * 3, "11111...", "111111..", "1111..1.", "1111..11"]
    assert found[0, 0].tolist() == [[cell == "1" for cell in row] for row in rows]


# An example with a picture and two branches, then one with a picture and one branch, packed.
PACK = torch.tensor([[*[10000] * 4, 0, 0, 1, 1, *[110000] * 4, 100000, 100000]])
PACK_IMAGES = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0]]).bool()


def test_trap_14_pictures_of_packed_examples_do_not_see_each_other() -> None:
    """Molmo2's example of a pack, cell by cell."""
    found = sequence_mask(14, image_tokens=PACK_IMAGES, subsegment_ids=PACK, device=CPU)
    first = ["1.......", *["1111...."] * 3, "11111...", "111111..", "1111..1.", "1111..11"]
    second = ["1.....", *["1111.."] * 3, "11111.", "111111"]
    rows = [row + "." * 6 for row in first] + ["." * 8 + row for row in second]
    assert found[0, 0].tolist() == [[cell == "1" for cell in row] for row in rows]


def test_an_example_without_a_tree_in_a_pack() -> None:
    """It has one constant; the picture before it stays hidden."""
    ids = torch.tensor([[0, 0, 0, 100000, 100000, 100000]])
    image = torch.tensor([[1, 1, 0, 1, 1, 0]]).bool()
    found = sequence_mask(6, image_tokens=image, subsegment_ids=ids, device=CPU)
    rows = ["11....", "11....", "111...", "...11.", "...11.", "...111"]
    assert found[0, 0].tolist() == [[cell == "1" for cell in row] for row in rows]
    assert tree_positions(ids).tolist() == [[0, 1, 2, 0, 1, 2]]


def test_trap_15_branches_of_a_tree_start_again_behind_the_prefix() -> None:
    """Molmo2's own examples: a tree of two branches, and the pack of it with another."""
    tree = torch.tensor([[*[10000] * 4, *[0] * 4, *[1] * 7]])
    assert tree_positions(tree).tolist() == [[*range(8), *range(4, 11)]]
    assert tree_positions(PACK).tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padding_are_zero(side: str) -> None:
    row = [*[10000] * 3, 0, 0, 1, 1, 1]
    positions = [0, 1, 2, 3, 4, 3, 4, 5]
    pad, zero = [-1] * 3, [0] * 3
    ids = torch.tensor([pad + row if side == "left" else row + pad, [10000, 10000, *[0] * 9]])
    expected = zero + positions if side == "left" else positions + zero
    assert tree_positions(ids).tolist() == [expected, list(range(11))]


def random_pack(generator: torch.Generator, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Subsegments, image tokens and positions of a row of random trees, by plain loops."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    ids: list[int] = []
    positions: list[int] = []
    example = 0
    while len(ids) < length:
        prefix = number(1, 6)
        ids += [PACK_SUBSEGMENT * example + PREFIX_SUBSEGMENT] * prefix
        positions += range(prefix)
        for branch in range(number(1, 3)):
            tokens = number(1, 5)
            ids += [PACK_SUBSEGMENT * example + branch] * tokens
            positions += range(prefix, prefix + tokens)
        example += 1
    chosen = torch.tensor([ids[:length]])
    in_prefix = chosen % PACK_SUBSEGMENT == PREFIX_SUBSEGMENT
    image = in_prefix & (torch.rand(1, length, generator=generator) < 0.7)
    return chosen, image, torch.tensor([positions[:length]])


@pytest.mark.parametrize("seed", range(8))
def test_random_packs_follow_the_rules_in_words(seed: int) -> None:
    """Only in the own example: what is earlier in prefix or branch, and picture to picture."""
    ids, image, positions = random_pack(torch.Generator().manual_seed(seed), 40)
    assert torch.equal(tree_positions(ids), positions)
    found = sequence_mask(40, image_tokens=image, subsegment_ids=ids, device=CPU)[0, 0]
    for q in range(40):
        for k in range(40):
            same_example = ids[0, q] // PACK_SUBSEGMENT == ids[0, k] // PACK_SUBSEGMENT
            in_prefix = ids[0, k] % PACK_SUBSEGMENT == PREFIX_SUBSEGMENT
            before = k <= q and (in_prefix or ids[0, q] == ids[0, k])
            pictures = image[0, q] and image[0, k]
            assert found[q, k] == (same_example and (before or pictures)), (q, k)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("H", "K"), [(3, 3), (4, 2)])
def test_flex_attention_gives_the_same(H: int, K: int) -> None:
    generator = torch.Generator().manual_seed(H)
    rows = [random_pack(generator, 33) for _ in range(2)]
    real = torch.ones(2, 33, dtype=torch.bool)
    real[1, 27:] = False
    given = {
        "image_tokens": torch.cat([image for _, image, _ in rows]),
        "subsegment_ids": torch.cat([ids for ids, _, _ in rows]),
        "key_mask": real,
    }
    # FlexAttention wants a head width of 16 or more.
    q, k, v = random_qkv(H, K, 33, 33, Dh=16)
    dense = attend(q, k, v, sequence_mask(33, **given, device=CPU))
    blocks = FlexAttention(block_mask(33, **given, device=CPU)).attend(0, q, k, v)
    assert greatest_difference(blocks, dense) < 2e-6
