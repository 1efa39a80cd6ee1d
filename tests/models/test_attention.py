"""The attention call against its formula, and the masks against their rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nanomolmo2.models.attention import attend, causal_mask, sequence_mask
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
    assert greatest_difference(attend(q, k, v, mask), attend_by_hand(q, k, v, mask)) < 2e-6


@pytest.mark.parametrize(("H", "K"), [(3, 3), (6, 2)])
def test_causal_is_the_causal_mask(H: int, K: int) -> None:
    q, k, v = random_qkv(H, K, 7, 7)
    mask = causal_mask(7, 7, CPU)[None, None]
    assert greatest_difference(attend(q, k, v, None, causal=True), attend(q, k, v, mask)) < 2e-6


@pytest.mark.parametrize("T", [1, 2])
def test_softmax_statistics_are_float32(T: int) -> None:
    """A sum of ones in bfloat16 stops at 256: 4001 equal keys would weigh 16 together, not 1."""
    q = torch.zeros(1, 2, T, 8, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 4001, 8, dtype=torch.bfloat16)
    v = torch.ones_like(k)
    assert greatest_difference(attend(q, k, v, None), torch.ones_like(q)) <= 2**-8


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
