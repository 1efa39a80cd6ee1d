"""The grammar against the writer and the reader of points, and masks against a plain check."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from nanomolmo2.generation.constraint import PointsConstraint, PointsGrammar, PointsProposer, State
from nanomolmo2.generation.sampling import Sampler, SamplingParams
from nanomolmo2.generation.speculative import AdaptiveWidth, Drafter, StepCosts
from nanomolmo2.processor import Point, Tokenizer, format_points, format_tracks, parse_points
from tests.processor.helpers import small_backend

TINY = Path(__file__).parents[2] / "nanomolmo2" / "assets" / "tiny"
SIZE = (1000, 1000)


def bpe() -> Tokenizer:
    """Bytes, and pieces of several characters, also some across the parts of a list."""
    generator = random.Random(0)
    lists = [
        format_points(
            [Point(generator.randrange(1001), generator.randrange(1001)) for _ in range(6)],
            generator.choice(["dogs", "red cars", "cafés", "a<b"]),
            [SIZE],
            mode="point_count",
        )
        for _ in range(60)
    ]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=14,
        show_progress=False,
    )
    backend.train_from_iterator(lists, trainer)
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    return Tokenizer(backend)


TOKENIZERS = {
    "tiny": Tokenizer.from_file(TINY),
    "bpe": bpe(),
    "small": Tokenizer(small_backend()),
}
NAMES = sorted(TOKENIZERS)
CONSTRAINTS = {
    (name, images, video): PointsConstraint(tokenizer, images, video=video)
    for name, tokenizer in TOKENIZERS.items()
    for images, video in ((1, False), (12, False), (None, False), (0, True))
}


def grammar_of(images: int | None, video: bool) -> PointsGrammar:
    return PointsGrammar(images, video=video)


# ---- the automaton ----


@pytest.mark.parametrize(
    ("text", "images", "video", "refused"),
    [
        ('<points coords="1 1 210 455 2 640 480">dogs</points>', 1, False, ""),
        ('a <points coords="1 1 000 1000;3 2 100 042">a<b</points> b', 3, False, ""),
        ('<tracks coords="0.0 1 259 340 3 800 120;12.5 1 262 338">x</tracks>', 0, True, ""),
        ("a <b> 1 < 2 <point <poi <trackx", 1, False, ""),
        ('<points coords="1 2', 1, False, "2"),  # ids begin with 1
        ('<points coords="1 1 210 455 3', 1, False, "3"),
        ('<points coords="2', 1, False, "2"),  # a picture that is not there
        ('<points coords="0', 1, False, "0"),
        ('<points coords="1 1 210 455;', 1, False, ";"),
        ('<points coords="2 1 210 455;2', 9, False, "2"),  # in order
        ('<points coords="2 1 210 455;1', 9, False, "1"),  # no picture has a number like that
        ('<points coords="1 1 21 ', 1, False, " "),
        ('<points coords="1 1 1001', 1, False, "1"),
        ('<points coords="1 1 2100', 1, False, "0"),
        ('<points coords="1 1 210 455 "', 1, False, '"'),
        ('<points coords="1 1 210 455" ', 1, False, " "),
        ("<points>", 1, False, ">"),
        ("<points", 0, False, "s"),
        ('<points coords="1 1 210 455">a <points', 1, False, "s"),
        ('<points coords="1 1 210 455">a <point ', 1, False, " "),  # a tag of Molmo 1
        ('<points coords="1 1 210 455">a </tracks', 1, False, "s"),
        ('<points coords="1 1 210 455">a </points<', 1, False, "<"),
        ('<points coords="1 ', 0, True, " "),  # a time has a decimal
        ('<points coords="12.3 1 210 455;12.3', 0, True, "3"),
        ('<points coords="12.9 1 210 455;12', 0, True, ""),  # 120.0
        ('<points coords="12.9 1 210 455;12.', 0, True, "."),
        ('<points coords="00', 0, True, "0"),
        ('<tracks coords="0.0 2 210 455 2 ', 0, True, " "),  # 2 may go on as 20, but not end
        ('<tracks coords="0.0 2 210 455 0', 0, True, "0"),
        ('<points coords="1 1 ²', 1, False, "²"),
    ],
)
def test_by_hand(text: str, images: int, video: bool, refused: str) -> None:
    grammar = grammar_of(images, video)
    before = text.removesuffix(refused)
    state = grammar.run(State(), before)
    assert state is not None, before
    if refused:
        assert grammar.step(state, refused) is None
    else:
        assert state.phase in ("out", "key")


COORDINATE = st.integers(0, 1000).map(float)
LABEL = st.text("ab <>/é\n", max_size=6)


@given(
    st.lists(st.tuples(COORDINATE, COORDINATE, st.integers(1, 12)), min_size=1, max_size=14), LABEL
)
@settings(max_examples=60, deadline=None)
def test_the_tokens_of_a_right_answer_are_allowed(
    places: list[tuple[float, float, int]], label: str
) -> None:
    points = [Point(x, y, image=image) for x, y, image in places]
    timed = [Point(x, y, id=i, time=image / 10) for i, (x, y, image) in enumerate(places)]
    answers = [
        (format_points(points, label, [SIZE] * 12, mode="point_count"), 12, False),
        (format_points([Point(x, y) for x, y, _ in places], label, [SIZE]), 1, False),
        (format_points(points, label, [SIZE] * 12, mode="count_point"), None, False),
        (format_points(timed, label, video_size=SIZE), 0, True),
        (format_tracks(timed, label, SIZE), 0, True),
    ]
    for name, tokenizer in TOKENIZERS.items():
        for text, images, video in answers:
            state = CONSTRAINTS[name, images, video].start()
            for id in tokenizer.encode_text(text):
                allowed = state.allowed()
                assert allowed is None or allowed[id], (name, text, id)
                state.advance(id)
            assert state.state == State()


def walk(name: str, images: int | None, video: bool, seed: int) -> str:
    """A text of tokens drawn from the allowed ones, with a tag in it."""
    tokenizer, constraint = TOKENIZERS[name], CONSTRAINTS[name, images, video]
    generator = random.Random(seed)
    state = constraint.start()
    ids: list[int] = []

    def allowed() -> list[int]:
        mask = state.allowed()
        found = range(tokenizer.vocab_size) if mask is None else mask.nonzero()[:, 0].tolist()
        assert len(found)
        return list(found)

    def put(id: int) -> None:
        ids.append(id)
        state.advance(id)

    for opening in generator.sample(["<points", "<tracks"], 2):
        for _ in range(generator.randrange(3)):
            put(generator.choice(allowed()))
        for id in tokenizer.encode_text(opening):
            if state.state.phase == "out" and id in allowed():
                put(id)
        label = 0
        while state.state.phase != "out":
            choices = allowed()
            if state.state.phase == "label":
                label += 1
                closing = f"</{state.state.tag}>"
                if label > generator.randrange(8) + 1:  # write the rest of the closing tag
                    rest = closing.removeprefix(state.state.part)
                    choices = [i for i in tokenizer.encode_text(rest)[:1] if i in choices] or (
                        choices
                    )
            put(generator.choice(choices))
    return tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("images", "video"), [(1, False), (12, False), (0, True)], ids=["one", "twelve", "video"]
)
def test_whatever_is_allowed_parses_without_a_problem(name: str, images: int, video: bool) -> None:
    found = 0
    for seed in range(60):
        text = walk(name, images, video, seed)
        problems: list[str] = []
        points = parse_points(
            text, [SIZE] * images, video_size=SIZE if video else None, problems=problems
        )
        assert not problems, (text, problems)
        assert all(point.label is not None for point in points)
        found += len(points)
    assert found > 60


# ---- masks ----


def plain_mask(constraint: PointsConstraint, tokenizer: Tokenizer, state: State) -> Tensor:
    """Each token through the automaton; some only outside of tags."""
    pieces = [tokenizer.backend.id_to_token(id) or "" for id in range(tokenizer.vocab_size)]
    texts = [constraint.text(id) for id in range(tokenizer.vocab_size)]
    own = {text for text, piece in zip(texts, pieces, strict=True) if not piece.startswith("<0x")}

    def fits(text: str, piece: str) -> bool:
        if not text:
            return state.phase == "out"
        if piece.startswith("<0x") and text in own:  # a byte in place of a character's own token
            return state.phase == "out"
        return constraint.grammar.run(state, text) is not None

    return torch.tensor([fits(*pair) for pair in zip(texts, pieces, strict=True)])


BEGINNINGS = [
    "",
    "a <",
    "<poi",
    "</points",
    "<points",
    "<points coo",
    '<points coords="',
    '<points coords="1',
    '<points coords="1 ',
    '<points coords="1 1 ',
    '<points coords="1 1 10',
    '<points coords="1 1 100',
    '<points coords="1 1 100 55',
    '<points coords="1 1 100 555',
    '<points coords="1 1 100 555 2 333 444',
    '<points coords="1 1 100 555;',
    '<points coords="1 1 100 555"',
    '<points coords="1 1 100 555">',
    '<points coords="1 1 100 555">a <',
    '<points coords="1 1 100 555">a </po',
    '<points coords="1 1 100 555">a <point',
    '<points coords="1 1 100 555">a </points',
    '<tracks coords="1 7 100 555 ',
    '<tracks coords="1 7 100 555">a </',
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_masks_equal_a_check_of_every_token(name: str, beginning: str) -> None:
    constraint = CONSTRAINTS[name, 12, False]
    state = constraint.grammar.run(State(), beginning)
    assert state is not None
    expected = plain_mask(constraint, TOKENIZERS[name], state)
    for _ in range(2):  # computed, and from the cache
        mask = constraint.allowed(state)
        if mask is None:
            assert state.phase == "out"
            assert expected.all()
        else:
            assert torch.equal(mask, expected)
            assert mask.any()


def test_a_tag_can_not_be_left_by_an_end_token() -> None:
    tokenizer = TOKENIZERS["tiny"]
    end = tokenizer.special_id("<|im_end|>")
    state = CONSTRAINTS["tiny", 1, False].start()
    for id in tokenizer.encode_text('<points coords="1 1 210 455">dogs'):
        assert state.state.phase == "out" or not state.allowed()[end]  # type: ignore[index]
        state.advance(id)
    with pytest.raises(ValueError, match=r"token \d+ \(''\) cannot come here, inside of a points"):
        state.advance(end)
    for id in tokenizer.encode_text("</points>"):
        state.advance(id)
    assert state.allowed() is None or state.allowed()[end]  # type: ignore[index]
    state.advance(end)


def test_a_model_that_says_nonsense_is_led_through_a_tag() -> None:
    """Through the sampler, with a head larger than the tokenizer, as Qwen's is."""
    tokenizer = TOKENIZERS["tiny"]
    opening = tokenizer.encode_text('<points coords="1')
    for seed in range(5):
        params = SamplingParams(1.0, seed=seed, constraint=CONSTRAINTS["tiny", 1, False])
        sampler = Sampler(params)
        ids = list(opening)
        for id in opening:
            sampler.take(id)
        noise = torch.Generator().manual_seed(seed)
        closing = tokenizer.encode_text("</points>")[0]
        for _ in range(400):
            logits = 3 * torch.randn(tokenizer.vocab_size + 40, generator=noise)
            logits[tokenizer.encode_text('">')[0]] += 6
            logits[closing] += 8
            ids.append(sampler.sample(logits).token)
            if ids[-1] == closing:
                break
        problems: list[str] = []
        assert parse_points(tokenizer.decode(ids), [SIZE], problems=problems)
        assert not problems


def test_num_images_makes_sense() -> None:
    with pytest.raises(ValueError, match="num_images must be 0 or more"):
        PointsConstraint(TOKENIZERS["tiny"], -1)


# ---- the proposer ----


def digits_alone() -> Tokenizer:
    """As Qwen's: each digit and each space a token, words whole."""
    words = ['="', '">', " coords", "points", "dogs", "</", "<"]
    pieces = ["<unk>", *map(chr, range(32, 127)), *(w for w in words if len(w) > 1)]
    backend = tokenizers.Tokenizer(models.Unigram([(p, -1.0) for p in pieces], unk_id=0))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def test_a_list_is_written_in_fewer_steps() -> None:
    """Coordinates are the model's, ids and separators the proposer's."""
    tokenizer = digits_alone()
    generator = random.Random(1)
    spots = [Point(generator.randrange(100, 999), generator.randrange(999)) for _ in range(12)]
    answer = list(tokenizer.encode_text(format_points(spots, "dogs", [SIZE])))

    def steps(proposer: PointsProposer | None) -> int:
        costs = StepCosts({1: 1.0, 4: 1.05, 8: 1.5})
        drafter = Drafter([], AdaptiveWidth(costs), proposer=proposer)
        at = count = 0
        while at < len(answer):
            draft = drafter.draft(len(answer) - at - 1)
            right = 0
            while right < len(draft) and draft[right] == answer[at + right]:
                right += 1
            drafter.accept(answer[at : at + right + 1])
            at += right + 1
            count += 1
        return count

    assert steps(PointsProposer(tokenizer)) < len(answer) / 1.6
    assert steps(None) > steps(PointsProposer(tokenizer))


@pytest.mark.parametrize("name", NAMES)
def test_the_proposer_expects_only_what_is_allowed(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = 'Look: <points coords="1 1 100 455 2 1000 480;2 3 111 222">dogs</points> and so on'
    proposer, state = PointsProposer(tokenizer, 2), CONSTRAINTS[name, 12, False].start()
    proposed = 0
    for id in tokenizer.encode_text(text):
        guess = proposer.propose(5)
        assert len(guess) <= 5
        if guess:
            allowed = state.allowed()
            assert allowed is None or allowed[guess[0]]
        proposed += len(guess)
        proposer.extend([id])
        state.advance(id)
    assert proposed > 2
    proposer.extend(tokenizer.encode_text('<points coords="9'))  # not well-formed: passed over
    assert proposer.propose(4) == []


def test_a_mask_costs_little() -> None:
    constraint = PointsConstraint(TOKENIZERS["bpe"], 1)
    state = constraint.grammar.run(State(), '<points coords="1 1 100 55')
    assert state is not None
    constraint.allowed(state)
    start = time.perf_counter()
    for _ in range(1000):
        constraint.allowed(state)
    assert (time.perf_counter() - start) / 1000 < 500e-6
