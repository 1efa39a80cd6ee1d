"""How modules are exchanged: in place, for subclasses of what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def swap(model: Model, classes: Mapping[type[nn.Module], type[nn.Module]]) -> Model:
    """Give every module of exactly a class in ``classes`` the class it is mapped to.

    A subclass that only computes otherwise needs no new object: parameters, hooks, names in the
    state dict and whatever refers to the module stay as they are.
    """
    for module in model.modules():
        if new := classes.get(type(module)):
            module.__class__ = new
    return model


def replace_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another object in the place of that name, in the module's mode (training or not)."""
    parent, _, child = name.rpartition(".")
    layer.train(module.training)
    setattr(module.get_submodule(parent), child, layer)
