"""Options that several commands have, and how a wrong value is refused."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import UseAppendAction, arg

BASE = "base"  # on the command line; None in Python
MODEL_HELP = (
    "the bundled 'tiny', 'base' (SigLIP 2 and Qwen3-0.6B-Base from the cache or the hub, with a "
    "fresh connector), a folder with config.json and safetensors, or owner/name on the hub"
)
ModelName = Annotated[str, arg(metavar="MODEL", help=MODEL_HELP)]
CacheDir = Annotated[
    Path, arg(metavar="DIR", help="folder of the converted SigLIP 2 and Qwen3 weights")
]
PictureFolder = Annotated[
    Path | None,
    arg(
        name="images",
        aliases=("--pictures",),
        metavar="DIR",
        help="folder of the pictures of the data; none = paths go out from their files",
    ),
]
PointsScale = Literal["pixels", "unit", "percent", "thousandths"]  # as data.record has it
DeviceName = Annotated[
    str | None,
    arg(
        metavar="DEVICE",
        help="where to compute: cpu, cuda, cuda:1 (the second GPU), mps; none = CUDA where there "
        "is a GPU, else MPS (which was never tried), else the CPU; one line says which",
    ),
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(
        help="of the arithmetic and of weights that are not quantised; none = float32 on a CPU, "
        "where 16-bit arithmetic is slow, bfloat16 on CUDA"
    ),
]
StoredDType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(help="of the weights that are not quantised; none = as they are stored"),
]
AdapterFolders = Annotated[
    tuple[str, ...],
    arg(
        metavar="DIR...",
        help="what runs with --lora learned beside MODEL (RUN/adapter), merged into it; several "
        "add up",
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
ArtGroup = Literal["seen", "mild", "openmoji"]  # of emoji
Debug = Annotated[bool, arg(help="show the traceback of an error")]


class UsageError(ValueError):
    """The command line asks for something that cannot be: exit code 2."""


@dataclass(frozen=True)
class AtLeast:
    """The smallest value of an option that is a number, a mark in its ``Annotated`` type.

    The largest is what torch and NumPy can hold.
    """

    least: int
    most: ClassVar[int] = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Which model answers, and how: the options of a command that generates text."""

    model: ModelName = "tiny"
    max_new_tokens: Annotated[
        int,
        arg(metavar="N", help="longest answer, in tokens; it is cut off there"),
        AtLeast(1),
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
        AtLeast(0),
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
        AtLeast(0),
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

    def generation(self) -> dict[str, Any]:
        """These options as the keyword arguments of `Pipeline.ask`.

        Raises: UsageError for a value that the library refuses.
        """
        options = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": self.stop,
            "well_formed_points": self.well_formed_points,
        }
        check_sampling(options)
        return options


# What the library says about a wrong value, in the words of the command line.
_SAMPLING = {
    "temperature": "must be 0 or more",
    "top_p": "must be above 0 and at most 1",
    "min_p": "must be 0 to 1",
    "repetition_penalty": "must be above 0",
    "stop": "must not be empty",
}


def check_sampling(options: Mapping[str, Any]) -> None:
    """Raises: UsageError for the first sampling option with a value that cannot be."""
    defaults = {field.name: field.default for field in dataclasses.fields(GenerationOptions)}
    for name, expected in _SAMPLING.items():
        value = options[name]
        if value == defaults[name]:
            continue  # as nearly always: do not wait for torch
        from nanomolmo2.generation.sampling import SamplingParams

        try:
            SamplingParams(**{name: value})
        except ValueError:
            raise UsageError(f"{option(name)} {expected}, found {value}") from None


def check_ranges(command: object) -> None:
    """Compare the numbers of a command with what their `AtLeast` marks say.

    Raises: UsageError for the first that is too small or too large.
    """
    for name, hint in typing.get_type_hints(type(command), include_extras=True).items():
        value = getattr(command, name)
        for mark in getattr(hint, "__metadata__", ()):
            if not isinstance(mark, AtLeast) or value is None:
                continue
            for number in value if isinstance(value, tuple) else (value,):
                if number < mark.least:
                    raise UsageError(f"{option(name)} must be {mark.least} or more, found {number}")
                if number > mark.most:
                    raise UsageError(
                        f"{option(name)} must be below 2**63, found {str(number)[:30]}"
                    )


def option(name: str) -> str:
    """``max_crops`` -> ``--max-crops``."""
    return f"--{name.replace('_', '-')}"


def library_name(model: str) -> str | None:
    """The name of a model on the command line -> what ``from_pretrained`` takes."""
    return None if model == BASE else model


def parse_size(text: str, option: str) -> float:
    """``80GB`` or ``24GiB`` in bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MG]i?)B?", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UsageError(f"{option} is {text!r}, expected a size such as 80GB or 24GiB")
    unit = {"m": 1e6, "g": 1e9, "mi": 2.0**20, "gi": 2.0**30}[found[2].lower()]
    return float(found[1]) * unit
