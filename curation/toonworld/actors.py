"""Drawing an actor: body, head and face of each species. Units as in ``figure.py``."""

from __future__ import annotations

import numpy as np

from curation.toonworld.accessories import accessory_parts
from curation.toonworld.figure import Figure
from curation.toonworld.palettes import NAMED, Rgb, mix, shift
from curation.toonworld.shapes import Fill, Part, Value, block, ellipse, smile, taper


def actor_parts(f: Figure) -> list[Part]:
    """All shapes of an actor, the lowest first."""
    behind, front = accessory_parts(f)
    head = [*_ears(f), *_head(f), *_face(f)]
    return [*behind, *_tail(f), *_legs(f), *_body(f), *head, *_arms(f), *front]


def _tail(f: Figure) -> list[Part]:
    x, y, rx, ry = f.body
    sway = f.pose.sway * 0.06
    root_x, root_y = x + rx * 0.7, y - ry * 0.45
    match f.actor.species:
        case "cat":
            tip = (root_x + 0.24 + sway, root_y + 0.26)
            bend = (root_x + 0.22, root_y + 0.02)
            return [
                (taper(root_x, root_y, 0.04, *bend, 0.04), _solid(f.main)),
                (taper(*bend, 0.04, *tip, 0.035), _solid(f.main)),
            ]
        case "fox":
            tip_x, tip_y = root_x + 0.27 + sway, root_y + 0.17
            return [
                (taper(root_x, root_y, 0.05, tip_x, tip_y, 0.105), _solid(f.main)),
                (ellipse(tip_x + 0.035, tip_y + 0.045, 0.085, 0.085), _solid(f.white)),
            ]
        case "dog":
            tip = (root_x + 0.16 + sway, root_y + 0.2)
            return [(taper(root_x, root_y, 0.045, *tip, 0.03), _solid(f.main))]
        case "rabbit" | "bear":
            size = 0.085 if f.actor.species == "rabbit" else 0.06
            return [(ellipse(x + rx + 0.02, y - ry * 0.5, size, size), _solid(f.pale))]
        case _:
            return []


def _legs(f: Figure) -> list[Part]:
    x, _, rx, ry = f.body
    robot, penguin = f.actor.species == "robot", f.actor.species == "penguin"
    foot_color = shift(NAMED["orange"], f.palette) if penguin else f.dark if robot else f.main
    parts: list[Part] = []
    for side, step, forward in zip((-1, 1), f.pose.steps, f.pose.feet, strict=True):
        foot_x, foot_y = side * rx * 0.5 + forward, 0.045 + step
        hip = (x + side * rx * 0.45, f.leg + ry * 0.35)
        parts.append((taper(*hip, 0.07, foot_x, foot_y + 0.02, 0.06), _solid(foot_color)))
        parts.append((ellipse(foot_x + side * 0.02, foot_y, 0.105, 0.055), _solid(foot_color)))
    return parts


def _arms(f: Figure) -> list[Part]:
    x, y, rx, ry = f.body
    robot, penguin = f.actor.species == "robot", f.actor.species == "penguin"
    parts: list[Part] = []
    shoulder = y + ry * 0.42
    for side, hand in zip((-1, 1), f.hands, strict=True):
        root = (x + side * rx * 0.80, shoulder)
        width = (0.075, 0.045) if penguin else (0.06, 0.058)
        parts.append((taper(*root, width[0], *hand, width[1]), _solid(f.main)))
        if robot:
            parts.append((ellipse(*hand, 0.07, 0.07), _solid(f.dark)))
    return parts


def _body(f: Figure) -> list[Part]:
    x, y, rx, ry = f.body
    if f.actor.species == "robot":
        button = shift(NAMED["yellow" if f.actor.color != "yellow" else "red"], f.palette)
        light = mix(f.white, button, 0.5)
        return [
            (block(x, y, rx * 0.95, ry, 0.05), _solid(f.main)),
            (block(x, y + 0.02, rx * 0.55, ry * 0.5, 0.03), Fill(f.pale)),
            (ellipse(x - rx * 0.22, y + 0.02, 0.03, 0.03), Fill(light)),
            (ellipse(x + rx * 0.22, y + 0.02, 0.03, 0.03), Fill(f.dark)),
        ]
    parts: list[Part] = [(ellipse(x, y, rx, ry), _solid(f.main))]
    turned = x + f.face * 0.5
    wide, high = (0.72, 0.80) if f.actor.species == "penguin" else (0.56, 0.64)
    belly = f.white if f.actor.species == "penguin" else f.pale
    parts.append((ellipse(turned, y - ry * 0.12, rx * wide, ry * high), Fill(belly, f.shown)))
    return parts


def _ears(f: Figure) -> list[Part]:
    x, y, rx, ry = f.head
    parts: list[Part] = []
    for side in (-1, 1):
        flop = f.pose.sway * 0.02
        match f.actor.species:
            case "cat":
                ear = (x + side * rx * 0.62, y + ry * 0.62, 0.34 * rx)
                tip = (x + side * rx * 0.80 + flop, y + ry * 1.38)
                parts += _cone(f, ear, tip, f.main, mix(f.pale, _blush(f), 0.6))
            case "fox":
                ear = (x + side * rx * 0.58, y + ry * 0.6, 0.40 * rx)
                tip = (x + side * rx * 0.86 + flop, y + ry * 1.62)
                parts += _cone(f, ear, tip, f.main, f.ink)
            case "rabbit":
                # A hat goes between the ears.
                splay = 0.42 if f.actor.accessory == "hat" else 0.0
                tip = (x + side * rx * (0.48 + 1.6 * splay) + flop, y + ry * (2.0 - splay))
                root = (x + side * rx * (0.36 + splay), y + ry * (0.8 - 0.3 * splay))
                parts.append((taper(*root, 0.065, *tip, 0.075), _solid(f.main)))
                inner = mix(f.pale, _blush(f), 0.6)
                parts.append((taper(*root, 0.03, *tip, 0.04), Fill(inner, f.shown)))
            case "bear":
                at = (x + side * rx * 0.72, y + ry * 0.78)
                parts.append((ellipse(*at, 0.36 * rx, 0.36 * rx), _solid(f.main)))
                parts.append((ellipse(*at, 0.2 * rx, 0.2 * rx), Fill(f.pale, f.shown)))
            case "frog":
                at = (x + side * rx * 0.52 + f.face * 0.5, y + ry * 0.82)
                parts.append((ellipse(*at, 0.36 * rx, 0.36 * rx), _solid(f.main)))
            case "robot":
                parts.append((block(x + side * rx * 1.0, y, 0.045, 0.07, 0.02), _solid(f.dark)))
            case _:
                pass
    if f.actor.species == "robot":
        tip = (x + f.pose.sway * 0.02, y + ry * 1.42)
        parts.append((taper(x, y + ry * 0.9, 0.018, *tip, 0.018), _solid(f.dark)))
        glow = shift(NAMED["red" if f.actor.color != "red" else "yellow"], f.palette)
        parts.append((ellipse(*tip, 0.05, 0.05), _solid(glow)))
    return parts


def _cone(
    f: Figure, root: tuple[Value, Value, float], tip: tuple[Value, Value], color: Rgb, inner: Rgb
) -> list[Part]:
    small = 0.55 * root[2]
    if f.actor.species == "fox":
        # The dark tip of a fox's ear, seen from behind too.
        from_x, from_y = (0.45 * root[0] + 0.55 * tip[0], 0.45 * root[1] + 0.55 * tip[1])
        tipped: Part = (taper(from_x, from_y, 0.5 * root[2], *tip, 0.012), _solid(inner))
    else:
        tipped = (taper(root[0], root[1], small, tip[0], tip[1], 0.005), Fill(inner, f.shown))
    return [(taper(root[0], root[1], root[2], tip[0], tip[1], 0.012), _solid(color)), tipped]


def _head(f: Figure) -> list[Part]:
    x, y, rx, ry = f.head
    if f.actor.species == "robot":
        return [(block(x, y, rx * 0.98, ry * 0.94, 0.06), _solid(f.main))]
    parts: list[Part] = [(ellipse(x, y, rx, ry), _solid(f.main))]
    if f.actor.species == "dog":
        for side in (-1, 1):
            root = (x + side * rx * 0.82, y + ry * 0.55)
            tip = (x + side * rx * 1.08, y - ry * 0.45 + f.pose.sway * 0.015)
            parts.append((taper(*root, 0.05, *tip, 0.085), _solid(f.dark)))
    return parts


def _face(f: Figure) -> list[Part]:
    x, y, rx, ry = f.head
    middle = x + f.face
    seen = f.shown
    parts: list[Part] = []
    match f.actor.species:
        case "fox":
            for side in (-1, 1):
                cheek = ellipse(middle + side * rx * 0.42, y - ry * 0.38, rx * 0.46, ry * 0.40)
                parts.append((cheek, Fill(f.white, seen)))
        case "bear" | "dog" | "cat" | "rabbit":
            muzzle = ellipse(middle, y - ry * 0.36, rx * 0.46, ry * 0.38)
            parts.append((muzzle, Fill(f.pale, seen)))
        case "penguin":
            for side in (-1, 1):
                half = ellipse(middle + side * rx * 0.3, y - ry * 0.05, rx * 0.44, ry * 0.56)
                parts.append((half, Fill(f.white, seen)))
        case "robot":
            parts.append(
                (block(middle * 0.4 + x * 0.6, y, rx * 0.76, ry * 0.66, 0.05), Fill(f.ink, seen))
            )
        case "frog":
            pass
    return [*parts, *_eyes(f, middle), *_mouth(f, middle)]


def _eyes(f: Figure, middle: Value) -> list[Part]:
    _, y, rx, ry = f.head
    wide, high, apart, up = 0.19 * rx, 0.29 * ry, 0.38 * rx, y + ry * 0.16
    if f.actor.species == "frog":
        wide, high, apart, up = 0.24 * rx, 0.26 * ry, 0.52 * rx, y + ry * 0.84
    open_ = np.float32(1.0) - 0.88 * f.pose.blink
    parts: list[Part] = []
    for side in (-1, 1):
        at = middle * 1.0 + side * apart
        if f.actor.species == "robot":
            glow = mix(f.white, shift(NAMED["yellow"], f.palette), 0.25)
            parts.append((ellipse(at, up - 0.01, wide * 1.15, high * open_), Fill(glow, f.shown)))
            continue
        look = np.sin(f.pose.turn) * np.float32(0.3 * wide)
        parts.append((ellipse(at, up, wide * 1.12, high * open_ * 1.08), Fill(f.white, f.shown)))
        pupil = ellipse(at + look, up - 0.02 * high, wide * 0.74, high * 0.76 * open_)
        parts.append((pupil, Fill(f.ink, f.shown)))
        gleam = ellipse(at + look + 0.2 * wide, up + 0.3 * high, wide * 0.26, high * 0.24 * open_)
        parts.append((gleam, Fill(f.white, f.shown)))
    return parts


def _mouth(f: Figure, middle: Value) -> list[Part]:
    _, y, rx, ry = f.head
    species, seen = f.actor.species, f.shown
    line = Fill(f.ink, seen)
    parts: list[Part] = []
    if species not in ("robot", "penguin"):
        for side in (-1, 1):
            spot = ellipse(middle + side * rx * 0.62, y - ry * 0.2, rx * 0.17, ry * 0.13)
            parts.append((spot, Fill(_blush(f), seen * np.float32(0.65))))
    match species:
        case "penguin":
            orange = shift(NAMED["orange" if f.actor.color != "orange" else "yellow"], f.palette)
            beak = taper(middle, y - ry * 0.16, 0.26 * rx, middle, y - ry * 0.5, 0.02)
            parts.append((beak, Fill(orange, seen, 0.6)))
        case "robot":
            parts.append((block(middle, y - ry * 0.38, rx * 0.3, 0.018, 0.01), Fill(f.white, seen)))
        case "frog":
            parts.append((smile(middle, y + ry * 0.12, rx * 0.56, 0.018), line))
        case _:
            nose = f.ink if species != "rabbit" else mix(_blush(f), f.ink, 0.25)
            size = {"bear": 0.2, "dog": 0.21, "fox": 0.15}.get(species, 0.12)
            low = y - ry * (0.2 if species != "fox" else 0.3)
            parts.append((ellipse(middle, low, size * rx, size * 0.72 * ry), Fill(nose, seen)))
            parts.append((smile(middle, y - ry * 0.3, rx * 0.24, 0.014), line))
    if species == "cat":
        for side in (-1, 1):
            for rise in (-0.02, 0.03):
                start = (middle + side * rx * 0.55, y - ry * 0.3)
                end = (middle + side * rx * 1.12, y - ry * 0.3 + rise)
                parts.append((taper(*start, 0.008, *end, 0.006), line))
    return parts


def _solid(color: Rgb) -> Fill:
    return Fill(color, round=1.0, line=True)


def _blush(f: Figure) -> Rgb:
    return shift((0.98, 0.55, 0.55), f.palette)
