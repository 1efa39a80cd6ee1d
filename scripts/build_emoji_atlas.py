"""Draw the emoji sprites that `tiny` is trained and tested on.

    python scripts/build_emoji_atlas.py --art node_modules --out nanomolmo2/assets/emoji

The result is committed, so nobody needs to run this again; it is here to show where every pixel
comes from. It needs `resvg_py` (pip) and these npm packages, unpacked under the folder given with
--art:

    npm install @iconify-json/{noto,noto-v1,fxemoji,fluent-emoji-flat,emojione,twemoji,openmoji} \
        @lobehub/fluent-emoji-3d

Written: `sprites.webp` (training styles and the milder held-out style), `openmoji.webp`
(share-alike artwork, kept apart, never used for training), `index.json` (what lies in which cell)
and `ATTRIBUTION.md`.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from nanomolmo2.files import atomic_path

SPRITE_PX = 96  # side of a cell; a multiple of 16, so that no WebP block holds two sprites
DRAW_PX = 256  # vector art is drawn this large, cropped, then reduced
MARGIN_PX = 1  # free border inside a cell
VISIBLE_ALPHA = 16  # of 255: fainter pixels do not count when a drawing is cropped


@dataclass(frozen=True)
class Style:
    """One vendor's drawings: where they come from and who may use them how."""

    name: str
    group: str
    package: str
    title: str
    copyright: str
    source: str
    license: str
    license_file: str


STYLES = (
    Style(
        "noto",
        "seen",
        "@iconify-json/noto",
        "Noto Emoji",
        "Copyright Google Inc.",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
        "Apache-2.0.txt",
    ),
    Style(
        "noto-v1",
        "seen",
        "@iconify-json/noto-v1",
        "Noto Emoji (version 1)",
        "Copyright Google Inc.",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
        "Apache-2.0.txt",
    ),
    Style(
        "fxemoji",
        "seen",
        "@iconify-json/fxemoji",
        "Firefox OS Emoji",
        "Copyright Mozilla Foundation",
        "https://github.com/mozilla/fxemoji",
        "Apache-2.0",
        "Apache-2.0.txt",
    ),
    Style(
        "fluent-flat",
        "seen",
        "@iconify-json/fluent-emoji-flat",
        "Fluent Emoji, flat",
        "Copyright (c) Microsoft Corporation.",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
        "MIT-fluentui-emoji.txt",
    ),
    Style(
        "fluent-3d",
        "seen",
        "@lobehub/fluent-emoji-3d",
        "Fluent Emoji, 3D",
        "Copyright (c) Microsoft Corporation. (artwork), LobeHub (packaging)",
        "https://github.com/lobehub/fluent-emoji",
        "MIT",
        "MIT-fluentui-emoji.txt",
    ),
    Style(
        "emojione",
        "seen",
        "@iconify-json/emojione",
        "EmojiOne 2.3 (EmojiTwo)",
        "Copyright Emoji One and EmojiTwo contributors",
        "https://github.com/EmojiTwo/emojitwo",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
    ),
    Style(
        "twemoji",
        "mild",
        "@iconify-json/twemoji",
        "Twemoji",
        "Copyright Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
    ),
    Style(
        "openmoji",
        "openmoji",
        "@iconify-json/openmoji",
        "OpenMoji",
        "OpenMoji: the open-source emoji and icon project",
        "https://github.com/hfg-gmuend/openmoji",
        "CC-BY-SA-4.0",
        "CC-BY-SA-4.0.txt",
    ),
)

# Singular, plural, code point. Every drawing was looked at: the 64 differ in shape or colour from
# each other and show the same thing in all styles. Rules get plurals wrong: they are written out.
CATEGORIES = (
    ("dog", "dogs", "1f436"),
    ("cat", "cats", "1f431"),
    ("horse", "horses", "1f40e"),
    ("cow", "cows", "1f404"),
    ("pig", "pigs", "1f437"),
    ("elephant", "elephants", "1f418"),
    ("panda", "pandas", "1f43c"),
    ("fox", "foxes", "1f98a"),
    ("frog", "frogs", "1f438"),
    ("turtle", "turtles", "1f422"),
    ("penguin", "penguins", "1f427"),
    ("owl", "owls", "1f989"),
    ("fish", "fish", "1f41f"),
    ("whale", "whales", "1f433"),
    ("octopus", "octopuses", "1f419"),
    ("crab", "crabs", "1f980"),
    ("snail", "snails", "1f40c"),
    ("butterfly", "butterflies", "1f98b"),
    ("bee", "bees", "1f41d"),
    ("ladybug", "ladybugs", "1f41e"),
    ("apple", "apples", "1f34e"),
    ("banana", "bananas", "1f34c"),
    ("pear", "pears", "1f350"),
    ("lemon", "lemons", "1f34b"),
    ("pineapple", "pineapples", "1f34d"),
    ("watermelon", "watermelons", "1f349"),
    ("strawberry", "strawberries", "1f353"),
    ("avocado", "avocados", "1f951"),
    ("carrot", "carrots", "1f955"),
    ("mushroom", "mushrooms", "1f344"),
    ("cheese", "cheeses", "1f9c0"),
    ("hamburger", "hamburgers", "1f354"),
    ("pizza", "pizzas", "1f355"),
    ("doughnut", "doughnuts", "1f369"),
    ("cookie", "cookies", "1f36a"),
    ("lollipop", "lollipops", "1f36d"),
    ("car", "cars", "1f697"),
    ("bus", "buses", "1f68c"),
    ("train", "trains", "1f682"),
    ("tractor", "tractors", "1f69c"),
    ("bicycle", "bicycles", "1f6b2"),
    ("airplane", "airplanes", "2708"),
    ("helicopter", "helicopters", "1f681"),
    ("rocket", "rockets", "1f680"),
    ("boat", "boats", "26f5"),
    ("cactus", "cactuses", "1f335"),
    ("sunflower", "sunflowers", "1f33b"),
    ("leaf", "leaves", "1f341"),
    ("star", "stars", "2b50"),
    ("heart", "hearts", "2764"),
    ("umbrella", "umbrellas", "2602"),
    ("snowman", "snowmen", "26c4"),
    ("house", "houses", "1f3e0"),
    ("key", "keys", "1f511"),
    ("pencil", "pencils", "270f"),
    ("book", "books", "1f4d5"),
    ("clock", "clocks", "23f0"),
    ("guitar", "guitars", "1f3b8"),
    ("balloon", "balloons", "1f388"),
    ("crown", "crowns", "1f451"),
    ("hat", "hats", "1f3a9"),
    ("trophy", "trophies", "1f3c6"),
    ("ball", "balls", "26bd"),
    ("anchor", "anchors", "2693"),
)

# Packages without a code point table are matched by the CLDR name; these names differ. None: the
# package has no such drawing, or one that shows a whole scene instead of the thing.
BY_HAND: dict[tuple[str, str], str | None] = {
    ("fxemoji", "dog"): "dog",
    ("fxemoji", "cat"): "cat",
    ("fxemoji", "pig"): "pig",
    ("fxemoji", "panda"): "pandaface",
    ("fxemoji", "fox"): "foxgrin",
    ("fxemoji", "whale"): "whale",
    ("fxemoji", "pizza"): "sliceofpizza",
    ("fxemoji", "train"): "steamlocomotive",
    ("fxemoji", "boat"): None,
    ("fxemoji", "umbrella"): "umbrellawithraindrops",
    ("fxemoji", "house"): "housebuilding",
    ("fxemoji", "owl"): None,
    ("fxemoji", "crab"): None,
    ("fxemoji", "butterfly"): None,
    ("fxemoji", "avocado"): None,
    ("fxemoji", "carrot"): None,
    ("fxemoji", "cheese"): None,
}

ICONIFY_NAMES = (
    "@iconify-json/noto"  # its code point table names the drawings for packages without one
)


class IconSet:
    """Drawings of one package, by code point or by name."""

    def __init__(self, art: Path, style: Style) -> None:
        self.style = style
        self.folder = art / style.package
        self.names = read_json(art / ICONIFY_NAMES / "chars.json")
        if style.name == "fluent-3d":
            return
        self.icons = read_json(self.folder / "icons.json")
        self.code_points = read_json(self.folder / "chars.json")
        self.by_letters = {letters(name): name for name in self.icons["icons"]}
        self.by_letters |= {letters(name): name for name in self.icons.get("aliases", {})}

    def draw(self, category: str, code_point: str) -> Image.Image | None:
        """RGBA drawing of at least 96 px, or None where this style has none."""
        if self.style.name == "fluent-3d":
            for suffix in ("", "-fe0f"):
                path = self.folder / "assets" / f"{code_point}{suffix}.webp"
                if path.exists():
                    return Image.open(path).convert("RGBA")
            return None
        if (self.style.name, category) in BY_HAND:
            name = BY_HAND[self.style.name, category]
        else:
            named = by_code_point(self.names, code_point)
            name = by_code_point(self.code_points, code_point) or self.by_letters[letters(named)]
        return None if name is None else self.rasterise(name)

    def rasterise(self, name: str) -> Image.Image:
        import resvg_py

        name = self.icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self.icons["icons"][name]
        width = icon.get("width", self.icons["width"])
        height = icon.get("height", self.icons["height"])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
            f'width="{DRAW_PX}" height="{DRAW_PX}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        return Image.open(io.BytesIO(png)).convert("RGBA")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def letters(name: str) -> str:
    return "".join(c for c in name if c.isalnum())


def by_code_point(table: dict[str, str], code_point: str) -> str:
    return table.get(code_point) or table.get(f"{code_point}-fe0f") or ""


def fit_cell(drawing: Image.Image) -> Image.Image:
    """Crop to what is visible and fit it into a cell, so that equal sizes mean equal extents."""
    visible = drawing.getchannel("A").point(lambda a: 255 if a >= VISIBLE_ALPHA else 0)
    drawing = drawing.crop(visible.getbbox())
    scale = (SPRITE_PX - 2 * MARGIN_PX) / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.resize(size, Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (SPRITE_PX, SPRITE_PX))
    cell.paste(drawing, ((SPRITE_PX - size[0]) // 2, (SPRITE_PX - size[1]) // 2))
    return cell


def build(art: Path, out: Path, quality: int) -> dict[str, Any]:
    """Write atlases, index and attribution; returns the index."""
    cells: dict[str, tuple[str, int]] = {}  # style -> atlas file, column
    columns: dict[str, int] = {}  # atlas file -> number of columns
    for style in STYLES:
        file = "openmoji.webp" if style.group == "openmoji" else "sprites.webp"
        cells[style.name] = (file, columns.get(file, 0))
        columns[file] = columns.get(file, 0) + 1
    atlases = {
        file: Image.new("RGBA", (SPRITE_PX * count, SPRITE_PX * len(CATEGORIES)))
        for file, count in columns.items()
    }
    missing: dict[str, list[str]] = {}
    for style in STYLES:
        icons = IconSet(art, style)
        for row, (category, _, code_point) in enumerate(CATEGORIES):
            drawing = icons.draw(category, code_point)
            if drawing is None:
                missing.setdefault(category, []).append(style.name)
                continue
            file, column = cells[style.name]
            atlases[file].paste(fit_cell(drawing), (column * SPRITE_PX, row * SPRITE_PX))
    index = {
        "sprite_px": SPRITE_PX,
        "styles": {
            s.name: {"group": s.group, "file": cells[s.name][0], "column": cells[s.name][1]}
            for s in STYLES
        },
        "categories": [
            {"name": name, "plural": plural, "row": row, "missing": missing.get(name, [])}
            for row, (name, plural, _) in enumerate(CATEGORIES)
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    for file, atlas in atlases.items():
        with atomic_path(out / file) as path:
            atlas.save(path, "WEBP", quality=quality, method=6)
    with atomic_path(out / "index.json") as path:
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    with atomic_path(out / "ATTRIBUTION.md") as path:
        path.write_text(attribution(art), encoding="utf-8")
    return index


def attribution(art: Path) -> str:
    rows = [
        f"| `{s.name}` | {s.title} | {s.copyright} | [{s.license}](licenses/{s.license_file}) | "
        f"{s.source} | `{s.package}` {read_json(art / s.package / 'package.json')['version']} |"
        for s in STYLES
    ]
    return ATTRIBUTION.format(rows="\n".join(rows))


ATTRIBUTION = """# Emoji artwork: who made it

The sprites in this folder are drawings of other people, used under their licences. The
Apache-2.0 licence of this project covers its code, not these files.

| style | work | author | licence | source | taken from |
|---|---|---|---|---|---|
{rows}

The licence texts are in `licenses/`. Links: Apache-2.0
https://www.apache.org/licenses/LICENSE-2.0, MIT
https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE, CC-BY-4.0
https://creativecommons.org/licenses/by/4.0/, CC-BY-SA-4.0
https://creativecommons.org/licenses/by-sa/4.0/.

**What was changed** (by `scripts/build_emoji_atlas.py`): 64 motifs were selected; each vector
drawing was rasterised, cropped to its visible part, scaled so that its longer side fills a 96 x
96 pixel cell, centred, and stored in a lossy WebP picture with the others. The data generator
then scales, turns, mirrors and recolours the sprites slightly and puts them on generated
backgrounds. None of the authors endorses this project.

`openmoji.webp` holds only OpenMoji artwork and is, with the changes above, itself licensed
under CC-BY-SA-4.0. It is used to test the model on a style it was never trained on; no training
data contains it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--art", type=Path, required=True, metavar="DIR", help="node_modules with the npm packages"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("nanomolmo2/assets/emoji"),
        metavar="DIR",
        help="folder for the atlases, index.json and ATTRIBUTION.md (default: %(default)s)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=88,
        metavar="Q",
        help="WebP quality, 0 to 100 (default: %(default)s)",
    )
    args = parser.parse_args()
    index = build(args.art, args.out, args.quality)
    sprites = len(index["categories"]) * len(index["styles"])
    missing = sum(len(c["missing"]) for c in index["categories"])
    print(
        f"{sprites - missing} sprites of {len(index['categories'])} categories, {missing} missing"
    )
    for path in sorted(args.out.glob("*.*")):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")


if __name__ == "__main__":
    main()
