"""``nanomolmo2 plan``: what a training run needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from nanomolmo2.cli.options import AtLeast, Debug, UsageError, parse_size
from nanomolmo2.cli.output import say

# Options that stand for a field of the recipe of the same name.
RECIPE_FIELDS = ("batch_size", "micro_batch_size", "sequence_length", "max_crops")


@dataclass(frozen=True)
class Plan:
    """Predict what a training run needs: memory of each GPU, tokens a step, steps.

    Nothing is loaded or started. Where the memory is not enough, it says which switch would make
    the run fit. docs/scaling.md tells how the prediction is made and how far off it was.
    """

    recipe: Annotated[
        Positional[str],
        arg(
            metavar="RECIPE", help="as of `nanomolmo2 train`, but for tiny: a name or a .json file"
        ),
    ]
    gpus: Annotated[
        int,
        arg(metavar="N", help="processes of the run, one a GPU; batch_size is a multiple"),
        AtLeast(1),
    ] = 1
    gpu_memory: Annotated[
        str | None,
        arg(metavar="SIZE", help="of one GPU, such as 80GB or 24GiB; none = only predict"),
    ] = None
    device: Annotated[
        Literal["cuda", "cpu"],
        arg(help="where it will run; for cuda, 2 GB are set aside for what is not the model's"),
    ] = "cuda"
    architecture: Annotated[
        str | None,
        arg(
            metavar="PRESET",
            help="sizes of the model where the recipe names a folder that is not there yet: "
            "nanomolmo2, nanomolmo2-pooling, molmo2-4b, molmo2-8b, tiny",
        ),
    ] = None
    batch_size: Annotated[
        int | None, arg(metavar="N", help="rows a step on all GPUs, in place of the recipe's")
    ] = None
    micro_batch_size: Annotated[
        int | None, arg(metavar="N", help="rows that pass the model at once on each GPU, likewise")
    ] = None
    sequence_length: Annotated[
        int | None, arg(metavar="TOKENS", help="of a row, in place of the recipe's")
    ] = None
    max_crops: Annotated[
        int | None, arg(metavar="N", help="crops or pictures of a row, likewise")
    ] = None
    debug: Debug = False

    def run(self) -> None:
        limit = None if self.gpu_memory is None else parse_size(self.gpu_memory, "--gpu-memory")
        if self.recipe == "tiny":
            raise UsageError("tiny's stages are its own and fit into 2 GB: choose another recipe")
        from nanomolmo2.recipes import recipe
        from nanomolmo2.training.plan import report, setup_for

        changes = {name: getattr(self, name) for name in RECIPE_FIELDS}
        changes = {name: value for name, value in changes.items() if value is not None}
        made = dataclasses.replace(recipe(self.recipe), **changes)
        say(report(setup_for(made, self.gpus, self.device, self.architecture), limit))
