"""Draw the two figures of docs/points.md: coordinates as text, and points by selection.

    python scripts/draw_pointing.py

Both show one point in the demo's picture: 192 pixels, 12 x 12 ViT patches, 6 x 6 visual tokens.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "nanomolmo2" / "assets" / "demo" / "scene.png"
OUT = ROOT / "docs" / "images"
ZOOM, MARGIN = 2, 34  # pixels of the figure a pixel of the picture; room for numbers
POINT = (155, 160)  # the butterfly, pixels
PATCH = 16  # side of a ViT patch, pixels
ROW = 2 * PATCH  # side of a visual token's window
ACCENT, GREY, DARK = "#d6006c", "#767676", "#1a1a1a"
Box = tuple[float, float, float, float]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)


def on_figure(x: float, y: float) -> tuple[float, float]:
    return MARGIN + x * ZOOM, MARGIN + y * ZOOM


def enlarged(box: Box, side: int) -> Image.Image:
    with Image.open(SCENE) as scene:
        cut = scene.convert("RGB").crop(box)
    return cut.resize((side, side), Image.Resampling.BICUBIC)


def tokens(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], texts: list[tuple[str, bool]]
) -> None:
    """Boxes side by side, one a token; with True where it is part of the place."""
    x, y = place
    for text, is_place in texts:
        width = max(22, int(draw.textlength(text, font=font(15))) + 12)
        fill = "#fbe3ef" if is_place else "#f0f0f0"
        draw.rectangle((x, y, x + width, y + 28), fill=fill, outline=ACCENT if is_place else GREY)
        draw.text((x + width / 2, y + 14), text, fill=DARK, font=font(15), anchor="mm")
        x += width + 3


def as_text() -> Image.Image:
    image, draw = canvas(960, 450)
    image.paste(enlarged((0, 0, 192, 192), 192 * ZOOM), (MARGIN, MARGIN))
    for thousandth in range(0, 1001, 200):
        at = thousandth / 1000 * 192
        x, y = on_figure(at, at)
        draw.line((x, MARGIN - 6, x, MARGIN), fill=DARK)
        draw.text((x, MARGIN - 8), str(thousandth), fill=DARK, font=font(12), anchor="mb")
        draw.line((MARGIN - 6, y, MARGIN, y), fill=DARK)
        draw.text((MARGIN - 8, y), str(thousandth), fill=DARK, font=font(12), anchor="rm")
    x, y = on_figure(*POINT)
    draw.line((x, MARGIN, x, y), fill=ACCENT, width=2)
    draw.line((MARGIN, y, x, y), fill=ACCENT, width=2)
    draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=ACCENT, outline="white", width=2)
    across, down = (f"{round(1000 * side / 192):03d}" for side in POINT)
    left = MARGIN + 192 * ZOOM + 40
    draw.text((left, 60), "Coordinates as text", fill=DARK, font=font(24))
    draw.text((left, 104), "The model writes the place digit by digit,", fill=DARK, font=font(17))
    draw.text((left, 128), "in thousandths of the width and height:", fill=DARK, font=font(17))
    answer = f'<points coords="1 1 {across} {down}">butterfly</points>'
    draw.text((left, 172), answer, fill=ACCENT, font=font(17))
    draw.text((left, 232), "picture, number of the point, x, y:", fill=GREY, font=font(15))
    head = [("1", False), ("_", False), ("1", False), ("_", False)]
    tokens(draw, (left, 256), head + [(d, True) for d in across])
    tokens(draw, (left, 292), [("_", False), *((d, True) for d in down)])
    draw.text((left, 344), "_ is a space. Each digit is a guess", fill=GREY, font=font(15))
    draw.text((left, 364), "of its own, the first one decides most.", fill=GREY, font=font(15))
    return image


def grid(draw: ImageDraw.ImageDraw, box: Box, lines: int, colour: str, width: int = 1) -> None:
    x0, y0, x1, y1 = box
    for i in range(lines + 1):
        x, y = x0 + (x1 - x0) * i / lines, y0 + (y1 - y0) * i / lines
        draw.line((x, y0, x, y1), fill=colour, width=width)
        draw.line((x0, y, x1, y), fill=colour, width=width)


def by_selection() -> Image.Image:
    image, draw = canvas(960, 470)
    side = 192 * ZOOM
    image.paste(enlarged((0, 0, 192, 192), side), (MARGIN, MARGIN))
    grid(draw, (MARGIN, MARGIN, MARGIN + side, MARGIN + side), 192 // ROW, "white")
    column, line = POINT[0] // ROW, POINT[1] // ROW
    row = line * (192 // ROW) + column
    x, y = on_figure(column * ROW, line * ROW)
    draw.rectangle((x, y, x + ROW * ZOOM, y + ROW * ZOOM), outline=ACCENT, width=4)

    left, top, big = MARGIN + side + 60, MARGIN + 40, 180
    window = (column * ROW, line * ROW, column * ROW + ROW, line * ROW + ROW)
    image.paste(enlarged(window, big), (left, top))
    grid(draw, (left, top, left + big, top + big), 2, "white", 2)
    across, down = (POINT[0] % ROW) // PATCH, (POINT[1] % ROW) // PATCH
    slot = down * 2 + across
    half = big // 2
    sx, sy = left + across * half, top + down * half
    draw.rectangle((sx, sy, sx + half, sy + half), outline=ACCENT, width=4)

    right = left + big + 60
    px, py = window[0] + across * PATCH, window[1] + down * PATCH
    image.paste(enlarged((px, py, px + PATCH, py + PATCH), big), (right, top))
    grid(draw, (right, top, right + big, top + big), 3, "white", 2)
    thirds = [min(2, 3 * (p - q) // PATCH) for p, q in zip(POINT, (px, py), strict=True)]
    cell = 3 * thirds[0] + thirds[1]
    third = big / 3
    cx, cy = right + thirds[0] * third, top + thirds[1] * third
    draw.rectangle((cx, cy, cx + third, cy + third), outline=ACCENT, width=4)

    for place, text in (
        ((MARGIN, MARGIN + side + 10), f"36 visual tokens: row {row}"),
        ((left, top + big + 10), f"its 4 ViT patches: slot {slot}"),
        ((right, top + big + 10), f"9 places in the patch: cell {cell}"),
    ):
        draw.text(place, text, fill=DARK, font=font(16))
    for x in (left - 40, right - 40):
        draw.line((x, top + big / 2, x + 26, top + big / 2), fill=ACCENT, width=3)
        draw.polygon(
            [(x + 26, top + big / 2 - 6), (x + 26, top + big / 2 + 6), (x + 36, top + big / 2)],
            fill=ACCENT,
        )
    draw.text((left, MARGIN), "Points by selection", fill=DARK, font=font(24))
    text = "Scores compare the model's state with what it has seen:"
    draw.text((left, top + big + 52), text, fill=DARK, font=font(17))
    chosen = [(f"row {row}", True), (f"slot {slot}", True), (f"cell {cell}", True), ("1", False)]
    tokens(draw, (left, top + big + 84), [*chosen, ("no more points", True)])
    draw.text(
        (left, top + big + 124),
        "Three tokens a point, and its number. The row is chosen among all",
        fill=GREY,
        font=font(15),
    )
    draw.text(
        (left, top + big + 144),
        "visual tokens and one more class, which ends the list.",
        fill=GREY,
        font=font(15),
    )
    return image


def main() -> None:
    as_text().save(OUT / "points-as-text.png", optimize=True)
    by_selection().save(OUT / "points-by-selection.png", optimize=True)


if __name__ == "__main__":
    main()
