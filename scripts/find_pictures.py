"""Draw what the bundled model finds in photographs: docs/images/find-*.jpg, for docs/find.md.

    pip download --no-deps scikit-image==0.26.0 && unzip scikit_image*.whl -d skimage
    python scripts/find_pictures.py --skimage skimage
    python scripts/find_pictures.py              # without the four that scikit-image has

Nobody picks: pictures and clicks were written down here before any model had seen them, each is
asked once, and what it says is drawn whatever it is. `find-photos.jpg` shows the first pictures of
the set `photos`. A ring is where it was clicked, numbered discs are what it found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, without install

from PIL import Image, ImageDraw

from nanomolmo2 import VLM
from nanomolmo2.files import atomic_path
from nanomolmo2.things.find_sets import open_set
from nanomolmo2.things.photos import PHOTOS

Place = tuple[float, float]
ENLARGED = 512  # pixels: smaller pictures are drawn larger
QUALITY = 88
FIRST, COLUMNS, GAP = 6, 3, 6  # pictures of the set photos


@dataclass(frozen=True)
class Photo:
    """A photograph and where it is clicked.

    Attributes:
        file: of scikit-image; "" for the coins, which the package ships.
        part: x0, y0, x1, y1 of it; ``click``: in that part, pixels.
        source: what may be said about where it is from.
    """

    file: str
    part: tuple[int, int, int, int]
    click: tuple[Place, ...]
    source: str


PICTURES = {
    "coins": Photo(
        "", (0, 0, 384, 303), ((334, 44), (102, 126), (172, 261)), "Brooklyn Museum Collection"
    ),
    "bricks": Photo("brick.png", (0, 0, 384, 384), ((87, 198),), "CC0, cc0textures.com"),
    "galaxies": Photo("hubble_deep_field.jpg", (300, 300, 812, 812), ((122, 416),), "NASA"),
    "nuclei": Photo("ihc.png", (256, 128, 512, 384), ((232, 147),), "Center for Microscopy"),
    "stones": Photo("gravel.png", (0, 0, 256, 256), ((175, 125),), "CC0, cc0textures.com"),
}


def drawn(vlm: VLM, image: Image.Image, click: Sequence[Place]) -> tuple[Image.Image, str]:
    """A picture with what was found in it, and a line about that."""
    answer = vlm.find(image, like=click)
    by = max(1.0, ENLARGED / max(image.size))
    large = image.resize((round(by * image.width), round(by * image.height)))
    marked = answer.draw() if by == 1 else drawn_larger(answer.points, large, by)
    assert isinstance(marked, Image.Image)
    marked = marked.convert("RGB")
    pen = ImageDraw.Draw(marked)
    for x, y in click:
        for radius, colour in ((13, "black"), (12, "white"), (11, "black")):
            box = (by * x - radius, by * y - radius, by * x + radius, by * y + radius)
            pen.ellipse(box, outline=colour)
    sure = sorted((point.confidence or 0.0 for point in answer.points), reverse=True)
    said = f"{answer.count} found" + (
        f", confidence {sure[-1]:.2f} to {sure[0]:.2f}" if sure else ""
    )
    return marked, said + "".join(f"; {problem}" for problem in answer.problems)


def drawn_larger(points: Sequence[object], image: Image.Image, by: float) -> Image.Image:
    """Points of a smaller picture on an enlarged one."""
    from dataclasses import replace

    from nanomolmo2.processor.draw import draw_points
    from nanomolmo2.processor.point import Point

    moved = [replace(p, x=by * p.x, y=by * p.y) for p in points if isinstance(p, Point)]
    return draw_points(image, moved)


def first_photos(vlm: VLM) -> tuple[Image.Image, str]:
    """The first pictures of the set ``photos``, side by side."""
    cases = open_set("photos", FIRST)
    found = []
    for number in range(FIRST):
        case = cases[number]
        image, said = drawn(vlm, Image.fromarray(case.image), case.like)
        found.append((image, f"photos {number}: {said} (there are {len(case.things)})"))
    side = ENLARGED + GAP
    rows = -(-FIRST // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * side - GAP, rows * side - GAP), "white")
    for number, (image, _) in enumerate(found):
        sheet.paste(image, (number % COLUMNS * side, number // COLUMNS * side))
    return sheet, "\n".join(said for _, said in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures; say what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add(
        "--skimage", type=Path, metavar="DIR", help="what the wheel of scikit-image was unpacked to"
    )
    add("--model", default="tiny", metavar="MODEL", help="default: %(default)s")
    add("--out", type=Path, default=Path("docs/images"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with VLM(options.model) as vlm:
        results = {"photos": first_photos(vlm)}
        for name, photo in PICTURES.items():
            path = PHOTOS / "coins.png"
            if photo.file:
                if options.skimage is None:
                    continue
                path = options.skimage / "skimage" / "data" / photo.file
            with Image.open(path) as file:
                image = file.convert("RGB").crop(photo.part)
            results[name] = drawn(vlm, image, photo.click)
    for name, (image, said) in results.items():
        with atomic_path(options.out / f"find-{name}.jpg") as path:
            image.save(path, "JPEG", quality=QUALITY)
        print(said if name == "photos" else f"{name} ({PICTURES[name].source}): {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
