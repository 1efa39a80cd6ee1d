"""``nanomolmo2 quantize``: a model with 8-bit or 16-bit weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from nanomolmo2.cli.loading import files_of, load_model, precision
from nanomolmo2.cli.options import (
    MODEL_HELP,
    AtLeast,
    CacheDir,
    Debug,
    DeviceName,
    StoredDType,
    UsageError,
)
from nanomolmo2.cli.output import check_model_folder, say
from nanomolmo2.terminal import visible

if TYPE_CHECKING:
    from nanomolmo2.accelerate.quantization import LayerError

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Quantize:
    """Write a model with 8-bit or 16-bit weights.

    The folder holds plain safetensors and gives the same answers as the model quantised in memory.
    The linear layers take half (fp16-weights) or a quarter (int8) of float32, the embedding table
    half. Prints the largest errors of single layers on the sample picture, the size, and how long
    the result takes to load.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help=MODEL_HELP)]
    out: Annotated[Positional[Path], arg(metavar="OUT", help="folder to write")]
    mode: Annotated[
        Literal["int8", "int8-weight-only", "fp16-weights"],
        arg(help="precision of the linear layers; embeddings, norms and the patches stay"),
    ] = "int8"
    max_error: Annotated[
        float | None,
        arg(
            metavar="E",
            help="with int8: layers with a larger relative error on the sample, such as 0.05, get "
            "fp16-weights; none = all layers are int8",
        ),
    ] = None
    calibrate: Annotated[
        bool,
        arg(
            help="with int8: move the outliers of activation channels into the weights, as the "
            "sample shows them"
        ),
    ] = False
    picture: Annotated[
        Path | None,
        arg(metavar="FILE", help="the sample; none = the demo's picture"),
    ] = None
    question: Annotated[str, arg(metavar="TEXT", help="what is asked about the sample")] = (
        "Describe this picture."
    )
    rows: Annotated[
        int, arg(metavar="N", help="layers to list, the largest errors first; 0 = none"), AtLeast(0)
    ] = 10
    device: DeviceName = None
    dtype: StoredDType = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        if self.max_error is not None and not self.max_error > 0:
            raise UsageError(f"--max-error must be above 0, found {self.max_error}")
        if self.mode != "int8" and (self.max_error is not None or self.calibrate):
            raise UsageError(
                f"--max-error and --calibrate are for --mode int8, found --mode {self.mode}"
            )
        image = self.picture or ASSETS / "demo" / "scene.png"
        check_model_folder(self.out, [*files_of(self.model), image])
        from nanomolmo2.accelerate.quantization import (
            count_weights,
            is_quantized,
            quantization_report,
        )
        from nanomolmo2.convert.pretrained import load, save_pretrained
        from nanomolmo2.generation.words import words_of
        from nanomolmo2.processor import collate

        options = precision(self.dtype, device=self.device)
        model, processor = load_model(self.model, self.cache_dir, **options)
        device = next(model.parameters()).device
        if is_quantized(model):
            raise ValueError(f"{self.model} is quantised already: name a floating point model")
        sample = processor.encode([{"role": "user", "content": self.question}], [image])
        batch = collate([sample], processor.pad_token_id).to(device).tensors()
        calibration = batch if self.calibrate else None
        report = quantization_report(model, batch, self.mode, calibration=calibration)
        report.sort(key=lambda row: -row.error)
        keep = [
            row.name for row in report if self.max_error is not None and row.error > self.max_error
        ]
        before = 4 * count_weights(model)
        model.quantize(self.mode, keep=keep, calibration=calibration)
        save_pretrained(model, self.out, processor)
        if (words := words_of(self.model)) is not None:  # they are found as before
            words.save(self.out)
        size = sum(f.stat().st_size for f in self.out.glob("*.safetensors"))
        start = time.perf_counter()
        load(str(self.out), device=device)
        seconds = time.perf_counter() - start
        if self.rows:
            print_layer_errors(report[: self.rows], len(report), set(keep))
        say(
            f"wrote {self.out}: {size / 1e6:,.1f} MB, {size / before:.0%} of float32; loads in "
            f"{seconds:.1f} s"
        )


def print_layer_errors(rows: Sequence[LayerError], total: int, kept: set[str]) -> None:
    """The relative errors of some layers, as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"relative error of the output, {len(rows)} of {total} layers, largest first"
    table = Table(title=title)
    table.add_column("layer", overflow="fold")
    for name in ("outputs x inputs", "precision", "error"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        shape = " x ".join(f"{side:,}" for side in row.shape)
        precision = "fp16-weights" if row.name in kept else row.mode
        table.add_row(Text(visible(row.name)), shape, precision, f"{row.error:.2%}")
    Console().print(table)
