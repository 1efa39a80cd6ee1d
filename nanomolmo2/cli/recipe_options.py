"""Options that decide what a training run computes, and the recipe that they make.

`Train` and `Plan` inherit them, so that a run can be planned by the options it will be started
with. To add one: a field of `RecipeOptions`, what is refused of it in a method that
`check_recipe_options` calls, and what it changes of the recipe in a method that `_changed` calls.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from nanomolmo2.cli.options import (
    MODEL_HELP,
    AtLeast,
    PictureFolder,
    PointsScale,
    UsageError,
    option,
)

if TYPE_CHECKING:
    from nanomolmo2.training.recipe import Recipe, ValidationConfig

# Options that stand for a field of the recipe: of the same name, but for the last.
RECIPE_FIELDS = {
    name: name
    for name in (
        *("seed", "batch_size", "micro_batch_size", "sequence_length", "max_crops"),
        *("dtype", "replay"),
    )
} | {"max_bad_share": "max_bad_fraction"}
PARTS = ("vision", "connector", "llm", "embeddings", "points", "lora")  # as training has them
SEEDS = 2**32  # as many as the generators know


@dataclass(frozen=True)
class RecipeOptions:
    """Everything of the command line that decides what a run computes."""

    recipe: Annotated[
        Positional[str],
        arg(
            metavar="RECIPE",
            help="smoke, tiny (the bundled model from scratch), find (from tiny, one that finds by "
            "example), base, stage1, stage2, stage3, "
            "molmo_point_stage1, molmo_point_stage2, molmo_point_stage3, gui, finetune (with "
            "--data it may be left out), or a .json file, such as the recipe.json of another run",
        ),
    ] = ""

    # ---- data ----

    data: Annotated[
        tuple[str, ...],
        arg(
            metavar="FILE...",
            help="files or folders of examples in place of the recipe's; the format is in "
            "docs/data.md",
        ),
    ] = ()
    pictures: PictureFolder = None
    points_scale: Annotated[
        PointsScale,
        arg(help="of the points of records of --data that do not say it; unit: 0 to 1 of a side"),
    ] = "pixels"
    max_bad_share: Annotated[
        float | None,
        arg(
            metavar="SHARE",
            help="share of the examples that may be bad and are left out, 0 to below 1, such as "
            "0.2; with more the run stops; none = the recipe's, mostly 0.05",
        ),
    ] = None

    # ---- the model, and what of it learns ----

    model: Annotated[
        str | None,
        arg(
            metavar="MODEL",
            help=f"whose weights to start from, in place of the recipe's: {MODEL_HELP}",
        ),
    ] = None
    connector: Annotated[
        Literal["linear", "mlp", "resampler", "pooling"] | None,
        arg(
            help="with base: what joins vision encoder and language model; linear and mlp give a "
            "token for each of the 729 patches, resampler 64 tokens a picture, pooling is Molmo2's "
            "design, with crops, for which alone there are exports; none = linear"
        ),
    ] = None
    vision: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help="with base: SigLIP checkpoint to start from, a folder or owner/name on the hub; "
            "none = google/siglip2-so400m-patch14-384",
        ),
    ] = None
    llm: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help="with base: Qwen3 checkpoint to start from, likewise; none = Qwen/Qwen3-0.6B-Base",
        ),
    ] = None
    train: Annotated[
        tuple[str, ...],
        arg(
            metavar="PART...",
            help="what learns: vision, connector, llm, embeddings, and of models that point by "
            "selecting what they see points; none = the recipe's, and of own data the connector, "
            "the llm and points, of models below 100 M weights all of them",
        ),
    ] = ()
    lora: Annotated[
        bool,
        arg(
            help="with finetune: leave the language model as it is and train small matrices "
            "beside its layers, which takes far less memory; they are merged at the end"
        ),
    ] = False
    lora_rank: Annotated[
        int | None,
        arg(metavar="R", help="of these matrices, and --lora with it; none = 16"),
        AtLeast(1),
    ] = None
    qlora: Annotated[
        bool,
        arg(
            help="--lora beside layers that are rounded to 4 bits, a quarter of the memory of "
            "bfloat16; slower, and the model that is written has the rounded values. On a GPU the "
            "extra qlora (bitsandbytes) is faster, the numbers are the same"
        ),
    ] = False
    qlora_bits: Annotated[
        Literal[4, 8] | None,
        arg(help="--qlora with so many bits a weight; none = 4 (nf4); 8 (int8) rounds less"),
    ] = None
    points: Annotated[
        bool,
        arg(
            help="with finetune: let a model that writes the coordinates of points as text learn "
            "to point by selecting what it sees (docs/points.md); its point modules start at "
            "random, so give it many points"
        ),
    ] = False
    feature_cache: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="keep the features of a frozen vision encoder there: each picture is encoded "
            "once, the losses are the same",
        ),
    ] = None

    replay: Annotated[
        float | None,
        arg(
            metavar="SHARE",
            help="share of the examples that comes from what the model was trained on, where its "
            "card names a built-in source (tiny: its scenes), so that it keeps what it knows: 0 to "
            "below 1, 0 = none; none = the recipe's, 0.3 with finetune",
        ),
    ] = None

    # ---- how long and how fast ----

    lr: Annotated[
        float | None,
        arg(
            metavar="RATE",
            help="peak learning rate of the llm, or of its LoRA, or of what learns without them; "
            "other parts keep their ratio to it (--set optimisers.vision.lr=1e-5 sets one), and a "
            "connector that was never trained has at least 2e-4; none = the recipe's, or what "
            "suits the model",
        ),
    ] = None
    epochs: Annotated[
        float | None,
        arg(
            metavar="N",
            help="how often the data are seen, in place of --steps, which follow from the lengths "
            "of the examples and are said before the first; 0.5 = half of the data",
        ),
    ] = None
    steps: Annotated[
        int | None,
        arg(
            metavar="N",
            help="updates, in place of the recipe's; sets the schedule; none with own data = by "
            "their size",
        ),
        AtLeast(1),
    ] = None
    batch_size: Annotated[
        int | None,
        arg(
            metavar="N",
            help="rows a step on all processes together, in place of the recipe's; a row holds as "
            "many whole examples as fit",
        ),
        AtLeast(1),
    ] = None
    micro_batch_size: Annotated[
        int | None,
        arg(
            metavar="N",
            help="rows that pass the model at once on each process, likewise: fewer take less "
            "memory and compute the same",
        ),
        AtLeast(1),
    ] = None
    seed: Annotated[
        int | None,
        arg(metavar="SEED", help="of fresh weights and of the data; none = the recipe's, mostly 0"),
        AtLeast(0),
    ] = None

    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        arg(
            help="of the arithmetic and of the finished model, in place of the recipe's; weights "
            "learn in float32 always"
        ),
    ] = None

    # ---- rows ----

    sequence_length: Annotated[
        int | None,
        arg(
            metavar="TOKENS",
            help="of a row, which holds whole examples; none = the recipe's, or what suits the "
            "model; its positions are the limit",
        ),
        AtLeast(1),
    ] = None
    max_crops: Annotated[
        int | None,
        arg(metavar="N", help="crops, pictures or frames that a row holds, likewise"),
        AtLeast(1),
    ] = None

    # ---- how it is measured meanwhile ----

    val: Annotated[
        tuple[str, ...],
        arg(
            metavar="FILE...",
            help="examples that are not learned from, in the forms of --data: their loss and the "
            "scores of some answers are logged, and DIR/model is the best step's",
        ),
    ] = ()
    val_share: Annotated[
        float | None,
        arg(
            metavar="SHARE",
            help="in place of --val: hold out this share of the pictures of --data with all that "
            "is asked about them, such as 0.1; DIR/split.json says which",
        ),
    ] = None
    val_every: Annotated[
        int | None,
        arg(
            metavar="N",
            help="steps between measurements; none = an eighth of the run, at most 500",
        ),
        AtLeast(1),
    ] = None
    val_limit: Annotated[
        int | None,
        arg(
            metavar="N",
            help="validation examples whose answers are scored each time, which is slow on a CPU; "
            "0 = only the loss; none = 32",
        ),
        AtLeast(0),
    ] = None
    best: Annotated[
        str | None,
        arg(
            metavar="MEASURE",
            help="what chooses the step of DIR/model: val_loss, a task whose score is logged, such "
            "as count, or last; none = val_loss",
        ),
    ] = None
    patience: Annotated[
        int | None,
        arg(
            metavar="N",
            help="stop early: after so many measurements in a row without a better one; none or 0 "
            "= never",
        ),
        AtLeast(0),
    ] = None

    # ---- anything else ----

    settings: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            name="set",
            metavar="FIELD=VALUE",
            help="any field of the recipe, by its path in recipe.json, such as clip_norm=0.5, "
            "optimisers.llm.warmup_steps=20 or data.0.sampling_weight=0.3; several: --set A=1 "
            "--set B=2",
        ),
    ] = ()

    # ---- what cannot be ----

    def check_recipe_options(self) -> None:
        """Raises: UsageError for what no recipe can be made of."""
        self._check_data()
        self._check_parts()
        self._check_learning()
        self._check_length()
        self._check_numbers()
        self._check_validation()

    def _check_data(self) -> None:
        check_text(*self.data, self.model or "", self.vision or "", self.llm or "")
        if not self.data and (self.pictures or self.points_scale != "pixels"):
            raise UsageError(
                "--images (--pictures) and --points-scale are of --data: give that too"
            )
        if self.pictures is not None and not self.pictures.expanduser().is_dir():
            raise UsageError(
                f"--images is {self.pictures}, which is no folder: name the one in which the "
                f"pictures of --data lie"
            )

    def _check_parts(self) -> None:
        given = [name for name in ("connector", "vision", "llm") if getattr(self, name) is not None]
        if given and self.recipe != "base":
            raise UsageError(
                f"{option(given[0])} is for the recipe base, which joins two parts by a fresh "
                f"connector: nanomolmo2 train base {option(given[0])} {getattr(self, given[0])}"
            )
        if given and self.model is not None:
            raise UsageError(
                f"{option(given[0])} starts from parts and --model from a whole model: give one of "
                f"them"
            )

    def _check_learning(self) -> None:
        for part in self.train:
            if part not in PARTS:
                near = difflib.get_close_matches(part, PARTS, n=1)
                hint = f" (perhaps {near[0]}?)" if near else ""
                raise UsageError(
                    f"--train names {part[:60]!r}, expected some of {', '.join(PARTS[:-1])}{hint}"
                )
        for name, wanted in (("--lora", self.wants_lora), ("--points", self.points)):
            if wanted and not self.is_finetune:
                raise UsageError(f"{name} is for finetune: leave the recipe out")
        if self.wants_lora and "llm" in self.train:
            raise UsageError(
                "LoRA leaves the llm as it is, and --train names it: leave llm out, or --lora, "
                "--lora-rank and --qlora"
            )
        if self.feature_cache is not None and "vision" in self.train:
            raise UsageError(
                "--feature-cache keeps the features of a frozen vision encoder: leave vision out "
                "of --train, or the cache out"
            )

    def _check_length(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs both say how long to train: give one of them")
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{option(name)} must be above 0, found {value:g}")

    def _check_numbers(self) -> None:
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise UsageError(f"--seed must be 0 to {SEEDS - 1}, found {self.seed}")
        if self.max_bad_share is not None and not 0 <= self.max_bad_share < 1:
            raise UsageError(
                f"--max-bad-share must be 0 to below 1, a share of the examples such as 0.2, found "
                f"{self.max_bad_share}"
            )
        if self.replay is not None and not 0 <= self.replay < 1:
            raise UsageError(
                f"--replay must be 0 to below 1, a share of the examples such as 0.3, found "
                f"{self.replay}"
            )

    def _check_validation(self) -> None:
        check_text(*self.val, self.best or "")
        if self.val and self.val_share is not None:
            raise UsageError("--val and --val-share both say what to measure on: give one of them")
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise UsageError(
                f"--val-share must be above 0 and below 1, a share of the pictures such as 0.1, "
                f"found {self.val_share}"
            )

    # ---- the recipe ----

    @property
    def wants_lora(self) -> bool:
        """Whether matrices beside the llm are to learn in its place."""
        return self.lora or self.lora_rank is not None or "lora" in self.train or self.wants_qlora

    @property
    def wants_qlora(self) -> bool:
        """Whether the layers beside them are to be rounded."""
        return self.qlora or self.qlora_bits is not None

    @property
    def is_finetune(self) -> bool:
        """Whether the recipe is made for the data and the model, and not one of a name."""
        return self.recipe in ("", "finetune")

    def make_recipe(self, began: Recipe | None = None) -> Recipe:
        """The recipe with what the command line changes of it.

        Args:
            began: of the run that goes on. What is not given stays as it is there, and so does the
                length: what was derived from the data must not change with them.
        Raises: UsageError where there is nothing to train on, and for ``--set``; ValueError for an
            unknown recipe or model, and for values that do not fit together.
        """
        if began is not None:
            self._check_same_parts(began)
            return self._with_settings(self._changed(began))
        made = self._with_settings(self._with_fresh_rate(self._changed(self._start())))
        # Once more: the length of a run sets warm-ups, of which people may have said their own.
        return self._with_settings(self._with_length(made))

    def _start(self) -> Recipe:
        """The recipe before the changes."""
        from nanomolmo2.recipes import base_of, finetune, recipe
        from nanomolmo2.recipes.length import FEWEST

        if self.connector or self.vision or self.llm:
            return base_of(self.connector or "linear", self.vision or "", self.llm or "")
        if not self.is_finetune:
            return recipe(self.recipe)
        if not self.data:
            raise UsageError("finetune needs data: give --data FILE")
        # Its length is found when the rows are known.
        start = self.model or "tiny"
        return finetune(
            self.data, start, steps=FEWEST, lora=self.wants_lora, lr=self.lr, points=self.points
        )

    def _check_same_parts(self, began: Recipe) -> None:
        """Raises: ValueError for parts that a run which goes on does not have."""
        sizes = began.architecture
        connector = "linear" if sizes is None else sizes.connector.connector_type
        had = {"connector": connector, "vision": began.vision, "llm": began.llm}
        for name, found in had.items():
            wanted = getattr(self, name)
            if wanted is not None and found and wanted != found:
                raise ValueError(
                    f"the run that goes on has {option(name)} {found}, not {wanted}: leave it out, "
                    f"or choose another folder"
                )

    def _changed(self, recipe: Recipe) -> Recipe:
        """A recipe with every option that was given in place of its own values, but its length."""
        changes: dict[str, Any] = {
            field: value
            for name, field in RECIPE_FIELDS.items()
            if (value := getattr(self, name)) is not None
        }
        changes |= self._data_changes() | self._model_changes()
        changes |= {"point_head": True} if self.points else {}
        changes["validation"] = self._validation(recipe.validation)
        recipe = self._with_learning(dataclasses.replace(recipe, **changes))
        if self.feature_cache is not None:
            recipe = dataclasses.replace(recipe, feature_cache=str(self.feature_cache))
        return recipe

    def _data_changes(self) -> dict[str, Any]:
        from nanomolmo2.data.sources import SourceConfig

        if not self.data:
            return {}
        folder, scale = str(self.pictures or ""), self.points_scale
        return {
            "data": tuple(
                SourceConfig(path, image_folder=folder, points_scale=scale) for path in self.data
            )
        }

    def _validation(self, before: ValidationConfig | None) -> ValidationConfig | None:
        """How the run is measured; ``before``: by the recipe."""
        from nanomolmo2.data.sources import SourceConfig
        from nanomolmo2.training.recipe import ValidationConfig

        values: dict[str, Any] = {"every": self.val_every, "limit": self.val_limit}
        values |= {"best": self.best, "patience": self.patience}
        given = {name: value for name, value in values.items() if value is not None}
        if self.val:
            folder, scale = str(self.pictures or ""), self.points_scale
            data = [SourceConfig(p, image_folder=folder, points_scale=scale) for p in self.val]
            given |= {"data": tuple(data), "share": 0.0}
        elif self.val_share is not None:
            given |= {"data": (), "share": self.val_share}
        elif given and before is None:
            raise UsageError(
                "--val-every, --val-limit, --best and --patience are of a validation: give --val "
                "FILE or --val-share 0.1 too"
            )
        if before is not None:
            return dataclasses.replace(before, **given)
        return ValidationConfig(**given) if given else None

    def _model_changes(self) -> dict[str, Any]:
        if self.model is None:
            return {}
        # Its own sizes, then.
        return {"model": self.model, "architecture": None, "vision": "", "llm": ""}

    def _with_learning(self, recipe: Recipe) -> Recipe:
        """What learns, and how fast."""
        from nanomolmo2.recipes import changes

        if self.wants_lora:
            recipe = changes.with_lora(recipe, self.lora_rank)
        if self.wants_qlora:
            recipe = changes.with_qlora(recipe, self.qlora_bits or 4)
        if self.train:
            recipe = changes.with_parts(recipe, self.train)
        elif self.feature_cache is not None and self.is_finetune:
            recipe = changes.with_parts(recipe, [p for p in recipe.train if p != "vision"])
        return recipe if self.lr is None else changes.with_rate(recipe, self.lr)

    def _with_fresh_rate(self, recipe: Recipe) -> Recipe:
        """A connector that was never trained learns fast, unless --lr is about it alone."""
        from nanomolmo2.recipes.finetune import with_fresh_rate

        is_its_own = self.lr is not None and recipe.leading_part == "connector"
        if is_its_own or (self.model is None and self.lr is None):
            return recipe
        return with_fresh_rate(recipe)

    def _with_length(self, recipe: Recipe) -> Recipe:
        from nanomolmo2.recipes import changes, length

        if self.steps is not None:
            return changes.with_steps(recipe, self.steps)
        if self.epochs is not None:
            return length.with_epochs(recipe, self.epochs)
        if not self.is_finetune:
            return recipe
        return length.with_default_length(recipe, more_rows=self.batch_size is None)

    def _with_settings(self, recipe: Recipe) -> Recipe:
        from nanomolmo2.recipes.changes import with_values

        try:
            return with_values(recipe, self.settings)
        except ValueError as error:
            raise UsageError(f"--set: {error}") from None


def check_text(*names: str) -> None:
    """Raises: UsageError for the first name that a recipe.json cannot hold."""
    for name in names:
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UsageError(
                f"the name {name!a} holds bytes that are no text in UTF-8, and recipe.json has "
                f"to hold it: rename the file or folder"
            )


def same_place(a: str | Path, b: str | Path) -> bool:
    """Whether two names are of one folder that is there."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)
