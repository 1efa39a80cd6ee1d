"""``nanomolmo2 ask --batch``: the questions of a file, several answered at a time, a line each.

Lines come in the order of the questions and are whole or not there, so an interrupted call goes on
behind the last. Every answer carries what it is the answer of (``fingerprint``: model and options,
then question and files), so that answers to other questions are never gone on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from nanomolmo2.checks import sha256_of, written
from nanomolmo2.cli.answering import answer_report
from nanomolmo2.cli.loading import files_of
from nanomolmo2.cli.options import UsageError
from nanomolmo2.cli.output import check_writable, note, progress_bars
from nanomolmo2.files import open_regular

if TYPE_CHECKING:
    from nanomolmo2.data.records import JsonLines
    from nanomolmo2.data.sources import RecordSource
    from nanomolmo2.generation.pipeline import Answer, Pipeline, Question

MOST_LINE = 32 * 2**20  # bytes of a result
BEGIN = b'{"line": '  # of every result
ELSEWHERE = "name another --out to answer all of them"
MOST_TOLD = 10  # errors that are said on stderr as they come


class Asked(NamedTuple):
    """A question of the file, or why there is none.

    Attributes:
        record: its number among the records, from 0; several questions may stand in one.
        begun: what its result begins with.
        paths: of its pictures or its video, for the result.
    """

    record: int
    begun: dict[str, Any]
    paths: list[str | None]
    question: Question | None
    error: str = ""


@dataclass
class Known:
    """What stands in a file of results, of an earlier call.

    Attributes:
        whole: bytes of the lines that stay.
        groups: of each record in order, whether one of its questions failed.
    """

    whole: int = 0
    groups: list[bool] = field(default_factory=list)


@dataclass
class Batch:
    """One call.

    Attributes:
        path: file of questions. out: where results go; None = standard output.
        images: folder of the pictures; None = beside the questions.
        model: by the name that was given. generation: keyword arguments of `Pipeline.ask`.
    """

    path: Path
    out: Path | None
    images: Path | None
    model: str
    generation: dict[str, Any]
    _failed: int = 0
    _answered: int = 0
    _warned: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Find out before a model is loaded what cannot be.

        Raises: UsageError, OSError, ValueError.
        """
        if self.images is not None and not self.images.is_dir():
            raise UsageError(f"--images {self.images} is no folder: name the one of the pictures")
        rows = self._source().rows
        if not len(rows):
            raise ValueError(f"{self.path} holds no questions: write a record a line")
        if self.out is not None:
            check_writable(self.out, (".jsonl",), [self.path, *files_of(self.model)])
            if self.out.exists():
                open_regular(self.out).close()

    def run(self, pipeline: Pipeline, batch_size: int) -> None:
        """Answer what is not answered yet.

        Raises: ValueError if any question failed, in the end; before the first for an ``out`` that
            holds anything else than answers to these questions by this model.
        """
        source, by = self._source(), self._fingerprint(pipeline)
        known = self._known(source, by) if self.out is not None else Known()
        if known.groups:
            said = f"{self.out} has answers to {len(known.groups)} of {len(source)} lines"
            note(f"{said}: going on behind them")
        again = [number for number, failed in enumerate(known.groups) if failed]
        stdout = sys.stdout  # the bar would lead what is printed to stderr
        is_seen = self.out is None and stdout.isatty()  # then the answers show how far it is
        with contextlib.nullcontext() if is_seen else progress_bars() as add_bar:
            show = add_bar("questions") if add_bar is not None else lambda *_: None
            done = len(known.groups) - len(again)

            def results(numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
                nonlocal done
                last = -1
                asked = self._asked(source, numbers, by)
                for number, line in self._results(pipeline, asked, batch_size):
                    done += number != last
                    last = number
                    yield number, line
                    show(done, len(source))

            try:
                if again:
                    self._replace(known, results(again))
                rest = results(range(len(known.groups), len(source)))
                if self.out is None:
                    for _, line in rest:
                        stdout.write(line.decode("ascii"))
                        stdout.flush()
                else:
                    self._append(self.out, known, rest)
            except KeyboardInterrupt:
                if self.out is not None:
                    note(f"\n{self.out} has what was answered: the same command goes on behind it")
                raise
        self._say_the_sum()

    def _say_the_sum(self) -> None:
        to = f" in {self.out}" if self.out is not None else ""
        said = f"{self._answered} answered, {self._failed} failed{to}"
        if self._failed:
            remedy = "lines with 'error' say why"
            if self.out is not None:
                remedy += "; the same command asks them again"
            raise ValueError(f"{said}: {remedy}")
        note(said)

    # ---- questions ----

    def _source(self) -> RecordSource:
        from nanomolmo2.data.records import JsonLines
        from nanomolmo2.data.sources import RecordSource, SourceConfig

        folder = str(self.images) if self.images is not None else ""
        config = SourceConfig(str(self.path), image_folder=folder)
        source = RecordSource(JsonLines(self.path), config)
        source.needs_answer = source.needs_truth = False
        return source

    def _asked(self, source: RecordSource, numbers: Iterable[int], by: str) -> Iterator[Asked]:
        from nanomolmo2.data.example import BadExample
        from nanomolmo2.generation.pipeline import Question
        from nanomolmo2.processor.chat import read_messages

        rows: JsonLines = source.rows  # type: ignore[assignment]
        for number in numbers:
            begun: dict[str, Any] = {"line": rows.line(number)}
            try:
                values = rows[number].values
                if isinstance(values.get("id"), (str, int)):
                    begun["id"] = values["id"]
                example = source[number]
                fingerprint = self._fingerprint_of(source, number, by)
            except BadExample as bad:
                yield Asked(number, begun, [], None, bad.detail)
                continue
            for cause, detail in example.notes:
                if cause not in self._warned:
                    self._warned.add(cause)
                    note(f"warning: {detail}")
            shown = [example.video] if example.video is not None else example.images
            paths = _paths_of(values, len(shown))
            for place, branch in enumerate(example.branches, start=1):
                messages = list(branch.messages)
                if read_messages(messages)[-1].role == "assistant":
                    messages.pop()
                named = {**begun, "branch": place} if len(example.branches) > 1 else dict(begun)
                named["fingerprint"] = fingerprint
                named["model"] = self.model
                named["question"] = read_messages(messages)[-1].text.strip()
                question = Question(messages, list(example.images), example.video)
                yield Asked(number, named, paths, question)

    # ---- answers ----

    def _results(
        self, pipeline: Pipeline, asked: Iterable[Asked], batch_size: int
    ) -> Iterator[tuple[int, bytes]]:
        """(number of the record, line) in the order of what is asked."""
        waiting: deque[Asked] = deque()

        def questions() -> Iterator[Question]:
            for one in asked:
                waiting.append(one)
                if one.question is not None:
                    yield one.question

        def failed() -> Iterator[tuple[int, bytes]]:
            while waiting and waiting[0].question is None:
                one = waiting.popleft()
                yield one.record, self._line(one, ValueError(one.error))

        for answer in self._answers(pipeline, questions(), batch_size):
            yield from failed()
            one = waiting.popleft()
            yield one.record, self._line(one, answer)
        yield from failed()

    def _answers(
        self, pipeline: Pipeline, questions: Iterator[Question], batch_size: int
    ) -> Iterator[Answer | ValueError]:
        from nanomolmo2.generation.options import GenerateOptions

        keywords = dict(self.generation)
        if not keywords.pop("well_formed_points"):
            options = GenerateOptions().updated(**keywords, lookup=False)
            yield from pipeline.ask_many(questions, batch_size=batch_size, options=options)
            return
        for question in questions:  # the grammar depends on what is shown
            text, images, video, _ = question
            try:
                yield pipeline.ask(images, text, video=video, **self.generation)
            except ValueError as error:
                yield error

    def _line(self, one: Asked, answer: Answer | ValueError) -> bytes:
        if isinstance(answer, ValueError):
            self._failed += 1
            place = f"{self.path}, line {one.begun['line']}"
            said = " ".join(str(answer).split())
            said = said if said.startswith(place) else f"{place}: {said}"
            if self._failed <= MOST_TOLD:
                note(said)
            kept = ("line", "branch", "id")
            begun = {name: value for name, value in one.begun.items() if name in kept}
            result: dict[str, Any] = {**begun, "error": said}
        else:
            self._answered += 1
            result = {**one.begun, **answer_report(answer, one.paths)}
        return json.dumps(result).encode("ascii") + b"\n"

    # ---- what they belong to ----

    def _fingerprint(self, pipeline: Pipeline) -> str:
        """The same for the same model, processor and options."""
        from nanomolmo2.evaluation.store import digest_of

        about = json.dumps([digest_of(pipeline), self.generation], sort_keys=True)
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    def _fingerprint_of(self, source: RecordSource, number: int, by: str) -> str:
        """The same for the same record and the same bytes of its files, after ``by``."""
        row = source.rows[number]
        digest = hashlib.sha256(json.dumps(row.values, sort_keys=True).encode())
        folder = self.images if self.images is not None else row.folder
        for path in _paths_of(row.values, None):
            if path is not None and (folder / path).is_file():
                digest.update(sha256_of(folder / path).encode())
        return f"{by}-{digest.hexdigest()[:16]}"

    def _known(self, source: RecordSource, by: str) -> Known:
        """What an earlier call has answered.

        Raises: ValueError for a file of something else, of other questions or by another model.
        """
        from nanomolmo2.data.example import BadExample

        assert self.out is not None
        known = Known()
        if not self.out.exists():
            return known
        rows: JsonLines = source.rows  # type: ignore[assignment]
        begin, is_part = 0, False  # of the last record; whether more may belong to it
        for place, (line, end, result) in enumerate(_read_results(self.out), start=1):
            where = f"{self.out}, line {place}"
            is_next = not known.groups or line != rows.line(len(known.groups) - 1)
            if is_next:
                known.groups.append(False)
                begin = known.whole
            number = len(known.groups) - 1
            if number >= len(rows) or rows.line(number) != line:
                raise ValueError(f"{where} answers no question of {self.path}: {ELSEWHERE}")
            is_part = "branch" in result
            if "error" in result:
                known.groups[-1] = True
            else:
                found = str(result["fingerprint"])
                if not found.startswith(f"{by}-"):
                    raise ValueError(
                        f"{where} is by another model or with other options: {ELSEWHERE}"
                    )
                try:
                    expected = self._fingerprint_of(source, number, by) if is_next else found
                except (BadExample, OSError, ValueError):
                    expected = ""
                if found != expected:
                    raise ValueError(
                        f"{where} answers another question than {self.path}, line {line}, or about "
                        f"another file: {ELSEWHERE}"
                    )
            known.whole = end
        if is_part:  # the last record may have more questions: all of it once more
            known.groups.pop()
            known.whole = begin
        return known

    # ---- the file of results ----

    def _replace(self, known: Known, results: Iterator[tuple[int, bytes]]) -> None:
        """Put what was asked again in the place of what failed; all of it or nothing."""
        assert self.out is not None
        new: dict[int, list[bytes]] = {}
        for number, line in results:
            new.setdefault(number, []).append(line)
        group, before = -1, 0
        with written(self.out) as temporary, temporary.open("wb") as target:
            with open_regular(self.out) as stream:
                while stream.tell() < known.whole:
                    old = stream.readline(MOST_LINE)
                    line = json.loads(old)["line"]
                    if line != before:
                        group, before = group + 1, line
                        target.writelines(new.get(group, ()))
                    if group not in new:
                        target.write(old)
            known.whole = target.tell()

    def _append(self, out: Path, known: Known, results: Iterator[tuple[int, bytes]]) -> None:
        mode = "r+b" if out.exists() else "xb"
        with out.open(mode) as stream:
            stream.truncate(known.whole)  # the line that was being written at the end
            stream.seek(known.whole)
            for _, line in results:
                _write(stream, line, out)


def _write(stream: IO[bytes], line: bytes, out: Path) -> None:
    try:
        stream.write(line)
        stream.flush()
    except OSError as error:
        if error.filename is None:
            error.filename = str(out)
        raise


def _read_results(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line of the questions, where the next result begins, the result) of every whole line.

    Raises: ValueError for what was not written here.
    """
    with open_regular(path) as stream:
        while line := stream.readline(MOST_LINE):
            if not line.endswith(b"\n") and line[: len(BEGIN)] == BEGIN[: len(line)]:
                return  # it was being written when the call ended
            try:
                result = json.loads(line)
            except (ValueError, RecursionError):
                result = None
            is_result = isinstance(result, dict) and isinstance(result.get("line"), int)
            if not is_result or not {"error", "fingerprint"} & result.keys():
                raise ValueError(
                    f"{path} holds something else than answers of this command: {ELSEWHERE}"
                )
            yield result["line"], stream.tell(), result


def _paths_of(values: dict[str, Any], count: int | None) -> list[str | None]:
    """How a record names what it shows; None for what is in no file of its own.

    Args:
        count: as many as are shown; None = whatever it names.
    """
    video, one = values.get("video"), values.get("image")
    given = values.get("images") if one is None else one
    named = video if video is not None else given if given is not None else values.get("image_url")
    names = [_path_of(name) for name in (named if isinstance(named, list) else [named])]
    return names if count is None or len(names) == count else [None] * count


def _path_of(name: object) -> str | None:
    if isinstance(name, dict):
        name = name.get("path")
    return name if isinstance(name, str) and not name.startswith("data:") else None
