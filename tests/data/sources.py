"""Made-up sources and records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.data.example import BadExample, Branch, Example
from nanomolmo2.processor import Encoded, Processor


class Listed:
    """A source of the given examples; a BadExample in the list is raised."""

    def __init__(self, *examples: Example | BadExample, name: str = "made up") -> None:
        self.examples, self.name = examples, name

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        if isinstance(example, BadExample):
            raise example
        return example


def talk(*texts: str, task: str = "") -> Branch:
    """Question, answer, question, answer, ..."""
    roles = ("user", "assistant")
    messages: list[Any] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Branch(messages, task)


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_records(path: Path, *records: Mapping[str, Any]) -> Path:
    """A file with one record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def encoder(processor: Processor, **options: Any) -> Callable[[Example], Encoded]:
    """As training encodes examples."""

    def encode(example: Example) -> Encoded:
        branches = [branch.messages for branch in example.branches]
        return processor.encode_tree(example.images, branches, video=example.video, **options)

    return encode
