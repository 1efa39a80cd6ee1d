"""Points of the engine against everything computed again: in batches, with reuse, with drafts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanomolmo2.generation import engine as engine_module
from nanomolmo2.generation.engine import Engine, Result
from nanomolmo2.generation.pointing import Pointing
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.sampling import SamplingParams
from nanomolmo2.models import NanoMolmo2, preset
from tests.generation.point_model import (
    QUOTE,
    TRAINING_REPOSITORY,
    Prompt,
    batch_of,
    causal,
    consistent,
    naive_answer,
    prompt_of,
    released,
    request,
)
from tests.generation.test_engine import FREE_DRAFTS
from tests.molmo_point import LOCATION, PATCH, SUBPATCH, V, golden_model, table

RULES = {
    "released": released,
    "consistent": consistent,
    "training repository": lambda: golden_model(**TRAINING_REPOSITORY),
    "causal": lambda: causal(consistent()),
}


def answer(
    model: NanoMolmo2, prompt: Prompt, *, engine: Engine | None = None, **changes: Any
) -> Result:
    """The engine's, 22 tokens, greedy; without drafts if no engine is given."""
    (prepared,) = request(model, prompt, **changes)
    return (engine or Engine(model.llm, lookup=False)).run([prepared])[0]


def points_of(prompt: Prompt, tokens: list[int]) -> list[int]:
    """The rows, NMP included."""
    return [id - V for id in tokens if V <= id <= V + prompt.num_rows]


@pytest.mark.parametrize("rule", RULES)
def test_cached_equals_everything_again(rule: str) -> None:
    """Pictures, a video, text; and prompts that hold a point or end inside of a list."""
    model, written = RULES[rule](), 0
    one, two, video = (prompt_of(name) for name in ("one", "two", "video"))
    for prompt in (
        one,
        two.then(QUOTE),
        video.point(6, 4, 1).then(119, 63, 61, 61, QUOTE),
        one.point(20, 1, 4).then(49),
        prompt_of("text"),
        prompt_of("text").point().then(61),
    ):
        expected = naive_answer(model, prompt, 16)
        assert answer(model, prompt, max_new_tokens=16).token_ids == expected
        written += len(points_of(prompt, expected))
    assert written > 6, "nets that do not point prove little"


def test_trap_33_a_prompt_may_end_inside_a_point() -> None:
    """Its slot, or its cell, is the answer's first token, without a head; by any rule."""
    for model in (released(), consistent()):
        whole = answer(model, prompt_of("one"), max_new_tokens=12).token_ids
        at = next(i for i, id in enumerate(whole) if id >= V)
        for length in (at + 1, at + 2, at + 3):
            prompt = prompt_of("one")
            cut = torch.cat([prompt.ids, torch.tensor(whole[:length])])
            (prepared,) = request(model, replace(prompt, ids=cut), max_new_tokens=12 - length)
            assert Engine(model.llm).run([prepared])[0].token_ids == whole[length:]


def test_an_answer_can_be_continued_from_any_place() -> None:
    """As one prompt with what was written: order, turn and lists are those of the whole answer.

    The consistent rule points from the first token on; the last list goes on.
    """
    model, prompt = consistent(), prompt_of("two").then(QUOTE)
    whole = answer(model, prompt, max_new_tokens=30).token_ids
    assert len(points_of(prompt, whole)) > 5
    for length in range(1, 30, 3):
        cut = torch.cat([prompt.ids, torch.tensor(whole[:length])])
        (prepared,) = request(model, replace(prompt, ids=cut), max_new_tokens=30 - length)
        assert Engine(model.llm).run([prepared])[0].token_ids == whole[length:]


def test_ids_behind_the_vocabulary_or_markers_with_targets() -> None:
    """Points of a prompt in both forms, in a batch of which each row counts its own."""
    model = consistent()
    prompts = [
        prompt_of("video").point(6, 4, 1).then(49, 61, 61, QUOTE),
        prompt_of("text").point().then(61),
        prompt_of("one").point(11, 1, 8).then(49).point(20, 0, 0).then(50).point().then(61, QUOTE),
    ]
    markers = batch_of(*prompts)
    classes = dict(markers, point_targets=None)
    longest = markers["input_ids"].shape[1]
    classes["input_ids"] = torch.stack(
        [torch.nn.functional.pad(p.ids_with_classes(), (longest - len(p.ids), 0)) for p in prompts]
    )
    assert int(classes["input_ids"].max()) >= V
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}
    found = []
    for form in (markers, classes):
        ids = form.pop("input_ids")
        new = model.generate(ids, **form, **options)
        assert torch.equal(new[:, :longest], ids), "the prompt comes back as it was given"
        found.append(new[:, longest:])
    assert torch.equal(found[0], found[1])
    for row, prompt in zip(found[0].tolist(), prompts, strict=True):
        assert row == naive_answer(model, prompt, 8)


BAD = [
    ([V + 39], "token 423 is no class of this prompt.*25 visual tokens of 4 patches.*384 to 422"),
    ([V + 11, V + 12], "token 396 at position 53 is out of order: expected a patch of it"),
    ([V + 26], "out of order: expected text or a visual token"),
    ([V + 11, V + 26, 49], "token 49 at position 54 is out of order: expected a place"),
    ([V + 3, V + 26, V + 30], "selects visual token 3, but of its 25 only 16 can be selected"),
    (
        [V + 11, V + 26, V + 30, PATCH],
        "points as ids behind the vocabulary and as markers|1 points",
    ),
]


@pytest.mark.parametrize(("tail", "message"), BAD)
def test_trap_24_classes_of_another_prompt(tail: list[int], message: str) -> None:
    prompt = prompt_of("one")
    with pytest.raises(ValueError, match=message):
        request(consistent(), prompt.then(*tail))


def test_points_that_are_not_there() -> None:
    model, video = consistent(), prompt_of("video")
    with pytest.raises(ValueError, match=r"selects patch 2 of visual token 1, which has only \[0"):
        request(model, video.point(1, 2, 0))
    with pytest.raises(ValueError, match="selects visual token 12, but of its 0 only 0 can be"):
        request(model, prompt_of("text").point(12, 0, 0), prompt_of("one"))
    with pytest.raises(ValueError, match="behind the vocabulary, and point_targets: pass one"):
        request(model, prompt_of("one").point(11, 0, 0).then(V + 3))
    with pytest.raises(ValueError, match="needs the features of their patches too"):
        model.generate(video.ids[None], visual_tokens=torch.zeros(3, 4, 64))


# ---- batches ----


@pytest.mark.parametrize("rule", ["released", "consistent"])
def test_trap_34_rows_of_a_batch_do_not_disturb_each_other(rule: str) -> None:
    """Pictures, a video and text together; ids, drafts or not, as one by one, and as without cache.

    In the reference a step in which another row writes a point forgets a row's last one.
    """
    model = RULES[rule]()
    prompts = [prompt_of(name) for name in ("video", "text", "one", "two")]
    prompts.append(prompts[2].then(QUOTE))
    alone = [answer(model, prompt).token_ids for prompt in prompts]
    for engine in (Engine(model.llm, lookup=False), Engine(model.llm, max_rows=3)):
        engine._costs = FREE_DRAFTS
        assert [r.token_ids for r in engine.run(request(model, *prompts))] == alone
    keywords = batch_of(*prompts)
    ids = keywords.pop("input_ids")
    found = model.generate(ids, **keywords, max_new_tokens=22, eos_token_id=None)
    assert found[:, ids.shape[1] :].tolist() == alone
    if rule == "released":
        assert [alone[i] for i in (2, 3, 0)] == [
            table("cases")[n]["greedy_ids"] for n in ("one", "two", "video")
        ]
    assert alone[1] == naive_answer(model, prompts[1])
    assert max(alone[1]) < V


class Bits:
    """Every score that a part of a point was chosen from, and the logits of the text, by row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[int, list[Tensor]] = {}
        scores = Pointing.scores

        def recorded(pointing: Pointing, state: Tensor) -> Tensor:
            found = scores(pointing, state)
            self.of.setdefault(len(pointing.prompt.places), []).append(found)
            return found

        monkeypatch.setattr(Pointing, "scores", recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_points_have_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in a batch, with drafts and with a beginning that is reused."""
    model = golden_model(**vars(consistent().config.point_config)).to(dtype)
    prompts = [prompt_of(name).then(QUOTE) for name in ("video", "one", "two")]
    found: list[dict[int, list[Tensor]]] = []
    answers = []
    for together, lookup, reuse in ((False, False, False), (True, True, True)):
        bits = Bits(monkeypatch)
        cache = PrefixCache() if reuse else None
        engine = Engine(model.llm, batch_invariant=True, lookup=lookup, prefix_cache=cache)
        engine._costs = FREE_DRAFTS
        requests = [
            r
            for group in ([prompts] if together else [[p] for p in prompts])
            for r in request(model, *group, cache=cache)
        ]
        if cache is not None:
            engine.run([replace(r, max_new_tokens=1) for r in requests])
            assert cache.nbytes and not bits.of.pop(0, None)
            bits.of.clear()
        results = engine.run(requests)
        if cache is not None:
            assert all(result.reused_tokens for result in results)
        answers.append([(result.token_ids, result.confidences) for result in results])
        found.append(bits.of)
        monkeypatch.undo()
    assert answers[0] == answers[1]
    assert found[0].keys() == found[1].keys() and min(map(len, found[0].values())) > 5
    for rows, scores in found[0].items():
        again = found[1][rows]
        assert len(scores) == len(again)
        assert all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))


def test_square_pictures_without_crops() -> None:
    """All rows can be selected; there is no index of windows, and one id a picture or a row."""
    torch.manual_seed(5)
    config = preset("tiny-point")
    config = replace(config, llm_config=replace(config.llm_config, num_hidden_layers=2))
    model = NanoMolmo2(config).eval()
    assert config.point_config is not None
    image, patch = config.image_token_id, config.point_config.patch_token_id
    pixels = torch.randn(2, 3, 192, 192)
    ids = torch.tensor([5, image, 9, image, 7, 8])
    whole = torch.cat([id.repeat(36 if id == image else 1) for id in ids])
    prompt = Prompt(whole, pixels, num_rows=72)
    expected, other = (
        naive_answer(model, replace(prompt, pixels=shown), 14, bias=1.0)
        for shown in (pixels, pixels.flip(0))
    )
    assert min(expected) >= 752 and expected != other
    options: dict[str, Any] = {"max_new_tokens": 14, "eos_token_id": None}
    options["logit_bias"] = {patch: 1.0}
    cache = PrefixCache()
    for given in (ids, whole):
        for prefix_cache in (None, cache, cache):
            found = model.generate(given[None], pixels, prefix_cache=prefix_cache, **options)
            assert found[0, len(given) :].tolist() == expected
    assert cache.reused_images == 2 * 3
    both = model.generate(ids.repeat(2, 1), torch.cat([pixels, pixels.flip(0)]), **options)
    assert both[0, 6:].tolist() == expected
    assert both[1, 6:].tolist() == other


# ---- reuse ----


@contextmanager
def counted(model: NanoMolmo2) -> Iterator[dict[str, int]]:
    """Positions of the decoder, images of the encoder and visual tokens that keys are made of."""
    count = {"positions": 0, "images": 0, "keys": 0}

    def counter(name: str, dim: int) -> Any:
        def add(module: Any, inputs: Any) -> None:
            count[name] += inputs[0].shape[dim]

        return add

    predictor = model.point_predictor
    assert predictor is not None
    handles = [
        model.llm.layers[0].register_forward_pre_hook(counter("positions", 1)),
        model.vision_encoder.register_forward_pre_hook(counter("images", 0)),
        predictor.patch_k.register_forward_pre_hook(counter("keys", 0)),
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["one", "two", "video"])
@pytest.mark.parametrize("rule", ["released", "consistent"])
def test_a_second_question_recomputes_no_key(rule: str, name: str) -> None:
    """Keys depend on no question: they are kept with the beginning of the prompt."""
    model, cache = RULES[rule](), PrefixCache()
    prompt = prompt_of(name)
    other = prompt.then(97, 61)
    expected = answer(model, other).token_ids
    engine = Engine(model.llm, prefix_cache=cache, lookup=False)
    with counted(model) as count:
        answer(model, prompt, engine=engine, cache=cache)
        assert count["keys"] == prompt.num_rows and count["images"] > 0
        count.update(positions=0, images=0, keys=0)
        result = answer(model, other, engine=engine, cache=cache)
    assert result.token_ids == expected and points_of(prompt, expected)
    assert count["keys"] == 0 and count["images"] == 0
    assert result.reused_tokens == len(prompt.ids)
    assert count["positions"] == 2 + 21


def test_a_beginning_with_some_of_the_pictures() -> None:
    """Where images do not see ahead, keys of the first are reused and of the second made anew."""
    model, cache, two = causal(consistent()), PrefixCache(), prompt_of("two")
    engine = Engine(model.llm, prefix_cache=cache, lookup=False)
    assert two.pixels is not None and two.pooling is not None
    first = replace(
        two, ids=two.ids[:41].clone(), pixels=two.pixels[:5], pooling=two.pooling[:25], num_rows=25
    ).then(111, 61)
    answer(model, first, engine=engine, cache=cache)
    with counted(model) as count:
        result = answer(model, two, engine=engine, cache=cache)
        assert result.reused_tokens == 41 and count["keys"] == 30
        assert result.token_ids == answer(model, two).token_ids
        count.update(keys=0)
        again = answer(model, first.then(61), engine=engine, cache=cache)
        assert again.reused_tokens == 43 and count["keys"] == 0
    assert again.token_ids == answer(model, first.then(61)).token_ids
    cache = PrefixCache()  # the other way round: keys of more pictures than the prompt has
    engine = Engine(model.llm, prefix_cache=cache, lookup=False)
    answer(model, two, engine=engine, cache=cache)
    with counted(model) as count:
        fewer = answer(model, first.then(61), engine=engine, cache=cache)
    assert fewer.reused_tokens == 41 and count["keys"] == 0
    assert fewer.token_ids == again.token_ids


def test_a_beginning_without_keys_is_not_reused() -> None:
    """A request that could not point has left it: same positions, but no key was made."""
    model, cache = consistent(), PrefixCache()
    (prepared,) = request(model, prompt_of("one"), cache=cache)
    engine = Engine(model.llm, prefix_cache=cache, lookup=False)
    engine.run([replace(prepared, points=None)])
    (found,) = engine.run([prepared])
    assert found.reused_tokens == 0
    assert found.token_ids == answer(model, prompt_of("one")).token_ids


def test_the_next_turn_reuses_an_answer_with_points() -> None:
    """Answers are kept by what their points select, and point again in later turns."""
    model, cache = consistent(), PrefixCache()
    prompt = prompt_of("one")
    engine = Engine(model.llm, prefix_cache=cache, lookup=False)
    first = answer(model, prompt, engine=engine, cache=cache)
    assert points_of(prompt, first.token_ids)
    kept = first.token_ids[:-1]  # the last one's keys and values were never made
    turn = prompt.answered(kept[: len(kept) - _open_part(prompt, kept)])
    turn = turn.then(*b" and? ", QUOTE)
    with counted(model) as count:
        second = answer(model, turn, engine=engine, cache=cache)
    assert second.reused_tokens == len(turn.ids) - 7
    assert count["keys"] == 0
    assert second.token_ids == answer(model, turn).token_ids
    rows = points_of(prompt, second.token_ids)
    assert rows and rows[0] <= points_of(prompt, kept)[0], "a list of its own"


def _open_part(prompt: Prompt, tokens: list[int]) -> int:
    """Tokens at the end that belong to a point that is not complete."""
    first_cell = V + prompt.num_rows + 1 + prompt.num_slots
    back = 0
    for id in reversed(tokens):
        if id < V or id >= first_cell or id == V + prompt.num_rows:
            return back
        back += 1
    return back


def test_trap_24_reuse_tells_points_apart() -> None:
    """Neither the same ids in another prompt are reused, nor the same markers of another point."""
    model, cache = consistent(), PrefixCache()
    engine = Engine(model.llm, prefix_cache=cache, lookup=False)
    one = prompt_of("one")
    tail = (61, 61, 61, 61, QUOTE)
    base = one.point(11, 1, 4).then(*tail)
    answer(model, base, engine=engine, cache=cache)
    for other, shared in (
        (one.point(12, 1, 4), len(one.ids)),
        (one.point(11, 2, 4), len(one.ids) + 1),
        (one.point(11, 1, 5), len(one.ids) + 2),
        (one.point(11, 1, 4), len(one.ids) + 7),
    ):
        prompt = other.then(*tail)
        (prepared,) = request(model, prompt, cache=cache)
        found = Engine(model.llm, prefix_cache=cache, lookup=False).run([prepared])[0]
        assert found.reused_tokens == shared
        assert found.token_ids == answer(model, prompt).token_ids
    # The same classes behind another picture: nothing of it is known.
    assert one.pixels is not None
    changed = replace(base, pixels=one.pixels.flip(2))
    assert answer(model, changed, engine=engine, cache=cache).reused_tokens <= 1


def test_forks_of_a_running_row_share_its_keys() -> None:
    """Two questions about one picture at once: the second starts while the first one points."""
    model, cache = consistent(), PrefixCache()
    prompt = prompt_of("one")
    questions = [prompt.then(QUOTE), prompt.then(97, QUOTE)]
    expected = [answer(model, question).token_ids for question in questions]
    engine = Engine(model.llm, prefix_cache=cache, lookup=False)
    results: dict[int, Result] = {}
    with counted(model) as count:
        for question in questions:
            engine.submit(request(model, question, cache=cache)[0])
            results |= {e.request_id: e.result for _ in range(3) for e in engine.step() if e.result}
        while engine.busy:
            results |= {e.request_id: e.result for e in engine.step() if e.result}
    assert count["keys"] == prompt.num_rows
    assert [results[i].token_ids for i in range(2)] == expected


POOL = [
    *(prompt_of(name) for name in ("one", "two", "video", "text")),
    prompt_of("one").then(QUOTE),
    prompt_of("one").point(20, 1, 4).then(49),
    prompt_of("one").point(20, 2, 4).then(*b"1 what? ", QUOTE),
    prompt_of("two").point(40, 0, 3).point().then(*b" and? ", QUOTE),
]
ALONE: dict[tuple[str, int, bool], list[int]] = {}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rule", ["released", "consistent"])
def test_schedules_of_joining_and_leaving_rows(rule: str, seed: int) -> None:
    """Rows start while others write points, leave and are cancelled; with reuse and drafts."""
    model, generator = RULES[rule](), random.Random(seed)
    cache = PrefixCache() if generator.random() < 0.7 else None
    engine = Engine(
        model.llm,
        max_rows=generator.randint(1, 4),
        prefix_cache=cache,
        lookup=generator.random() < 0.7,
    )
    engine._costs = FREE_DRAFTS
    wanted: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}

    def step() -> None:
        found.update({e.request_id: e.result.token_ids for e in engine.step() if e.result})

    for _ in range(8):
        number, drawn = generator.randrange(len(POOL)), generator.random() < 0.3
        sampling = SamplingParams(temperature=0.3 * drawn, seed=number, sample_points=drawn)
        options: dict[str, Any] = {"max_new_tokens": 20, "sampling": sampling}
        key = rule, number, drawn
        if key not in ALONE:
            ALONE[key] = answer(model, POOL[number], **options).token_ids
        (prepared,) = request(model, POOL[number], cache=cache, **options)
        wanted[engine.submit(prepared)] = ALONE[key]
        if generator.random() < 0.2:
            unwanted = engine.submit(prepared)
            for _ in range(generator.randrange(4)):
                step()
            engine.cancel(unwanted)
            found.pop(unwanted, None)
        for _ in range(generator.randrange(7)):
            step()
    while engine.busy:
        step()
    assert found == wanted


# ---- drafts ----


@pytest.mark.parametrize("rule", ["released", "consistent"])
def test_drafts_stop_before_a_point_and_go_on_behind_it(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drafted where a slot or cell follows; the number behind a cell may be.

    The answer is the same as without drafts, also a drawn one.
    """
    model, steps = RULES[rule](), []
    prompt = prompt_of("two").then(*b'"7" 7" 7')
    continue_ = Engine._continue

    def recorded(self: Engine, rows: Any, events: Any) -> None:
        (row,) = rows
        before = len(row.tokens), row.newest
        continue_(self, rows, events)
        steps.append((*before, len(row.tokens)))

    draft = Engine._draft
    drafts: list[tuple[int, list[int]]] = []

    def drafted(row: Any, others: int) -> list[int]:
        found = draft(row, others)
        drafts.append((row.newest, found))
        return found

    monkeypatch.setattr(Engine, "_continue", recorded)
    monkeypatch.setattr(Engine, "_draft", staticmethod(drafted))
    for sampling in (SamplingParams(), SamplingParams(temperature=0.2, seed=2)):
        options: dict[str, Any] = {"max_new_tokens": 40, "sampling": sampling}
        expected = answer(model, prompt, **options)
        steps.clear()
        drafts.clear()
        engine = Engine(model.llm)
        engine._costs = FREE_DRAFTS
        found = answer(model, prompt, engine=engine, **options)
        assert found.token_ids == expected.token_ids
        assert np.allclose(found.confidences, expected.confidences, atol=1e-4)
        assert len(points_of(prompt, found.token_ids)) > 3
        behind_cells = [ids for newest, ids in drafts if newest == LOCATION]
        assert any(ids[:1] == [55] for ids in behind_cells), "the number 7"
        assert all(not ids for newest, ids in drafts if newest in (SUBPATCH,))
        markers = {PATCH, SUBPATCH, LOCATION}
        assert not any(markers & set(ids) or max(ids, default=0) >= V for _, ids in drafts)
        assert len(steps) < 39


# ---- sampling ----


def test_a_temperature_leaves_rows_slots_and_cells_alone() -> None:
    """Only whether a point comes is drawn: where it is are the likeliest parts; unless asked."""
    model, prompt = consistent(), prompt_of("two").then(QUOTE)
    drawn: dict[bool, set[tuple[int, ...]]] = {False: set(), True: set()}
    for sample_points in drawn:
        for seed in range(12):
            params = SamplingParams(
                temperature=3.0, seed=seed, sample_points=sample_points, top_k=1
            )
            found = answer(model, prompt, sampling=params, max_new_tokens=3).token_ids
            drawn[sample_points].add(tuple(found))
    greedy = answer(model, prompt, max_new_tokens=3).token_ids
    assert drawn[False] == {tuple(greedy)}
    assert len(drawn[True]) > 6
    (prepared,) = request(model, prompt)
    assert prepared.points is not None
    assert all(prepared.points.selectable[found[0] - V] for found in drawn[True])
    cold = SamplingParams(temperature=0.0, sample_points=True)
    assert answer(model, prompt, sampling=cold, max_new_tokens=3).token_ids == greedy


def test_drawn_rows_follow_their_scores() -> None:
    """Frequencies of the first row of 300 draws against the softmax at the temperature."""
    model, prompt = consistent(), prompt_of("one").then(QUOTE)
    (prepared,) = request(model, prompt, max_new_tokens=1)
    counts = torch.zeros(26)
    engine = Engine(model.llm, lookup=False, max_rows=16)
    params = SamplingParams(temperature=2.0, top_k=1, sample_points=True)
    drawn = [replace(prepared, sampling=replace(params, seed=seed)) for seed in range(300)]
    for result in engine.run(drawn):
        counts[result.token_ids[0] - V] += 1
    with torch.no_grad():
        batch = model.batch_of(prompt.ids[None], prompt.pixels, image_token_pooling=prompt.pooling)
        seen, states = model.see(batch), model.states(batch)[0]
        predictor = model.point_predictor
        assert predictor is not None
        keys = predictor.row_keys(states[seen.places], seen.position_ids)
        offered = torch.cat([seen.selectable, torch.tensor([False])])  # a list has a point
        scores = predictor.row_logits(states[-1:], keys, torch.zeros(1, dtype=torch.long), offered)
    chances = (scores[0] / 2.0).softmax(dim=-1)
    assert float((counts / 300 - chances).abs().max()) < 0.08
    assert counts[~offered].sum() == 0


def test_confidences_are_the_probabilities_of_the_choices() -> None:
    """Of every complete point: softmax of what its row, slot and cell were chosen from."""
    for model in (released(), consistent()):
        prompt = prompt_of("one")
        result = answer(model, prompt, max_new_tokens=16)
        logprobs = answer(model, prompt, max_new_tokens=16, sampling=SamplingParams(logprobs=30))
        assert logprobs.token_ids == result.token_ids
        assert logprobs.confidences == pytest.approx(np.array(result.confidences), abs=1e-5)
        at = [i for i, id in enumerate(result.token_ids) if id >= V + 26 + 4]  # cells
        assert len(at) == len(result.confidences) > 2
        for i, (row, slot, cell) in zip(at, result.confidences, strict=True):
            of_row, of_slot, of_cell = logprobs.sampled[i - 2 : i + 1]
            assert of_cell.logprob == pytest.approx(np.log(cell), abs=1e-5)
            assert of_slot.logprob == pytest.approx(np.log(slot), abs=1e-5)
            assert of_row.logprob is not None and of_row.logprob <= np.log(row) + 1e-6
            assert sum(np.exp(p) for _, p in of_cell.top) == pytest.approx(1, abs=1e-5)
            assert of_cell.top[0][0] == of_cell.token
    # In a released answer of 22 tokens the last point may lack its cell: it has no confidence.
    assert len(answer(released(), prompt, max_new_tokens=3).confidences) == 0


def test_log_probabilities_of_a_row_are_its_markers_and_its_own() -> None:
    """One distribution over text and rows: PATCH shared out among what it may select."""
    model, prompt = consistent(), prompt_of("one").then(QUOTE)
    result = answer(model, prompt, max_new_tokens=1, sampling=SamplingParams(logprobs=500))
    (row,) = result.sampled
    assert sum(np.exp(p) for _, p in row.top) == pytest.approx(1, abs=1e-4)
    assert row.top[0] == (row.token, row.logprob) and PATCH not in dict(row.top)
    with torch.no_grad():
        pooling = {"image_token_pooling": prompt.pooling}
        batch = model.batch_of(prompt.ids[None], prompt.pixels, **pooling)
        logits = model.llm.head(model.hidden_states(batch))[0, -1]
    logits[[SUBPATCH, LOCATION]] = -torch.inf
    marker = float(logits.log_softmax(dim=-1)[PATCH])
    of_rows = [p for id, p in row.top if id >= V]
    assert float(torch.tensor(of_rows).logsumexp(0)) == pytest.approx(marker, abs=1e-4)


def test_settings_of_the_text_do_not_touch_classes() -> None:
    """A penalty never counts parts of points; a bias acts on the marker, and on no class."""
    model, prompt = consistent(), prompt_of("two").then(QUOTE)
    plain = answer(model, prompt, max_new_tokens=3)
    penalised = answer(
        model, prompt, max_new_tokens=9, sampling=SamplingParams(repetition_penalty=1e4)
    )
    assert penalised.token_ids[:3] == plain.token_ids
    assert len([id for id in penalised.token_ids if id >= V]) > 3, "PATCH is not counted"
    text = [id for id in penalised.token_ids if id < V]
    assert len(set(text)) == len(text)
    never = answer(model, prompt, sampling=SamplingParams(logit_bias={PATCH: -torch.inf}))
    assert max(never.token_ids) < V
    always = answer(model, prompt_of("one"), sampling=SamplingParams(logit_bias={PATCH: 100.0}))
    assert [id >= V for id in always.token_ids[:9]] == [True] * 9
    with pytest.raises(ValueError, match="logit_bias names token 400, but the model has 384"):
        answer(model, prompt, sampling=SamplingParams(logit_bias={V + 16: 1.0}))


class OnlyText:
    """A constraint over the vocabulary that remembers what it was told."""

    def __init__(self, *forbidden: int) -> None:
        self.mask = torch.ones(V, dtype=torch.bool)
        self.mask[list(forbidden)] = False
        self.told: list[int] = []

    def start(self) -> OnlyText:
        return self

    def allowed(self) -> Tensor:
        return self.mask

    def advance(self, id: int) -> None:
        self.told.append(id)


def test_constraints_see_markers_and_stops_see_classes() -> None:
    model, prompt = consistent(), prompt_of("one").then(QUOTE)
    constraint, seen = OnlyText(), []
    result = answer(
        model,
        prompt,
        max_new_tokens=9,
        sampling=SamplingParams(constraint=constraint),
        stops=lambda id: seen.append(id),
    )
    assert seen == result.token_ids and max(seen) > V
    assert constraint.told[:3] == [PATCH, SUBPATCH, LOCATION] and max(constraint.told) < V
    none = answer(model, prompt, sampling=SamplingParams(constraint=OnlyText(PATCH)))
    assert max(none.token_ids) < V
    cell = result.token_ids[2]
    ended = answer(model, prompt, sampling=SamplingParams(stop_token_ids=(cell,)))
    assert ended.token_ids == result.token_ids[:3] and ended.finish_reason == "stop"
    assert len(ended.confidences) == 1
    called = answer(model, prompt, stops=lambda id: id == cell)
    assert called.token_ids == ended.token_ids


# ---- what it costs ----


class Transfers(TorchDispatchMode):
    """Reads of values: on a device each makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.items = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.items += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_without_points_costs_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """One transfer of logits, no score of a row; a step that selects has one more, for all rows."""
    calls: list[tuple[str, int]] = []
    for name in ("fetch", "fetch_scores"):
        run = getattr(engine_module, name)

        def recorded(values: Any, *rest: Any, run: Any = run, name: str = name) -> Any:
            calls.append((name, len(values)))
            return run(values, *rest)

        monkeypatch.setattr(engine_module, name, recorded)
    model = released()
    prompts = [prompt_of("one"), prompt_of("video"), prompt_of("text")]
    engine = Engine(model.llm, lookup=False)
    for prepared in request(model, *prompts):
        engine.submit(prepared)
    engine.step()
    assert calls == [("fetch", 1)] * 3
    calls.clear()
    log: list[tuple[list[int], list[tuple[str, int]]]] = []
    while engine.busy:
        tokens = [event.token for event in engine.step()]
        log.append(([token for token in tokens if token is not None], list(calls)))
        calls.clear()
    plain = [made for tokens, made in log if max(tokens) < V]
    assert len(plain) > 2
    assert all(made == [("fetch", 3)] for made in plain)
    for tokens, made in log:
        parts = sum(token >= V for token in tokens)
        if parts:
            begun = [n for name, n in made if name == "fetch_scores"]
            assert begun == [parts], "in one transfer"
            assert sum(name == "fetch" for name, _ in made) <= 1


def test_keys_are_kept_once_and_counted() -> None:
    """What a prefix keeps of points is part of its size."""
    model, cache = consistent(), PrefixCache()
    prompt = prompt_of("one")
    engine = Engine(model.llm, prefix_cache=cache, lookup=False)
    answer(model, prompt, engine=engine, cache=cache)
    (prefix,) = (held for _, held in cache._prefixes())
    assert prefix.point_keys is not None
    assert prefix.point_keys.shape == (26, 32)
    assert prefix.nbytes == prefix.row.nbytes + 26 * 32 * 4
    features = 5 * 25 * model.config.connector.feature_dim * 4
    assert cache.nbytes == prefix.nbytes + features + 25 * 64 * 4
