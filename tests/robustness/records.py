"""Data records: every layout and kind of file, spoilt -> `open_source(...)[i]`, the loader."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from tests.robustness.judge import SECRET, Case, Surroundings
from tests.robustness.mutate import ODD_NAMES, hostile_values, some_bytes, some_json
from tests.robustness.pictures import drawn

MOST = 6  # records of a file that are read


def valid_records() -> list[dict[str, Any]]:
    """One or more of each layout; their picture is ``a.png``."""
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    points = [{"x": 3, "y": 4}, {"x": 1.5, "y": 0, "label": "dog", "image": 1}]
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    address = "https://example.org/a.png"
    return [
        {"image": "a.png", "question": "What?", "answer": "A cat."},
        {"image": "a.png", "caption": "A cat."},
        {"image": "a.png", "question": "Where?", "points": points, "label": "cat", "mode": "point"},
        {"images": ["a.png", "a.png"], "messages": turns},
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
                turns[1],
            ],
        },
        {
            "image": "a.png",
            "branches": [
                {"messages": turns, "task": "t", "truth": {"n": 1}},
                {"question": "a", "answer": "b"},
            ],
        },
        {
            "video": {"frames": ["a.png", "a.png"], "times": [0, 0.5]},
            "question": "a",
            "answer": "b",
        },
        {"video": "a.gif", "question": "a", "points": [{"x": 1, "y": 1, "time": 0.5}]},
        {"question": "No picture?", "answer": "None."},
        {"image": "a.png", "conversations": said, "id": 7},
        {
            "image": ["a.png", "a.png"],
            "conversations": [{"from": "human", "value": "<image> and <image>"}, said[1]],
        },
        {"images": ["a.png"], "texts": [{"user": "a", "assistant": "b", "source": "c"}]},
        {"image_url": address, "caption": "A cat.", "transcripts": ["It is a cat", ""]},
        {
            "image_url": address,
            "label": "cats",
            "points": [{"x": 50, "y": 10.5}],
            "count": 1,
            "collection_method": "counting",
            "image_sha256": "0" * 64,
        },
        {
            "image": "a.png",
            "questions": ["a"],
            "answer_points": [{"x": [1, 2], "y": [3, 4]}],
            "names": ["b"],
        },
    ]


@lru_cache(maxsize=1)
def picture_bytes() -> bytes:
    stream = io.BytesIO()
    drawn("RGB", (12, 10)).save(stream, "PNG")
    return stream.getvalue()


@lru_cache(maxsize=1)
def animation_bytes() -> bytes:
    stream = io.BytesIO()
    frames = [drawn("P", (12, 10), seed) for seed in range(3)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=500)
    return stream.getvalue()


def _hostile(rng: random.Random, here: Path, around: Surroundings) -> Any:
    """A value, more often than elsewhere a path."""
    if rng.random() < 0.6:
        return hostile_values(rng)
    return rng.choice(
        [
            *(
                "/dev/zero",
                "/dev/null",
                "/dev/stdin",
                "/proc/self/environ",
                "/proc/kmsg",
                "pipe.png",
            ),
            *("/proc/self/fd/0", "../outside/secret.txt", "../outside/pipe", "../outside/loud.png"),
            *(f"{around.outside}/secret.txt", f"{around.outside}/loud.png", "link.png", "loop.png"),
            *(
                "file:///dev/zero",
                f"file://{around.outside}/secret.txt",
                "http://\ud800",
                "https://",
            ),
            *(
                "data:image/png;base64,AAAA",
                ".",
                "",
                "a.png/",
                "./a.png",
                "a.gif",
                "r.jsonl",
                "a\0.png",
            ),
            *("x" * 300, "x/" * 3000, "~", "~root/a.png", "\ud800.png", *ODD_NAMES[:12]),
            *({"bytes": "AAAA"}, {"path": "a.png"}, {"bytes": None, "path": None}, {"bytes": 5}),
            *({"frames": ["a.png"] * 3, "times": [0, 0, 0]}, {"frames": [], "times": []}),
            *(
                {"frames": ["a.png"], "times": float("nan")},
                {"frames": ["a.png"], "times": 10**400},
            ),
            *([["a.png"]], ["a.png"] * 70, [{"x": 1e300, "y": 1, "time": 10**400}], "<image>" * 9),
        ]
    )


def some_file(rng: random.Random, place: Path, around: Surroundings) -> tuple[Path | str, str]:
    """A file of records with its surroundings in a new folder, and what kind it is."""
    draw = rng.random()
    place.mkdir()
    (place / "a.png").write_bytes(picture_bytes())
    (place / "a.gif").write_bytes(animation_bytes())
    _surprises(place, around)
    if draw < 0.65:
        return _lines(rng, place, around), "lines"
    if draw < 0.7:
        return _spoilt_text_file(rng, place), "text"
    if draw < 0.82:
        return parquet(rng, place, around), "parquet"
    if draw < 0.97:
        return tar(rng, place, around), "tar"
    return _strange_path(rng, place, around), "path"


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    place = here / "data"
    path, what = some_file(rng, place, around)
    closed = what == "tar"
    names = (str(path), str(place), *ODD_NAMES)
    if rng.random() < 0.12:
        return Case(f"loader, {what}", lambda: load(path), names=names, closed=closed)
    if rng.random() < 0.1:
        return Case(f"audit, {what}", lambda: audit_of(path), check_report, names, closed)
    return Case(what, lambda: read(path), check_read(names), names, closed)


def _surprises(place: Path, around: Surroundings) -> None:
    os.mkfifo(place / "pipe.png")
    (place / "link.png").symlink_to(around.outside / "secret.txt")
    (place / "loop.png").symlink_to(place / "loop.png")


# ---- files ----


def _lines(rng: random.Random, place: Path, around: Surroundings) -> Path:
    records = [
        some_json(rng, rng.choice(valid_records()), lambda r: _hostile(r, place, around))
        for _ in range(rng.choice((1, 1, 2, 3)))
    ]
    if rng.random() < 0.1:
        path = place / "r.json"
        path.write_text(json.dumps(records))
        return path
    path = place / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _spoilt_text_file(rng: random.Random, place: Path) -> Path:
    """JSON that is none, or in another encoding."""
    text = "".join(json.dumps(record) + "\n" for record in rng.sample(valid_records(), 3))
    data = text.encode(rng.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig", "utf-32")))
    if rng.random() < 0.8:
        data = some_bytes(rng, data, [picture_bytes(), b"[" * 5000, b'{"a":' * 5000, b"1" * 5000])
    path = place / rng.choice(("r.jsonl", "r.json"))
    path.write_bytes(data)
    return path


def parquet(rng: random.Random, place: Path, around: Surroundings) -> Path:
    """Columns of many types; half the files have spoilt bytes."""
    import pyarrow
    from pyarrow import parquet

    image = {"bytes": picture_bytes(), "path": rng.choice(("a.png", None, "../outside/secret.txt"))}
    rows: dict[str, Any] = {"image": [image, image], "question": ["a", "b"], "answer": ["c", "d"]}
    if rng.random() < 0.3:
        rows = {"images": [[image], [image]], "texts": [[{"user": "a", "assistant": "b"}]] * 2}
    plain = dict(rows)
    types = [
        *(
            pyarrow.timestamp("s"),
            pyarrow.timestamp("ns", "UTC"),
            pyarrow.date64(),
            pyarrow.time64("ns"),
        ),
        *(pyarrow.duration("s"), pyarrow.int64(), pyarrow.uint64(), pyarrow.date32()),
    ]
    if rng.random() < 0.5:
        values = pyarrow.array(
            [rng.choice((1, -1, (1 << 31) - 1)) for _ in range(2)], pyarrow.int64()
        )
        if rng.random() < 0.5:
            values = pyarrow.array([(1 << 62) * rng.choice((1, -1))] * 2, pyarrow.int64())
        with contextlib.suppress(pyarrow.ArrowException):  # types of other widths
            values = values.cast(rng.choice(types), safe=False)
        rows[rng.choice(("when", "answer", "question", "id", "image"))] = values
    path = place / "r.parquet"
    packing = rng.choice(("none", "zstd", "snappy"))
    try:
        parquet.write_table(pyarrow.table(rows), path, compression=packing)
    except pyarrow.ArrowException:  # seconds that do not fit into the milliseconds of the file
        parquet.write_table(pyarrow.table(plain), path, compression=packing)
    if rng.random() < 0.6:
        data = path.read_bytes()
        if rng.random() < 0.5:  # the footer, where the numbers are
            start = max(0, len(data) - 900)
            data = data[:start] + some_bytes(rng, data[start:-8], [data]) + data[-8:]
        else:
            data = some_bytes(rng, data, [picture_bytes()])
        path.write_bytes(data)
    return path


def tar(rng: random.Random, place: Path, around: Surroundings) -> Path:
    stream = io.BytesIO()
    format = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for number in range(rng.choice((1, 2))):
            record = rng.choice(valid_records())
            if rng.random() < 0.7:
                record = some_json(rng, record, lambda r: _hostile(r, place, around))
            text = json.dumps(record).encode()
            members = [(f"{number}.json", text), (f"{number}.png", picture_bytes())]
            if rng.random() < 0.4:
                members = [members[0]]
            for name, content in members:
                info = tarfile.TarInfo(_odd_member(rng, name, around))
                info.size = len(content)
                if rng.random() < 0.1:
                    info.type = rng.choice(
                        (
                            tarfile.SYMTYPE,
                            tarfile.LNKTYPE,
                            tarfile.FIFOTYPE,
                            tarfile.CHRTYPE,
                            tarfile.DIRTYPE,
                            tarfile.GNUTYPE_SPARSE,
                        )
                    )
                    info.linkname = rng.choice(
                        (f"{around.outside}/secret.txt", "../a.png", "x" * 99)
                    )
                    info.size = 0 if info.type != tarfile.GNUTYPE_SPARSE else len(content)
                if format == tarfile.PAX_FORMAT and rng.random() < 0.2:
                    info.pax_headers = {
                        rng.choice(
                            (
                                "size",
                                "path",
                                "GNU.sparse.size",
                                "mtime",
                                "GNU.sparse.map",
                                "GNU.sparse.major",
                                "linkpath",
                                "hdrcharset",
                            )
                        ): rng.choice(("-1", "9" * 30, "nan", "../x", "0,1", "1", "BINARY"))
                    }
                archive.addfile(info, io.BytesIO(content) if info.size else None)
    data = stream.getvalue()
    if rng.random() < 0.6:
        data = _spoilt_tar(rng, data)
    path = place / "r.tar"
    path.write_bytes(data)
    return path


def _odd_member(rng: random.Random, name: str, around: Surroundings) -> str:
    if rng.random() < 0.8:
        return name
    suffix = Path(name).suffix
    return rng.choice(
        (
            f"../outside/secret{suffix}",
            f"{around.outside}/loud{suffix}",
            f"a\0b{suffix}",
            f"é\x1b[2J{suffix}",
            f"{'x' * 90}{suffix}",
            f".{suffix}",
            f"7.0.1{suffix}",
            f"7.{'9' * 50}{suffix}",
            "0.PNG",
            "0.0.png",
        )
    )


def _spoilt_tar(rng: random.Random, data: bytes) -> bytes:
    """A header's number or kind becomes another, with a right checksum, or bytes anywhere."""
    if rng.random() < 0.3:
        return some_bytes(rng, data, [picture_bytes()])
    header = bytearray(data[:512])
    start, length = rng.choice(
        (
            (124, 12),
            (124, 12),
            (100, 8),
            (136, 12),
            (156, 1),
            (257, 8),
            (345, 40),
            (386, 100),
            (482, 30),
        )
    )
    value = rng.choice(
        (
            b"77777777777\0",
            b"\x80\0\0\0\x40\0\0\0\0\0\0\0",
            b"\xff" * 12,
            b"-0000000001\0",
            b"\0" * 12,
            b"S",
            b"L",
            b"x",
            b"1",
            b"4",
            b"99999999999",
            rng.randbytes(12),
        )
    )
    header[start : start + length] = value[:length].ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) & 0o777777)
    return bytes(header) + data[512:]


def _strange_path(rng: random.Random, place: Path, around: Surroundings) -> Path | str:
    (place / "x.jsonl").write_text(json.dumps(valid_records()[0]))
    (place / "link.jsonl").symlink_to(around.outside / "secret.txt")
    os.mkfifo(place / "pipe.jsonl")
    os.mkfifo(place / "pipe.tar")
    os.mkfifo(place / "pipe.parquet")
    os.mkfifo(place / "pipe.json")
    (place / "folder.jsonl").mkdir()
    (place / "zero.tar").symlink_to("/dev/zero")
    (place / "empty.parquet").write_bytes(b"")
    names = ["link.jsonl", "pipe.jsonl", "pipe.tar", "pipe.parquet", "pipe.json", "folder.jsonl"]
    names += [
        "zero.tar",
        "empty.parquet",
        "*.jsonl",
        "[",
        "**",
        "x.jsonl/",
        "missing.jsonl",
        "?" * 50,
    ]
    return rng.choice(
        [
            *(place / name for name in names),
            place,
            "",
            "\0",
            "x" * 5000,
            "/dev/zero",
            "/proc",
            "~",
            "*",
        ]
    )


# ---- readers ----


@lru_cache(maxsize=1)
def encoder() -> Any:
    from nanomolmo2.processor import Processor, ProcessorConfig
    from nanomolmo2.processor.config import VideoConfig
    from nanomolmo2.processor.encode import EncodeTree
    from tests.small_model import small_processor

    small = small_processor()
    config = ProcessorConfig.molmo2(image_size=64, image_tokens=4, video=VideoConfig(max_frames=8))
    return EncodeTree(Processor(config, small.tokenizer))


def read(path: Any) -> list[Any]:
    """Every record, as training reads it; `BadExample` for those that are bad."""
    from nanomolmo2.data.example import BadExample
    from nanomolmo2.data.inspect import read_record
    from nanomolmo2.data.sources import open_source

    source = open_source(path)
    found: list[Any] = []
    for i in range(min(len(source), MOST)):
        try:
            found.append(read_record(source, i, encoder()))
        except BadExample as bad:
            found.append(bad)
    return found


def check_read(names: tuple[str, ...]) -> Callable[[list[Any]], str | None]:
    def check(found: list[Any]) -> str | None:
        from nanomolmo2.data.example import BadExample
        from tests.robustness.judge import problems_of

        for one in found:
            if isinstance(one, BadExample):
                if problems := problems_of(one, names):
                    return f"as a bad example: {problems[0]}"
            elif SECRET in str(one.example.branches):
                return "holds the content of a file outside"
        return None

    return check


def load(path: Any) -> Any:
    """Two steps of the loader, with good records beside; only too many bad ones may end it."""
    from nanomolmo2.data.example import BadExample, Branch, Example
    from nanomolmo2.data.loader import PackedLoader, RowPlan
    from nanomolmo2.data.mixture import Mixture
    from nanomolmo2.data.sources import open_source

    class Good:
        name = "good"

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Example:
            return Example(
                [],
                [Branch([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])],
            )

    source = open_source(path)
    mixture = Mixture([source, Good()], [0.5, 0.5])
    rows = RowPlan(2, 200, 6, 0, packing_buffer=2)
    steps = iter(PackedLoader(mixture, encoder(), rows, max_bad_fraction=0.99))
    try:
        return [next(steps) for _ in range(3)]
    except BadExample as bad:
        raise AssertionError(f"a bad example ended the training: {bad}") from None


def audit_of(path: Any) -> Any:
    from nanomolmo2.data.audit import audit
    from nanomolmo2.data.sources import open_source

    return audit(open_source(path), encoder(), encoder().processor, max_tokens=200, limit=MOST)


def check_report(report: Any) -> str | None:
    for finding in report.findings:
        if SECRET[:8] in finding.detail:
            return f"the audit quotes a file outside: {finding.detail[:200]!r}"
    return None


# ---- what was once found ----


def _line(
    record: str, *, files: Callable[[Path], Any] = lambda place: None
) -> Callable[[Path, Surroundings], Case]:
    def build(here: Path, around: Surroundings) -> Case:
        place = here / "data"
        place.mkdir()
        (place / "a.png").write_bytes(picture_bytes())
        _surprises(place, around)
        files(place)
        text = record.replace("OUTSIDE", str(around.outside))
        (place / "r.jsonl").write_text(text + "\n")
        path = place / "r.jsonl"
        names = (str(path), str(place))
        return Case("found before", lambda: read(path), check_read(names), names)

    return build


def _tar_to_outside(here: Path, around: Surroundings) -> Case:
    path = here / "r.tar"
    with tarfile.open(path, "w") as archive:
        for name in (f"{around.outside}/loud.png", "../outside/loud.png"):
            text = json.dumps({"image": name, "question": "a", "answer": "b"}).encode()
            info = tarfile.TarInfo(f"{len(name)}.json")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return Case(
        "found before", lambda: read(path), check_read((str(path),)), (str(path),), closed=True
    )


def _unused_columns(here: Path, around: Surroundings) -> Case:
    """Columns that no layout knows, of 600 MB, in a file of 60 kB."""
    import pyarrow
    from pyarrow import parquet

    long = pyarrow.array(["x" * 6_000_000]).dictionary_encode()
    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100), long.dictionary)
    table = pyarrow.table({"question": ["a"] * 100, "answer": ["b"] * 100, "unused": long})
    parquet.write_table(table, here / "r.parquet", compression="zstd")
    path = here / "r.parquet"
    return Case("found before", lambda: read(path), check_read(()), (str(path),))


FOUND: dict[str, Callable[[Path, Surroundings], Case]] = {
    "a device with a checksum": _line(
        '{"image": "/dev/zero", "image_sha256": "00", "caption": "a", "image_url": "x"}'
    ),
    "a pipe with a checksum": _line(
        '{"image": "pipe.png", "image_sha256": "00", "caption": "a", "image_url": "x"}'
    ),
    "a speaker that is a list": _line('{"conversations": [{"from": [], "value": "a"}]}'),
    "half a pair in an address": _line(
        r'{"image": "http://\ud800", "question": "a", "answer": "b"}'
    ),
    "a path of 300 letters": _line(f'{{"image": "{"x" * 300}", "question": "a", "answer": "b"}}'),
    "a video of 300 letters": _line(f'{{"video": "{"x" * 300}", "question": "a", "answer": "b"}}'),
    "a time of 400 digits": _line(
        f'{{"video": {{"frames": ["a.png"], "times": [1{"0" * 400}]}}, "question": "a"}}'
    ),
    "a text file as a picture": _line(
        '{"image": "OUTSIDE/secret.txt", "question": "a", "answer": "b"}'
    ),
    "a text file through a link": _line('{"image": "link.png", "question": "a", "answer": "b"}'),
    "one picture sixty times": _line(
        json.dumps({"images": ["big.png"] * 60, "question": "a", "answer": "b"}),
        files=lambda place: Image.new("RGB", (5000, 5000)).save(place / "big.png"),
    ),
    "a tar that names files outside": _tar_to_outside,
    "unused columns": _unused_columns,
}
