"""``nanomolmo2 teach``: a word for something that a model is shown."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from tyro.conf import Positional, arg

from nanomolmo2.cli.loading import (
    MODEL_FILES,
    TAUGHT_FILES,
    copy_model,
    files_of,
    load_pipeline,
    model_folder,
    precision,
)
from nanomolmo2.cli.options import (
    MODEL_HELP,
    CacheDir,
    Debug,
    DeviceName,
    DType,
    PictureFolder,
    UsageError,
    library_name,
    option,
)
from nanomolmo2.cli.output import note, say

if TYPE_CHECKING:
    from PIL.Image import Image

    from nanomolmo2.generation.pipeline import Pipeline
    from nanomolmo2.generation.words import Word, Words
    from nanomolmo2.processor import Processor

_NUMBER = r"-?\d{1,9}(?:\.\d{1,9})?"
_PLACE = re.compile(rf"(.+)@({_NUMBER}),({_NUMBER})", re.DOTALL)


class Shown(NamedTuple):
    """An example: a picture's file, and where in it the thing is, pixels."""

    path: str
    x: float
    y: float

    @property
    def text(self) -> str:
        return f"{self.path}@{self.x:g},{self.y:g}"


@dataclass(frozen=True)
class Teach:
    """Teach a model a word by showing what it stands for.

    nanomolmo2 teach walnut ref.jpg@120,80 other.jpg@33,50 --out DIR writes a model that knows the
    word: nanomolmo2 ask photo.jpg "How many walnuts are there?" --model DIR finds what is like the
    examples. Nothing is trained, and everything else is answered as before. Several words are
    taught one after the other: --model DIR --out DIR2.

    With --data the model learns from annotated photos, 40 to 60 of them: where things are in a
    minute, other answers in about ten minutes on two cores. A share of them is held out:
    DIR/report.html shows every answer about these.
    """

    name: Annotated[
        Positional[str],
        arg(metavar="NAME", help="the word, in the singular; of several words in quotes"),
    ]
    references: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="REFERENCE@X,Y...",
            help="where such a thing is: a picture's file, and a place on the thing in pixels from "
            "the top-left corner; several, of one picture or of different ones, make it surer; "
            "with --data there may be none",
        ),
    ] = ()
    out: Annotated[Path | None, arg(metavar="DIR", help="folder of the model to write")] = None
    model: Annotated[
        str, arg(metavar="MODEL", help=f"the model to teach, which stays as it is: {MODEL_HELP}")
    ] = "tiny"
    plural: Annotated[
        str | None,
        arg(metavar="NAMES", help="the word for several; none = by the rules of most nouns"),
    ] = None
    data: Annotated[
        tuple[str, ...],
        arg(
            metavar="FILE...",
            help="annotated photos to learn from, as train --data takes them (docs/data.md)",
        ),
    ] = ()
    pictures: PictureFolder = None
    minutes: Annotated[float, arg(metavar="N", help="with --data: how long learning may take")] = (
        10.0
    )
    val_share: Annotated[
        float,
        arg(metavar="SHARE", help="with --data: share of the photos that is held out to measure"),
    ] = 0.2
    replace: Annotated[
        bool, arg(help="the word was taught before: forget those examples, and take these")
    ] = False
    device: DeviceName = None
    dtype: DType = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        from nanomolmo2.checks import check_replaceable, refuse_overwriting, written

        if self.out is None:
            raise UsageError("expected --out DIR, the folder of the model that knows the word")
        if not self.data and (given := self._given("minutes", "val_share", "pictures")):
            raise UsageError(f"{given} is for --data, which is not given: leave it out")
        name, plural = self._names()
        shown = [read_reference(text) for text in self.references]
        if not (shown or self.data):
            raise UsageError(
                f"nothing is shown: say where {plural} are, as in nanomolmo2 teach "
                f"{shlex.quote(name)} photo.jpg@120,80 --out {shlex.quote(str(self.out))}"
            )
        pictures = open_pictures(shown)
        if self.data:
            self._learn(name, plural, shown)
            return
        try:
            check_replaceable(self.out, (*MODEL_FILES, *TAUGHT_FILES))
            refuse_overwriting(self.out, [*files_of(self.model), *pictures])
        except ValueError as error:
            raise UsageError(str(error)) from None
        pipeline = load_pipeline(
            self.model, self.cache_dir, **precision(self.dtype, None, self.device)
        )
        words = known_words(pipeline)
        self._check_new(name, plural, words, pipeline.processor)
        for path, image in pictures.items():
            self._say_found(pipeline, path, image, [s for s in shown if s.path == path], plural)
        word, files = word_of(name, plural, shown)
        words = words.with_word(word, files)
        source = model_folder(self.model)
        with written(self.out) as folder:
            folder.mkdir(parents=True)
            copy_model(source, folder)
            words.save(folder)
        say(
            f"wrote {self.out}, which knows {name} ({plural}); try it with: nanomolmo2 ask PICTURE "
            f'"How many {plural} are there?" --model {shlex.quote(str(self.out))}'
        )

    def _given(self, *names: str) -> str:
        """The first of some options that has another value than by default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        found = next((name for name in names if getattr(self, name) != defaults[name]), "")
        return option("images" if found == "pictures" else found) if found else ""

    def _learn(self, name: str, plural: str, shown: Sequence[Shown]) -> None:
        """Learn the word from annotated photos; examples are kept where they do better."""
        from nanomolmo2.cli.teach_data import Lesson
        from nanomolmo2.convert.pretrained import load_processor
        from nanomolmo2.data.registry import known_nouns
        from nanomolmo2.generation.words import Words, words_of

        assert self.out is not None
        before = words_of(self.model)
        word, files = word_of(name, plural, shown)
        nouns = known_nouns(load_processor(library_name(self.model)).config.trained_on)
        known = before or Words({}, {}, nouns)
        if before is not None and self.replace:  # it is learned anew
            before = before.without(word)
        lesson = Lesson(
            out=self.out,
            model=self.model,
            data=self.data,
            pictures=self.pictures,
            forms=(plural, *word.forms),
            before=before,
            shown=word if shown else None,
            pictures_of=files,
            none=Words({}, {}, nouns),
            share=self.val_share,
            minutes=self.minutes,
            device=self.device,
            cache_dir=self.cache_dir,
        )
        lesson.check()
        self._check_new(name, plural, known, load_processor(library_name(self.model)))
        lesson.run()

    def _names(self) -> tuple[str, str]:
        from nanomolmo2.generation.words import checked_name
        from nanomolmo2.processor.nouns import plural

        if _PLACE.fullmatch(self.name) or os.path.isfile(self.name):
            raise UsageError(
                f"found {self.name} where the word was expected: it goes first, as in nanomolmo2 "
                f"teach walnut photo.jpg@120,80 --out DIR"
            )
        try:
            name = checked_name(self.name)
            return name, checked_name(self.plural) if self.plural else plural(name)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _check_new(self, name: str, plural: str, words: Words, processor: Processor) -> None:
        """Raises: ValueError for a word that is known, unless it was taught and is replaced."""
        known = words.knows(name) or words.knows(plural)
        if known is not None:
            if self.replace:
                return
            raise ValueError(
                f"{self.model} was taught {known} before, {words.words[known].known_by}: --replace "
                f"takes these in place of them, another name keeps both"
            )
        from nanomolmo2.generation.words import key_of

        others = {key_of(other) for other in words.others}
        if others & {key_of(name), key_of(plural)} or is_token(name, processor):
            raise ValueError(
                f"{name} is a word that {self.model} knows already, and means by it what it was "
                f"trained on: choose another name, such as 'my {name}'"
            )

    def _say_found(
        self,
        pipeline: Pipeline,
        path: str,
        image: Image,
        shown: Sequence[Shown],
        plural: str,
    ) -> None:
        """What the examples find in their own picture: a first look at whether it will work.

        Warns of an example where nothing seems to be.
        """
        answer = pipeline.find(image, like=[(one.x, one.y) for one in shown])
        number = "1 example" if len(shown) == 1 else f"{len(shown)} examples"
        note(f"{path}: {number}; {plural} found in it, with what was shown: {answer.count}")


def is_token(name: str, processor: Processor) -> bool:
    """Whether a small vocabulary has a word as a whole; pairs of letters are there to spell."""
    from nanomolmo2.training.new_words import has_closed_vocabulary

    if len(name) < 3 or not has_closed_vocabulary(processor.tokenizer):
        return False
    pieces = processor.tokenizer.backend.get_vocab(with_added_tokens=False)
    return name.lower() in {piece.strip().lower() for piece in pieces}


def read_reference(text: str) -> Shown:
    """``ref.jpg@120,80``; the path may hold an @ too.

    Raises: UsageError for anything else.
    """
    found = _PLACE.fullmatch(text)
    if found is None:
        raise UsageError(
            f"found {text!r}, expected a picture and a place in it, in pixels, as photo.jpg@120,80"
        )
    return Shown(found[1], float(found[2]), float(found[3]))


def open_pictures(shown: Sequence[Shown]) -> dict[str, Image]:
    """The pictures of examples by their paths, each opened once.

    Raises: FileNotFoundError and ValueError as `load_image`; UsageError for an example that lies
        outside of its picture.
    """
    from nanomolmo2.processor import load_image

    pictures = {path: load_image(path) for path in dict.fromkeys(one.path for one in shown)}
    for one in shown:
        width, height = pictures[one.path].size
        if not (0 <= one.x <= width and 0 <= one.y <= height):
            raise UsageError(
                f"{one.text} lies outside of its picture, which is {width} x {height} pixels: give "
                f"pixels from its top-left corner"
            )
    return pictures


def word_of(name: str, plural: str, shown: Sequence[Shown]) -> tuple[Word, dict[str, bytes]]:
    """A word, and the bytes of its pictures by the names that they get beside the model."""
    from nanomolmo2.files import read_regular
    from nanomolmo2.generation.words import MOST_BYTES, Sample, Word, picture_name

    files: dict[str, bytes] = {}
    names: dict[str, str] = {}
    for path in dict.fromkeys(one.path for one in shown):
        data = read_regular(path, MOST_BYTES)
        names[path] = picture_name(data, Path(path).suffix)
        files[names[path]] = data
    samples = tuple(Sample(names[one.path], one.x, one.y) for one in dict.fromkeys(shown))
    return Word(name, plural, samples), files


def known_words(pipeline: Pipeline) -> Words:
    """The words that a model was taught, and the nouns that it knows."""
    from nanomolmo2.data.registry import known_nouns
    from nanomolmo2.generation.words import Words

    return pipeline.words or Words({}, {}, known_nouns(pipeline.processor.config.trained_on))
