"""Speed and memory, put on a model from outside.

The nets in models/ say the mathematics once. Every function here takes a model, exchanges some of
its modules in place for subclasses that compute the same in another way, and returns it; each says
what it swaps. Names in the state dict stay.

    model = NanoMolmo2(config)           # plain
    model = accelerate.onednn(model)     # float32 linear layers call oneDNN
    model = accelerate.defaults(model)   # all that `load`, `Pipeline` and the trainer put on
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from nanomolmo2.accelerate.checkpointing import checkpoint_activations
from nanomolmo2.accelerate.cross_entropy import chunked_loss
from nanomolmo2.accelerate.flex import block_masks
from nanomolmo2.accelerate.fused import fuse_projections
from nanomolmo2.accelerate.linear import bf16_matmul, onednn
from nanomolmo2.accelerate.memory import group_images, trim_memory
from nanomolmo2.accelerate.norm import lean_norms
from nanomolmo2.accelerate.quantization import quantize

__all__ = [
    "bf16_matmul",
    "block_masks",
    "checkpoint_activations",
    "chunked_loss",
    "defaults",
    "fuse_projections",
    "group_images",
    "lean_norms",
    "onednn",
    "quantize",
    "trim_memory",
]

Model = TypeVar("Model", bound=nn.Module)


def defaults(model: Model) -> Model:
    """Everything that changes no result and costs nothing: for a model as it is loaded or trained.

    oneDNN products, fused projections, lean norms, images in groups, the chunked loss, selective
    checkpointing, block masks for long rows, and trimming of freed memory.
    """
    for apply in (
        onednn,
        fuse_projections,
        lean_norms,
        group_images,
        chunked_loss,
        checkpoint_activations,
        block_masks,
        trim_memory,
    ):
        model = apply(model)
    return model
