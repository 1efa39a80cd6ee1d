"""Whether a model's connector has ever been trained: a fresh one has to learn much faster.

Nothing in a folder says so, but the weights do. Fresh ones are spread evenly between two bounds
that follow from the layer's width, as PyTorch draws them; the first steps of training already carry
some of them beyond, and fill the middle.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from nanomolmo2.accelerate.quantization import is_quantized
from nanomolmo2.convert.pretrained import load_connector
from nanomolmo2.training.setup import KNOWN

ROUNDING = 2.0**-8  # of weights in bfloat16
SPREAD = 0.02  # by which the standard deviation of many weights may miss the expected one


def has_fresh_connector(model: str) -> bool:
    """Whether the connector of a model has fresh weights; on the hub none has.

    Args:
        model: a folder, ``tiny``, ``base`` or a name on the hub, as a recipe has it.
    Raises: ValueError for a folder that holds no whole model.
    """
    is_folder = Path(model).expanduser().is_dir()
    if model == "base" or (model in KNOWN and "/" not in model) or not is_folder:
        return model == "base"
    connector = load_connector(model)
    return not is_quantized(connector) and is_fresh(connector)


@torch.no_grad()
def is_fresh(module: nn.Module) -> bool:
    """Whether all linear layers of a module are as PyTorch makes them: uniform from -1 to 1, over
    the square root of their inputs.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return bool(layers) and all(map(_is_fresh, layers))


def _is_fresh(layer: nn.Linear) -> bool:
    weight, bound = layer.weight.float(), layer.in_features**-0.5
    if weight.abs().max() > bound * (1 + ROUNDING):
        return False
    # Of n uniform numbers the deviation is bound / sqrt(3), give or take 0.45 / sqrt(n) of it.
    deviation = math.sqrt(float(weight.square().mean())) * math.sqrt(3) / bound
    return abs(deviation - 1) <= SPREAD + 2 / math.sqrt(weight.numel())
