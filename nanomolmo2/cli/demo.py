"""``nanomolmo2 demo``: the bundled model on a bundled image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from nanomolmo2.cli.loading import load_pipeline, precision
from nanomolmo2.cli.options import Debug, DeviceName, DType
from nanomolmo2.cli.output import check_writable


@dataclass(frozen=True)
class Demo:
    """Let the bundled model caption, count and point on a bundled picture."""

    draw: Annotated[
        Path, arg(metavar="FILE", help="where to write the picture with the points on it")
    ] = Path("demo.png")
    device: DeviceName = None
    dtype: DType = None
    debug: Debug = False

    def run(self) -> None:
        from nanomolmo2.demo import DEMO, run_demo

        check_writable(self.draw, inputs=[DEMO / "scene.png"])
        options = precision(self.dtype, device=self.device)
        run_demo(self.draw, load=lambda: load_pipeline("tiny", Path("checkpoints"), **options))
