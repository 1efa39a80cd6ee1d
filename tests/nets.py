"""Small nets with random weights for tests: odd sizes, activations near unit scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nanomolmo2.models import (
    ConnectorConfig,
    LLMConfig,
    NanoMolmo2,
    NanoMolmo2Config,
    VisionConfig,
    VisionEncoder,
)

Net = TypeVar("Net", bound=nn.Module)

# 3 x 3 patches (odd, so that 2 x 2 windows have empty slots); the last pixel of a side is not seen.
VISION = VisionConfig(
    image_size=22,
    patch_size=7,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
)
LLM = LLMConfig(
    vocab_size=89,
    hidden_size=36,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=128,
    rope_theta=10_000.0,
)
IMAGE, EOS, PAD = 80, 81, 82
NOISE = (
    1_048_583  # large weights repeat so many numbers: an odd count, so that no two rows are alike
)
RESIDUAL_ENDS = ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")


def randomize(net: Net, seed: int = 0) -> Net:
    """Fill every weight so that activations and residual stream stay near 1 and no logits are flat.

    Norms and biases get random values too: a norm that is left out, or a bias, then shows.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = max([len(m) for m in net.modules() if isinstance(m, nn.ModuleList)], default=1)

    with torch.no_grad():
        for name, weight in net.named_parameters():
            noise = torch.randn(min(weight.numel(), NOISE), generator=generator)
            for part in weight.view(-1).split(NOISE):
                part.copy_(noise[: len(part)])
            if "norm" in name and name.endswith("weight"):
                weight.mul_(0.2).add_(1.0)
            elif weight.ndim == 1:
                weight.mul_(0.2)
            else:
                weight.mul_(weight[0].numel() ** -0.5)
                if name.endswith(RESIDUAL_ENDS):
                    weight.mul_(depth**-0.5)
    return net


def small_config(connector_type: str = "linear", **changes: Any) -> NanoMolmo2Config:
    """A model of three layers and two; 9 visual tokens a picture, 5 (resampler) or 4 (pooling)."""
    layers = (-1, -3) if connector_type == "pooling" else None
    connector = ConnectorConfig(
        vision_dim=VISION.hidden_size,
        llm_dim=LLM.hidden_size,
        connector_type=connector_type,  # type: ignore[arg-type]
        hidden_dim=20,
        num_query_tokens=5,
        num_attention_heads=4,
        intermediate_size=28,
        vit_layers=layers,
    )
    values: dict[str, Any] = {
        "vision_config": VISION,
        "connector_config": connector,
        "llm_config": LLM,
        "image_token_id": IMAGE,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return NanoMolmo2Config(**{**values, **changes})


def small_model(connector_type: str = "linear", seed: int = 0, **changes: Any) -> NanoMolmo2:
    return randomize(NanoMolmo2(small_config(connector_type, **changes)), seed).eval()


def pictures(count: int, seed: int = 0, config: VisionConfig = VISION) -> Tensor:
    """(count, 3, H, W)."""
    size = config.image_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.num_channels, size, size, generator=generator)


def text_ids(*shape: int, seed: int = 0, vocab_size: int = IMAGE) -> Tensor:
    """Random ids below ``vocab_size``: none is an image, end or padding token."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def visual_tokens(model: NanoMolmo2, picture: Tensor) -> Tensor:
    """(n, D) of one picture (3, H, W), from the parts alone."""
    layers = model.config.connector.vit_layers
    features: Any = model.vision_encoder(picture[None], layers=layers)
    if layers is not None:
        features = torch.cat(features, dim=-1)
    return model.connector(features)[0]


def greatest_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; of tensors of the same shape, or it is an error."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    return (found.detach().float() - expected.detach().float()).abs().max().item()


def encode(config: VisionConfig, **options: Any) -> VisionEncoder:
    """A random vision encoder."""
    return randomize(VisionEncoder(config, **options)).eval()


def allocate(kind: Callable[[Any], Net], config: Any) -> Net:
    """A full-size net without its default initialisation, which takes long; randomize fills it."""
    with torch.device("meta"):
        net = kind(config)
    return net.to_empty(device="cpu").eval()


def in_bfloat16(net: Net) -> Net:
    """A copy in bfloat16."""
    with torch.device("meta"):
        half = type(net)(net.config)
    half.load_state_dict({k: v.bfloat16() for k, v in net.state_dict().items()}, assign=True)
    return half.eval()
