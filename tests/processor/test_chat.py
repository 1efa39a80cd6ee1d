"""Chat formats as text, against hand-written prompts and the templates that checkpoints ship."""

import pytest

from nanomolmo2.processor.chat import read_messages, render, render_prefix, render_turns
from tests.processor.helpers import assistant, user

PICTURE = "[P]"


def text_of(segments):
    return "".join(segment.text for segment in segments)


def answers_of(segments):
    return [segment.text for segment in segments if segment.is_answer]


def prompt(chat_format, messages, num_pictures=0, add_generation_prompt=True):
    turns = read_messages(messages)
    return render(chat_format, turns, PICTURE, num_pictures, add_generation_prompt)


QUESTION = [user("How many?")]
FINISHED = [user("How many?"), assistant("2")]
GOES_ON = [*FINISHED, user("Sure?")]


@pytest.mark.parametrize(
    ("chat_format", "messages", "num_pictures", "text"),
    [
        ("qwen3", QUESTION, 0, "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "qwen3",
            QUESTION,
            2,
            "<|im_start|>user\n[P][P]How many?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3",
            FINISHED,
            1,
            "<|im_start|>user\n[P]How many?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
        ),
        (
            "qwen3",
            GOES_ON,
            1,
            "<|im_start|>user\n[P]How many?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
            "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3",
            [{"role": "system", "content": "Be brief."}, *QUESTION],
            1,
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n[P]How many?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "molmo2",
            QUESTION,
            0,
            "<|im_end|><|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "molmo2",
            QUESTION,
            1,
            "<|im_end|>[P]<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "molmo2",
            QUESTION,
            2,
            "<|im_end|>Image 1[P]Image 2[P]<|im_start|>user\nHow many?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "molmo2",
            GOES_ON,
            1,
            "<|im_end|>[P]<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
            "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "molmo2",
            FINISHED,
            1,
            "<|im_end|>[P]<|im_start|>user\nHow many?<|im_end|>\n"
            "<|im_start|>assistant\n2<|im_end|>",
        ),
    ],
)
def test_text_of_a_prompt(chat_format, messages, num_pictures, text):
    assert text_of(prompt(chat_format, messages, num_pictures)) == text


@pytest.mark.parametrize("chat_format", ["qwen3", "molmo2"])
def test_only_answers_and_their_ends_are_learned(chat_format):
    segments = prompt(chat_format, [*GOES_ON, assistant("Yes.")])
    assert answers_of(segments) == ["2", "<|im_end|>", "Yes.", "<|im_end|>"]
    plain = [s.text for s in segments if not s.is_control]
    assert plain == ["How many?", "2", "Sure?", "Yes."]


@pytest.mark.parametrize("chat_format", ["qwen3", "molmo2"])
def test_prefix_and_turns_make_the_conversation(chat_format):
    turns = read_messages(GOES_ON)
    together = render_prefix(chat_format, PICTURE, 2) + render_turns(chat_format, turns, True)
    assert together == prompt(chat_format, GOES_ON, 2)


@pytest.mark.parametrize("chat_format", ["qwen3", "molmo2"])
def test_without_generation_prompt(chat_format):
    text = text_of(prompt(chat_format, QUESTION, add_generation_prompt=False))
    assert text.endswith("How many?<|im_end|>\n")
    # Nothing to open where the assistant has spoken.
    assert prompt(chat_format, FINISHED) == prompt(
        chat_format, FINISHED, add_generation_prompt=False
    )


def test_content_items_are_joined_and_pictures_collected():
    content = [
        {"type": "text", "text": "What "},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "is it?"},
        {"type": "image"},
    ]
    (turn,) = read_messages([user(content)])
    assert (turn.role, turn.text, turn.images) == ("user", "What is it?", ("a.png", None))


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "at least one user message"),
        ([{"role": "system", "content": "x"}], "at least one user message"),
        ("hello", "must be a list .* found str"),
        (user("hello"), "must be a list .* found dict"),
        (["hello"], "message 0 must be .* found 'hello'"),
        ([{"role": "user"}], "message 0 must be"),
        ([{"role": "bot", "content": "x"}], "message 0 has the unknown role 'bot'"),
        ([assistant("x")], "message 0 is by 'assistant' where 'user' must speak"),
        ([user("x"), user("y")], "message 1 is by 'user' where 'assistant' must speak"),
        ([user("x"), {"role": "system", "content": "y"}], "message 1 is by 'system'"),
        ([user(7)], "message 0 has content of type int"),
        ([user([{"type": "video", "video": "x"}])], "message 0 holds {'type': 'video'"),
        ([user([{"type": "text"}])], "message 0 holds {'type': 'text'}"),
        ([user(["x"])], "message 0 holds 'x'"),
        ([user("x"), assistant([{"type": "image"}])], "message 1 .* only users show pictures"),
    ],
)
def test_messages_that_are_refused(messages, error):
    with pytest.raises(ValueError, match=error):
        read_messages(messages)


def test_molmo2_has_no_system_message():
    with pytest.raises(ValueError, match="molmo2 chat format has no system message"):
        prompt("molmo2", [{"role": "system", "content": "Be brief."}, *QUESTION])


def test_qwen3_against_the_shipped_template(qwen3_reference):
    """Equal to Qwen3's own template but for the empty thinking block of a last answer."""
    system = {"role": "system", "content": "Be brief."}
    for messages in (QUESTION, GOES_ON, [system, *QUESTION], [system, *GOES_ON]):
        expected = qwen3_reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert text_of(prompt("qwen3", messages)) == expected
    expected = qwen3_reference.apply_chat_template(FINISHED, tokenize=False)
    assert text_of(prompt("qwen3", FINISHED)) == expected.replace("<think>\n\n</think>\n\n", "")
    assert "<think>" in expected  # else the documented difference is gone
