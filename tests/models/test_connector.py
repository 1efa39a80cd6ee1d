"""The connectors against their definitions, one number at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.molmo2.configuration_molmo2 import Molmo2AdapterConfig
from transformers.models.molmo2.modeling_molmo2 import Molmo2Adapter

from nanomolmo2.models import ConnectorConfig, MultimodalConnector
from nanomolmo2.models.connector import window_index
from tests.nets import greatest_difference, randomize

SMALL = ConnectorConfig(
    vision_dim=12,
    llm_dim=20,
    hidden_dim=14,
    num_query_tokens=5,
    num_attention_heads=4,
    intermediate_size=18,
)


def small(connector_type: str, **changes: object) -> MultimodalConnector:
    config = replace(SMALL, connector_type=connector_type, **changes)  # type: ignore[arg-type]
    return randomize(MultimodalConnector(config)).eval()


def features_of(batch: int, patches: int, width: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(batch, patches, width, generator=torch.Generator().manual_seed(seed))


def parameters_of(config: ConnectorConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MultimodalConnector(config).parameters())


def test_parameter_counts_of_the_base_design() -> None:
    assert parameters_of(ConnectorConfig()) == 1_180_672
    assert parameters_of(ConnectorConfig(connector_type="mlp")) == 4_459_520
    assert 7_500_000 < parameters_of(ConnectorConfig(connector_type="resampler")) < 9_000_000
    molmo2 = ConnectorConfig(connector_type="pooling", vit_layers=(-3, -9))
    assert parameters_of(molmo2) == 9_294_336 + 10_223_616


@pytest.mark.parametrize(
    ("connector_type", "tokens"),
    [("linear", 729), ("mlp", 729), ("resampler", 64), ("pooling", 196)],
)
def test_tokens_of_a_picture_of_the_base_design(connector_type: str, tokens: int) -> None:
    config = ConnectorConfig(connector_type=connector_type)  # type: ignore[arg-type]
    assert config.num_visual_tokens(729) == tokens
    with torch.device("meta"):
        connector = MultimodalConnector(config)
        assert connector(torch.empty(2, 729, 1152)).shape == (2, tokens, 1024)


@pytest.mark.parametrize("connector_type", ["linear", "mlp", "resampler", "pooling"])
@pytest.mark.parametrize("patches", [1, 9, 16, 25])
def test_the_number_of_tokens_is_what_the_config_says(connector_type: str, patches: int) -> None:
    connector = small(connector_type)
    tokens = connector(features_of(2, patches))
    assert tokens.shape == (2, connector.config.num_visual_tokens(patches), 20)


def test_linear_and_mlp() -> None:
    x = features_of(2, 7)
    linear, mlp = small("linear"), small("mlp")
    w = dict(linear.layers.named_parameters())
    assert greatest_difference(linear(x), x @ w["proj.weight"].T + w["proj.bias"]) < 1e-6
    w = dict(mlp.layers.named_parameters())
    inner = x @ w["fc1.weight"].T + w["fc1.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    assert greatest_difference(mlp(x), inner @ w["fc2.weight"].T + w["fc2.bias"]) < 1e-6


def test_resampler() -> None:
    """Norm, cross-attention, residual, norm, MLP, residual: head by head."""
    connector, x = small("resampler"), features_of(1, 9)[0]
    w = dict(connector.layers.named_parameters())

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    keys = norm(x, "norm_features")
    q = linear(norm(w["queries"], "norm_queries"), "attention.q_proj")
    k, v = linear(keys, "attention.k_proj"), linear(keys, "attention.v_proj")
    heads = []
    for h in range(4):
        part = slice(5 * h, 5 * h + 5)
        heads.append((q[:, part] @ k[:, part].T / math.sqrt(5)).softmax(-1) @ v[:, part])
    y = w["queries"] + linear(torch.cat(heads, dim=-1), "attention.o_proj")
    y = y + linear(F.gelu(linear(norm(y, "norm_mlp"), "fc1")), "fc2")
    assert greatest_difference(connector(x[None])[0], y) < 1e-5


@pytest.mark.parametrize("side", [4, 3, 5, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_pooling_window_by_window(side: int, size: int) -> None:
    """Mean of the patches that are there asks those patches, head by head, then SwiGLU."""
    connector = small("pooling", pooling_size=size, vit_layers=(-1, -2))
    w = dict(connector.layers.named_parameters())
    x = features_of(2, side * side, 24)

    def linear(y: Tensor, name: str) -> Tensor:
        name = f"image_pooling_2d.{name}"
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def pooled(picture: Tensor, window: list[int]) -> Tensor:
        patches = picture[window]
        q = linear(patches.mean(dim=0), "q_proj")
        k, v = linear(patches, "k_proj"), linear(patches, "v_proj")
        heads = []
        for h in range(4):
            part = slice(3 * h, 3 * h + 3)
            heads.append((k[:, part] @ q[part] / math.sqrt(3)).softmax(0) @ v[:, part])
        y = linear(torch.cat(heads), "o_proj")
        gate = F.silu(y @ w["image_projector.gate_proj.weight"].T)
        up = y @ w["image_projector.up_proj.weight"].T
        return (gate * up) @ w["image_projector.down_proj.weight"].T

    # Half of what an uneven grid lacks goes before, the rest behind.
    before = (-side % size) // 2
    starts = range(-before, side, size)
    expected = torch.stack(
        [
            torch.stack(
                [
                    pooled(
                        picture,
                        [
                            row * side + column
                            for row in range(top, top + size)
                            for column in range(left, left + size)
                            if 0 <= row < side and 0 <= column < side
                        ],
                    )
                    for top in starts
                    for left in starts
                ]
            )
            for picture in x
        ]
    )
    assert greatest_difference(connector(x), expected) < 1e-5


@pytest.mark.parametrize("side", [4, 5])
def test_pooling_equals_transformers(side: int) -> None:
    connector = small("pooling", vit_layers=(-1, -2))
    reference = Molmo2Adapter(
        Molmo2AdapterConfig(
            vision_feature_layer=[-1, -2],
            hidden_size=12,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=3,
            intermediate_size=18,
            text_hidden_size=20,
            attn_implementation="eager",
        )
    )
    reference.load_state_dict(connector.layers.state_dict(), strict=True)
    x = features_of(3, side * side, 24)
    index = window_index(side, side, 2)
    index = torch.cat([torch.where(index < 0, -1, index + i * side * side) for i in range(3)])
    with torch.no_grad():
        expected = reference.eval()(x, index).last_hidden_state
        assert greatest_difference(connector(x).flatten(0, 1), expected) < 1e-5


def test_window_index() -> None:
    assert window_index(2, 4, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    # Molmo2 cuts 27 patches into windows of 2: the one that lacks is behind.
    windows = [[0, 1, 3, 4], [2, -1, 5, -1], [6, 7, -1, -1], [8, -1, -1, -1]]
    assert window_index(3, 3, 2).tolist() == windows
    assert window_index(1, 1, 3).tolist() == [[-1, -1, -1, -1, 0, -1, -1, -1, -1]]
    index = window_index(27, 27, 2)
    assert index.shape == (196, 4)
    assert sorted(index[index >= 0].tolist()) == list(range(729))
    assert (index < 0).sum() == 55


def test_an_empty_slot_is_not_a_patch_of_zeros() -> None:
    """Zeros would still be attended to, through the key's bias, and pull the mean down."""
    connector = small("pooling")
    x = features_of(1, 9)
    corner = connector(x)[0, 3]  # the window that holds patch 8 alone
    alone = connector(x[:, 8:9])[0, 0]
    assert greatest_difference(corner, alone) < 1e-5


@pytest.mark.parametrize("shape", [(2, 9, 13), (9, 12), (1, 2, 9, 12)])
def test_features_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expects features of shape \(B, N, 12\), found"):
        small("linear")(torch.zeros(shape))


def test_joined_layers_widen_the_features() -> None:
    with pytest.raises(ValueError, match=r"\(B, N, 24\), found \(1, 9, 12\): does vision_dim fit"):
        small("pooling", vit_layers=(-1, -2))(features_of(1, 9))


def test_windows_by_index_equal_square_windows() -> None:
    """The index of whole pictures, written out, gives what the grid gives without one."""
    connector = small("pooling", pooling_size=2)
    features = features_of(3, 9, 12)[..., : connector.config.feature_dim]
    windows = window_index(3, 3, 2)
    index = torch.cat([torch.where(windows < 0, windows, windows + 9 * b) for b in range(3)])
    found = connector(features, index)
    assert greatest_difference(found, connector(features).flatten(0, 1)) < 1e-6


def test_trap_02_empty_slots_leave_the_mean_and_the_keys() -> None:
    """Wider windows padded with -1 give the same; a slot of zeros would be attended to."""
    connector = small("pooling")
    features = features_of(2, 9)
    index = torch.tensor([[0, 1, 3, 4], [5, -1, 8, -1], [9, 10, 12, 17]])
    wide = torch.nn.functional.pad(index, (0, 5), value=-1)
    found = connector(features, index)
    assert greatest_difference(connector(features, wide), found) < 1e-6
    short = connector(features, torch.tensor([[5, 8]]))
    assert greatest_difference(found[1:2], short) < 1e-6


def test_empty_windows_give_no_token() -> None:
    connector = small("pooling")
    features = features_of(1, 9)
    index = torch.tensor([[-1, -1], [0, 1], [-1, -1], [4, -1]])
    found = connector(features, index)
    assert found.shape == (2, connector.config.llm_dim)
    assert greatest_difference(found, connector(features, index[[1, 3]])) == 0
    assert connector(features, index[:1]).shape == (0, connector.config.llm_dim)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([[0, 9]]), r"runs from 0 to 9, but 1 crop\(s\) of 9 patches"),
        (torch.tensor([[-2, 0]]), "runs from -2 to 0"),
        (torch.tensor([0, 1]), r"shape \(tokens, slots\)"),
        (torch.tensor([[0.0]]), "integer type"),
    ],
)
def test_an_index_that_does_not_fit(index: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("pooling")(features_of(1, 9), index)


def test_an_index_is_for_the_pooling_connector() -> None:
    with pytest.raises(ValueError, match="belongs to the pooling connector, this one is 'linear'"):
        small("linear")(features_of(1, 9), torch.tensor([[0, 1]]))


def test_pooling_wants_a_square_grid() -> None:
    with pytest.raises(ValueError, match="square grid into windows, found 12 patches: send square"):
        small("pooling")(features_of(1, 12))


@pytest.mark.parametrize("connector_type", ["linear", "mlp", "resampler", "pooling"])
def test_bfloat16(connector_type: str) -> None:
    connector, x = small(connector_type), features_of(2, 9)
    exact = connector(x)
    half = connector.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert greatest_difference(half, exact) < 0.05 * exact.abs().max()
