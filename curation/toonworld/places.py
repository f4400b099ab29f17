"""The places of ToonWorld: far and near scenery, ground.

Units are heights of the frame. The ground ends at about 0.4, actors stand at 0.17.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld import props
from curation.toonworld.backdrop import PERIOD, Backdrop, Layer, Look, View
from curation.toonworld.draws import Draw
from curation.toonworld.palettes import Rgb, mix
from curation.toonworld.shapes import Fill, Part, block, ellipse, taper
from curation.toonworld.sky import draw_sky
from curation.toonworld.world import Place, Style

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Scenery:
    """A place, drawn: (3, H, W) sky, layers before it, layers before the actors."""

    sky: Floats
    layers: tuple[Layer, ...]
    front: tuple[Layer, ...]


def build(place: Place, style: Style, name: str, view: View) -> Scenery:
    """Draw a place. The same name gives the same trees, in any framing and style."""
    look = Look(style.palette, style.light)
    backdrop = Backdrop(view, look, Draw("scenery", name))
    _PAINTERS[place](backdrop)
    return Scenery(
        draw_sky(place, look, view, Draw("stars", name)),
        tuple(strip.layer(view) for strip in backdrop.strips),
        tuple(strip.layer(view) for strip in backdrop.front),
    )


def _spread(draw: Draw, count: int) -> list[float]:
    """Places along the period, none too near to the next."""
    step = PERIOD / count
    return [step * (k + draw.number(0.1, 0.9)) for k in range(count)]


def _clouds(b: Backdrop, color: Rgb, count: int = 5) -> None:
    strip = b.strip(0.08, drift=0.02)
    for x in _spread(b.draw, count):
        y, size = b.draw.number(0.64, 0.9), b.draw.number(0.09, 0.17)
        strip.put(x, lambda at, y=y, size=size: props.cloud(at, y, size, color))


def _meadow(b: Backdrop) -> None:
    _clouds(b, (1.0, 1.0, 1.0))
    b.strip(0.2).ground(0.50, 0.05, (0.56, 0.79, 0.60), b.draw)
    middle = b.strip(0.45)
    line = middle.ground(0.45, 0.04, (0.45, 0.73, 0.42), b.draw)
    for x in _spread(b.draw, 7):
        size, y = b.draw.number(0.14, 0.22), line(x) - 0.02
        green = mix((0.24, 0.56, 0.30), (0.45, 0.66, 0.24), b.draw.number())
        middle.put(x, lambda at, s=size, g=green, y=y: props.round_tree(at, y, s, g))
    near = b.strip(1.0)
    near.ground(0.38, 0.012, (0.60, 0.84, 0.40), b.draw)
    near.ground(0.21, 0.012, (0.54, 0.79, 0.35), b.draw)
    near.ground(0.07, 0.012, (0.47, 0.73, 0.31), b.draw)
    petals: tuple[Rgb, ...] = ((1.0, 1.0, 1.0), (0.98, 0.72, 0.80), (0.74, 0.66, 0.95))
    for x in _spread(b.draw, 16):
        y = b.draw.number(0.04, 0.34)
        near.put(x, lambda at, y=y: props.tuft(at, y, 0.03, (0.36, 0.62, 0.26)))
    for x in _spread(b.draw, 14):
        y, size, petal = (
            b.draw.number(0.03, 0.32),
            b.draw.number(0.026, 0.04),
            b.draw.choice(petals),
        )
        near.put(x, lambda at, y=y, s=size, p=petal: props.flower(at, y, s, p))


def _beach(b: Backdrop) -> None:
    _clouds(b, (1.0, 0.99, 0.95), 4)
    sea = b.strip(0.15, drift=0.012)
    sea.ground(0.47, 0.0, (0.12, 0.52, 0.72), b.draw)
    for x in _spread(b.draw, 3):
        sea.put(x, lambda at: props.boat(at, 0.455, 0.085))
    waves = b.strip(0.4, drift=-0.03)
    waves.ground(0.415, 0.006, (0.20, 0.66, 0.78), b.draw)
    for x in _spread(b.draw, 14):
        y = b.draw.number(0.36, 0.405)
        waves.put(x, lambda at, y=y: [(ellipse(at, y, 0.07, 0.006), Fill((0.80, 0.95, 0.96)))])
    near = b.strip(1.0)
    near.ground(0.355, 0.010, (0.93, 0.97, 0.94), b.draw)
    near.ground(0.335, 0.010, (0.97, 0.87, 0.63), b.draw)
    near.ground(0.15, 0.014, (0.94, 0.81, 0.55), b.draw)
    for x in _spread(b.draw, 4):
        size = b.draw.number(0.36, 0.46)
        near.put(x, lambda at, s=size: props.palm(at, 0.30, s))
    for x in _spread(b.draw, 9):
        y, tone = b.draw.number(0.03, 0.26), b.draw.choice(((0.98, 0.80, 0.76), (1.0, 0.96, 0.90)))
        near.put(x, lambda at, y=y, t=tone: props.shell(at, y, 0.028, t))


def _city(b: Backdrop) -> None:
    far = b.strip(0.2)
    for k, x in enumerate(_spread(b.draw, 16)):
        wall = ((0.70, 0.66, 0.86), (0.78, 0.72, 0.88))[k % 2]
        high = b.draw.number(0.18, 0.34)
        far.put(
            x,
            lambda at, h=high, w=wall: props.house(
                at, 0.36, 0.14, h, w, mix(w, (1, 1, 1), 0.25), 5
            ),
        )
    near = b.strip(0.55)
    walls: tuple[Rgb, ...] = (
        (0.86, 0.62, 0.55),
        (0.62, 0.66, 0.76),
        (0.92, 0.80, 0.62),
        (0.66, 0.58, 0.68),
    )
    for k in range(12):
        x, high = PERIOD * (k + 0.5) / 12, b.draw.number(0.16, 0.30)
        wall = walls[(k + int(b.draw.number(0, 2)) * 2) % 4]
        near.put(
            x, lambda at, h=high, w=wall: props.house(at, 0.34, 0.162, h, w, (1.0, 0.95, 0.74), 3)
        )
    street = b.strip(1.0)
    street.ground(0.365, 0.0, (0.80, 0.78, 0.80), b.draw)
    for x in _spread(b.draw, 5):
        street.put(x, lambda at: props.lamp(at, 0.33, 0.26))
    street.ground(0.285, 0.0, (0.58, 0.57, 0.62), b.draw)
    street.ground(0.272, 0.0, (0.46, 0.46, 0.53), b.draw)
    for k in range(8):
        dash = PERIOD * (k + 0.5) / 8
        street.put(dash, lambda at: [(ellipse(at, 0.09, 0.11, 0.012), Fill((0.93, 0.90, 0.78)))])


def _snow(b: Backdrop) -> None:
    far = b.strip(0.15)
    for x in _spread(b.draw, 7):
        high, wide = b.draw.number(0.62, 0.74), b.draw.number(0.26, 0.36)
        far.put(x, lambda at, h=high, w=wide: _mountain(at, h, w))
    far.ground(0.43, 0.02, (0.82, 0.88, 0.96), b.draw)
    middle = b.strip(0.45)
    line = middle.ground(0.42, 0.025, (0.88, 0.92, 0.98), b.draw)
    for x in _spread(b.draw, 9):
        size, y = b.draw.number(0.18, 0.27), line(x) - 0.02
        middle.put(x, lambda at, s=size, y=y: props.pine(at, y, s, (0.28, 0.46, 0.48), True))
    near = b.strip(1.0)
    near.ground(0.37, 0.012, (0.93, 0.96, 1.0), b.draw)
    near.ground(0.22, 0.014, (0.88, 0.92, 0.99), b.draw)
    near.ground(0.08, 0.014, (0.82, 0.88, 0.97), b.draw)
    veil = b.veil(0.04, 0.22)
    for _ in range(70):
        y, size = b.draw.number(0.1, 0.98), b.draw.number(0.006, 0.012)
        flake: Part = (ellipse(0, 0, size, size), Fill(props.SNOW, 0.9))
        veil.put(
            b.draw.number(0, PERIOD),
            lambda at, y=y, s=size, f=flake: [(ellipse(at, y, s, s), f[1])],
        )


def _mountain(x: float, high: float, wide: float) -> list[Part]:
    return [
        (taper(x, 0.36, wide, x, high, 0.01), Fill((0.62, 0.68, 0.80), round=0.6)),
        (taper(x, high - 0.075, wide * 0.24, x, high, 0.012), Fill(props.SNOW)),
    ]


def _forest(b: Backdrop) -> None:
    for parallax, count, tone, low, high in (
        (0.15, 16, (0.52, 0.74, 0.62), 0.34, 0.46),
        (0.4, 13, (0.33, 0.60, 0.44), 0.36, 0.48),
    ):
        strip = b.strip(parallax)
        strip.ground(0.42, 0.02, tone, b.draw)
        for x in _spread(b.draw, count):
            size = b.draw.number(low, high)
            strip.put(x, lambda at, s=size, t=tone: props.pine(at, 0.36, s, t))
    near = b.strip(1.0)
    near.ground(0.37, 0.016, (0.44, 0.58, 0.32), b.draw)
    for x in _spread(b.draw, 6):
        size = b.draw.number(0.40, 0.48)
        near.put(x, lambda at, s=size: props.pine(at, 0.31, s, (0.17, 0.44, 0.30)))
    near.ground(0.20, 0.014, (0.38, 0.52, 0.28), b.draw)
    near.ground(0.07, 0.012, (0.32, 0.46, 0.25), b.draw)
    for x in _spread(b.draw, 7):
        y, size = b.draw.number(0.05, 0.30), b.draw.number(0.035, 0.06)
        near.put(x, lambda at, y=y, s=size: props.mushroom(at, y, s))
    for x in _spread(b.draw, 14):
        y = b.draw.number(0.03, 0.33)
        near.put(x, lambda at, y=y: props.tuft(at, y, 0.035, (0.24, 0.40, 0.20)))


def _desert(b: Backdrop) -> None:
    far = b.strip(0.15)
    for x in _spread(b.draw, 4):
        half, high = b.draw.number(0.14, 0.26), b.draw.number(0.08, 0.16)
        far.put(x, lambda at, w=half, h=high: _mesa(at, w, h))
    far.ground(0.45, 0.02, (0.93, 0.66, 0.45), b.draw)
    b.strip(0.4).ground(0.42, 0.035, (0.95, 0.73, 0.48), b.draw)
    near = b.strip(1.0)
    near.ground(0.37, 0.02, (0.98, 0.82, 0.56), b.draw)
    for x in _spread(b.draw, 6):
        size = b.draw.number(0.17, 0.28)
        near.put(x, lambda at, s=size: props.cactus(at, 0.33, s))
    near.ground(0.22, 0.02, (0.95, 0.76, 0.49), b.draw)
    near.ground(0.08, 0.02, (0.91, 0.69, 0.43), b.draw)
    for x in _spread(b.draw, 7):
        y, size = b.draw.number(0.03, 0.28), b.draw.number(0.03, 0.06)
        near.put(x, lambda at, y=y, s=size: props.rock(at, y, s, (0.72, 0.50, 0.38)))


def _mesa(x: float, half: float, high: float) -> list[Part]:
    rock: Rgb = (0.80, 0.44, 0.34)
    return [
        (block(x, 0.42 + high / 2, half, high / 2 + 0.03, 0.02), Fill(rock)),
        (block(x, 0.42 + high + 0.02, half * 0.94, 0.012), Fill(mix(rock, (1.0, 0.9, 0.7), 0.35))),
        (
            block(x + half * 0.75, 0.44 + high * 0.25, half * 0.6, high * 0.35, 0.02),
            Fill(mix(rock, (0.4, 0.2, 0.3), 0.15)),
        ),
    ]


def _night(b: Backdrop) -> None:
    b.strip(0.2).ground(0.52, 0.06, (0.15, 0.19, 0.40), b.draw)
    middle = b.strip(0.45)
    line = middle.ground(0.45, 0.04, (0.11, 0.20, 0.34), b.draw)
    for x in _spread(b.draw, 7):
        size, y = b.draw.number(0.16, 0.24), line(x) - 0.02
        middle.put(x, lambda at, s=size, y=y: props.round_tree(at, y, s, (0.08, 0.19, 0.27)))
    near = b.strip(1.0)
    near.ground(0.38, 0.02, (0.14, 0.30, 0.36), b.draw)
    near.ground(0.22, 0.016, (0.12, 0.27, 0.33), b.draw)
    near.ground(0.08, 0.014, (0.10, 0.23, 0.29), b.draw)
    for x in _spread(b.draw, 16):
        y = b.draw.number(0.03, 0.34)
        near.put(x, lambda at, y=y: props.tuft(at, y, 0.032, (0.19, 0.38, 0.40)))
    flies = b.strip(1.2, drift=0.03)
    for x in _spread(b.draw, 22):
        y = b.draw.number(0.25, 0.62)
        for size, shown in ((0.020, 0.25), (0.008, 1.0)):
            flies.put(
                x,
                lambda at, y=y, s=size, o=shown: [
                    (ellipse(at, y, s, s), Fill((0.98, 0.95, 0.55), o))
                ],
            )


def _moon(b: Backdrop) -> None:
    b.strip(0.1).ground(0.47, 0.06, (0.42, 0.42, 0.50), b.draw)
    middle = b.strip(0.4)
    middle.ground(0.42, 0.03, (0.54, 0.54, 0.60), b.draw)
    near = b.strip(1.0)
    gray: Rgb = (0.69, 0.69, 0.73)
    near.ground(0.37, 0.012, gray, b.draw)
    near.ground(0.10, 0.012, (0.63, 0.63, 0.68), b.draw)
    for x in _spread(b.draw, 12):
        y = b.draw.number(0.04, 0.33)
        size = b.draw.number(0.05, 0.11) * (1.25 - y)
        near.put(x, lambda at, y=y, s=size: props.crater(at, y, s, gray))
    for x in _spread(b.draw, 6):
        size = b.draw.number(0.03, 0.06)
        near.put(x, lambda at, s=size: props.rock(at, 0.36, s, (0.60, 0.60, 0.65)))


_PAINTERS = {
    "meadow": _meadow,
    "beach": _beach,
    "city": _city,
    "snow": _snow,
    "forest": _forest,
    "desert": _desert,
    "night": _night,
    "moon": _moon,
}
