"""Prefix reuse: the same answers, and only what is new gets computed."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanomolmo2.generation.engine import Engine, Request
from nanomolmo2.generation.kv_cache import RowCache
from nanomolmo2.generation.prefix_cache import (
    Prefix,
    PrefixCache,
    digest,
    lookahead_of,
    visual_keys,
)
from nanomolmo2.models import LanguageModel, NanoMolmo2
from tests.generation.threads import run_together
from tests.nets import LLM, pictures, randomize, small_model, text_ids

IMAGE = LLM.vocab_size


def model_of(kind: str, both_ways: bool) -> NanoMolmo2:
    llm_config = replace(LLM, additional_vocab_size=1, tie_word_embeddings=False)
    return small_model(
        kind,
        seed=4,
        llm_config=llm_config,
        image_token_id=IMAGE,
        bidirectional_image_attention=both_ways,
    )


@pytest.fixture(scope="module", params=["linear", "both ways", "pooling"])
def model(request: pytest.FixtureRequest) -> NanoMolmo2:
    kind = "pooling" if request.param == "pooling" else "linear"
    return model_of(kind, request.param != "linear")


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    return randomize(LanguageModel(replace(LLM, tie_word_embeddings=False)), 4).eval()


class Recorded:
    """Positions that the decoder and pictures that the encoder computed, and every logit."""

    def __init__(self, model: NanoMolmo2) -> None:
        self.positions: list[int] = []
        self.pictures = 0
        self.logits: list[Tensor] = []
        self._model, self._head = model, model.llm.head
        self._hooks = [
            model.llm.layers[0].register_forward_pre_hook(
                lambda module, inputs: self.positions.append(inputs[0].shape[1])
            ),
            model.vision_encoder.register_forward_pre_hook(self._count),
        ]

    def _count(self, module: Any, inputs: Any) -> None:
        self.pictures += len(inputs[0])

    def __enter__(self) -> Recorded:
        def head(hidden: Tensor) -> Tensor:
            self.logits.append(self._head(hidden))
            return self.logits[-1]

        self._model.llm.head = head  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self._model.llm.head
        for hook in self._hooks:
            hook.remove()


def ask(model: NanoMolmo2, ids: Tensor, images: Tensor, **options: Any) -> tuple[Tensor, Recorded]:
    settings: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "lookup": False}
    with Recorded(model) as recorded:
        found = model.generate(ids, images, **{**settings, **options})
    return found, recorded


def question(*tail: int) -> Tensor:
    return torch.tensor([[3, IMAGE, 5, *tail]])


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_second_question_about_a_picture(model: NanoMolmo2, batch_invariant: bool) -> None:
    cache, image = PrefixCache(), pictures(1)
    n = model.config.num_visual_tokens
    options = {"batch_invariant": batch_invariant}
    ask(model, question(7, 8), image, prefix_cache=cache, **options)
    found, with_reuse = ask(model, question(9, 1, 2), image, prefix_cache=cache, **options)
    expected, without = ask(model, question(9, 1, 2), image, **options)
    assert torch.equal(found, expected)
    assert without.positions[0] == 2 + n + 3 and without.pictures == 1
    assert with_reuse.positions[0] == 3 and with_reuse.pictures == 0
    assert (cache.reused_tokens, cache.reused_images) == (2 + n, 1)
    for a, b in zip(with_reuse.logits, without.logits, strict=True):
        if batch_invariant:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_next_turn_of_a_chat_computes_what_is_new(
    model: NanoMolmo2, batch_invariant: bool
) -> None:
    """The answer's own tokens are known too, computed one by one and not with the prompt."""
    cache, image, ids = PrefixCache(), pictures(1), question(7)
    options = {"batch_invariant": batch_invariant}
    for turn in range(3):
        found, with_reuse = ask(model, ids, image, prefix_cache=cache, **options)
        expected, without = ask(model, ids, image, **options)
        assert torch.equal(found, expected)
        if turn:
            assert with_reuse.positions[0] == 1 + 2  # the last token of the answer, and the turn
        if batch_invariant:
            pairs = zip(with_reuse.logits, without.logits, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        ids = torch.cat([found, torch.tensor([[11 + turn, 12]])], dim=1)


def test_another_picture_shares_nothing(model: NanoMolmo2) -> None:
    """The text in front of it is shared only where the picture's tokens look back alone."""
    cache, (one, other) = PrefixCache(), pictures(2).split(1)
    ask(model, question(7, 8), one, prefix_cache=cache)
    found, recorded = ask(model, question(7, 8), other, prefix_cache=cache)
    assert torch.equal(found, ask(model, question(7, 8), other)[0])
    assert recorded.pictures == 1
    both_ways = model.config.bidirectional_image_attention
    assert cache.reused_tokens == (0 if both_ways else 1)


def test_a_picture_in_a_later_turn_is_seen_by_the_earlier_one(model: NanoMolmo2) -> None:
    cache, images = PrefixCache(), pictures(2)
    ask(model, question(7, 8), images[:1], prefix_cache=cache)
    ids = torch.cat([question(7, 8), question(4)], dim=1)
    found, recorded = ask(model, ids, images, prefix_cache=cache)
    assert torch.equal(found, ask(model, ids, images)[0])
    assert recorded.pictures == 1, "the first picture was encoded before"
    again, recorded = ask(model, ids, images, prefix_cache=cache)
    assert torch.equal(again, found)
    assert recorded.positions[0] == 1 and recorded.pictures == 0


def test_a_picture_less_in_the_same_place(model: NanoMolmo2) -> None:
    """Two pictures saw each other; the question about the first alone must not see the second."""
    cache, images = PrefixCache(), pictures(2)
    two = torch.cat([question(7, 8), question(4)], dim=1)
    ask(model, two, images, prefix_cache=cache)
    found, _ = ask(model, question(7, 8), images[:1], prefix_cache=cache)
    assert torch.equal(found, ask(model, question(7, 8), images[:1])[0])


def test_rows_of_one_batch_share(model: NanoMolmo2) -> None:
    ids = torch.cat([question(7, 8), question(9, 8), question(7, 6)])
    images = pictures(1).expand(3, -1, -1, -1)
    cache = PrefixCache()
    found, recorded = ask(model, ids, images, prefix_cache=cache)
    assert torch.equal(found, ask(model, ids, images)[0])
    n = model.config.num_visual_tokens
    assert recorded.positions[:3] == [n + 4, 2, 1]
    assert recorded.pictures == 1


def test_padded_rows_are_known_by_their_real_positions(model: NanoMolmo2) -> None:
    cache, image = PrefixCache(), pictures(1)
    ask(model, question(7), image, prefix_cache=cache)
    ids = torch.cat([torch.tensor([[0, 0]]), question(8)], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    found, recorded = ask(model, ids, image, attention_mask=mask, prefix_cache=cache)
    assert torch.equal(found[:, 6:], ask(model, question(8), image)[0][:, 4:])
    assert recorded.positions[0] == 1


@pytest.mark.parametrize("kind", ["llm", "vision"])
def test_other_weights_forget(kind: str) -> None:
    model = model_of("linear", True)
    cache, image = PrefixCache(), pictures(1)
    ask(model, question(7), image, prefix_cache=cache)
    part = model.llm.layers[0] if kind == "llm" else model.vision_encoder
    with torch.no_grad():
        for weight in part.parameters():
            weight.mul_(1.5)
    found, _ = ask(model, question(7), image, prefix_cache=cache)
    assert torch.equal(found, ask(model, question(7), image)[0])
    assert (cache.reused_tokens, cache.reused_images) == (0, int(kind == "llm"))


def keys(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def prefix(*ids: int, lookahead: int = 0, capacity: int = 0) -> Prefix:
    row = RowCache(2, capacity)
    for layer in range(2):
        row.write(layer, torch.ones(1, 1, len(ids), 4), torch.ones(1, 1, len(ids), 4))
    row.length = len(ids)
    return Prefix(keys(*ids), lookahead, row)


def test_the_least_recently_used_go_first() -> None:
    one = prefix(1, 2, 3)
    cache = PrefixCache(max_bytes=2 * one.row.nbytes)
    cache.keep(one)
    cache.keep(prefix(4, 5, 6))
    assert cache.find(keys(1, 2, 9), 0)[1] == 2  # used: 4 5 6 is older now
    cache.keep(prefix(7, 8, 9))
    assert cache.nbytes == cache.max_bytes
    assert [cache.find(keys(*ids), 0)[1] for ids in ((1, 2, 3), (4, 5, 6), (7, 8, 9))] == [2, 0, 2]
    cache.clear()
    assert cache.nbytes == 0 and cache.find(keys(1, 2, 3), 0)[1] == 0


def test_nothing_larger_than_all_is_held() -> None:
    cache = PrefixCache(max_bytes=10)
    cache.keep(prefix(1, 2, 3))
    assert cache.nbytes == 0
    with pytest.raises(ValueError, match="max_bytes must be 0"):
        PrefixCache(-1)


def test_a_longer_sequence_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache()
    cache.keep(prefix(1, 2, 3))
    cache.keep(prefix(1, 2, 3, 4, 5))
    held = cache.nbytes
    cache.keep(prefix(1, 2))
    assert cache.nbytes == held == prefix(1, 2, 3, 4, 5).row.nbytes
    assert cache.find(keys(1, 2, 3, 4, 5, 6), 0)[1] == 5


def test_threads_share_a_cache_that_counts_exactly() -> None:
    """A count that drifts up ends with a cache that holds nothing, one that drifts down with one
    that has no limit. Two threads that encode one image both put it in."""
    sizes = [prefix(*range(n)).row.nbytes for n in (3, 9)]
    cache = PrefixCache(max_bytes=20 * sizes[1])
    together = threading.Barrier(8)

    def hammer(seed: int) -> None:
        draw = np.random.default_rng(seed)
        together.wait()
        cache.visual_tokens(["same"], lambda new: [torch.ones(100) for _ in new])
        for _ in range(300):
            ids = draw.integers(0, 3, int(draw.integers(3, 9))).tolist()
            cache.keep(prefix(*ids, capacity=int(draw.integers(0, 40))))
            cache.find(keys(*ids, 1), 0)
            names = [str(n) for n in draw.integers(0, 12, 3)]
            cache.visual_tokens(names, lambda new: [torch.ones(4, 7) for _ in new])
            if draw.random() < 0.02:
                cache.clear()

    assert run_together(hammer, 8) == []
    cache.keep(prefix(1, 2, 0))  # the last thread may have cleared it
    held = [v.row if isinstance(v, Prefix) else v for v, _ in cache._entries.values()]
    assert cache.nbytes == sum(value.nbytes for value in held) <= cache.max_bytes
    assert held


def test_an_image_that_two_threads_encoded_counts_once() -> None:
    cache, both = PrefixCache(), threading.Barrier(2)

    def encode(new: list[int]) -> list[Tensor]:
        both.wait(timeout=60)  # neither has put it in yet
        return [torch.ones(5, 5) for _ in new]

    threads = [
        threading.Thread(target=cache.visual_tokens, args=(["one"], encode)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.nbytes == torch.ones(5, 5).nbytes
    assert cache.visual_tokens(["one"], lambda new: [])[0].shape == (5, 5)


def test_a_cache_can_be_copied() -> None:
    cache = PrefixCache()
    cache.keep(prefix(1, 2, 3))
    copied = copy.deepcopy(cache)
    copied.keep(prefix(4, 5))
    assert copied.find(keys(1, 2, 9), 0)[1] == 2
    assert cache.nbytes == prefix(1, 2, 3).row.nbytes < copied.nbytes


def test_free_slots_are_not_held() -> None:
    cache = PrefixCache()
    cache.keep(prefix(1, 2, 3, capacity=640))
    assert cache.nbytes == prefix(1, 2, 3).row.nbytes


def test_one_position_is_always_left_to_compute() -> None:
    cache = PrefixCache()
    cache.keep(prefix(1, 2, 3, 4))
    assert cache.find(keys(1, 2, 3), 0)[1] == 2
    cache = PrefixCache()
    cache.keep(prefix(1, 2, 3, 4, lookahead=3))
    assert cache.find(keys(1, 2, 3), 3)[1] == 0


def test_the_lookahead_is_the_last_position_that_is_seen_from_before() -> None:
    see = torch.ones(5, 5, dtype=torch.bool).tril()
    assert lookahead_of(see) == lookahead_of(None) == 0
    see[1, 3] = True
    assert lookahead_of(see) == 4


def test_visual_keys_tell_images_from_ids_and_from_each_other() -> None:
    """One hash an image, and the place in it."""
    images, numbers = pictures(2), np.array([[0], [0], [1], [1]])
    places = np.array([[0], [1], [0], [1]])

    def found(images: Tensor) -> list[int]:
        return visual_keys([digest(image) for image in images], numbers, places).tolist()

    keys = found(images)
    assert max(keys) < 0 and len(set(keys)) == 4
    assert keys == found(images.clone())
    assert found(images.flip(0)) == [*keys[2:], *keys[:2]]
    images[1, 0, 0, 0] += 1e-6
    assert [a == b for a, b in zip(found(images), keys, strict=True)] == [True, True, False, False]


def test_visual_keys_of_pooled_patches() -> None:
    """Every patch of a window counts, empty slots and their order too."""
    digests = [digest(image) for image in pictures(2)]
    windows = [[0, 1], [0, 2], [1, 0], [0, -1], [-1, 0]]
    keys = visual_keys(digests, np.where(np.array(windows) < 0, -1, 0), np.array(windows))
    other = visual_keys(digests, np.where(np.array(windows) < 0, -1, 1), np.array(windows))
    assert len({*keys.tolist(), *other.tolist()}) == 10


def test_an_engine_reuses_text(llm: LanguageModel) -> None:
    ids = text_ids(1, 20)[0].tolist()
    cache = PrefixCache()
    engine = Engine(llm, prefix_cache=cache, lookup=False)
    (first,) = engine.run([Request(ids, max_new_tokens=5)])
    follow = [*ids, *first.token_ids, 1, 2]
    (second,) = engine.run([Request(follow, max_new_tokens=5)])
    (alone,) = Engine(llm).run([Request(follow, max_new_tokens=5)])
    assert second.reused_tokens == 24
    assert second.token_ids == alone.token_ids
    # A caller that gives embeddings without saying what they are gets no reuse.
    embeds = llm.embed(torch.tensor([follow]))[0]
    (third,) = engine.run([Request(inputs_embeds=embeds, max_new_tokens=5)])
    assert third.reused_tokens == 0 and third.token_ids == alone.token_ids
