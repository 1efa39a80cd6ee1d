"""Tensors to files, with the permissions that other files get."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that those can read whom the umask lets.

    safetensors alone makes files that only their owner can read. Raises: as its ``save_file``.
    """
    with path.open("wb") as stream:
        mode = os.fstat(stream.fileno()).st_mode & 0o7777
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    if path.stat().st_mode & 0o7777 != mode:
        path.chmod(mode)
