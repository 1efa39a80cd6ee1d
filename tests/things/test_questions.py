"""Questions by example: every answer is recomputed here from the instance map."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nanomolmo2 import cli
from nanomolmo2.data.registry import SOURCES
from nanomolmo2.data.sources import open_source
from nanomolmo2.emoji.write import decode_mask
from nanomolmo2.processor.points import parse_count, parse_points
from nanomolmo2.things import source
from nanomolmo2.things.questions import FindMix, content_of, make_branches
from nanomolmo2.things.scenes import Scene, ThingScene, draw_scene, train_rng
from nanomolmo2.things.source import ThingsConfig
from nanomolmo2.things.wordings import (
    EVERYDAY,
    NAMES,
    PLACES,
    QUESTIONS,
    Wordings,
    is_for_tests,
)
from nanomolmo2.things.write import write_things

SMALL = ThingScene(width=224, height=192, max_px=60, max_like=9, max_others=9, min_others=1)
MIX = FindMix(
    like=4, count_like=2, same=4, named=2, count_named=2, unlike=0.5, bare=0.1, casual=0.0
)


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[Scene], object]]:
    """(scenes, branch) of one picture and of two."""
    made = []
    for i in range(24):
        rng = train_rng(20, i)
        scenes = [draw_scene(rng, SMALL)]
        if i % 3 == 0:
            scenes.append(draw_scene(rng, SMALL, scenes[0].kinds))
        made += [(scenes, branch) for branch in make_branches(scenes, rng, MIX)]
    return made


def points_in(message) -> list[dict]:
    content = message["content"]
    return [] if isinstance(content, str) else [p for p in content if p["type"] == "point"]


def kind_at(scene: Scene, point) -> int:
    number = scene.instance_map[int(point["y"]), int(point["x"])]
    assert number >= 0  # an example is on a thing
    return scene.things[number].kind


def test_answers_point_to_all_of_the_kind_and_to_nothing_else(asked):
    tasks, bare = Counter(), 0
    for scenes, branch in asked:
        tasks[branch.task, len(scenes)] += 1
        if branch.task == "same":
            continue
        examples = points_in(branch.messages[0])
        if not branch.truth["kind"]:  # on bare ground
            bare += 1
            (point,) = examples
            rows, columns = np.nonzero(scenes[0].instance_map >= 0)
            away = np.maximum(abs(rows + 0.5 - point["y"]), abs(columns + 0.5 - point["x"]))
            assert away.min() > 8
            assert branch.messages[1]["content"] == "There are none."
            continue
        count = len(branch.truth["examples"])
        kinds = {kind_at(scenes[0], point) for point in examples[:count]}
        (kind,) = kinds
        assert all(point["image"] == 1 for point in examples)
        assert all(kind_at(scenes[0], point) != kind for point in examples[count:])
        assert len(examples[count:]) == len(branch.truth["unlike"])

        shown = scenes[-1]
        wanted = [
            i for i, t in enumerate(shown.things) if shown.kinds[t.kind] is scenes[0].kinds[kind]
        ]
        answer = branch.messages[-1]["content"]
        sizes = [(s.image.shape[1], s.image.shape[0]) for s in scenes]
        points = parse_points(answer, sizes)
        assert len(points) == len(wanted) == branch.truth["count"]
        assert {p.image for p in points} <= {len(scenes)}
        # To a thousandth of the picture; the exact places are those of the truth.
        found = sorted((p.x, p.y) for p in points)
        exact = sorted(shown.things[i].center for i in wanted)
        np.testing.assert_allclose(np.array(found), np.array(exact), atol=0.2)
        assert sorted(map(tuple, branch.truth["points"])) == exact
        if branch.task.startswith("count") and wanted:
            assert parse_count(answer) == len(wanted)
        if not wanted:
            assert answer == "There are none."
    assert {task for task, _ in tasks} == {"like", "count_like", "same", "named", "count_named"}
    assert all(tasks[task, 2] for task in ("like", "named"))
    assert 5 <= bare <= 40


def test_same_says_yes_for_one_kind_only(asked):
    answers, across = Counter(), 0
    for scenes, branch in asked:
        if branch.task == "same":
            points = points_in(branch.messages[0])
            across += points[1]["image"] == 2
            shown = [scenes[p["image"] - 1] for p in points]
            kinds = [s.kinds[kind_at(s, p)] for s, p in zip(shown, points, strict=True)]
            answer = branch.messages[1]["content"]
            assert answer == ("Yes." if kinds[0] is kinds[1] else "No.")
            answers[answer] += 1
    assert min(answers.values()) > 20
    assert across > 3


def test_named_things_are_asked_for_by_their_name(asked):
    in_one = 0
    for _, branch in asked:
        if branch.task in ("named", "count_named"):
            one, many = branch.truth["noun"], NAMES[branch.truth["noun"]]
            text = str([m["content"] for m in branch.messages if m["role"] == "user"])
            assert one in text
            assert many in text or f"every {one}" in text
            if len(branch.messages) == 4:
                assert branch.messages[1]["content"].lower() in (f"a {one}.", f"an {one}.")
            else:
                in_one += 1
    assert in_one > 5


def test_points_stand_where_their_slots_were():
    points = [{"x": 1.0, "y": 2.0, "image": 1}, {"x": 3.0, "y": 4.0, "image": 1}]
    three = [*points, {"x": 5.0, "y": 6.0, "image": 2}]

    def text(parts):
        return "".join(p["text"] if p["type"] == "text" else f"<{p['x']:.0f}>" for p in parts)

    assert text(content_of("Find {like}, not {unlike}.", like=three, unlike=points[:1])) == (
        "Find <1>, <3> and <5>, not <1>."
    )
    parts = content_of("Find more like {like}.", like=points)
    assert [p["type"] for p in parts] == ["text", "point", "text", "point", "text"]
    assert parts[1] == {"type": "point", "x": 1.0, "y": 2.0, "image": 1}


def test_wordings_of_tests_are_never_those_of_training():
    rng = np.random.default_rng(0)
    train, test = Wordings(rng), Wordings(rng, for_tests=True)
    for task in QUESTIONS:
        trained = {train(task) for _ in range(300)}
        tested = {test(task) for _ in range(300)}
        assert trained
        assert tested
        assert not trained & tested, task
    assert not {train.name() for _ in range(600)} & {test.name() for _ in range(600)}
    assert not any(is_for_tests(text) for text in EVERYDAY)
    assert train.place(1) == ""
    assert {train.place(2) for _ in range(200)} <= set(PLACES[1:])


def test_names_are_said_right():
    assert NAMES["leaf"] == "leaves"
    assert NAMES["box"] == "boxes"
    assert NAMES["walnut"] == "walnuts"
    assert NAMES["berry"] == "berries"
    assert not any(name.endswith("y") and many.endswith("ys") and name[-2] not in "aeiou"
                   for name, many in NAMES.items())  # fmt: skip
    invented = Wordings(np.random.default_rng(0), invented=1.0)
    names = {invented.name()[1] for _ in range(50)}
    assert len(names) > 40
    assert not names & set(NAMES)


# ---- as data ----


def test_the_source_is_registered_and_depends_on_its_numbers_alone():
    config = SOURCES["things"].from_dict({"sides": [192, 256, 384], "pairs": 0.3, "length": 50})
    drawn, again = config.open(3, "things"), config.open(3, "things")
    shapes = set()
    for i in (7, 2, 11, 0, 5, 9):
        first, second = drawn[i], again[i]
        assert [m.messages for m in first.branches] == [m.messages for m in second.branches]
        for image, other in zip(first.images, second.images, strict=True):
            assert np.array_equal(image, other)
            shapes.add(image.shape)
    assert len(shapes) > 2
    with pytest.raises(IndexError, match="has no example 50"):
        drawn[50]
    with pytest.raises(ValueError, match="held out"):
        ThingsConfig(scene=ThingScene(art=("twemoji",)))


def test_test_examples_differ_by_set_and_by_pair():
    alone, pair = source.test_example(0, "alike"), source.test_example(0, "alike", pair=True)
    assert len(alone.images) == 1
    assert len(pair.images) == 2
    assert not np.array_equal(alone.images[0], pair.images[0])
    for branch in alone.branches:
        assert branch.truth["answer"]


def test_written_scenes_are_read_again(tmp_path):
    steps = []
    out = tmp_path / "things"
    path = write_things(
        out, 3, seed=4, scene=SMALL, pairs=0.5, on_progress=lambda *s: steps.append(s)
    )
    assert path == out / "train.jsonl"
    assert steps == [(1, 3), (2, 3), (3, 3)]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    things, read = ThingsConfig(scene=SMALL, pairs=0.5).open(4), open_source(path)
    assert len(read) == 3
    for i, record in enumerate(records):
        example, drawn = read[i], things[i]
        for image, pixels in zip(example.images, drawn.images, strict=True):
            assert np.array_equal(np.asarray(image), pixels)
        for truth, name in zip(record["scenes"], record["images"], strict=True):
            with Image.open(out / name) as file:
                assert file.size == (truth["width"], truth["height"])
            for thing in truth["things"]:
                mask = decode_mask(thing["mask"])
                rows, columns = np.nonzero(mask)
                assert thing["box"] == [
                    columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                ]  # fmt: skip
                assert mask[int(thing["center"][1]), int(thing["center"][0])]
        for mine, other in zip(example.branches, drawn.branches, strict=True):
            assert mine.messages[-1]["content"] == other.messages[-1]["content"]
    with pytest.raises(ValueError, match="holds files already"):
        write_things(out, 1, scene=SMALL)


def test_a_share_of_the_source_is_crowded():
    many = ThingsConfig(scene=SMALL, crowded=1.0, pairs=0.0).open(1)
    counts = [len(many.scenes(i)[0][0].of_kind(0)) for i in range(8)]
    assert min(counts) >= 15
    assert max(counts) <= 60
    few = ThingsConfig(scene=SMALL, crowded=0.0, pairs=0.0).open(1)
    assert max(len(few.scenes(i)[0][0].of_kind(0)) for i in range(8)) <= 9


def test_the_command_writes_what_it_is_told(tmp_path, capsys):
    out = tmp_path / "things"
    options = ["--count", "1", "--width", "192", "--height", "160"]
    assert cli.main(["data", "things", "--out", str(out), *options, "--test-set", "made"]) == 0
    (record,) = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert (record["scenes"][0]["width"], record["scenes"][0]["height"]) == (192, 160)
    assert {kind["id"].split("/")[0] for kind in record["scenes"][0]["kinds"]} == {"shell"}
    assert "wrote 1 examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "2"], "expected a share of 0 to 1"),
        (["--test-set", "few", "--pairs", "0.5"], "expected 0 or 1 of a test set"),
        (["--test-set", "few", "--drawings", "x"], "leave out --test-set"),
        (["--drawings", "nowhere"], "holds no drawings"),
        (["--width", "64", "--height", "64", "--test-set", "crowded"], "do not fit"),
    ],
)
def test_the_command_refuses_and_writes_nothing(tmp_path, capsys, options, message):
    out = tmp_path / "things"
    assert cli.main(["data", "things", "--out", str(out), "--count", "1", *options]) != 0
    shown = capsys.readouterr()
    assert message in " ".join((shown.err + shown.out).replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
