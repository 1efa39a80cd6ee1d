"""What is shown of an example is what training gets of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.batch import IGNORED_LABEL, PREFIX_SUBSEGMENT
from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.data.inspect import Fault, View, crop_images, look, read_record
from nanomolmo2.processor import Encoded, Processor, ProcessorConfig, Tokenizer, VideoConfig
from nanomolmo2.processor.crops import MultiCrop, resize
from tests.data.sources import Listed, encoder, picture, talk
from tests.processor.helpers import small_backend
from tests.small_model import small_processor

TAG = '<points coords="1 1 250 500">dog</points>'
SIDE = MultiCrop(max_crops=4, image_size=28, patch_size=7, overlap_margins=(1, 1))


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_processor()


def see(processor: Processor, example: Example, **options: object) -> tuple[View, Encoded]:
    encode = encoder(processor, **options)
    view = look(Listed(example), 0, encode, processor)
    assert isinstance(view, View), view
    return view, encode(example)


def qwen3_processor() -> Processor:
    """Control strings with plain text in them, such as ``user`` and a newline."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    special += ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    config = ProcessorConfig(image_size=32)
    return Processor(config, Tokenizer(small_backend(special)))


def test_every_token_is_the_one_that_training_gets(processor: Processor) -> None:
    branches = [talk("How many?", "Two dogs.", "Where?", "There."), talk("Cats?", "No.")]
    example = Example([picture(1), picture(2)], branches)
    view, encoded = see(processor, example, loss_weighting="molmo2")
    assert encoded.labels is not None and encoded.loss_weights is not None
    assert encoded.subsegment_ids is not None
    for tokens, subsegment in [
        (view.prefix, PREFIX_SUBSEGMENT),
        *((branch.tokens, branch.subsegment) for branch in view.branches),
    ]:
        (indices,) = np.nonzero(encoded.subsegment_ids == subsegment)
        assert sum(token.count for token in tokens) == len(indices)
        for token in tokens:
            run = slice(token.index, token.index + token.count)
            assert set(encoded.input_ids[run]) == {token.id}
            assert encoded.position_ids[token.index] == token.position
            assert token.learned == (encoded.labels[token.index] != IGNORED_LABEL)
            assert token.weight == encoded.loss_weights[token.index]
    assert view.num_tokens == len(encoded.input_ids)
    assert view.branches[0].weight == pytest.approx(
        float(encoded.loss_weights[encoded.subsegment_ids == 0].sum())
    )
    assert [token.count for token in view.prefix if token.role == "image"] == [4, 4]


@pytest.mark.parametrize("make", [small_processor, qwen3_processor])
def test_who_says_what(make) -> None:
    """Text of the chat format (``user``, ``assistant``, newlines) is nobody's."""
    example = Example([picture()], [talk("dogs?", "yes", "no cat?", "no"), talk("a\nb", "c")])
    view, _ = see(make(), example)

    def said(number: int, role: str) -> str:
        return "".join(t.text for t in view.branches[number].tokens if t.role == role)

    assert (said(0, "user"), said(0, "assistant")) == ("dogs?no cat?", "yesno")
    assert (said(1, "user"), said(1, "assistant")) == ("a\nb", "c")
    ends = [t for t in view.branches[0].tokens if t.text == "<|im_end|>" and t.learned]
    assert [t.role for t in ends] == ["special", "special"]
    assert not any(t.learned for t in view.prefix)


def test_special_tokens_that_a_person_types_are_text(processor: Processor) -> None:
    view, _ = see(processor, Example([], [talk("<|im_end|>", "ok")]))
    said = [t.text for t in view.branches[0].tokens if t.role == "user"]
    assert "".join(said) == "<|im_end|>"
    assert len(said) > 1


def test_parts_of_a_character_are_shown_by_their_bytes(processor: Processor) -> None:
    view, _ = see(processor, Example([], [talk("?", "Å")]))
    assert [t.text for t in view.branches[0].tokens if t.role == "assistant"] == [
        "<0xC3>",
        "<0x85>",
    ]


def test_points_are_drawn_where_they_are(processor: Processor) -> None:
    white = [Image.new("RGB", (200, 100), "white") for _ in range(2)]
    second = '<points coords="2 1 750 500">cat</points>'
    view, _ = see(processor, Example(white, [talk("Dog?", TAG), talk("Cat?", second)]))
    dog, cat = view.branches
    assert [(p.image, p.x, p.y) for p in dog.points] == [(1, 50, 50)]
    (name, drawn), *more = dog.drawn
    assert (name, more) == ("picture 1", [])
    assert drawn.getpixel((50, 44)) != (255, 255, 255)
    assert drawn.getpixel((150, 50)) == (255, 255, 255)
    assert [name for name, _ in cat.drawn] == ["picture 2"]
    assert view.images[0].getpixel((50, 44)) == (255, 255, 255)


def test_points_that_cannot_be_read_are_told(processor: Processor) -> None:
    text = '<points coords="1 1 1250 500;3 2 100 100">dog</points>'
    view, _ = see(processor, Example([picture()], [talk("Dog?", text)]))
    over, absent = view.branches[0].problems
    assert "over 1000" in over
    assert "names picture 3" in absent


def test_a_whole_picture_is_shown_as_the_encoder_gets_it(processor: Processor) -> None:
    image = picture(width=64, height=64)
    ((name, shown),) = see(processor, Example([image], [talk("?", "!")]))[0].crops
    assert name == "picture 1"
    assert np.array_equal(np.asarray(shown), np.asarray(image))


def test_crops_are_put_together_from_their_patches() -> None:
    processor = Processor(ProcessorConfig.molmo2(multicrop=SIDE), Tokenizer(small_backend()))
    image = picture(width=70, height=40)
    example = Example([image, picture(3, 20, 20)], [talk("?", "yes")])
    view, encoded = see(processor, example)
    assert encoded.image_num_crops is not None
    first = int(encoded.image_num_crops[0])
    names = [name for name, _ in view.crops]
    assert names[:2] == ["picture 1, overview", "picture 1, tile 1"]
    assert names[first] == "picture 2, overview"
    rows, cols = SIDE.tiling(70, 40)
    assert first == rows * cols + 1
    window, margin = SIDE.window_size, SIDE.margin_size
    canvas_size = (rows * window + margin, cols * window + margin)
    overview, canvas = resize(image, (28, 28), canvas_size)
    assert np.array_equal(np.asarray(view.crops[0][1]), overview)
    last = canvas[(rows - 1) * window :, (cols - 1) * window :]
    assert np.array_equal(np.asarray(view.crops[first - 1][1]), last)


def test_large_pictures_are_shown_smaller_and_reported_as_they_are(processor: Processor) -> None:
    view, _ = see(processor, Example([Image.new("RGB", (1600, 400))], [talk("Dog?", TAG)]))
    assert view.sizes == [(1600, 400)]
    assert view.images[0].size == view.branches[0].drawn[0][1].size == (640, 160)


def test_text_alone_has_nothing_to_draw(processor: Processor) -> None:
    view, encoded = see(processor, Example([], [talk("?", "!")]))
    assert (view.images, view.crops, crop_images(encoded, processor)) == ([], [], [])


def test_a_record_that_cannot_be_read_is_named_by_its_cause(
    processor: Processor, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    source = Listed(
        BadExample("no answer", "line 1 has no answer"),
        Example([tmp_path / "absent.png"], [talk("?", "!")]),
        Example([broken], [talk("?", "!")]),
        Example([picture()], [talk("only a question")]),
    )
    faults = [look(source, i, encoder(processor), processor) for i in range(4)]
    assert all(isinstance(fault, Fault) for fault in faults)
    causes = [fault.cause for fault in faults if isinstance(fault, Fault)]
    assert causes == ["no answer", "missing picture", "broken picture", "not encodable"]
    with pytest.raises(BadExample):
        read_record(source, 1, encoder(processor))


def test_points_of_a_video_are_drawn_on_their_frames(tmp_path: Path) -> None:
    clip = tmp_path / "clip.gif"
    frames = [Image.new("L", (60, 40), level) for level in (0, 100, 200)]
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500)
    config = ProcessorConfig.molmo2(multicrop=SIDE, video=VideoConfig())
    processor = Processor(config, Tokenizer(small_backend()))
    tag = '<points coords="0.5 1 500 500">dog</points>'
    view, _ = see(processor, Example([], [talk("Dog?", tag)], video=clip))
    names = [name for name, _ in view.crops]
    assert names[:2] == ["frame at 0.0 s", "frame at 0.5 s"]
    ((name, drawn),) = view.branches[0].drawn
    assert name == "frame at 0.5 s"
    assert drawn.size == (28, 28)
    assert [(p.x, p.y, p.time) for p in view.branches[0].points] == [(30, 20, 0.5)]
    absent = Example([], [talk("Dog?", tag)], video=tmp_path / "absent.gif")
    fault = look(Listed(absent), 0, encoder(processor), processor)
    assert isinstance(fault, Fault)
    assert fault.cause == "missing video"
