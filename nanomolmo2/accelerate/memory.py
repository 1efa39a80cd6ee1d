"""Less memory at the peak: images in groups, and freed memory given back to the system.

B images, N patches.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanomolmo2.accelerate.swap import swap
from nanomolmo2.models.face import VisionEncoder
from nanomolmo2.models.language_model import DecoderLayer

Model = TypeVar("Model", bound=nn.Module)

# Activations of the images that go through together where no graph is kept. Measured: an image
# takes the same time alone and in groups of 2 to 8, so two of full size are enough for a CPU.
GROUP_BYTES = {"cpu": 128 * 2**20}
GROUP_BYTES_ELSEWHERE = 2**30  # a GPU is not busy with two
TRIMMED_LAYERS = 2  # backward trims behind as many
_LARGE = 2**20  # bytes


def group_images(model: Model) -> Model:
    """Let images go through the encoder in groups where no graph is kept.

    Swaps `VisionEncoder` for `GroupedVisionEncoder`: beside the result the memory does not grow
    with the number of images.
    """
    return swap(model, {VisionEncoder: GroupedVisionEncoder})


class GroupedVisionEncoder(VisionEncoder):
    """`VisionEncoder` whose ``features`` take some images at a time."""

    def features(
        self,
        images: Tensor,
        layers: Sequence[int] | None = None,
        *,
        max_bytes: int | None = None,
    ) -> Tensor:
        """As of `VisionEncoder`.

        Args:
            max_bytes: activations of a group, about; never less than one image.
        """
        B = len(images)
        keeps_graph = torch.is_grad_enabled() and not self.frozen
        group = B if keeps_graph else self._group(images, max_bytes)
        if group >= B:
            return super().features(images, layers)
        features: Tensor | None = None
        with torch.no_grad():
            for start in range(0, B, group):
                part = super().features(images[start : start + group], layers)
                if features is None:
                    features = part.new_empty(B, *part.shape[1:])
                features[start : start + group] = part
        assert features is not None
        return features

    def _group(self, images: Tensor, max_bytes: int | None) -> int:
        """Images that may go through together; wrong shapes are for :meth:`forward` to refuse."""
        if images.ndim not in (3, 4):
            return len(images)
        if max_bytes is None:
            max_bytes = GROUP_BYTES.get(images.device.type, GROUP_BYTES_ELSEWHERE)
        P = self.config.patch_size
        rows, columns = (side // P for side in images.shape[-2:])
        N = rows * columns if images.ndim == 4 else images.shape[1]
        # The peak is in the MLP: its inner width before and after the GELU, beside the residual,
        # the norm in float32 and the result.
        widths = 2 * self.config.intermediate_size + 4 * self.config.hidden_size
        size = max(1, N) * widths * self.position_embedding.weight.element_size()
        return max(1, max_bytes // size)


def trim_memory(model: Model) -> Model:
    """Trim freed memory in backward, where activations are large.

    Hooks every `TRIMMED_LAYERS`-th block of the decoder; swaps nothing.
    """
    blocks = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    for block in blocks[::TRIMMED_LAYERS]:
        if not any(hook is _trim_behind for hook in block._forward_pre_hooks.values()):
            block.register_forward_pre_hook(_trim_behind)
    return model


def _trim_behind(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """When backward has come to the block's input, :func:`trim`."""
    x = inputs[0]
    if torch.is_grad_enabled() and x.requires_grad:
        x.register_hook(trim)


def trim(x: Tensor) -> None:
    """Give memory that was freed back to the system, where ``x`` is large and on a CPU.

    Backward frees activations and makes gradients, which are larger and do not fit into the gaps.
    glibc would hold on to these: a tenth of the peak of a training step. In a small model they are
    soon filled.
    """
    if x.device.type == "cpu" and x.nbytes >= _LARGE:
        malloc_trim = _malloc_trim()
        if malloc_trim is not None:
            malloc_trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Of glibc; None elsewhere."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found
