"""``nanomolmo2 train``: a recipe, or own data."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from nanomolmo2.cli.loading import device_of, note_words_left
from nanomolmo2.cli.options import AtLeast, CacheDir, Debug, DeviceName, UsageError, option
from nanomolmo2.cli.output import note, say
from nanomolmo2.cli.recipe_options import RecipeOptions, check_text, same_place

if TYPE_CHECKING:
    from nanomolmo2.training.recipe import Recipe
    from nanomolmo2.training.run_folder import Resume

# Options of `Train` alone that stand for a field of the recipe.
RECIPE_FIELDS = ("save_every", "keep")
# Recipes of several stages, on data that they draw themselves.
STAGED = ("tiny", "find")


@dataclass(frozen=True)
class Train(RecipeOptions):
    """Train a model by a recipe, or on your own data.

    nanomolmo2 train smoke --out runs/smoke shows in seconds that everything works; nanomolmo2 train
    --data my.jsonl --model tiny trains the bundled model on own pictures, questions and answers.

    Writes checkpoints, recipe.json, log.jsonl (one line a step) and, when it is done, the model to
    DIR/model: with --val or --val-share that of the best step. SIGTERM and Ctrl-C save what was
    done and end with 143 and 130. With torchrun the same command trains on many processes.
    """

    out: Annotated[
        Path | None, arg(metavar="DIR", help="folder of the run; none = runs/ and the recipe")
    ] = None
    find_lr: Annotated[
        bool,
        arg(
            help="in place of the run: try growing learning rates for 80 steps, suggest one, and "
            "write the curve to DIR-find-lr; no model is written"
        ),
    ] = False
    max_steps: Annotated[
        int | None,
        arg(
            metavar="N",
            help="stop after step N of the run, to be resumed; beyond the recipe's steps it makes "
            "the recipe longer",
        ),
        AtLeast(1),
    ] = None
    minutes: Annotated[
        float | None,
        arg(
            metavar="N",
            help="with own data: how long the run may take, in place of --steps and --epochs; its "
            "first steps are timed, and as many are taken as fit",
        ),
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
        Literal["full", "small", "smoke", "finder", "more"],
        arg(
            help="of tiny and find, how long: full is the whole recipe (ten hours of tiny on two "
            "cores), small shows that it learns, smoke only that everything runs; finder, of find "
            "alone, leaves tiny what it is, with a finder: the shipped model; more has one that "
            "finds already learn on"
        ),
    ] = "full"
    drawings: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="of find: drawings to train on, as scripts/build_drawings.py writes them; none = "
            "the emoji that tiny is trained on",
        ),
    ] = None
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
            "for tiny and find",
        ),
        AtLeast(0),
    ] = 1
    log_to: Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb"], ...],
        arg(help="beside log.jsonl; each needs the extra of its name"),
    ] = ()
    device: DeviceName = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        self.check()
        # Idle threads of torch would spin and take the core that the data workers need.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from nanomolmo2.training.loop import Stopped

        name = self.recipe or "finetune"
        out = self.out or Path("runs") / Path(name).stem
        again = f"go on with: nanomolmo2 train {name} --out {shlex.quote(str(out))} --resume"
        if name in STAGED and self.scale != "full":
            again += f" --scale {self.scale}"
        if self.drawings is not None:
            again += f" --drawings {shlex.quote(str(self.drawings))}"
        if name == "find" and self.model is not None:
            again += f" --model {shlex.quote(str(self.model))}"
        if self.find_lr:
            self._find_lr(name, out)
            return
        try:
            finished = self._train_staged(out) if name in STAGED else self.train_into(out, name)
        except Stopped as stopped:
            note(f"nanomolmo2: {stopped}; {again}")
            raise SystemExit(stopped.code) from None
        if os.environ.get("RANK", "0") != "0":
            return
        model = out / "model"
        if not finished:
            say(f"stopped; {again}")
        elif name == "find":
            quoted = shlex.quote(str(model))
            say(f"wrote {model}; try it with: nanomolmo2 serve --model {quoted}")
        elif name == "tiny":
            say(f"wrote {model}; measure it with: nanomolmo2 eval emoji --model {model}")
        else:
            quoted = shlex.quote(str(model))
            say(f"wrote {model}; try it with: nanomolmo2 ask PICTURE QUESTION --model {quoted}")

    @property
    def _resume(self) -> Resume:
        return "required" if self.require_checkpoint else self.resume

    def check(self) -> None:
        """Raises: UsageError for options that do not go together."""
        check_text(str(self.out or ""))
        self.check_recipe_options()
        if not self.recipe and not self.data and not (self._resume and self.out):
            raise UsageError(
                "expected a recipe or --data FILE, as in: nanomolmo2 train smoke --out runs/smoke"
            )
        is_staged = self.recipe in STAGED
        if is_staged and (given := self._not_of_stages()):
            raise UsageError(
                f"{', '.join(given)} are not for the recipe {self.recipe}, which draws its own "
                f"data; to train the bundled model on yours leave the recipe out"
            )
        if self.find_lr and (is_staged or self._resume):
            raise UsageError(
                f"--find-lr looks for a rate before a run starts, from --data and a model: leave "
                f"--resume and the recipe {self.recipe or 'tiny'} out"
            )
        if not is_staged and self.scale != "full":
            raise UsageError(
                "--scale is for the recipe tiny, and find; --steps sets the length of others"
            )
        if self.recipe != "find" and self.drawings is not None:
            raise UsageError("--drawings is for the recipe find; --data names the data of others")

        self._check_minutes(is_staged)

    def _check_minutes(self, is_staged: bool) -> None:
        if self.minutes is None:
            return
        if not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise UsageError(f"--minutes must be above 0, found {self.minutes:g}")
        if self.steps is not None or self.epochs is not None:
            raise UsageError("--minutes says how long to train, and so do --steps and --epochs")
        if is_staged or self.find_lr or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "--minutes is for one process that trains on own data: leave it out, and give "
                "--steps"
            )

    def _not_of_stages(self) -> list[str]:
        """The options that were given and that the recipes `STAGED` do not have."""
        kept = ("recipe", "seed", "model") if self.recipe == "find" else ("recipe", "seed")
        given = [
            field.name
            for field in dataclasses.fields(RecipeOptions)
            if field.name not in kept and getattr(self, field.name) != field.default
        ]
        named = {"pictures": "--images", "settings": "--set"}
        return [named.get(name, option(name)) for name in (*given, *(self.log_to and ["log_to"]))]

    def _train_staged(self, out: Path) -> bool:
        from nanomolmo2.training.loop import LoopConfig

        given: dict[str, Any] = {"save_every": self.save_every, "keep": self.keep}
        config = LoopConfig(
            stop_after=self.stop_after,
            stop_at=self.max_steps,
            workers=self.workers,
            **{name: value for name, value in given.items() if value is not None},
        )
        if self.device is not None and device_of(self.device).type != "cpu":
            raise UsageError(
                f"--device is {self.device}, but the recipe {self.recipe} trains on the CPU only: "
                f"leave it out"
            )
        settings: dict[str, Any] = {
            "scale": self.scale,
            "seed": self.seed or 0,
            "resume": self._resume,
            "config": config,
        }
        if self.recipe == "find":
            from nanomolmo2.things.train import train_find
            from nanomolmo2.training.distributed import World

            with World.from_env("cpu") as world:
                return train_find(
                    out,
                    drawings=str(self.drawings or ""),
                    start=self.model or "tiny",
                    world=world,
                    **settings,
                )
        if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UsageError(
                f"torchrun started {ranks} processes, but the recipe {self.recipe} trains in one: "
                f"leave torchrun out"
            )
        from nanomolmo2.emoji.train import train_tiny

        return train_tiny(out, **settings)

    def train_into(self, out: Path, name: str = "finetune") -> bool:
        """Train in a folder. Returns: whether the run is done."""
        from nanomolmo2.training.distributed import World
        from nanomolmo2.training.trainer import train_recipe

        recipe = self.recipe_in(out, name)
        note_words_left(recipe.model, "trained")
        if self.device is not None:
            device_of(self.device)
        with World.from_env(self.device) as world:
            return train_recipe(
                recipe,
                out,
                resume=self._resume,
                max_steps=self.max_steps,
                stop_after=self.stop_after,
                workers=self.workers,
                log_to=self.log_to,
                world=world,
                cache_dir=self.cache_dir,
            )

    def _find_lr(self, name: str, out: Path) -> None:
        from nanomolmo2.training.distributed import World
        from nanomolmo2.training.find_lr import JSON_FILE, RULE, find_lr

        recipe, folder = self.recipe_in(out, name), out.with_name(f"{out.name}-find-lr")
        if self.device is not None:
            device_of(self.device)
        with World.from_env(self.device) as world:
            found = find_lr(recipe, folder, world=world, cache_dir=self.cache_dir)
        if os.environ.get("RANK", "0") != "0":
            return
        if found.suggested is None:
            say(
                "no rate made the loss fall, so none is suggested: look at the data (nanomolmo2 "
                "inspect), or let more parts learn (--train)"
            )
        else:
            parts = ", ".join(f"{part} {rate:.2g}" for part, rate in found.parts.items())
            say(f"train with --lr {found.parts[recipe.leading_part]:.2g} ({parts}): {RULE}")
        say(f"wrote {folder / JSON_FILE} and its picture, and no model")

    def recipe_in(self, out: Path, name: str = "finetune") -> Recipe:
        """The recipe with what the command line changes of it; of a run that goes on, its own."""
        from nanomolmo2.training.recipe import Recipe
        from nanomolmo2.training.run_folder import RECIPE_FILE

        stored = out / RECIPE_FILE
        began = Recipe.load(stored) if self._resume and stored.is_file() else None
        options = dataclasses.replace(self, recipe=name)
        if began is None and name == "finetune" and not self.data and self._resume:
            raise ValueError(
                f"there is nothing to resume in {out}, which has no {RECIPE_FILE}: name the "
                f"folder of a run, or a recipe or --data FILE to start anew"
            )
        if began is not None:
            options = self._options_of(began, out, options)
        made = options.make_recipe(began)
        changes = {name: getattr(self, name) for name in RECIPE_FIELDS}
        changes = {name: value for name, value in changes.items() if value is not None}
        made = dataclasses.replace(made, **changes)
        return made if self.minutes is None or began is not None else self._timed(made)

    def _timed(self, recipe: Recipe) -> Recipe:
        """The recipe with as many steps as there is time for."""
        from nanomolmo2.recipes.changes import with_steps
        from nanomolmo2.training.pace import measure_pace

        assert self.minutes is not None
        say(f"timing the first steps, to see how many {self.minutes:g} minutes are enough for")
        pace = measure_pace(recipe, self.cache_dir)
        timed = with_steps(recipe, pace.steps_in(recipe, self.minutes))
        say(f"{timed.steps} steps of about {pace.step:.1f} s each")
        return timed

    def _options_of(self, began: Recipe, out: Path, options: Train) -> Train:
        """What of the options can be meant for a run that goes on.

        Raises: ValueError if it is of another recipe.
        """
        from nanomolmo2.recipes import recipe
        from nanomolmo2.training.run_folder import MODEL_FOLDER

        if self.recipe and (wanted := Path(self.recipe).stem) != began.name:
            if self.recipe.endswith(".json"):
                wanted = recipe(self.recipe).name
            if wanted != began.name:
                raise ValueError(
                    f"{out} holds a run of the recipe {began.name}, not of {wanted}: name that "
                    f"one, or choose another folder"
                )
        if self.epochs is not None or (self.steps or began.steps) != began.steps:
            note(
                f"warning: a run that goes on keeps its length of {began.steps} steps: "
                f"--max-steps makes it longer"
            )
        if self.model and same_place(self.model, out / MODEL_FOLDER):
            return dataclasses.replace(options, model=None)  # what the run itself made
        return options
