"""``nanomolmo2 chat``: lines from a script and from a terminal, commands, what is written."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2 import VLM, cli
from nanomolmo2.cli import chat, console
from nanomolmo2.cli.conversation import COMMANDS, Conversation, free_name, is_saved_chat, split
from nanomolmo2.cli.options import UsageError
from nanomolmo2.data.sources import open_source
from nanomolmo2.demo import DEMO
from nanomolmo2.processor import Processor, ProcessorConfig
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.draw import draw_points
from nanomolmo2.processor.processor import VideoConfig
from tests.small_model import ScriptedModel

SCENE = DEMO / "scene.png"
PROMPT = b">\x1b[0m"  # as prompt_toolkit writes it
TAG = '<points coords="1 1 210 455 2 640 480">dog</points>'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two pictures."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 50), "green").save("a.png")
    Image.new("RGB", (40, 80), "blue").save("my b.png")
    return tmp_path


@pytest.fixture
def talk(folder: Path) -> Iterator[Any]:
    """``talk(text, ...)``: a conversation with a model that says these texts."""
    begun: list[Conversation] = []

    def start(*texts: str, show: Any = None, pictures: tuple[str, ...] = ("a.png",)) -> Any:
        torch.manual_seed(0)
        scripted = ScriptedModel(*texts)
        conversation = Conversation(
            lambda _: VLM(scripted, scripted.processor), "scripted", {"lookup": False}, show
        )
        conversation.start(pictures)
        conversation.calls = scripted.calls  # type: ignore[attr-defined]
        begun.append(conversation)
        return conversation

    yield start
    for conversation in begun:
        conversation.close()


def prompt(conversation: Any, number: int) -> str:
    """What the model was shown, call by call."""
    ids = conversation.calls[number]["prompt_ids"][0].tolist()
    return str(conversation.vlm.processor.tokenizer.decode(ids))


# ---- a script ----


def script(lines: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanomolmo2", "chat", *map(str, arguments)]
    return subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_a_script_gets_the_answers_of_a_conversation(tmp_path: Path) -> None:
    """Without prompt_toolkit, which is hidden here; later turns know the earlier ones."""
    (tmp_path / "prompt_toolkit.py").write_text("raise ImportError", encoding="utf-8")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    questions = ["Describe this picture.", "How many sunflowers are there?", "Point to the snail."]
    lines = [questions[0], questions[1], "/reset", "", questions[2]]
    done = script(
        "\n".join(lines), SCENE, "--device", "cpu", env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    with VLM("tiny", device="cpu") as vlm:
        talked = vlm.chat(SCENE)
        expected = [talked.ask(question).text for question in questions[:2]]
        expected.append(vlm.ask(SCENE, questions[2]).text)
    assert done.stdout.splitlines() == expected
    assert done.stderr == "on the CPU, float32\n"


def test_a_line_that_fails_has_its_number(talk, folder: Path, monkeypatch, capsys) -> None:
    """The others are handled, and the exit code tells of it."""
    conversation = talk("Yes.")
    monkeypatch.setattr(chat, "Conversation", lambda *_: conversation)
    monkeypatch.setattr(conversation, "start", lambda _: None)
    lines = ["/imgae a.png", "A dog?", "/video", "/save", "/quit", "Never asked."]
    monkeypatch.setattr(chat, "plain_lines", lambda: iter(lines))
    assert cli.main(["chat"]) == 1
    out, err = capsys.readouterr()
    assert out == "Yes.\n"
    assert err.splitlines() == [
        "line 1: there is no command /imgae: did you mean /image? /help lists them",
        "line 3: /video takes a name: /video FILE",
        "wrote chat.jsonl",
        "nanomolmo2: 2 of 5 lines failed",
    ]


def test_what_is_wrong_is_found_before_a_model_is_loaded(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(chat, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    (folder / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    for arguments, said in (
        (["none.png"], "there is no file"),
        (["a.png", "--top-p", "2"], "--top-p must be above 0"),
        (["a.png", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
    ):
        assert cli.main(["chat", *arguments]) in (1, 2)
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert said in err


def transcripts() -> list[str]:
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")
    return re.findall(r"^```console\n([\s\S]*?)^```$", page, re.MULTILINE)


def test_the_page_shows_what_happens(folder: Path, monkeypatch) -> None:
    """Line by line, as in a terminal that shows no pictures."""
    (transcript,) = transcripts()
    command, *rest = transcript.splitlines()
    typed = [line.removeprefix("> ") for line in rest if line.startswith("> ")]
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]

    def lines(*_: object, **__: object) -> Iterator[str]:
        for line in typed:
            print(f"> {line}")
            yield line

    (folder / "nanomolmo2").symlink_to(Path(__file__).parents[2] / "nanomolmo2")
    monkeypatch.setattr(console, "edited_lines", lines)
    monkeypatch.setattr(console, "picture_shower", lambda: lambda _: False)
    monkeypatch.setattr(console, "require_console", lambda: None)
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, stream, terminal)
    assert cli.main([*command.split()[2:], "--device", "cpu"]) == 0
    assert terminal.getvalue().splitlines() == rest


def test_the_page_tells_of_every_command() -> None:
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        shown = f"`{name} {command.arguments}`" if command.arguments else f"`{name}`"
        assert shown in page, name


# ---- questions and what is remembered ----


def test_turns_are_remembered_and_pictures_are_added(talk, capsys) -> None:
    conversation = talk("A dog.", "Two.")
    assert conversation.handle("What?")
    assert conversation.handle("/image 'my b.png'")
    assert conversation.handle("And now?")
    assert capsys.readouterr().out == "A dog.\nTwo.\n"
    assert "What?" in prompt(conversation, 1) and "A dog." in prompt(conversation, 1)
    assert conversation.calls[0]["pixel_values"].shape[0] == 1
    assert conversation.calls[1]["pixel_values"].shape[0] == 2
    assert [Path(one.path).name for one in conversation.shown] == ["a.png", "my b.png"]


def test_undo_brings_the_pictures_back(talk, capsys) -> None:
    conversation = talk("First.", "Second.", "Third.")
    conversation.handle("One?")
    conversation.handle("/image my\\ b.png")
    conversation.handle("Two?")
    conversation.handle("/undo")
    assert [Path(one.path).name for one in conversation.pending] == ["my b.png"]
    conversation.handle("Three?")
    assert "One?" in prompt(conversation, 2) and "Two?" not in prompt(conversation, 2)
    conversation.handle("/undo")
    conversation.handle("/undo")
    assert [Path(one.path).name for one in conversation.pending] == ["a.png", "my b.png"]
    with pytest.raises(UsageError, match="there is nothing to take back"):
        conversation.handle("/undo")


def test_reset(talk) -> None:
    conversation = talk("First.", "Second.", "Third.")
    conversation.handle("One?")
    conversation.handle("/reset")
    conversation.handle("Two?")
    assert "One?" not in prompt(conversation, 1)
    assert conversation.calls[1]["pixel_values"] is not None
    conversation.handle("/reset all")
    assert conversation.shown == []
    conversation.handle("Three?")
    assert conversation.calls[2]["pixel_values"] is None
    with pytest.raises(UsageError, match="/reset takes nothing, or all, found some"):
        conversation.handle("/reset some")


def test_a_question_that_is_refused_changes_nothing(talk) -> None:
    conversation = talk("Yes.")
    with pytest.raises(ValueError, match="shorten it"):
        conversation.handle("a" * 100_000)
    assert len(conversation.pending) == 1
    conversation.handle("A dog?")
    assert conversation.calls[0]["pixel_values"].shape[0] == 1


def test_notes_for_people(talk, capsys) -> None:
    """Where points are in pixels, and that an answer was cut off; codes are shown."""
    conversation = talk(f"{TAG}\x1b[2J", "a b c d e f g h", show=lambda _: False)
    conversation.handle("Dogs?")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"{TAG}\\x1b[2J"
    assert err == "  in pixels: dog (21, 23), (64, 24)\n"
    conversation._generation = {"lookup": False, "max_new_tokens": 3}
    conversation.handle("More?")
    assert "cut off after 3 tokens" in capsys.readouterr().err


# ---- commands ----


def test_every_command_is_listed_and_there(talk, capsys) -> None:
    conversation = talk()
    capsys.readouterr()
    conversation.handle("/help")
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed[:-1] == list(COMMANDS)
    for name in COMMANDS.keys() - {"/quit"}:
        assert callable(getattr(conversation, f"_{name[1:]}"))
    assert conversation.handle("  /quit ") is False
    assert conversation.handle("/q") is False  # the beginning is enough
    with pytest.raises(UsageError, match="there is no command /: /help lists them"):
        conversation.handle("/")


def test_pictures_are_listed(talk, folder: Path, capsys) -> None:
    conversation = talk(show=lambda _: True)
    assert capsys.readouterr().out == "picture 1: a.png (100 x 50)\n"
    conversation.handle("/image my b.png")  # one file, though nothing is quoted
    assert capsys.readouterr().out == "picture 2: my b.png (40 x 80)\n"
    conversation.handle("/image")
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize("line", ["{folder}/a.png", "'{folder}/my b.png'", "{folder}/my\\ b.png"])
def test_a_file_that_is_dropped_into_the_terminal(talk, folder: Path, line: str) -> None:
    conversation = talk(pictures=())
    line = line.format(folder=folder)
    conversation.handle(line if line.startswith("/") else f"/image {line}")
    assert len(conversation.shown) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/image none.png", "there is no file"),
        ("/image a.png none.png", "there is no file"),
        ("/image notes.txt", "text"),
        ("/image 'a.png", "a quote does not end"),
        ("/image https://example.com/a.png", "nothing is downloaded here"),
        ("/video a.png", "a.png"),
        ("/video clip.gif", "shows pictures or one video"),
        ("/undo 3", "/undo takes nothing, found 3"),
        ("/draw", "nothing to draw: ask something first"),
        ("/save", "nothing to save: ask something first"),
        ("/save a b", "/save takes /save \\[FILE\\]; put a name with spaces in quotes, found a b"),
        ("/nothing", "there is no command /nothing: /help lists them"),
        ("/drwa", "did you mean /draw"),
    ],
)
def test_commands_that_cannot_be(talk, folder: Path, line: str, said: str) -> None:
    Image.new("RGB", (9, 9)).save("clip.gif")
    (folder / "notes.txt").write_text("notes", encoding="utf-8")
    conversation = talk("Yes.")
    before = sorted(folder.iterdir())
    with pytest.raises((ValueError, OSError), match=said):
        conversation.handle(line)
    assert sorted(folder.iterdir()) == before
    assert [Path(one.path).name for one in conversation.shown] == ["a.png"]


@pytest.fixture
def clip(folder: Path) -> str:
    """An animated GIF: 3 frames of 100 x 50 pixels, half a second each."""
    frames = [Image.new("RGB", (100, 50), colour) for colour in ("green", "blue", "gray")]
    frames[0].save("wave.gif", save_all=True, append_images=frames[1:], duration=500)
    return "wave.gif"


def test_a_video_for_a_model_that_takes_none(talk, clip: str) -> None:
    conversation = talk("Yes.", pictures=())
    with pytest.raises(UsageError, match="the model scripted does not take videos"):
        conversation.handle(f"/video {clip}")
    assert conversation.shown == []


def test_a_video(talk, clip: str, folder: Path, capsys) -> None:
    """An animated GIF as one; points have their time, drawings and what is saved are of videos."""
    tag = '<points coords="0.5 2 200 200;1.5 3 500 500">dog</points>'
    conversation = talk(tag, show=lambda _: pytest.fail("no still shows it"), pictures=())
    config = ProcessorConfig.molmo2(
        multicrop=MultiCrop(max_crops=4, image_size=64, patch_size=16, overlap_margins=(1, 1)),
        video=VideoConfig(max_frames=8, pooling_size=2),
    )
    conversation.vlm.processor = Processor(config, conversation.vlm.processor.tokenizer)
    conversation.handle(f"/video {clip}")
    with pytest.raises(UsageError, match="pictures or one video"):
        conversation.handle("/image a.png")
    conversation.handle("Where?")
    assert len(conversation.calls[0]["pixel_values"]) == 4
    conversation.handle("/draw")
    conversation.handle("/save")
    out, err = capsys.readouterr()
    assert out == f"the video: wave.gif (100 x 50)\n{tag}\n"
    said = [
        "  in pixels: dog (20, 10) at 0.5 s, (50, 25) at 1.5 s",
        "wrote points.gif",
        "wrote chat.jsonl",
    ]
    assert err.splitlines() == said
    with Image.open("points.gif") as drawn:
        assert (drawn.size, drawn.n_frames) == ((100, 50), 4)
    (line,) = (folder / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["video"] == "wave.gif"
    with pytest.raises(UsageError, match="written over"):
        conversation.handle(f"/draw {clip}")


def test_drawings(talk, folder: Path, capsys) -> None:
    conversation = talk("No.", TAG, TAG)
    conversation.handle("A dog?")
    with pytest.raises(UsageError, match="has no points"):
        conversation.handle("/draw")
    conversation.handle("Dogs?")
    conversation.handle("/draw")
    conversation.handle("/draw out.png")
    conversation.handle("/draw")
    assert capsys.readouterr().err.splitlines() == [
        "wrote points.png",
        "wrote out.png",
        "wrote points-2.png",
    ]
    points = conversation.chat.answers[-1].points
    expected = draw_points("a.png", points)
    for name in ("points.png", "out.png"):
        with Image.open(name) as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    os.link("a.png", "other.png")
    before = (folder / "a.png").read_bytes()
    for name in ("a.png", "./a.png", "other.png", f"{folder}/a.png"):
        with pytest.raises(UsageError, match="written over"):
            conversation.handle(f"/draw {name}")
    with pytest.raises(UsageError, match=r"expected one of \.png"):
        conversation.handle("/draw out.txt")
    assert (folder / "a.png").read_bytes() == before


def test_drawings_where_pictures_can_be_shown(talk, folder: Path) -> None:
    """Only those with points on them; into a file only where one is named."""
    shown: list[Any] = []

    def show(image: Any) -> bool:
        shown.append(image)
        return True

    second = '<points coords="2 1 500 500">sea</points>'
    conversation = talk(second, show=show, pictures=("a.png", "my b.png"))
    conversation.handle("Where is the sea?")
    assert [image.size for image in shown] == [(40, 80)]
    conversation.handle("/draw")
    assert [image.size for image in shown] == [(40, 80)] * 2
    assert not list(folder.glob("points*"))
    conversation.handle("/draw out.png")
    assert sorted(path.name for path in folder.glob("out*")) == ["out-1.png", "out-2.png"]


def test_a_conversation_is_saved_as_training_reads_it(talk, folder: Path, capsys) -> None:
    conversation = talk("A dog.", TAG)
    conversation.handle("What?")
    conversation.handle("/image 'my b.png'")
    conversation.handle("Point to the dogs.")
    conversation.handle("/save mine.jsonl")
    (line,) = (folder / "mine.jsonl").read_text(encoding="utf-8").splitlines()
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Point to the dogs."},
        {"role": "assistant", "content": TAG},
    ]
    assert json.loads(line) == {"images": ["a.png", "my b.png"], "messages": messages}
    (example,) = [open_source("mine.jsonl")[0]]
    assert [image.size for image in example.images] == [(100, 50), (40, 80)]
    assert example.branches[0].messages == messages
    (folder / "deep").mkdir()
    conversation.handle("/save deep/mine.jsonl")
    assert [image.size for image in open_source("deep/mine.jsonl")[0].images] == [
        (100, 50),
        (40, 80),
    ]
    assert capsys.readouterr().err.splitlines() == ["wrote mine.jsonl", "wrote deep/mine.jsonl"]


def test_ask_reads_what_was_saved(tmp_path: Path) -> None:
    saved = tmp_path / "mine.jsonl"
    question = "How many sunflowers are there?"
    done = script(f"{question}\n/save {saved}\n", SCENE, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "nanomolmo2", "ask", "--batch", str(saved), "--device", "cpu"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(asked.stdout)
    assert (result["question"], result["text"]) == (question, done.stdout.strip())


def test_a_saved_conversation_replaces_nothing_else(talk, folder: Path) -> None:
    conversation = talk("A dog.", "Two.")
    conversation.handle("What?")
    data = '{"image": "a.png", "question": "?", "answer": "!"}\n'
    (folder / "data.jsonl").write_text(data, encoding="utf-8")
    with pytest.raises(UsageError, match="holds something else: name another file"):
        conversation.handle("/save data.jsonl")
    with pytest.raises(UsageError, match=r"expected one of \.jsonl"):
        conversation.handle("/save a.png")
    assert (folder / "data.jsonl").read_text(encoding="utf-8") == data
    conversation.handle("/save mine.jsonl")
    conversation.handle("And?")
    conversation.handle("/save mine.jsonl")
    assert is_saved_chat(folder / "mine.jsonl")
    messages = json.loads((folder / "mine.jsonl").read_text(encoding="utf-8"))["messages"]
    assert len(messages) == 4
    conversation.handle("/save")
    conversation.handle("/save")
    assert (folder / "chat-2.jsonl").exists()


def test_a_full_disk_leaves_the_saved_conversation(talk, folder: Path, monkeypatch) -> None:
    conversation = talk("A dog.", "Two.")
    conversation.handle("What?")
    conversation.handle("/save mine.jsonl")
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    conversation.handle("And?")
    with pytest.raises(OSError, match=r"mine.jsonl could not be written \(No space"):
        conversation.handle("/save mine.jsonl")
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


def test_another_model_goes_on(folder: Path, capsys) -> None:
    models = {name: ScriptedModel(f"I am {name}.") for name in ("one", "two")}

    def load(name: str) -> VLM:
        if name not in models:
            raise FileNotFoundError(f"there is no model {name}")
        return VLM(models[name], models[name].processor)

    conversation = Conversation(load, "one", {"lookup": False})
    conversation.start(["a.png"])
    conversation.handle("Who?")
    with pytest.raises(FileNotFoundError):
        conversation.handle("/model three")
    conversation.handle("/model")
    conversation.handle("/model two")
    conversation.handle("And you?")
    assert capsys.readouterr().out == "I am one.\none, on the CPU, float32\nI am two.\n"
    (call,) = models["two"].calls
    asked = models["two"].processor.tokenizer.decode(call["prompt_ids"][0].tolist())
    assert "Who?" in asked and "I am one." in asked
    assert call["pixel_values"].shape[0] == 1
    conversation.handle("/undo")
    conversation.handle("/undo")
    assert len(conversation.pending) == 1
    conversation.close()


def test_names(folder: Path) -> None:
    assert split("a.png 'my b.png'") == ["a.png", "my b.png"]
    assert split("my b.png") == ["my b.png"]
    assert free_name("a.png") == Path("a-2.png")
    assert free_name("new.png") == Path("new.png")


# ---- a terminal ----


class Terminal:
    """A program in a terminal of its own: what it shows, and keys for it."""

    def __init__(self, arguments: list[str], folder: Path, answers: Mapping[bytes, bytes]) -> None:
        """``answers``: what the terminal says to what the program asks it."""
        self.ours, theirs = pty.openpty()
        size = struct.pack("HHHH", 30, 90, 900, 600)  # rows, columns, pixels
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
        for name in ("KITTY_WINDOW_ID", "KONSOLE_VERSION", "XTERM_VERSION", "LC_TERMINAL"):
            environment.pop(name, None)
        environment |= {"TERM": "xterm-256color", "TERM_PROGRAM": "mintty" if answers else "none"}
        environment |= {"PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            arguments,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._answers, self.seen = answers, b""

    def wait_for(self, text: bytes, seconds: float = 60) -> bytes:
        """What is shown until a text has come."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen[-2000:]
            if not select.select([self.ours], [], [], 0.2)[0]:
                continue
            try:
                found = os.read(self.ours, 65536)
            except OSError:  # it has ended
                found = b""
            assert found, (text, self.seen[-2000:])
            for question, answer in self._answers.items():
                if question in found:
                    self.type(answer)
            self.seen += found
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def end(self) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.ours, 65536)
                except OSError:
                    break
        return self.process.wait(timeout=60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Any]:
    pytest.importorskip("prompt_toolkit", reason="the extra chat is not installed")
    begun: list[Terminal] = []

    def start(*arguments: str | Path, answers: Mapping[bytes, bytes] | None = None) -> Terminal:
        command = [sys.executable, "-m", "nanomolmo2", "chat", *map(str, arguments)]
        begun.append(Terminal([*command, "--device", "cpu"], folder, answers or {}))
        return begun[-1]

    yield start
    for one in begun:
        one.close()


def test_a_conversation_in_a_terminal(terminal, folder: Path) -> None:
    """Keys are edited, completed and brought back; Ctrl-D ends it; the lines are kept."""
    shown = terminal(SCENE)
    start = shown.wait_for(PROMPT)
    assert f"picture 1: {SCENE} (192 x 192)".encode() in start
    shown.type(b"Point to the snaill\x7f.\r")  # one letter too many is taken back
    shown.wait_for(b"in pixels: snail (96, 67)")
    shown.wait_for(PROMPT)
    shown.type(b"/dr\t\r")
    shown.wait_for(b"wrote points.png")
    shown.wait_for(PROMPT)
    shown.type(b"forget this\x03")  # Ctrl-C empties the line
    shown.wait_for(PROMPT)
    shown.type(b"\x1b[A\x1b[A\r")  # up, up: the question again
    shown.wait_for(b"in pixels: ")
    shown.wait_for(PROMPT)
    shown.type(b"\x04")
    assert shown.end() == 0
    assert (folder / "points.png").exists()
    history = folder / "state" / "nanomolmo2" / "chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    kept = re.findall(r"^\+(.*)$", history.read_text(encoding="utf-8"), re.MULTILINE)
    assert kept[0] == kept[2] == "Point to the snail."
    assert "/draw".startswith(kept[1])  # Tab takes a moment


def test_what_was_typed_ahead_is_not_lost(terminal) -> None:
    shown = terminal(SCENE, "--no-history")
    shown.type(b"Describe this picture.\r/quit\r")
    shown.wait_for(b"Three sunflowers, a snail and a butterfly.")
    assert shown.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal, babbler: Path, folder: Path) -> None:
    shown = terminal("a.png", "--model", babbler, "--max-new-tokens", "400")
    shown.wait_for(PROMPT)
    shown.type(b"What?\r")
    shown.wait_for(b"\x1b[?2004l")  # the line is taken: what comes is the answer
    while not shown.seen.strip():
        shown.seen += os.read(shown.ours, 65536)
    shown.type(b"\x03")
    shown.wait_for(b"stopped; neither the question nor its answer is remembered")
    shown.wait_for(PROMPT)
    shown.type(b"/save\r")
    shown.wait_for(b"nothing to save")
    shown.wait_for(PROMPT)
    shown.type(b"/quit\r")
    assert shown.end() == 0


def test_ctrl_c_stops_an_answer_of_a_script_too(babbler: Path, folder: Path) -> None:
    slow = ["--model", str(babbler), "--max-new-tokens", "400"]
    begun = subprocess.Popen(
        [sys.executable, "-m", "nanomolmo2", "chat", "a.png", *slow, "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert begun.stdin is not None and begun.stdout is not None
    begun.stdin.write(b"What?\n")
    begun.stdin.flush()
    assert begun.stdout.read(1)
    begun.send_signal(signal.SIGINT)
    _, err = begun.communicate(b"/image\n/save\n", timeout=100)
    assert b"stopped; neither the question nor its answer is remembered" in err
    assert b"line 3: there is nothing to save" in err
    assert begun.returncode == 1


def test_a_terminal_that_shows_pictures_gets_the_overlay(terminal, folder: Path) -> None:
    """Sixel, which the terminal says that it has: the picture itself, and no file."""
    pytest.importorskip("textual_image", reason="the extra chat is not installed")
    shown = terminal(SCENE, answers={b"\x1b[c": b"\x1b[?62;4;22c"})
    shown.wait_for(PROMPT)
    shown.type(b"Point to the snail.\r")
    shown.wait_for(b"in pixels: snail (96, 67)")
    picture = shown.wait_for(b"\x1b\\")
    assert b"\x1bP" in picture  # a sixel picture, to its end
    assert len(picture) > 2000
    shown.wait_for(PROMPT)
    shown.type(b"\x04")
    assert shown.end() == 0
    assert not list(folder.glob("points*"))


def test_a_missing_extra_is_named(folder: Path, monkeypatch, capsys) -> None:
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(chat, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["chat", "a.png"]) == 1
    assert capsys.readouterr().err == (
        "nanomolmo2: to chat in a terminal, prompt_toolkit is needed and not installed: pip "
        "install 'nanomolmo2[chat]'\n"
    )


def test_terminals_that_may_show_pictures() -> None:
    """Others are not asked: what is typed meanwhile would be taken for their answer."""
    for environment in (
        {"TERM": "xterm-kitty"},
        {"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"},
        {"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"},
        {"TERM": "foot"},
        {"TERM": "xterm-256color", "KONSOLE_VERSION": "230400"},
    ):
        assert console.may_show_pictures(environment)
    for environment in ({}, {"TERM": "xterm-256color"}, {"TERM": "screen", "TERM_PROGRAM": "tmux"}):
        assert not console.may_show_pictures(environment)


# ---- completion ----


def completions(text: str) -> list[str]:
    """The whole lines that completion offers for a text."""
    return [text[: len(text) - one.replaces] + one.text for one in console.completions(text)]


def test_completion(folder: Path) -> None:
    pytest.importorskip("prompt_toolkit", reason="the extra chat is not installed")
    (folder / "album").mkdir()
    for name in ("notes.txt", "clip.mp4"):
        (folder / name).touch()
    assert completions("/") == list(COMMANDS)
    assert completions("/re") == ["/reset"]
    assert completions("Describe") == completions("a.p") == completions("/undo a") == []
    assert completions("/image a") == ["/image a.png", "/image album"]
    assert completions("/image a.png m") == ["/image a.png my\\ b.png"]
    assert completions("/image my\\ ") == ["/image my\\ b.png"]
    assert completions("/video c") == ["/video clip.mp4"]
    assert completions("/image n") == []
    assert completions("/save n") == ["/save notes.txt"]
    assert completions("/model t") == ["/model tiny"]
    for line in completions("/image m"):
        assert all(os.path.exists(name) for name in split(line.partition(" ")[2]))
