"""Features of a frozen vision encoder, computed once per image and kept on disk.

One file an image (or crop): a tiny one has 55 KB, a full-size crop 3.4 MB, so files are neither
too many nor too large, and with one image in each, processes need no locks, a damaged file costs
one image, and a folder can be copied or emptied at any time. They are safetensors, read by
mapping them into memory.

An image's file is named after the content of its pixels, in a folder named after the encoder's
weights, sizes and layers: whatever changes has another name, and nothing is ever out of date.

B images, N patches, F feature width.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanomolmo2.convert.tensor_writer import save_tensors
from nanomolmo2.files import atomic_path, open_regular
from nanomolmo2.models import NanoMolmo2, VisionEncoder

FORMAT = 1  # goes into every name: another way to compute features is another encoder


@dataclass(frozen=True)
class CacheSize:
    """What lies on disk: of this encoder, and of others that used the same folder."""

    images: int
    bytes: int
    other_images: int
    other_bytes: int

    def __str__(self) -> str:
        text = f"{self.images:,} pictures, {self.bytes / 1e6:,.1f} MB"
        if self.other_images:
            text += (
                f"; of other encoders {self.other_images:,} pictures, "
                f"{self.other_bytes / 1e6:,.1f} MB, which can be deleted if these are not used"
            )
        return text


class FeatureCache:
    """Gives features of images as bfloat16 rounds them, from disk where they were there.

    Every image goes through the encoder alone, without autocast, so that its features do not
    depend on the images beside it. With a folder or without, the numbers are the same.

    Args:
        folder: where to keep features; None = nowhere, everything is computed each time.
        encoder: frozen.
        layers: as in :meth:`VisionEncoder.features`.
    Attributes:
        read, computed, damaged: images so far; damaged ones were computed again.
    """

    def __init__(
        self,
        folder: str | Path | None,
        encoder: VisionEncoder,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.encoder, self.layers = encoder, layers
        self.read = self.computed = self.damaged = 0
        self._write = True
        self._stamp = 0
        self._own = Path()

    @classmethod
    def of_model(cls, folder: str | Path | None, model: NanoMolmo2) -> Self:
        """The features that a model's connector reads: for its ``visual_features``."""
        return cls(folder, model.vision_encoder, model.config.connector.vit_layers)

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W) or crops (B, N, 3*P*P) -> (B, N, F), in the encoder's dtype.

        Raises: ValueError for an encoder with weights that train: nothing would reach them.
        """
        if any(p.requires_grad for p in self.encoder.parameters()):
            raise ValueError(
                "features of a vision encoder that trains change with every step: freeze it "
                "(encoder.freeze()), or train without a feature cache"
            )
        weight = self.encoder.position_embedding.weight
        if self.folder is not None:
            self._look_at_encoder()
        found = [self._one(image, weight.device) for image in pixel_values]
        return torch.stack(found).to(weight.dtype)

    def size(self) -> CacheSize:
        """Count the files of the folder."""
        if self.folder is None:
            return CacheSize(0, 0, 0, 0)
        self._look_at_encoder()
        own, other = [0, 0], [0, 0]
        for path in self.folder.glob("*/*/[!.]*.safetensors"):
            counted = own if path.parents[1] == self._own else other
            counted[0] += 1
            counted[1] += path.stat().st_size
        return CacheSize(*own, *other)

    def _one(self, image: Tensor, device: torch.device) -> Tensor:
        """(N, F) bfloat16 of one image."""
        if self.folder is None:
            return self._compute(image, device)
        name = _digest([image], f"{tuple(image.shape)} {image.dtype}")
        path = self._own / name[:2] / f"{name}.safetensors"
        features = self._load(path)
        if features is None:
            features = self._compute(image, device)
            self._save(path, features)
        return features.to(device)

    def _compute(self, image: Tensor, device: torch.device) -> Tensor:
        self.computed += 1
        with torch.autocast(device.type, enabled=False):
            return self.encoder.features(image[None].to(device), self.layers)[0].bfloat16()

    def _load(self, path: Path) -> Tensor | None:
        """A file's features; None if there is none, or it is damaged."""
        if not path.exists():
            return None
        try:
            open_regular(path).close()  # the library would wait for ever at a pipe
            with safe_open(path, framework="pt") as file:
                features: Tensor = file.get_tensor("features")
                if (file.metadata() or {}).get("crc32") != _checksum(features):
                    raise ValueError("its checksum is another")
        except FileNotFoundError:  # deleted in between
            return None
        except (SafetensorError, OSError, ValueError) as error:
            self.damaged += 1
            if self.damaged == 1:
                warnings.warn(
                    f"{path} is damaged ({error}): its features are computed again, and so are "
                    f"those of any others, without saying it each time",
                    stacklevel=2,
                )
            return None
        self.read += 1
        return features

    def _save(self, path: Path, features: Tensor) -> None:
        """Write aside and rename; two processes that do so at once write the same."""
        if not self._write:
            return
        features = features.cpu().contiguous()
        try:
            with atomic_path(path) as temporary:
                save_tensors({"features": features}, temporary, {"crc32": _checksum(features)})
        except (SafetensorError, OSError) as error:
            self._write = False
            warnings.warn(
                f"features cannot be kept in {self.folder} ({error}): is the disk full? The run "
                f"goes on and computes what is not there",
                stacklevel=2,
            )

    def _look_at_encoder(self) -> None:
        """Name the encoder's folder; hash its weights again only where they may have changed."""
        assert self.folder is not None
        state = self.encoder.state_dict()
        stamp = hash(tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in state.values()))
        if stamp != self._stamp or not self._own.name:
            head = [FORMAT, self.encoder.config.to_dict(), self.layers and list(self.layers)]
            head += [[n, list(t.shape), str(t.dtype)] for n, t in state.items()]
            # A GPU rounds otherwise than a CPU.
            head.append(self.encoder.position_embedding.weight.device.type)
            self._own = self.folder / _digest(list(state.values()), json.dumps(head))
            self._stamp = stamp


def _digest(tensors: Sequence[Tensor], head: str) -> str:
    """Hex digest of tensors' bytes behind a description."""
    hashed = hashlib.blake2b(head.encode(), digest_size=16)
    for tensor in tensors:
        hashed.update(bytes_of(tensor))
    return hashed.hexdigest()


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(bytes_of(tensor)):08x}"


def bytes_of(tensor: Tensor) -> memoryview:
    """The contents of a tensor on any device, whatever its type."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
