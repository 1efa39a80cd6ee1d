"""What the decoder does beside its numbers (those are in tests/parity)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanomolmo2.accelerate import checkpoint_activations
from nanomolmo2.generation.kv_cache import GROWTH, KVCache
from nanomolmo2.models import LanguageModel, LLMConfig
from nanomolmo2.models.layers import RMSNorm, apply_rope, rope_table
from nanomolmo2.models.loss import next_tokens
from nanomolmo2.training.dropout import residual_dropout
from tests.nets import LLM, greatest_difference, randomize, text_ids

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    return randomize(LanguageModel(LLM)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return text_ids(3, 12)


def test_the_defaults_are_qwen3() -> None:
    config = LLMConfig()
    assert (config.hidden_size, config.intermediate_size) == (1024, 3072)
    assert (config.num_hidden_layers, config.head_dim) == (28, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (16, 8)
    assert (config.vocab_size, config.max_position_embeddings) == (151_936, 32_768)
    assert (config.rope_theta, config.rms_norm_eps) == (1e6, 1e-6)
    assert config.tie_word_embeddings
    with torch.device("meta"):
        llm = LanguageModel()
        assert sum(p.numel() for p in llm.parameters()) == 596_049_920
        assert llm(inputs_embeds=torch.empty(2, 5, 1024)).shape == (2, 5, 151_936)


# --- the cache -----------------------------------------------------------------------------------


def pad(ids: Tensor, left: list[int], right: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of ids between padding of their own; ids and mask."""
    rows, masks = [], []
    for row, before, after in zip(ids, left, right, strict=True):
        rows.append(torch.cat([row.new_full((before,), 7), row, row.new_full((after,), 9)]))
        masks.append(torch.tensor([False] * before + [True] * len(row) + [False] * after))
    return torch.stack(rows), torch.stack(masks)


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6], [11, 1], [4, 8]], ids=str)
def test_cached_equals_uncached(llm: LanguageModel, ids: Tensor, chunks: list[int]) -> None:
    """Token by token, and in chunks behind a past."""
    expected = llm(ids)
    cache, found = None, []
    for chunk in ids.split(chunks, dim=1):
        logits, cache = llm(chunk, past_key_values=cache, use_cache=True)
        found.append(logits)
    assert cache.length == 12
    assert greatest_difference(torch.cat(found, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize("left", [[0, 4, 2], [0, 0, 0], [1, 3, 0]], ids=["left", "right", "both"])
@pytest.mark.parametrize("chunks", [[16], [1] * 16, [3, 1, 12], [5, 5, 6]], ids=str)
def test_cached_rows_with_padding_equal_each_row_alone(
    llm: LanguageModel, ids: Tensor, left: list[int], chunks: list[int]
) -> None:
    """A first chunk may be all padding for one row; it must not count as a position."""
    padded, mask = pad(ids, left, [4 - n for n in left])
    cache, found = KVCache(LLM.num_hidden_layers), []
    for chunk, chunk_mask in zip(padded.split(chunks, 1), mask.split(chunks, 1), strict=True):
        found.append(llm(chunk, attention_mask=chunk_mask, past_key_values=cache))
    logits = torch.cat(found, dim=1)
    assert torch.isfinite(logits).all()
    new = text_ids(3, 1, seed=8)
    after, _ = llm(new, past_key_values=cache, use_cache=True)
    for b in range(3):
        alone = llm(torch.cat([ids[b], new[b]])[None])[0]
        assert greatest_difference(logits[b][mask[b]], alone[:-1]) < TOLERANCE
        assert greatest_difference(after[b, 0], alone[-1]) < TOLERANCE


def test_a_mask_may_cover_the_past_as_well(llm: LanguageModel, ids: Tensor) -> None:
    """transformers' way: every step passes the whole mask."""
    padded, mask = pad(ids, [0, 2, 1], [2, 0, 1])
    expected = llm(padded, attention_mask=mask)
    _, cache = llm(padded[:, :9], attention_mask=mask[:, :9], use_cache=True)
    rest = llm(padded[:, 9:], attention_mask=mask.long(), past_key_values=cache)
    assert greatest_difference(rest[mask[:, 9:]], expected[:, 9:][mask[:, 9:]]) < TOLERANCE


def test_the_cache_goes_on_behind_given_positions(llm: LanguageModel, ids: Tensor) -> None:
    positions = torch.arange(12)[None] + 5
    expected = llm(ids, position_ids=positions)
    _, cache = llm(ids[:, :7], position_ids=positions[:, :7], use_cache=True)
    rest = llm(ids[:, 7:], past_key_values=cache)
    assert greatest_difference(rest, expected[:, 7:]) < TOLERANCE


def test_a_four_dimensional_mask_behind_a_past(llm: LanguageModel, ids: Tensor) -> None:
    see = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    see[..., 9:, 2] = False
    expected = llm(ids, attention_mask=see)
    _, cache = llm(ids[:, :8], use_cache=True)
    rest = llm(ids[:, 8:], attention_mask=see[:, :, 8:], past_key_values=cache)
    assert greatest_difference(rest, expected[:, 8:]) < TOLERANCE


@pytest.mark.parametrize("capacity", [0, 3, GROWTH + 1])
def test_the_cache_grows(capacity: int) -> None:
    """Past a block, and past a capacity that was too small; what was written stays."""
    cache = KVCache(2, capacity)
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(2, 2, 3, GROWTH + 9, 4, generator=generator)  # (layer, B, K, S, Dh)
    for part in written.split([5, 1, GROWTH - 6, 1, 8], dim=3):
        for layer in range(2):
            k, v = cache.update(layer, part[layer], -part[layer])
            end = cache.length + part.shape[3]
            assert torch.equal(k, written[layer, :, :, :end])
            assert torch.equal(v, -written[layer, :, :, :end])
        cache.advance(part.shape[3], None, torch.zeros(2, 1))
    assert cache.keys[0].shape[2] % GROWTH == 0 or cache.keys[0].shape[2] == capacity


def test_a_cache_with_room_is_written_in_place() -> None:
    cache = KVCache(1, capacity=6)
    for _ in range(3):
        cache.update(0, torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
        cache.advance(2, None, torch.zeros(1, 1))
        address = cache.keys[0].data_ptr()
        assert cache.keys[0].shape[2] == 6
    assert cache.keys[0].data_ptr() == address


def test_gradients_flow_through_a_cache(ids: Tensor) -> None:
    llm = randomize(LanguageModel(LLM))
    llm(ids).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in llm.named_parameters()}
    llm.zero_grad()
    first, cache = llm(ids[:, :5], use_cache=True)
    second, cache = llm(ids[:, 5:8], past_key_values=cache, use_cache=True)
    third = llm(ids[:, 8:], past_key_values=cache)
    torch.cat([first, second, third], dim=1).square().mean().backward()
    for name, p in llm.named_parameters():
        assert greatest_difference(p.grad, expected[name]) < TOLERANCE, name


# --- padding, masks, embeddings ------------------------------------------------------------------


@pytest.mark.parametrize("left", [[0, 4, 2], [0, 0, 0], [1, 3, 0]], ids=["left", "right", "both"])
def test_a_batch_equals_its_rows_alone(llm: LanguageModel, ids: Tensor, left: list[int]) -> None:
    padded, mask = pad(ids, left, [4 - n for n in left])
    logits = llm(padded, attention_mask=mask)
    for b in range(3):
        assert greatest_difference(logits[b][mask[b]], llm(ids[b : b + 1])[0]) < TOLERANCE


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_masks_of_any_type(llm: LanguageModel, ids: Tensor, kind: torch.dtype) -> None:
    mask = torch.ones(3, 12, dtype=kind)
    mask[1, :3] = 0
    expected = llm(ids, attention_mask=mask.bool())
    assert torch.equal(llm(ids, attention_mask=mask), expected)
    assert torch.equal(llm(ids, attention_mask=torch.ones(3, 12, dtype=kind)), llm(ids))


def test_embeddings_in_place_of_ids(llm: LanguageModel, ids: Tensor) -> None:
    assert torch.equal(llm(inputs_embeds=llm.embed(ids)), llm(ids))
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": llm.embed(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            llm(**arguments)


def test_tokens_that_are_read_but_never_written(ids: Tensor) -> None:
    llm = randomize(LanguageModel(replace(LLM, additional_vocab_size=4)))
    assert llm.embed_tokens.weight.shape == (93, 36)
    assert llm(torch.tensor([[5, 92]])).shape == (1, 2, 89)
    with pytest.raises(ValueError, match="token ids run from 5 to 93"):
        llm(torch.tensor([[5, 93]]))


def test_what_forward_returns(llm: LanguageModel, ids: Tensor) -> None:
    logits = llm(ids)
    assert logits.shape == (3, 12, 89)
    same, cache = llm(ids, use_cache=True)
    assert torch.equal(same, logits)
    assert isinstance(cache, KVCache)
    same, cache, states = llm(ids, use_cache=True, output_hidden_states=True)
    assert torch.equal(same, logits)
    assert len(states) == LLM.num_hidden_layers + 2
    assert torch.equal(llm.head(states[-1]), logits)


def test_gradient_checkpointing_gives_the_same_gradients(ids: Tensor) -> None:
    plain = randomize(LanguageModel(LLM)).train()
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving, "full")
    mask = torch.ones(3, 12).bool()
    mask[1, :2] = False
    calls: list[int] = []
    saving.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for net in (plain, saving):
        net(ids, attention_mask=mask).square().mean().backward()
    assert len(calls) == 2, "a checkpointed block runs again for gradients"
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# --- precision -----------------------------------------------------------------------------------


def test_rms_norm_is_float32_inside() -> None:
    norm = randomize(RMSNorm(40, 1e-6))
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 300
    exact = norm(x)
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    y = x.bfloat16().double()
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = norm.weight * y.float().bfloat16()
    assert torch.equal(half, expected)
    assert greatest_difference(half, exact) < 0.05


def test_rotary_positions_are_float32_under_bfloat16() -> None:
    """At position 30,001 an angle rounded to bfloat16 would be off by up to 64 radians."""
    positions = torch.tensor([[0, 1, 257, 30_001]])
    cos, sin = rope_table(positions, 16, 1e6)
    assert cos.dtype == sin.dtype == torch.float32
    angles = positions.double()[..., None] * 1e6 ** -(torch.arange(0, 16, 2).double() / 16)
    assert greatest_difference(cos[0, 0, :, :8], angles[0].cos()) < 2e-3
    x = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = apply_rope(x, (cos, sin))
    assert found.dtype == torch.bfloat16
    pairs = torch.complex(x[..., :8].float(), x[..., 8:].float())
    turned = pairs * torch.complex(cos, sin)[..., :8]
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    # One rounding, of the result: 8 bits of it, however much the two products cancel.
    assert ((found.float() - expected).abs() <= 2**-8 * expected.abs()).all()


def test_scores_depend_on_distance_only(llm: LanguageModel, ids: Tensor) -> None:
    positions = torch.arange(12)[None]
    assert greatest_difference(llm(ids, position_ids=positions + 50), llm(ids)) < 1e-4


@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_bfloat16_runs_cached_and_padded(ids: Tensor, way: str) -> None:
    llm = randomize(LanguageModel(LLM)).eval()
    padded, mask = pad(ids, [0, 2, 4], [4, 2, 0])
    with torch.no_grad():
        exact = llm(padded, attention_mask=mask)[mask]
        if way == "cast":
            llm = llm.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            logits, cache = llm(padded, attention_mask=mask, use_cache=True)
            step, _ = llm(ids[:, :1], past_key_values=cache, use_cache=True)
    assert logits.dtype == step.dtype == torch.bfloat16
    assert greatest_difference(logits[mask], exact) < 0.2
    assert torch.isfinite(step).all()


# --- errors --------------------------------------------------------------------------------------


def mask_of(*shape: int) -> dict[str, Tensor]:
    return {"attention_mask": torch.ones(shape, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("input_ids", "arguments", "message"),
    [
        (torch.tensor([[3, 89]]), {}, r"run from 3 to 89, but the vocabulary has 89 \(0\.\.88\)"),
        (torch.tensor([[-1, 3]]), {}, r"run from -1 to 3"),
        (torch.tensor([89]).view(1, 1), {}, r"run from 89 to 89"),
        (torch.tensor([3, 4]), {}, r"shape \(B, T\) and an integer type, found \(2,\) torch.int64"),
        (torch.zeros(1, 2), {}, r"found \(1, 2\) torch.float32"),
        (torch.zeros(1, 129).long(), {}, r"has 129 positions, the model's context holds 128"),
        (torch.zeros(2, 4).long(), mask_of(2, 3), "covers 3 positions, but there are 0 past and 4"),
        (torch.zeros(2, 4).long(), mask_of(3, 4), r"shape \(2, 4\) or 4-D, found \(3, 4\)"),
        (torch.zeros(2, 4).long(), mask_of(2, 4, 4), r"shape \(2, 4\) or 4-D, found \(2, 4, 4\)"),
        (
            torch.zeros(2, 4).long(),
            mask_of(2, 1, 4, 5),
            r"must be \(1 or 2, 1, 4, 4\), found \(2, 1, 4, 5\)",
        ),
        (torch.zeros(2, 4).long(), mask_of(3, 1, 4, 4), r"found \(3, 1, 4, 4\)"),
        (
            torch.zeros(2, 4).long(),
            {"position_ids": torch.arange(3)[None]},
            r"position_ids of shape \(1, 3\) do not fit 2 rows of 4 positions",
        ),
        (torch.zeros(2, 4).long(), {"position_ids": torch.arange(4)}, r"shape \(4,\) do not fit"),
    ],
)
def test_what_does_not_fit_stops(
    llm: LanguageModel, input_ids: Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm(input_ids, **arguments)


def test_the_past_counts_into_the_context(llm: LanguageModel) -> None:
    _, cache = llm(torch.zeros(1, 127).long(), use_cache=True)
    _, cache = llm(torch.zeros(1, 1).long(), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="129 positions, the model's context holds 128"):
        llm(torch.zeros(1, 1).long(), past_key_values=cache)


def last_states(model: LanguageModel, call: Callable[[], Any]) -> Tensor:
    """(B, T, D), what goes into the last norm."""
    seen = []
    handle = model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    call()
    handle.remove()
    return seen[0]


def test_residual_dropout_thins_out_what_attention_and_mlp_add() -> None:
    """Entries of each sum are left out or doubled at 0.5; in evaluation nothing happens."""
    config = LLMConfig.from_dict(LLM.to_dict() | {"num_hidden_layers": 1})
    model, ids = randomize(LanguageModel(config)).eval(), text_ids(2, 40)
    plain = model(ids)
    residual_dropout(model, 0.5)
    assert torch.equal(model(ids), plain)
    model.train()
    layer, added = model.layers[0], []
    for part in (layer.self_attn, layer.mlp):
        part.register_forward_hook(lambda _, inputs, y: added.append(y.detach()))
    torch.manual_seed(0)
    out = last_states(model, lambda: model(ids))
    mixed, fed = added
    first = out - model.embed_tokens(ids).detach()  # of both sums
    fits = torch.stack([first - a * mixed - b * fed for a in (0, 2) for b in (0, 2)]).abs() < 1e-4
    assert fits.any(dim=0).all()
    shares = fits.float().mean(dim=(1, 2, 3))
    assert (shares - 0.25).abs().max() < 0.03


def test_dropout_at_targets_leaves_all_other_positions_alone() -> None:
    """One layer, so that no position sees another's dropped sum."""
    config = LLMConfig.from_dict(LLM.to_dict() | {"num_hidden_layers": 1})
    model, ids = randomize(LanguageModel(config)).train(), text_ids(2, 8)
    labels = torch.full_like(ids, -100)
    labels[0, 3:5], labels[1, 7], labels[1, 2] = ids[0, 3:5], ids[1, 7], ids[1, 2]
    weights = torch.ones_like(ids, dtype=torch.float32)
    weights[1, 2] = 0.0
    whole = last_states(model, lambda: model.loss(ids, labels, weights))
    dropout = residual_dropout(model, 0.3)
    dropout.at_rows(next_tokens(labels, weights).rows, labels.shape)
    thinned = last_states(model, lambda: model.loss(ids, labels, weights))
    changed = (whole != thinned).any(dim=2)
    assert changed.nonzero().tolist() == [[0, 2], [0, 3], [1, 6]]
    dropout.positions = None
    everywhere = last_states(model, lambda: model.loss(ids, labels, weights))
    assert (whole != everywhere).any(dim=2).all()


def test_dropout_is_drawn_once_with_gradient_checkpointing() -> None:
    model, ids = randomize(LanguageModel(LLM)).train(), text_ids(2, 8)
    residual_dropout(model, 0.3)
    gradients = []
    for mode in ("none", "selective", "full"):
        checkpoint_activations(model, mode)  # type: ignore[arg-type]
        torch.manual_seed(3)
        model.zero_grad()
        model.loss(ids, ids).backward()
        gradients.append(model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])
