"""Cut out the photographs of things that finding is measured on, and the grounds they lie on.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default*.deb stamps
    pip download --no-deps scikit-image==0.26.0 && unzip scikit_image*.whl -d skimage
    python scripts/build_photos.py --stamps stamps --skimage skimage

Takes seconds. Written to `--out`, which the package ships:

    cutouts.webp       photographs of single things, cut out by their authors, in cells of 72 px
    grounds.webp       photographs of surfaces, one beside the other
    coins.png          the photograph of 24 coins, as it is
    index.json         the names, where each comes from, its SHA-256, and where the coins are
    ATTRIBUTION.md     who made them, under which licence, and what was changed

None of it is ever trained on. Of Tux Paint's stamps only photographs are taken that were made for
it; what it has from elsewhere (Wikipedia, stock photographs) has licences of its own and is left
out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from nanomolmo2.files import atomic_path

CELL_PX = 72  # side of a cell; the longer side of a thing fills it but for a border of 1 px
GROUND_PX = 320  # side of a ground
COLUMNS = 10
QUALITY = 88

FRIENDS = "Bill Kendrick and contributors to Tux Paint (2002)"
AUSTRALIA = "Chris Goerner (Australian stamps collection of Tux Paint)"
CEPS = "Pere Pujal i Carabantes"

# Group -> files of the package, of one author each. Things of a group look alike.
STAMPS: dict[str, dict[str, tuple[str, ...]]] = {
    "round fruit": {
        FRIENDS: (
            *("food/fruit/apple_fuji", "food/fruit/apple_granny_smith", "food/fruit/apple_green"),
            *("food/fruit/apple_red", "food/fruit/apple_sierra_beauty", "food/fruit/orange"),
            *("food/fruit/mango", "food/fruit/pomegranate", "food/vegetables/tomato"),
            *("food/vegetables/onion", "food/vegetables/pumpkin_small"),
        ),
        AUSTRALIA: ("food/fruit/lemon", "food/fruit/mandarine"),
    },
    "nuts and seeds": {
        FRIENDS: (
            *("food/nuts/almond", "food/nuts/pecan", "food/nuts/walnut"),
            *("plants/trees/pinecone", "food/vegetables/potato"),
        ),
        AUSTRALIA: ("animals/shellfish/abalone", "animals/shellfish/murray-mussel"),
    },
    "vegetables": {
        FRIENDS: (
            *("food/fruit/banana", "food/fruit/pear", "food/fruit/raspberry"),
            *("food/fruit/strawberry", "food/vegetables/chilepepper", "food/vegetables/eggplant"),
            *("food/vegetables/garlic", "food/vegetables/mushroom", "food/vegetables/pepper"),
            *("food/vegetables/pattypan_squash", "food/vegetables/redlettuce"),
            *("food/vegetables/yam", "food/vegetables/yellowpepper", "food/vegetables/lettuce"),
        ),
        CEPS: (*("plants/mushrooms/cep", "plants/mushrooms/cep-1", "plants/mushrooms/cep-2"),),
    },
    "tools": {
        FRIENDS: (
            *("household/tools/hammer", "household/tools/plyers", "household/tools/saw"),
            *("household/tools/wrench", "household/tools/wrench_adjustable"),
            *("household/tools/wrench_plumbers", "household/tools/mallet_metal"),
            *("household/tools/paintbrush_large", "household/arttools/scissors_small_open"),
            *("household/arttools/scissors_small_closed", "household/arttools/pen_dryerase"),
            *("household/dishes/utensils/nutcracker", "household/dishes/utensils/pepper_grinder"),
            *("household/key", "clothes/clothespin_new", "clothes/clothespin_old"),
        ),
    },
    "household": {
        FRIENDS: (
            *("household/rubberduck", "household/dishes/teapot", "household/tools/toolbox"),
            *("household/dishes/pitcher_small", "household/tools/measuring_tape"),
            *("hobbies/binoculars", "hobbies/camera_35mm", "sports/trophy_cup"),
        ),
        AUSTRALIA: ("plants/flowers/yellow-flower", "plants/flowers/pigface"),
    },
}
# Name -> file of scikit-image, the part of it (x0, y0, x1, y1), what it is.
GROUNDS = {
    "bricks": ("brick.png", (0, 0, 512, 512), "Bricks25 of cc0textures.com"),
    "grass": ("grass.png", (0, 0, 512, 512), "Grass 01 by linolafett, deviantart.com"),
    "gravel": ("gravel.png", (0, 0, 512, 512), "Gravel04 of cc0textures.com"),
    "wood": ("coffee.png", (486, 40, 600, 154), "a table, from a photograph by Rachel Michetti"),
}
COINS = "coins.png"
COIN_BOXES = (  # x0, y0, x1, y1, read off the photograph
    *((305, 16, 365, 72), (132, 28, 179, 74), (192, 30, 240, 73), (255, 34, 297, 72)),
    *((22, 35, 67, 74), (81, 39, 120, 74), (245, 95, 296, 144), (25, 104, 67, 145)),
    *((186, 105, 226, 144), (317, 106, 356, 145), (84, 108, 122, 145), (134, 110, 173, 145)),
    *((315, 156, 380, 218), (189, 170, 237, 217), (251, 172, 297, 217), (80, 175, 124, 217)),
    *((26, 179, 63, 217), (135, 179, 174, 217), (18, 233, 75, 288), (144, 236, 201, 288)),
    *((276, 239, 326, 289), (220, 240, 269, 288), (93, 245, 136, 287), (336, 248, 382, 289)),
)

ATTRIBUTION = """# Photographs of things: who made them

The photographs in this folder are other people's work, used under their licences. The Apache-2.0
licence of this project covers its code, not these files. None of them is ever trained on: they are
what finding by example is measured with (`nanomolmo2 eval find`), see `docs/find.md`.

| file | photographs | work | author | licence | source |
|---|---|---|---|---|---|
{rows}

Licences: GPL-2.0-or-later, whose text is in `licenses/GPL-2.0.txt`; CC0-1.0
https://creativecommons.org/publicdomain/zero/1.0/. Which photograph has which name in its source is
told in `index.json`.

**What was changed** (by `scripts/build_photos.py`). `cutouts.webp`: each photograph was cropped to
its visible part, scaled so that its longer side fills a cell of 72 x 72 pixels, centred, and stored
with the others; the sheet is, with these changes, itself licensed under GPL-2.0-or-later.
`grounds.webp`: parts were cut out and scaled to 320 x 320 pixels. `coins.png` is as it was. The
scenes then scale, turn and light the cut-outs and tint the grounds, and cut single coins out of
`coins.png`. None of the authors endorses this project.
"""


def cell_of(path: Path) -> np.ndarray:
    """uint8 (72, 72, 4), RGBA: the visible part of a picture, its longer side 70 px."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= 24)).getbbox()
    if box is None:
        raise ValueError(f"{path} shows nothing")
    image = image.crop(box).convert("RGBa")
    by = (CELL_PX - 2) / max(image.size)
    size = (max(1, round(by * image.width)), max(1, round(by * image.height)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    cell = Image.new("RGBa", (CELL_PX, CELL_PX))
    cell.paste(image, ((CELL_PX - size[0]) // 2, (CELL_PX - size[1]) // 2))
    return np.asarray(cell.convert("RGBA"))


def sheet_of(cells: list[np.ndarray]) -> Image.Image:
    rows = -(-len(cells) // COLUMNS)
    sheet = np.zeros((rows * CELL_PX, COLUMNS * CELL_PX, 4), np.uint8)
    for number, cell in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        y, x = row * CELL_PX, column * CELL_PX
        sheet[y : y + CELL_PX, x : x + CELL_PX] = cell
    return Image.fromarray(sheet)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(stamps: Path, skimage: Path, out: Path) -> None:
    """Write the folder, each file whole."""
    stamps, skimage = stamps / "usr/share/tuxpaint/stamps", skimage / "skimage/data"
    cells, things, authors = [], [], dict[str, int]()
    for group, found in STAMPS.items():
        for author, files in found.items():
            for file in files:
                path = stamps / f"{file}.png"
                cells.append(cell_of(path))
                name = path.stem.replace("_", " ")
                things.append({"name": name, "group": group, "author": author, "file": file})
                things[-1]["sha256"] = sha256(path)
                authors[author] = authors.get(author, 0) + 1
    grounds = Image.new("RGB", (GROUND_PX * len(GROUNDS), GROUND_PX))
    for number, (file, box, _) in enumerate(GROUNDS.values()):
        with Image.open(skimage / file) as image:
            part = image.convert("RGB").crop(box)
        size = (GROUND_PX, GROUND_PX)
        grounds.paste(part.resize(size, Image.Resampling.LANCZOS), (number * GROUND_PX, 0))
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "cutouts.webp") as path:
        sheet_of(cells).save(path, "WEBP", quality=QUALITY, alpha_quality=100, method=6, exact=True)
    with atomic_path(out / "grounds.webp") as path:
        grounds.save(path, "WEBP", quality=QUALITY - 8, method=6)
    with atomic_path(out / COINS) as path:
        path.write_bytes((skimage / COINS).read_bytes())
    index = {
        "cell_px": CELL_PX,
        "ground_px": GROUND_PX,
        "things": things,
        "grounds": [
            {"name": name, "file": file, "part": box, "sha256": sha256(skimage / file)}
            for name, (file, box, _) in GROUNDS.items()
        ],
        "coins": {"sha256": sha256(skimage / COINS), "boxes": sorted(COIN_BOXES, key=by_rows)},
    }
    with atomic_path(out / "index.json") as path:
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    with atomic_path(out / "ATTRIBUTION.md") as path:
        path.write_text(ATTRIBUTION.format(rows=rows_of(authors)), encoding="utf-8")


def by_rows(box: tuple[int, int, int, int]) -> tuple[int, int]:
    """For sorting the coins, which lie in four rows, as a text is read."""
    return box[3] // 72, box[0]


def rows_of(authors: dict[str, int]) -> str:
    """The lines of the table of `ATTRIBUTION`."""
    package = "Debian's `tuxpaint-stamps-default` 2022.06.04-1, https://tuxpaint.org/stamps/"
    rows = [
        f"| `cutouts.webp` | {number} | stamps of Tux Paint | {author} | GPL-2.0-or-later | "
        f"{package} |"
        for author, number in authors.items()
    ]
    wheel = "`skimage/data/{}` of scikit-image 0.26.0"
    rows += [
        f"| `grounds.webp` | 1 | {name} | {what} | CC0-1.0 | {wheel.format(file)} |"
        for name, (file, _, what) in GROUNDS.items()
    ]
    museum = "https://www.brooklynmuseum.org/opencollection/archives/image/51611"
    rows.append(
        f"| `coins.png` | 1 | Greek coins from Pompeii | Brooklyn Museum Collection | no known "
        f"copyright restrictions | {wheel.format(COINS)}, {museum} |"
    )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for name, text in (
        ("stamps", "what Debian's package tuxpaint-stamps-default was unpacked to"),
        ("skimage", "what the wheel of scikit-image was unpacked to"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=text)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("nanomolmo2/assets/photos"),
        metavar="DIR",
        help="folder of the package (default: %(default)s)",
    )
    args = parser.parse_args()
    build(args.stamps, args.skimage, args.out)


if __name__ == "__main__":
    main()
