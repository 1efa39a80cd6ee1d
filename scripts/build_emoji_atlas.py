"""Draw the emoji sprites that `tiny` is trained and tested on.

    python scripts/build_emoji_atlas.py --art node_modules --out nanomolmo2/assets/emoji

The result is committed, so nobody needs to run this again; it is here to show where every pixel
comes from. It needs `resvg_py` (pip) and these npm packages, unpacked under the folder given with
--art:

    npm install @iconify-json/{noto,noto-v1,fxemoji,fluent-emoji-flat,emojione,twemoji,openmoji} \
        @lobehub/fluent-emoji-3d
    npm install @iconify-json/{streamline-emojis,streamline-ultimate-color,lucide,lucide-lab} \
        @iconify-json/{streamline-stickies-color,streamline-cyber-color,tabler,hugeicons,ph} \
        @iconify-json/{icon-park,fluent-emoji-high-contrast,emojione-monotone}

Written: `sprites.webp` (training styles and the milder held-out style), `openmoji.webp`
(share-alike artwork, kept apart, never used for training), `extra.webp` (more styles for training,
mostly line art), `index.json` (what lies in which cell) and `ATTRIBUTION.md`. `--only extra.webp`
leaves the other two atlases as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.files import atomic_path

SPRITE_PX = 96  # side of a cell; a multiple of 16, so that no WebP block holds two sprites
DRAW_PX = 256  # vector art is drawn this large, cropped, then reduced
MARGIN_PX = 1  # free border inside a cell
VISIBLE_ALPHA = 16  # of 255: fainter pixels do not count when a drawing is cropped

INK_PX = 2 * SPRITE_PX  # line art is coloured in at this size
INK_ALPHA = 100  # of 255: the line is a wall to the colour from here on
DARK = 70  # of 255: a region as dark as this is lightened, or the lines in it would be lost


@dataclass(frozen=True)
class Style:
    """One vendor's drawings: where they come from and who may use them how.

    Attributes:
        group: "seen" and "extra" are trained on, "mild" and "openmoji" only ever tested.
        package: npm package; ``more_packages`` fill some of its gaps.
        line: None for drawings in colour; for line art what its strokes' width is multiplied by,
            and its regions are coloured in.
        recolour: (colour, new colour) in line art that has some colour of its own.
    """

    name: str
    group: str
    package: str
    title: str
    copyright: str
    source: str
    license: str
    license_file: str
    more_packages: tuple[str, ...] = ()
    line: float | None = None
    recolour: tuple[tuple[str, str], ...] = ()

    @property
    def file(self) -> str:
        return {"openmoji": "openmoji.webp", "extra": "extra.webp"}.get(self.group, "sprites.webp")


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
    Style(
        "streamline",
        "extra",
        "@iconify-json/streamline-emojis",
        "Streamline Emojis",
        "Copyright Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
    ),
    Style(
        "streamline-2",
        "extra",
        "@iconify-json/streamline-emojis",
        "Streamline Emojis (second drawings), Ultimate Color, Stickies",
        "Copyright Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
        more_packages=(
            "@iconify-json/streamline-ultimate-color",
            "@iconify-json/streamline-stickies-color",
        ),
    ),
    Style(
        "streamline-cyber",
        "extra",
        "@iconify-json/streamline-cyber-color",
        "Streamline Cyber",
        "Copyright Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
        line=1.0,
        recolour=(
            ("#fff", "none"),
            ("#bbd8ff", "none"),
            ("#092f63", "#000"),
        ),
    ),
    Style(
        "lucide",
        "extra",
        "@iconify-json/lucide",
        "Lucide, Lucide Lab",
        "Copyright (c) Lucide Icons and Contributors",
        "https://github.com/lucide-icons/lucide",
        "ISC",
        "ISC-lucide.txt",
        more_packages=("@iconify-json/lucide-lab",),
        line=0.45,
    ),
    Style(
        "tabler",
        "extra",
        "@iconify-json/tabler",
        "Tabler Icons",
        "Copyright (c) 2020-2026 Paweł Kuna",
        "https://github.com/tabler/tabler-icons",
        "MIT",
        "MIT-tabler.txt",
        line=0.45,
    ),
    Style(
        "hugeicons",
        "extra",
        "@iconify-json/hugeicons",
        "Hugeicons (free set)",
        "Copyright (c) 2025 Hugeicons",
        "https://hugeicons.com",
        "MIT",
        "MIT-hugeicons.txt",
        line=0.6,
    ),
    Style(
        "phosphor",
        "extra",
        "@iconify-json/ph",
        "Phosphor Icons, light",
        "Copyright (c) 2023 Phosphor Icons",
        "https://github.com/phosphor-icons/core",
        "MIT",
        "MIT-phosphor.txt",
        line=1.0,
    ),
    Style(
        "icon-park",
        "extra",
        "@iconify-json/icon-park",
        "IconPark",
        "Copyright ByteDance",
        "https://github.com/bytedance/IconPark",
        "Apache-2.0",
        "Apache-2.0.txt",
        line=0.45,
        recolour=(
            ("#2F88FF", "none"),
            ("#2f88ff", "none"),
            ("#43CCF8", "none"),
            ("#43ccf8", "none"),
            ("#fff", "#000"),
        ),
    ),
    Style(
        "fluent-line",
        "extra",
        "@iconify-json/fluent-emoji-high-contrast",
        "Fluent Emoji, high contrast",
        "Copyright (c) Microsoft Corporation.",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
        "MIT-fluentui-emoji.txt",
        line=1.0,
    ),
    Style(
        "emojione-line",
        "extra",
        "@iconify-json/emojione-monotone",
        "EmojiOne 2.3 (EmojiTwo), monotone",
        "Copyright Emoji One and EmojiTwo contributors",
        "https://github.com/EmojiTwo/emojitwo",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
        line=1.0,
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

# The sets of the extra styles are searched by hand: "category:name", or the name if both agree.
# Left out is what shows something else, or too little once it is coloured in.
DRAWINGS = {
    "streamline": """
        dog:dog-face cat:cat-face horse cow pig elephant panda:panda-face fox:fox-face-2
        frog:frog-face turtle penguin:penguin-2 fish:tropical-fish whale:spouting-whale octopus
        snail bee:honeybee ladybug:lady-beetle apple:red-apple pear lemon watermelon:watermelon-1
        strawberry:strawberry-1 mushroom hamburger:hamburger-2 pizza:pizza-1 doughnut:doughnut-1
        cookie car:automobile bus train:locomotive tractor bicycle airplane helicopter rocket
        boat:sailboat cactus:cactus-1 sunflower:sunflower-1 leaf:maple-leaf heart:heart-suit
        umbrella snowman book:green-book guitar balloon crown anchor
    """,
    "streamline-2": """
        dog cat horse:horse-face cow:cow-face pig:pig-face fox:fox-face-1 penguin:penguin-1
        strawberry:strawberry-2 hamburger:hamburger-3 pizza:pizza-2 doughnut:doughnut-2
        train:bullet-train cactus:cactus-2 book:open-book umbrella:umbrella-with-rain-drops
        elephant:circus-elephant banana:fruit-banana watermelon:fruit-watermelon
        helicopter:aircraft-chopper-1 guitar:modern-music-electric-guitar balloon:party-balloon
        crown:vip-crown-queen-1 car:car-4 snowman star
    """,
    "streamline-cyber": """
        dog:dog-1 cat:cat-2 whale apple:apple-2 watermelon cheese pizza car:car-4 bus:bus-2
        bicycle:bicycle-1 airplane key:key-2 clock:alarm guitar crown:crown-2 hat:hat-tall
        trophy:trophy-4 ball:football
    """,
    "lucide": """
        dog cat turtle fish snail apple banana carrot hamburger pizza doughnut:donut cookie lollipop
        car bus train:train-front tractor airplane:plane helicopter rocket boat:sailboat leaf star
        heart umbrella house key pencil book clock:alarm-clock guitar balloon crown trophy anchor
        cow:cow-head pig:pig-head elephant fox:fox-face-tail frog:frog-face penguin owl whale crab
        butterfly bee ladybug:beetle-scarab pear lemon watermelon strawberry avocado cheese cactus
        snowman hat:hat-top ball:soccer-ball
    """,
    "tabler": """
        dog cat horse pig fish butterfly apple banana lemon:lemon-2 avocado carrot mushroom cheese
        hamburger:burger pizza cookie lollipop car bus train tractor airplane:plane helicopter
        rocket cactus leaf:leaf-2 star heart umbrella snowman house:home key pencil book:book-2
        clock:alarm balloon crown trophy ball:ball-football anchor
    """,
    "hugeicons": """
        panda turtle fish crab apple:apple-01 banana watermelon avocado carrot mushroom cheese
        hamburger:hamburger-02 pizza:pizza-02 doughnut cookie lollipop car:car-01 bus:bus-03
        train:train-01 tractor bicycle airplane:plane helicopter rocket:rocket-01 boat:sailboat
        cactus star heart umbrella house:home-03 key:key-01 book:book-02 clock:alarm-clock guitar
        balloon crown:crown-02 hat trophy ball:football anchor
    """,
    "phosphor": """
        dog:dog-light cat:cat-light horse:horse-light cow:cow-light fish:fish-light
        butterfly:butterfly-light ladybug:bug-beetle-light avocado:avocado-light
        carrot:carrot-light cheese:cheese-light hamburger:hamburger-light pizza:pizza-light
        cookie:cookie-light car:car-light bus:bus-light train:train-light tractor:tractor-light
        bicycle:bicycle-light airplane:airplane-light rocket:rocket-light boat:sailboat-light
        cactus:cactus-light leaf:leaf-light star:star-light heart:heart-light
        umbrella:umbrella-light house:house-light key:key-light pencil:pencil-light book:book-light
        clock:alarm-light guitar:guitar-light balloon:balloon-light crown:crown-light
        trophy:trophy-light ball:soccer-ball-light anchor:anchor-light
    """,
    "icon-park": """
        dog cat pig elephant panda frog owl fish:fish-one whale crab butterfly bee apple:apple-one
        banana pear lemon pineapple watermelon:watermelon-one avocado carrot cheese
        hamburger:hamburger-one lollipop car bus train bicycle:bike airplane rocket:rocket-one
        boat:sailboat-one cactus leaf star umbrella snowman house:home key pencil book
        clock:alarm-clock balloon:party-balloon crown:crown-three hat trophy ball:soccer
        anchor:anchor-two
    """,
}
# These two are matched as the styles above; here the drawing is all black, so that no colour tells
# what it is.
SOLID = {
    "fluent-line": "horse crab star umbrella airplane hamburger",
    "emojione-line": "octopus crab apple cactus leaf star heart umbrella balloon",
}

ICONIFY_NAMES = (
    "@iconify-json/noto"  # its code point table names the drawings for packages without one
)


class IconSet:
    """Drawings of one style, by code point or by name."""

    def __init__(self, art: Path, style: Style) -> None:
        self.style = style
        self.folder = art / style.package
        self.names = read_json(art / ICONIFY_NAMES / "chars.json")
        self.noto = read_json(art / ICONIFY_NAMES / "icons.json")
        self.drawings = {
            item.split(":")[0]: item.split(":")[-1] for item in DRAWINGS.get(style.name, "").split()
        }
        if style.name == "fluent-3d":
            return
        packages = (style.package, *style.more_packages)
        self.icons = [read_json(art / package / "icons.json") for package in packages]
        if not self.drawings:
            self.code_points = read_json(self.folder / "chars.json")
            self.by_letters = {letters(name): name for name in self.icons[0]["icons"]}
            self.by_letters |= {letters(name): name for name in self.icons[0].get("aliases", {})}

    def draw(self, category: str, code_point: str) -> Image.Image | None:
        """RGBA drawing of at least 96 px, or None where this style has none."""
        if self.style.name == "fluent-3d":
            for suffix in ("", "-fe0f"):
                path = self.folder / "assets" / f"{code_point}{suffix}.webp"
                if path.exists():
                    return Image.open(path).convert("RGBA")
            return None
        name = self.name_of(category, code_point)
        if name is None:
            return None
        icons = next(i for i in self.icons if name in i["icons"] or name in i.get("aliases", {}))
        drawing = rasterise(icons, name, self.style)
        if self.style.line is None:
            return drawing
        noto = rasterise(self.noto, by_code_point(self.names, code_point))
        return colour_in(fit_cell(drawing, INK_PX), fit_cell(noto, INK_PX))

    def name_of(self, category: str, code_point: str) -> str | None:
        """What the packages call this category."""
        if self.drawings:
            return self.drawings.get(category)
        if category in SOLID.get(self.style.name, "").split():
            return None
        if (self.style.name, category) in BY_HAND:
            return BY_HAND[self.style.name, category]
        named = by_code_point(self.names, code_point)
        return by_code_point(self.code_points, code_point) or self.by_letters[letters(named)]


def rasterise(icons: dict[str, Any], name: str, style: Style | None = None) -> Image.Image:
    import resvg_py

    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if style is not None and style.line is not None:
        for colour, new in style.recolour:
            body = body.replace(f'"{colour}"', f'"{new}"')
        factor = style.line
        body = re.sub(
            r'stroke-width="([\d.]+)"',
            lambda match: f'stroke-width="{float(match[1]) * factor:.4g}"',
            body,
        )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{DRAW_PX}" height="{DRAW_PX}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def colour_in(line: Image.Image, like: Image.Image) -> Image.Image:
    """Fill what the lines enclose, each region in the colour that ``like`` has at its place.

    Args: line, like: RGBA of one size, fitted into their cells.
    """
    ink, colours = np.asarray(line)[..., 3], np.asarray(like)
    inside = colours[..., 3] >= 128
    overall = np.median(colours[inside][:, :3], axis=0)
    regions = label_regions(np.pad(ink, 1) < INK_ALPHA)  # the border is one region: the outside
    outside, regions = regions[0, 0], regions[1:-1, 1:-1]
    fill = np.zeros((*ink.shape, 4), np.uint8)
    for label in np.unique(regions):
        if label in (0, outside):
            continue
        region = regions == label
        there = region & inside
        colour = overall
        if there.sum() > 40:
            colour = np.median(colours[there][:, :3], axis=0)
        if colour.mean() < DARK:
            colour = colour / 2 + 50
        fill[region] = (*colour.astype(np.uint8), 255)
    for _ in range(4):  # colour runs under the lines, or the seam would show
        padded = np.pad(fill, ((1, 1), (1, 1), (0, 0)))
        beside = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        wet = (fill[..., 3] == 0) & (ink >= VISIBLE_ALPHA)
        fill[wet] = np.max(beside, axis=0)[wet]
    coloured = Image.fromarray(fill)
    coloured.alpha_composite(line)
    return coloured


def label_regions(free: np.ndarray) -> np.ndarray:
    """Number the connected parts of a mask (H, W): int (H, W), 0 where the mask is False."""
    labels = np.where(free, np.arange(1, free.size + 1).reshape(free.shape), 0)
    while True:  # the largest number of each part spreads through it
        padded = np.pad(labels, 1)
        beside = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        spread = np.where(free, np.max([labels, *beside], axis=0), 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def letters(name: str) -> str:
    return "".join(c for c in name if c.isalnum())


def by_code_point(table: dict[str, str], code_point: str) -> str:
    return table.get(code_point) or table.get(f"{code_point}-fe0f") or ""


def fit_cell(drawing: Image.Image, px: int = SPRITE_PX) -> Image.Image:
    """Crop to what is visible and fit it into a cell, so that equal sizes mean equal extents."""
    visible = drawing.getchannel("A").point(lambda a: 255 if a >= VISIBLE_ALPHA else 0)
    drawing = drawing.crop(visible.getbbox())
    margin = MARGIN_PX * px // SPRITE_PX
    scale = (px - 2 * margin) / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.resize(size, Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (px, px))
    cell.paste(drawing, ((px - size[0]) // 2, (px - size[1]) // 2))
    return cell


def build(art: Path, out: Path, quality: int, only: str | None = None) -> dict[str, Any]:
    """Write atlases (or the one named ``only``), index and attribution; returns the index."""
    cells: dict[str, tuple[str, int]] = {}  # style -> atlas file, column
    columns: dict[str, int] = {}  # atlas file -> number of columns
    for style in STYLES:
        cells[style.name] = (style.file, columns.get(style.file, 0))
        columns[style.file] = columns.get(style.file, 0) + 1
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
        if only not in (None, file):
            continue
        with atomic_path(out / file) as path:
            atlas.save(path, "WEBP", quality=quality, method=6)
    with atomic_path(out / "index.json") as path:
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    with atomic_path(out / "ATTRIBUTION.md") as path:
        path.write_text(attribution(art), encoding="utf-8")
    return index


def attribution(art: Path) -> str:
    def taken_from(style: Style) -> str:
        return ", ".join(
            f"`{package}` {read_json(art / package / 'package.json')['version']}"
            for package in (style.package, *style.more_packages)
        )

    rows = [
        f"| `{s.name}` | {s.title} | {s.copyright} | [{s.license}](licenses/{s.license_file}) | "
        f"{s.source} | {taken_from(s)} |"
        for s in STYLES
    ]
    lines = ", ".join(f"`{s.name}`" for s in STYLES if s.line is not None)
    return ATTRIBUTION.format(rows="\n".join(rows), lines=lines)


ATTRIBUTION = """# Emoji artwork: who made it

The sprites in this folder are drawings of other people, used under their licences. The
Apache-2.0 licence of this project covers its code, not these files.

| style | work | author | licence | source | taken from |
|---|---|---|---|---|---|
{rows}

The licence texts are in `licenses/`. Links: Apache-2.0
https://www.apache.org/licenses/LICENSE-2.0, MIT
https://opensource.org/license/mit, ISC https://opensource.org/license/isc-license-txt, CC-BY-4.0
https://creativecommons.org/licenses/by/4.0/, CC-BY-SA-4.0
https://creativecommons.org/licenses/by-sa/4.0/.

**What was changed** (by `scripts/build_emoji_atlas.py`): 64 motifs were selected; each vector
drawing was rasterised, cropped to its visible part, scaled so that its longer side fills a 96 x
96 pixel cell, centred, and stored in a lossy WebP picture with the others. The styles {lines}
are line art: their strokes were made thinner, what colours they had were taken out, and what the
lines enclose was filled with flat colours like those of Noto Emoji. The data generator then scales,
turns, mirrors and recolours the sprites slightly, in some pictures flattens their colours and draws
outlines too, and puts them on generated backgrounds. None of the authors endorses this project.

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
    parser.add_argument(
        "--only",
        choices=sorted({style.file for style in STYLES}),
        help="write this atlas and leave the others as they are",
    )
    args = parser.parse_args()
    index = build(args.art, args.out, args.quality, args.only)
    sprites = len(index["categories"]) * len(index["styles"])
    missing = sum(len(c["missing"]) for c in index["categories"])
    print(
        f"{sprites - missing} sprites of {len(index['categories'])} categories, {missing} missing"
    )
    for path in sorted(args.out.glob("*.*")):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")


if __name__ == "__main__":
    main()
