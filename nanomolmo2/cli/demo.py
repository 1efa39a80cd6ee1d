"""``nanomolmo2 demo``: the bundled model on a bundled image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from nanomolmo2.cli.loading import load_pipeline, precision
from nanomolmo2.cli.options import AtLeast, Debug, DeviceName, DType, UsageError
from nanomolmo2.cli.output import check_writable

DRAWING = Path("demo.png")
PORT = 8000


@dataclass(frozen=True)
class Demo:
    """Let the bundled model caption, count and point on a bundled picture.

    With --serve you ask, in a browser: about that picture, and about your own.
    """

    draw: Annotated[
        Path, arg(metavar="FILE", help="where to write the picture with the points on it")
    ] = DRAWING
    serve: Annotated[
        bool,
        arg(
            help="serve the page instead, as `nanomolmo2 serve` does, and open it in a browser, "
            "where there is a screen; Ctrl-C ends it"
        ),
    ] = False
    port: Annotated[
        int, arg(metavar="PORT", help="with --serve; 0 = one that is free"), AtLeast(0)
    ] = PORT
    device: DeviceName = None
    dtype: DType = None
    debug: Debug = False

    def run(self) -> None:
        if not self.serve:
            if self.port != PORT:
                raise UsageError("--port is of the page: add --serve, or leave it out")
            return self._answer()
        if self.draw != DRAWING:
            raise UsageError(
                "--draw is of the demo without --serve: the page saves pictures itself"
            )
        from nanomolmo2.cli.serve import Serve

        page = Serve(port=self.port, open=True, device=self.device, dtype=self.dtype)
        page.run()

    def _answer(self) -> None:
        from nanomolmo2.demo import DEMO, run_demo

        check_writable(self.draw, inputs=[DEMO / "scene.png"])
        options = precision(self.dtype, device=self.device)
        run_demo(self.draw, load=lambda: load_pipeline("tiny", Path("checkpoints"), **options))
