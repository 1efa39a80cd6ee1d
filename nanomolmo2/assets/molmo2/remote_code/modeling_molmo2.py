"""The network for transformers with ``trust_remote_code=True``: its own, with this folder's inputs.

Written into exported folders by NanoMolmo2, which it does not need. vLLM has a network of its own
and does not read this file. It needs transformers 5.23 or newer.
"""

from types import MethodType
from typing import Any

import torch
from transformers import Molmo2Config
from transformers import Molmo2ForConditionalGeneration as Network


class Molmo2ForConditionalGeneration(Network):
    """transformers' network, built from its own config of the same folder."""

    config_class = Molmo2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.get_image_features = MethodType(of_either_index, self.model)

    @classmethod
    def from_pretrained(
        cls, path: Any, *arguments: Any, config: Any = None, **kwargs: Any
    ) -> Network:
        # The config beside this file spells the parts as servers read them, the network does not.
        return super().from_pretrained(
            path, *arguments, config=Molmo2Config.from_pretrained(path), **kwargs
        )


def of_either_index(
    model: Any,
    pixel_values: torch.Tensor,
    image_token_pooling: torch.Tensor,
    image_grids: torch.Tensor,
    **kwargs: Any,
) -> object:
    """The features of pictures or frames, whichever way the pooling index counts their patches."""
    tokens = image_grids[:, :2].prod(1) + image_grids[:, 2:].prod(1)
    index = over_the_batch(image_token_pooling, tokens.tolist())
    return type(model).get_image_features(model, pixel_values, index, image_grids, **kwargs)


def over_the_batch(index: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """A pooling index that counts the patches of each picture from 0 -> one that counts on.

    Args:
        index: (rows, K), -1 is empty; one that counts on already stays as it is.
        tokens: how many rows are of each picture. The last patch of each is in its rows.
    """
    rows = list(index.split(tokens))
    if len(rows) < 2 or all(int(row[row >= 0].min()) for row in rows[1:]):
        return index
    first = 0
    for number, row in enumerate(rows):
        rows[number] = torch.where(row < 0, row, row + first)
        first += int(row.max()) + 1
    return torch.cat(rows)
