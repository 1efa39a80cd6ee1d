"""Pointing answers with and without lookup decoding: tokens a second behind the prompt.

Random weights write no lists of points, so at full size a constraint allows one token at each place
of a true answer's text (random points, ids as Qwen3 splits them). Steps cost what they cost, and
a draft is accepted exactly where it agrees with that text. `tiny` writes its own answers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models
from torch import Tensor

from benchmarks.harness import Row, Sizes, Times, gain, in_mode, language_model, main, take_turns
from nanomolmo2.emoji.questions import test_questions as ask_test_questions
from nanomolmo2.emoji.scenes import test_scene as render_test_scene
from nanomolmo2.emoji.sprites import Sprites
from nanomolmo2.generation.constraint import PointsProposer
from nanomolmo2.generation.engine import Engine, Request
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.sampling import SamplingParams
from nanomolmo2.models import LanguageModel
from nanomolmo2.processor import Point, Tokenizer
from nanomolmo2.processor.points import format_points

MODES = ("fp16-weights", "int8")
TARGET = 1.5
LABELS = ("dogs", "cars", "windows", "people", "birds", "cups", "chairs", "boats")
# Side -> whether it looks up, and whether the grammar of points drafts too, as in `Pipeline.ask`.
SIDES = {"plain": (False, False), "lookup": (True, False), "lookup and grammar": (True, True)}
SCENES = 12  # of `tiny` in a round, one pointing question each


def measure(sizes: Sizes) -> list[Row]:
    llm = language_model(sizes)
    rows = [row for mode in MODES for row in scripted(sizes, in_mode(llm, mode), mode)]
    return [*rows, tiny(sizes)]


# ---- full size ----


def scripted(sizes: Sizes, llm: LanguageModel, mode: str) -> list[Row]:
    """Answers of the same length on every side in a round, but never one that was there before.

    Engines remember a model's last answers, so a repeated one would be known by heart.
    """
    tokenizer = qwen3_like()
    seen = PrefixCache()  # the picture is read once
    tokens: dict[str, list[int]] = {name: [] for name in SIDES}

    def side(name: str, seed: int) -> Callable[[], float]:
        lookup, guided = SIDES[name]
        engine = Engine(llm, lookup=lookup, prefix_cache=seen)
        asked, drawn = np.random.default_rng(0), np.random.default_rng(seed)

        def work() -> float:
            label, number = str(asked.choice(LABELS)), int(asked.integers(8, 21))
            points = drawn.integers(0, 1000, (3 if sizes.short else number, 2))
            prompt, answer = conversation(sizes, tokenizer, label, points)
            tokens[name].append(len(answer) - 1)
            return seconds_behind_the_prompt(engine, prompt, answer, tokenizer, guided)

        return work

    times = take_turns({name: side(name, 1 + i) for i, name in enumerate(SIDES)}, sizes.rounds)
    counted = {name: numbers[1:] for name, numbers in tokens.items()}
    return [
        beside_plain(
            f"pointing answers at {sizes.prompt} tokens, {mode}, {name}", counted, times, name
        )
        for name in list(SIDES)[1:]
    ]


def conversation(
    sizes: Sizes, tokenizer: Tokenizer, label: str, points: np.ndarray
) -> tuple[list[int], list[int]]:
    """Ids of a picture and a question, and of the answer with these points and its end.

    Args:
        points: (N, 2) in thousandths of the picture.
    """
    image, end = sizes.llm.vocab_size - 1, sizes.llm.vocab_size - 2
    question = tokenizer.encode_text(f"Point to the {label}.")
    text = format_points([Point(x, y) for x, y in points.tolist()], label, [(1000, 1000)])
    answer = [*tokenizer.encode_text(text), end]
    return [*[image] * (sizes.prompt - len(question)), *question], answer


def seconds_behind_the_prompt(
    engine: Engine, prompt: list[int], answer: list[int], tokenizer: Tokenizer, guided: bool
) -> float:
    """Write the answer; seconds from its first token to its last."""
    request = Request(
        input_ids=prompt,
        max_new_tokens=len(answer) + 64,
        sampling=SamplingParams(constraint=Script(answer)),
        eos_token_ids=(answer[-1],),
        proposer=PointsProposer(tokenizer) if guided else None,
    )
    engine.submit(request)
    events = engine.step()
    start = time.perf_counter()
    while engine.busy:
        events = engine.step()
    seconds = time.perf_counter() - start
    result = events[-1].result
    assert result is not None and result.token_ids == answer
    return seconds


def qwen3_like() -> Tokenizer:
    """Splits questions and answers of this file as Qwen3 does: digits and spaces one by one."""
    words = [word for label in LABELS for word in (label, f" {label}")]
    words += ["Point", " to", " the", "points", " coords", '="', '">', "</"]
    pieces = ["<unk>", *map(chr, range(32, 127)), *words]
    backend = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


class Script:
    """A constraint that leaves one token at every place."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids

    def start(self) -> ScriptState:
        return ScriptState(iter(self.ids))


class ScriptState:
    def __init__(self, ids: Iterator[int]) -> None:
        self._ids = ids
        self._next = next(ids)

    def allowed(self) -> Tensor:
        mask = torch.zeros(self._next + 1, dtype=torch.bool)  # ids behind its end are not allowed
        mask[-1] = True
        return mask

    def advance(self, id: int) -> None:
        assert id == self._next
        self._next = next(self._ids, 0)


# ---- tiny ----


def tiny(sizes: Sizes) -> Row:
    """Questions about the test scenes, as `Pipeline.ask` answers them; other scenes every round."""
    pipeline, sprites = Pipeline.from_pretrained("tiny", device="cpu"), Sprites.load()
    scenes = 2 if sizes.short else SCENES
    rounds = sizes.rounds if sizes.short else 5 * sizes.rounds  # a round takes a second
    names = ("plain", "lookup and grammar")
    tokens: dict[str, list[int]] = {name: [] for name in names}
    texts: dict[str, list[str]] = {name: [] for name in names}

    def side(name: str) -> Callable[[], float]:
        numbers = itertools.count()

        def work() -> float:
            asked = [question(next(numbers), sprites) for _ in range(scenes)]
            lookup, _ = SIDES[name]
            answers = [pipeline.ask(image, text, lookup=lookup) for image, text in asked]
            texts[name] += [answer.text for answer in answers]
            tokens[name].append(sum(answer.output_tokens - 1 for answer in answers))
            return sum(a.timings["generate"] - a.timings["first_token"] for a in answers)

        return work

    times = take_turns({name: side(name) for name in names}, rounds)
    assert texts[names[0]] == texts[names[1]], "lookup changed an answer"
    counted = {name: numbers[1:] for name, numbers in tokens.items()}
    return beside_plain("pointing answers of tiny", counted, times, names[1])


def question(number: int, sprites: Sprites) -> tuple[np.ndarray, str]:
    """A test scene and the pointing question about it."""
    scene = render_test_scene(number, "seen", 0, sprites)
    branches = ask_test_questions(scene, np.random.default_rng(number))
    return scene.image, next(b.messages[0]["content"] for b in branches if b.task == "point")


def beside_plain(name: str, tokens: dict[str, list[int]], times: Times, side: str) -> Row:
    """Tokens a second of a side over those without lookup, round by round."""
    rates = {
        one: [n / s for n, s in zip(tokens[one], times[one], strict=True)]
        for one in ("plain", side)
    }
    target = None if side == "lookup" else TARGET
    return gain(name, rates, side, "plain", target=target, unit="tokens/s", peer_name="ours, plain")


if __name__ == "__main__":
    main("lookup", measure)
