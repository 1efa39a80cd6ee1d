"""What light and a camera make of a scene: uneven light, vignette, blur, grain, JPEG."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from nanomolmo2.things.grounds import noise
from nanomolmo2.things.surface import pick

Rng = np.random.Generator


@dataclass(frozen=True)
class Camera:
    """One picture's faults.

    Attributes:
        slope: how the light falls off across the picture, of x and y, at most; ``vignette``: how
            much darker its corners are.
        tint, contrast, brightness: of the whole picture; ``tint`` (3,) multiplies.
        blur: radius, pixels; grain: deviation, of 255; quality: of JPEG, 0 = none.
    """

    slope: tuple[float, float]
    vignette: float
    tint: tuple[float, float, float]
    contrast: float
    brightness: float
    blur: float
    grain: float
    quality: int

    @classmethod
    def draw(cls, rng: Rng, strength: float = 1.0) -> Camera:
        """``strength``: 0 changes nothing, 1 is as in photos, up to bad ones."""
        s = strength
        angle, fall = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.45) * s * (rng.random() < 0.7)
        warmth = rng.normal(0, 0.06 * s)
        return cls(
            slope=(fall * math.cos(angle), fall * math.sin(angle)),
            vignette=float(rng.uniform(0, 0.4) * s * (rng.random() < 0.5)),
            tint=(1 + warmth, 1 + float(rng.normal(0, 0.02 * s)), 1 - warmth),
            contrast=1 + float(rng.uniform(-0.25, 0.2)) * s,
            brightness=float(rng.normal(0, 14 * s)),
            blur=float(pick(rng, [0, 0, 0, 0.5, 0.8, 1.2])) * s,
            grain=float(pick(rng, [0, 1, 2, 4, 9])) * s,
            quality=int(pick(rng, [0, 0, 95, 88, 75, 55])) if s else 0,
        )

    def take(self, rng: Rng, canvas: np.ndarray) -> np.ndarray:
        """The picture of a canvas float32 (H, W, 3): uint8 (H, W, 3). Changes the canvas."""
        height, width = canvas.shape[:2]
        x = np.linspace(-1, 1, width, dtype=np.float32)
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        lit = 1 + self.slope[0] * x + self.slope[1] * y
        if self.vignette:
            lit = lit * (1 - self.vignette * 0.5 * (x * x + y * y))
        lit = lit * self.contrast
        shift: np.ndarray | float = 127 * (1 - self.contrast) + self.brightness
        if self.grain:
            shift = noise(rng, (height, width), 0) * self.grain + shift
        pixels = np.empty(canvas.shape, np.uint8)
        for channel, tint in enumerate(np.array(self.tint, np.float32)):
            plane = canvas[..., channel]
            plane *= lit * tint
            plane += shift
            pixels[..., channel] = np.clip(plane, 0, 255, out=plane)
        if not self.blur and not self.quality:
            return pixels
        image = Image.fromarray(pixels)
        if self.blur:
            image = image.filter(ImageFilter.GaussianBlur(self.blur))
        if self.quality:
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=self.quality)
            image = Image.open(stream)
        return np.array(image)
