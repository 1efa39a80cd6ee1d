"""``nanomolmo2 export``: a model in the format of other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from nanomolmo2.cli.loading import files_of, load_model, note_words_left, precision
from nanomolmo2.cli.options import (
    MODEL_HELP,
    CacheDir,
    Debug,
    DeviceName,
    StoredDType,
    UsageError,
)
from nanomolmo2.cli.output import check_model_folder, note, say


@dataclass(frozen=True)
class Export:
    """Write a model in a format that other programs serve.

    molmo2-hf is the layout of the released Molmo2 checkpoints, which transformers (5.23 or newer)
    and vLLM (with --trust-remote-code) read; only models with the attention-pooling connector fit
    into it. molmo-point-hf is that of the released MolmoPoint checkpoints, for models that point by
    selecting what they see; nothing but nanomolmo2 was tried on it.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help=MODEL_HELP)]
    out: Annotated[Positional[Path], arg(metavar="OUT", help="folder to write")]
    format: Annotated[
        Literal["molmo2-hf", "molmo-point-hf"] | None,
        arg(help="layout of the folder; none = the one of the model's design"),
    ] = None
    max_shard_size: Annotated[
        str,
        arg(metavar="SIZE", help="largest weight file, such as 5GB or 500MB; more are split"),
    ] = "5GB"
    device: DeviceName = None
    dtype: StoredDType = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?\s*[KMGT]B", self.max_shard_size, re.IGNORECASE):
            raise UsageError(
                f"--max-shard-size must be a size such as 5GB or 500MB, found {self.max_shard_size}"
            )
        check_model_folder(self.out, files_of(self.model))
        import warnings

        from nanomolmo2.convert import export_molmo2, export_molmo_point

        options = precision(self.dtype, device=self.device)
        model, processor = load_model(self.model, self.cache_dir, **options)
        points = model.config.point_config is not None
        format = self.format or ("molmo-point-hf" if points else "molmo2-hf")
        export = export_molmo2 if format == "molmo2-hf" else export_molmo_point
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            export(model, self.out, processor, max_shard_size=self.max_shard_size)
        for remark in remarks:
            note(f"warning: {remark.message}")
        note_words_left(self.model, "exported")
        say(f"wrote {self.out}")
