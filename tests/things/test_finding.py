"""What is found all at once: targets, the scores of training and of use, lists of answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanomolmo2.data.example import Branch
from nanomolmo2.generation import finding
from nanomolmo2.generation.finding import finding_request
from nanomolmo2.generation.pointing import Pointing, Selected, given_points
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.sampling import Sampled, Sampler, SamplingParams
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.finder import Patches, both
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.point import Point, PointsText
from nanomolmo2.processor.processor import Encoded
from nanomolmo2.things.find_labels import Asked, find_labels, wanted_of
from nanomolmo2.things.find_model import CROPS, FindModel
from nanomolmo2.things.questions import FindMix, make_branches
from nanomolmo2.things.scenes import Scene
from nanomolmo2.things.scenes import test_scene as scene_of_a_test
from nanomolmo2.things.source import test_scenes as scenes_of_a_test
from nanomolmo2.things.wordless import contrast_loss, wordless, wordless_scores
from nanomolmo2.training.find_terms import scores_of


def encoded_question(index: int) -> tuple[FindModel, Scene, Branch, Encoded]:
    find = FindModel(0)
    scene = scene_of_a_test(index, "few")
    branch = next(b for b in make_branches([scene], np.random.default_rng(3)) if b.task == "like")
    encoded = find.processor.encode_tree([scene.image], [branch.messages])
    return find, scene, branch, encoded


@pytest.mark.parametrize("index", [0, 3])
def test_every_thing_asked_for_has_one_patch_beside_its_middle(index) -> None:
    _, scene, branch, encoded = encoded_question(index)
    labels = find_labels([Asked(encoded, [scene], [wanted_of(branch)])], len(encoded.input_ids))
    assert branch.truth is not None and branch.truth["count"] == labels.asked[0].sum() > 0
    assert len(labels.of) == 2  # at the question's end, and where the list begins
    assert torch.equal(labels.asked[0], labels.asked[1])
    space = encoded.point_space
    assert space is not None
    (view,), (size,) = space.views, space.image_sizes
    pixels = np.array([size[0] / view.cols, size[1] / view.rows])
    for number, thing in enumerate(scene.things):
        at = np.flatnonzero(labels.owner.numpy() == number)
        middles = np.stack([at % view.cols, at // view.cols], axis=1) + 0.5
        away = np.abs(middles * pixels - thing.center) / pixels
        assert (away <= 0.7 + 1e-6).all()  # half of a patch, and the margin
        own = np.floor(np.array(thing.center) / pixels).astype(int)
        assert (at == own[1] * view.cols + own[0]).any() or len(at) == 0  # else a nearer one has it
        right = labels.way[at, :2].numpy() + middles
        shows = labels.shows[at].numpy()
        assert (np.abs(right * pixels - thing.center)[shows] < 1e-3 * max(size)).all() or len(
            at
        ) > 1
    asked = {
        i
        for i, thing in enumerate(scene.things)
        if scene.kinds[thing.kind].id == branch.truth["kind"]
    }
    assert set(np.flatnonzero(labels.asked[0].numpy()).tolist()) == asked


def with_opinions(find: FindModel) -> NanoMolmo2:
    """Its model, whose finder tells patches apart, by random weights; untrained it hardly does."""
    model = find.model.eval()
    assert model.finder is not None
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.finder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_what_is_learned_is_what_is_found_later(monkeypatch) -> None:
    """The scores of training, from a message tree, are those of a prompt."""
    find, scene, branch, encoded = encoded_question(1)
    model = with_opinions(find)
    batch = model.encoded(collate([encoded], 0))
    labels = find_labels([Asked(encoded, [scene], [wanted_of(branch)])], len(encoded.input_ids))
    with torch.no_grad():
        scored = scores_of(model, batch, model.states(batch), labels)
    prompt = find.processor.encode(branch.messages[:1], [scene.image])
    seen: list[np.ndarray] = []
    monkeypatch.setattr(finding, "things_of", lambda scores, *_: seen.append(scores) or [])
    points = finding_request(model, prompt).points
    assert points is not None and points.find is not None and points.find([], []) == []
    np.testing.assert_allclose(seen[0], scored.scores.final[0].sigmoid(), atol=1e-5)
    assert seen[0].std() > 0.01


def test_patches_that_speak_of_one_thing_share_its_chance() -> None:
    scores = np.zeros((4, 5), np.float32)
    ways = np.zeros((20, 3), np.float32)
    scores[1, 1], scores[1, 2] = 0.5, 0.25  # beside each other, both ways lead between them
    ways[6], ways[7] = (0.5, 0.0, np.log(2)), (-0.5, 0.0, np.log(2))
    scores[3, 4] = 0.625
    found = finding.things_of(scores.ravel(), ways, (4, 5), (50, 80))
    assert [(f.x, f.y, round(f.confidence, 4)) for f in found] == [
        (20.0, 30.0, 0.75),
        (45.0, 70.0, 0.625),
    ]
    assert found[0].size == pytest.approx(40)  # two patches of 20 pixels


def test_two_things_are_so_where_both_are() -> None:
    a, b = torch.randn(50), torch.randn(50)
    expected = (a.sigmoid() * b.sigmoid()).logit()
    torch.testing.assert_close(both(a, b), expected)
    assert both(torch.tensor(80.0), torch.tensor(-90.0)).item() == pytest.approx(-90)


def test_a_list_that_is_written_holds_what_is_found() -> None:
    """Found points are listed in order, with their confidence, and the text goes on behind."""
    find, scene, branch, _ = encoded_question(1)
    model = find.model.eval()
    prompt = find.processor.encode(branch.messages[:1], [scene.image])
    request = finding_request(model, prompt)
    points, space = request.points, prompt.point_space
    assert points is not None and points.find is not None and space is not None
    wanted = [Selected(space.target(Point(*thing.center)), 0.75) for thing in scene.things[:3]]
    wanted = sorted({one.target[:2]: one for one in wanted}.values())
    given: list[list[int]] = []

    def known(answer, targets):
        given.append(list(answer))
        return wanted

    pointing = Pointing(
        replace(points, find=known), request.input_ids.tolist(), None, Sampler(SamplingParams(), [])
    )
    pointing.take(5)
    scores = torch.zeros(space.num_rows + 1)
    read = []
    for _ in wanted:
        marker = Sampled(points.rule.patch_token_id)
        for part in (marker, None, None):
            size = {"text": space.num_rows + 1, "slot": space.num_slots, "cell": 9}
            scores = torch.zeros(size[pointing.grammar.expects])
            sampled = pointing.choose(scores, part)
            assert sampled is not None
            read.append(sampled.token)
            pointing.take(sampled.token)
    sampled = pointing.choose(torch.zeros(space.num_rows + 1), Sampled(points.rule.patch_token_id))
    assert sampled is not None and sampled.token == points.classes.id("none")
    expected = [space.first_class + c for one in wanted for c in space.classes(one.target)]
    assert read == expected
    assert given == [[5]]  # asked once, at the beginning of the list
    assert pointing.confidences == [(0.75, 1.0, 1.0)] * len(wanted)


def test_points_of_questions_are_told_from_those_of_answers() -> None:
    find, scene, _, _ = encoded_question(0)
    point = {"type": "point", "x": 20.0, "y": 30.0, "image": 1}
    asked = [
        {"type": "text", "text": "Point to everything like"},
        point,
        {"type": "text", "text": "and"},
        point,
    ]
    listed = PointsText('<points coords="1 1 100 100 2 500 500">thing</points>')
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": listed},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Is it like"},
                point,
                {"type": "text", "text": "?"},
            ],
        },
    ]
    prompt = find.processor.encode(messages, [scene.image])
    request = finding_request(find.model, prompt)
    assert request.points is not None
    given = given_points(np.asarray(request.input_ids), request.points)
    assert given.tolist() == [True, True, False, False, False, True]


def test_a_question_that_ends_with_a_point_leaves_all_places_open() -> None:
    """Its point is no beginning of the answer's list: what lies before it can be listed too."""
    find, scene, _, _ = encoded_question(0)
    height, width = scene.image.shape[:2]
    last = {"type": "point", "x": width - 2.0, "y": height - 2.0, "image": 1}
    content = [{"type": "text", "text": "Find more like"}, last]
    prompt = find.processor.encode([{"role": "user", "content": content}], [scene.image])
    request = finding_request(find.model, prompt)
    assert request.points is not None and request.input_ids is not None
    pointing = Pointing(
        request.points, request.input_ids.tolist(), None, Sampler(SamplingParams(), [])
    )
    assert pointing.grammar.rows()[:-1].all()


def test_without_words_the_same_patches_hold_the_same_things() -> None:
    """Targets of a picture without a question are those of the picture with one."""
    find = FindModel(0)
    scene = scene_of_a_test(2, "alike")
    mix = FindMix(like=4, count_like=0, same=0, named=0, count_named=0, unlike=1.0, bare=0.0)
    branches = make_branches([scene], np.random.default_rng(1), mix)
    made = wordless([([scene], branches)], CROPS)
    encoded = find.processor.encode_tree([scene.image], [b.messages for b in branches])
    wanted = [wanted_of(branch) for branch in branches]
    labels = find_labels([Asked(encoded, [scene], wanted)], len(encoded.input_ids))
    assert encoded.pixel_values is not None and encoded.image_token_pooling is not None
    np.testing.assert_array_equal(made.pixel_values, encoded.pixel_values[1:])
    low = encoded.image_token_pooling.shape[0] - len(made.windows)
    windows = made.windows.numpy() + CROPS.num_patches  # behind the overview's
    np.testing.assert_array_equal(windows, encoded.image_token_pooling[low:])
    assert torch.equal(made.labels.patch + CROPS.num_patches, labels.patch)
    assert torch.equal(made.labels.row + low, labels.row)
    for name in ("owner", "way", "shows", "example"):
        assert torch.equal(getattr(made.labels, name), getattr(labels, name)), name
    once = labels.state_at[labels.question].unique().sort().values[::2]  # not again at the lists
    assert torch.equal(made.labels.asked, labels.asked[torch.isin(labels.state_at, once)])
    for question, branch in enumerate(branches):
        assert branch.truth is not None
        mine = made.labels.question == question
        assert made.gates[mine].tolist() == [1.0] * len(branch.truth["examples"]) + [-1.0] * len(
            branch.truth["unlike"]
        )
        of_words = labels.like[labels.question == 2 * question]
        assert set(made.labels.like[mine].tolist()) == set(of_words.tolist())


def test_the_same_in_another_size_is_not_asked_for() -> None:
    """With and without words: exactly the things are asked for that the answer lists."""
    find = FindModel(0)
    mix = FindMix(like=4, count_like=0, same=0, named=0, count_named=0, bare=0.0, invented=0.0)
    sizes = 0
    for index in range(8):
        scene = scene_of_a_test(index, "alike")
        sizes += any(kind.alike == "size" for kind in scene.kinds)
        branches = make_branches([scene], np.random.default_rng(index), mix)
        encoded = find.processor.encode_tree([scene.image], [b.messages for b in branches])
        asked = Asked(encoded, [scene], [wanted_of(branch) for branch in branches])
        of_words = find_labels([asked], len(encoded.input_ids)).asked
        alone = wordless([([scene], branches)], CROPS).labels.asked
        truths = [branch.truth or {} for branch in branches]
        boxes = [[list(scene.things[i].box) for i in np.flatnonzero(row)] for row in alone]
        for found, truth in zip(boxes, truths, strict=True):
            assert sorted(found) == sorted(map(list, truth["boxes"]))
        assert [int(row.sum()) for row in of_words][::2] == [truth["count"] for truth in truths]
    assert sizes > 3


def test_kinds_are_told_apart_in_all_pictures_of_a_batch() -> None:
    mix = FindMix(like=2, count_like=0, same=0, named=0, count_named=0, bare=0.0)
    scenes = [scenes_of_a_test(3, "few", pair=True)[0], [scene_of_a_test(4, "few")]]
    rng = np.random.default_rng(1)
    batch = wordless([(shown, make_branches(shown, rng, mix)) for shown in scenes], CROPS)
    cells, looks = batch.cells, batch.looks
    ids = [kind.id for kind in scenes[0][0].kinds]
    assert {kind.id for kind in scenes[0][1].kinds} <= set(ids)
    assert len(looks) == len(ids) + len(scenes[1][0].kinds)
    first = cells.picture == 0
    assert set(cells.kind[first & (cells.kind >= 0)].tolist()) == set(range(len(ids)))
    assert cells.kind[~first & (cells.kind >= 0)].min() == len(ids)
    assert torch.equal(cells.kind >= 0, batch.labels.shows)
    # Every kind with a look of its own: nothing is mixed up but what shares no kind; shuffled, all.
    model = FindModel(0).model
    assert model.finder is not None
    own = torch.nn.functional.one_hot(cells.kind.clamp(min=-1) + 1, 64).float()
    zeros = torch.zeros(len(own), 3)
    patches = Patches(own, own, own, zeros[:, 0], zeros, batch.labels.grid)
    told = contrast_loss(model, batch, patches)
    mixed = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))]
    assert 0 < told < 0.2
    assert contrast_loss(model, batch, patches._replace(look=mixed, token_look=mixed)) > 5


def test_what_is_not_meant_counts_against() -> None:
    """Without words an example of the other sign turns the look that is wanted round."""
    finder = FindModel(0).model.finder
    assert finder is not None
    tokens = torch.randn(2, 256), torch.zeros(2, 256), torch.tensor([0, 1, 1])
    patches = finder.patches(torch.randn(3, 192), *tokens, torch.zeros(3, 2))
    where = torch.tensor([1]), torch.tensor([0])
    looks = [
        finder.wanted(patches, torch.zeros(1, 256), None, *where, gates=torch.tensor([sign])).look
        for sign in (0.5, -0.5)
    ]
    torch.testing.assert_close(looks[0], -looks[1])
    torch.testing.assert_close(looks[0][0], patches.look[1])


def test_what_is_learned_without_words_is_what_is_looked_for_later() -> None:
    """The scores of training are those of two pictures that are seen one by one, also again."""
    find = FindModel(0)
    model = with_opinions(find)
    scenes, branches = scenes_of_a_test(3, "few", pair=True)
    branch = next(b for b in branches if b.task == "like")
    assert branch.truth is not None
    with torch.no_grad():
        scored = wordless_scores(model, wordless([(scenes, [branch])], CROPS))
    expected, first = [], 0
    for scene in scenes:
        height, width = scene.image.shape[:2]
        rows, cols = CROPS.patch_grid(width, height)
        some = slice(first, first := first + rows * cols)
        chances, ways = scored.scores.final[0, some].sigmoid(), scored.patches.way[some]
        size = width, height
        expected.append(finding.things_of(chances.numpy(), ways.numpy(), (rows, cols), size))
    like, unlike = (
        [Point(*place) for place in branch.truth[key]] for key in ("examples", "unlike")
    )
    cache = PrefixCache(2**26)
    for _ in range(2):
        seen = [finding.see(model, CROPS, scene.image, cache) for scene in scenes]
        found = finding.look_for(model, seen, like, unlike)
        for ours, theirs in zip(found, expected, strict=True):
            assert len(ours) == len(theirs) > 0
            np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-4)
    assert cache.reused_images == 2
