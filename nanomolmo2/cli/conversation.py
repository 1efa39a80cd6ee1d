"""What `nanomolmo2 chat` does with a line: a question, or a command that begins with a slash.

Nothing here knows of a terminal: lines come in, answers are printed, and a picture is handed to
whatever can show it.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanomolmo2.checks import written
from nanomolmo2.cli.answering import VIDEO_SUFFIXES, Printer, print_marks
from nanomolmo2.cli.loading import files_of
from nanomolmo2.cli.options import UsageError
from nanomolmo2.cli.output import IMAGE_SUFFIXES, check_writable, note, say
from nanomolmo2.files import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

    from nanomolmo2.generation.answer import Answer
    from nanomolmo2.generation.vlm import VLM

MOST_LISTED = 12  # points below an answer
MOST_RECORD = 2**24  # bytes of a saved conversation that is replaced


class Command(NamedTuple):
    """``takes``: what its argument names, for completion: picture, video, file or model."""

    arguments: str
    takes: str
    help: str


COMMANDS = {
    "/image": Command("FILE...", "picture", "show pictures with the next question; alone: list"),
    "/video": Command("FILE", "video", "show a video with the next question"),
    "/undo": Command("", "", "take the last question and its answer back"),
    "/reset": Command("[all]", "", "forget what was said; with all, the pictures too"),
    "/draw": Command("[FILE]", "file", "the last answer's points on its picture, here or in FILE"),
    "/save": Command(
        "[FILE]", "file", "write the conversation (.jsonl), for train and ask --batch"
    ),
    "/model": Command("[NAME]", "model", "go on with another model; alone: which one answers"),
    "/help": Command("", "", "this list"),
    "/quit": Command("", "", "end the chat, as Ctrl-D does"),
}
KEYS = "Ctrl-C stops an answer, Ctrl-D ends the chat; all else is a question."


class Shown(NamedTuple):
    """A picture or a video of the conversation.

    ``name``: as it was given. ``about``: its size, for people.
    """

    kind: str  # image or video
    path: str  # absolute
    name: str
    about: str


class Conversation:
    """Questions and commands about some pictures.

    Attributes:
        model: by the name that was given.
        pending: what is shown with the next question.
    """

    def __init__(
        self,
        load: Callable[[str], VLM],
        model: str,
        generation: dict[str, Any],
        show: Callable[[Image], bool] | None = None,
    ) -> None:
        """
        Args:
            load: gives a model by its name.
            generation: keyword arguments of `VLM.ask`.
            show: shows a picture to a person who looks on; None = nobody does, and only answers
                are printed. Returns: whether it could.
        """
        self.model = model
        self.pending: list[Shown] = []
        self._load, self._generation, self._show = load, generation, show
        self._asked: list[list[Shown]] = []  # what was shown with each question that counts
        self._saved: set[str] = set()  # files that were written by this conversation

    def start(self, names: Sequence[str]) -> None:
        """Look at what is shown first, then load the model, which takes longer.

        Raises: ValueError, OSError as `load_image` and what loads the model.
        """
        found = [look_at(name) for name in names]
        if len(found) > 1 and any(one.kind == "video" for one in found):
            raise UsageError(
                "a chat shows pictures or one video: name the one or the other; found "
                + " ".join(names)
            )
        self.vlm = self._load(self.model)
        self.chat = self.vlm.chat()
        self._add(found)

    def close(self) -> None:
        """End the model."""
        self.vlm.close()

    @property
    def shown(self) -> list[Shown]:
        """All of the conversation, in the order of the model's numbers."""
        return [one for shown in self._asked for one in shown] + self.pending

    def handle(self, line: str) -> bool:
        """Do what a line says; of a command the beginning will do, where it is of no other.

        Returns: False where it ends the chat.
        Raises: ValueError, OSError for what cannot be done; nothing has changed then.
        """
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self.ask(line)
            return True
        name, _, rest = line.partition(" ")
        begin = [command for command in COMMANDS if command.startswith(name)]
        name = begin[0] if len(begin) == 1 else name
        if name not in COMMANDS:
            self._other(name, line)
        elif name == "/quit":
            return False
        else:
            arguments = split(rest.strip())
            check_number(name, arguments)
            getattr(self, f"_{name[1:]}")(*arguments)
        return True

    def _other(self, name: str, line: str) -> None:
        """A line that begins like a command: the path of a file that was dropped, or a mistake."""
        files = split(line)
        if all(os.path.isfile(file) for file in files):
            self._image(*files)
            return
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no command {name[:40]}: {hint}/help lists them")

    # ---- questions ----

    def ask(self, question: str) -> None:
        """Print the answer as it is written. One that is stopped (KeyboardInterrupt) is forgotten,
        with its question: only what has ended counts.
        """
        images = [one.path for one in self.pending if one.kind == "image"]
        videos = [one.path for one in self.pending if one.kind == "video"]
        stream: Any = self.chat.stream(
            question, images, video=videos[0] if videos else None, **self._generation
        )
        printer = Printer()
        try:
            for item in stream:
                if isinstance(item, str):
                    printer.piece(item)
        except KeyboardInterrupt:
            stream.close()
        stopped = len(self.chat.answers) == len(self._asked)
        if not stopped:
            printer.end(self.chat.answers[-1])
        say("")
        if stopped:
            note("stopped; neither the question nor its answer is remembered")
            return
        self._asked.append(self.pending)
        self.pending = []
        self._after(self.chat.answers[-1])

    def _after(self, answer: Answer) -> None:
        for problem in answer.problems:
            note(f"note: {problem}")
        if answer.finish_reason == "length":
            note(
                f"note: cut off after {answer.output_tokens} tokens; chat --max-new-tokens N "
                f"allows more"
            )
        if self._show is None or not answer.points:
            return
        note(f"  in pixels: {places_of(answer)}")
        if answer.video_size is None:
            self._show_points(answer)

    def _show_points(self, answer: Answer) -> bool:
        """Show the pictures that have points. Returns: whether this could be done."""
        if self._show is None:
            return False
        drawn = answer.draw()
        images = drawn if isinstance(drawn, list) else [drawn]
        numbers = sorted({point.image for point in answer.points})
        could = [self._show(images[number - 1]) for number in numbers]
        if all(could):
            print_marks(answer.points)
        return all(could)

    # ---- commands ----

    def _image(self, *names: str) -> None:
        if not names:
            self._list()
            return
        self._add([look_at(name) for name in names])

    def _video(self, name: str) -> None:
        self._add([look_at(name, kind="video")])

    def _add(self, found: list[Shown]) -> None:
        kinds = {one.kind for one in [*self.shown, *found]}
        if "video" in kinds and len(self.shown) + len(found) > 1:
            raise UsageError(
                "a conversation shows pictures or one video: /reset all begins one without any"
            )
        if "video" in kinds and self.vlm.processor.config.video is None:
            raise UsageError(
                f"the model {self.model} does not take videos: choose one that does with /model, "
                f"such as allenai/Molmo2-4B"
            )
        self.pending = [*self.pending, *found]
        if self._show is not None and found:
            self._list(len(self.shown) - len(found))

    def _list(self, first: int = 0) -> None:
        for number, one in enumerate(self.shown[first:], start=first + 1):
            which = "the video" if one.kind == "video" else f"picture {number}"
            say(f"{which}: {one.name} ({one.about})")
        if not self.shown:
            say("no picture is shown: /image FILE")

    def _undo(self) -> None:
        if not self.chat.undo():
            raise UsageError("there is nothing to take back: no question was answered yet")
        self.pending = [*self._asked.pop(), *self.pending]
        left = len(self._asked)
        self._tell(f"taken back; {left} question{'' if left == 1 else 's'} before it")

    def _reset(self, what: str = "") -> None:
        if what not in ("", "all"):
            raise UsageError(f"/reset takes nothing, or all, found {what}")
        shown = [] if what else self.shown
        self.chat.reset()
        self._asked, self.pending = [], shown
        self._tell(f"a new conversation, with {_number(shown)}" if shown else "a new conversation")

    def _draw(self, name: str = "") -> None:
        if not self.chat.answers:
            raise UsageError("there is nothing to draw: ask something first")
        answer = self.chat.answers[-1]
        if answer.image_sizes == () and answer.video_size is None:
            raise UsageError("the last answer is about no picture: /image FILE shows one")
        if not answer.points:
            raise UsageError("the last answer has no points: ask where something is")
        if not name and answer.video_size is None and self._show_points(answer):
            return
        from nanomolmo2.generation.drawing import overlay_paths

        suffixes = (".gif",) if answer.video_size is not None else IMAGE_SUFFIXES
        path = Path(os.path.expanduser(name)) if name else free_name(f"points{suffixes[0]}")
        targets = overlay_paths(path, len(answer.image_sizes) or 1)
        for target in targets:
            check_writable(target, suffixes, self._inputs())
        answer.draw(path)
        for target in targets:
            note(f"wrote {target}")
        print_marks(answer.points)

    def _save(self, name: str = "") -> None:
        if not self.chat.answers:
            raise UsageError("there is nothing to save: ask something first")
        path = Path(os.path.expanduser(name)) if name else free_name("chat.jsonl")
        check_writable(path, (".jsonl",), self._inputs())
        if path.exists() and str(path.resolve()) not in self._saved and not is_saved_chat(path):
            raise UsageError(f"{path} is there and holds something else: name another file")
        line = json.dumps(self.record(path.parent), ensure_ascii=False)
        with written(path) as temporary:
            temporary.write_bytes(line.encode("utf-8", "backslashreplace") + b"\n")
        self._saved.add(str(path.resolve()))
        note(f"wrote {path}")
        if not all(answer.text.strip() for answer in self.chat.answers):
            note("warning: an answer is empty, which nothing can be learned from")

    def record(self, folder: Path) -> dict[str, Any]:
        """The conversation in the layout that `nanomolmo2 train` reads; points as coordinates.

        Args:
            folder: of the file; paths in it are written as seen from there.
        """
        shown = [one for asked in self._asked for one in asked]
        images = [_seen_from(folder, one.path) for one in shown if one.kind == "image"]
        videos = [_seen_from(folder, one.path) for one in shown if one.kind == "video"]
        messages = []
        for question, answer in zip(self._questions(), self.chat.answers, strict=True):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer.coordinates})
        named: dict[str, Any] = {"video": videos[0]} if videos else {"images": images}
        return {**named, "messages": messages}

    def _questions(self) -> list[str]:
        from nanomolmo2.processor.chat import read_messages

        turns = read_messages(self.chat.messages)
        return [str(turn.text) for turn in turns if turn.role == "user"]

    def _model(self, name: str = "") -> None:
        from nanomolmo2.cli.loading import where

        if not name:
            say(f"{self.model}, {where(self.vlm.model)}")
            return
        vlm = self._load(name)
        if any(one.kind == "video" for one in self.shown) and vlm.processor.config.video is None:
            vlm.close()
            raise UsageError(f"the model {name} does not take videos: /reset all first")
        chat = vlm.chat()
        # Selections of a point model mean something to itself alone.
        answers = iter(self.chat.answers)
        chat.messages = [
            {"role": "assistant", "content": next(answers).coordinates}
            if message["role"] == "assistant"
            else message
            for message in self.chat.messages
        ]
        chat.answers = list(self.chat.answers)
        self.vlm.close()
        self.vlm, self.chat, self.model = vlm, chat, name
        self._tell(f"{name} answers from here on")

    def _help(self) -> None:
        width = max(len(f"{name} {one.arguments}") for name, one in COMMANDS.items())
        for name, one in COMMANDS.items():
            say(f"{f'{name} {one.arguments}':<{width}}  {one.help}")
        say(KEYS)

    def _tell(self, text: str) -> None:
        """To a person; a program knows what it has asked for."""
        if self._show is not None:
            note(text)

    def _inputs(self) -> list[str | Path]:
        """What is read, and so written over by nothing."""
        return [*(one.path for one in self.shown), *files_of(self.model)]


def places_of(answer: Answer) -> str:
    """The points of an answer in one line, label by label."""
    several = len(answer.image_sizes) > 1
    places: dict[str, list[str]] = {}
    for point in answer.points[:MOST_LISTED]:
        place = f"({point.x:.0f}, {point.y:.0f})"
        place += f" at {point.time:g} s" if point.time is not None else ""
        place += f" in picture {point.image}" if several else ""
        places.setdefault(point.label or "point", []).append(place)
    listed = [f"{label} {', '.join(of_label)}" for label, of_label in places.items()]
    more = len(answer.points) - MOST_LISTED
    return "; ".join([*listed, f"{more} more"] if more > 0 else listed)


def look_at(name: str, kind: str = "") -> Shown:
    """Open a picture or a video, to find out what it is.

    Args:
        kind: ``video`` if it must be one, such as an animated GIF; "" = by its name and content.
    Raises: ValueError, OSError for what does not open.
    """
    from nanomolmo2.processor import load_image
    from nanomolmo2.processor.inputs import is_video_file, local_path
    from nanomolmo2.processor.video import load_video

    path = os.path.abspath(local_path(name, kind or "picture"))
    if kind == "video" or path.lower().endswith(VIDEO_SUFFIXES) or is_video_file(path):
        width, height = load_video(path, max_frames=1).size
        return Shown("video", path, name, f"{width} x {height}")
    width, height = load_image(path).size
    return Shown("image", path, name, f"{width} x {height}")


def split(text: str) -> list[str]:
    """The words behind a command: spaces in a name are quoted, escaped, or belong to the one file
    of the whole text.

    Raises: UsageError for a quote that does not end.
    """
    if os.path.isfile(os.path.expanduser(text)):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        raise UsageError(f"a quote does not end in {text[:80]}: close it, or write \\' ") from None


def check_number(name: str, arguments: Sequence[str]) -> None:
    """Raises: UsageError for more or fewer arguments than a command takes."""
    form = COMMANDS[name].arguments
    least = 1 if form == "FILE" else 0
    most = 0 if not form else None if form.endswith("...") else 1
    if len(arguments) < least:
        raise UsageError(f"{name} takes a name: {name} {form}")
    if most is not None and len(arguments) > most:
        takes = f"{name} {form}; put a name with spaces in quotes" if form else "nothing"
        raise UsageError(f"{name} takes {takes}, found {' '.join(arguments)}")


def free_name(name: str) -> Path:
    """``points.png``, or ``points-2.png`` where that is taken, and so on."""
    path, number = Path(name), 1
    while path.exists():
        number += 1
        path = Path(f"{Path(name).stem}-{number}{Path(name).suffix}")
    return path


def is_saved_chat(path: Path) -> bool:
    """Whether a file holds one saved conversation, or nothing: then it may be replaced by one."""
    with open_regular(path) as stream:
        text = stream.read(MOST_RECORD)
    lines = text.splitlines()
    if len(lines) != 1:
        return not lines
    try:
        record = json.loads(lines[0])
    except (ValueError, RecursionError):
        return False
    shapes = {"images", "messages"}, {"video", "messages"}
    return isinstance(record, dict) and record.keys() in shapes


def _seen_from(folder: Path, path: str) -> str:
    """A path as seen from a folder, if it lies in it; else as it is."""
    inside = Path(path).is_relative_to(folder.resolve())
    return str(Path(path).relative_to(folder.resolve())) if inside else path


def _number(shown: Iterable[Shown]) -> str:
    kinds = [one.kind for one in shown]
    if "video" in kinds:
        return "the video"
    return "1 picture" if len(kinds) == 1 else f"{len(kinds)} pictures"
