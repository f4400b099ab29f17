"""Smooth shapes from signed distances, drawn for many frames at once.

A shape is a distance to its edge, negative inside, in the units of the sheet it is drawn on; half a
pixel on either side of the edge is blended. Only additions, products, divisions and square roots
touch pixels, which IEEE 754 rounds the same everywhere, so a picture is the same on any machine.

Shape legend: H W height and width of a sheet in pixels, h w those of a box in it, T frames. T comes
last, so that a number per frame broadcasts by itself, and is 1 on still sheets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld.palettes import Rgb

Floats = npt.NDArray[np.floating[Any]]
Value = float | np.floating[Any] | Floats
"""A number, or one per frame, (T,)."""
Distance = Callable[[Floats, Floats], Floats]
"""Of x (1, w, T) and y (h, 1, T); gives (h, w, T)."""

_TINY = np.float32(1e-6)


@dataclass(frozen=True)
class Shape:
    """A distance, and the box (left, right, bottom, top) outside which it is positive."""

    distance: Distance
    box: tuple[Value, Value, Value, Value]


@dataclass(frozen=True)
class Sheet:
    """Pictures being drawn.

    Attributes:
        rgba: (4, H, W, T), colours multiplied by their opacity.
        x: (1, W, T) where pixel centres lie, in units, to the right.
        y: (H, 1, T) likewise, upwards.
        pixels: Pixels per unit.
    """

    rgba: Floats
    x: Floats
    y: Floats
    pixels: float

    @classmethod
    def blank(cls, x: Floats, y: Floats, pixels: float) -> Sheet:
        """An empty sheet with pixel centres at ``x`` (1, W, T) and ``y`` (H, 1, T)."""
        shape = (4, y.shape[0], x.shape[1], max(x.shape[2], y.shape[2]))
        return cls(np.zeros(shape, np.float32), x, y, pixels)

    @cached_property
    def grid(self) -> tuple[Value, Value, Value, Value]:
        """Where the first column lies, the step to the next, and the same of rows."""
        grid = (
            self.x[0, 0],
            self.x[0, 1] - self.x[0, 0],
            self.y[0, 0],
            self.y[1, 0] - self.y[0, 0],
        )
        # Plain numbers on still sheets: there the arithmetic costs more than the painting.
        still = self.rgba.shape[3] == 1
        return (*(float(v[0]) if still else v for v in grid),)  # type: ignore[return-value]

    def window(self, shape: Shape, margin: float = 0.0) -> tuple[slice, slice] | None:
        """Rows and columns that hold a shape in every frame, and ``margin`` units around it.

        None: it lies outside.
        """
        left, right, bottom, top = shape.box
        more = margin + 1 / self.pixels
        x0, dx, y0, dy = self.grid
        columns = _span((left - more - x0) / dx, (right + more - x0) / dx, self.x.shape[1])
        rows = _span((top + more - y0) / dy, (bottom - more - y0) / dy, self.y.shape[0])
        return (rows, columns) if rows and columns else None


@dataclass(frozen=True)
class Fill:
    """How a shape is painted.

    Attributes:
        color: Its colour.
        opacity: 0 to 1.
        round: How strongly its side to the light is brighter than the other, 0 to 1.
        line: Whether it belongs to the outline of the whole figure.
    """

    color: Rgb
    opacity: Value = 1.0
    round: float = 0.0
    line: bool = False


Part = tuple[Shape, Fill]


def paint(sheet: Sheet, parts: Sequence[Part], light: tuple[float, float] = (0.0, 1.0)) -> None:
    """Paint parts over what is there, the first one lowest.

    Args:
        sheet: Changed in place.
        parts: Shapes and their fills.
        light: Direction towards the light, (x, y) of length 1.
    """
    for shape, fill in parts:
        window = sheet.window(shape)
        if window:
            rows, columns = window
            distance = shape.distance(sheet.x[:, columns], sheet.y[rows])
            _cover(sheet, rows, columns, distance, shape, fill, light)


def paint_lined(
    sheet: Sheet, parts: Sequence[Part], light: tuple[float, float], line: Rgb, width: float
) -> None:
    """Like :func:`paint`, with a line of ``width`` units around all parts that ask for one."""
    for shape, fill in parts:
        window = sheet.window(shape, width) if fill.line else None
        if window:
            rows, columns = window
            distance = shape.distance(sheet.x[:, columns], sheet.y[rows]) - np.float32(width)
            _cover(sheet, rows, columns, distance, shape, Fill(line, fill.opacity), light)
    paint(sheet, parts, light)


def ellipse(x: Value, y: Value, radius_x: Value, radius_y: Value) -> Shape:
    """An upright ellipse around (x, y). The distance is right to first order at its edge."""

    def distance(px: Floats, py: Floats) -> Floats:
        u, v = ((px - x) / radius_x) ** 2, ((py - y) / radius_y) ** 2
        value = np.sqrt(u + v)
        slope = np.sqrt(u / np.square(radius_x) + v / np.square(radius_y)) + _TINY
        return value * (value - 1) / slope

    return Shape(distance, (x - radius_x, x + radius_x, y - radius_y, y + radius_y))


def taper(x0: Value, y0: Value, r0: Value, x1: Value, y1: Value, r1: Value) -> Shape:
    """A limb from a disc around (x0, y0) to one around (x1, y1); a cone where a radius is small."""
    along_x, along_y = x1 - x0, y1 - y0
    square = np.maximum(along_x * along_x + along_y * along_y, _TINY).astype(np.float32)

    def distance(px: Floats, py: Floats) -> Floats:
        dx, dy = px - x0, py - y0
        share = np.clip(dx * (along_x / square) + dy * (along_y / square), 0, 1)
        off_x, off_y = dx - share * along_x, dy - share * along_y
        return np.sqrt(off_x * off_x + off_y * off_y) - (r0 + share * (r1 - r0))

    box = (
        np.minimum(x0 - r0, x1 - r1),
        np.maximum(x0 + r0, x1 + r1),
        np.minimum(y0 - r0, y1 - r1),
        np.maximum(y0 + r0, y1 + r1),
    )
    return Shape(distance, box)


def block(x: Value, y: Value, half_x: Value, half_y: Value, corner: float = 0.0) -> Shape:
    """An upright rectangle around (x, y) with rounded corners."""

    def distance(px: Floats, py: Floats) -> Floats:
        qx = np.abs(px - x) - (half_x - corner)
        qy = np.abs(py - y) - (half_y - corner)
        outside = np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2)
        return outside + np.minimum(np.maximum(qx, qy), 0) - corner

    return Shape(distance, (x - half_x, x + half_x, y - half_y, y + half_y))


def ring(x: Value, y: Value, radius: Value, half_width: float) -> Shape:
    """A circle's line around (x, y)."""

    def distance(px: Floats, py: Floats) -> Floats:
        return np.abs(np.sqrt((px - x) ** 2 + (py - y) ** 2) - radius) - half_width

    reach = radius + half_width
    return Shape(distance, (x - reach, x + reach, y - reach, y + reach))


def smile(x: Value, y: Value, radius: Value, half_width: float) -> Shape:
    """The lower part of a circle's line whose centre is (x, y)."""

    def distance(px: Floats, py: Floats) -> Floats:
        dx, dy = px - x, py - y
        line = np.abs(np.sqrt(dx * dx + dy * dy) - radius) - half_width
        return np.maximum(line, dy + 0.35 * radius)

    reach = radius + half_width
    return Shape(distance, (x - reach, x + reach, y - reach, y))


def below(heights: Floats, slopes: Floats, bottom: float) -> Shape:
    """Everything under a line over the whole width of a still sheet.

    Args:
        heights: (W,) of the line.
        slopes: (W,) its derivative, so that steep parts are as sharp as flat ones.
        bottom: Lower edge of the sheet.
    """
    line = heights[None, :, None]
    scale = (1 / np.sqrt(1 + slopes * slopes))[None, :, None].astype(np.float32)

    def distance(px: Floats, py: Floats) -> Floats:
        return (py - line) * scale

    return Shape(distance, (-np.inf, np.inf, bottom, float(heights.max())))


def _span(low: Value, high: Value, size: int) -> slice | None:
    first = float(low) if isinstance(low, int | float) else float(low.min())
    last = float(high) if isinstance(high, int | float) else float(high.max())
    start, stop = max(0, math.floor(max(first, -1.0))), min(size, math.ceil(min(last, size)) + 1)
    return slice(start, stop) if start < stop else None


def _cover(
    sheet: Sheet,
    rows: slice,
    columns: slice,
    distance: Floats,
    shape: Shape,
    fill: Fill,
    light: tuple[float, float],
) -> None:
    """Blend one colour, brighter towards the light, over a box of the sheet."""
    cover = np.clip(0.5 - distance * np.float32(sheet.pixels), 0, 1)
    if not (isinstance(fill.opacity, float) and fill.opacity == 1.0):
        cover = cover * fill.opacity
    box = sheet.rgba[:, rows, columns]
    box *= 1 - cover
    box[3] += cover
    if not fill.round:
        for plane, value in zip(box, fill.color, strict=False):
            plane += cover * np.float32(value)
        return
    lit = cover * _facing(sheet.x[:, columns], sheet.y[rows], shape, light)
    for plane, value in zip(box, fill.color, strict=False):
        bright, dark = value + (1 - value) * 0.25 * fill.round, value * (1 - 0.3 * fill.round)
        plane += cover * np.float32((bright + dark) / 2)
        plane += lit * np.float32((bright - dark) / 2)


def _facing(px: Floats, py: Floats, shape: Shape, light: tuple[float, float]) -> Floats:
    """-1 on the side of a shape away from the light to 1 on the side towards it."""
    left, right, bottom, top = shape.box
    reach = np.maximum((right - left) + (top - bottom), _TINY) / 4
    toward = (px - (left + right) / 2) * (light[0] / reach)
    return np.clip(toward + (py - (bottom + top) / 2) * (light[1] / reach), -1, 1)
