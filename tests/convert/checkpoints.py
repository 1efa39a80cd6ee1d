"""Small reference checkpoints, made by transformers and saved in the real formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nanomolmo2.models import (
    ConnectorConfig,
    LLMConfig,
    NanoMolmo2,
    NanoMolmo2Config,
    VisionConfig,
)

VISION = VisionConfig(
    image_size=42,
    patch_size=14,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=2,
)
LLM = LLMConfig(
    vocab_size=120,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=512,
    rope_theta=50_000.0,
)


def make_siglip(directory: Path, *, whole: bool, **overrides: Any) -> Any:
    """Save a SiglipModel (``whole``) or SiglipVisionModel; returns transformers' vision model."""
    from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

    sizes = {**VISION.to_dict(), **overrides}
    torch.manual_seed(0)
    if whole:
        text = {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 60,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        model = SiglipModel(SiglipConfig(vision_config=sizes, text_config=text))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**sizes))
    _randomise(model)
    model.eval().save_pretrained(directory)
    return model.vision_model if whole else model


def make_qwen3(
    directory: Path,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Any:
    """Save a Qwen3ForCausalLM of the sizes of ``LLM``, some of them overridden."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {**LLM.to_dict(), "tie_word_embeddings": tied, **overrides}
    del sizes["additional_vocab_size"], sizes["predict_additional_vocab"]
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, rope_parameters=rope))
    _randomise(model)
    model.eval().to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def make_nanomolmo2(**changes: Any) -> NanoMolmo2:
    """A whole model with a pooling connector, so that blocks and norms are left out."""
    torch.manual_seed(2)
    values: dict[str, Any] = {
        "vision_config": VISION,
        "connector_config": ConnectorConfig(
            vision_dim=32,
            llm_dim=48,
            connector_type="pooling",
            num_attention_heads=2,
            intermediate_size=64,
            vit_layers=(-2, -3),
        ),
        "llm_config": LLM,
        "image_token_id": 100,
        "eos_token_id": (7, 8),
        "pad_token_id": 0,
    }
    return NanoMolmo2(NanoMolmo2Config(**{**values, **changes})).eval()


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_weights(path: Path, change: Any) -> None:
    """Rewrite a safetensors file with ``change(tensors)`` applied in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _randomise(model: torch.nn.Module) -> None:
    """Norms start at one and biases at zero, which would hide that they were mixed up."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
