"""Named colours, and the four palettes that shift all of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld.world import Color, Palette

Floats = npt.NDArray[np.floating[Any]]
Rgb = tuple[float, float, float]
"""Red, green, blue, 0 to 1, as displays take them."""

NAMED: dict[Color, Rgb] = {
    "red": (0.90, 0.20, 0.18),
    "orange": (0.98, 0.53, 0.10),
    "yellow": (0.99, 0.85, 0.20),
    "green": (0.16, 0.64, 0.30),
    "blue": (0.16, 0.44, 0.90),
    "purple": (0.53, 0.28, 0.78),
    "pink": (0.99, 0.55, 0.75),
}

WHITE: Rgb = (1.0, 0.99, 0.96)
INK: Rgb = (0.13, 0.10, 0.16)

_LUMA = (0.299, 0.587, 0.114)
_SHIFTS: dict[Palette, tuple[float, Rgb, Rgb]] = {
    # Saturation, gain and lift. Far enough apart to be told from one another, near enough to plain
    # that every named colour keeps its name.
    "plain": (1.0, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    "warm": (1.0, (0.99, 0.92, 0.72), (0.02, 0.01, 0.0)),
    "cool": (0.95, (0.87, 0.95, 0.89), (0.0, 0.03, 0.11)),
    "pastel": (0.72, (0.72, 0.72, 0.72), (0.27, 0.26, 0.26)),
}


@lru_cache(maxsize=4096)
def shift(color: Rgb, palette: Palette) -> Rgb:
    """A colour as a palette shows it."""
    saturation, gain, lift = _SHIFTS[palette]
    gray = sum(c * weight for c, weight in zip(color, _LUMA, strict=True))
    shifted = (
        low + by * (gray + saturation * (c - gray))
        for c, by, low in zip(color, gain, lift, strict=True)
    )
    red, green, blue = (min(1.0, max(0.0, c)) for c in shifted)
    return red, green, blue


def shift_picture(picture: Floats, palette: Palette) -> Floats:
    """(..., 3) a picture drawn in the plain palette, as another shows it.

    Right but for the lit sides of round things, which are brightened after the shift.
    """
    saturation, gain, lift = _SHIFTS[palette]
    gray = (picture @ np.array(_LUMA, np.float32))[..., None]
    colors = gray + np.float32(saturation) * (picture - gray)
    return np.clip(as_array(lift) + as_array(gain) * colors, 0, 1)


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """``share`` of ``b`` in ``a``."""
    red, green, blue = (p + (q - p) * share for p, q in zip(a, b, strict=True))
    return red, green, blue


def as_array(color: Rgb) -> Floats:
    """(3,) float32."""
    return np.array(color, np.float32)
