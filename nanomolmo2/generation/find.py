"""Find by example: places on things in a picture in, an `Answer` with everything like them out.
Or by a word, whose look was learned from annotated pictures.

No word is read or written, and the language model is not asked. `finding.see` encodes the picture,
and the reference if there is one, `finding.look_for` says how likely what is meant is at which
place; here is chosen, numbered and checked.
"""

from __future__ import annotations

import math
import numbers
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from nanomolmo2.generation import finding
from nanomolmo2.generation.answer import Answer, Shown, coords_of
from nanomolmo2.generation.finding import Found, Seen
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.question import Images, as_list, read_images
from nanomolmo2.generation.words import WordLook
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.finder import CANDIDATES
from nanomolmo2.processor import Point, Processor, load_image
from nanomolmo2.processor.config import ProcessorConfig
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.points import NOTHING_THERE

LABEL = "thing"  # what all that is found is called
LEARNED = 60  # things of a kind that a picture of the training had at most
SURE, MORE_EXAMPLES = 0.9, 5  # what is so sure to be like the examples is one, too
MANY, PERHAPS = 12, 0.3  # things of so much confidence, of which a larger look is needed
MANY_UNDERRATED = 0.7  # logit by which the mean of the looks at them is too low: each misses more
MANY_CANDIDATES = 2 * CANDIDATES  # of these, judged together: a thing may have several
FIND_MARGINS = (1, 1)  # patches by which crops overlap where the processor says nothing
BARE = 0.3  # a place that no candidate of this confidence holds is bare ground
# A thing's size and its middle are guesses: a place that is so near to the middle lies on it.
_NEAR_SIZES, _NEAR_PATCHES = 0.75, 1.25

Place = Point | Sequence[float]  # (x, y), or (x, y, number of the picture in the prompt)
Size = tuple[int, int]  # (width, height), pixels
Tiling = tuple[int, int]  # rows and columns of tiles


class Examples(NamedTuple):
    """Places on what is meant, and on what is not; ``image`` 1 is the reference, if there is one,
    else the picture that is asked about."""

    like: list[Point]
    unlike: list[Point]


class Asked(NamedTuple):
    """What was asked, read and checked.

    Attributes:
        sources: the reference, if there is one, and the picture that is asked about, as given.
        sizes: of these.
    """

    examples: Examples
    sources: list[Any]
    sizes: list[Size]
    min_confidence: float

    @property
    def image(self) -> int:
        """Number of the picture that is asked about."""
        return len(self.sources)


def find(
    model: NanoMolmo2,
    processor: Processor,
    image: Images,
    examples: Examples,
    *,
    reference: Images = None,
    max_crops: int | None = None,
    min_confidence: float = 0.5,
    allow_remote: bool = False,
    cache: PrefixCache | None = None,
    seeing: AbstractContextManager[Any],
) -> Answer:
    """What `VLM.find` does.

    Args:
        examples: of `read_examples`.
        cache: where to look for, and leave, what was seen.
        seeing: held while the model sees.
    Raises: ValueError as `VLM.find`.
    """
    start = time.perf_counter()
    finding.finder_of(model)
    given = [*([] if reference is None else _one("reference", reference)), *_one("image", image)]
    sources = read_images(given, allow_remote=allow_remote)
    pictures = [load_image(source) for source in sources]
    asked = Asked(examples, sources, [picture.size for picture in pictures], _share(min_confidence))
    _check_inside(asked)
    crops = crops_of(model, processor, max_crops, asked.sizes)
    prepared = time.perf_counter()
    tilings = _tilings(crops, asked.sizes) if max_crops is None else [[None] * len(pictures)]
    see = partial(_see, model, crops, pictures, cache, seeing)
    looks = [see(tiling) for tiling in tilings]
    found = _together([finding.look_for(model, seen, *examples) for seen in looks], looks)
    if len(looks) > 1:
        larger = partial(see, _tilings(crops, asked.sizes, larger=1)[-1])
        looks, found = _search_again(model, asked, looks, found, larger)
    spent = time.perf_counter() - prepared
    return replace(
        _answer(asked, looks, found),
        timings={"prepare": prepared - start, "first_token": spent, "generate": spent},
    )


def find_words(
    model: NanoMolmo2,
    processor: Processor,
    image: Any,
    looks: Sequence[WordLook],
    *,
    cache: PrefixCache | None = None,
    seeing: AbstractContextManager[Any],
) -> list[Answer]:
    """For each word that was learned from annotated pictures what it stands for in a picture, as
    `VLM.find` answers; nothing was shown, so nothing is said of examples.

    Args: image: anything that `load_image` takes.
    Raises: ValueError for a model that has not learned to find, and looks of another one.
    """
    start = time.perf_counter()
    picture = load_image(image)
    asked = Asked(Examples([], []), [image], [picture.size], finding.LIKELY)
    crops = crops_of(model, processor, None, asked.sizes)
    tilings = _tilings(crops, asked.sizes)
    seen = [_see(model, crops, [picture], cache, seeing, tiling) for tiling in tilings]
    by_look = [finding.look_for_words(model, look, looks) for (look,) in seen]
    found = [_together([[words[i]] for words in by_look], seen) for i in range(len(looks))]
    spent = time.perf_counter() - start
    timings = {"prepare": 0.0, "first_token": spent, "generate": spent}
    return [replace(_answer(asked, seen, one), timings=timings) for one in found]


def _tilings(crops: MultiCrop, sizes: Sequence[Size], larger: int = 0) -> list[list[Tiling]]:
    """Of each look at some pictures how many tiles each has: see `finding.looks_at`."""
    return [
        list(one)
        for one in zip(*(finding.looks_at(crops, size, larger) for size in sizes), strict=True)
    ]


def _see(
    model: NanoMolmo2,
    crops: MultiCrop,
    pictures: Sequence[Image.Image],
    cache: PrefixCache | None,
    seeing: AbstractContextManager[Any],
    tilings: Sequence[Tiling | None],
) -> list[Seen]:
    """One look at the pictures.

    The reference comes first: of many pictures that are asked about, it is the last to be
    forgotten.
    """
    return [
        finding.see(model, crops, picture, cache, seeing, tiling)
        for picture, tiling in zip(pictures, tilings, strict=True)
    ]


def _search_again(
    model: NanoMolmo2,
    asked: Asked,
    looks: list[list[Seen]],
    found: list[list[Found]],
    larger: Callable[[], list[Seen]],
) -> tuple[list[list[Seen]], list[list[Found]]]:
    """Search once more, with what the first search told: the surest things beside the examples, up
    to `MORE_EXAMPLES` of them, are examples, too; and where there may be more than `MANY`, they are
    small or close to each other, and a larger look takes the place of the smallest. Where all of
    them are unsure they need it most; but that may be a ground of bricks, so only things of which
    many are likely are raised farther than few.

    Returns: the looks, and what they found together.
    """
    sure = _sure_ones(asked, looks[len(looks) // 2], found[0])
    likely_many = sum(one.confidence >= finding.LIKELY for one in found[-1]) > MANY
    many = sum(one.confidence >= PERHAPS for one in found[-1]) > MANY
    if many:
        looks = [*looks[1:], larger()]
    elif not sure:
        return looks, found
    like = [*asked.examples.like, *(Point(one.x, one.y) for one in sure)]
    candidates = MANY_CANDIDATES if many else CANDIDATES
    again = [
        finding.look_for(model, seen, like, asked.examples.unlike, candidates) for seen in looks
    ]
    found = _together(again, looks, MANY_UNDERRATED if likely_many else finding.UNDERRATED)
    # That it was an example makes a thing no surer than it was.
    rest = [other for other in found[0] if not any(_is_near(one, other) for one in sure)]
    found[0] = sorted([*sure, *rest], key=lambda one: -one.confidence)
    return looks, found


def _is_near(one: Found, other: Found) -> bool:
    """Whether two searches speak of the same thing."""
    away = math.hypot(other.x - one.x, other.y - one.y)
    return away <= finding.NEAREST * min(one.size, other.size)


def _sure_ones(asked: Asked, seen: Sequence[Seen], found: Sequence[Found]) -> list[Found]:
    """The surest of what was found in the picture of the examples, without these; none where they
    lie on bare ground."""
    told = [_at(point, seen, found) for point in asked.examples.like if point.image == 1]
    if told and not any(one is not None and one.confidence >= BARE for one in told):
        return []
    left = [one for one in _without_unlike(asked, seen, found, 1) if one not in told]
    return [one for one in left if one.confidence >= SURE][:MORE_EXAMPLES]


def _together(
    found: Sequence[Sequence[Sequence[Found]]],
    looks: Sequence[Sequence[Seen]],
    underrated: float = finding.UNDERRATED,
) -> list[list[Found]]:
    """Of each picture what all looks found, see `finding.calibrated`."""
    if len(found) == 1:
        return [list(one) for one in found[0]]
    largest = [
        max(seen.size[0] / seen.view.cols for seen in of_one) for of_one in zip(*looks, strict=True)
    ]
    voted = [
        finding.vote(of_one, finding.NEAREST_PATCHES * patch)
        for of_one, patch in zip(zip(*found, strict=True), largest, strict=True)
    ]
    return [[finding.calibrated(one, underrated) for one in of_one] for of_one in voted]


# ---- what is asked ----


def read_examples(like: Any, unlike: Any = ()) -> Examples:
    """Places as people give them.

    Raises: ValueError for no example, and what is no place.
    """
    examples = Examples(_places("like", like), _places("unlike", unlike))
    if not examples.like:
        raise ValueError(
            "like is empty, expected at least one place on a thing that is meant: like=[(x, y)]"
        )
    for point in examples.unlike:
        if point in examples.like:
            raise ValueError(
                f"({point.x:g}, {point.y:g}) is in like and in unlike: a place is an example, or "
                f"one of what is not meant"
            )
    return examples


def _places(name: str, given: Any) -> list[Point]:
    if isinstance(given, (str, bytes, Point)) or not isinstance(given, Iterable):
        raise ValueError(f"{name} is {given!r:.60}, expected a list of places: {name}=[(x, y)]")
    places = list(given)
    if places and all(_is_number(one) for one in places):
        raise ValueError(f"{name} is {given!r:.60}, expected a list of places: {name}=[(x, y)]")
    return [_place(f"{name}[{i}]", one) for i, one in enumerate(places)]


def _place(name: str, given: Any) -> Point:
    if isinstance(given, Point):
        if given.time is not None:
            raise ValueError(f"{name} is a place at {given.time} s of a video: expected a picture")
        values: list[Any] = [given.x, given.y, given.image]
    else:
        try:
            values = [] if isinstance(given, (str, bytes)) else list(given)
        except TypeError:
            values = []
    values = [value.item() if hasattr(value, "item") else value for value in values]
    is_place = len(values) in (2, 3) and all(map(_is_number, values))
    if not is_place or not all(math.isfinite(value) for value in values):
        raise ValueError(
            f"{name} is {given!r:.80}, expected (x, y) in pixels from the picture's top-left "
            f"corner, or (x, y, n) in the n-th picture"
        )
    x, y, image = [*values, 1][:3]
    if image not in (1, 2):
        raise ValueError(
            f"{name} names picture {image}: 1 is the reference, or the only picture, and 2 the one "
            f"that is asked about with a reference"
        )
    return Point(float(x), float(y), int(image))


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def _is_count(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and int(value) >= 1


def _share(min_confidence: Any) -> float:
    if not _is_number(min_confidence) or not 0 <= min_confidence <= 1:
        raise ValueError(
            f"min_confidence is {min_confidence!r:.40}, expected a number from 0 (all candidates) "
            f"to 1"
        )
    return float(min_confidence)


def _one(name: str, given: Any) -> list[Any]:
    """The one picture of an argument, in a list."""
    shown = as_list(given)
    if len(shown) != 1 or shown[0] is None:
        raise ValueError(
            f"{name} holds {'no picture' if not shown else f'{len(shown)} pictures'}, expected "
            f"one: the picture of the examples is the reference, and each other one is asked "
            f"about in a call of its own"
        )
    return shown


def _check_inside(asked: Asked) -> None:
    """Raises: ValueError for a place outside of its picture."""
    for point in [*asked.examples.like, *asked.examples.unlike]:
        if point.image > asked.image:
            raise ValueError(
                f"({point.x:g}, {point.y:g}, {point.image}) names the second picture, but there is "
                f"one: leave the number out, or give the picture of the examples as reference"
            )
        width, height = asked.sizes[point.image - 1]
        if 0 <= point.x <= width and 0 <= point.y <= height:
            continue
        name = "the reference" if asked.image == 2 and point.image == 1 else "the picture"
        said = (
            f"the example ({point.x:g}, {point.y:g}) lies outside of {name}, which is {width} x "
            f"{height} pixels"
        )
        other = asked.sizes[2 - point.image] if asked.image == 2 else (width, height)
        if point.image == 1 and point.x <= other[0] and point.y <= other[1] and asked.image == 2:
            raise ValueError(
                f"{said}; the picture that is asked about is {other[0]} x {other[1]}: examples lie "
                f"in the reference, in its own pixels, and (x, y, 2) is a place in the other one"
            )
        raise ValueError(f"{said}: give pixels from its top-left corner")


def crops_of(
    model: NanoMolmo2, processor: Processor, max_crops: int | None, sizes: Sequence[Size]
) -> MultiCrop:
    """How pictures are cut, into at most so many crops; so, too, where the model's decoder reads
    pictures as a whole.

    Args:
        max_crops: None: as many as pictures of these sizes need.
    Raises: ValueError for what is no number of crops.
    """
    multicrop = processor.config.multicrop
    if multicrop is None:
        vision = model.config.vision_config
        multicrop = MultiCrop(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            overlap_margins=FIND_MARGINS,
            pooling_size=model.config.connector.pooling_size,
            image_mean=processor.config.image_mean,
            image_std=processor.config.image_std,
        )
    if max_crops is None:
        max_crops = finding.crops_for(sizes, multicrop.window_size)
    elif not _is_count(max_crops):
        raise ValueError(f"max_crops is {max_crops!r:.40}, expected a whole number from 1 on")
    crops = replace(multicrop, max_crops=int(max_crops))
    ProcessorConfig.molmo2(multicrop=crops)  # refuses what would fill the memory
    return crops


# ---- what was found ----


def _answer(
    asked: Asked, looks: Sequence[Sequence[Seen]], found: Sequence[Sequence[Found]]
) -> Answer:
    """An answer as the model would have written it, but for the confidences."""
    seen = looks[len(looks) // 2]
    visual_tokens = sum(len(one.tokens) for look in looks for one in look)
    found = _as_told(asked, seen, found)
    candidates = _without_unlike(asked, seen, found[asked.image - 1], asked.image)
    chosen = [one for one in candidates if one.confidence >= asked.min_confidence]
    points = _in_order(asked, seen, chosen)
    judged = CANDIDATES if len(looks) == 1 else MANY_CANDIDATES
    problems = _problems(asked, seen, found, candidates, judged)
    text = NOTHING_THERE
    if points:
        listed = f'<points coords="{coords_of(points, asked.sizes)}">{LABEL}</points>'
        text = f"Counting the {listed} shows a total of {len(points)}."
    sure = [one.confidence for one in chosen]
    if not sure:  # that there are none
        sure = [1 - max((one.confidence for one in candidates), default=0.0)]
    return Answer(
        text=text,
        points=tuple(points),
        count=len(points),
        problems=tuple(problems),
        image_sizes=tuple(asked.sizes),
        video_size=None,
        frame_times=(),
        input_tokens=visual_tokens,
        output_tokens=0,
        timings={},
        confidence=math.exp(sum(math.log(max(one, 1e-9)) for one in sure) / len(sure)),
        prompt_tokens=visual_tokens,
        show=partial(_shown, asked.sources),
    )


def _shown(sources: Sequence[Any]) -> Shown:
    return Shown([load_image(source) for source in sources])


def _as_told(
    asked: Asked, seen: Sequence[Seen], found: Sequence[Sequence[Found]]
) -> list[list[Found]]:
    """The candidates, of which an example is one for sure: that it is meant was told.

    Where next to nothing seems to be at its place, that is believed, and said in the problems.
    """
    told = [list(candidates) for candidates in found]
    for point in asked.examples.like:
        candidates = told[point.image - 1]
        there = _at(point, seen, candidates)
        if there is not None and there.confidence >= BARE:
            candidates[candidates.index(there)] = there._replace(confidence=1.0)
    return told


def _without_unlike(
    asked: Asked, seen: Sequence[Seen], candidates: Sequence[Found], image: int
) -> list[Found]:
    """What a counter-example in a picture marks is not listed, whatever the model thinks of it."""
    left = list(candidates)
    for point in asked.examples.unlike:
        if point.image == image:
            marked = _at(point, seen, left)
            left = [one for one in left if one is not marked]
    return left


def _at(point: Point, seen: Sequence[Seen], candidates: Sequence[Found]) -> Found | None:
    """The likeliest candidate that lies under a place of the same picture."""
    shown = seen[point.image - 1]
    patch = shown.size[0] / shown.view.cols

    def holds(one: Found) -> bool:
        near = max(_NEAR_SIZES * one.size, _NEAR_PATCHES * patch)
        return math.hypot(one.x - point.x, one.y - point.y) <= near

    return max(filter(holds, candidates), key=lambda one: one.confidence, default=None)


def _in_order(asked: Asked, seen: Sequence[Seen], chosen: Sequence[Found]) -> list[Point]:
    """The points in the order of the model's lists, numbered."""
    width, height = asked.sizes[asked.image - 1]
    points = [
        Point(
            min(max(float(one.x), 0.0), float(width)),
            min(max(float(one.y), 0.0), float(height)),
            asked.image,
            label=LABEL,
            confidence=float(one.confidence),
            size=float(one.size),
        )
        for one in chosen
    ]
    view = seen[asked.image - 1].view
    points.sort(key=lambda point: view.target(point.x, point.y, (width, height)))
    return [replace(point, id=number) for number, point in enumerate(points, start=1)]


def _problems(
    asked: Asked,
    seen: Sequence[Seen],
    found: Sequence[Sequence[Found]],
    candidates: Sequence[Found],
    judged: int,
) -> list[str]:
    """What may be wrong, a line each; an example on bare ground is warned of, too.

    Args: judged: so many of many candidates were judged beside each other.
    """
    problems = []
    themselves: list[Found] = []  # the examples, among what was found
    for point in asked.examples.like:
        there = _at(point, seen, found[point.image - 1])
        if there is not None and point.image == asked.image:
            themselves.append(there)
        confidence = 0.0 if there is None else there.confidence
        if confidence < BARE:
            problems.append(
                f"nothing seems to be there: confidence {confidence:.2f} at ({point.x:g}, "
                f"{point.y:g}), where an example was said to be: choose the middle of a thing"
            )
            warnings.warn(problems[-1], stacklevel=5)
    # Where candidates are listed that are hardly meant, they are not those to speak of.
    least = max(asked.min_confidence, finding.LIKELY)
    likely = [one for one in candidates if one.confidence >= least]
    others = [one for one in candidates if not any(one is example for example in themselves)]
    if asked.examples.like and not any(one.confidence >= least for one in others):
        beside = " beside the example itself" if likely else ""
        best = max((one.confidence for one in others), default=0.0)
        problems.append(
            f"nothing like the example was found{beside}: the likeliest place has confidence "
            f"{best:.2f}"
        )
    if (listed := len(likely)) > LEARNED:
        alone = ""
        if listed > judged:
            alone = f", and only the {judged} likeliest were judged beside each other"
        problems.append(
            f"{listed} things were listed, more than the {LEARNED} of a kind that the model "
            f"learned to find in a picture{alone}: check them, or ask about parts of the picture"
        )
    return problems
