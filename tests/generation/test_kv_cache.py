"""Rows of their own lengths against the padded cache and against whole sequences."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from nanomolmo2.accelerate.prefill import last_state
from nanomolmo2.generation.invariant import FixedBlocks
from nanomolmo2.generation.kv_cache import (
    GROWTH,
    KEY_BLOCK,
    KVCache,
    PaddedStep,
    RaggedStep,
    RowCache,
)
from nanomolmo2.models import LanguageModel
from nanomolmo2.models.attention import Cache, sequence_mask
from tests.nets import LLM, randomize, text_ids

LAYERS = LLM.num_hidden_layers


@pytest.fixture(scope="module", params=[2, 6], ids=["grouped", "every head its own"])
def llm(request: pytest.FixtureRequest) -> LanguageModel:
    return randomize(LanguageModel(replace(LLM, num_key_value_heads=request.param))).eval()


def states_of(
    llm: LanguageModel,
    ids: Tensor,
    mask: Tensor | None = None,
    cache: Cache | None = None,
    *,
    position_ids: Tensor | None = None,
    last_only: bool = False,
) -> Tensor:
    """States (B, T, D) of ids (B, T), or of the last position alone."""
    if position_ids is None:
        position_ids = torch.arange(ids.shape[1])[None]
    run = partial(last_state, llm) if last_only else llm.states
    return llm.norm(run(llm.embed(ids), position_ids, mask, cache))


@torch.no_grad()
def step(
    llm: LanguageModel,
    rows: list[RowCache],
    ids: list[Tensor],
    *,
    mask: Tensor | None = None,
    fixed_blocks: bool = False,
) -> list[Tensor]:
    """States of every row's new ids."""
    counts = [len(own) for own in ids]
    positions = [torch.arange(n) + r.length for r, n in zip(rows, counts, strict=True)]
    ragged = RaggedStep(rows, counts, mask=mask, fixed_blocks=fixed_blocks)
    hidden = states_of(
        llm, torch.cat(ids)[None], cache=ragged, position_ids=torch.cat(positions)[None]
    )
    ragged.advance()
    return list(hidden[0].split(counts))


@pytest.mark.parametrize("fixed_blocks", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        [(12, 5), (1, 1), (1, 1), (3, 1)],  # prompts, decoding, a draft of two
        [(1, 40), (30, 1), (17, 16), (1, 2)],
    ],
)
def test_ragged_steps_equal_whole_sequences(
    llm: LanguageModel, parts: list[tuple[int, int]], fixed_blocks: bool
) -> None:
    lengths = [sum(part) for part in zip(*parts, strict=True)]
    whole = [text_ids(length, seed=length) for length in lengths]
    rows, found, at = [RowCache(LAYERS), RowCache(LAYERS, 100)], [[], []], [0, 0]
    for part in parts:
        ids = [w[a : a + n] for w, a, n in zip(whole, at, part, strict=True)]
        for b, states in enumerate(step(llm, rows, ids, fixed_blocks=fixed_blocks)):
            found[b].append(states)
            at[b] += part[b]
    for b, ids in enumerate(whole):
        with torch.no_grad():
            expected = states_of(llm, ids[None])[0]
        torch.testing.assert_close(torch.cat(found[b]), expected, rtol=1e-4, atol=1e-5)
    assert [row.length for row in rows] == lengths


@pytest.mark.parametrize("fixed_blocks", [False, True])
def test_a_mask_that_sees_ahead(llm: LanguageModel, fixed_blocks: bool) -> None:
    """Positions 3 .. 69 see each other, across many blocks of keys."""
    ids = text_ids(90)
    seen = torch.zeros(1, 90, dtype=torch.bool)
    seen[:, 3:70] = True
    mask = sequence_mask(90, image_tokens=seen, device=ids.device)
    (found,) = step(llm, [RowCache(LAYERS)], [ids], mask=mask[0, 0], fixed_blocks=fixed_blocks)
    with torch.no_grad():
        expected = states_of(llm, ids[None], mask)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 50, 69])
def test_fixed_blocks_give_the_same_bits_wherever_a_sequence_is_cut(
    llm: LanguageModel, cut: int
) -> None:
    ids = text_ids(70)
    with FixedBlocks():
        (whole,) = step(llm, [RowCache(LAYERS)], [ids], fixed_blocks=True)
        row = RowCache(LAYERS)
        (begin,) = step(llm, [row], [ids[:cut]], fixed_blocks=True)
        other = RowCache(LAYERS)
        step(llm, [other], [text_ids(33, seed=1)], fixed_blocks=True)
        _, end = step(llm, [other, row], [text_ids(3), ids[cut:]], fixed_blocks=True)
    assert torch.equal(torch.cat([begin, end]), whole)


def test_truncated_slots_are_forgotten(llm: LanguageModel) -> None:
    ids, row = text_ids(12), RowCache(LAYERS)
    step(llm, [row], [ids[:8]])
    step(llm, [row], [text_ids(3, seed=9)])
    row.truncate(8)
    (found,) = step(llm, [row], [ids[8:]])
    with torch.no_grad():
        torch.testing.assert_close(found, states_of(llm, ids[None])[0, 8:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="13 slots are to be kept, but 12 are written"):
        row.truncate(13)


def test_a_fork_is_a_row_of_its_own(llm: LanguageModel) -> None:
    ids, row = text_ids(12), RowCache(LAYERS)
    step(llm, [row], [ids])
    fork = row.fork(7, capacity=200)
    assert (fork.length, fork.capacity) == (7, 256)
    step(llm, [fork], [text_ids(3, seed=9)])
    (found,) = step(llm, [row], [ids[:1]])
    again = RowCache(LAYERS)
    step(llm, [again], [ids])
    (expected,) = step(llm, [again], [ids[:1]])
    assert torch.equal(found, expected)


def test_a_row_grows_and_counts_its_bytes() -> None:
    row = RowCache(1, capacity=5)
    assert (row.nbytes, row.capacity) == (0, 0)
    written = torch.randn(1, 2, 150, 4)
    for at in range(150):
        row.write(0, written[:, :, at : at + 1], -written[:, :, at : at + 1])
        row.length += 1
    keys, values = row.layers[0]
    assert torch.equal(keys[:, :, :150], written) and torch.equal(values, -keys)
    assert row.capacity == KEY_BLOCK + GROWTH
    assert row.nbytes == 2 * 2 * row.capacity * 4 * 4


@torch.no_grad()
@pytest.mark.parametrize("fixed_blocks", [False, True])
@pytest.mark.parametrize(("past", "image"), [(0, False), (5, False), (0, True)])
def test_the_last_position_alone(
    llm: LanguageModel, past: int, image: bool, fixed_blocks: bool
) -> None:
    ids = text_ids(24)
    mask = None
    if image:
        tokens = torch.zeros(1, 24, dtype=torch.bool)
        tokens[0, 3:23] = True
        mask = sequence_mask(24, image_tokens=tokens, device=ids.device)[0, 0]
    found = []
    for last_only in (False, True):
        row = RowCache(LAYERS)
        if past:
            step(llm, [row], [ids[:past]], fixed_blocks=fixed_blocks)
        ragged = RaggedStep([row], [24 - past], mask=mask, fixed_blocks=fixed_blocks)
        with FixedBlocks() if fixed_blocks else nullcontext():
            hidden = states_of(
                llm,
                ids[None, past:],
                cache=ragged,
                position_ids=torch.arange(past, 24)[None],
                last_only=last_only,
            )
        ragged.advance()
        assert row.length == 24
        found.append((hidden[:, -1], row))
    (expected, whole), (last, part) = found
    assert (
        torch.equal(last, expected) if fixed_blocks else torch.allclose(last, expected, atol=1e-5)
    )
    for a, b in zip(whole.layers, part.layers, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@torch.no_grad()
def test_the_last_position_alone_in_a_padded_cache(llm: LanguageModel) -> None:
    ids = text_ids(2, 9)
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[1, :4] = False
    mask = sequence_mask(9, key_mask=key_mask, device=ids.device)
    caches = [KVCache(LAYERS), KVCache(LAYERS)]
    whole = states_of(llm, ids, cache=PaddedStep(caches[0], mask))
    last = states_of(llm, ids, cache=PaddedStep(caches[1], mask), last_only=True)
    assert torch.allclose(last, whole[:, -1:], atol=1e-5)
    for layer in range(LAYERS):
        keys = [cache.keys[layer][:, :, :9] for cache in caches]  # type: ignore[index]
        assert torch.equal(*keys)
    assert torch.allclose(
        states_of(llm, ids, last_only=True), states_of(llm, ids)[:, -1:], atol=1e-5
    )
