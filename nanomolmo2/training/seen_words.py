"""A row of the embedding made from what was seen: a word without training.

A word's row becomes the mean of the visual tokens at its examples, as long as rows of words are.
What it is worth beside finding and telling is measured in `benchmarks.teaching`; `nanomolmo2 teach`
does not do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanomolmo2.generation.prompt import request_of
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Processor
from nanomolmo2.training.new_words import add_new_words


@torch.no_grad()
def seen_row(
    model: NanoMolmo2,
    processor: Processor,
    image: Image.Image,
    places: Sequence[tuple[float, float]],
) -> Tensor:
    """(D,) of the things at some places of an image, pixels; of length 1.

    Raises: ValueError for a model that reads no points in questions.
    """
    parts: list[Any] = [{"type": "point", "x": x, "y": y, "image": 1} for x, y in places]
    encoded = processor.encode([{"role": "user", "content": parts}], [image])
    points = request_of(model, encoded).points
    if points is None or not len(points.targets):
        raise ValueError("this model does not select what it sees: choose one that does, as tiny")
    rows = points.tokens[torch.from_numpy(points.targets[:, 0]).to(points.tokens.device)]
    return torch.nn.functional.normalize(rows.float().mean(dim=0), dim=0)


@torch.no_grad()
def with_seen_word(
    model: NanoMolmo2, processor: Processor, name: str, row: Tensor
) -> tuple[NanoMolmo2, Processor]:
    """A model and processor that have a token for a word; its row points where ``row`` does.

    Args:
        row: of `seen_row`. A later call with the same name sets it anew.
    Raises: ValueError for a vocabulary that cannot be added to.
    """
    if processor.tokenizer.backend.token_to_id(name) is None:
        model, processor = add_new_words(model, processor, [name])
    id = processor.tokenizer.backend.token_to_id(name)
    table = model.llm.embed_tokens.weight
    length = table[id].float().norm()  # a fresh row has that of words; it stays
    table[id] = (row.to(length) * length).to(table)
    return model, processor
