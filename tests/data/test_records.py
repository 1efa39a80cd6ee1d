"""Files of records: any record by its number, from files made on the spot."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
import time
import tracemalloc
import types
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomolmo2.data import records
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.fields import READ, unread_fields
from nanomolmo2.data.records import HubRows, JsonLines, Parquet, Tar, open_rows

VALUES = [{"n": n, "text": "ä" * n} for n in range(7)]


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path: Path, values: list[dict], group: int = 3) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=group)
    return path


def write_lines(path: Path, values: list) -> Path:
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


def write(kind: str, folder: Path) -> Path:
    """The VALUES as a file of a kind."""
    path = folder / f"records.{kind}"
    if kind == "jsonl":
        return write_lines(path, VALUES)
    if kind == "json":
        path.write_text(json.dumps(VALUES))
        return path
    if kind == "parquet":
        return write_parquet(path, VALUES)
    return write_tar(path, {f"{v['n']}.json": json.dumps(v).encode() for v in VALUES})


KINDS = pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tar"])


@KINDS
def test_any_record_in_any_order(kind, tmp_path):
    rows = open_rows(str(write(kind, tmp_path)))
    assert len(rows) == 7
    for n in (6, 0, 3, 2, 5, 4, 1, 6):
        assert rows[n].values == VALUES[n]
        assert rows[n].folder == tmp_path
        assert str(tmp_path / f"records.{kind}") in rows[n].where


@KINDS
def test_it_can_be_pickled_and_forked(kind, tmp_path):
    rows = open_rows(str(write(kind, tmp_path)))
    assert rows[3].values == VALUES[3]
    assert pickle.loads(pickle.dumps(rows))[5].values == VALUES[5]
    child = os.fork()
    if child == 0:
        os._exit(0 if [rows[n].values for n in range(7)] == VALUES else 1)
    assert [rows[n].values for n in range(7)] == VALUES
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@given(
    lines=st.lists(st.sampled_from(["", " ", "\r", '{"n": 1}', ' {"n": 2}', "x" * 9]), max_size=9),
    end=st.booleans(),
    block=st.integers(1, 12),
)
def test_lines_are_found_wherever_blocks_end(lines, end, block, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(lines) + "\n" * end, newline="")
    with mock.patch.object(records, "BLOCK", block):
        rows = JsonLines(path)
    found = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    assert list(rows._numbers) == [number for number, _ in found]
    data = path.read_bytes()
    assert [data[s:].split(b"\n")[0] for s in rows._starts] == [line for _, line in found]


def test_a_file_of_line_feeds_is_read_in_no_time(tmp_path):
    """300 MB of them took more than a minute."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 60_000_000 + b'{"n": 0}')
    began = time.process_time()
    rows = JsonLines(path)
    assert time.process_time() - began < 10
    assert len(rows) == 1 and rows[0].where.endswith("line 60000001")


@given(blank=st.lists(st.sampled_from(["", "  ", "\t", "\r"]), max_size=5), end=st.booleans())
def test_blank_lines_and_a_missing_last_newline(blank, end, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = "\n".join([*blank, '{"n": 0}', *blank, '{"n": 1}']) + ("\n" if end else "")
    path.write_bytes(text.encode())
    rows = JsonLines(path)
    assert [rows[i].values["n"] for i in range(len(rows))] == [0, 1]
    assert rows[1].where.endswith(f"line {2 * len(blank) + 2}")


@pytest.mark.parametrize("line", ["{", "[1]", "null", '"text"', "\ufeff{", "[" * 100_000])
def test_a_line_that_is_no_object(line, tmp_path):
    """One broken line is one bad example, and says which; the others are read."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"n": 0}}\n{line}\n{{"n": 2}}\n', encoding="utf-8")
    rows = JsonLines(path)
    assert rows[2].values == {"n": 2}
    with pytest.raises(BadExample, match=r"bad record: .*a\.jsonl, line 2") as error:
        rows[1]
    assert error.value.cause == "bad record"
    assert pickle.loads(pickle.dumps(error.value)).detail == error.value.detail


def test_a_list_with_something_else_in_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"n": 0}, 5]')
    with pytest.raises(BadExample, match="record 1: found int"):
        open_rows(str(path))[1]


@pytest.mark.parametrize("text", ["{}", "[", "5"])
def test_json_that_is_no_list(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        open_rows(str(path))


@pytest.mark.parametrize("item", ["{}", "[]", '"aa"', '{"x":1}'])
def test_a_list_that_says_little_and_takes_much_is_not_read(item, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LIST", 2**20)
    path = tmp_path / "a.json"
    path.write_text(f"[{','.join([item] * 40_000)}]")
    with pytest.raises(ValueError, match="too much memory: write one object a line"):
        open_rows(str(path))


def test_a_list_may_be_long_and_begin_with_a_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LIST", 2**16)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "ä" * 300}] * 500), encoding="utf-8-sig")
    assert len(open_rows(str(path))) == 500
    assert open_rows(str(path))[7].values == {"text": "ä" * 300}


def test_parquet_reads_the_row_group_only_once(tmp_path, monkeypatch):
    rows = Parquet(write_parquet(tmp_path / "a.parquet", VALUES))
    read = []
    monkeypatch.setattr(
        type(rows._file),
        "read_row_group",
        lambda file, group, **_: read.append(group) or pyarrow.table({"n": [0, 1, 2]}),
    )
    for n in (0, 1, 2, 0, 4, 1):
        rows[n]
    assert read == [0, 1]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_files_that_are_something_else(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"something else " * 100)
    with pytest.raises(ValueError, match=rf"a\.{kind} .*copy it again"):
        open_rows(str(path))


def test_a_parquet_file_that_was_damaged_later(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "x" * 1000}] * 7, group=2)
    rows = Parquet(path)
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(BadExample, match=r"a\.parquet, row 1 cannot be read"):
        pickle.loads(pickle.dumps(rows))[1]


def test_tar_members_of_one_key_are_one_record(tmp_path):
    members = {
        "a/1.json": b'{"image": "elsewhere.jpg", "question": "?"}',
        "a/1.jpg": b"one",
        "a/2.10.png": b"ten",
        "a/2.2.PNG": b"two",
        "a/2.txt": b" a dog\n",
        "a/2.seg.png": b"a mask",
        "b/1.jpg": b"other folder",
        "b/1.pyd": b"never read",
        "a/.hidden.jpg": b"",
        "3.cls": b"5",
    }
    rows = Tar(write_tar(tmp_path / "a.tar", members))
    assert [rows[i].values for i in range(len(rows))] == [
        {"question": "?", "images": [b"one"]},
        {"caption": "a dog", "images": [b"two", b"ten"]},
        {"images": [b"other folder"]},
        {},
    ]
    assert rows[2].where.endswith("a.tar, key b/1")


def test_a_compressed_tar_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="gunzip"):
        Tar(write_tar(tmp_path / "a.tar", {"1.txt": b"x"}, "w:gz"))


def test_a_tar_that_breaks_off(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.txt": b"x" * 2000, "2.txt": b"y" * 2000})
    path.write_bytes(path.read_bytes()[:3500])
    with pytest.raises(ValueError, match="copy it again"):
        Tar(path)


def test_a_folder_and_a_pattern(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-0.parquet", VALUES[:3])
    write_parquet(tmp_path / "data" / "train-1.parquet", VALUES[3:])
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    for spec in (tmp_path, tmp_path / "data" / "train-*.parquet"):
        rows = open_rows(str(spec))
        assert [rows[n].values for n in range(len(rows))] == VALUES
        assert "train-1.parquet, row 0" in rows[3].where
    write_parquet(tmp_path / "data" / "validation-0.parquet", VALUES)
    with pytest.raises(ValueError, match=r"splits train, validation.*train-\*\.parquet"):
        open_rows(str(tmp_path))
    write_lines(tmp_path / "more.jsonl", VALUES)
    with pytest.raises(ValueError, match=r"found \.jsonl, \.parquet, expected files of one"):
        open_rows(str(tmp_path))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "none-*.tar", ""])
def test_files_of_no_known_kind(name, tmp_path):
    if name and "*" not in name:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="expected files of one of the kinds"):
        open_rows(str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_rows(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [("a.parquet", "pyarrow.parquet", "data"), ("hub:some/set", "datasets", "hub-data")],
)
def test_an_extra_that_is_not_installed(spec, package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    with pytest.raises(ImportError, match=rf"nanomolmo2\[{extra}\]"):
        open_rows(spec)


class FakeStream:
    """Stands for datasets.IterableDataset; counts what was asked of it."""

    def __init__(self, rows: list[dict], log: list[str]) -> None:
        self.rows, self.log, self.decoding = rows, log, True

    def decode(self, enable: bool) -> FakeStream:
        self.decoding = enable
        return self

    def __iter__(self):
        assert not self.decoding, "pictures were decoded"
        for row in self.rows:
            self.log.append(f"row {row['n']}")
            yield row


@pytest.fixture
def hub(monkeypatch) -> list[str]:
    """A module `datasets` with one data set of three rows that says it has four."""
    log: list[str] = []
    rows = [{"n": n, "images": [{"bytes": bytes([n, 255]), "path": None}]} for n in range(3)]

    def load_dataset_builder(name, subset):
        log.append(f"info of {name} {subset}")
        info = types.SimpleNamespace(
            splits={"train": types.SimpleNamespace(num_examples=4), "test": None}
        )
        return types.SimpleNamespace(info=info)

    def load_dataset(name, subset, split, streaming):
        assert streaming
        log.append(f"stream of {name} {subset} {split}")
        return FakeStream(rows, log)

    fake = types.ModuleType("datasets")
    fake.load_dataset_builder, fake.load_dataset = load_dataset_builder, load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return log


def test_hub_rows_come_once_and_as_bytes(hub):
    rows = open_rows("hub:some/set", subset="part")
    assert len(rows) == 4
    assert hub == ["info of some/set part"]
    assert rows[1].values == {"n": 1, "images": [{"bytes": b"\x01\xff", "path": None}]}
    assert rows[0].values["n"] == 0
    assert rows[2].values["images"][0]["bytes"] == b"\x02\xff"
    assert hub[1:] == ["stream of some/set part train", "row 0", "row 1", "row 2"]
    with pytest.raises(BadExample, match="row 3: the stream ends"):
        rows[3]
    assert pickle.loads(pickle.dumps(rows))[2].values["n"] == 2
    assert hub.count("stream of some/set part train") == 2  # a process has a stream of its own


def test_a_hub_split_without_a_size(hub):
    with pytest.raises(ValueError, match="lists train, test"):
        HubRows("some/set", split="validation")


# ---- what is too large, or no file ----


def test_a_line_longer_than_the_memory_is_bad_before_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"n": 0}\n')
        stream.truncate(400_000_000)  # a hole: nothing lies on the disk
        stream.seek(0, os.SEEK_END)
        stream.write(b'\n{"n": 2}\n')
    tracemalloc.start()
    rows = JsonLines(path)
    assert (len(rows), rows[0].values, rows[2].values) == (3, {"n": 0}, {"n": 2})
    with pytest.raises(BadExample, match="line 2 is longer than"):
        rows[1]
    assert tracemalloc.get_traced_memory()[1] < 3 * records.MAX_TEXT
    tracemalloc.stop()
    assert rows[2].where.endswith("line 3")


def test_long_lines_are_lines(tmp_path):
    values = [{"text": "x" * n} for n in (0, 65_520, 65_536, 200_000, 1)]
    rows = JsonLines(write_lines(tmp_path / "a.jsonl", values))
    assert [rows[i].values for i in range(len(rows))] == values


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tar"])
def test_only_regular_files_hold_records(kind, tmp_path):
    pipe = tmp_path / f"pipe.{kind}"
    os.mkfifo(pipe)
    device = tmp_path / f"device.{kind}"
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        with pytest.raises(ValueError, match="is a device or a pipe, expected a regular file"):
            open_rows(str(path))


def test_columns_of_no_use_are_not_loaded(tmp_path):
    """Few bytes of a file can be gigabytes: one text that all rows share."""
    text = pyarrow.array(["x" * 2_000_000])
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), text)
    said = pyarrow.array([f"question {n}" for n in range(300)])
    table = pyarrow.table({"question": said, "answer": said, "padding": shared})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 100_000
    rows = open_rows(str(path), fields={"question", "answer"})
    assert rows[7].values == {"question": "question 7", "answer": "question 7"}
    assert rows._group(0).nbytes < 100_000
    assert rows[7].unread.keys() == {"padding"}
    every = open_rows(str(path))
    assert len(every[299].values["padding"]) == 2_000_000
    assert every._group(0).nbytes < 10_000_000  # the text is there once


def test_texts_that_rows_share_within_lists_are_held_once(tmp_path):
    turn = {"user": "u" * 1_000_000, "assistant": "a"}
    values = [{"texts": [turn], "image": {"bytes": b"b" * 1_000_000, "path": "p"}}] * 50
    rows = Parquet(write_parquet(tmp_path / "a.parquet", values, group=50))
    assert rows[49].values == values[0]
    assert rows._group(0).nbytes < 10_000_000


@pytest.mark.parametrize("limit", ["MAX_GROUP", "MAX_TEXTS"])
def test_a_row_group_that_is_too_large_is_bad_before_it_is_read(limit, tmp_path, monkeypatch):
    values = [{"question": f"{n}" * 5000} for n in range(4)]
    path = write_parquet(tmp_path / "a.parquet", values, group=2)
    monkeypatch.setattr(records, limit, 9_000)
    rows = Parquet(path)
    with pytest.raises(BadExample, match=r"row 3: its row group has .* smaller row groups"):
        rows[3]
    monkeypatch.setattr(records, limit, 50_000)
    assert rows[3].values == values[3]


def test_columns_are_known_by_their_types(tmp_path):
    values = [{"question": "?", "photo": {"bytes": b"x", "path": "a"}, "n": 1, "note": "x"}]
    rows = open_rows(str(write_parquet(tmp_path / "a.parquet", values)), fields=READ)
    found = unread_fields({**rows[0].values, **rows[0].unread}, "own")
    assert found == (["photo"], ["n", "note"])
    none = open_rows(str(write_parquet(tmp_path / "b.parquet", [{"n": 1}])), fields=READ)
    assert none[0].values == {}


def sparse_tar(path: Path, size: int) -> None:
    """A tar of three records; in GNU's old format the second has holes and claims ``size``."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("1.txt", "2.txt", "3.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"hello"))
    data = bytearray(path.read_bytes())
    head = data[1024:1536]
    head[156:157] = b"S"
    head[257:265] = b"ustar  \0"
    head[386:398], head[398:410] = b"00000000000\0", b"00000000005\0"  # the one piece it has
    head[483:495] = b"\x80" + size.to_bytes(11, "big")  # its size with holes
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    data[1024:1536] = head
    path.write_bytes(data)


@pytest.mark.parametrize("size", [2**62, 6, 10**12])
def test_a_tar_member_with_holes_is_one_bad_record(size, tmp_path):
    sparse_tar(tmp_path / "a.tar", size)
    rows = Tar(tmp_path / "a.tar")
    assert [rows[i].values for i in (0, 2)] == [{"caption": "hello"}] * 2
    with pytest.raises(BadExample, match=r"key 2: its \.txt is stored with holes"):
        rows[1]


def test_links_and_large_members_of_a_tar_are_bad_records(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("1.txt", "2.txt", "3.txt", "4.txt", "4.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 50 if name == "3.txt" else 5
            tar.addfile(info, io.BytesIO(b"hello" * 10))
    monkeypatch.setattr(records, "MAX_TEXT", 49)
    rows = Tar(path)
    for i, message in ((0, "link"), (1, "link"), (2, "has 50 bytes, expected at most 49")):
        with pytest.raises(BadExample, match=message) as error:
            rows[i]
        assert "passwd" not in error.value.detail
    assert rows[3].values == {"caption": "hello"}
    assert rows[3].unread == {".mp4": "a.mp4"}
    assert rows[3].confined


# ---- lines in a .json file ----


@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_json_lines_by_the_name_of_json(end, tmp_path):
    path = tmp_path / "a.json"
    values = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    path.write_text("\n".join(map(json.dumps, values)) + end)
    rows = open_rows(str(path))
    assert [rows[i].values for i in range(len(rows))] == values
    path.write_text(json.dumps(values[0]) + end)
    assert open_rows(str(path))[0].values == values[0]
    path.write_text("\n \n" + "\n".join(map(json.dumps, VALUES)) + end)
    assert len(open_rows(str(path))) == 7
    path.write_text(json.dumps(values[0]) + '\n{"question":\n')
    rows = open_rows(str(path))
    with pytest.raises(BadExample, match="line 2 is not valid JSON"):
        rows[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "question": "a",\n "answer": "b"\n}', "found dict: put the records into a list"),
        ('{"data": [{"question": "a"}]}', "found dict: put the records into a list"),
        ('[{"question": "a"}', "neither one JSON list nor one object a line"),
        ("question,answer\n", "neither one JSON list nor one object a line"),
        ("", "neither one JSON list nor one object a line"),
    ],
)
def test_json_that_is_neither(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        open_rows(str(path))
    assert "question" not in str(error.value)
