"""The decoder against transformers' Qwen3, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from nanomolmo2.models import LanguageModel, LLMConfig
from tests.nets import allocate, greatest_difference, in_bfloat16, randomize, text_ids
from tests.parity.references import bf16_errors, qwen3, recorded

TOLERANCE = 2e-5

SHAPES = [
    LLMConfig(  # every head has its own keys and values
        vocab_size=101,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=14,
        rope_theta=10_000.0,
        max_position_embeddings=64,
    ),
    LLMConfig(  # three heads share, the output head is not the embedding
        vocab_size=203,
        hidden_size=50,
        intermediate_size=70,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
    LLMConfig(  # all heads share, heads wider together than the model
        vocab_size=77,
        hidden_size=44,
        intermediate_size=132,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=22,
        rms_norm_eps=1e-3,
        max_position_embeddings=64,
    ),
]
NAMES = ["h3-kv3", "h6-kv2-untied", "h5-kv1"]
each_shape = pytest.mark.parametrize("config", SHAPES, ids=NAMES)


def random_llm(config: LLMConfig, seed: int = 0) -> LanguageModel:
    return randomize(LanguageModel(config), seed).eval()


def padding_masks(rows: int, length: int) -> Tensor:
    """(B, T): row 0 whole, row 1 padded left, row 2 right, row 3 both."""
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row, (left, right) in enumerate([(0, 0), (4, 0), (0, 3), (2, 5)][:rows]):
        mask[row, :left] = False
        mask[row, length - right :] = False
    return mask


def positions_of(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def assert_every_layer_equals(
    llm: LanguageModel,
    ids: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    reference_mask: Tensor | None = None,
    own_positions: bool = False,
) -> None:
    """Compare embeddings, every block and the logits, at the positions that are no padding."""
    reference = qwen3(llm)
    real = mask if mask is not None and mask.ndim == 2 else torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad(), recorded(reference.model.layers) as expected:
        wanted_logits = reference(
            ids,
            attention_mask=mask if reference_mask is None else reference_mask,
            position_ids=positions,
        ).logits
        logits, states = llm(
            ids,
            attention_mask=mask,
            position_ids=None if own_positions else positions,
            output_hidden_states=True,
        )
        expected = [reference.model.embed_tokens(ids), *expected]
        expected.append(reference.model.norm(expected[-1]))
    assert len(states) == llm.config.num_hidden_layers + 2 == len(expected)
    assert 0.5 < expected[-2].std() < 4, "the comparison is meant at unit scale"
    for found, wanted in zip(states, expected, strict=True):
        assert greatest_difference(found[real], wanted[real]) <= TOLERANCE
    assert wanted_logits.std() > 0.5, "flat logits prove nothing"
    assert greatest_difference(logits[real], wanted_logits[real]) <= TOLERANCE


@each_shape
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_layer(config: LLMConfig, batch: int) -> None:
    ids = text_ids(batch, 17, vocab_size=config.vocab_size)
    assert_every_layer_equals(random_llm(config), ids)


@each_shape
def test_padding_on_either_side(config: LLMConfig) -> None:
    """Positions are counted over real tokens, as transformers' generate prepares them."""
    ids, mask = text_ids(4, 13, vocab_size=config.vocab_size), padding_masks(4, 13)
    assert_every_layer_equals(random_llm(config), ids, mask, positions_of(mask), own_positions=True)


@each_shape
def test_position_ids(config: LLMConfig) -> None:
    """Positions of a message tree: the second branch starts again."""
    ids = text_ids(2, 12, vocab_size=config.vocab_size)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8], [0, 2, 9, 3, *range(20, 28)]])
    assert_every_layer_equals(random_llm(config), ids, positions=positions)


@each_shape
@pytest.mark.parametrize("rows", [1, 3], ids=["one for all rows", "one a row"])
def test_four_dimensional_masks(config: LLMConfig, rows: int) -> None:
    """Bool and additive masks; anything may be seen, the future too."""
    T = 11
    ids = text_ids(3, T, vocab_size=config.vocab_size)
    see = torch.rand(rows, 1, T, T, generator=torch.Generator().manual_seed(2)) < 0.4
    see |= torch.eye(T, dtype=torch.bool)
    additive = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
    llm = random_llm(config)
    everywhere = additive.expand(3, 1, T, T)
    assert_every_layer_equals(llm, ids, see, reference_mask=everywhere)
    assert_every_layer_equals(llm, ids, additive, reference_mask=everywhere)


@pytest.mark.slow
def test_every_layer_at_full_size() -> None:
    config = LLMConfig()
    llm = randomize(allocate(LanguageModel, config))
    ids, mask = text_ids(3, 19, vocab_size=config.vocab_size), padding_masks(3, 19)
    assert_every_layer_equals(llm, ids, mask, positions_of(mask), own_positions=True)
    assert_bfloat16_errs_no_more(llm, ids)


def assert_bfloat16_errs_no_more(llm: LanguageModel, ids: Tensor) -> None:
    half = in_bfloat16(llm)
    exact_reference, half_reference = qwen3(llm), qwen3(half, attention="sdpa")
    with torch.no_grad():
        with recorded(exact_reference.model.layers) as exact:
            exact.append(exact_reference(ids).logits)
        with recorded(half_reference.model.layers) as theirs:
            theirs.append(half_reference(ids).logits)
        logits, states = half(ids, output_hidden_states=True)
    assert logits.dtype == torch.bfloat16
    for error, reference_error in bf16_errors([*states[1:-1], logits], theirs, exact):
        assert error <= 1.1 * reference_error


@each_shape
def test_bfloat16_errs_no_more_than_transformers(config: LLMConfig) -> None:
    assert_bfloat16_errs_no_more(random_llm(config), text_ids(24, 33, vocab_size=config.vocab_size))


def generate_with_transformers(
    reference: Qwen3ForCausalLM, ids: Tensor, mask: Tensor | None, eos: int | None, pad: int
) -> Tensor:
    return reference.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad,
    )[:, ids.shape[1] :]


@each_shape
def test_greedy_generation(config: LLMConfig) -> None:
    """Left padding, rows that end early, padding behind them: all as transformers does it."""
    llm = random_llm(config, seed=3)
    reference = qwen3(llm)
    ids, mask = text_ids(3, 9, vocab_size=config.vocab_size), torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = mask[2, :2] = False
    unstopped = generate_with_transformers(reference, ids, mask, None, 0)
    eos = int(unstopped[0, 5])  # some row meets it on the way
    for end in (None, eos):
        expected = generate_with_transformers(reference, ids, mask, end, 1)
        with torch.no_grad():
            found = llm.generate(ids, mask, max_new_tokens=12, eos_token_id=end, pad_token_id=1)
        assert torch.equal(found[:, ids.shape[1] :], expected)
    assert (expected == 1).any() or expected.shape[1] < 12, "no row ended early"
