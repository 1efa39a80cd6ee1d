"""``nanomolmo2 train``: a recipe, or own data."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from nanomolmo2.cli.options import MODEL_HELP, AtLeast, CacheDir, Debug, UsageError

if TYPE_CHECKING:
    from nanomolmo2.training.recipe import Recipe

# Options that stand for a field of the recipe of the same name.
RECIPE_FIELDS = ("model", "steps", "seed", "save_every", "keep", "feature_cache")


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
    ] = None
    resume: Annotated[
        bool, arg(help="go on with the run in DIR where it stopped, as if it never had")
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
        arg(metavar="N", help="processes that prepare data; 0 = prepare it between the steps"),
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
        again = f"go on with: nanomolmo2 train {name} --out {out} --resume"
        if name == "tiny" and self.scale != "full":
            again += f" --scale {self.scale}"
        try:
            finished = self._train_tiny(out) if name == "tiny" else self._train(name, out)
        except Stopped as stopped:
            print(f"nanomolmo2: {stopped}; {again}", file=sys.stderr)
            raise SystemExit(stopped.code) from None
        if os.environ.get("RANK", "0") != "0":
            return
        model = out / "model"
        if not finished:
            print(f"stopped; {again}")
        elif name == "tiny":
            print(f"wrote {model}; measure it with: nanomolmo2 eval emoji --model {model}")
        else:
            print(f"wrote {model}; try it with: nanomolmo2 ask PICTURE QUESTION --model {model}")

    def _check(self) -> None:
        if not self.recipe and not self.data and not (self.resume and self.out):
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
        )
        if self.recipe == "tiny" and any(of_recipes):
            raise UsageError(
                "--data, --model, --steps, --lora, --feature-cache and --log-to are not for the "
                "recipe tiny, which makes the bundled model; to train that on your data leave the "
                "recipe out"
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
            out, scale=self.scale, seed=self.seed or 0, resume=self.resume, config=config
        )

    def _train(self, name: str, out: Path) -> bool:
        from nanomolmo2.training.trainer import train_recipe

        return train_recipe(
            self._recipe(name, out),
            out,
            resume=self.resume,
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

        stored = out / "recipe.json"
        if self.resume and stored.is_file() and not self.data and not self.lora:
            made = Recipe.load(stored)
            if self.recipe and (wanted := Path(self.recipe).stem) != made.name:
                expected = recipe(self.recipe).name if self.recipe.endswith(".json") else wanted
                if expected != made.name:
                    raise ValueError(
                        f"{out} holds a run of the recipe {made.name}, not of {expected}: name "
                        f"that one, or choose another folder"
                    )
        elif name == "finetune":
            if not self.data:
                raise UsageError("finetune needs data: give --data FILE")
            made = finetune(self.data, self.model or "tiny", steps=self.steps or 40, lora=self.lora)
        else:
            made = recipe(name)
            if self.data:
                made = dataclasses.replace(made, data=tuple(map(SourceConfig, self.data)))
        changes = {name: getattr(self, name) for name in RECIPE_FIELDS}
        if self.feature_cache is not None:
            changes["feature_cache"] = str(self.feature_cache)
        kept = {name: value for name, value in changes.items() if value is not None}
        if self.model is not None:  # its own sizes, then
            kept |= {"architecture": None, "vision": "", "llm": ""}
        return dataclasses.replace(made, **kept)
