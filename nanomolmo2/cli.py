"""The command ``nanomolmo2``, one class for each of its commands.

A command is a frozen dataclass: its fields are the options, ``run`` does the work. Help is answered
without loading torch: everything heavy is imported inside ``run``.

Exit codes: 0; 1 an input or the work failed; 2 the command line is wrong; 130 interrupted; 143
training was told to end by SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from nanomolmo2 import __version__
from nanomolmo2.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from nanomolmo2.data.example import Example
    from nanomolmo2.evaluation.emoji import Scores
    from nanomolmo2.generation.pipeline import Answer, Pipeline
    from nanomolmo2.models.quantized import LayerError
    from nanomolmo2.processor import Encoded, Point
    from nanomolmo2.processor.video import Video
    from nanomolmo2.training.recipe import Recipe

BASE = "base"  # on the command line; None in Python
MODEL_HELP = (
    "the bundled 'tiny', 'base' (SigLIP 2 and Qwen3-0.6B-Base from the cache or the hub, with a "
    "fresh connector), a folder with config.json and safetensors, or owner/name on the hub"
)
ModelName = Annotated[str, arg(metavar="MODEL", help=MODEL_HELP)]
CacheDir = Annotated[
    Path, arg(metavar="DIR", help="folder of the converted SigLIP 2 and Qwen3 weights")
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(
        help="of the arithmetic and of weights that are not quantised; none = float32 on a CPU, "
        "where 16-bit arithmetic is slow"
    ),
]
Precision = Annotated[
    Literal["int8", "int8-weight-only", "fp16-weights", "auto"] | None,
    arg(
        help="hold the weights in 8 or 16 bit: int8 is the fastest on a CPU and a quarter of the "
        "size, fp16-weights is nearly lossless at half, auto is what suits the machine; none = as "
        "the model was saved"
    ),
]
Debug = Annotated[bool, arg(help="show the traceback of an error")]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")


class UsageError(ValueError):
    """The command line asks for something that cannot be: exit code 2."""


@dataclass(frozen=True)
class Ask:
    """Ask a question about one or more pictures, or about a video.

    The answer is printed as it is written. The points in an answer are in the model's own format
    (thousandths of the picture's sides); --draw paints them, --json lists them in pixels.
    """

    inputs: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="PICTURE... QUESTION",
            help="picture files (JPEG, PNG, WebP, GIF, BMP, TIFF) in the order they are shown to "
            "the model, or one video (MP4, WebM, MOV, MKV, AVI, M4V), then the question in quotes",
            help_behavior_hint="(required)",
        ),
    ]
    model: ModelName = "tiny"
    max_new_tokens: Annotated[
        int, arg(metavar="N", help="longest answer, in tokens; it is cut off there")
    ] = 256
    temperature: Annotated[
        float,
        arg(
            metavar="T", help="0 always takes the likeliest token; higher is more varied (0.2 to 1)"
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        arg(
            metavar="P",
            help="with a temperature: draw only from the likeliest tokens that together have this "
            "probability, above 0 to 1; 1 = from all",
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        arg(metavar="K", help="with a temperature: draw only from the K likeliest; 0 = from all"),
    ] = 0
    min_p: Annotated[
        float,
        arg(
            metavar="P",
            help="with a temperature: draw only tokens with at least this share of the likeliest "
            "one's probability, 0 to 1; 0 = from all",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        arg(
            metavar="R",
            help="above 1 makes what the question and the answer already said less likely (1 to "
            "1.3); it also counts for numbers in lists of points; 1 = off",
        ),
    ] = 1.0
    seed: Annotated[
        int | None,
        arg(metavar="SEED", help="makes a drawn answer repeatable; none = another one each time"),
    ] = None
    stop: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="TEXT",
            help="end the answer where it would say this, which is not printed; several: --stop "
            "TEXT --stop TEXT",
        ),
    ] = ()
    well_formed_points: Annotated[
        bool,
        arg(
            help="let the model write only points that can be read, of pictures that there are; "
            "costs about a second with a large vocabulary"
        ),
    ] = False
    max_crops: Annotated[
        int | None,
        arg(
            metavar="N",
            help="most detail crops a picture, for models that read crops: more reads smaller "
            "text, and each adds up to 200 tokens; none = as the model was saved (8 in Molmo2)",
        ),
    ] = None
    video: Annotated[
        bool,
        arg(
            help="the file is a video whatever its name ends with, such as an animated GIF, of "
            "which otherwise the first picture is shown"
        ),
    ] = False
    max_frames: Annotated[
        int | None,
        arg(
            metavar="N",
            help="most frames that are looked at in a video, each about 90 tokens; none = as the "
            "model was saved (384 in Molmo2)",
        ),
    ] = None
    draw: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="write the picture with the answer's points on it (.png, .jpg, .webp); of several "
            "pictures, FILE-1, FILE-2, ... are written; of a video, an animated .gif",
        ),
    ] = None
    json: Annotated[
        bool,
        arg(
            help="print one JSON object instead: text, count, points (pixels, thousandths, "
            "picture or time, label), picture sizes, tokens, timings in seconds"
        ),
    ] = False
    no_lookup: Annotated[
        bool,
        arg(
            help="write each token in a step of its own; without it, tokens that can be guessed "
            "are checked several in a step, where that is faster; the answer is the same"
        ),
    ] = False
    dtype: DType = None
    quantize: Precision = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        paths, question = self._split_inputs()
        shows_video = self._shows_video(paths)
        targets = [] if self.draw is None else overlay_paths(self.draw, len(paths))
        for target in targets:
            check_writable(target, (".gif",) if shows_video else PICTURE_SUFFIXES)

        from nanomolmo2.processor import load_image  # pictures first: the model takes longer

        pictures = [] if shows_video else [load_image(path) for path in paths]
        start = time.perf_counter()
        pipeline = load_pipeline(self.model, self.cache_dir, **precision(self))
        load_seconds = time.perf_counter() - start
        video = self._load_video(paths[0], pipeline) if shows_video else None
        if self.max_crops is not None:
            set_max_crops(pipeline, self.max_crops, self.model)
        answer = pipeline.ask(
            pictures,
            question,
            video=video,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
            well_formed_points=self.well_formed_points,
            lookup=not self.no_lookup,
            on_text=None if self.json else print_piece,
        )
        if self.json:
            answer.timings["load"] = load_seconds
            report = {"model": self.model, "question": question, **answer_report(answer, paths)}
            print(json.dumps(report, ensure_ascii=False))
        else:
            print()
            for problem in answer.problems:
                print(f"note: {problem}", file=sys.stderr)
        for i, target in enumerate(targets):
            if video is None:
                write_overlay(pictures[i], answer.points, target, number=i + 1)
            else:
                write_video_overlay(video, answer.points, target)
            print(f"wrote {target}", file=sys.stderr)

    def _split_inputs(self) -> tuple[list[str], str]:
        if len(self.inputs) < 2:
            raise UsageError(
                "expected at least one picture and a question, as in: nanomolmo2 ask dog.jpg "
                f'"Where is the dog?"; found {" ".join(self.inputs) or "nothing"}'
            )
        *paths, question = self.inputs
        if os.path.isfile(question):
            raise UsageError(
                f"the last argument, {question}, is a file where the question was expected: put "
                "the question last, in quotes"
            )
        for name, value, fits in (
            ("--max-new-tokens must be 1 or more", self.max_new_tokens, self.max_new_tokens >= 1),
            ("--temperature must be 0 or more", self.temperature, self.temperature >= 0),
            ("--top-p must be above 0 and at most 1", self.top_p, 0 < self.top_p <= 1),
            ("--top-k must be 0 or more", self.top_k, self.top_k >= 0),
            ("--min-p must be 0 to 1", self.min_p, 0 <= self.min_p <= 1),
            (
                "--repetition-penalty must be above 0",
                self.repetition_penalty,
                self.repetition_penalty > 0,
            ),
            ("--stop must not be empty", self.stop, all(self.stop)),
            (
                "--max-crops must be 1 or more",
                self.max_crops,
                self.max_crops is None or self.max_crops >= 1,
            ),
            (
                "--max-frames must be 1 or more",
                self.max_frames,
                self.max_frames is None or self.max_frames >= 1,
            ),
        ):
            if not fits:
                raise UsageError(f"{name}, found {value}")
        return paths, question

    def _shows_video(self, paths: Sequence[str]) -> bool:
        """Whether the one file is a video.

        Raises: UsageError for a video among other files, and options of the other kind.
        """
        videos = [path for path in paths if self.video or path.lower().endswith(VIDEO_SUFFIXES)]
        if videos and len(paths) > 1:
            raise UsageError(
                f"expected pictures or one video, found {len(paths)} files with {videos[0]} among "
                f"them: ask about each apart"
            )
        if videos and self.max_crops is not None:
            raise UsageError("--max-crops is for pictures; --max-frames sets what a video costs")
        if not videos and self.max_frames is not None:
            raise UsageError(
                f"--max-frames is for videos ({', '.join(VIDEO_SUFFIXES)}), found {paths[0]}: "
                f"--video says that a file is one"
            )
        if videos and not os.path.exists(paths[0]):
            raise FileNotFoundError(f"there is no file {paths[0]}: check the path of the video")
        return bool(videos)

    def _load_video(self, path: str, pipeline: Pipeline) -> Video:
        from nanomolmo2.processor.video import load_video

        config = pipeline.processor.config.video
        if config is None:
            raise UsageError(
                f"the model {self.model} does not take videos: choose one that does, such as "
                f"allenai/Molmo2-4B, or ask about single pictures of it"
            )
        max_frames = config.max_frames if self.max_frames is None else self.max_frames
        return load_video(path, max_frames=max_frames, max_fps=config.max_fps)


@dataclass(frozen=True)
class Info:
    """Show a model: its parts, parameters, memory and configuration."""

    model: Annotated[
        Positional[str],
        arg(
            metavar="MODEL",
            help=MODEL_HELP + "; also a SigLIP or Qwen3 folder, a .pt file that `nanomolmo2 "
            "download` made, or the sizes alone of nanomolmo2, nanomolmo2-pooling, molmo2-4b or "
            "molmo2-8b, which loads nothing",
        ),
    ]
    dtype: DType = None
    quantize: Precision = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        from nanomolmo2.models import NanoMolmo2
        from nanomolmo2.models.quantized import count_weights

        model: Any = load_module(self.model, self.cache_dir, **precision(self))
        tensors = list(model.state_dict().values())
        count = count_weights(model)
        if isinstance(model, NanoMolmo2):
            model.parameter_summary()
            config = model.config
            side = config.vision_config.image_size
            print(
                f"\npicture: {side} x {side} pixels, {config.num_visual_tokens} visual tokens"
                f"\ncontext: {config.llm_config.max_position_embeddings:,} tokens"
            )
        else:
            print(f"{type(model).__name__}: {count:,} parameters\n")
        stored = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        no_weights = any(t.is_meta for t in tensors)
        print(f"memory of the weights ({'sizes only' if no_weights else f'stored as {stored}'}):")
        for dtype, size in (("float32", 4), ("bfloat16, float16", 2), ("int8", 1)):
            print(f"  {dtype:<18} {count * size / 1e6:>10,.1f} MB")
        if not no_weights:
            print(f"  {'as loaded':<18} {sum(t.nbytes for t in tensors) / 1e6:>10,.1f} MB")
        print("configuration:")
        print(json.dumps(model.config.to_dict(), indent=2))


@dataclass(frozen=True)
class Download:
    """Download SigLIP 2 and Qwen3-0.6B-Base and convert them, once.

    Makes siglip2_so400m_384.pt (float32, 1.6 GB of a 4.5 GB download) and qwen3_0.6b_base.pt
    (bfloat16, 1.2 GB). An interrupted download goes on where it stopped.
    """

    vision_only: Annotated[bool, arg(help="only SigLIP 2")] = False
    llm_only: Annotated[bool, arg(help="only Qwen3-0.6B-Base")] = False
    force: Annotated[bool, arg(help="convert again, even where an intact file is there")] = False
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        if self.vision_only and self.llm_only:
            raise UsageError("--vision-only and --llm-only exclude each other: for both, give none")
        parts = ("vision",) * (not self.llm_only) + ("llm",) * (not self.vision_only)

        from nanomolmo2.convert.hub import download

        download(parts, self.cache_dir, force=self.force)


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
        int | None, arg(metavar="N", help="updates, in place of the recipe's; sets the schedule")
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
    ] = None
    save_every: Annotated[
        int | None, arg(metavar="N", help="steps between checkpoints; none = as the recipe says")
    ] = None
    keep: Annotated[
        int | None,
        arg(metavar="K", help="newest checkpoints that stay, beside the best; none = 2"),
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
    ] = None
    workers: Annotated[
        int,
        arg(metavar="N", help="processes that prepare data; 0 = prepare it between the steps"),
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
        for name, value, least in (
            ("--steps", self.steps, 1),
            ("--max-steps", self.max_steps, 1),
            ("--save-every", self.save_every, 1),
            ("--keep", self.keep, 1),
            ("--stop-after", self.stop_after, 1),
            ("--workers", self.workers, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be {least} or more, found {value}")
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
        from nanomolmo2.training.loop import LoopConfig
        from nanomolmo2.training.tiny import train_tiny

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
        from nanomolmo2.training.recipe import Recipe
        from nanomolmo2.training.recipes import finetune, recipe

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
        changes: dict[str, Any] = {
            "model": self.model,
            "steps": self.steps,
            "seed": self.seed,
            "save_every": self.save_every,
            "keep": self.keep,
            "feature_cache": None if self.feature_cache is None else str(self.feature_cache),
        }
        if self.model is not None:  # its own sizes, then
            changes |= {"architecture": None, "vision": "", "llm": ""}
        kept = {n: v for n, v in changes.items() if v is not None or n == "architecture"}
        return dataclasses.replace(made, **kept)


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
        int, arg(metavar="N", help="processes of the run, one a GPU; batch_size is a multiple")
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
        if self.gpus < 1:
            raise UsageError(f"--gpus must be 1 or more, found {self.gpus}")
        if self.recipe == "tiny":
            raise UsageError("tiny's stages are its own and fit into 2 GB: choose another recipe")
        from nanomolmo2.training.plan import report, setup_for
        from nanomolmo2.training.recipes import recipe

        names = ("batch_size", "micro_batch_size", "sequence_length", "max_crops")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        made = dataclasses.replace(recipe(self.recipe), **changes)
        print(report(setup_for(made, self.gpus, self.device, self.architecture), limit))


@dataclass(frozen=True)
class Plot:
    """Draw the curves of training runs: loss, loss by task, gradient norms, speed."""

    runs: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="RUN...", help="folders of runs, or log.jsonl files; several are overlaid"),
    ]
    out: Annotated[Path, arg(metavar="FILE", help="the picture, a .png")] = Path("curves.png")
    debug: Debug = False

    def run(self) -> None:
        if not self.runs:
            raise UsageError("expected the folder of a run, as in: nanomolmo2 plot runs/smoke")
        check_writable(self.out, (".png",))
        from nanomolmo2.training.plot import plot_runs

        plot_runs(self.runs, self.out)
        print(f"wrote {self.out}")


@dataclass(frozen=True)
class Inspect:
    """Show what a model will see of a data source, or audit the source.

    Of each example: its tokens by who speaks, with what is learned underlined, positions and loss
    weights, crops, and the points of its answers on their pictures.

    With --audit, every record is read as training reads it. A fatal finding (nothing to learn,
    image tokens cut off, answers longer than the sequence, points outside, too many broken
    pictures, records that cannot be read) makes the exit code 1.
    """

    source: Annotated[
        Positional[str],
        arg(
            metavar="SOURCE",
            help="file, folder or pattern of files with examples (.jsonl, .json, .parquet, .tar), "
            "hub:NAME of a data set on the Hugging Face hub, or emoji",
        ),
    ]
    pictures: Annotated[
        Path | None,
        arg(metavar="DIR", help="folder of the pictures; none = paths go out from the file"),
    ] = None
    model: Annotated[
        str,
        arg(metavar="MODEL", help="whose tokenizer, pictures and context: " + MODEL_HELP),
    ] = "tiny"
    count: Annotated[int, arg(metavar="N", help="how many examples are shown")] = 3
    start: Annotated[
        int, arg(metavar="RECORD", help="number of the first one that is shown, from 0")
    ] = 0
    html: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="write one page with pictures instead (.html); with --audit it shows the "
            "findings and the records that they name",
        ),
    ] = None
    audit: Annotated[
        bool, arg(help="look for what is wrong in all records instead of showing some")
    ] = False
    limit: Annotated[
        int | None, arg(metavar="N", help="audit the first N records only; none = all of them")
    ] = None
    sequence_length: Annotated[
        int | None,
        arg(
            metavar="TOKENS",
            help="longest sequence of the training, for the audit; none = the model's context",
        ),
    ] = None
    bad_share: Annotated[
        float,
        arg(
            metavar="SHARE",
            help="audit: more missing and broken pictures than this share of the records (0 to 1) "
            "are fatal, as in training",
        ),
    ] = 0.05
    loss_weighting: Annotated[
        Literal["token", "sqrt", "molmo2"],
        arg(
            help="weight of a label in a branch with n of them: 1, 1 / sqrt(n), or Molmo2's "
            "2 / sqrt(n times the number of branches)"
        ),
    ] = "token"
    json: Annotated[bool, arg(help="print one JSON object instead, without the pictures")] = False
    debug: Debug = False

    def run(self) -> None:
        self._check()
        from rich.console import Console

        from nanomolmo2.convert.pretrained import load_config, load_processor
        from nanomolmo2.data.audit import audit
        from nanomolmo2.data.inspect import look
        from nanomolmo2.data.show import make_page, print_report, print_views
        from nanomolmo2.data.sources import SourceConfig, open_source

        source = open_source(SourceConfig(self.source, pictures=str(self.pictures or "")))
        name = None if self.model == BASE else self.model
        processor, config = load_processor(name), load_config(name)

        def encode(example: Example) -> Encoded:
            return processor.encode_tree(
                example.images,
                [branch.messages for branch in example.branches],
                video=example.video,
                loss_weighting=self.loss_weighting,
            )

        report = None
        records = list(range(self.start, min(self.start + self.count, len(source))))
        if self.audit:
            settings = processor.config
            expands = settings.multicrop is None and settings.image_tokens is None
            with progress_bar("records") as on_progress:
                report = audit(
                    source,
                    encode,
                    processor,
                    max_tokens=self.sequence_length or config.llm_config.max_position_embeddings,
                    visual_tokens=config.num_visual_tokens if expands else 1,
                    bad_share=self.bad_share,
                    limit=self.limit,
                    on_progress=on_progress,
                )
            named = sorted({record for found in report.findings for record in found.records})
            records = named[: self.count] or records
        elif not records:
            raise ValueError(
                f"{self.source} has {len(source)} records, numbered from 0: there is none to show "
                f"from {self.start} on"
            )
        page, show = self.html is not None, not self.audit
        views = [look(source, i, encode, processor) for i in records] if page or show else []
        if self.html is not None:
            text = make_page(views, self.source, self.model, report)
            with atomic_path(self.html) as temporary:
                temporary.write_text(text, encoding="utf-8")
            print(f"wrote {self.html}", file=sys.stderr)
        if self.json:
            found = report.to_dict() if report else {"examples": [v.to_dict() for v in views]}
            print(json.dumps({"source": self.source, "model": self.model, **found}))
        elif report is not None:
            print_report(report, Console())
        elif self.html is None:
            print_views(views, Console())
        if report is not None and report.fatal:
            causes = ", ".join(f"{found.cause} ({found.count})" for found in report.fatal)
            raise ValueError(
                f"{self.source} is not fit for training: {causes}; correct or remove these records"
            )

    def _check(self) -> None:
        for name, value, least in (
            ("--count", self.count, 1),
            ("--start", self.start, 0),
            ("--limit", self.limit, 1),
            ("--sequence-length", self.sequence_length, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be {least} or more, found {value}")
        if not 0 <= self.bad_share <= 1:
            raise UsageError(f"--bad-share must be 0 to 1, found {self.bad_share}")
        if self.html is not None:
            check_writable(self.html, (".html", ".htm"))
        if self.limit is not None and not self.audit:
            raise UsageError("--limit is for --audit; --start and --count choose what is shown")


@dataclass(frozen=True)
class Data:
    """Write pictures with exact truth to train and test any model on.

    There is one kind so far: emoji, scenes with questions, answers, boxes, masks and counts, which
    `nanomolmo2 train --data` and `nanomolmo2 inspect` read. The same options give the same files,
    and a larger count begins with what a smaller one gives. The fields are in docs/emoji-data.md.
    """

    kind: Annotated[Positional[Literal["emoji"]], arg(help="what to draw")]
    out: Annotated[
        Path, arg(metavar="DIR", help="new or empty folder, written whole or not at all")
    ]
    count: Annotated[int, arg(metavar="N", help="how many pictures")] = 100
    seed: Annotated[int, arg(metavar="SEED", help="another one gives other pictures")] = 0
    format: Annotated[
        Literal["jsonl", "parquet"],
        arg(help="jsonl has its pictures beside it, parquet inside (extra data)"),
    ] = "jsonl"
    setting: Annotated[
        Literal["easy", "crowded", "occluded", "clutter", "photos", "wide384", "wide768"],
        arg(help="how hard the scenes are; easy is what tiny is trained on"),
    ] = "easy"
    split: Annotated[
        Literal["train", "test"], arg(help="test: scenes and wordings that training never has")
    ] = "train"
    size: Annotated[
        Literal[192, 384, 768] | None,
        arg(help="side of the pictures in pixels, emoji keep theirs; none = that of the setting"),
    ] = None
    group: Annotated[
        Literal["seen", "mild", "openmoji"],
        arg(help="art group; mild and openmoji are for the test split only"),
    ] = "seen"
    backgrounds: Annotated[
        Path | None,
        arg(metavar="FOLDER", help="pictures whose pieces lie behind the emoji; none = made up"),
    ] = None
    debug: Debug = False

    def run(self) -> None:
        if self.count < 1:
            raise UsageError(f"--count must be 1 or more, found {self.count}")
        if self.seed < 0:
            raise UsageError(f"--seed must be 0 or more, found {self.seed}")
        if self.split == "train" and self.group != "seen":
            raise UsageError(f"--group {self.group} is for tests only: add --split test")
        from nanomolmo2.data.emoji.scenes import setting
        from nanomolmo2.data.emoji.write import write_scenes

        config = setting(self.setting, self.size)
        if self.backgrounds is not None:
            folder = str(self.backgrounds)
            config = dataclasses.replace(config, background="photo", photos=folder)
        with progress_bar("pictures") as on_progress:
            records = write_scenes(
                self.out,
                self.count,
                seed=self.seed,
                format=self.format,
                scene=config,
                split=self.split,
                group=self.group,
                on_progress=on_progress,
            )
        print(f"wrote {self.count} pictures and their records, {records}")


@dataclass(frozen=True)
class Eval:
    """Measure a model on a fixed test set.

    There is one so far: emoji, scenes of one to six emoji, pairs of them and videos of 8 frames.
    Answers are greedy. Art groups: seen (styles of the training, in new scenes), mild and openmoji
    (styles it was never shown). Prints scores with 95 % intervals and the goals.
    """

    task: Annotated[Positional[Literal["emoji"]], arg(help="what to measure")]
    model: ModelName = "tiny"
    group: Annotated[
        Literal["seen", "mild", "openmoji", "all"], arg(help="art group, or all three")
    ] = "all"
    styles: Annotated[
        tuple[str, ...],
        arg(
            metavar="STYLE",
            help="only these styles of the group, such as noto; none = all. Goals are for all",
        ),
    ] = ()
    scenes: Annotated[
        int,
        arg(metavar="N", help="pictures a group, about 15 questions each; the first N of the set"),
    ] = 1000
    pairs: Annotated[
        int | None, arg(metavar="N", help="pairs of pictures a group; none = half of --scenes")
    ] = None
    clips: Annotated[
        int | None,
        arg(
            metavar="N",
            help="videos a group; none = a tenth of --scenes, and no videos where the model takes "
            "pictures only",
        ),
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        arg(metavar="TASK", help="only these questions, such as: presence count point; none = all"),
    ] = ()
    batch_size: Annotated[
        int, arg(metavar="N", help="questions answered together; changes the speed only")
    ] = 64
    json: Annotated[
        Path | None, arg(metavar="FILE", help="also write the scores to this file (.json)")
    ] = None
    report: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="also write a page with the scores and pictures of the worst answers into this "
            "new or empty folder",
        ),
    ] = None
    failures: Annotated[
        int, arg(metavar="N", help="with --report: pictures of bad answers, of each group")
    ] = 24
    dtype: DType = None
    quantize: Precision = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        for name, value, least in (
            ("--scenes", self.scenes, 1),
            ("--pairs", self.pairs, 0),
            ("--clips", self.clips, 0),
            ("--batch-size", self.batch_size, 1),
            ("--failures", self.failures, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be {least} or more, found {value}")
        if self.json is not None:
            check_writable(self.json, (".json",))
        from rich.console import Console
        from rich.progress import Progress

        from nanomolmo2.data.emoji.scenes import TEST_GROUPS, art_of
        from nanomolmo2.evaluation import report
        from nanomolmo2.evaluation.emoji import evaluate
        from nanomolmo2.evaluation.scorers import SCORERS

        for task in self.tasks:
            if task not in SCORERS:
                raise UsageError(f"--tasks has {task!r}, choose from {', '.join(SCORERS)}")
        groups = TEST_GROUPS if self.group == "all" else (self.group,)
        try:
            for group in groups:
                art_of(group, self.styles)
        except ValueError as error:
            raise UsageError(f"--styles: {error}") from None
        if self.report is not None:
            try:
                report.check_report_folder(self.report)
            except ValueError as error:
                raise UsageError(f"--report: {error}") from None
        pipeline = load_pipeline(self.model, self.cache_dir, **precision(self))
        scores: list[Scores] = []
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for group in groups:
                bar = progress.add_task(group, total=None)
                scores.append(
                    evaluate(
                        pipeline.model,
                        pipeline.processor,
                        group=group,
                        styles=self.styles,
                        scenes=self.scenes,
                        pairs=self.pairs,
                        clips=self.clips,
                        tasks=self.tasks or None,
                        batch_size=self.batch_size,
                        failures=0 if self.report is None else self.failures,
                        on_progress=lambda done, total, bar=bar: progress.update(  # type: ignore[misc]
                            bar, completed=done, total=total
                        ),
                    )
                )
        met, goals = report.goals_met(scores)
        print(report.score_table(scores))
        print(f"\n{report.LEGEND}\n{met} of {goals} goals are met")
        about = {"task": self.task, "model": self.model, "scenes": self.scenes}
        if self.styles:
            about["styles"] = ", ".join(self.styles)
        about["version"] = __version__
        if self.json is not None:
            content = {**about, "groups": report.scores_to_json(scores)}
            with atomic_path(self.json) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if self.report is not None:
            report.write_report(self.report, scores, about)
            print(f"wrote {self.report / report.PAGE}")


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
        int, arg(metavar="N", help="layers to list, the largest errors first; 0 = none")
    ] = 10
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        if self.max_error is not None and not self.max_error > 0:
            raise UsageError(f"--max-error must be above 0, found {self.max_error}")
        if self.mode != "int8" and (self.max_error is not None or self.calibrate):
            raise UsageError(
                f"--max-error and --calibrate are for --mode int8, found --mode {self.mode}"
            )
        if self.rows < 0:
            raise UsageError(f"--rows must be 0 or more, found {self.rows}")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file: name a folder to write")
        from nanomolmo2.convert.pretrained import load, save_pretrained
        from nanomolmo2.models.quantized import count_weights, is_quantized, quantization_report
        from nanomolmo2.processor import collate

        name = None if self.model == BASE else self.model
        model, processor = load(name, cache_dir=self.cache_dir)
        if is_quantized(model):
            raise ValueError(f"{self.model} is quantised already: name a floating point model")
        picture = self.picture or Path(__file__).parent / "assets" / "demo" / "scene.png"
        sample = processor.encode([{"role": "user", "content": self.question}], [picture])
        batch = collate([sample], processor.pad_token_id).tensors()
        calibration = batch if self.calibrate else None
        report = quantization_report(model, batch, self.mode, calibration=calibration)
        report.sort(key=lambda row: -row.error)
        keep = [
            row.name for row in report if self.max_error is not None and row.error > self.max_error
        ]
        before = 4 * count_weights(model)
        model.quantize(self.mode, keep=keep, calibration=calibration)
        save_pretrained(model, self.out, processor)
        size = sum(f.stat().st_size for f in self.out.glob("*.safetensors"))
        start = time.perf_counter()
        load(str(self.out))
        seconds = time.perf_counter() - start
        if self.rows:
            print_layer_errors(report[: self.rows], len(report), set(keep))
        print(
            f"wrote {self.out}: {size / 1e6:,.1f} MB, {size / before:.0%} of float32; loads in "
            f"{seconds:.1f} s"
        )


@dataclass(frozen=True)
class Export:
    """Write a model in a format that other programs serve.

    There is one so far: molmo2-hf, the layout of the released Molmo2 checkpoints, which
    transformers and vLLM read. Only models with the attention-pooling connector fit into it.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help=MODEL_HELP)]
    out: Annotated[Positional[Path], arg(metavar="OUT", help="folder to write")]
    format: Annotated[Literal["molmo2-hf"], arg(help="layout of the folder")] = "molmo2-hf"
    max_shard_size: Annotated[
        str,
        arg(metavar="SIZE", help="largest weight file, such as 5GB or 500MB; more are split"),
    ] = "5GB"
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?\s*[KMGT]B", self.max_shard_size, re.IGNORECASE):
            raise UsageError(
                f"--max-shard-size must be a size such as 5GB or 500MB, found {self.max_shard_size}"
            )
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file: name a folder to write")
        import warnings

        from nanomolmo2.convert import export_molmo2
        from nanomolmo2.convert.pretrained import load

        name = None if self.model == BASE else self.model
        model, processor = load(name, cache_dir=self.cache_dir)
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            export_molmo2(model, self.out, processor, max_shard_size=self.max_shard_size)
        for remark in remarks:
            print(f"warning: {remark.message}", file=sys.stderr)
        print(f"wrote {self.out}")


@dataclass(frozen=True)
class Bench:
    """Measure speed and memory beside other programs; needs a checkout and the extra dev.

    Models of full size with random weights take turns with their peers. What was measured before is
    in docs/performance.md.
    """

    rows: Annotated[
        tuple[str, ...],
        arg(
            metavar="GROUP...",
            help="what to measure: floor, vision, prefill, decode, batch, prefix, lookup, llama, "
            "load; none = all",
        ),
    ] = ()
    threads: Annotated[
        tuple[int, ...], arg(metavar="N...", help="threads of torch, one run for each number")
    ] = (1,)
    short: Annotated[
        bool, arg(help="small models, a minute: shows that the benchmarks work, not how fast it is")
    ] = False
    profile: Annotated[
        bool,
        arg(
            help="instead show where the time of a decode step and of a prefill goes: linears, "
            "attention, norms, head, the rest"
        ),
    ] = False
    out: Annotated[
        Path | None,
        arg(metavar="DIR", help="folder of the results; none = runs/bench or runs/bench-short"),
    ] = None
    debug: Debug = False

    def run(self) -> None:
        for threads in self.threads:
            if threads < 1:
                raise UsageError(f"--threads must be 1 or more, found {threads}")
        root = Path(__file__).parents[1]
        known = sorted(path.stem for path in (root / "benchmarks").glob("*.py"))
        if not known:
            raise ValueError(
                f"there is no folder benchmarks in {root}: it is in the repository, not in the "
                f"installed package; run this in a checkout, with .[dev] installed"
            )
        for row in self.rows:
            if row not in known:
                raise UsageError(
                    f"--rows: there is no benchmark {row}; see nanomolmo2 bench --help"
                )
        command = [sys.executable, "-m", "benchmarks", "--threads", *map(str, self.threads)]
        command += ["--rows", *self.rows] if self.rows else []
        command += ["--short"] * self.short + ["--profile"] * self.profile
        command += [] if self.out is None else ["--out", str(self.out)]
        # The folder stays the caller's, so that relative paths mean what they say.
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
        if done.returncode:
            raise ValueError("a benchmark failed: its own message stands above")


@dataclass(frozen=True)
class Demo:
    """Let the bundled model caption, count and point on a bundled picture."""

    draw: Annotated[
        Path, arg(metavar="FILE", help="where to write the picture with the points on it")
    ] = Path("demo.png")
    debug: Debug = False

    def run(self) -> None:
        check_writable(self.draw)
        from nanomolmo2.demo import run_demo

        run_demo(self.draw)


Command = (
    Ask
    | Info
    | Download
    | Quantize
    | Export
    | Train
    | Plan
    | Plot
    | Inspect
    | Data
    | Eval
    | Bench
    | Demo
)


def parse(arguments: Sequence[str]) -> Command:
    """Command line -> command.

    Raises: UsageError if it cannot be read; SystemExit(0) after --help.
    """
    kinds = {kind.__name__.lower(): kind for kind in typing.get_args(Command)}
    chosen = bool(arguments) and arguments[0] in kinds  # else a list: a line for each will do
    commands = []
    for name, kind in kinds.items():
        paragraphs = [
            textwrap.fill(" ".join(p.split()), 80) for p in str(kind.__doc__).split("\n\n")
        ]
        description = "\n\n".join(paragraphs) if chosen else paragraphs[0]
        commands.append(Annotated[kind, subcommand(name, description=description)])
    form: Any = typing.Union[tuple(commands)]  # noqa: UP007
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                form,
                prog="nanomolmo2",
                description="A vision-language model small enough to read. `nanomolmo2 COMMAND "
                "--help` tells all about a command.",
                args=list(arguments),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UsageError(
        f"{first_sentence(complaint.getvalue())}; see nanomolmo2 "
        f"{f'{arguments[0]} ' if chosen else ''}--help"
    )


def first_sentence(box: str) -> str:
    """What tyro says first in its box; below a rule follow hints, more indented option help."""
    lines = [line.strip("│") for line in box.splitlines()[1:]]  # the top border holds the title
    said = itertools.takewhile(lambda line: line.strip("─╰╯ "), lines)
    text = " ".join(line.strip() for line in said if not line.startswith(" " * 9)).rstrip(".")
    if found := re.search(r"Perhaps you meant:[^-]*(--[\w-]+)", box):
        text += f" (perhaps {found[1]}?)"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own) and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments in (["--version"], ["-V"]):
        print(f"nanomolmo2 {__version__}")
        return 0
    debug = False
    try:
        command = parse(arguments)
        debug = command.debug
        command.run()
        sys.stdout.flush()
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output is gone, as in `nanomolmo2 info tiny | head`. Python would
        # complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"nanomolmo2: {describe(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def describe(error: Exception) -> str:
    """One line about an error."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text} (unexpected; --debug shows where)"


# ---- what the commands share ----


def precision(command: Ask | Info | Eval) -> dict[str, Any]:
    """The options of a load that a command line gave."""
    options = {"dtype": command.dtype, "quantize": command.quantize}
    return {name: value for name, value in options.items() if value is not None}


def load_pipeline(name: str, cache_dir: Path, **options: Any) -> Pipeline:
    """Model and processor by the name that the command line uses."""
    from nanomolmo2.generation.pipeline import Pipeline

    name_or_none = None if name == BASE else name
    return Pipeline.from_pretrained(name_or_none, cache_dir=cache_dir, **options)


def load_module(name: str, cache_dir: Path, **options: Any) -> nn.Module:
    """A whole model, or a part: a SigLIP or Qwen3 folder, or a converted file.

    A preset comes without weights, on the meta device.
    """
    from nanomolmo2.convert.parts import build_on_meta, read_config
    from nanomolmo2.convert.tensor_files import CacheFile
    from nanomolmo2.models import PRESETS, LanguageModel, NanoMolmo2, VisionEncoder

    loader: Any = NanoMolmo2
    if os.path.isfile(name):
        loader = {"vision_encoder": VisionEncoder, "llm": LanguageModel}[CacheFile(name).component]
    elif name in PRESETS and name != "tiny" and not os.path.isdir(name):
        if options:
            raise UsageError(f"{name} is sizes alone: --dtype and --quantize need weights")
        return build_on_meta(NanoMolmo2, PRESETS[name])
    elif os.path.isdir(name):
        model_type = str(read_config(name).get("model_type"))
        if model_type.startswith("siglip") or model_type == "nanomolmo2_vision_encoder":
            loader = VisionEncoder
        elif model_type.startswith("qwen") or model_type == "nanomolmo2_llm":
            loader = LanguageModel
    return loader.from_pretrained(None if name == BASE else name, cache_dir=cache_dir, **options)


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, gone at the end; gives what is called with the numbers done and of all."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def print_piece(text: str) -> None:
    """Print a piece of an answer at once."""
    print(text, end="", flush=True)


def answer_report(answer: Answer, paths: Sequence[str]) -> dict[str, Any]:
    """What --json prints of an answer; its fields are listed in docs/cli.md."""
    from nanomolmo2.processor import points_to_json

    video = None
    if answer.video_size is not None:
        width, height = answer.video_size
        video = {"path": paths[0], "width": width, "height": height}
        video["frame_times"] = list(answer.frame_times)
    return {
        "text": answer.text,
        "count": answer.count,
        "points": points_to_json(answer.points, answer.image_sizes, video_size=answer.video_size),
        "problems": list(answer.problems),
        "images": [
            {"path": path, "width": width, "height": height}
            for path, (width, height) in zip(paths, answer.image_sizes, strict=video is None)
        ],
        "video": video,
        "finish_reason": answer.finish_reason,
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
        "timings": {name: round(seconds, 4) for name, seconds in answer.timings.items()},
    }


def print_layer_errors(rows: Sequence[LayerError], total: int, kept: set[str]) -> None:
    """The relative errors of some layers, as a table."""
    from rich.console import Console
    from rich.table import Table

    title = f"relative error of the output, {len(rows)} of {total} layers, largest first"
    table = Table(title=title)
    table.add_column("layer", overflow="fold")
    for name in ("outputs x inputs", "precision", "error"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        shape = " x ".join(f"{side:,}" for side in row.shape)
        precision = "fp16-weights" if row.name in kept else row.mode
        table.add_row(row.name, shape, precision, f"{row.error:.2%}")
    Console().print(table)


def parse_size(text: str, option: str) -> float:
    """``80GB`` or ``24GiB`` in bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MG]i?)B?", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"{option} is {text!r}, expected a size such as 80GB or 24GiB")
    unit = {"m": 1e6, "g": 1e9, "mi": 2.0**20, "gi": 2.0**30}[found[2].lower()]
    return float(found[1]) * unit


def overlay_paths(path: Path, pictures: int) -> list[Path]:
    """``out.png`` for one picture; ``out-1.png``, ``out-2.png``, ... for several."""
    if pictures == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(pictures)]


def check_writable(path: Path, suffixes: Sequence[str] = PICTURE_SUFFIXES) -> None:
    """Find out before the work whether its result can be written.

    Raises: UsageError for another kind of file, a folder, or a place that cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{path} ends with {path.suffix or 'no suffix'}, expected one of {', '.join(suffixes)}"
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    try:
        # Asking for permission is not enough: folders of a read-only disk grant it too.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"nothing can be written to {path.parent}: {error.strerror}") from None


def write_overlay(picture: Image, points: Sequence[Point], path: Path, *, number: int = 1) -> None:
    """Write a picture with its points; complete or not at all."""
    from nanomolmo2.processor.draw import draw_points

    drawn = draw_points(picture, points, number=number)
    with atomic_path(path) as temporary:
        drawn.save(temporary)


def write_video_overlay(video: Video, points: Sequence[Point], path: Path) -> None:
    """Write a video's frames with its points as an animated GIF; complete or not at all."""
    from nanomolmo2.processor.draw import draw_frames, save_gif

    save_gif(draw_frames(video.frames, video.times, points), video.times, path)


def set_max_crops(pipeline: Pipeline, max_crops: int, name: str) -> None:
    """Let a pipeline cut pictures into at most so many crops.

    Raises: UsageError for a model that reads a picture as a whole.
    """
    processor = pipeline.processor
    if processor.config.multicrop is None:
        raise UsageError(
            f"the model {name} reads a picture as a whole, not in crops: leave --max-crops out"
        )
    multicrop = dataclasses.replace(processor.config.multicrop, max_crops=max_crops)
    config = dataclasses.replace(processor.config, multicrop=multicrop)
    pipeline.processor = type(processor)(config, processor.tokenizer)
