"""What the nouns of annotated pictures look like, learned by the finder of a model that writes.

A model that writes coordinates as text learns slowly from few photos where things are: a list of
ten points is some thirty tokens, and every one of them has to be spelled. Its finder, which was
made to tell things of one kind from all others, learns a noun in seconds: as a look to search for,
with what it knows corrected a little on the way. So behind the last step of a run:

    read_places    answers that list points -> nouns, and where things of them are in which picture
    learn_looks    the finder, and a look for each noun; the encoder stays as it is
    take_words     where the held-out pictures are answered better so, questions about these nouns
                   are answered by finding from then on (`generation.taught`)

Nouns that the model knew before stay its own: it was trained on them far longer.

W words, E numbers of a look, n patches of a picture.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.data.example import BadExample, Example, Source
from nanomolmo2.data.registry import known_nouns
from nanomolmo2.data.sources import RecordSource
from nanomolmo2.generation.find import crops_of
from nanomolmo2.generation.finding import Seen, patch_at, patches_of, see, wanted_words
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.prefix_cache import digest
from nanomolmo2.generation.taught import TASK_WORDS, noun_in, task_of
from nanomolmo2.generation.words import Word, WordLook, Words, checked_name, key_of, listed
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.finder import Patches
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.processor import Processor, load_image
from nanomolmo2.processor.nouns import plural
from nanomolmo2.processor.points import NOTHING_THERE, Point, parse_points
from nanomolmo2.training.find_terms import WAY_WEIGHT, scores_loss
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.split import Split

MOST_RECORDS, MOST_PICTURES = 2000, 160  # that are read, and that are learned from
MOST_WORDS = 64
FEWEST_THINGS, FEWEST_PICTURES = 8, 6  # of a noun
STEPS, PICTURES = 120, 4  # and pictures of a step
RATE, LOOK_RATE = 5e-4, 2.5e-3  # AdamW, of the finder and of the looks
WARMUP, FINAL_RATIO = 20, 0.03
NEAR_EDGE = 0.25  # of a patch from its middle: a thing beyond may count in the next patch, too
MOST_SAID = 8  # sentences on what is not learned
MEASURED = 40  # held-out records whose answers decide

Info = Callable[[str], None]


class Places(NamedTuple):
    """What is known of a picture: which record it is of, and by noun where things are, in pixels;
    an empty list says that there are none."""

    source: Source
    number: int
    things: dict[str, list[tuple[float, float]]]


class Nouns(NamedTuple):
    """What can be learned from some data.

    Attributes:
        words: without looks. pictures: that say where things of them are.
        others: number of answers that are not about these words.
        left: sentences on labels that are not learned, and records that do not open.
    """

    words: list[Word]
    pictures: list[Places]
    others: int
    left: list[str]


# ---- what the data say ----


def read_places(sources: Sequence[Source], known: Collection[str] = (), seed: int = 0) -> Nouns:
    """The nouns that some data point to, and where.

    Only files of records are read, at most `MOST_RECORDS` of each, drawn at random.

    Args: known: nouns that are left out, as `key_of` writes them.
    """
    said: list[_Record] = []
    bad = Counter[str]()
    for source in sources:
        said += _records(source, seed, bad)
    things, pictures = Counter[str](), Counter[str]()
    shown = dict[str, list[_Record]]()
    for record in said:
        shown.setdefault(record.picture or f"record {len(shown)}", []).append(record)
    for records in shown.values():
        most: dict[str, int] = {}
        for _, points in itertools.chain(*(record.answers for record in records)):
            labels = Counter(point.label for point in points or () if point.label)
            for label, number in labels.items():
                most[label] = max(most.get(label, 0), number)
        things.update(most)
        pictures.update(most.keys())
    reasons = {
        label: _reason(label, number, pictures[label], known)
        for label, number in things.most_common()
    }
    left = [f"{label[:80]!r} is not learned: {why}" for label, why in reasons.items() if why]
    left += [f"{n} records are left out ({cause})" for cause, n in bad.items()]
    chosen = _words_of([label for label, why in reasons.items() if not why])
    left += [f"only the {MOST_WORDS} most frequent of {len(chosen)} nouns are learned"] * (
        len(chosen) > MOST_WORDS
    )
    chosen = chosen[:MOST_WORDS]
    words = Words({word.name: word for word in chosen}, {})
    found = []
    for records in shown.values():
        answers = [answer for record in records for answer in record.answers]
        if at := _things_of(answers, words):
            found.append(Places(records[0].source, records[0].number, at))
    order = np.random.default_rng(seed).permutation(len(found))[:MOST_PICTURES]
    found = [found[i] for i in order.tolist()]
    asked = {name for places in found for name, at in places.things.items() if at}
    chosen = [word for word in chosen if word.name in asked]
    words = Words({word.name: word for word in chosen}, {})
    questions = [question for record in said for question, _ in record.answers]
    others = sum(not asks_for(words, question) for question in questions)
    return Nouns(chosen, found, others, left)


def _words_of(labels: Sequence[str]) -> list[Word]:
    """A word for each label; one for both where they are one noun, once in the plural."""
    many = {plural(label) for label in labels if plural(label) != label}
    return [Word(label, plural(label)) for label in labels if label not in many]


def _reason(label: str, things: int, pictures: int, known: Collection[str]) -> str:
    """Why a label is not learned; empty for one that is."""
    if key_of(label) in known:
        return "the model knew it before"
    try:
        name = checked_name(label)
    except ValueError:
        return "it is no word of letters"
    if name != label or key_of(label) in TASK_WORDS:
        return f"no name of a thing: call it {name!r}" if name != label else "no name of a thing"
    if things < FEWEST_THINGS or pictures < FEWEST_PICTURES:
        return (
            f"{things} things in {pictures} pictures, and {FEWEST_THINGS} in {FEWEST_PICTURES} are "
            f"needed"
        )
    return ""


def asks_for(words: Words, question: str) -> bool:
    """Whether a question is answered by finding what words stand for."""
    return bool(words.mentioned(question)[0]) and task_of(words.rest(question)) is not None


# A question, and what is pointed to: nothing where it says that there is none, None where the
# answer says other things.
_Answer = tuple[str, list[Point] | None]


class _Record(NamedTuple):
    """What a record says; ``picture`` is the same for the same picture, empty for several."""

    source: Source
    number: int
    picture: str
    answers: list[_Answer]


def _records(source: Source, seed: int, bad: Counter[str]) -> Iterator[_Record]:
    """Those of a file, in random order, at most `MOST_RECORDS`; ``bad`` counts the causes of those
    that do not open."""
    if isinstance(source, RecordSource):
        order = np.random.default_rng(seed).permutation(len(source))[:MOST_RECORDS]
        for number in order.tolist():
            try:
                example = source[number]
            except BadExample as problem:
                bad[problem.cause] += 1
            else:
                yield _read(source, number, example)


def _read(source: Source, number: int, example: Example) -> _Record:
    picture, size = "", None
    if example.video is None and len(example.images) == 1:
        image = load_image(example.images[0])
        picture, size = digest(np.asarray(image)), image.size
    found: list[_Answer] = []
    for branch in example.branches:
        turns = [(turn["role"], turn["content"]) for turn in branch.messages]
        for (_, asked), (role, answer) in itertools.pairwise(turns):
            if role != "assistant":
                continue
            points: list[Point] | None = None
            if size is not None and isinstance(answer, str):
                points = parse_points(answer, [size], problems=[])
                points = _named(points, asked) if points or answer == NOTHING_THERE else None
            found.append((asked if isinstance(asked, str) else "", points))
    return _Record(source, number, picture, found)


def _named(points: list[Point], question: object) -> list[Point]:
    """Points without a name of their own get that of the question."""
    if not isinstance(question, str) or {key_of(p.label or "") for p in points} - TASK_WORDS:
        return points
    noun = noun_in(question)
    return points if noun is None else [replace(point, label=noun) for point in points]


def _things_of(answers: Sequence[_Answer], words: Words) -> dict[str, list[tuple[float, float]]]:
    """Where things of which word are. What is asked for may be some of them, such as the left one:
    a question counts if `generation.taught` would answer it, and no other contradicts it."""
    things: dict[str, list[tuple[float, float]]] = {}
    unsure = set()
    for question, points in answers:
        if points is None or task_of(words.rest(question)) not in ("point", "count"):
            continue
        about, _ = words.mentioned(question)
        for word in about:
            own = [(p.x, p.y) for p in points if p.label and key_of(p.label) in word.forms]
            if word.name in things and len(things[word.name]) != len(own):
                unsure.add(word.name)
            things[word.name] = own
    return {name: at for name, at in things.items() if name not in unsure}


# ---- what they look like ----


class WordLooks(nn.Module):
    """A look of each word, to be learned: of patch and token, and the size of a thing."""

    def __init__(self, look: Tensor, token_look: Tensor, size: Tensor) -> None:
        super().__init__()
        self.look, self.token_look = nn.Parameter(look), nn.Parameter(token_look)
        self.size = size

    def rows(self) -> Iterator[WordLook]:
        """For `Words`; rounded, since they are written as text."""
        looks = (F.normalize(x.detach(), dim=-1).tolist() for x in (self.look, self.token_look))
        for patch, token, size in zip(*looks, self.size.tolist(), strict=True):
            yield WordLook(_rounded(patch), _rounded(token), round(size, 6))


def _rounded(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(number, 6) for number in numbers)


class _Lesson(NamedTuple):
    """A picture as the encoder saw it, and what is to be found there."""

    seen: Seen
    words: Tensor  # (Q,) of which something is known
    hits: Tensor  # (Q, n) bool, the patch holds the middle of a thing
    unsure: Tensor  # (Q, n) bool, it may be said to
    place: Tensor  # (H,) patches of all hits
    way: Tensor  # (H, 2) from the middle of the patch to that of the thing, in patches


def learn_looks(
    model: NanoMolmo2,
    processor: Processor,
    words: Sequence[Word],
    pictures: Sequence[Places],
    seed: int = 0,
) -> list[Word]:
    """The words with their looks; the finder of the model learns beside them.

    Args: words, pictures: of `read_places`.
    """
    lessons = [_lesson(model, processor, words, places) for places in pictures]
    finder = model.finder
    assert finder is not None
    looks = _first_looks(model, words, lessons)
    finder.requires_grad_(True)
    learning = [*finder.parameters(), *looks.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(finder.parameters()), "lr": RATE, "weight_decay": 0.01},
            {"params": list(looks.parameters()), "lr": LOOK_RATE, "weight_decay": 0.0},
        ]
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    rng, order = np.random.default_rng(seed), list[int]()
    for step in range(STEPS):
        factor = min((step + 1) / WARMUP, max(FINAL_RATIO, 1 - step / STEPS))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        while len(order) < PICTURES:
            order += rng.permutation(len(lessons)).tolist()
        optimizer.zero_grad()
        for number in order[:PICTURES]:
            (_loss(model, looks, lessons[number]) / PICTURES).backward()
        del order[:PICTURES]
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    return [
        Word(word.name, word.plural, look=look)
        for word, look in zip(words, looks.rows(), strict=True)
    ]


def _lesson(
    model: NanoMolmo2, processor: Processor, words: Sequence[Word], places: Places
) -> _Lesson:
    """Look at a picture once."""
    example = places.source[places.number]
    image = load_image(example.images[0])
    seen = see(model, crops_of(model, processor, None, [image.size]), image)
    rows, cols = seen.view.rows, seen.view.cols
    asked = [i for i, word in enumerate(words) if word.name in places.things]
    hits = torch.zeros(len(asked), rows * cols, dtype=torch.bool)
    unsure = torch.zeros_like(hits)
    place, way = [], []
    for q, i in enumerate(asked):
        for x, y in places.things[words[i].name]:
            at = patch_at(x, y, (rows, cols), seen.size)
            row, col = divmod(at, cols)
            right, down = x * cols / seen.size[0] - col - 0.5, y * rows / seen.size[1] - row - 0.5
            hits[q, at] = True
            place.append(at)
            way.append((right, down))
            across = [0, *([int(np.sign(right))] if abs(right) > NEAR_EDGE else [])]
            along = [0, *([int(np.sign(down))] if abs(down) > NEAR_EDGE else [])]
            for dx in across:
                for dy in along:
                    if 0 <= col + dx < cols and 0 <= row + dy < rows:
                        unsure[q, (row + dy) * cols + col + dx] = True
    return _Lesson(
        seen,
        torch.tensor(asked),
        hits,
        unsure & ~hits,
        torch.tensor(place, dtype=torch.long),
        torch.tensor(way, dtype=torch.float32).reshape(-1, 2),
    )


@torch.no_grad()
def _first_looks(model: NanoMolmo2, words: Sequence[Word], lessons: Sequence[_Lesson]) -> WordLooks:
    """The means of what the things look like."""
    sums: list[list[Tensor]] = [[] for _ in words]
    for lesson in lessons:
        patches = patches_of(model, [lesson.seen])
        for q, i in enumerate(lesson.words.tolist()):
            for at in lesson.hits[q].nonzero()[:, 0].tolist():
                size = patches.way[at, 2:]
                sums[i].append(torch.cat([patches.look[at], patches.token_look[at], size]))
    means = torch.stack([torch.stack(rows).mean(dim=0) for rows in sums])
    look, token_look = (F.normalize(part, dim=-1) for part in means[:, :-1].chunk(2, dim=1))
    return WordLooks(look, token_look, means[:, -1])


def _loss(model: NanoMolmo2, looks: WordLooks, lesson: _Lesson) -> Tensor:
    """Mean over the words of a picture; that of one as in `find_terms.find_loss`."""
    finder = model.finder
    assert finder is not None
    patches: Patches = patches_of(model, [lesson.seen])
    of = lesson.words
    wanted = wanted_words(finder, patches, looks.look[of], looks.token_look[of], looks.size[of])
    hits = lesson.hits
    scores = finder(wanted, patches, torch.ones_like(hits))
    total = (scores_loss(scores, hits, ~lesson.unsure) / (1 + hits.sum(dim=1))).mean()
    if len(lesson.place):
        off = (patches.way[lesson.place, :2] - lesson.way).abs().sum(dim=1)
        total = total + WAY_WEIGHT * off.mean()
    return total


# ---- in a run ----


def learns_words(recipe: Recipe, config: NanoMolmo2Config) -> bool:
    """Whether the nouns of a run's data are learned by the finder behind its last step: one whose
    model points by selecting learns them with everything else, see `find_terms`."""
    writes = config.point_config is None
    return recipe.find_weight > 0 and writes and config.finder_dim is not None


def take_words(
    folder: Path, split: Split, dtype: torch.dtype, info: Info, *, seed: int = 0
) -> Nouns | None:
    """Teach the model in a folder the nouns of its data, if that is better, and write it again.

    Args:
        split: what it learned from, and what is held out to measure on; maybe nothing.
        dtype: of the weights that are written.
    Returns: what it has learned; None where it has not.
    """
    pipeline = Pipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    nouns = known_nouns(pipeline.processor.config.trained_on)
    learned_from, held_out = split.mixture.sources, split.validation
    learned = read_places(learned_from, {key_of(noun) for noun in nouns}, seed)
    for sentence in learned.left[:MOST_SAID]:
        info(f"warning: {sentence}")
    if not learned.words:
        return None
    names = listed(word.name for word in learned.words)
    info(f"learning by sight: {names}, from {len(learned.pictures)} pictures")
    known = pipeline.words or Words({}, {}, nouns)
    if stale := [word.name for word in known.words.values() if word.look is not None]:
        info(f"warning: the finder, which learns too, knew {listed(stale)} before: check them")
    about = [OnlyAbout(source, learned.words) for source in held_out]
    written = _mean_score(pipeline, about)
    for word in learn_looks(pipeline.model, pipeline.processor, *learned[:2], seed):
        known = known.with_word(word, {})
    pipeline.words = known
    found = _mean_score(pipeline, about)
    if written is None or found is None:
        info(f"{names}: found by their looks now (not measured: nothing held out asks for them)")
    else:
        is_better = found >= written
        kept = "found by their looks now" if is_better else "left to the language model"
        info(f"{names}: {kept}; mean score on what is held out {found:.3f}, {written:.3f} written")
        if not is_better:
            return None
    pipeline.model.to(dtype).save_pretrained(folder, processor=pipeline.processor)
    known.save(folder)
    return learned


class OnlyAbout:
    """Of some examples the questions that words answer."""

    def __init__(self, source: Source, words: Sequence[Word]) -> None:
        self.source, self.name = source, source.name
        self.words = Words({word.name: word for word in words}, {})

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        example = self.source[i]
        branches = [
            branch
            for branch in example.branches
            if isinstance(text := branch.messages[0]["content"], str) and asks_for(self.words, text)
        ]
        if not branches:
            raise BadExample("no answer", "it does not ask for what was learned")
        return replace(example, branches=branches)


def _mean_score(pipeline: Pipeline, held_out: Sequence[Source]) -> float | None:
    """Of the answers about some records, 0 to 1, all tasks alike; None where none can be scored."""
    from nanomolmo2.evaluation import evaluate

    with warnings.catch_warnings():  # of those that ask for other things
        warnings.simplefilter("ignore")
        try:
            report = evaluate(pipeline, [*held_out], baselines=False, limit=MEASURED)
        except ValueError:  # nothing that can be scored
            return None
    return report.mean_score
