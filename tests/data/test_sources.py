"""Sources: from a path to examples that the processor can encode."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from nanomolmo2.batch import PREFIX_SUBSEGMENT
from nanomolmo2.data import sources
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.fields import RowLimits
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


# ---- one strange record does not end a run ----

STRANGE = [
    {"conversations": [{"from": [], "value": "?"}]},
    {"image": "http://\ud800", "question": "?", "answer": "!"},
    {"image": "x" * 300 + ".png", "question": "?", "answer": "!"},
    {
        "video": {"frames": ["a.png"], "times": [10**400]},
        "question": "?",
        "points": [{"x": 1, "y": 1, "time": 10**400}],
    },
    {"image": "a.png", "question": "?", "points": [{"x": 1, "y": 1, "image": 10**400}]},
    {"image": "a.png", "question": "?", "points": [{"x": 1, "y": 1, "image": [1]}]},
    {"image": {"bytes": {}, "path": [1]}, "question": "?", "answer": "!"},
    {"images": {"a": 1}, "branches": {"a": []}},
    {"image": "a.png", "messages": [{"role": [], "content": {}}]},
    {"image": "a.png", "question": "?", "points": [], "mode": ["point"]},
    {"image": "a.png", "question": "?", "points": [], "label": ["a"], "points_scale": {}},
    {"texts": [{"user": "?", "assistant": {}}], "images": "a.png"},
    {"image_url": 5, "caption": {}, "transcripts": "a"},
    {"image": "a.png", "questions": 1, "answer_points": {"x": 1}},
]


@pytest.mark.parametrize("values", STRANGE)
def test_a_strange_record_is_a_bad_example(values, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    source = open_source(
        write_jsonl(tmp_path / "a.jsonl", values, {"question": "?", "answer": "!"})
    )
    with pytest.raises(BadExample, match=r"a\.jsonl, line 1") as error:
        source[0]
    assert "\n" not in error.value.detail
    assert texts(source[1]) == [["?", "!"]]


@pytest.mark.parametrize(
    "fault", [OverflowError("too large"), RecursionError("deep"), MemoryError(), KeyError("x")]
)
def test_whatever_a_layout_raises_is_the_record_it_read(fault, lines, monkeypatch):
    def broken(record):
        raise fault

    monkeypatch.setitem(sources.LAYOUTS, "own", broken)
    with pytest.raises(BadExample, match=rf"line 1 cannot be read \({type(fault).__name__}"):
        open_source(lines)[0]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), AssertionError(), ImportError("datasets")])
def test_what_is_not_the_fault_of_a_record_is_raised(fault, lines, monkeypatch):
    def broken(record):
        raise fault

    monkeypatch.setitem(sources.LAYOUTS, "own", broken)
    with pytest.raises(type(fault)):
        open_source(lines)[0]


def test_a_time_that_no_calendar_has_is_one_bad_record(tmp_path):
    stamps = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
    columns = {"question": ["?", "?"], "answer": ["!", "!"], "caption": stamps, "when": stamps}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    with pytest.raises(
        BadExample, match=r"bad record: a, example 0 cannot be read \(OverflowError"
    ):
        source[0]
    assert texts(source[1]) == [["?", "!"]]  # a column of no use is not even looked at


# ---- what records may name ----


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A picture beside the folder of the data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "data" / "linked.png").symlink_to("../secret.png")
    (tmp_path / "data" / "a.png").write_bytes(png())
    return tmp_path / "secret.png"


def names(outside: Path) -> list[str]:
    return ["../secret.png", str(outside), "linked.png", "x/../../secret.png", outside.as_uri()]


def test_own_lines_may_name_any_file_and_it_is_counted(outside):
    (outside.parent / "data" / "x").mkdir()
    asked = [{"image": name, "question": "?", "answer": "!"} for name in names(outside)]
    inside = {"image": "x/../a.png", "question": "?", "answer": "!"}
    source = open_source(write_jsonl(outside.parent / "data" / "a.jsonl", *asked, inside))
    for i, name in enumerate(names(outside)):
        assert source[i].images[0].size == (40, 20)
        assert source[i].outside == (name,)
    assert source[len(asked)].outside == ()


def test_an_archive_uses_what_it_holds(outside):
    """A stranger's record must not turn the files of this machine into training pictures."""
    folder = outside.parent / "data"
    path = folder / "a.tar"
    every = [*names(outside), "a.png", "~/a.png"]
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(every):
            record = {"image": name, "question": "?", "answer": "!"}
            content = json.dumps(record).encode()
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = open_source(path)
    for i in range(len(every)):
        with pytest.raises(BadExample, match="records of an archive or the hub use only") as error:
            source[i]
        assert error.value.cause == "bad record"
    given = open_source(SourceConfig(str(path), image_folder=str(folder)))
    for i in range(len(names(outside))):
        with pytest.raises(BadExample, match="lies outside of"):
            given[i]
    assert given[len(every) - 2].images[0].size == (40, 20)


def test_records_of_the_hub_name_no_file(outside, monkeypatch):
    monkeypatch.chdir(outside.parent / "data")
    rows = [{"image": name, "question": "?", "answer": "!"} for name in ("a.png", str(outside))]
    rows.append({"image": {"bytes": png(), "path": "a.png"}, "question": "?", "answer": "!"})
    info = types.SimpleNamespace(splits={"train": types.SimpleNamespace(num_examples=3)})
    fake = types.ModuleType("datasets")
    fake.load_dataset_builder = lambda name, subset: types.SimpleNamespace(info=info)
    fake.load_dataset = lambda *_, **__: types.SimpleNamespace(decode=lambda _: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = open_source("hub:some/set")
    for i in (0, 1):
        with pytest.raises(BadExample, match="bad record: hub:some/set, row"):
            source[i]
    assert source[2].images[0].size == (40, 20)


def test_no_content_of_a_file_is_told(tmp_path):
    (tmp_path / "secret.txt").write_text("root:x:0:0:root:/root")
    (tmp_path / "secret.bin").write_bytes(b"\x00hunter2\xff\xfe" * 9)
    for name in ("secret.txt", "secret.bin"):
        asked = {"image": name, "question": "?", "answer": "!"}
        source = open_source(write_jsonl(tmp_path / "a.jsonl", asked))
        with pytest.raises(BadExample) as error:
            source[0]
        assert "root:x" not in str(error.value) and "hunter2" not in str(error.value)


# ---- what is noted ----


def test_fields_that_nobody_reads_are_noted(tmp_path):
    values = {"image_path": "a.png", "question": "?", "answer": "!", "licence": "CC0"}
    example = open_source(write_jsonl(tmp_path / "a.jsonl", values))[0]
    [(cause, detail)] = example.notes
    assert cause == "picture field that is not read"
    assert "line 1: its field 'image_path' looks like a picture" in detail
    assert example.unread == ("licence",)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"photo": "a.png", "question": "?", "points": [{"x": 1, "y": 1}]}, "bad points"),
        ({"img": "a.png", "question": "<image>?", "answer": "!"}, "missing picture"),
        ({"image_path": "a.png", "question": "?"}, "no answer"),
    ],
)
def test_a_bad_record_names_a_picture_that_is_not_read(tmp_path, values, cause):
    """Without its picture a record has points in no picture: the field's name is the reason."""
    source = open_source(write_jsonl(tmp_path / "a.jsonl", values))
    with pytest.raises(BadExample) as raised:
        source[0]
    assert raised.value.cause == cause
    assert f"its field {next(iter(values))!r} looks like a picture" in raised.value.detail


def test_a_record_too_long_for_any_row_is_not_decoded(tmp_path):
    broken = {"images": ["none.png"] * 9, "question": "?", "answer": "!"}
    source = open_source(write_jsonl(tmp_path / "a.jsonl", broken))
    with pytest.raises(BadExample, match="9 pictures are at least 9 crops, and a row holds 8"):
        source.read(0, RowLimits(max_tokens=100, max_crops=8))
    with pytest.raises(BadExample, match="missing picture"):
        source.read(0, RowLimits(max_tokens=100, max_crops=9))


def test_the_scale_of_points_is_an_option(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    values = {"image": "a.png", "question": "?", "points": [{"x": 0.5, "y": 0.5}], "label": "dot"}
    path = write_jsonl(tmp_path / "a.jsonl", values)
    [[_, answer]] = texts(open_source(SourceConfig(str(path), points_scale="unit"))[0])
    assert answer == '<points coords="1 1 500 500">dot</points>'
    with pytest.raises(ValueError, match="points_scale is 'inch', expected one of pixels, unit"):
        SourceConfig("a.jsonl", points_scale="inch")


@pytest.mark.parametrize("kind", ["image_url", "input_image", "video_url", "image"])
@pytest.mark.parametrize("field", ["messages", "question"])
def test_a_part_of_a_message_names_no_file_past_the_checks_of_a_record(tmp_path, kind, field):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    address = (tmp_path / "secret.png").as_uri()
    key = {"input_image": "image_url"}.get(kind, kind)
    parts = [{"type": kind, key: address}, {"type": "text", "text": "What is it?"}]
    if field == "question":
        values = {"question": parts, "answer": "Red."}
    else:
        turns = [("user", parts), ("assistant", "Red.")]
        values = {"messages": [{"role": role, "content": content} for role, content in turns]}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("1.json")
        text = json.dumps(values).encode()
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    with pytest.raises(BadExample, match="a message holds"):
        open_source(str(tmp_path / "a.tar"))[0]
