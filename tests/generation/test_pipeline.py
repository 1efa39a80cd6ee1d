"""Pipeline: the streamed pieces are the answer, points are in pixels, options reach the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.generation.pipeline import Pipeline, TextStream
from nanomolmo2.processor import Point, collate
from tests.small_model import ScriptedModel, small_model, small_processor

PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (50, 200, 3), dtype=np.uint8)  # 200 wide, 50 high
)


def scripted(*texts: str) -> tuple[Pipeline, ScriptedModel]:
    model = ScriptedModel(*texts)
    return Pipeline(model, model.processor), model


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    model = small_model()
    # Random weights would write halves of characters; those have tests of their own.
    model.llm.embed_tokens.weight.data[:257] = 0
    return Pipeline(model, small_processor())


def test_an_answer_is_what_the_model_generates(pipeline: Pipeline) -> None:
    """Against the steps by hand: encode, generate, decode."""
    answer = pipeline.ask(PICTURE, "Point to the dog.", max_new_tokens=12)
    processor = pipeline.processor
    encoded = processor.encode([{"role": "user", "content": "Point to the dog."}], [PICTURE])
    batch = collate([encoded], processor.pad_token_id)
    ids = pipeline.model.generate(batch.input_ids, batch.pixel_values, max_new_tokens=12)
    new = ids[0, batch.input_ids.shape[1] :]
    assert answer.output_tokens == len(new)
    assert answer.input_tokens == batch.input_ids.shape[1]
    assert answer.text == processor.decode(new)
    assert answer.image_sizes == ((200, 50),)


def test_pieces_come_as_they_are_written_and_make_the_text() -> None:
    text = 'Counting the <points coords="1 1 210 455 2 640 480">dog</points> shows a total of 2.'
    pipeline, _ = scripted(text)
    pieces: list[str] = []
    answer = pipeline.ask(PICTURE, "How many dogs?", on_text=pieces.append)
    assert "".join(pieces) == answer.text == text
    assert len(pieces) > 10
    assert answer.count == 2


@pytest.mark.parametrize(
    "text", ["naïve café", "雪だるま ☃️ 🦊!", "\u0301a", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "\ufffd is a character too", ""]
)
def test_no_piece_holds_half_a_character(text: str) -> None:
    """Bytes are tokens of their own here: a streamed character used to come as three U+FFFD."""
    processor = small_processor()
    pieces: list[str] = []
    stream = TextStream(processor, pieces.append)
    for id in processor.tokenizer.encode_text(text):
        stream.put(id)
    assert stream.end() == "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_by_the_limit_is_marked_once_the_text_ends() -> None:
    processor = small_processor()
    pieces: list[str] = []
    stream = TextStream(processor, pieces.append)
    for id in processor.tokenizer.encode_text("a🦊")[:-1]:
        stream.put(id)
    assert pieces == ["a"]
    assert stream.end().startswith("a\ufffd")


def test_points_are_pixels_of_their_own_picture() -> None:
    tag = '<points coords="1 1 500 500;2 2 250 1000">dog</points>'
    pipeline, _ = scripted(tag)
    other = Image.new("RGB", (40, 80))
    answer = pipeline.ask([PICTURE, other], "Point to the dogs.")
    assert answer.points == (Point(100, 25, 1, 1, "dog"), Point(10, 80, 2, 2, "dog"))
    assert answer.image_sizes == ((200, 50), (40, 80))


def test_a_point_in_a_picture_that_is_not_there_does_not_hide_the_answer() -> None:
    tag = '<points coords="7 1 500 500">dog</points>'
    pipeline, _ = scripted(tag)
    answer = pipeline.ask(PICTURE, "Point to the dog.")
    assert answer.text == tag
    assert answer.points == ()


def test_options_reach_the_model_and_the_answer_stops_where_chat_and_model_say() -> None:
    pipeline, model = scripted("Yes.")
    pipeline.ask(PICTURE, "Is it?", max_new_tokens=1, temperature=0.5, top_p=0.9, top_k=7, seed=3)
    (call,) = model.calls
    assert call["max_new_tokens"] == 1
    assert (call["temperature"], call["top_p"], call["top_k"], call["seed"]) == (0.5, 0.9, 7, 3)
    stops = {model.processor.tokenizer.special_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    assert stops <= set(call["eos_token_id"])
    assert set(model.config.eos_token_ids) <= set(call["eos_token_id"])


def test_a_seed_repeats_a_drawn_answer(pipeline: Pipeline) -> None:
    def ask(seed: int) -> str:
        answer = pipeline.ask(PICTURE, "?", max_new_tokens=16, temperature=2.0, seed=seed)
        return answer.text

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_a_conversation_and_its_pictures() -> None:
    pipeline, model = scripted("Two.", "Two.")
    first = {"role": "user", "content": "How many dogs?"}
    rest = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "Sure?"}]
    pipeline.ask(PICTURE, [first, *rest])
    inside = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "How many dogs?"}]
    pipeline.ask(None, [{"role": "user", "content": inside}, *rest])
    beside, within = model.calls
    assert torch.equal(beside["prompt_ids"], within["prompt_ids"])
    assert torch.equal(beside["pixel_values"], within["pixel_values"])


def test_a_conversation_must_end_with_a_question(pipeline: Pipeline) -> None:
    turns = [{"role": "user", "content": "Dogs?"}, {"role": "assistant", "content": "Yes."}]
    with pytest.raises(ValueError, match="expected a question"):
        pipeline.ask(PICTURE, turns)


def test_without_a_picture(pipeline: Pipeline) -> None:
    answer = pipeline.ask(None, "Hello?", max_new_tokens=3)
    assert answer.image_sizes == ()
    assert answer.output_tokens <= 3


def test_timings_are_seconds_in_order(pipeline: Pipeline) -> None:
    timings = pipeline.ask(PICTURE, "Dogs?", max_new_tokens=8).timings
    assert set(timings) == {"prepare", "first_token", "generate"}
    assert 0 < timings["first_token"] <= timings["generate"]


def test_weights_are_float32_on_the_cpu_unless_asked(tmp_path) -> None:
    small_model().to(torch.bfloat16).save_pretrained(tmp_path / "m", processor=small_processor())
    assert next(Pipeline.from_pretrained(tmp_path / "m").model.parameters()).dtype == torch.float32
    half = Pipeline.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
