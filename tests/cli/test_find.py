"""``nanomolmo2 find``: what it prints, draws and writes, and how it goes on where it was ended.

What is found depends on the size of a photo alone (`look_for`): a thing every 40 pixels.
"""

from __future__ import annotations

import csv
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2 import VLM, cli
from nanomolmo2.cli import find
from nanomolmo2.cli.find import photos_of
from nanomolmo2.cli.find_overlays import is_overlay, overlay_paths
from nanomolmo2.cli.find_table import COLUMNS, Found, Mark, Table, cell_of
from nanomolmo2.generation import finding
from nanomolmo2.generation.finding import Found as Candidate
from nanomolmo2.generation.finding import Seen
from tests.find_model import find_net, find_vlm

ROOT = Path(__file__).parents[2]
SIZES = {"a.png": 80, "b.jpg": 160, "c.webp": 30, "d.png": 120}
COUNTS = {"a.png": 2, "b.jpg": 4, "c.webp": 0, "d.png": 3}
Says = Callable[..., tuple[int, str, str]]


def look_for(model: object, pictures: Sequence[Seen], *_: object) -> list[list[Candidate]]:
    """A thing every 40 pixels, in its middle, 20 pixels large; the last is unlikely."""
    return [
        [Candidate(40 * i + 20, 20, 20, 0.9 - i / 10) for i in range(width // 40)]
        + [Candidate(3, 3, 4, 0.3)]
        for width, _ in (picture.size for picture in pictures)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finds") / "model"
    vlm = find_vlm()
    find_net().save_pretrained(folder, processor=vlm.processor)
    return folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a reference, and a folder of photos and of what is none."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 40), "gray").save("ref.png")
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (name, width) in enumerate(SIZES.items()):
        Image.new("RGB", (width, 40), (10 * i, 90, 40)).save(folder / name)
    Image.new("RGB", (80, 40)).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("of the photos")
    (folder / "deeper").mkdir()
    Image.new("RGB", (80, 40)).save(folder / "deeper" / "e.png")
    return folder


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Says:
    """``says("photo.png", ...)``: exit code, standard output and standard error of `find`."""
    vlm = find_vlm()
    given: list[dict[str, Any]] = []

    def load(name: str, cache_dir: Path, **options: Any) -> VLM:
        given.append(options)
        return vlm

    monkeypatch.setattr(find, "load_pipeline", load)
    monkeypatch.setattr(finding, "look_for", look_for)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["find", *arguments])
        assert all(options["reuse_bytes"] == find.REUSE_BYTES for options in given)
        return code, *capsys.readouterr()

    return call


IN_REF = ("--at", "20,20", "--in", "ref.png")


def rows_of(path: Path | str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# ---- one photo ----


def test_one_photo(says: Says, photos: Path) -> None:
    code, out, err = says("photos/a.png", "--at", "20,20")
    assert code == 0
    assert out.splitlines() == [
        "photos/a.png: 2",
        "   1  20.0,20.0  confidence 1.00",
        "   2  60.0,20.0  confidence 0.84",
    ]
    assert err == ""


def test_one_photo_as_json(says: Says, photos: Path) -> None:
    code, out, _ = says("photos/a.png", "--at", "20,20", "--not", "60.5,20", "--json")
    report = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert (report["photo"], report["model"]) == ("photos/a.png", "tiny")
    assert (report["at"], report["not"], "in" in report) == ([[20, 20]], [[60.5, 20]], False)
    assert report["count"] == 1  # the other one is not meant
    (point,) = report["points"]
    assert point == {
        "image": 1,
        "id": 1,
        "label": "thing",
        "x": 20,
        "y": 20,
        "x_thousandths": 250,
        "y_thousandths": 500,
        "confidence": 1.0,
        "size": 20,
    }
    assert report["images"] == [{"path": "photos/a.png", "width": 80, "height": 40}]
    assert report["problems"][0].startswith("nothing like the example was found beside")


def test_problems_are_notes(says: Says, photos: Path) -> None:
    code, out, err = says("photos/c.webp", "--at", "20,20")
    assert (code, out) == (0, "photos/c.webp: 0\n")
    first, second = err.splitlines()
    assert first.startswith("warning: nothing seems to be there: confidence 0.00 at (20, 20)")
    assert second.startswith("note: nothing like the example was found: the likeliest place has")


def test_examples_in_another_photo(says: Says, photos: Path) -> None:
    code, out, _ = says("photos/d.png", *IN_REF, "--json")
    report = json.loads(out)
    assert (code, report["in"], report["count"]) == (0, "ref.png", 3)
    assert {point["image"] for point in report["points"]} == {2}
    assert [one["path"] for one in report["images"]] == ["ref.png", "photos/d.png"]


def test_options_reach_the_model(says: Says, photos: Path, monkeypatch) -> None:
    code, out, _ = says("photos/b.jpg", "--at", "20,20", "--min-confidence", "0.8")
    assert (code, out.splitlines()[0]) == (0, "photos/b.jpg: 2")
    grids: list[tuple[int, ...]] = []

    def counting(model: object, pictures: Sequence[Seen], *_: object) -> list[list[Candidate]]:
        grids.extend(picture.view[1:3] for picture in pictures)
        return look_for(model, pictures)

    monkeypatch.setattr(finding, "look_for", counting)
    wide = Image.new("RGB", (900, 300))
    wide.save("wide.png")
    assert says("wide.png", "--at", "20,20", "--max-crops", "2")[0] == 0
    assert says("wide.png", "--at", "20,20")[0] == 0
    # A tile has 10 patches a side, and there are 2 more: 1 x 2 tiles, then 2 x 6, and with one less
    # and one more along.
    assert grids == [(12, 22), (22, 52), (22, 62), (22, 72)]


# ---- several ----


def test_a_folder_in_the_order_of_names(says: Says, photos: Path) -> None:
    code, out, err = says("photos", *IN_REF)
    assert code == 0
    assert out.splitlines() == [
        *(f"photos/{name}: {count}" for name, count in COUNTS.items()),
        "9 in 4 photos",
    ]
    assert err.splitlines() == [
        "note: photos/c.webp: nothing like the example was found: the likeliest place has "
        "confidence 0.37"
    ]


def test_several_photos_as_json_lines(says: Says, photos: Path) -> None:
    code, out, _ = says("photos/d.png", "photos/a.png", "photos/d.png", *IN_REF, "--json")
    reports = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(r["photo"], r["count"]) for r in reports] == [("photos/d.png", 3), ("photos/a.png", 2)]


def test_the_reference_may_be_one_of_the_photos(says: Says, photos: Path, monkeypatch) -> None:
    """Then the examples lie in what is asked about, and it is not shown twice."""
    shown: list[int] = []

    def counting(model: object, pictures: Sequence[Seen], *_: object) -> list[list[Candidate]]:
        shown.append(len(pictures))
        return look_for(model, pictures)

    monkeypatch.setattr(finding, "look_for", counting)
    assert says("photos", "--at", "20,20", "--in", "photos/../photos/b.jpg")[0] == 0
    assert shown == [n for n in (2, 1, 2, 2) for _ in range(finding.LOOKS)]


def test_the_reference_is_seen_once(says: Says, photos: Path, monkeypatch) -> None:
    (photos / "b.jpg").unlink()
    encoder = find_net().vision_encoder
    features, seen = encoder.features, []

    def counting(tiles: Any, *rest: Any) -> Any:
        seen.append(len(tiles))
        return features(tiles, *rest)

    monkeypatch.setattr(encoder, "features", counting)
    code, out, _ = says("photos", *IN_REF)
    assert (code, out.splitlines()[-1]) == (0, "5 in 3 photos")
    assert sorted(seen) == sorted([1, 4, 9] * (1 + 3))


def test_an_example_on_bare_ground_is_told_once(says: Says, photos: Path) -> None:
    code, _, err = says("photos", "--at", "50,36", "--in", "ref.png")
    assert code == 0
    assert err.count("nothing seems to be there") == 1


def test_a_photo_that_does_not_open_is_told_and_the_others_go_on(says: Says, photos: Path) -> None:
    (photos / "b.jpg").write_bytes(b"no photo")
    missing = "photos/none.png"
    code, out, err = says("photos", missing, *IN_REF, "--csv", "t.csv", "--draw", "--out", "o")
    assert code == 1
    assert out.splitlines()[0] == "photos/a.png: 2" and "photos/d.png: 3" in out
    assert "b.jpg" not in out and out.splitlines()[-1] == "5 in 5 photos"
    told = [line for line in err.splitlines() if "b.jpg" in line or "none.png" in line]
    assert len(told) == 2 and all(
        line.startswith("photos/") or "there is no" in line for line in told
    )
    assert "2 of 5 photos could not be looked at" in err.splitlines()[-1]
    rows = rows_of("t.csv")
    assert [(r["image"], r["count"]) for r in rows if r["id"] in ("", "1")] == [
        ("photos/a.png", "2"),
        ("photos/b.jpg", ""),
        ("photos/c.webp", "0"),
        ("photos/d.png", "3"),
        ("photos/none.png", ""),
    ]
    assert "expected a picture" in rows[2]["problem"]
    assert sorted(os.listdir("o")) == [
        *("a-found.png", "c-found.webp", "contact-sheet-found.jpg", "d-found.png"),
    ]
    code, out, _ = says("photos", *IN_REF, "--json")
    assert code == 1
    assert "expected a picture" in json.loads(out.splitlines()[1])["error"]


# ---- overlays ----


def test_overlays_beside_the_photos(says: Says, photos: Path) -> None:
    before = {path: path.read_bytes() for path in photos.iterdir() if path.is_file()}
    code, _, err = says("photos/a.png", "--at", "20,20", "--draw")
    assert (code, err) == (0, "wrote photos/a-found.png\n")
    drawn = np.asarray(Image.open("photos/a-found.png"))
    changed = (drawn != np.asarray(Image.open("photos/a.png"))).any(axis=2)
    assert drawn.shape == (40, 80, 3)
    assert changed[20, 20] and changed[20, 60] and not changed[20, 40]
    # They are no photos of the next call, and of all there is a sheet.
    for _ in range(2):
        code, out, err = says("photos", *IN_REF, "--draw")
        assert (code, out.splitlines()[-1]) == (0, "9 in 4 photos")
        assert err.splitlines()[-1] == (
            "wrote photos/contact-sheet-found.jpg and an overlay of each photo"
        )
    assert {path: path.read_bytes() for path in before} == before
    sheet = Image.open("photos/contact-sheet-found.jpg")
    assert sheet.width > 2 * 240 and sheet.height > 2 * 240


def test_overlays_have_names_of_their_own() -> None:
    photos = [Path(name) for name in ("x/a.jpg", "y/a.jpg", "x/a.png", "x/b.tif", "x/c.JPG")]
    photos.append(Path("x/contact-sheet.jpg"))
    out = Path("o")
    named = ["a-found.jpg", "a-found-2.jpg", "a-found.png", "b-found.png", "c-found.JPG"]
    named.append("contact-sheet-found-2.jpg")
    assert overlay_paths(photos, out) == [out / name for name in named]
    assert all(is_overlay(name) for name in named)
    assert overlay_paths(photos[:2], None) == [Path("x/a-found.jpg"), Path("y/a-found.jpg")]
    assert not is_overlay("a.jpg") and not is_overlay("lost-found.tif")


@pytest.mark.parametrize("link", [False, True])
def test_no_overlay_is_written_over_what_is_read(says: Says, photos: Path, link: bool) -> None:
    if link:
        os.link("photos/b.jpg", "photos/a-found.png")
    else:
        Image.new("RGB", (80, 40)).save("photos/a-found.png")
    given = [] if link else ["photos/a-found.png"]
    code, out, err = says("photos/a.png", "photos/b.jpg", *given, *IN_REF, "--draw")
    assert (code, out) == (2, "")
    assert "photos/a-found.png would be written over photos/" in err


def test_a_sheet_says_what_did_not_open() -> None:
    from nanomolmo2.processor.contact_sheet import ContactSheet

    sheet = ContactSheet(3)
    sheet.add(Image.new("RGB", (400, 100), "red"), "a" * 200, "12")
    sheet.add(None, "b.png", "did not open")
    sheet.add(Image.new("RGB", (10, 300), "blue"), "\u732b.png", "0")
    pixels = np.asarray(sheet.image).astype(int)
    assert pixels.shape[1] == 2 * (240 + 8) + 8
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == 240 * 60
    assert (pixels[8 : 8 + 240, 256 : 256 + 240] == 0xD9).all()
    blue = (pixels == (0, 0, 255)).all(axis=2)
    assert blue.sum() == 8 * 240 and blue.nonzero()[0].min() > 240
    under = pixels[240 + 8 : 240 + 8 + 30, 8:248]  # the name is cut, and stays under its picture
    assert (under < 100).any() and (pixels[248 : 248 + 30, 248:256] > 200).all()


# ---- the table ----


def test_the_table_has_a_line_a_point(says: Says, photos: Path) -> None:
    code, _, err = says("photos", *IN_REF, "--csv", "t.csv")
    assert (code, err.splitlines()[-1]) == (0, "wrote t.csv")
    rows = rows_of("t.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [(r["image"], r["count"], r["id"]) for r in rows] == [
        *(("photos/a.png", "2", n) for n in "12"),
        *(("photos/b.jpg", "4", n) for n in "1234"),
        ("photos/c.webp", "0", ""),
        *(("photos/d.png", "3", n) for n in "123"),
    ]
    cells = ["photos/a.png", "2", "thing", "2", "60.0", "20.0", "0.844", "20.0", "80", "40", ""]
    assert list(rows[1].values())[:-1] == cells
    assert rows[6]["problem"].startswith("nothing like the example")


def test_the_table_can_be_read_as_labels(says: Says, photos: Path) -> None:
    """Corrected by hand it is data to learn from: `nanomolmo2 data` knows its columns."""
    says("photos", *IN_REF, "--csv", "t.csv")
    assert cli.main(["data", "import", "--from", "csv", "t.csv", "l.jsonl"]) == 0
    records = [json.loads(line) for line in Path("l.jsonl").read_text().splitlines()]
    counts = {
        Path(record["image"]).name: branch["truth"]["count"]
        for record in records
        for branch in record["branches"]
        if branch["task"] == "count"
    }
    assert counts == COUNTS


def test_what_is_done_is_not_looked_at_again(says: Says, photos: Path, monkeypatch) -> None:
    arguments = ("photos", *IN_REF, "--csv", "t.csv", "--draw", "--out", "o")
    says(*arguments)
    table, printed = Path("t.csv").read_bytes(), says(*arguments)[1]
    monkeypatch.setattr(finding, "look_for", None)  # would fail
    (Path("o") / "b-found.jpg").unlink()
    code, out, err = says(*arguments)
    assert (code, out) == (0, printed)
    assert err.splitlines()[0] == "t.csv has 4 of 4 photos: going on"
    assert Path("t.csv").read_bytes() == table
    assert Path("o/b-found.jpg").exists()
    code, out, _ = says(*arguments[:-3], "--json")
    reports = [json.loads(line) for line in out.splitlines()]
    assert [(r["photo"], r["count"]) for r in reports] == [
        (f"photos/{name}", count) for name, count in COUNTS.items()
    ]
    point = {"id": 2, "label": "thing", "x": 60, "y": 20, "confidence": 0.844, "size": 20}
    assert reports[0]["points"][1] == point


def test_photos_that_are_new_or_changed_are_looked_at(says: Says, photos: Path) -> None:
    says("photos", *IN_REF, "--csv", "t.csv")
    Image.new("RGB", (40, 40)).save(photos / "aa.png")
    Image.new("RGB", (200, 40)).save(photos / "a.png")
    assert says("photos", *IN_REF, "--csv", "t.csv")[0] == 0
    went_on = Path("t.csv").read_bytes()
    Path("t.csv").unlink()
    says("photos", *IN_REF, "--csv", "t.csv")
    assert Path("t.csv").read_bytes() == went_on
    counts = {row["image"]: row["count"] for row in rows_of("t.csv")}
    assert (counts["photos/a.png"], counts["photos/aa.png"]) == ("5", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--at", "21,20"), "other examples or other options"),
        (("--not", "60,20"), "other examples or other options"),
        (("--min-confidence", "0.6"), "other examples or other options"),
        (("--max-crops", "3"), "other examples or other options"),
        (("--in", "photos/a.png"), "other examples or other options"),
    ],
)
def test_other_arguments_are_refused(
    says: Says, photos: Path, change: tuple[str, str], message: str
) -> None:
    says("photos", *IN_REF, "--csv", "t.csv")
    table = Path("t.csv").read_bytes()
    code, out, err = says("photos", *IN_REF, *change, "--csv", "t.csv")
    assert (code, out) == (1, "")
    assert "t.csv, line 2" in err and message in err and "name another --csv" in err
    assert Path("t.csv").read_bytes() == table


def test_a_table_of_other_photos_is_refused(says: Says, photos: Path) -> None:
    says("photos", *IN_REF, "--csv", "t.csv")
    code, _, err = says("photos/a.png", "photos/b.jpg", *IN_REF, "--csv", "t.csv")
    assert code == 1 and "is of photos/c.webp, which is not asked about" in err
    Path("t.csv").write_text("name,grade\nMia,1\n")
    code, _, err = says("photos", *IN_REF, "--csv", "t.csv")
    assert code == 1 and "something else than a table of this command" in err
    assert Path("t.csv").read_text() == "name,grade\nMia,1\n"


class _Known:
    """Finds without a model."""

    def __init__(self, path: Path, photos: list[Path]) -> None:
        self.table = Table(path)
        self.photos, self.looked = photos, 0

    def run(self) -> None:
        self.table.begin("0123456789abcdef", self.photos)
        for i, photo in enumerate(self.photos):
            if self.table.known(photo) is None:
                self.looked += 1
                marks = tuple(Mark(10.0 * j, 5.0, 0.9, 12.0) for j in range(i))
                self.table.add(photo, Found(i, marks, 100, 50, 'a, "b"' if i == 2 else ""))
        self.table.finish(self.photos)


def test_a_table_that_was_cut_anywhere_becomes_the_same(photos: Path, tmp_path: Path) -> None:
    """A killed call leaves any beginning of the file, or none."""
    files = sorted(path for path in photos.iterdir() if path.suffix != ".txt" and path.is_file())
    whole = tmp_path / "t.csv"
    _Known(whole, files).run()
    expected = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(expected) if byte == ord("\n")]
    beside = {end + i for end in ends[:-1] for i in (-1, 0, 1)}
    # The header is written at once.
    for cut in sorted({0, *beside, *range(ends[0], len(expected), 13)} - {ends[0] - 1}):
        whole.write_bytes(expected[:cut])
        again = _Known(whole, files)
        again.run()
        assert whole.read_bytes() == expected, cut
        assert again.looked >= 1


def test_a_call_that_was_killed_goes_on(says: Says, photos: Path, model: Path) -> None:
    """SIGKILL, while the third photo is looked at; then the same command in full."""
    code = (
        "import os, signal, sys\n"
        "from nanomolmo2 import cli\n"
        "from nanomolmo2.generation import finding\n"
        "from tests.cli.test_find import look_for\n"
        "calls = []\n"
        "def killed(*given):\n"
        "    calls.append(given)\n"
        "    if len(calls) == 2 * finding.LOOKS + 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return look_for(*given)\n"
        "finding.look_for = killed\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["find", "photos", *IN_REF, "--csv", "t.csv", "--model", str(model)]
    killed = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.splitlines() == ["photos/a.png: 2", "photos/b.jpg: 4"]
    assert len(rows_of("t.csv")) == 6
    begun = Path("t.csv").read_bytes()
    code_, out, err = says(*arguments[1:])
    assert code_ == 0 and "t.csv has 2 of 4 photos" in err
    assert out.splitlines()[-1] == "9 in 4 photos"
    went_on = Path("t.csv").read_bytes()
    assert went_on.startswith(begun)
    Path("t.csv").unlink()
    says(*arguments[1:])
    assert Path("t.csv").read_bytes() == went_on


def test_interrupted(says: Says, photos: Path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finding, "look_for", interrupted)
    code, _, err = says("photos", *IN_REF, "--csv", "t.csv")
    assert code == 130
    assert "t.csv has what was found: the same command goes on behind it" in err


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1.png", "'=1+1.png"),
        ("+a.png", "'+a.png"),
        ("-a.png", "'-a.png"),
        ("@a.png", "'@a.png"),
        ("\ta.png", "\\ta.png"),
        ("a\nb.png", "a\\nb.png"),
        ("\x1b[2Ja.png", "\\x1b[2Ja.png"),
        ("a=b.png", "a=b.png"),
    ],
)
def test_names_are_no_formulas(says: Says, photos: Path, name: str, cell: str, monkeypatch) -> None:
    """A spreadsheet would run them, a terminal obey them."""
    assert cell_of(Path(name)) == cell
    Image.new("RGB", (80, 40)).save(photos / name, "PNG")
    monkeypatch.chdir(photos)
    code, out, _ = says("./" + name, "--at", "20,20", "--csv", "../t.csv")
    assert code == 0 and "\x1b" not in out
    rows = rows_of("../t.csv")
    assert [row["image"] for row in rows] == [cell] * 2
    monkeypatch.setattr(finding, "look_for", None)
    assert says("./" + name, "--at", "20,20", "--csv", "../t.csv")[0] == 0


# ---- a terminal ----


def test_on_a_terminal_there_is_a_bar(photos: Path, model: Path) -> None:
    """And the counts stand above it."""
    code = (
        "import sys\n"
        "from nanomolmo2 import cli\n"
        "from nanomolmo2.generation import finding\n"
        "from tests.cli.test_find import look_for\n"
        "finding.look_for = look_for\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    master, slave = pty.openpty()
    command = [sys.executable, "-c", code, "find", "photos", *IN_REF, "--model", str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert child.wait(timeout=120) == 0
    text = shown.decode(errors="replace")
    assert "photos/a.png: 2" in text and "9 in 4 photos" in text
    assert "100%" in text and "photos" in text


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a photo and a place in it"),
        (["photos/a.png"], "expected at least one example, --at X,Y"),
        (["photos/a.png", "--at", "20"], "--at is '20', expected X,Y in pixels"),
        (["photos/a.png", "--at", "20,x"], "--at is '20,x'"),
        (["photos/a.png", "--at", "nan,3"], "--at is 'nan,3'"),
        (["photos/a.png", "--at", "20,20@2"], "--at is '20,20@2'"),
        (["photos/a.png", "--at", "2,2", "--not", "3"], "--not is '3', expected X,Y"),
        (["photos/a.png", "--at", "81,20"], "--at 81,20 lies outside of photos/a.png, which is 80"),
        (["photos/a.png", "--at", "2,2", "--not", "2,41"], "--not 2,41 lies outside of photos/a"),
        (["photos/a.png", "--at", "70,20", "--in", "ref.png"], "outside of ref.png, which is 64"),
        (["photos/a.png", "photos/b.jpg", "--at", "2,2"], "found 2 photos and no reference"),
        (["photos", "--at", "2,2"], "no reference: say in which photo the examples lie, --in"),
        (["photos/deeper", "--at", "2,2"], "found 1 photo and no reference"),
        (["", "--at", "2,2"], "the name of a photo is empty"),
        (["photos/a.png", "--at", "2,2", "--min-confidence", "1.5"], "must be 0 to 1, found 1.5"),
        (["photos/a.png", "--at", "2,2", "--min-confidence", "nan"], "must be 0 to 1, found nan"),
        (["photos/a.png", "--at", "2,2", "--max-crops", "0"], "--max-crops must be 1 or more"),
        (["photos/a.png", "--at", "2,2", "--out", "o"], "--out is where overlays go: give --draw"),
        (["photos/a.png", "--at", "2,2", "--draw", "--out", "ref.png"], "--out ref.png is a file"),
        (["photos/a.png", "--at", "2,2", "--csv", "t.txt"], "expected one of .csv"),
        (["photos/a.png", "--at", "2,2", "--csv", "photos"], "photos ends with no suffix"),
        (["photos/a.png", "--at", "2,2", "--csv", "no/t.csv"], "nothing can be written to no"),
    ],
)
def test_a_wrong_command_line(says: Says, photos: Path, arguments: list[str], message: str) -> None:
    before = sorted(os.listdir())
    code, out, err = says(*arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png", "--at", "2,2"], "there is no file none.png"),
        (["photos/notes.txt", "--at", "2,2"], "photos/notes.txt: found text, expected a picture"),
        (["photos/a.png", "--at", "2,2", "--in", "none.png"], "there is no file none.png"),
        (["empty", "--at", "2,2", "--in", "ref.png"], "empty holds no photos"),
    ],
)
def test_what_is_not_there(says: Says, photos: Path, arguments: list[str], message: str) -> None:
    Path("empty").mkdir()
    code, out, err = says(*arguments, "--csv", "t.csv")
    assert (code, out) == (1, "")
    assert message in err and err.count("\n") == 1
    assert not Path("t.csv").exists()


def test_a_model_that_cannot_find_ends_it_at_once(says: Says, photos: Path, monkeypatch) -> None:
    from tests.small_model import small_model, small_processor

    blind = VLM(small_model(), small_processor())
    monkeypatch.setattr(find, "load_pipeline", lambda *_, **__: blind)
    code, out, err = says("photos", *IN_REF, "--csv", "t.csv", "--model", "base")
    assert (code, out) == (1, "")
    assert "the model base cannot find by example" in err
    assert not Path("t.csv").exists()


def test_photos_are_taken_once(photos: Path) -> None:
    named = ["photos/b.jpg", "photos"]
    expected = ["b.jpg", "a.png", "c.webp", "d.png"]
    assert [path.name for path in photos_of(named)] == expected


# ---- with a net ----


def test_with_a_net(photos: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights find something, and the same each time."""
    pixels = np.random.default_rng(2).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((192, 128)).save("scene.png")
    command = ["find", "scene.png", "--at", "50,60", "--model", str(model), "--json"]
    reports = []
    for more in ([], ["--csv", "t.csv"]):
        assert cli.main([*command, *more]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    first, second = reports
    assert first["count"] == len(first["points"]) > 1
    assert [p["x"] for p in first["points"]] == [p["x"] for p in second["points"]]
    assert all(0 <= p["x"] <= 192 and 0 <= p["y"] <= 128 for p in first["points"])
    assert all(0.5 <= p["confidence"] <= 1 for p in first["points"])
    rows = rows_of("t.csv")
    assert [float(row["x"]) for row in rows] == [round(p["x"], 1) for p in first["points"]]
