"""Trees, houses, clouds and the like: what stands in a place.

Units are heights of the frame, x to the right, y upwards. Every function returns the parts of one
prop that stands at (x, y), the lowest first, in colours before the palette shifts them.
"""

from __future__ import annotations

from curation.toonworld.palettes import Rgb, mix
from curation.toonworld.shapes import Fill, Part, block, ellipse, taper

SNOW: Rgb = (0.97, 0.98, 1.0)
BARK: Rgb = (0.48, 0.32, 0.22)


def cloud(x: float, y: float, size: float, color: Rgb) -> list[Part]:
    """A cloud around (x, y)."""
    puffs = ((-0.55, 0.0, 0.38), (0.0, 0.14, 0.52), (0.52, 0.02, 0.40), (0.0, -0.06, 0.6))
    return [
        (ellipse(x + dx * size, y + dy * size, r * size, r * 0.62 * size), Fill(color, 0.95))
        for dx, dy, r in puffs
    ]


def round_tree(x: float, y: float, size: float, leaves: Rgb) -> list[Part]:
    """A tree with a round crown."""
    crown = ((-0.26, 0.62, 0.30), (0.26, 0.62, 0.30), (0.0, 0.84, 0.36))
    trunk: Part = (taper(x, y, 0.08 * size, x, y + 0.5 * size, 0.05 * size), Fill(BARK, round=0.6))
    return [
        trunk,
        *(
            (ellipse(x + dx * size, y + dy * size, r * size, r * size), Fill(leaves, round=0.9))
            for dx, dy, r in crown
        ),
    ]


def pine(x: float, y: float, size: float, leaves: Rgb, snowy: bool = False) -> list[Part]:
    """A fir of three tiers."""
    parts: list[Part] = [(block(x, y + 0.06 * size, 0.05 * size, 0.1 * size), Fill(BARK))]
    for low, high, wide in ((0.14, 0.62, 0.30), (0.38, 0.84, 0.24), (0.62, 1.06, 0.17)):
        root, tip = (x, y + (low + 0.1) * size), (x, y + high * size)
        parts.append((taper(*root, wide * size, *tip, 0.01 * size), Fill(leaves, round=0.8)))
        if snowy:
            snow_root = (x, y + (0.55 * high + 0.45 * low) * size)
            parts.append((taper(*snow_root, 0.42 * wide * size, *tip, 0.012 * size), Fill(SNOW)))
    return parts


def palm(x: float, y: float, size: float) -> list[Part]:
    """A palm that leans to the right."""
    top_x, top_y = x + 0.16 * size, y + 0.9 * size
    leaf: Rgb = (0.24, 0.62, 0.34)
    parts: list[Part] = [
        (
            taper(x, y, 0.055 * size, x + 0.06 * size, y + 0.5 * size, 0.04 * size),
            Fill(BARK, round=0.6),
        ),
        (
            taper(x + 0.06 * size, y + 0.5 * size, 0.04 * size, top_x, top_y, 0.032 * size),
            Fill(BARK, round=0.6),
        ),
    ]
    for dx, dy in ((-0.42, -0.14), (0.42, -0.12), (-0.34, 0.16), (0.36, 0.18), (0.04, 0.30)):
        tip = (top_x + dx * size, top_y + dy * size)
        parts.append((taper(top_x, top_y, 0.075 * size, *tip, 0.012 * size), Fill(leaf, round=0.8)))
    for dx in (-0.05, 0.06):
        nut = ellipse(top_x + dx * size, top_y - 0.06 * size, 0.05 * size, 0.05 * size)
        parts.append((nut, Fill((0.42, 0.27, 0.18))))
    return parts


def cactus(x: float, y: float, size: float) -> list[Part]:
    """A cactus with two arms."""
    fill = Fill((0.36, 0.60, 0.36), round=0.9)
    return [
        (taper(x, y, 0.1 * size, x, y + 0.85 * size, 0.1 * size), fill),
        (
            taper(x, y + 0.4 * size, 0.06 * size, x - 0.26 * size, y + 0.44 * size, 0.065 * size),
            fill,
        ),
        (
            taper(
                x - 0.26 * size,
                y + 0.44 * size,
                0.065 * size,
                x - 0.27 * size,
                y + 0.68 * size,
                0.06 * size,
            ),
            fill,
        ),
        (
            taper(x, y + 0.28 * size, 0.06 * size, x + 0.25 * size, y + 0.32 * size, 0.065 * size),
            fill,
        ),
        (
            taper(
                x + 0.25 * size,
                y + 0.32 * size,
                0.065 * size,
                x + 0.26 * size,
                y + 0.54 * size,
                0.06 * size,
            ),
            fill,
        ),
    ]


def house(
    x: float, y: float, half: float, high: float, wall: Rgb, window: Rgb, floors: int
) -> list[Part]:
    """A town house with a flat roof and windows in rows."""
    parts: list[Part] = [
        (block(x, y + high / 2, half, high / 2), Fill(wall)),
        (block(x, y + high, half * 1.05, 0.014), Fill(mix(wall, (0.2, 0.15, 0.25), 0.35))),
    ]
    for floor in range(floors):
        level = y + high * (floor + 0.62) / floors
        for dx in (-0.5, 0.5):
            pane = block(x + dx * half, level, half * 0.24, high / floors * 0.25, 0.008)
            parts.append((pane, Fill(window)))
    return parts


def lamp(x: float, y: float, size: float) -> list[Part]:
    """A street lamp."""
    iron: Rgb = (0.25, 0.25, 0.33)
    return [
        (block(x, y + size / 2, 0.012, size / 2), Fill(iron)),
        (ellipse(x, y + size, 0.045, 0.05), Fill((1.0, 0.93, 0.68))),
        (block(x, y + size + 0.045, 0.05, 0.012, 0.01), Fill(iron)),
    ]


def flower(x: float, y: float, size: float, petals: Rgb) -> list[Part]:
    """A flower with its stem."""
    top = y + size
    parts: list[Part] = [(taper(x, y, 0.006, x, top, 0.005), Fill((0.26, 0.55, 0.26)))]
    for dx, dy in ((-0.3, 0.0), (0.3, 0.0), (0.0, 0.3), (0.0, -0.3)):
        leaf = ellipse(x + dx * size, top + dy * size, 0.26 * size, 0.26 * size)
        parts.append((leaf, Fill(petals)))
    return [*parts, (ellipse(x, top, 0.17 * size, 0.17 * size), Fill((0.99, 0.88, 0.40)))]


def tuft(x: float, y: float, size: float, color: Rgb) -> list[Part]:
    """Three blades of grass."""
    return [
        (taper(x, y, 0.22 * size, x + dx * size, y + dy * size, 0.02 * size), Fill(color))
        for dx, dy in ((-0.5, 0.75), (0.0, 1.0), (0.5, 0.75))
    ]


def mushroom(x: float, y: float, size: float) -> list[Part]:
    """A toadstool."""
    top = y + 0.55 * size
    parts: list[Part] = [
        (taper(x, y, 0.16 * size, x, top, 0.13 * size), Fill((0.96, 0.92, 0.84), round=0.6)),
        (
            ellipse(x, top + 0.1 * size, 0.5 * size, 0.34 * size),
            Fill((0.80, 0.28, 0.24), round=0.9),
        ),
    ]
    for dx, dy in ((-0.24, 0.16), (0.05, 0.28), (0.26, 0.12)):
        parts.append(
            (ellipse(x + dx * size, top + dy * size, 0.08 * size, 0.07 * size), Fill(SNOW))
        )
    return parts


def boat(x: float, y: float, size: float) -> list[Part]:
    """A sailing boat."""
    return [
        (
            taper(
                x + 0.03 * size, y + 0.22 * size, 0.3 * size, x + 0.03 * size, y + 1.0 * size, 0.01
            ),
            Fill(SNOW),
        ),
        (block(x, y + 0.1 * size, 0.5 * size, 0.12 * size, 0.1 * size), Fill((0.62, 0.36, 0.30))),
    ]


def rock(x: float, y: float, size: float, color: Rgb) -> list[Part]:
    """A boulder, half in the ground."""
    return [
        (ellipse(x, y + 0.1 * size, 0.6 * size, 0.4 * size), Fill(color, round=1.0)),
        (ellipse(x + 0.45 * size, y, 0.3 * size, 0.22 * size), Fill(color, round=1.0)),
    ]


def crater(x: float, y: float, size: float, color: Rgb) -> list[Part]:
    """A crater seen at a flat angle."""
    rim, pit = mix(color, (1.0, 1.0, 1.0), 0.35), mix(color, (0.1, 0.1, 0.2), 0.30)
    return [
        (ellipse(x, y, size, 0.30 * size), Fill(rim)),
        (ellipse(x, y - 0.03 * size, 0.84 * size, 0.22 * size), Fill(pit)),
    ]


def shell(x: float, y: float, size: float, color: Rgb) -> list[Part]:
    """A sea shell."""
    return [
        (
            taper(x + dx * size, y + 0.7 * size, 0.22 * size, x, y, 0.06 * size),
            Fill(color, round=0.8),
        )
        for dx in (-0.45, 0.45, 0.0)
    ]


def star(x: float, y: float, size: float) -> list[Part]:
    """A star with four rays."""
    light = Fill((1.0, 0.98, 0.86))
    return [
        (taper(x, y, 0.3 * size, x + dx * size, y + dy * size, 0.01 * size), light)
        for dx, dy in ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))
    ]
