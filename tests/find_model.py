"""A model of the size that finds by example, with random weights: what it finds is arbitrary, and
the same each time."""

from __future__ import annotations

from functools import cache

import torch

from nanomolmo2 import VLM
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.things.find_model import CONFIG, find_processor


@cache
def find_net() -> NanoMolmo2:
    torch.manual_seed(0)
    return NanoMolmo2(CONFIG).eval()


def find_vlm(**options: int) -> VLM:
    """Every one has caches of its own."""
    return VLM(find_net(), find_processor(), **options)
