"""Gather the drawings that scenes of things are made of: thousands to train on, and a few to test.

    npm install @iconify-json/noto@1.2.9 ...     # the packages and versions of `SETS`
    apt-get download openclipart-png && dpkg-deb -x openclipart-png*.deb clip
    python scripts/build_drawings.py --art node_modules --clip clip/usr/share/openclipart/png \
        --out drawings --held-out nanomolmo2/assets/things

Needs `resvg_py` (pip); takes some minutes, less when run again, since what was rasterised is kept
in `--cache`. Written to `--out`, for training:

    cells.npy          uint8 (N, 72, 72, 4), RGBA; can be mapped into memory
    index.json         the sets, their licences; set, name and SHA-256 of each drawing
    ATTRIBUTION.md     who made them, under which licence, and what was changed

and to `--held-out` the same of the two sets that training never sees, in one WebP sheet a set. With
`--compact`, the drawings for training are also written in that form, which is a sixth of the size.
Sets under share-alike licences, of brand logos and of single-colour line art are left out of
training. A held-out drawing that resembles one for training, mirrored or not, is left out too.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.files import atomic_path

Image.MAX_IMAGE_PIXELS = None  # some clip art is huge, and left out
LARGEST_CLIP = 16_000_000  # pixels

CELL_PX = 72  # side of a cell
DRAW_PX = 160  # vector art is drawn this large, cropped, then reduced
MARGIN_PX = 1  # free border inside a cell
VISIBLE_ALPHA = 24  # of 255: fainter pixels do not count when a drawing is cropped
THUMB_PX = 9  # side of the thumbnails that near-duplicates are found by

TWIN = 0.052  # root mean square difference of thumbnails, 0 to 1, below which two are twins;
FAR = 0.062  # and from any drawing of training a held-out one must differ by so much
FILLED = (0.07, 0.985)  # share of the cell that is opaque: fainter ones and whole frames are out
HELD_OUT_EACH = 200  # drawings of each held-out set that are shipped
QUALITY = 80  # of WebP sheets

PERMISSIVE = {"MIT", "Apache-2.0", "CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "public domain"}
PEOPLE = r"skin-tone|-tone-?\d|(^|-)(man|woman|person|people|men|women|boy|girl|family|couple)(-|$)"
SIGNS = (
    r"(^|-)flag|keycap|squared|regional|^input-|letter|^(up|down|left|right)-|arrow|button|"
    r"o-?clock|thirty|^clock\d|zodiac|symbol|^(club|spade|diamond)-suit"
)
LOGOS = (
    r"logo|brand|github|gitlab|google|apple-(pay|store|logo)|facebook|twitter|amazon|microsoft|"
    r"android|youtube|instagram|linkedin|whatsapp|telegram|tiktok|spotify|paypal|visa|mastercard|"
    r"windows|chrome|firefox|safari|skype|discord|slack|dropbox|netflix|reddit|pinterest|wechat|"
    r"alipay|tesla|adobe|figma|bitcoin|ethereum"
)


@dataclass(frozen=True)
class Set:
    """Drawings of one origin.

    Attributes:
        package: npm package and version; empty for Debian's clip art.
        held_out: only ever for tests.
        skip: expression of the names that are left out, besides logos.
    """

    name: str
    package: str
    version: str
    title: str
    author: str
    licence: str
    source: str
    held_out: bool = False
    skip: str = rf"{PEOPLE}|{SIGNS}"


def _streamline(name: str, version: str, title: str) -> Set:
    return Set(
        name,
        f"@iconify-json/{name}",
        version,
        title,
        "Streamline",
        "CC-BY-4.0",
        "https://github.com/webalys-hq/streamline-vectors",
    )


def _microsoft(name: str, version: str, title: str) -> Set:
    return Set(
        name,
        f"@iconify-json/{name}",
        version,
        title,
        "Copyright (c) Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    )


_NOTO = ("Copyright Google Inc.", "Apache-2.0", "https://github.com/googlefonts/noto-emoji")
SETS = (
    Set("noto", "@iconify-json/noto", "1.2.9", "Noto Emoji", *_NOTO),
    Set("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Noto Emoji (version 1)", *_NOTO),
    Set(
        *("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Firefox OS Emoji"),
        *("Copyright Mozilla Foundation", "Apache-2.0", "https://github.com/mozilla/fxemoji"),
    ),
    _microsoft("fluent-emoji", "1.2.7", "Fluent Emoji"),
    _microsoft("fluent-emoji-flat", "1.2.6", "Fluent Emoji, flat"),
    Set(
        *("fluent-color", "@iconify-json/fluent-color", "1.2.21", "Fluent UI System Color Icons"),
        *("Copyright (c) Microsoft Corporation", "MIT"),
        "https://github.com/microsoft/fluentui-system-icons",
        skip=rf"{PEOPLE}|{SIGNS}|-(16|20|24|28|32)$",  # one size of each, the largest
    ),
    Set(
        *("emojione", "@iconify-json/emojione", "1.2.3", "EmojiOne 2.3 (EmojiTwo)"),
        *("Copyright Emoji One and EmojiTwo contributors", "CC-BY-4.0"),
        "https://github.com/EmojiTwo/emojitwo",
    ),
    Set(
        *("flat-color-icons", "@iconify-json/flat-color-icons", "1.2.3", "Flat Color Icons"),
        *("Icons8", "MIT", "https://github.com/icons8/flat-Color-icons"),
    ),
    Set(
        *("meteocons", "@iconify-json/meteocons", "1.2.4", "Meteocons"),
        *("Bas Milius", "MIT", "https://github.com/basmilius/weather-icons"),
    ),
    Set(
        *("icon-park", "@iconify-json/icon-park", "1.2.4", "IconPark"),
        *("ByteDance", "Apache-2.0", "https://github.com/bytedance/IconPark"),
    ),
    _streamline("streamline-emojis", "1.2.4", "Streamline Emojis"),
    _streamline("streamline-color", "1.2.2", "Streamline Core Color"),
    _streamline("streamline-ultimate-color", "1.2.2", "Streamline Ultimate Color"),
    _streamline("streamline-kameleon-color", "1.2.2", "Streamline Kameleon Color"),
    _streamline("streamline-cyber-color", "1.2.2", "Streamline Cyber Color"),
    _streamline("streamline-stickies-color", "1.2.2", "Streamline Stickies Color"),
    Set(
        *("openclipart", "", "0.18+dfsg-19", "Open Clip Art Library 0.18"),
        *("many people, see the Debian package openclipart-png", "public domain"),
        "https://packages.debian.org/openclipart-png",
        skip=r"duplicates|/cards/|flag|religion|jigsaw|_bw\b|blackwhite|lineart|outline|sketch",
    ),
    Set(
        *("openmoji", "@iconify-json/openmoji", "1.2.29", "OpenMoji"),
        *("OpenMoji: the open-source emoji and icon project", "CC-BY-SA-4.0"),
        "https://github.com/hfg-gmuend/openmoji",
        held_out=True,
    ),
    Set(
        *("twemoji", "@iconify-json/twemoji", "1.2.5", "Twemoji"),
        *("Copyright Twitter, Inc and other contributors", "CC-BY-4.0"),
        "https://github.com/jdecked/twemoji",
        held_out=True,
    ),
)
# Of the clip art: folders of things; not those of logos, shapes, signs, flags and pages.
CLIP_FOLDERS = (
    *("animals", "buildings", "buttons", "containers", "decorations", "education", "electronics"),
    *("food", "office", "plants", "recreation", "science", "tools", "transportation"),
)


# ---- drawings ----


@dataclass(frozen=True)
class Drawing:
    """``cell``: uint8 (CELL_PX, CELL_PX, 4)."""

    set: str
    name: str
    cell: np.ndarray


def drawings_of(of: Set, art: Path, clip: Path, cache: Path) -> list[Drawing]:
    """All drawings of a set that are in colour and fill their cells well, in order of names."""
    kept = cache / f"{of.name}-{CELL_PX}.npz"
    if kept.is_file():
        with np.load(kept) as file:
            names, cells = file["names"].tolist(), file["cells"]
    else:
        found = _of_clip_art(of, clip) if not of.package else _of_package(of, art)
        names = [name for name, _ in found]
        cells = np.array([cell for _, cell in found], np.uint8)
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as path, path.open("wb") as stream:
            np.savez_compressed(stream, names=names, cells=cells)
    drawings = [Drawing(of.name, name, cell) for name, cell in zip(names, cells, strict=True)]
    return [drawing for drawing in drawings if _is_good(drawing.cell)]


def _of_package(of: Set, art: Path) -> list[tuple[str, np.ndarray]]:
    folder = art / of.package
    version = read_json(folder / "package.json")["version"]
    stated = read_json(folder / "info.json")["license"].get("spdx")
    if (version, stated) != (of.version, of.licence):
        raise SystemExit(
            f"{of.package} is of version {version} under {stated}, expected {of.version} under "
            f"{of.licence}: install that version, or look at its licence and change SETS"
        )
    icons = read_json(folder / "icons.json")
    skip = re.compile(f"{of.skip}|{LOGOS}")
    found = []
    for name, icon in sorted(icons["icons"].items()):
        if icon.get("hidden") or skip.search(name):
            continue
        cell = fit_cell(rasterise(icons, icon))
        if cell is not None:
            found.append((name, cell))
    return found


def _of_clip_art(of: Set, clip: Path) -> list[tuple[str, np.ndarray]]:
    skip = re.compile(f"{of.skip}|{LOGOS}", re.IGNORECASE)
    found = []
    for path in sorted(p for folder in CLIP_FOLDERS for p in (clip / folder).rglob("*.png")):
        name = path.relative_to(clip).with_suffix("").as_posix()
        if skip.search(name):
            continue
        with Image.open(path) as file:
            if file.width * file.height > LARGEST_CLIP:
                continue
            file.thumbnail((4 * DRAW_PX, 4 * DRAW_PX))
            cell = fit_cell(file.convert("RGBA"))
        if cell is not None:
            found.append((name, cell))
    return found


def rasterise(icons: dict[str, Any], icon: dict[str, Any]) -> Image.Image:
    """A vector drawing of a package, RGBA, DRAW_PX wide or high."""
    import resvg_py

    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{DRAW_PX}" height="{DRAW_PX}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def fit_cell(drawing: Image.Image) -> np.ndarray | None:
    """Crop to what is visible and fit it into a cell; None where nothing, or hardly, is."""
    visible = drawing.getchannel("A").point(lambda a: 255 if a >= VISIBLE_ALPHA else 0)
    box = visible.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < CELL_PX // 2:
        return None
    # "RGBa" multiplies colours by alpha, so that resizing cannot bleed the edges.
    drawing = drawing.crop(box).convert("RGBa")
    scale = (CELL_PX - 2 * MARGIN_PX) / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    cell = Image.new("RGBA", (CELL_PX, CELL_PX))
    cell.paste(drawing, ((CELL_PX - size[0]) // 2, (CELL_PX - size[1]) // 2))
    return np.asarray(cell)


def _is_good(cell: np.ndarray) -> bool:
    """In colour, or shaded; neither faint nor a whole frame."""
    alpha = cell[..., 3]
    opaque = cell[alpha >= 128][:, :3].astype(np.int16)
    filled = len(opaque) / alpha.size
    if not FILLED[0] <= filled <= FILLED[1]:
        return False
    colourful = (np.ptp(opaque, axis=1) > 40).mean()
    greys = len(np.unique(opaque.mean(1) // 32))
    return bool(colourful > 0.12 or greys >= 5)


# ---- duplicates ----


def thumbnails(drawings: list[Drawing]) -> np.ndarray:
    """Float32 (n, 9 * 9 * 4), 0 to 1: colours multiplied by alpha, and alpha."""
    made = []
    for drawing in drawings:
        small = Image.fromarray(drawing.cell).convert("RGBa")
        made.append(np.asarray(small.resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX)))
    return np.array(made, np.float32).reshape(len(drawings), -1) / 255


def nearest(thumbs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Smallest root mean square difference of each thumbnail to any of ``others``, as they are
    or mirrored: float (n,)."""
    flipped = others.reshape(-1, THUMB_PX, THUMB_PX, 4)[:, :, ::-1].reshape(others.shape)
    best = np.full(len(thumbs), np.inf)
    for start in range(0, len(thumbs), 1024):
        some = thumbs[start : start + 1024]
        for table in (others, flipped):
            squares = (some**2).sum(1)[:, None] + (table**2).sum(1) - 2 * some @ table.T
            least = np.sqrt(np.maximum(squares.min(1), 0) / thumbs.shape[1])
            best[start : start + 1024] = np.minimum(best[start : start + 1024], least)
    return best


def without_twins(drawings: list[Drawing]) -> list[Drawing]:
    """Each drawing that resembles none that was kept before it."""
    thumbs = thumbnails(drawings)
    flipped = thumbs.reshape(-1, THUMB_PX, THUMB_PX, 4)[:, :, ::-1].reshape(thumbs.shape)
    squares = (thumbs**2).sum(1)
    limit = TWIN**2 * thumbs.shape[1]
    is_kept = np.ones(len(drawings), bool)
    for start in range(0, len(thumbs), 256):
        some = slice(start, start + 256)
        seen = slice(0, start + 256)
        sums = squares[some, None] + squares[seen]
        closest = np.minimum(
            sums - 2 * thumbs[some] @ thumbs[seen].T, sums - 2 * thumbs[some] @ flipped[seen].T
        )
        for row, column in np.argwhere(closest < limit).tolist():  # row by row
            if column < start + row and is_kept[column]:
                is_kept[start + row] = False
    return [drawing for drawing, kept in zip(drawings, is_kept, strict=True) if kept]


def apart(held_out: list[Drawing], training: np.ndarray, number: int) -> list[Drawing]:
    """Held-out drawings that resemble none of training; an even choice of ``number`` of them."""
    far = nearest(thumbnails(held_out), training) >= FAR
    left = [drawing for drawing, is_far in zip(held_out, far, strict=True) if is_far]
    chosen = np.linspace(0, len(left) - 1, min(number, len(left))).round().astype(int)
    return [left[i] for i in chosen]


# ---- files ----


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def index_of(drawings: list[Drawing], files: dict[str, str]) -> dict[str, Any]:
    """``files``: set -> the file its cells are in, in the order of the drawings."""
    used = {drawing.set for drawing in drawings}
    facts = ("package", "version", "title", "author", "licence", "source")
    return {
        "cell_px": CELL_PX,
        "sets": {
            s.name: {"file": files[s.name], **{fact: getattr(s, fact) for fact in facts}}
            for s in SETS
            if s.name in used
        },
        "drawings": [
            {"set": d.set, "name": d.name, "sha256": hashlib.sha256(d.cell.tobytes()).hexdigest()}
            for d in drawings
        ],
    }


def write_index(out: Path, index: dict[str, Any], attribution: str) -> None:
    """One drawing a line."""
    rows = ",\n  ".join(json.dumps(row) for row in index["drawings"])
    head = json.dumps({**index, "drawings": []}, indent=1)
    text = head.replace('"drawings": []', f'"drawings": [\n  {rows}\n ]')
    with atomic_path(out / "index.json") as path:
        path.write_text(text + "\n", encoding="utf-8")
    with atomic_path(out / "ATTRIBUTION.md") as path:
        path.write_text(attribution, encoding="utf-8")


def write_sheet(path: Path, drawings: list[Drawing], method: int = 6) -> list[Drawing]:
    """The cells side by side in a WebP picture; returned as they will be read again."""
    columns = sheet_columns(len(drawings))
    rows = -(-len(drawings) // columns)
    sheet = Image.new("RGBA", (columns * CELL_PX, rows * CELL_PX))
    for i, drawing in enumerate(drawings):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(drawing.cell), (column * CELL_PX, row * CELL_PX))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "WEBP", quality=QUALITY, method=method)
    read = np.asarray(Image.open(path).convert("RGBA"))
    made = []
    for i, drawing in enumerate(drawings):
        y, x = (CELL_PX * v for v in divmod(i, columns))
        cell = np.ascontiguousarray(read[y : y + CELL_PX, x : x + CELL_PX])
        made.append(Drawing(drawing.set, drawing.name, cell))
    return made


def write_compact(out: Path, training: list[Drawing]) -> None:
    """The drawings for training in one WebP sheet a set."""
    out.mkdir(parents=True, exist_ok=True)
    drawings: list[Drawing] = []
    files = {}
    for name in dict.fromkeys(drawing.set for drawing in training):
        files[name] = f"{name}.webp"
        mine = [drawing for drawing in training if drawing.set == name]
        drawings += write_sheet(out / files[name], mine, method=2)
    write_index(out, index_of(drawings, files), attribution(drawings, OF_TRAINING))


def sheet_columns(number: int) -> int:
    """Cells in a row of a sheet, as `nanomolmo2/things/drawings.py` expects it."""
    return max(1, round(number**0.5))


def attribution(drawings: list[Drawing], about: str) -> str:
    counts = Counter(drawing.set for drawing in drawings)
    rows = [
        f"| `{s.name}` | {counts[s.name]} | {s.title} | {s.author} | {s.licence} | {s.source} | "
        f"{f'`{s.package}`' if s.package else '`openclipart-png` (Debian)'} {s.version} |"
        for s in SETS
        if counts[s.name]
    ]
    return ATTRIBUTION.format(rows="\n".join(rows), about=about)


ATTRIBUTION = """# Drawings of things: who made them

The drawings in this folder are other people's work, used under their licences. The Apache-2.0
licence of this project covers its code, not these files.

| set | drawings | work | author | licence | source | taken from |
|---|---|---|---|---|---|---|
{rows}

Links: Apache-2.0 https://www.apache.org/licenses/LICENSE-2.0, MIT
https://opensource.org/license/mit, CC-BY-4.0 https://creativecommons.org/licenses/by/4.0/,
CC-BY-SA-4.0 https://creativecommons.org/licenses/by-sa/4.0/. Which drawing has which name in its
set is told in `index.json`.

**What was changed** (by `scripts/build_drawings.py`): drawings were selected; each was rasterised,
cropped to its visible part, scaled so that its longer side fills a 72 x 72 pixel cell, centred, and
stored with the others. The scenes then scale, turn, mirror, shade and recolour them and put them on
generated grounds. None of the authors endorses this project.

{about}
"""
OF_TRAINING = (
    "Sets under share-alike licences and sets of brand logos were left out, and so were drawings "
    "that\nresemble another one."
)
OF_TESTS = (
    "These sets are held out: no training data contains them, and no drawing here resembles one "
    "that does.\n`openmoji.webp` holds only OpenMoji artwork and is, with the changes above, "
    "itself licensed under\nCC-BY-SA-4.0. The texts of both licences are in `../emoji/licenses/`."
)


def build(args: argparse.Namespace) -> tuple[list[Drawing], list[Drawing]]:
    """Write both folders; returns the drawings for training and the held-out ones."""
    training: list[Drawing] = []
    for of in SETS:
        if of.held_out:
            continue
        assert of.licence in PERMISSIVE
        found = drawings_of(of, args.art, args.clip, args.cache)
        print(f"{of.name}: {len(found)} drawings in colour", flush=True)
        training += found
    training = without_twins(training)
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(args.out / "cells.npy") as path, path.open("wb") as stream:
        np.save(stream, np.array([drawing.cell for drawing in training]))
    files = {of.name: "cells.npy" for of in SETS}
    write_index(args.out, index_of(training, files), attribution(training, OF_TRAINING))

    if args.compact is not None:
        write_compact(args.compact, training)

    args.held_out.mkdir(parents=True, exist_ok=True)
    thumbs = thumbnails(training)
    held_out: list[Drawing] = []
    files = {}
    for of in SETS:
        if of.held_out:
            found = without_twins(drawings_of(of, args.art, args.clip, args.cache))
            found = apart(found, thumbs, args.number)
            files[of.name] = f"{of.name}.webp"
            held_out += write_sheet(args.held_out / files[of.name], found)
    write_index(args.held_out, index_of(held_out, files), attribution(held_out, OF_TESTS))
    return training, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name, text in (
        ("art", "node_modules with the npm packages"),
        ("clip", "the folder usr/share/openclipart/png of Debian's openclipart-png"),
        ("out", "folder for the drawings to train on, outside of the package"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=text)
    parser.add_argument(
        "--held-out",
        type=Path,
        default=Path("nanomolmo2/assets/things"),
        metavar="DIR",
        help="folder for the drawings to test on (default: %(default)s)",
    )
    parser.add_argument(
        "--compact", type=Path, metavar="DIR", help="folder for the same drawings as WebP sheets"
    )
    parser.add_argument(
        "--number",
        type=int,
        default=HELD_OUT_EACH,
        metavar="N",
        help="most drawings of each held-out set (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("/tmp/drawings"),
        metavar="DIR",
        help="where rasterised sets are kept (default: %(default)s)",
    )
    for drawings in build(parser.parse_args()):
        for name, number in Counter(drawing.set for drawing in drawings).items():
            print(f"{number:6d}  {name}")


if __name__ == "__main__":
    main()
