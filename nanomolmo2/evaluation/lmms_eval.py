"""This package's models in lmms-eval.

    lmms-eval --model nanomolmo2 --model_args pretrained=tiny --batch_size 16 --tasks ...

lmms-eval finds `manifest` by the entry point ``lmms_eval.models``, and by that the class `Adapter`,
which there is only where lmms-eval is installed: it inherits from its base class. Written for
version 0.7.3.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from nanomolmo2.generation.options import GenerateOptions
from nanomolmo2.generation.pipeline import Pipeline, Question

MAX_NEW_TOKENS = 1024  # where a task does not say


def manifest() -> object:
    """What lmms-eval enters into its list of models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("nanomolmo2", simple_class_path=f"{__name__}.Adapter")


def __getattr__(name: str) -> object:
    if name == "Adapter":
        return _adapter()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _adapter() -> type:
    from lmms_eval.api.model import lmms

    return type("Adapter", (Requests, lmms), {"__module__": __name__})


class Requests:
    """Answers what lmms-eval asks: the half of `Adapter` that does not need it."""

    is_simple = True  # questions come as a text, and pictures beside it

    def __init__(
        self,
        pretrained: str = "tiny",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        cache_dir: str = "checkpoints",
        style: str = "",
    ) -> None:
        """
        Args:
            pretrained: as ``--model`` of every command.
            batch_size: questions that are answered together.
            style: put before every question, as Molmo2 was trained on short answers: ``vqa2``.
        Raises: ValueError for a batch size that is no number.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}, expected a number of questions")
        self.batch_size = int(batch_size)
        self.style = style
        self.pipeline = Pipeline.from_pretrained(
            pretrained, device=device, dtype=dtype, quantize=quantize, cache_dir=cache_dir
        )

    @property
    def device(self) -> torch.device:
        return next(self.pipeline.model.parameters()).device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests.

        Args:
            requests: with ``args``: question, generation settings, function that makes a list of
                pictures or videos of a record, number, task and split of the record.
        Raises: ValueError for settings that there are none of here. A question that the model
            cannot take is answered with nothing, and a warning.
        """
        answers: list[str] = []
        for settings, group in groupby(requests, key=lambda request: request.args[1]):
            asked = list(group)
            options = options_of(settings)
            found = self.pipeline.ask_many(
                self._questions(asked), batch_size=self.batch_size, options=options
            )
            for request, answer in zip(asked, found, strict=True):
                text = "" if isinstance(answer, ValueError) else answer.coordinates
                if isinstance(answer, ValueError):
                    where = f"{request.args[4]}, record {request.args[3]}"
                    warnings.warn(f"{where} counts as not answered: {answer}", stacklevel=2)
                answers.append(text)
                self.cache_hook.add_partial(  # type: ignore[attr-defined]
                    "generate_until", (request.args[0], settings), text
                )
        return answers

    def _questions(self, requests: Sequence[Any]) -> Iterator[Question]:
        for request in requests:
            text, _, visuals_of, number, task, split = request.args
            record = self.task_dict[task][split][number]  # type: ignore[attr-defined]
            yield question_of(f"{self.style}: {text}" if self.style else text, visuals_of(record))

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        raise NotImplementedError(
            "this model answers in words only: choose a task of the kind generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        raise NotImplementedError(
            "this model answers one question at a time: choose a task of the kind generate_until"
        )


def question_of(text: str, visuals: Sequence[Any] | None) -> Question:
    """A question about the pictures or the video of a record.

    Raises: ValueError for several videos, pictures beside a video, and sound.
    """
    visuals = list(visuals or ())
    images = [one for one in visuals if isinstance(one, Image.Image)]
    videos = [one for one in visuals if isinstance(one, (str, Path))]
    if len(images) + len(videos) < len(visuals) or len(videos) > 1 or (videos and images):
        kinds = ", ".join(sorted({type(one).__name__ for one in visuals}))
        raise ValueError(
            f"found {len(visuals)} of the kinds {kinds}, expected pictures or one video"
        )
    return Question(text, images, videos[0] if videos else None)


def options_of(settings: Mapping[str, Any]) -> GenerateOptions:
    """lmms-eval's generation settings; greedy unless they say that tokens are drawn.

    Raises: ValueError for several beams.
    """
    if settings.get("num_beams") not in (None, 1):
        raise ValueError(
            f"the task asks for {settings['num_beams']} beams, and there is no beam search here: "
            f"--gen_kwargs num_beams=1"
        )
    until = settings.get("until") or ()
    stop = [until] if isinstance(until, str) else list(until)
    options = GenerateOptions(
        max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS), lookup=False
    ).updated(stop=[text for text in stop if text])
    temperature = float(settings.get("temperature") or 0.0)
    if not temperature or settings.get("do_sample") is False:
        return options
    return options.updated(temperature=temperature, top_p=float(settings.get("top_p") or 1.0))
