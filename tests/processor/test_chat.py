"""Chat formats as text, against hand-written prompts and the templates that checkpoints ship."""

from pathlib import Path

import pytest

from nanomolmo2.processor.chat import (
    read_messages,
    render,
    render_prefix,
    render_turns,
    show_images,
    show_video,
)
from tests.processor.helpers import assistant, user

PICTURE = "[P]"


def text_of(segments):
    return "".join(segment.text for segment in segments)


def answers_of(segments):
    return [segment.text for segment in segments if segment.is_answer]


def prompt(chat_format, messages, num_pictures=0, add_generation_prompt=True):
    visual = show_images(chat_format, [PICTURE] * num_pictures)
    return render(chat_format, read_messages(messages), visual, add_generation_prompt)


def released(messages, visual=(), add_generation_prompt=True):
    """Text of a prompt as Molmo2's released template has it."""
    turns = read_messages(messages, styled=True)
    return text_of(render("molmo2", turns, visual, add_generation_prompt, released=True))


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
    visual = show_images(chat_format, [PICTURE] * 2)
    together = render_prefix(chat_format, visual) + render_turns(chat_format, turns, True)
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
        {"type": "video", "video": "a.mp4"},
        {"type": "video"},
    ]
    (turn,) = read_messages([user(content)])
    assert (turn.role, turn.text) == ("user", "What is it?")
    assert turn.images == ("a.png", None)
    assert turn.videos == ("a.mp4", None)


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
        ([user([{"type": "audio", "audio": "x"}])], "message 0 holds {'audio': 'x'"),
        ([{"role": "subtitle", "content": "x"}], "at least one user message"),
        ([user("x"), {"role": "subtitle", "content": "y"}], "message 1 is by 'subtitle'"),
        ([user([{"type": "text"}])], "message 0 holds {'type': 'text'}"),
        ([user(["x"])], "message 0 holds 'x'"),
        ([user("x"), assistant([{"type": "image"}])], "message 1 .* only users show them"),
        ([user("x"), assistant([{"type": "video"}])], "message 1 .* only users show them"),
    ],
)
def test_messages_that_are_refused(messages, error):
    with pytest.raises(ValueError, match=error):
        read_messages(messages)


def test_molmo2_has_no_system_message():
    with pytest.raises(ValueError, match="molmo2 chat format has no system message"):
        prompt("molmo2", [{"role": "system", "content": "Be brief."}, *QUESTION])


def test_qwen3_has_no_subtitle():
    with pytest.raises(ValueError, match="qwen3 chat format has no subtitle"):
        prompt("qwen3", [{"role": "subtitle", "content": "Hello"}, *QUESTION])


# ---- as Molmo2's released template renders ----


def test_frames_follow_their_times():
    text = text_of(show_video([0.0, 0.5, 1.04], "[F]"))
    assert text == "0.0 [F] 0.5 [F] 1.0 [F]"
    assert not any(s.is_control for s in show_video([0.0, 1.0], "[F]")[::2])


def test_trap_10_past_answers_follow_a_space_and_one_end_stands_between_turns():
    question, answer = "<|im_start|>user\nHow many?<|im_end|>\n", "<|im_start|>assistant\n"
    assert released(QUESTION) == f"<|im_end|>{question}{answer}"
    goes_on = "<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    assert released(GOES_ON) == f"<|im_end|>{question} {answer}2{goes_on}{answer}"
    # Training has no space, and neither have message trees.
    assert text_of(prompt("molmo2", GOES_ON)) == f"<|im_end|>{question}{answer}2{goes_on}{answer}"
    # A last answer ends with the end that is learned; nothing is opened after it.
    for add_generation_prompt in (True, False):
        text = released(FINISHED, (), add_generation_prompt)
        assert text == f"<|im_end|>{question} {answer}2<|im_end|>"


@pytest.mark.parametrize("style", ["user_qa", "long_caption", "a_okvqa_mc", "video_point", None])
def test_styles_that_are_not_named(style):
    content = [{"type": "text", "text": "What is it?"}]
    if style is not None:
        content[0]["style"] = style
    assert released([user(content)]) == released([user("What is it?")])


def test_styles_that_are_named():
    content = [{"type": "text", "text": "What?", "style": "vqa2"}]
    assert released([user(content)]) == released([user("vqa2: What?")])
    # Only where messages are read as Molmo2's.
    assert read_messages([user(content)])[0].text == "What?"


def test_texts_of_a_message_are_joined_by_a_space():
    content = [{"type": "text", "text": text} for text in ("", "a", "b")]
    assert released([user(content)]) == released([user("a b")])
    assert read_messages([user(content)])[0].text == "ab"


def test_subtitles_stand_between_the_video_and_the_first_turn():
    subtitle = {"role": "subtitle", "content": "subtitle\n0.0 - 1.5 Hello"}
    video = show_video([0.0, 0.5], "[F]")
    assert released([subtitle, *GOES_ON], video) == released(GOES_ON, video).replace(
        "<|im_start|>user", "subtitle\n0.0 - 1.5 Hello<|im_start|>user", 1
    )
    segments = render("molmo2", read_messages([subtitle, *QUESTION]), video)
    (spoken,) = (s for s in segments if s.text == subtitle["content"])
    assert not spoken.is_control and not spoken.is_answer


def test_our_template_for_other_servers_renders_the_same():
    """The template that exported folders carry; it does not print a last end."""
    jinja2 = pytest.importorskip("jinja2")
    path = Path(__file__).parents[2] / "nanomolmo2" / "assets" / "molmo2" / "chat_template.jinja"
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(path.read_text())
    subtitle = {"role": "subtitle", "content": "subtitle\nHello"}
    styled = [{"type": "text", "text": t, "style": s} for t, s in (("a", "vqa2"), ("b", "demo"))]
    for messages in (QUESTION, GOES_ON, FINISHED, [subtitle, *GOES_ON], [user(styled)]):
        for num_pictures in (0, 1, 3):
            content = [{"type": "image"}] * num_pictures
            first = next(i for i, m in enumerate(messages) if m["role"] == "user")
            text = messages[first]["content"]
            content += [{"type": "text", "text": text}] if isinstance(text, str) else text
            shown = [*messages[:first], user(content), *messages[first + 1 :]]
            opens = messages[-1]["role"] == "user"
            rendered = template.render(messages=shown, add_generation_prompt=opens)
            ours = released(shown, show_images("molmo2", ["<|image|>"] * num_pictures))
            assert ours == f"{rendered}{'' if opens else '<|im_end|>'}"


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
