"""Layers of a backdrop: strips that repeat to the side and slide at their own speeds.

Shape legend: H W height and width of the frame in pixels, S width of a strip in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld.draws import Draw
from curation.toonworld.palettes import Rgb, shift
from curation.toonworld.shapes import Fill, Part, Sheet, below, paint
from curation.toonworld.world import Framing, Light, Palette

Floats = npt.NDArray[np.floating[Any]]

PERIOD = 4.0
"""Width of the scenery, in units, after which it repeats."""

# Ours. A close shot is nearer and looks a little higher, so that feet stay in the picture.
_ZOOM: dict[Framing, float] = {"wide": 1.0, "close": 1.32}
_BASE: dict[Framing, float] = {"wide": 0.0, "close": 0.07}

_TOWARD: dict[Light, tuple[float, float]] = {
    "morning": (-0.75, 0.66),
    "noon": (0.0, 1.0),
    "evening": (0.75, 0.66),
}


@dataclass(frozen=True)
class View:
    """How units become pixels. A unit is the shorter side of the frame in a wide shot."""

    height_px: int
    width_px: int
    framing: Framing

    @property
    def unit_px(self) -> int:
        """Pixels per unit before zooming."""
        return min(self.height_px, self.width_px)

    @property
    def zoom(self) -> float:
        """How much larger things are than in a wide shot."""
        return _ZOOM[self.framing]

    @property
    def pixels(self) -> float:
        """Pixels per unit."""
        return self.unit_px * self.zoom

    @property
    def base(self) -> float:
        """Height above ground zero of the frame's lower edge, in units."""
        return _BASE[self.framing]


@dataclass(frozen=True)
class Layer:
    """One strip, premultiplied.

    Attributes:
        rgba: (4, rows, S + W + 1), the first W + 1 columns repeated at the end.
        top: Row of the frame its first row lies in.
        period_px: S.
        parallax: Its share of the camera's movement.
        drift: Its own movement to the left, in pixels per second.
        fall: Its own movement down; such a strip is of the frame's height, twice.
    """

    rgba: Floats
    top: int
    period_px: int
    parallax: float
    drift: float
    fall: float


@dataclass(frozen=True)
class Strip:
    """A layer that is being drawn. Colours are those before the palette."""

    sheet: Sheet
    look: Look
    parallax: float
    drift: float = 0.0
    fall: float = 0.0

    def put(self, x: float, prop: Callable[[float], Sequence[Part]]) -> None:
        """Paint a prop that stands at x, and again where it reaches over the strip's end."""
        for turn in (-PERIOD, 0.0, PERIOD):
            paint(self.sheet, self.look.shifted(prop(x + turn)), self.look.toward)

    def ground(
        self, height: float, swing: float, color: Rgb, draw: Draw
    ) -> Callable[[float], float]:
        """Fill everything below a wavy line; returns the line's height at x."""
        waves = [
            (k, draw.number(0, 2 * math.pi), swing * draw.number(0.5, 1) / k) for k in (1, 2, 5)
        ]

        def line(x: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
            turn = 2 * np.pi / PERIOD
            parts = [size * np.sin(k * turn * x + start) for k, start, size in waves]
            return height + np.sum(parts, axis=0)

        x = self.sheet.x[0, :, 0].astype(np.float64)
        heights = line(x)
        slopes = np.gradient(heights, x)
        shape = below(heights.astype(np.float32), slopes.astype(np.float32), -np.inf)
        paint(self.sheet, [(shape, Fill(shift(color, self.look.palette)))])
        return lambda at: float(line(at))

    def layer(self, view: View) -> Layer:
        """The finished layer: empty rows at the top left out, the beginning repeated at the end."""
        rgba = self.sheet.rgba[..., 0]
        used = np.flatnonzero(rgba[3].any(axis=1))
        top = 0 if self.fall or not len(used) else int(used[0])
        rgba = np.concatenate([rgba, rgba], axis=1) if self.fall else rgba[:, top:]
        period = rgba.shape[2]
        columns = np.arange(period + view.width_px + 1) % period
        return Layer(
            np.ascontiguousarray(rgba[:, :, columns]),
            top,
            period,
            self.parallax,
            self.drift * view.unit_px,
            self.fall * view.unit_px,
        )


@dataclass(frozen=True)
class Look:
    """What a style does to a backdrop."""

    palette: Palette
    light: Light

    @property
    def toward(self) -> tuple[float, float]:
        """Direction to the light."""
        return _TOWARD[self.light]

    def shifted(self, parts: Sequence[Part]) -> list[Part]:
        """Parts in the palette's colours."""
        return [
            (shape, Fill(shift(fill.color, self.palette), fill.opacity, fill.round, fill.line))
            for shape, fill in parts
        ]


@dataclass
class Backdrop:
    """A place as it is being built, from the back to the front."""

    view: View
    look: Look
    draw: Draw
    strips: list[Strip] = field(default_factory=list)
    front: list[Strip] = field(default_factory=list)

    def strip(self, parallax: float, drift: float = 0.0) -> Strip:
        """A new strip before the others."""
        self.strips.append(self._strip(parallax, drift, 0.0))
        return self.strips[-1]

    def veil(self, drift: float, fall: float) -> Strip:
        """A strip before the actors, such as falling snow."""
        self.front.append(self._strip(1.0, drift, fall))
        return self.front[-1]

    def _strip(self, parallax: float, drift: float, fall: float) -> Strip:
        period = round(PERIOD * self.view.pixels)
        pixels = period / PERIOD
        x = (np.arange(period) + 0.5) / pixels
        y = self.view.base + (self.view.height_px - np.arange(self.view.height_px) - 0.5) / pixels
        sheet = Sheet.blank(
            x.astype(np.float32)[None, :, None], y.astype(np.float32)[:, None, None], pixels
        )
        return Strip(sheet, self.look, parallax, drift, fall)


def slide(frame: Floats, layer: Layer, camera_px: float, seconds: float) -> None:
    """Lay a layer over one frame.

    Args:
        frame: (3, H, W), changed in place.
        layer: What to lay over it.
        camera_px: How far the camera is to the right.
        seconds: Time, for what moves by itself.
    """
    width = frame.shape[2]
    at = (camera_px * layer.parallax + layer.drift * seconds) % layer.period_px
    column = int(at)
    share = np.float32(at - column)
    rows = layer.rgba
    if layer.fall:
        height = frame.shape[1]
        row = height - int(layer.fall * seconds) % height
        rows = rows[:, row : row + height]
    seen = rows[:, :, column : column + width]
    if share > 0:
        seen = seen + share * (rows[:, :, column + 1 : column + 1 + width] - seen)
    under = frame[:, layer.top :]
    under *= 1 - seen[3]
    under += seen[:3]
