"""The vision encoder against transformers' SigLIP, layer by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nanomolmo2.models import VisionConfig, VisionEncoder
from tests.nets import allocate, encode, greatest_difference, in_bfloat16, pictures, randomize
from tests.parity.references import bf16_errors, recorded, siglip

TOLERANCE = 2e-5

SHAPES = [
    VisionConfig(
        image_size=35,
        patch_size=7,
        hidden_size=30,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=5,
    ),
    VisionConfig(  # the last pixel of every side belongs to no patch
        image_size=34,
        patch_size=11,
        hidden_size=33,
        intermediate_size=77,
        num_hidden_layers=4,
        num_attention_heads=3,
    ),
    VisionConfig(
        image_size=45,
        patch_size=5,
        hidden_size=68,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        layer_norm_eps=1e-3,
    ),
]


def assert_every_layer_equals(encoder: VisionEncoder, images: Tensor) -> None:
    reference = siglip(encoder)
    with torch.no_grad(), recorded(reference.encoder.layers) as expected:
        embedded = reference.embeddings(images)
        final = reference(images).last_hidden_state
        features, states = encoder(images, output_hidden_states=True)
    expected = [embedded, *expected]
    assert len(states) == encoder.config.num_hidden_layers + 1 == len(expected)
    for found, wanted in zip(states, expected, strict=True):
        assert 0.5 < wanted.std() < 4, "the comparison is meant at unit scale"
        assert greatest_difference(found, wanted) <= TOLERANCE
    assert greatest_difference(features, final) <= TOLERANCE


@pytest.mark.parametrize("config", SHAPES, ids=["5x5", "3x3", "9x9"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_layer(config: VisionConfig, batch: int) -> None:
    assert_every_layer_equals(encode(config), pictures(batch, config=config))


@pytest.mark.slow
def test_every_layer_at_full_size() -> None:
    config = VisionConfig()
    encoder = randomize(allocate(VisionEncoder, config))
    assert_every_layer_equals(encoder, pictures(1, config=config))


def assert_bfloat16_errs_no_more(encoder: VisionEncoder, images: Tensor) -> None:
    half = in_bfloat16(encoder)
    exact_reference, half_reference = siglip(encoder), siglip(half, attention="sdpa")
    with torch.no_grad():
        with recorded(exact_reference.encoder.layers) as exact:
            exact.append(exact_reference(images).last_hidden_state)
        with recorded(half_reference.encoder.layers) as theirs:
            theirs.append(half_reference(images.bfloat16()).last_hidden_state)
        features, states = half(images, output_hidden_states=True)
    assert features.dtype == torch.bfloat16
    for error, reference_error in bf16_errors([*states[1:], features], theirs, exact):
        assert error <= 1.1 * reference_error


@pytest.mark.parametrize("config", SHAPES, ids=["5x5", "3x3", "9x9"])
def test_bfloat16_errs_no_more_than_transformers(config: VisionConfig) -> None:
    assert_bfloat16_errs_no_more(encode(config), pictures(16, config=config))


@pytest.mark.slow
def test_bfloat16_at_full_width_and_depth() -> None:
    config = VisionConfig(image_size=9 * 14)  # fewer patches: bf16 is slow on many CPUs
    encoder = randomize(allocate(VisionEncoder, config))
    assert_bfloat16_errs_no_more(encoder, pictures(1, config=config))


def resized(table: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """(side * side, D) -> (rows * columns, D), by PIL's antialiased bicubic filter."""
    channels = table.T.unflatten(1, (side, side)).numpy()
    size = (columns, rows)
    planes = [Image.fromarray(c, mode="F").resize(size, Image.Resampling.BICUBIC) for c in channels]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes])).flatten(1).T


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (3, 3), (4, 9), (5, 2), (1, 1)])
def test_another_grid_interpolates_the_position_table(rows: int, columns: int) -> None:
    """Up, down and sideways: bicubic with antialias, which PIL does too, by code of its own."""
    config = SHAPES[0]
    encoder = encode(config)
    images = torch.randn(2, 3, 7 * rows, 7 * columns, generator=torch.Generator().manual_seed(1))
    table = resized(encoder.position_embedding.weight.detach(), 5, rows, columns)
    with torch.no_grad():
        _, (embedded, *_) = encoder(images, output_hidden_states=True)
        patches = encoder.patch_embedding(images).flatten(2).transpose(1, 2)
    assert greatest_difference(embedded, patches + table) <= TOLERANCE


def test_another_grid_runs_through_the_whole_tower() -> None:
    encoder = encode(SHAPES[0])
    larger = VisionConfig(**{**SHAPES[0].to_dict(), "image_size": 56})
    images = pictures(2, config=larger)
    expected = encode(larger)
    weights = encoder.state_dict()
    weights["position_embedding.weight"] = resized(weights["position_embedding.weight"], 5, 8, 8)
    expected.load_state_dict(weights)
    with torch.no_grad():
        found = encoder(images)
    assert greatest_difference(found, siglip(expected)(images).last_hidden_state) <= TOLERANCE


def test_a_size_with_the_same_grid_uses_the_table_as_it_is() -> None:
    """378 and 384 pixels both hold 27 patches of 14; here 35 and 41 hold 5 of 7."""
    encoder = encode(SHAPES[0])
    images = torch.randn(1, 3, 41, 38, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images[:, :, :35, :35]))
