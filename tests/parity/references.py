"""The same weights in transformers: an implementation that we did not write.

The references share the memory of our weights, so full-size nets fit beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from nanomolmo2.convert.reference_config import (
    llm_config_to_reference,
    vision_config_to_reference,
)
from nanomolmo2.convert.state_dict import to_reference
from nanomolmo2.convert.tables import QWEN3, SIGLIP2, SIGLIP2_PREFIX
from nanomolmo2.models import LanguageModel, VisionEncoder


def siglip(ours: VisionEncoder, attention: str = "eager") -> SiglipVisionModel:
    """transformers' vision tower, without the pooling head, on the weights of ours."""
    values = vision_config_to_reference(ours.config)
    config = SiglipVisionConfig(**values, attn_implementation=attention)
    with torch.device("meta"):
        reference = SiglipVisionModel(config)
    weights = to_reference(ours.state_dict(), SIGLIP2)
    weights = {name.removeprefix(SIGLIP2_PREFIX): weight for name, weight in weights.items()}
    reference.load_state_dict(weights, strict=True, assign=True)
    reference.embeddings.position_ids = torch.arange(ours.config.num_patches)[None]
    return reference.eval()


def qwen3(ours: LanguageModel, attention: str = "eager") -> Qwen3ForCausalLM:
    """transformers' decoder on the weights of ours."""
    config = Qwen3Config(**llm_config_to_reference(ours.config), attn_implementation=attention)
    with torch.device("meta"):
        reference = Qwen3ForCausalLM(config)
    weights = to_reference(ours.state_dict(), QWEN3)
    if ours.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    reference.load_state_dict(weights, strict=True, assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    return reference.eval()


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """The output of every block of the reference, in the order they run."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def bf16_errors(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor]
) -> Iterator[tuple[float, float]]:
    """Pairs of our and the reference's bf16 error against float32: mean and near-largest.

    The 99.9th percentile stands for the largest: the one largest of thousands of roundings moves by
    20 % with the order of a sum.
    """
    assert len(ours) == len(theirs) == len(exact)
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        error, reference_error = (a.float() - truth).abs(), (b.float() - truth).abs()
        assert reference_error.mean() > 0
        yield error.mean().item(), reference_error.mean().item()
        yield largest(error), largest(reference_error)


def largest(error: Tensor) -> float:
    return error.flatten().kthvalue(math.ceil(0.999 * error.numel())).values.item()
