"""Where the parts of an actor are: its joints, from its build and its pose.

Units: one height of the actor (feet at 0, top of the head at about 1, x to the right).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from curation.toonworld.motion import Pose
from curation.toonworld.palettes import INK, NAMED, WHITE, Rgb, mix, shift
from curation.toonworld.shapes import Value
from curation.toonworld.world import Action, Actor, Build, Palette

REACH = (-0.72, 0.72, -0.06, 1.42)
"""Left, right, bottom and top of the room an actor with its accessory needs, standing at 0."""

# Per build: leg length; half width and half height of the body; those of the head.
_BUILDS: dict[Build, tuple[float, float, float, float, float]] = {
    "bigheaded": (0.10, 0.20, 0.19, 0.33, 0.285),
    "stout": (0.08, 0.31, 0.26, 0.25, 0.215),
    "lanky": (0.24, 0.15, 0.22, 0.20, 0.185),
}
_BALLOON_ARM = math.radians(46)


@dataclass(frozen=True)
class Figure:
    """Where the parts of one actor are, per frame.

    Attributes:
        leg: Length of its legs.
        body: x, y, half width, half height.
        head: x, y, half width, half height.
        face: How far the middle of the face is to the right of the head's.
        shown: How much of the face is seen, 0 to 1.
        hands: (x, y) of the left and of the right one.
        pose: What it does.
        actor: Who it is.
        palette: How its colours are shifted.
    """

    leg: float
    body: tuple[Value, float, float, float]
    head: tuple[Value, float, float, float]
    face: Value
    shown: Value
    hands: tuple[tuple[Value, Value], tuple[Value, Value]]
    pose: Pose
    actor: Actor
    palette: Palette

    @property
    def main(self) -> Rgb:
        """The colour its caption tells."""
        return shift(NAMED[self.actor.color], self.palette)

    @property
    def extra(self) -> Rgb:
        """The colour of its accessory."""
        return shift(NAMED[self.actor.accessory_color], self.palette)

    @property
    def pale(self) -> Rgb:
        """Of bellies and muzzles."""
        return mix(self.main, self.white, 0.72)

    @property
    def dark(self) -> Rgb:
        """Of paws and tips."""
        return mix(self.main, self.ink, 0.45)

    @property
    def white(self) -> Rgb:
        """White in this palette."""
        return shift(WHITE, self.palette)

    @property
    def ink(self) -> Rgb:
        """Nearly black in this palette."""
        return shift(INK, self.palette)


def figure(actor: Actor, action: Action, build: Build, palette: Palette, pose: Pose) -> Figure:
    """Put an actor's joints where its pose and build have them."""
    leg, body_x, body_y, head_x, head_y = _BUILDS[build]
    middle = leg + body_y * 0.92
    head_height = middle + body_y * 0.80 + head_y * 0.88
    shoulder = middle + body_y * 0.42
    left, right = pose.arms
    if actor.accessory == "balloon":
        # The right hand holds its string, so it is the left one that waves.
        left, right = (right if action == "wave" else left), np.full_like(right, _BALLOON_ARM)
    length = 0.20 + 0.35 * body_y
    hands = tuple(
        (
            pose.lean * 0.6 + side * (body_x * 0.80 + length * np.cos(angle)),
            shoulder + length * np.sin(angle),
        )
        for side, angle in zip((-1, 1), (left, right), strict=True)
    )
    return Figure(
        leg=leg,
        body=(pose.lean * 0.4, middle, body_x, body_y),
        head=(pose.lean, head_height, head_x, head_y),
        face=np.sin(pose.turn) * np.float32(0.42 * head_x),
        shown=np.clip(np.cos(pose.turn) * 4 + 0.6, 0, 1),
        hands=(hands[0], hands[1]),
        pose=pose,
        actor=actor,
        palette=palette,
    )
