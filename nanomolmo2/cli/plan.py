"""``nanomolmo2 plan``: what a training run needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from nanomolmo2.cli.options import AtLeast, Debug, UsageError, parse_size
from nanomolmo2.cli.output import say
from nanomolmo2.cli.recipe_options import RecipeOptions

if TYPE_CHECKING:
    from nanomolmo2.training.recipe import Recipe


@dataclass(frozen=True)
class Plan(RecipeOptions):
    """Predict what a training run needs: memory of each GPU, steps, epochs, tokens a step.

    It takes the options of nanomolmo2 train, and answers for that run: nanomolmo2 plan --data
    my.jsonl --model allenai/Molmo2-4B --lora --gpu-memory 24GB. No weights are loaded and nothing
    is started. Where the memory is not enough, it says which switch would make the run fit, those
    that harm least first. docs/scaling.md tells how the prediction is made and how far off it was.
    """

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
            "nanomolmo2, nanomolmo2-pooling, molmo2-4b, molmo2-8b, molmo-point-8b, "
            "molmo-point-vid-4b, tiny, tiny-point, tiny-find",
        ),
    ] = None
    debug: Debug = False

    def run(self) -> None:
        limit = None if self.gpu_memory is None else parse_size(self.gpu_memory, "--gpu-memory")
        if self.recipe in ("tiny", "find"):
            raise UsageError(
                f"the stages of {self.recipe} are its own and fit into 2 GB: choose another recipe"
            )
        if self.is_finetune and not self.data and not self.model:
            raise UsageError(
                "expected a recipe, --data FILE or --model MODEL, as in: nanomolmo2 plan --data "
                "my.jsonl --model tiny"
            )
        self.check_recipe_options()
        from nanomolmo2.training.plan import report, setup_for

        made, data = self._recipe_and_data()
        say(report(setup_for(made, self.gpus, self.device, self.architecture), limit, data))

    def _recipe_and_data(self) -> tuple[Recipe, list[str]]:
        """The recipe of the run, and lines on its data."""
        if self._is_elsewhere or (
            self.recipe == "base" and self.data and not self._can_count_tokens()
        ):
            return self._of_a_model_elsewhere()
        from nanomolmo2.recipes.length import amount_of
        from nanomolmo2.training.summary import how_much, warnings

        recipe = self.make_recipe()
        try:
            amount = amount_of(recipe)
        except (OSError, ValueError, ImportError):
            if self.data:
                raise
            return recipe, []  # the data of a recipe of a name need not be here
        return recipe, [how_much(recipe, amount), *warnings(recipe, amount)]

    def _can_count_tokens(self) -> bool:
        """Whether the language model of `base` has its tokenizer here, or in reach."""
        from nanomolmo2.convert.parts import LLM
        from nanomolmo2.convert.pretrained import TOKENIZER_NAME, find_directory

        try:
            find_directory(self.llm or LLM.repository, None, (TOKENIZER_NAME,))
        except OSError:
            return self.llm not in (None, LLM.repository)  # of others not even sizes are known
        return True

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the model is known by its sizes alone: nothing is downloaded to plan."""
        from nanomolmo2.training.setup import known_config

        if self.is_finetune and not self.data:
            return True
        name = self.model or ""
        return name not in ("", "tiny") and known_config(name) is not None

    def _of_a_model_elsewhere(self) -> tuple[Recipe, list[str]]:
        """Without the tokenizer of the model, records are counted and not their tokens."""
        from nanomolmo2.data.sources import open_mixture
        from nanomolmo2.recipes.length import FEWEST

        steps = self.steps or (FEWEST if self.is_finetune else None)
        options = dataclasses.replace(self, steps=steps, epochs=None)
        if not self.data:
            if self.is_finetune:
                options = dataclasses.replace(options, data=("my.jsonl",))
            return options.make_recipe(), [
                "data: none was named, so the steps are not those of a run: give --data"
            ]
        recipe = options.make_recipe()
        records = sum(len(source) for source in open_mixture(recipe.data, recipe.seed).sources)
        at_most = -(-records // recipe.batch_size)
        if self.epochs is not None:
            options = dataclasses.replace(options, steps=max(1, round(self.epochs * at_most)))
            recipe = options.make_recipe()
        return recipe, [
            f"data: {records:,} records; an epoch is {at_most:,} steps, or fewer where a row holds "
            f"several: how many is known with the model's tokenizer, which is not on this disk"
        ]
