"""What the vision encoder does beside its numbers (those are in tests/parity)."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from nanomolmo2.accelerate import checkpoint_activations, group_images
from nanomolmo2.models import VisionConfig, VisionEncoder
from tests.nets import VISION, encode, greatest_difference, pictures


def test_the_defaults_are_siglip_2() -> None:
    config = VisionConfig()
    assert (config.image_size, config.patch_size, config.patches_per_side) == (384, 14, 27)
    assert (config.num_patches, config.head_dim) == (729, 72)
    assert (config.hidden_size, config.intermediate_size) == (1152, 4304)
    assert (config.num_hidden_layers, config.num_attention_heads) == (27, 16)
    assert config.layer_norm_eps == 1e-6
    with torch.device("meta"):
        encoder = VisionEncoder()
        assert sum(p.numel() for p in encoder.parameters()) == 412_987_248
        assert encoder(torch.empty(2, 3, 384, 384)).shape == (2, 729, 1152)
        assert encoder(torch.empty(2, 3, 378, 378)).shape == (2, 729, 1152)
        assert encoder(torch.empty(1, 3, 56, 140)).shape == (1, 40, 1152)


def test_freezing_keeps_evaluation_mode_and_leaves_no_graph() -> None:
    encoder = encode(VISION)
    assert encoder.freeze() is encoder
    parent = nn.Sequential(encoder, nn.Linear(24, 4))
    parent.train()
    assert parent[1].training
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    features = encoder(pictures(1))
    assert features.grad_fn is None
    assert not features.requires_grad


def test_unfreezing_undoes_it() -> None:
    encoder = encode(VISION).freeze()
    assert encoder.unfreeze() is encoder
    assert all(p.requires_grad for p in encoder.parameters())
    encoder.train()
    assert all(module.training for module in encoder.modules())
    assert encoder(pictures(1)).requires_grad


def test_loading_weights_keeps_it_frozen() -> None:
    """Weights are assigned to a model built on the meta device; that must not thaw it."""
    weights = encode(VISION).state_dict()
    with torch.device("meta"):
        encoder = VisionEncoder(VISION).freeze()
    encoder.load_state_dict(weights, assign=True)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_layers_on_request_are_block_outputs_in_the_asked_order() -> None:
    encoder, images = encode(VISION), pictures(2)
    final, states = encoder(images, output_hidden_states=True)
    assert len(states) == 4
    last, first, again = encoder(images, layers=(-1, 0, 2))
    assert torch.equal(last, states[3])
    assert torch.equal(first, states[1])
    assert torch.equal(again, states[3])
    assert greatest_difference(last, final) > 0.1  # the final norm is not applied
    both, more = encoder(images, layers=(1,), output_hidden_states=True)
    assert torch.equal(both[0], states[2])
    assert len(more) == 4


def test_no_block_behind_the_deepest_asked_is_run() -> None:
    encoder = encode(VISION)
    ran = []
    for i, layer in enumerate(encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    encoder(pictures(1), layers=(-3, -2))
    assert ran == [0, 1]


def test_blocks_that_are_never_read_need_not_be_built() -> None:
    """Layers count from the end of the whole net, so that -2 stays the block it was."""
    whole, images = encode(VISION), pictures(2)
    cut = VisionEncoder(VISION, num_layers=2, post_layernorm=False)
    cut.load_state_dict({k: v for k, v in whole.state_dict().items() if k in cut.state_dict()})
    assert len(cut.layers) == 2
    assert not any("post_layernorm" in name for name, _ in cut.named_parameters())
    expected = whole(images, layers=(-2, -3))
    for found, wanted in zip(cut(images, layers=(-2, -3)), expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(cut(images), expected[0])
    with pytest.raises(ValueError, match="layer -1 of 3 was asked for, but 2 blocks are built"):
        cut(images, layers=(-1,))


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} of 3 was asked for"):
        encode(VISION)(pictures(1), layers=(0, layer))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain = encode(VISION).train()
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving, "full")
    images = pictures(2)
    runs = []
    for encoder in (plain, saving):
        calls = []
        encoder.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        features = encoder(images)
        features.square().mean().backward()
        runs.append((features, len(calls)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert [calls for _, calls in runs] == [1, 2], "a checkpointed block runs again for gradients"
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is not None and a.grad.any()) or "k_proj.bias" in name  # softmax ignores it
        assert torch.equal(a.grad, b.grad)


def test_norms_are_float32_whatever_the_weights_are() -> None:
    """In bfloat16 the spread of values near 1000 would be lost in their own rounding."""
    norm = encode(VISION).bfloat16().post_layernorm
    x = (1000 + 8 * torch.randn(4, 24, generator=torch.Generator().manual_seed(0))).bfloat16()
    expected = nn.functional.layer_norm(
        x.float(), (24,), norm.weight.float(), norm.bias.float(), norm.eps
    )
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), expected.bfloat16())


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((2, 1, 22, 22), r"\(2, 1, 22, 22\)"),
        ((2, 4, 22, 22), r"\(2, 4, 22, 22\)"),
        ((3, 22, 22), r"\(3, 22, 22\)"),
        ((2, 22, 22, 3), r"\(2, 22, 22, 3\)"),
        ((1, 3, 22, 6), r"\(1, 3, 22, 6\)"),
        ((1, 2, 3, 22, 22), r"\(1, 2, 3, 22, 22\)"),
    ],
)
def test_pictures_of_another_shape(shape: tuple[int, ...], found: str) -> None:
    message = rf"expected pictures of shape \(B, 3, H, W\) .* at least 7 pixels, found {found}"
    with pytest.raises(ValueError, match=message):
        encode(VISION)(torch.zeros(shape))


def test_pictures_must_be_normalised() -> None:
    with pytest.raises(ValueError, match=r"floating point pictures, found torch\.uint8: scale"):
        encode(VISION)(torch.zeros(1, 3, 22, 22, dtype=torch.uint8))


@pytest.mark.parametrize("layers", [None, (-1, 0)])
@pytest.mark.parametrize("form", ["pictures", "patches"])
def test_groups_of_pictures_equal_the_whole(form: str, layers: tuple[int, ...] | None) -> None:
    encoder = group_images(encode(VISION)).freeze()
    images = pictures(5)
    if form == "patches":
        P = VISION.patch_size
        windows = images.unfold(2, P, P).unfold(3, P, P)  # (B, 3, h, w, P, P)
        images = windows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    one = VISION.num_patches * (2 * VISION.intermediate_size + 4 * VISION.hidden_size) * 4  # bytes
    sizes: list[int] = []
    encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = encoder.features(images, layers)
    for max_bytes, expected in (
        (0, [1] * 5),
        (one, [1] * 5),
        (3 * one - 1, [2, 2, 1]),
        (9 * one, [5]),
    ):
        sizes.clear()
        found = encoder.features(images, layers, max_bytes=max_bytes)
        assert sizes == expected
        assert greatest_difference(found, whole) < 1e-5


def test_a_graph_is_kept_whole_and_only_where_it_is_used() -> None:
    encoder = group_images(encode(VISION))
    sizes: list[int] = []
    encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert encoder.features(pictures(3), max_bytes=0).requires_grad
    with torch.no_grad():
        assert not encoder.features(pictures(3), max_bytes=0).requires_grad
    assert not encoder.freeze().features(pictures(3), max_bytes=0).requires_grad
    assert sizes == [3, 1, 1, 1, 1, 1, 1]


PEAK = """
import resource, sys
import torch
from nanomolmo2.accelerate import group_images
from nanomolmo2.models import ConnectorConfig, NanoMolmo2, NanoMolmo2Config, LLMConfig, VisionConfig

torch.set_num_threads(1)
depth, crops = int(sys.argv[1]), int(sys.argv[2])
small = LLMConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                  num_attention_heads=2, num_key_value_heads=1, head_dim=32)
model = NanoMolmo2(NanoMolmo2Config(
    vision_config=VisionConfig(image_size=378, num_hidden_layers=depth),
    connector_config=ConnectorConfig(llm_dim=64, connector_type="pooling", vit_layers=(-1, -2)),
    llm_config=small, image_token_id=1))
group_images(model)
pixels = torch.randn(crops, 729, 588)
index = torch.arange(crops * 728).view(-1, 4)
with torch.no_grad():
    model.encode_images(pixels[:1], index[:182])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert model.encode_images(pixels, index).shape == (crops * 182, 64)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024)
"""


@pytest.mark.slow
def test_many_crops_need_little_memory() -> None:
    """24 crops at full width: the MLP alone would hold 1.2 GB at once, the depth adds nothing."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "2", "24"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.2e9
