"""Skies, and what stands in them: a sun, a moon, the earth. Units are heights of the frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld import props
from curation.toonworld.backdrop import Look, View
from curation.toonworld.draws import Draw
from curation.toonworld.palettes import Rgb, mix, shift
from curation.toonworld.shapes import Fill, Part, Sheet, ellipse, paint
from curation.toonworld.world import Light, Place

Floats = npt.NDArray[np.floating[Any]]

# Sky above, sky at the horizon, disc in the sky.
_SKIES: dict[Place, tuple[Rgb, Rgb, Rgb]] = {
    "meadow": ((0.36, 0.68, 0.96), (0.83, 0.94, 1.0), (1.0, 0.93, 0.52)),
    "beach": ((0.16, 0.62, 0.86), (0.98, 0.92, 0.78), (1.0, 0.95, 0.62)),
    "city": ((0.56, 0.55, 0.86), (1.0, 0.84, 0.78), (1.0, 0.93, 0.72)),
    "snow": ((0.60, 0.71, 0.85), (0.92, 0.95, 0.99), (1.0, 0.98, 0.82)),
    "forest": ((0.44, 0.76, 0.78), (0.88, 0.96, 0.76), (1.0, 0.97, 0.66)),
    "desert": ((0.95, 0.58, 0.36), (1.0, 0.90, 0.66), (1.0, 0.98, 0.78)),
    "night": ((0.05, 0.07, 0.24), (0.25, 0.25, 0.54), (0.99, 0.96, 0.82)),
    "moon": ((0.02, 0.02, 0.06), (0.11, 0.09, 0.20), (0.30, 0.55, 0.92)),
}
_DISC: dict[Light, tuple[float, float]] = {
    "morning": (0.17, 0.17),
    "noon": (0.5, 0.12),
    "evening": (0.83, 0.17),
}
"""Where the disc is: share of the width, units below the top."""
_DISC_RADIUS = 0.072
_HORIZON = 0.40


def draw_sky(place: Place, look: Look, view: View, draw: Draw) -> Floats:
    """(3, H, W), fixed to the frame: the sky is too far away to move."""
    unit = view.unit_px
    x = ((np.arange(view.width_px) + 0.5) / unit).astype(np.float32)[None, :, None]
    y = ((view.height_px - np.arange(view.height_px) - 0.5) / unit).astype(np.float32)[
        :, None, None
    ]
    top, low, disc = (shift(color, look.palette) for color in _SKIES[place])
    sheet = Sheet.blank(x, y, unit)
    high = view.height_px / unit
    rise = np.clip((y - _HORIZON) / (high - _HORIZON), 0, 1)[..., 0]
    share, below_top = _DISC[look.light]
    at_x, at_y = share * view.width_px / unit, high - below_top
    off = ((x - at_x) ** 2 + (y - at_y) ** 2)[..., 0]
    glow = np.float32(0.45 if place not in ("night", "moon") else 0.22) / (
        1 + off / np.float32(0.035)
    )
    for plane, a, b, c in zip(sheet.rgba, low, top, disc, strict=False):
        tone = a + (b - a) * rise
        plane[..., 0] = tone + (c - tone) * glow
    if place in ("night", "moon"):
        for _ in range(26):
            spot = draw.number(0, view.width_px / unit), draw.number(0.45, high)
            size = draw.number(0.007, 0.02)
            paint(sheet, look.shifted(props.star(*spot, size)))
    paint(sheet, look.shifted(_disc(place, at_x, at_y)), look.toward)
    return np.ascontiguousarray(sheet.rgba[:3, ..., 0])


def _disc(place: Place, x: float, y: float) -> list[Part]:
    radius, color = _DISC_RADIUS, _SKIES[place][2]
    parts: list[Part] = [(ellipse(x, y, radius, radius), Fill(color))]
    if place == "night":
        dark = Fill(mix(color, (0.5, 0.5, 0.6), 0.25))
        parts += [
            (ellipse(x + dx * radius, y + dy * radius, r * radius, r * radius), dark)
            for dx, dy, r in ((-0.35, 0.25, 0.24), (0.3, -0.1, 0.3), (-0.1, -0.5, 0.16))
        ]
    if place == "moon":
        land = Fill((0.36, 0.72, 0.40))
        parts += [
            (ellipse(x + dx * radius, y + dy * radius, rx * radius, ry * radius), land)
            for dx, dy, rx, ry in ((-0.3, 0.3, 0.4, 0.3), (0.35, -0.2, 0.3, 0.42))
        ]
        parts.append(
            (
                ellipse(x + 0.1 * radius, y + 0.62 * radius, 0.4 * radius, 0.13 * radius),
                Fill(props.SNOW),
            )
        )
    return parts
