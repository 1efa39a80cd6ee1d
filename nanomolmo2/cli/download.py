"""``nanomolmo2 download``: the pretrained parts of the base design."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from nanomolmo2.cli.options import CacheDir, Debug, UsageError


@dataclass(frozen=True)
class Download:
    """Download SigLIP 2 and Qwen3-0.6B-Base and convert them, once.

    Makes siglip2_so400m_384.pt (float32, 1.6 GB of a 4.5 GB download) and qwen3_0.6b_base.pt
    (bfloat16, 1.2 GB), and for each a folder of the same name that holds the same weights as
    safetensors. An interrupted download goes on where it stopped.
    """

    vision_only: Annotated[bool, arg(help="only SigLIP 2")] = False
    llm_only: Annotated[bool, arg(help="only Qwen3-0.6B-Base")] = False
    force: Annotated[bool, arg(help="convert again, even where an intact file is there")] = False
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        if self.vision_only and self.llm_only:
            raise UsageError("--vision-only and --llm-only exclude each other: for both, give none")
        parts = ("vision",) * (not self.llm_only) + ("llm",) * (not self.vision_only)

        from nanomolmo2.convert.hub import download

        download(parts, self.cache_dir, force=self.force)
