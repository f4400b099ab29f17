"""Drawing what an actor wears or holds. Units as in ``figure.py``."""

from __future__ import annotations

import numpy as np

from curation.toonworld.figure import Figure
from curation.toonworld.palettes import mix
from curation.toonworld.shapes import Fill, Part, block, ellipse, ring, taper


def accessory_parts(f: Figure) -> tuple[list[Part], list[Part]]:
    """Shapes behind the actor, and shapes in front of it."""
    match f.actor.accessory:
        case "hat":
            return [], _hat(f)
        case "scarf":
            return [], _scarf(f)
        case "glasses":
            return [], _glasses(f)
        case "bow":
            return [], _bow(f)
        case "balloon":
            return _balloon(f), []


def _hat(f: Figure) -> list[Part]:
    x, y, rx, ry = f.head
    # Above the eyes of a frog, which are on top of its head.
    brim = y + ry * (1.35 if f.actor.species == "frog" else 0.82)
    high = 0.15
    band = mix(f.extra, f.white, 0.75)
    return [
        (block(x, brim + high, rx * 0.56, high, 0.03), _solid(f)),
        (block(x, brim + 0.055, rx * 0.56, 0.03), Fill(band)),
        (ellipse(x, brim, rx * 0.95, 0.055), _solid(f)),
    ]


def _scarf(f: Figure) -> list[Part]:
    x, y, rx, ry = f.head
    neck, wide = y - ry * 0.94 - 0.025, max(f.body[2], rx * 0.8) * 0.86
    hem = (x + wide * 0.55 + f.pose.sway * 0.05, neck - 0.24)
    return [
        (taper(x + wide * 0.5, neck, 0.065, *hem, 0.075), _solid(f)),
        (ellipse(x, neck, wide, 0.075), _solid(f)),
        (block(hem[0], hem[1] + 0.02, 0.074, 0.014), Fill(mix(f.extra, f.white, 0.75))),
    ]


def _glasses(f: Figure) -> list[Part]:
    x, y, rx, ry = f.head
    middle, seen = x + f.face, f.shown
    apart, up, size = 0.40 * rx, y + ry * (0.84 if f.actor.species == "frog" else 0.16), 0.36 * rx
    apart = 0.52 * rx if f.actor.species == "frog" else apart
    line = Fill(f.extra, seen)
    lens = Fill(mix(f.extra, f.white, 0.5), seen * np.float32(0.25))
    parts: list[Part] = []
    for side in (-1, 1):
        parts.append((ellipse(middle + side * apart, up, size, size), lens))
        parts.append((ring(middle + side * apart, up, size, 0.026), line))
    parts.append((block(middle, up, max(0.01, apart - size), 0.02), line))
    return parts


def _bow(f: Figure) -> list[Part]:
    """At the neck, not on the head: there it would hide ears, or a frog's eyes."""
    x, y, _, ry = f.head
    at_x, at_y = x + f.face * 0.5, y - ry * 0.94 - 0.03
    parts: list[Part] = []
    for side in (-1, 1):
        lobe = taper(at_x, at_y, 0.025, at_x + side * 0.135, at_y + 0.01, 0.088)
        parts.append((lobe, Fill(f.extra, f.shown, 0.8)))
    knot = mix(f.extra, f.white, 0.35)
    return [*parts, (ellipse(at_x, at_y, 0.043, 0.05), Fill(knot, f.shown, 1.0))]


def _balloon(f: Figure) -> list[Part]:
    hand_x, hand_y = f.hands[1]
    at_x, at_y = hand_x + 0.03 + f.pose.sway * 0.03, np.float32(1.02)
    return [
        (taper(hand_x, hand_y, 0.009, at_x, at_y - 0.16, 0.009), Fill(f.ink)),
        (ellipse(at_x, at_y, 0.145, 0.175), _solid(f)),
        (taper(at_x, at_y - 0.17, 0.012, at_x, at_y - 0.2, 0.03), _solid(f)),
        (ellipse(at_x - 0.05, at_y + 0.07, 0.03, 0.045), Fill(f.white, 0.75)),
    ]


def _solid(f: Figure) -> Fill:
    return Fill(f.extra, round=0.8, line=True)
