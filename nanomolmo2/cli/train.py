"""``nanomolmo2 train``: a recipe, or own data."""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from nanomolmo2.cli.options import MODEL_HELP, AtLeast, CacheDir, Debug, PointsScale, UsageError
from nanomolmo2.cli.output import note, say

if TYPE_CHECKING:
    from nanomolmo2.training.recipe import Recipe
    from nanomolmo2.training.run_folder import Resume

# Options that stand for a field of the recipe: of the same name, but for the last.
RECIPE_FIELDS = {
    name: name for name in ("steps", "seed", "save_every", "keep", "sequence_length", "max_crops")
} | {"max_bad_share": "max_bad_fraction"}
SEEDS = 2**32  # as many as the generators know


@dataclass(frozen=True)
class Train:
    """Train a model by a recipe, or on your own data.

    nanomolmo2 train smoke --out runs/smoke shows in seconds that everything works; nanomolmo2 train
    --data my.jsonl --model tiny trains the bundled model on own pictures, questions and answers.

    Writes checkpoints, recipe.json, log.jsonl (one line a step) and, when it is done, the model to
    DIR/model. SIGTERM and Ctrl-C save what was done and end with 143 and 130. With torchrun the
    same command trains on many processes.
    """

    recipe: Annotated[
        Positional[str],
        arg(
            metavar="RECIPE",
            help="smoke, tiny (the bundled model from scratch), base, stage1, stage2, stage3, "
            "finetune (with --data it may be left out), or a .json file, such as the recipe.json "
            "of another run",
        ),
    ] = ""
    out: Annotated[
        Path | None, arg(metavar="DIR", help="folder of the run; none = runs/ and the recipe")
    ] = None
    data: Annotated[
        tuple[str, ...],
        arg(
            metavar="FILE...",
            help="files or folders of examples in place of the recipe's; the format is in "
            "docs/data.md",
        ),
    ] = ()
    pictures: Annotated[
        Path | None,
        arg(metavar="DIR", help="folder of the pictures of --data; none = paths go out from FILE"),
    ] = None
    points_scale: Annotated[
        PointsScale,
        arg(help="of the points of records of --data that do not say it; unit: 0 to 1 of a side"),
    ] = "pixels"
    model: Annotated[
        str | None,
        arg(
            metavar="MODEL",
            help=f"whose weights to start from, in place of the recipe's: {MODEL_HELP}",
        ),
    ] = None
    steps: Annotated[
        int | None,
        arg(metavar="N", help="updates, in place of the recipe's; sets the schedule"),
        AtLeast(1),
    ] = None
    lora: Annotated[
        bool,
        arg(
            help="with finetune: leave the language model as it is and train small matrices "
            "beside its layers, which takes far less memory; they are merged at the end"
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
    max_bad_share: Annotated[
        float | None,
        arg(
            metavar="SHARE",
            help="share of the examples that may be bad and are left out, 0 to below 1, such as "
            "0.2; with more the run stops; none = the recipe's, mostly 0.05",
        ),
    ] = None
    max_steps: Annotated[
        int | None,
        arg(
            metavar="N",
            help="stop after step N of the run, to be resumed; beyond the recipe's steps it makes "
            "the recipe longer",
        ),
        AtLeast(1),
    ] = None
    save_every: Annotated[
        int | None,
        arg(metavar="N", help="steps between checkpoints; none = as the recipe says"),
        AtLeast(1),
    ] = None
    keep: Annotated[
        int | None,
        arg(metavar="K", help="newest checkpoints that stay, beside the best; none = 2"),
        AtLeast(1),
    ] = None
    seed: Annotated[
        int | None,
        arg(metavar="SEED", help="of fresh weights and of the data; none = the recipe's, mostly 0"),
        AtLeast(0),
    ] = None
    resume: Annotated[
        bool,
        arg(
            help="go on with the run in DIR where it stopped, as if it never had; where there is "
            "no checkpoint yet it starts anew, and says so"
        ),
    ] = False
    require_checkpoint: Annotated[
        bool, arg(help="as --resume, but end with an error where there is no checkpoint")
    ] = False
    scale: Annotated[
        Literal["full", "small", "smoke"],
        arg(
            help="of tiny, how long: full makes the shipped model (between six and seven hours "
            "on two cores), small shows that it learns, smoke only that everything runs"
        ),
    ] = "full"
    stop_after: Annotated[
        int | None,
        arg(metavar="STEPS", help="stop after so many steps of this call, to be resumed"),
        AtLeast(1),
    ] = None
    workers: Annotated[
        int,
        arg(
            metavar="N",
            help="processes that prepare data: 0 = prepare it between the steps; more than 1 only "
            "for tiny",
        ),
        AtLeast(0),
    ] = 1
    log_to: Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb"], ...],
        arg(help="beside log.jsonl; each needs the extra of its name"),
    ] = ()
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        self._check()
        # Idle threads of torch would spin and take the core that the data workers need.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from nanomolmo2.training.loop import Stopped

        name = self.recipe or "finetune"
        out = self.out or Path("runs") / Path(name).stem
        again = f"go on with: nanomolmo2 train {name} --out {shlex.quote(str(out))} --resume"
        if name == "tiny" and self.scale != "full":
            again += f" --scale {self.scale}"
        try:
            finished = self._train_tiny(out) if name == "tiny" else self._train(name, out)
        except Stopped as stopped:
            note(f"nanomolmo2: {stopped}; {again}")
            raise SystemExit(stopped.code) from None
        if os.environ.get("RANK", "0") != "0":
            return
        model = out / "model"
        if not finished:
            say(f"stopped; {again}")
        elif name == "tiny":
            say(f"wrote {model}; measure it with: nanomolmo2 eval emoji --model {model}")
        else:
            quoted = shlex.quote(str(model))
            say(f"wrote {model}; try it with: nanomolmo2 ask PICTURE QUESTION --model {quoted}")

    @property
    def _resume(self) -> Resume:
        return "required" if self.require_checkpoint else self.resume

    def _check(self) -> None:
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise UsageError(f"--seed must be 0 to {SEEDS - 1}, found {self.seed}")
        if self.max_bad_share is not None and not 0 <= self.max_bad_share < 1:
            raise UsageError(
                f"--max-bad-share must be 0 to below 1, a share of the examples such as 0.2, found "
                f"{self.max_bad_share}"
            )
        for name in map(str, (*self.data, self.model or "", self.out or "")):
            if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise UsageError(
                    f"the name {name!a} holds bytes that are no text in UTF-8, and recipe.json has "
                    f"to hold it: rename the file or folder"
                )
        if not self.recipe and not self.data and not (self._resume and self.out):
            raise UsageError(
                "expected a recipe or --data FILE, as in: nanomolmo2 train smoke --out runs/smoke"
            )
        of_recipes = (
            self.data,
            self.model,
            self.steps,
            self.lora,
            self.feature_cache,
            self.log_to,
            self.sequence_length,
            self.max_crops,
            self.max_bad_share is not None,
        )
        if not self.data and (self.pictures or self.points_scale != "pixels"):
            raise UsageError("--pictures and --points-scale are of --data: give that too")
        if self.recipe == "tiny" and any(of_recipes):
            raise UsageError(
                "--data, --model, --steps, --lora, --feature-cache, --log-to, --sequence-length, "
                "--max-crops and --max-bad-share are not for the recipe tiny, which makes the "
                "bundled model; to train that on your data leave the recipe out"
            )
        if self.recipe != "tiny" and self.scale != "full":
            raise UsageError("--scale is for the recipe tiny; --steps sets the length of others")
        if self.lora and self.recipe not in ("", "finetune"):
            raise UsageError("--lora is for finetune: leave the recipe out")

    def _train_tiny(self, out: Path) -> bool:
        from nanomolmo2.emoji.train import train_tiny
        from nanomolmo2.training.loop import LoopConfig

        given: dict[str, Any] = {"save_every": self.save_every, "keep": self.keep}
        config = LoopConfig(
            stop_after=self.stop_after,
            stop_at=self.max_steps,
            workers=self.workers,
            **{name: value for name, value in given.items() if value is not None},
        )
        return train_tiny(
            out, scale=self.scale, seed=self.seed or 0, resume=self._resume, config=config
        )

    def _train(self, name: str, out: Path) -> bool:
        from nanomolmo2.training.trainer import train_recipe

        return train_recipe(
            self._recipe(name, out),
            out,
            resume=self._resume,
            max_steps=self.max_steps,
            stop_after=self.stop_after,
            workers=self.workers,
            log_to=self.log_to,
            cache_dir=self.cache_dir,
        )

    def _recipe(self, name: str, out: Path) -> Recipe:
        """The recipe with what the command line changes of it."""
        from nanomolmo2.data.sources import SourceConfig
        from nanomolmo2.recipes import finetune, recipe
        from nanomolmo2.training.recipe import Recipe
        from nanomolmo2.training.run_folder import MODEL_FOLDER, RECIPE_FILE

        stored, model = out / RECIPE_FILE, self.model
        began = Recipe.load(stored) if self._resume and stored.is_file() else None
        start = model or "tiny"
        if began is not None and model is not None and same_place(model, out / MODEL_FOLDER):
            start, model = began.model, None  # the result of the run itself: it goes on
        if began is not None and not self.data and not self.lora:
            made = began
            if self.recipe and (wanted := Path(self.recipe).stem) != made.name:
                expected = recipe(self.recipe).name if self.recipe.endswith(".json") else wanted
                if expected != made.name:
                    raise ValueError(
                        f"{out} holds a run of the recipe {made.name}, not of {expected}: name "
                        f"that one, or choose another folder"
                    )
        elif name == "finetune":
            if not self.data and self._resume:
                raise ValueError(
                    f"there is nothing to resume in {out}, which has no {RECIPE_FILE}: name the "
                    f"folder of a run, or a recipe or --data FILE to start anew"
                )
            if not self.data:
                raise UsageError("finetune needs data: give --data FILE")
            steps = self.steps or (began.steps if began is not None else 40)
            made = finetune(self.data, start, steps=steps, lora=self.lora)
        else:
            made = recipe(name)
        changes: dict[str, Any] = {
            field: value
            for option, field in RECIPE_FIELDS.items()
            if (value := getattr(self, option)) is not None
        }
        if self.data:
            folder, scale = str(self.pictures or ""), self.points_scale
            changes["data"] = tuple(
                SourceConfig(path, image_folder=folder, points_scale=scale) for path in self.data
            )
        if self.feature_cache is not None:
            changes["feature_cache"] = str(self.feature_cache)
        if model is not None:  # its own sizes, then
            changes |= {"model": model, "architecture": None, "vision": "", "llm": ""}
        return dataclasses.replace(made, **changes)


def same_place(a: str | Path, b: str | Path) -> bool:
    """Whether two names are of one folder that is there."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)
