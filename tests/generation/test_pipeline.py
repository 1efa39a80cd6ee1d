"""Pipeline: the streamed pieces are the answer, points are in pixels, options reach the model."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.batch import Batch
from nanomolmo2.generation.constraint import PointsProposer
from nanomolmo2.generation.options import GenerateOptions
from nanomolmo2.generation.pipeline import Answer, Pipeline, TextStream
from nanomolmo2.generation.sampling import SamplingParams
from nanomolmo2.generation.speculative import Drafter, StepCosts
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Point, Processor, ProcessorConfig, collate
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.processor import VideoConfig
from nanomolmo2.processor.video import Video
from tests.small_model import ScriptedModel, small_config, small_model, small_processor

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


def test_a_stream_gives_the_pieces_and_last_the_answer(pipeline: Pipeline) -> None:
    options = GenerateOptions(12, SamplingParams(temperature=1.0, seed=3))
    pieces: list[str] = []
    wanted = pipeline.ask(PICTURE, "Dogs?", options=options, on_text=pieces.append)
    *streamed, answer = pipeline.stream(PICTURE, "Dogs?", options=options, reuse=False)
    assert isinstance(answer, Answer)
    assert streamed == pieces
    assert (answer.text, answer.output_tokens) == (wanted.text, wanted.output_tokens)
    by_name = pipeline.ask(PICTURE, "Dogs?", max_new_tokens=12, temperature=1.0, seed=3)
    assert by_name.text == wanted.text
    shorter = pipeline.ask(PICTURE, "Dogs?", options=options, max_new_tokens=2)
    assert (shorter.output_tokens, shorter.finish_reason) == (2, "length")


def test_what_is_wrong_with_a_question_is_said_before_the_first_piece(pipeline: Pipeline) -> None:
    for wrong, message in (
        ({"max_new_tokens": 10**6}, "max_new_tokens may be 0 to"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"sampling": SamplingParams(), "seed": 3}, "found sampling and beside it seed=3"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.stream(PICTURE, "Dogs?", **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'"):
        pipeline.ask(PICTURE, "Dogs?", max_tokens=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "question",
    [
        "",
        " \n",
        "\u200b\u3000",
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image"}]}],
        [
            {"role": "user", "content": "Dogs?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "\t"},
        ],
    ],
)
def test_an_empty_question_is_refused(pipeline: Pipeline, question: Any) -> None:
    with pytest.raises(ValueError, match="the question is empty"):
        pipeline.stream(PICTURE, question)


def test_a_book_is_refused_before_it_is_encoded(pipeline: Pipeline, monkeypatch) -> None:
    """10 MB took 16 s and 1.8 GB."""
    context = pipeline.model.config.llm_config.max_position_embeddings
    monkeypatch.setattr(pipeline.processor, "encode", None)  # not called
    book = "word " * 2_000_000
    for question in (
        book,
        "x" * (32 * context + 1),
        [{"role": "user", "content": [{"type": "text", "text": book}]}],
        [
            {"role": "user", "content": "Dogs?"},
            {"role": "assistant", "content": book},
            {"role": "user", "content": "Where?"},
        ],
    ):
        start = time.perf_counter()
        with pytest.raises(ValueError, match=r"context of 512 tokens cannot hold: shorten it"):
            pipeline.stream(PICTURE, question)
        assert time.perf_counter() - start < 1


def test_a_question_that_may_fit_is_encoded(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="max_new_tokens may be 0 to"):
        pipeline.stream(PICTURE, "a dog " * 80, max_new_tokens=500)


def test_a_stream_that_is_left_leaves_nothing_behind(pipeline: Pipeline) -> None:
    stream = pipeline.stream(PICTURE, "Dogs?", max_new_tokens=8)
    next(stream)
    del stream
    assert pipeline.ask(PICTURE, "Cats?", max_new_tokens=8).text == (
        pipeline.ask(PICTURE, "Cats?", max_new_tokens=8, reuse=False).text
    )


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
    (problem,) = answer.problems
    assert "names picture 7, but the prompt has 1" in problem


def test_what_cannot_be_read_costs_no_other_point_and_is_reported() -> None:
    """Pointing at a picture that is not there used to take the other points along."""
    pipeline, _ = scripted('<points coords="1 1 500 500 2 64 480;2 3 250 250">dog</points>')
    answer = pipeline.ask(PICTURE, "Point to the dogs.")
    assert answer.points == (Point(100, 25, 1, 1, "dog"),)
    assert len(answer.problems) == 2
    pipeline, _ = scripted("Yes.")
    assert pipeline.ask(PICTURE, "Is it?").problems == ()


def test_options_reach_the_model_and_the_answer_stops_where_chat_and_model_say() -> None:
    pipeline, model = scripted("Yes.")
    pipeline.ask(PICTURE, "Is it?", max_new_tokens=1, temperature=0.5, top_p=0.9, top_k=7, seed=3)
    (call,) = model.calls
    assert call["max_new_tokens"] == 1
    sampling = call["sampling"]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)
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


# ---- settings ----


def test_settings_reach_the_model() -> None:
    pipeline, model = scripted("Yes.", "Yes.")
    pipeline.ask(
        PICTURE,
        "Is it?",
        min_p=0.1,
        repetition_penalty=1.2,
        logit_bias={3: 1.0},
        stop="no",
        logprobs=2,
        lookup=False,
        batch_invariant=True,
    )
    pipeline.ask(PICTURE, "Is it?")
    first, second = model.calls
    assert first["sampling"] == SamplingParams(
        min_p=0.1, repetition_penalty=1.2, logit_bias={3: 1.0}, stop="no", logprobs=2
    )
    assert (first["lookup"], first["batch_invariant"], first["proposer"]) == (False, True, None)
    assert second["sampling"] == SamplingParams()
    assert (second["lookup"], second["batch_invariant"]) == (True, False)
    assert isinstance(second["proposer"], PointsProposer)


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("two", "One, "),
        (["three", ", t"], "One"),
        ("One", ""),
        ("three!", "One, two, three"),  # begins and does not come: nothing is lost
        ("four", "One, two, three"),
    ],
)
def test_a_stop_text_is_never_shown(stop: str | list[str], shown: str) -> None:
    pipeline, _ = scripted("One, two, three")
    pieces: list[str] = []
    answer = pipeline.ask(PICTURE, "Count.", stop=stop, on_text=pieces.append)
    assert answer.text == "".join(pieces) == shown
    assert answer.finish_reason == "stop"
    whole = len(pipeline.processor.tokenizer.encode_text("One, two, three")) + 1
    assert (answer.output_tokens < whole) == (shown != "One, two, three")


def test_a_stop_text_ends_generation_at_once(pipeline: Pipeline) -> None:
    """With drafts too: not a token is written behind it."""
    settings = {"max_new_tokens": 24, "temperature": 1.0, "seed": 2}
    whole = pipeline.ask(PICTURE, "Dogs?", **settings)
    assert len(whole.text) > 12
    stop = whole.text[7:10]
    at = whole.text.index(stop)
    answer = pipeline.ask(PICTURE, "Dogs?", stop=stop, **settings)
    assert (answer.text, answer.finish_reason) == (whole.text[:at], "stop")
    ids = pipeline_ids(pipeline, "Dogs?", **settings)
    enough = next(n for n in range(len(ids) + 1) if stop in pipeline.processor.decode(ids[:n]))
    assert answer.output_tokens == enough


def pipeline_ids(pipeline: Pipeline, question: str, **settings: Any) -> list[int]:
    """Ids of the answer, by hand."""
    batch = prompt(pipeline, question)
    ids = pipeline.model.generate(batch.input_ids, batch.pixel_values, **settings)
    return ids[0, batch.input_ids.shape[1] :].tolist()


def prompt(pipeline: Pipeline, question: str) -> Batch:
    encoded = pipeline.processor.encode([{"role": "user", "content": question}], [PICTURE])
    return collate([encoded], pipeline.processor.pad_token_id)


def test_an_answer_that_was_cut_off_says_so(pipeline: Pipeline) -> None:
    answer = pipeline.ask(PICTURE, "Dogs?", max_new_tokens=2)
    assert (answer.finish_reason, answer.output_tokens, answer.logprobs) == ("length", 2, ())
    none = pipeline.ask(PICTURE, "Dogs?", max_new_tokens=0)
    assert (none.finish_reason, none.output_tokens, none.text) == ("length", 0, "")


def test_log_probabilities_are_those_of_a_plain_forward_pass(pipeline: Pipeline) -> None:
    """Whatever the settings: they are the model's own."""
    settings = {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3}
    answer = pipeline.ask(PICTURE, "Dogs?", max_new_tokens=8, logprobs=3, top_k=5, **settings)
    assert len(answer.logprobs) == answer.output_tokens
    batch = prompt(pipeline, "Dogs?")
    ids = torch.tensor([[one.token for one in answer.logprobs]])
    with torch.no_grad():
        logits = pipeline.model(torch.cat([batch.input_ids, ids], dim=1), batch.pixel_values)
    wanted = logits[0, -ids.shape[1] - 1 : -1].log_softmax(-1)
    found = torch.tensor([one.logprob for one in answer.logprobs])
    torch.testing.assert_close(found, wanted.gather(1, ids[0][:, None])[:, 0])
    for one, row in zip(answer.logprobs, wanted, strict=True):
        assert [id for id, _ in one.top] == row.topk(3).indices.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in one.top]), row.topk(3).values)


def test_a_model_that_knows_nothing_writes_only_points_that_can_be_read() -> None:
    """Random weights with a liking for tags; the grammar decides where what they like may come."""
    pipeline = Pipeline(small_model(), small_processor())
    tokenizer = pipeline.processor.tokenizer
    likings = {'<points coords="1': 5.0, '">': 5.0, "</points>": 6.0, "<|im_end|>": 4.0}
    bias = {
        (tokenizer.special_id(text) if "|" in text else tokenizer.encode_text(text)[0]): value
        for text, value in likings.items()
    }

    def ask(seed: int, constrained: bool) -> Answer:
        return pipeline.ask(
            [PICTURE, PICTURE],
            "Dogs?",
            temperature=1.0,
            seed=seed,
            logit_bias=bias,
            well_formed_points=constrained,
            max_new_tokens=200,
        )

    answers = [ask(seed, True) for seed in range(12)]
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert len(ended) >= 6
    assert not any(answer.problems for answer in ended)
    assert sum(len(answer.points) for answer in ended) >= 6
    assert any(ask(seed, False).problems for seed in range(12))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("constrained", [False, True])
def test_lookup_changes_no_answer(
    temperature: float, constrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(small_model(), small_processor())
    opening = pipeline.processor.tokenizer.encode_text('<points coords="1')[0]
    drafted: list[int] = []
    draft = Drafter.draft

    def always(self: Drafter, room: int | None = None, **beside: int) -> list[int]:
        self.width.costs = FREE
        guess = draft(self, room, **beside)
        drafted.append(len(guess))
        return guess

    monkeypatch.setattr(Drafter, "draft", always)
    for seed in range(6):
        plain, guessed = (
            pipeline.ask(
                PICTURE,
                "Point to the dogs.",
                max_new_tokens=40,
                temperature=temperature,
                seed=seed,
                logit_bias={opening: 4.0},
                well_formed_points=constrained,
                lookup=lookup,
                reuse=False,
                batch_invariant=True,
                logprobs=1,
            )
            for lookup in (False, True)
        )
        assert guessed.logprobs == plain.logprobs
        assert guessed.text == plain.text
    assert sum(drafted) > 20


class FreeDrafts(StepCosts):
    """Every step costs the same: all guesses are tried."""

    def seconds(self, positions: int) -> float:
        return 1.0


FREE = FreeDrafts()


# ---- crops and videos ----


def in_crops(processor: Processor) -> Processor:
    """The small processor for a model of the Molmo2 design: 4 x 4 patches a crop, and videos."""
    config = ProcessorConfig.molmo2(
        multicrop=MultiCrop(max_crops=2, image_size=64, patch_size=16, overlap_margins=(1, 1)),
        video=VideoConfig(max_frames=4, pooling_size=2),
    )
    return Processor(config, processor.tokenizer)


def scripted_in_crops(*texts: str) -> tuple[Pipeline, ScriptedModel]:
    model = ScriptedModel(*texts)
    model.processor = in_crops(model.processor)
    return Pipeline(model, model.processor), model


VIDEO = Video(
    tuple(np.full((50, 200, 3), 60 * number, dtype=np.uint8) for number in range(3)),
    (0.0, 0.5, 1.0),
)


def test_crops_and_their_pooling_reach_the_model() -> None:
    pipeline, model = scripted_in_crops("Yes.", "Yes.")
    answer = pipeline.ask([PICTURE, PICTURE], "Is it?")
    (call,) = model.calls
    crops, patches, _ = call["pixel_values"].shape
    pooling = call["image_token_pooling"]
    tokens = int((call["prompt_ids"] == pipeline.processor.image_token_id).sum())
    assert crops > 2
    assert pooling.shape == (tokens, 4)
    assert pooling.max() == crops * patches - 1  # the last corner of the second picture
    assert answer.image_sizes == ((200, 50), (200, 50))
    assert (answer.video_size, answer.frame_times) == (None, ())


def test_a_model_without_crops_gets_no_pooling() -> None:
    pipeline, model = scripted("Yes.")
    pipeline.ask(PICTURE, "Is it?")
    assert model.calls[0]["image_token_pooling"] is None


def test_points_in_a_video_have_times_and_pixels_of_its_frames() -> None:
    tag = '<points coords="0.0 1 500 500;1.0 2 250 1000">dog</points>'
    pipeline, model = scripted_in_crops(tag)
    answer = pipeline.ask(None, "Point to the dogs.", video=VIDEO)
    assert answer.points == (
        Point(100, 25, id=1, label="dog", time=0.0),
        Point(50, 50, id=2, label="dog", time=1.0),
    )
    assert answer.problems == ()
    assert answer.count == 2
    assert (answer.video_size, answer.frame_times) == ((200, 50), (0.0, 0.5, 1.0))
    assert answer.image_sizes == ()
    (call,) = model.calls
    assert len(call["pixel_values"]) == 3
    assert len(call["image_token_pooling"]) == 3 * 4  # 4 x 4 patches pooled by 2 x 2


def test_a_video_beside_a_conversation_or_in_it() -> None:
    pipeline, model = scripted_in_crops("Two.", "Two.", "Two.")
    rest = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "Sure?"}]
    text = {"type": "text", "text": "How many dogs?"}
    conversations = (
        ([{"role": "user", "content": "How many dogs?"}, *rest], VIDEO),
        ([{"role": "user", "content": [{"type": "video", "video": VIDEO}, text]}, *rest], None),
        ([{"role": "user", "content": [text, {"type": "video"}]}, *rest], VIDEO),
    )
    for messages, video in conversations:
        pipeline.ask(None, messages, video=video)
    first, *others = model.calls
    for other in others:
        assert torch.equal(other["prompt_ids"], first["prompt_ids"])
        assert torch.equal(other["pixel_values"], first["pixel_values"])


def test_a_video_for_a_model_without_videos() -> None:
    pipeline, _ = scripted("Yes.")
    with pytest.raises(ValueError, match="video"):
        pipeline.ask(None, "Is it?", video=VIDEO)


@pytest.mark.parametrize("what", ["pictures", "video"])
def test_a_real_model_takes_crops_and_frames(what: str) -> None:
    """Against the steps by hand."""
    pipeline = Pipeline(small_model(), in_crops(small_processor()))
    shown = {"images": [PICTURE]} if what == "pictures" else {"images": None, "video": VIDEO}
    answer = pipeline.ask(**shown, question="Dogs?", max_new_tokens=6)
    item = {"type": "video", "video": VIDEO} if what == "video" else {"type": "image"}
    content = [item, {"type": "text", "text": "Dogs?"}]
    encoded = pipeline.processor.encode([{"role": "user", "content": content}], shown["images"])
    batch = collate([encoded], pipeline.processor.pad_token_id)
    ids = pipeline.model.generate(
        batch.input_ids,
        batch.pixel_values,
        image_token_pooling=batch.image_token_pooling,
        max_new_tokens=6,
    )
    assert answer.text == pipeline.processor.decode(ids[0, batch.input_ids.shape[1] :])


# ---- what earlier questions computed ----


@pytest.mark.parametrize("crops", [False, True])
def test_a_second_question_reuses_the_picture(crops: bool) -> None:
    pipeline = Pipeline(small_model(), in_crops(small_processor()) if crops else small_processor())
    encoded: list[int] = []
    hook = pipeline.model.vision_encoder.register_forward_pre_hook(
        lambda module, inputs: encoded.append(len(inputs[0]))
    )
    try:
        first = pipeline.ask(PICTURE, "Point to the dog.", max_new_tokens=6)
        second = pipeline.ask(PICTURE, "How many cats?", max_new_tokens=6)
        assert len(encoded) == 1
        anew = pipeline.ask(PICTURE, "How many cats?", max_new_tokens=6, reuse=False)
        assert len(encoded) == 2
    finally:
        hook.remove()
    assert (first.reused_tokens, anew.reused_tokens) == (0, 0)
    image = pipeline.processor.image_token_id
    messages = [{"role": "user", "content": "How many cats?"}]
    ids = pipeline.processor.encode(messages, [PICTURE]).input_ids
    assert second.reused_tokens > int(np.flatnonzero(ids == image)[-1])
    assert second.reused_tokens < second.input_tokens
    assert second.text == anew.text


def test_crops_of_the_first_picture_are_known_beside_another() -> None:
    """Where pictures look back only, what stands before the one that differs is shared."""
    processor = in_crops(small_processor())
    config = replace(small_config(processor), bidirectional_image_attention=False)
    torch.manual_seed(0)
    pipeline = Pipeline(NanoMolmo2(config).eval(), processor)
    one, other = (Image.new("RGB", (40, 80), (color, 10, 10)) for color in (0, 200))
    pipeline.ask([PICTURE, one], "Dogs?", max_new_tokens=2)
    answer = pipeline.ask([PICTURE, other], "Dogs?", max_new_tokens=2)
    ids = processor.encode([{"role": "user", "content": "Dogs?"}], [PICTURE, other]).input_ids
    alone = processor.encode([{"role": "user", "content": "Dogs?"}], [PICTURE]).input_ids
    places = np.flatnonzero(ids == processor.image_token_id)
    first_of_other = places[int((alone == processor.image_token_id).sum())]
    assert answer.reused_tokens == first_of_other
    again = pipeline.ask([PICTURE, other], "Dogs?", max_new_tokens=2, reuse=False)
    assert answer.text == again.text


def test_the_next_turn_reuses_the_ones_before(pipeline: Pipeline) -> None:
    first = pipeline.ask(PICTURE, "Dogs?", max_new_tokens=6)
    turns = [
        {"role": "user", "content": "Dogs?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Sure?"},
    ]
    second = pipeline.ask(PICTURE, turns, max_new_tokens=6)
    assert second.reused_tokens >= first.input_tokens - 1
    assert second.text == pipeline.ask(PICTURE, turns, max_new_tokens=6, reuse=False).text


def test_another_picture_is_seen(pipeline: Pipeline) -> None:
    pipeline.ask(PICTURE, "Dogs?", max_new_tokens=6)
    other = Image.new("RGB", (40, 80), (200, 10, 10))
    answer = pipeline.ask(other, "Dogs?", max_new_tokens=6)
    assert answer.text == pipeline.ask(other, "Dogs?", max_new_tokens=6, reuse=False).text
    assert answer.reused_tokens == 0  # tokens of a picture see each other


def test_no_bytes_no_reuse() -> None:
    pipeline = Pipeline(small_model(), small_processor(), reuse_bytes=0)
    for _ in range(2):
        assert pipeline.ask(PICTURE, "Dogs?", max_new_tokens=3).reused_tokens == 0
    assert pipeline.prefix_cache.nbytes == 0
