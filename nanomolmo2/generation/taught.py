"""Questions about words that a model was taught: who is asked, and what is answered.

    "How many walnuts are there?"

What is like the walnuts that were shown, or has the look that was learned from annotated pictures,
is found, and said as the model says it: "Counting the <points ...>walnut</points> shows a total
of 5."

A question about one image that counts, points to or asks for a taught word is answered here. All
others are the model's own to answer, as if nothing had been taught.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from PIL import Image

from nanomolmo2.generation.answer import Answer, Shown, coords_of
from nanomolmo2.generation.find import find_words
from nanomolmo2.generation.finding import LEAST_CONFIDENCE, LIKELY, Found, vote
from nanomolmo2.generation.question import Question, read_question
from nanomolmo2.generation.words import Sample, Word, Words, key_of, listed, with_article
from nanomolmo2.processor import Message, Point, load_image
from nanomolmo2.processor.points import NOTHING_THERE

if TYPE_CHECKING:
    from nanomolmo2.generation.vlm import VLM

Task = Literal["point", "count", "number", "presence"]

MOST_UNLIKE = 2  # counter-examples, as in training: other words that were shown in one picture
MOST_SAMPLES = 3  # of a word in a prompt, likewise
NEAR = 0.02  # of the diagonal: points of two searches that are nearer are of one thing

_COUNT = re.compile(r"\bhow many\b|\bcount\b|\bnumber of\b")
_NUMBER = re.compile(r"\b(?:answer with a|just the|just a|only the|only a) number\b")
_POINT = re.compile(
    r"\b(?:points?(?: to| at)?|where|show (?:me|us|the|all|every|each)|find|locate|mark|click|"
    r"highlight|identify|detect|coordinates|positions?|locations?)\b"
)
_PRESENCE = re.compile(r"^(?:is|are|do|does|can|could|any)\b")
_PLEA = re.compile(r"^(?:can|could) you (?:please )?(?:point|show|locate|mark|tell|count)\b")
# All that may be said beside the things themselves. Any other word asks for something that finding
# does not know: a colour, a place, a comparison, what the things are not.
_PLAIN_WORDS = """
    a all an and answer any appear appears are at be can click contain contains coordinates could
    count detect do does each every everything exactly find for give has have here highlight how i
    identify in is it its just list locate location locations many mark me my notice number of on
    only our please point points position positions present say see seen show shown spot tell that
    the their them there these this those to total us visible we what where with you your
    picture image photo photograph scene table tray plate ground floor belt
"""
_PLAIN = frozenset(_PLAIN_WORDS.split())
_TOKEN = r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|\d+"
TASK_WORDS = _PLAIN - {"plate", "tray", "belt", "table"}  # that no thing may be called


def task_of(text: str) -> Task | None:
    """What a question about things asks for; None for what is not answered by finding.

    Args: text: without the names of the things, see `Words.rest`.
    """
    asked = key_of(text)
    if set(re.findall(_TOKEN, asked)) - _PLAIN:
        return None
    if _COUNT.search(asked):
        return "number" if _NUMBER.search(asked) else "count"
    if _PRESENCE.search(asked) and not _PLEA.search(asked):
        return "point" if "where" in asked.split() else "presence"
    return "point" if _POINT.search(asked) else None


def noun_in(text: str) -> str | None:
    """What a question about things of one kind calls them: "walnuts" of "Point to the walnuts.";
    None where it asks for something else, or for several."""
    pieces = re.findall(_TOKEN, key_of(text))
    others = [i for i, piece in enumerate(pieces) if piece not in _PLAIN]
    if not others or others != list(range(others[0], others[-1] + 1)):
        return None
    rest = " ".join(piece for piece in pieces if piece in _PLAIN)
    return " ".join(pieces[i] for i in others) if task_of(rest) in ("point", "count") else None


def answer_about_words(vlm: VLM, words: Words, question: Question) -> Answer | None:
    """The answer to a question about taught words; None for one that is the model's to answer.

    Raises: as `VLM.ask`.
    """
    text = _last_text(question.question)
    about, others = words.mentioned(text) if text else ([], [])
    task = task_of(words.rest(text)) if about else None
    if task is None or question.video is not None:
        return None
    context = vlm.model.config.llm_config.max_position_embeddings
    images, video = read_question(question, context, allow_remote=vlm.allow_remote).shown()
    if video is not None or len(images) != 1:
        if len(images) > 1:
            names = listed(word.name for word in about)
            warnings.warn(
                f"the question is about {names}, a word that was taught, which is found in one "
                f"image at a time, and {len(images)} are shown: the model answers without them",
                stacklevel=4,
            )
        return None
    image = load_image(images[0])
    if words.way == "prompt" and len(about) == 1 and about[0].samples:
        return ask_with_samples(vlm, words, about[0], image, text)
    learned = [word for word in about if word.look is not None]
    by_look = dict(
        zip((word.name for word in learned), find_learned(vlm, learned, image), strict=True)
    )
    found = [by_look.get(word.name) or find_word(vlm, words, word, image) for word in about]
    answer = replace(said(task, about, found, [image.size]), show=partial(Shown, [image]))
    if others:
        note = f"the answer is about {listed(w.name for w in about)} alone: ask about "
        answer = replace(answer, problems=(*answer.problems, f"{note}{listed(others)} apart"))
    return answer


def _last_text(question: str | Sequence[Message]) -> str:
    """The text of the last turn; empty where it holds points, which say what is meant."""
    if isinstance(question, str):
        return question
    last: Any = question[-1] if question and isinstance(question, Sequence) else None
    is_asked = isinstance(last, dict) and last.get("role") == "user"
    content = last.get("content") if is_asked else None
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else []
    if not all(isinstance(part, dict) for part in parts):
        return ""
    if any(part.get("type") == "point" for part in parts):
        return ""
    texts = [part.get("text") for part in parts if part.get("type") in ("text", "input_text")]
    return " ".join(text for text in texts if isinstance(text, str))


# ---- by finding ----


def find_word(vlm: VLM, words: Words, word: Word, image: Image.Image) -> tuple[Answer, list[Point]]:
    """What is like the samples of a word: an answer of `VLM.find`, and the points, all sure.

    Every picture of the samples is a reference of its own; where there are several, a thing's
    confidence is the mean of what they say. Other words that were shown in the same picture are
    counter-examples there.
    """
    pictures = list(dict.fromkeys(sample.picture for sample in word.samples))
    least = LIKELY if len(pictures) == 1 else LEAST_CONFIDENCE
    answers = []
    for name in pictures:
        shown = words.pictures[name]
        unlike = [
            (sample.x, sample.y)
            for other in words.words.values()
            for sample in other.samples
            if other is not word and sample.picture == name
        ]
        is_asked = shown.size == image.size and shown.tobytes() == image.tobytes()
        answers.append(
            vlm.find(
                image,
                like=[(s.x, s.y) for s in word.samples if s.picture == name],
                unlike=unlike[:MOST_UNLIKE],
                reference=None if is_asked else shown,
                min_confidence=least,
            )
        )
    return merge_found(answers, image.size)


def merge_found(answers: Sequence[Answer], size: tuple[int, int]) -> tuple[Answer, list[Point]]:
    """The first of several answers of `VLM.find` about one image of ``size``, and what all of them
    found together, see `finding.vote`."""
    points = answers[0].points
    if len(answers) > 1:
        lists = [
            [Found(p.x, p.y, p.size or 0.0, p.confidence or 0.0) for p in answer.points]
            for answer in answers
        ]
        points = tuple(
            Point(one.x, one.y, size=one.size, confidence=one.confidence)
            for one in sorted(vote(lists, NEAR * math.hypot(*size)), key=lambda one: (one.y, one.x))
        )
    return answers[0], [point for point in points if (point.confidence or 0.0) >= LIKELY]


def find_learned(
    vlm: VLM, words: Sequence[Word], image: Image.Image
) -> list[tuple[Answer, list[Point]]]:
    """The same of words whose looks were learned."""
    looks = [word.look for word in words if word.look is not None]
    if not looks:
        return []
    answers = find_words(
        vlm.model,
        vlm.processor,
        image,
        looks,
        cache=vlm.cache,
        seeing=vlm.scheduler.seeing,
    )
    return [(answer, list(answer.points)) for answer in answers]


def said(
    task: Task,
    about: Sequence[Word],
    found: Sequence[tuple[Answer, list[Point]]],
    sizes: Sequence[tuple[int, int]],
    image: int = 1,
) -> Answer:
    """What was found, in the words that the model has for it.

    Args: sizes: of all images of the question. image: the one that is asked about, from 1.
    """
    first, lists = found[0][0], [points for _, points in found]
    points: list[Point] = []
    count = sum(map(len, lists)) if task in ("count", "number") else None
    if task == "presence":
        text = "Yes." if all(lists) else "No."
    elif task == "number":
        text = str(count)
    else:
        texts = []
        for word, own in zip(about, lists, strict=True):
            placed = [
                replace(point, id=i, label=word.name, image=image)
                for i, point in enumerate(own, start=1)
            ]
            points += placed
            if placed:
                tag = f'<points coords="{coords_of(placed, sizes)}">{word.name}</points>'
                total = f"Counting the {tag} shows a total of {len(placed)}."
                texts.append(total if task == "count" else tag)
        text = " ".join(texts) or NOTHING_THERE
    timings: dict[str, float] = {}
    for answer, _ in found:
        for name, seconds in answer.timings.items():
            timings[name] = timings.get(name, 0.0) + seconds
    problems = [problem for answer, _ in found for problem in answer.problems]
    return replace(
        first,
        text=text,
        coordinates=text,
        points=tuple(points),
        count=0 if text == NOTHING_THERE else count,
        problems=tuple(dict.fromkeys(problems)),
        image_sizes=tuple(sizes),
        confidences=(),
        timings=timings,
    )


# ---- by telling the model ----


def ask_with_samples(vlm: VLM, words: Words, word: Word, image: Image.Image, text: str) -> Answer:
    """The model's own answer, told before the question what the word stands for.

    The samples' picture comes first, so that what was computed for it serves every question. As in
    training there is one such picture: of several the first.
    """
    samples = [s for s in word.samples if s.picture == word.samples[0].picture][:MOST_SAMPLES]
    plain = copy.copy(vlm)
    plain.words = None
    shown = words.pictures[samples[0].picture]
    answer = plain.ask(None, messages_about(word, samples, shown, image, text))
    points = tuple(replace(p, image=1) for p in answer.points if p.image == 2)
    said = answer.coordinates
    if answer.points and all(point.image == 2 for point in answer.points):
        said = re.sub(r'(coords=")2 ', r"\g<1>1 ", said)
    return replace(
        answer, text=said, coordinates=said, points=points, image_sizes=answer.image_sizes[-1:]
    )


def messages_about(
    word: Word, samples: Sequence[Sample], shown: Image.Image, image: Image.Image, text: str
) -> list[Message]:
    """A conversation in which a word is explained before the question, as in training."""
    name = with_article(word.name)
    parts: list[Any] = [{"type": "image", "image": shown}, {"type": "image", "image": image}]
    parts.append({"type": "text", "text": "This "})
    for i, sample in enumerate(samples):
        if i:
            between = " and " if i == len(samples) - 1 else ", "
            parts.append({"type": "text", "text": between})
        parts.append({"type": "point", "x": sample.x, "y": sample.y, "image": 1})
    parts.append({"type": "text", "text": f" is {name}."})
    bare = text.rstrip()
    mark = bare[len(bare.rstrip("?.!")) :] or "?"
    asked = f"{bare.rstrip('?.! ')} in the second picture{mark}"
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": f"{name[0].upper()}{name[1:]}."},
        {"role": "user", "content": asked},
    ]
    return cast("list[Message]", messages)
