"""Sources: from a path to examples that the processor can encode."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from nanomolmo2.batch import PREFIX_SUBSEGMENT
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.sources import SourceConfig, address_key, open_mixture, open_source
from nanomolmo2.emoji.model import tiny_processor
from nanomolmo2.emoji.questions import BranchMix
from nanomolmo2.emoji.scenes import SceneConfig
from nanomolmo2.emoji.source import EmojiConfig
from nanomolmo2.processor import parse_points

URL = "https://example.org/dog.jpg"


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(stream, "PNG")
    return stream.getvalue()


def texts(example) -> list[list[str]]:
    return [[message["content"] for message in branch.messages] for branch in example.branches]


def write_jsonl(path: Path, *values: dict) -> Path:
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Two good lines, one without its picture, one of LLaVA's layout."""
    (tmp_path / "a.png").write_bytes(png())
    return write_jsonl(
        tmp_path / "mine.jsonl",
        {"image": "a.png", "question": "Red?", "answer": "Yes."},
        {"question": "2 + 2?", "answer": "4"},
        {"image": "none.png", "question": "Red?", "answer": "Yes."},
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
        },
    )


def test_examples_of_a_file(lines):
    source = open_source(lines)
    assert (source.name, len(source)) == ("mine", 4)
    assert texts(source[0]) == [["Red?", "Yes."]]
    assert source[0].images[0].size == (40, 20)
    assert texts(source[3]) == [["?", "!"]]
    with pytest.raises(BadExample, match=r"missing picture: .*mine\.jsonl, line 3: .*none\.png"):
        source[2]
    copy = pickle.loads(pickle.dumps(source))
    assert texts(copy[1]) == [["2 + 2?", "4"]]


@pytest.mark.parametrize("i", [-1, 4])
def test_a_number_past_the_end(lines, i):
    with pytest.raises(IndexError, match=f"mine has no example {i}, only 4"):
        open_source(lines)[i]


def test_a_given_format_is_not_guessed(lines):
    source = open_source(SourceConfig(str(lines), format="own"))
    with pytest.raises(BadExample, match="no answer"):
        source[3]  # of LLaVA's layout


def test_pictures_may_lie_elsewhere(lines, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "none.png").write_bytes(png())
    source = open_source(SourceConfig(str(lines), image_folder=str(other)))
    assert source[2].images[0].size == (40, 20)
    with pytest.raises(BadExample, match="missing picture"):
        source[0]


def test_a_drawn_wording_belongs_to_the_example(tmp_path):
    (tmp_path / f"{address_key(URL)}.png").write_bytes(png())
    path = tmp_path / "cap.parquet"
    rows = [{"image_url": URL, "caption": "Red.", "transcripts": ["a", "b", "c"]}] * 30
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    config = SourceConfig(str(path))
    first, again = open_source(config), open_source(config)
    drawn = [texts(first[i]) for i in range(30)]
    assert [texts(again[i]) for i in reversed(range(30))] == drawn[::-1]
    assert {example[1][1] for example in drawn} == {"a", "b", "c"}
    other = open_source(SourceConfig(str(path), seed=1))
    assert [texts(other[i]) for i in range(30)] != drawn


def test_parquet_of_each_layout(tmp_path):
    (tmp_path / f"{address_key(URL)}.png").write_bytes(png())
    picture = {"bytes": png(), "path": "a.png"}
    rows = {
        "cauldron": {"images": [picture], "texts": [{"user": "Red?", "assistant": "Yes."}]},
        "pixmo_cap": {"image_url": URL, "caption": "Red.", "transcripts": ["red"]},
        "pixmo_points": {
            "image_url": URL,
            "image_sha256": None,
            "points": [{"x": 50.0, "y": 50.0}],
            "count": 1,
            "label": "dot",
            "collection_method": "pointing",
        },
        "cosyn_point": {
            "image": picture,
            "questions": ["Where?"],
            "answer_points": [{"x": [50.0], "y": [50.0]}],
        },
    }
    answers = {}
    for name, row in rows.items():
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        for format in ("auto", name):
            example = open_source(SourceConfig(str(path), format=format))[0]
            assert example.images[0].size == (40, 20)
            answers[name] = texts(example)[0][1]
    assert answers["cauldron"] == "Yes." and answers["pixmo_cap"] == "Red."
    for name in ("pixmo_points", "cosyn_point"):
        [point] = parse_points(answers[name], [(40, 20)])
        assert (point.x, point.y) == (20, 10)


def test_webdataset(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in {
            "1.jpg": png(),
            "1.txt": b"Red.",
            "2.png": png(),
            "2.json": b'{"image": "x", "question": "Red?", "answer": "Yes."}',
            "3.png": png(),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = open_source(path)
    assert texts(source[0])[0][1] == "Red."
    assert texts(source[1]) == [["Red?", "Yes."]]
    assert source[1].images[0].size == (40, 20)
    with pytest.raises(BadExample, match=r"no answer: .*key 3"):
        source[2]


def test_an_empty_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no records"):
        open_source(path)


# ---- emoji scenes ----


def test_a_scene_follows_from_seed_and_number_alone():
    config = SourceConfig("emoji", options={"length": 50, "snap": 10})
    source = open_source(config)
    assert (source.name, len(source)) == ("emoji", 50)
    again = pickle.loads(pickle.dumps(open_source(config)))
    for i in (7, 3, 7):
        assert np.array_equal(source[i].images[0], again[i].images[0])
        assert source[i].branches == again[i].branches
    other = open_source(SourceConfig("emoji", seed=1))
    pictures = [source[0].images[0], source[1].images[0], other[0].images[0]]
    assert len({picture.tobytes() for picture in pictures}) == 3
    with pytest.raises(IndexError, match="no example 50"):
        source[50]


def test_the_mix_says_what_is_asked():
    mix = BranchMix(0, 2, 0, 1, *(0,) * 6)
    scene = SceneConfig(size=96, max_objects=2, min_px=20, max_px=40)
    config = SourceConfig("emoji", options=EmojiConfig(length=5, mix=mix, scene=scene).to_dict())
    example = open_source(config)[0]
    assert example.images[0].shape == (96, 96, 3)
    assert [branch.task for branch in example.branches] == ["count", "count", "point"]


def test_a_scene_that_allows_no_question_is_not_left_out_silently():
    mix = BranchMix(*(0,) * 10)
    source = open_source(SourceConfig("emoji", options=EmojiConfig(mix=mix).to_dict()))
    with pytest.raises(BadExample, match="no answer: emoji, example 3"):
        source[3]


def test_a_file_may_be_called_emoji(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("emoji.jsonl"), {"question": "?", "answer": "!"})
    assert len(open_source("emoji.jsonl")) == 1


def test_a_fresh_process_needs_no_registration(tmp_path):
    """As a worker that is spawned, not forked."""
    mixture = open_mixture([SourceConfig("emoji", options={"length": 9})])
    (tmp_path / "mixture.pickle").write_bytes(pickle.dumps(mixture))
    code = (
        "import pickle, sys; mixture = pickle.load(open(sys.argv[1], 'rb'))\n"
        "[source] = mixture.sources; print(source.name, len(source), source[3].branches[0].task)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mixture.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["emoji", "9", "presence"], done.stderr


def test_options_are_for_registered_sources_and_have_defaults(lines):
    with pytest.raises(ValueError, match="options are for the registered sources"):
        SourceConfig(str(lines), options={"length": 9})
    some = SourceConfig("emoji", options={"length": 9})
    every = SourceConfig("emoji", options=EmojiConfig(length=9).to_dict())
    assert some != every
    assert some.with_all_options() == every == every.with_all_options()
    assert SourceConfig(str(lines)).with_all_options() == SourceConfig(str(lines))


# ---- configs and what follows ----


def test_a_config_goes_to_json_and_back():
    config = SourceConfig(
        "emoji",
        sampling_weight=0.5,
        options=EmojiConfig(length=3, mix=BranchMix(count=5)).to_dict(),
    )
    assert SourceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": "a.jsonl", "format": "csv"}, "expected one of auto, own"),
        ({"path": "a.jsonl", "prompts": "loud"}, "expected one of natural, styles"),
        ({"path": "a.jsonl", "sampling_weight": 1.5}, "share from 0 to 1"),
        ({"path": "emoji", "seed": -1}, "seed is -1"),
    ],
)
def test_configs_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**fields)


def test_a_mixture_of_configs(lines):
    configs = [SourceConfig(str(lines), name="lines"), SourceConfig("emoji", sampling_weight=0.75)]
    mixture = open_mixture(configs, seed=3)
    assert mixture.weights == [0.25, 0.75]
    assert [source.name for source in mixture.sources] == ["lines", "emoji"]
    source, index = mixture.slot(0, 2).next()
    assert 0 <= index < len(mixture.sources[source])


def test_examples_can_be_encoded(lines):
    """With pictures, without, and several branches: all that the processor takes as a tree."""
    processor = tiny_processor()
    source, scenes = open_source(lines), open_source("emoji")
    for example in (source[0], source[1], scenes[0]):
        encoded = processor.encode_tree(
            example.images, [branch.messages for branch in example.branches], video=example.video
        )
        branches = encoded.subsegment_ids[encoded.subsegment_ids != PREFIX_SUBSEGMENT]
        assert branches.max() + 1 == len(example.branches)
        assert (encoded.labels >= 0).any()
