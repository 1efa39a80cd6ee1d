"""Golden values of the released checkpoints; run by hand, see docs/weights.md.

The values are those of transformers' own slow tests (tests/models/molmo2), with their tolerance.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import nanomolmo2
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Processor, collate

pytestmark = pytest.mark.weights

PICTURE = "NANOMOLMO2_MOLMO2_PICTURE"
QUESTION = "Describe this image."


@dataclass(frozen=True)
class Golden:
    """What a checkpoint says to the picture; logits are those of tokens 0 to 5 at the end."""

    folder: str  # environment variable
    dtype: torch.dtype
    logits: tuple[float, ...]
    answer: str


GOLDEN = {
    "4B": Golden(
        folder="NANOMOLMO2_MOLMO2_4B",
        dtype=torch.float32,
        logits=(-10.4075, -5.9037, -10.9776, -10.3254, -16.8476, -14.5052),
        answer="In this captivating image, a large, chubby cat",
    ),
    "8B": Golden(
        folder="NANOMOLMO2_MOLMO2_8B",
        dtype=torch.bfloat16,
        logits=(-15.875, -7.875, -15.5625, -15.0, -16.5, -18.25),
        answer="In this captivating image, a snow leopard is captured",
    ),
}

Case = tuple[Golden, NanoMolmo2, Processor]


def path_from(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"set {variable}, see docs/weights.md")
    return Path(os.environ[variable])


@pytest.fixture(scope="module", params=GOLDEN)
def case(request: pytest.FixtureRequest) -> Case:
    golden = GOLDEN[request.param]
    folder = path_from(golden.folder)
    return golden, *nanomolmo2.load(folder, dtype=golden.dtype)


def test_the_picture_becomes_the_same_crops(case: Case) -> None:
    _, _, processor = case
    picture = path_from(PICTURE)
    encoded = processor.encode([{"role": "user", "content": QUESTION}], [picture])
    assert encoded.pixel_values is not None
    assert encoded.image_token_pooling is not None
    assert encoded.pixel_values.shape[0] == 7
    assert len(encoded.image_token_pooling) == 955
    assert encoded.input_ids[0] == 151645
    expected = [
        [-0.0745, -0.0510, 0.0196],
        [-0.7020, -0.6784, -0.6078],
        [-0.8745, -0.8824, -0.8431],
    ]
    np.testing.assert_allclose(encoded.pixel_values[0, :3, :3], expected, atol=1e-4)


def test_the_next_token(case: Case) -> None:
    golden, model, processor = case
    encoded = processor.encode([{"role": "user", "content": QUESTION}], [path_from(PICTURE)])
    batch = collate([encoded], processor.pad_token_id)
    assert batch.pixel_values is not None
    with torch.no_grad():
        logits = model(
            batch.input_ids,
            batch.pixel_values.to(golden.dtype),
            image_token_pooling=batch.image_token_pooling,
        )[0, -1].float()
    torch.testing.assert_close(logits[:6], torch.tensor(golden.logits), atol=0.3, rtol=0.05)
    assert int(logits.argmax()) == 641


def test_the_answer_begins_the_same(case: Case) -> None:
    golden, model, processor = case
    picture = path_from(PICTURE)
    answer = nanomolmo2.Pipeline(model, processor).ask(picture, QUESTION, max_new_tokens=10)
    assert answer.text.strip() == golden.answer


def test_the_base_embedding_is_that_of_the_start_model(case: Case) -> None:
    """It is frozen in training; the stored head of the 4B is a copy of it."""
    golden, model, _ = case
    if golden.folder != "NANOMOLMO2_MOLMO2_4B":
        pytest.skip("the 8B has a head of its own")
    assert model.llm.lm_head is not None
    base = model.llm.embed_tokens.weight[: model.config.llm_config.vocab_size]
    assert torch.equal(model.llm.lm_head.weight, base)
