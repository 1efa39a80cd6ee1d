"""One options object: what calls take by name is what it holds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from nanomolmo2.generation import options as module
from nanomolmo2.generation.generate import RowKeywords, Rows
from nanomolmo2.generation.options import GenerateKeywords, GenerateOptions, SamplingParams
from tests.nets import small_model, text_ids


def names(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}


def test_every_field_has_its_keyword_and_no_other_is_taken() -> None:
    options = names(GenerateOptions) | names(SamplingParams)
    assert set(GenerateKeywords.__annotations__) == options
    assert set(RowKeywords.__annotations__) == options | names(Rows)
    hints = {"Tensor": torch.Tensor, "torch": torch}
    types = {
        name: kind
        for owner in (SamplingParams, GenerateOptions)
        for name, kind in get_type_hints(owner, vars(module) | hints).items()
    }
    for name, kind in get_type_hints(GenerateKeywords, vars(module) | hints).items():
        assert kind in (types[name], types[name] | None), name


def test_fields_of_the_options_and_of_its_sampling_by_name() -> None:
    made = GenerateOptions().updated(max_new_tokens=3, temperature=0.5, stop="x", lookup=False)
    assert made == GenerateOptions(3, SamplingParams(0.5, stop="x"), lookup=False)
    assert made.updated(temperature=0.0, seed=1).sampling == SamplingParams(seed=1, stop="x")
    assert made.updated(sampling=SamplingParams(top_k=3)).sampling == SamplingParams(top_k=3)
    assert made.updated(sampling=None) == made.updated() == made


def test_what_cannot_be_meant() -> None:
    sampling = SamplingParams(0.5)
    with pytest.raises(ValueError, match=r"found sampling and beside it temperature=0.7, stop=x:"):
        GenerateOptions().updated(sampling=sampling, temperature=0.7, stop="x")
    assert GenerateOptions().updated(sampling=sampling, temperature=0.0).sampling is sampling
    with pytest.raises(ValueError, match="top_p must be above 0"):
        GenerateOptions().updated(top_p=0.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        GenerateOptions().updated(temprature=0.7)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'max_tokens': did you mean 'max_new_tokens'"):
        GenerateOptions().updated(max_tokens=7)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        small_model().generate(text_ids(1, 3), temprature=0.7)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, found '5'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, found 2.5"),
        ({"temperature": "hot"}, "temperature must be a number, found 'hot'"),
        ({"top_p": None}, "top_p must be a number, found None"),
        ({"top_k": 1.5}, "top_k must be a whole number, found 1.5"),
        ({"logprobs": True}, "logprobs must be a whole number, found True"),
        ({"seed": "a"}, "seed must be a whole number, found 'a'"),
        ({"stop": 5}, "stop must be a text or a list of texts, found 5"),
        ({"stop": ["a", 5]}, "stop must be a text or a list of texts, found"),
        ({"logit_bias": {"a": 1}}, "logit_bias must give ids of tokens their bias"),
    ],
)
def test_values_of_another_kind_are_refused_in_one_sentence(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateOptions().updated(**given)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    made = GenerateOptions().updated(
        max_new_tokens=np.int64(3), temperature=np.float32(0.5), top_p=torch.tensor(0.5), seed=[1]
    )
    assert (made.max_new_tokens, float(made.sampling.temperature)) == (3, 0.5)


def test_what_ends_an_answer() -> None:
    assert GenerateOptions().end_ids((4, 5)) == (4, 5)
    assert GenerateOptions(eos_token_id=None).end_ids((4, 5)) == ()
    assert GenerateOptions(eos_token_id=7).end_ids((4, 5)) == (7,)
    assert GenerateOptions(eos_token_id=[7, 8]).end_ids() == (7, 8)


def test_options_load_without_torch() -> None:
    """A command line declares them before anything heavy is there."""
    code = "import sys, nanomolmo2.generation.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
