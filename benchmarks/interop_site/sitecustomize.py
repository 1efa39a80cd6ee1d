"""Lets torchvision be imported beside a PyTorch that it was not compiled for.

The wheels of torchvision are compiled for PyTorch with CUDA; without CUDA their operators do not
load, and the import stops at two that are missing. Nothing here calls them, so they are declared
and not defined. scripts/interop.py puts this folder on the path of the programs that it starts:
Python imports a module of this name when it starts.
"""

from __future__ import annotations

import sys
from typing import Any

_MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision:
    """A finder that finds nothing; asked for torchvision, it declares the operators."""

    libraries: list[Any] = []  # noqa: RUF012 - operators live as long as what declared them

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        from importlib.util import find_spec

        import torch

        found = find_spec("torchvision")
        if found is None or torch.version.cuda is not None:
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _MISSING:
            library.define(schema)
        self.libraries.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())  # type: ignore[arg-type]
