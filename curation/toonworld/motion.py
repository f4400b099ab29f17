"""How actors move: a pose per frame for each action.

Shape legend: T frames. Lengths are in heights of the actor, times in seconds, angles in radians
from the direction to the right, counter-clockwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld.world import Action

Times = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]

_DOWN = math.radians(-68)
"""Angle at which a right arm hangs; left arms mirror theirs."""
_JUMP_S = 0.9
_TURN_S = 1.3
_STEP_S = 0.62
_BEAT_S = 0.5
_BLINK_EVERY_S = 2.3
_BLINK_S = 0.26


@dataclass(frozen=True)
class Pose:
    """A pose per frame; every field is (T,).

    Attributes:
        x: How far from its place, to the right.
        lift: How far off the ground.
        squash: Height over usual height; the width makes up for it.
        lean: How far the head is to the right of the feet.
        turn: Where it looks: 0 at the viewer, pi/2 to the right, pi away from the viewer.
        arms: Angles of the left arm (mirrored) and of the right one.
        feet: How far the left and the right foot are to the right of where they stand.
        steps: How far they are lifted.
        blink: 0 with open eyes, 1 with closed ones.
        sway: -1 to 1, for what hangs: tails, scarves, strings.
    """

    x: Floats
    lift: Floats
    squash: Floats
    lean: Floats
    turn: Floats
    arms: tuple[Floats, Floats]
    feet: tuple[Floats, Floats]
    steps: tuple[Floats, Floats]
    blink: Floats
    sway: Floats


def pose(action: Action, t: Times, seconds: float, phase: float, reach: float) -> Pose:
    """Poses at times ``t`` of a shot.

    Args:
        action: What the actor does.
        t: (T,) since the shot's start.
        seconds: Length of the shot.
        phase: 0 to 1, so that two actors do not move as one.
        reach: How far a walk may lead, to either side.
    """
    t = t + 3 * phase
    breath = np.sin(2 * np.pi * t / 1.7)
    zero = np.zeros_like(t)
    values: dict[str, object] = {
        "x": zero,
        "lift": zero,
        "squash": 1 + 0.012 * breath,
        "lean": 0.012 * np.sin(2 * np.pi * t / 2.6),
        "turn": 0.25 * np.sin(2 * np.pi * t / 3.1),
        "arms": (_DOWN + 0.05 * breath, _DOWN + 0.05 * breath),
        "feet": (zero, zero),
        "steps": (zero, zero),
        "blink": np.maximum(0, 1 - np.abs((t % _BLINK_EVERY_S) - _BLINK_S / 2) / (_BLINK_S / 2)),
        "sway": np.sin(2 * np.pi * t / 1.3),
    }
    match action:
        case "walk_left" | "walk_right":
            to = 1 if action == "walk_right" else -1
            values |= _walk(t, t - 3 * phase, seconds, to, reach)
        case "jump":
            values |= _jump(t)
        case "wave":
            wave = math.radians(28) + math.radians(26) * np.sin(2 * np.pi * t / 0.55)
            values |= {"arms": (zero + _DOWN, wave), "lean": 0.03 * np.sin(2 * np.pi * t / 1.1)}
        case "spin":
            values |= _spin(t)
        case "dance":
            values |= _dance(t)
    return Pose(**{name: _single(value) for name, value in values.items()})  # type: ignore[arg-type]


def _walk(t: Times, clock: Times, seconds: float, to: int, reach: float) -> dict[str, object]:
    swing = np.sin(2 * np.pi * t / (2 * _STEP_S))
    ahead = np.cos(2 * np.pi * t / (2 * _STEP_S))
    speed = min(0.8, 2 * reach / seconds)
    return {
        "x": to * speed * (clock - seconds / 2),
        "lift": 0.035 * np.abs(ahead),
        "squash": 1 + 0.03 * np.abs(ahead) - 0.015,
        "lean": to * 0.03 + 0 * t,
        "turn": to * 0.75 + 0 * t,
        "arms": (_DOWN - 0.55 * swing * to, _DOWN - 0.55 * swing * to),
        "feet": (0.11 * swing, -0.11 * swing),
        "steps": (0.07 * np.maximum(0, to * ahead), 0.07 * np.maximum(0, -to * ahead)),
        "sway": swing,
    }


def _jump(t: Times) -> dict[str, object]:
    """Crouch, a parabola, landing: the volume stays, so a low figure is a wide one."""
    u = (t / _JUMP_S) % 1
    v = np.clip((u - 0.25) / 0.6, 0, 1)
    up = 4 * v * (1 - v)
    crouch = np.sin(np.pi * np.clip(u / 0.25, 0, 1)) + np.sin(
        np.pi * np.clip((u - 0.85) / 0.15, 0, 1)
    )
    stretch = np.where((v > 0) & (v < 1), 0.12 * (2 * v - 1) ** 2, 0)
    arms = _DOWN + math.radians(115) * up
    return {
        "lift": 0.34 * up,
        "squash": 1 - 0.17 * crouch + stretch,
        "arms": (arms, arms),
        "steps": (0.05 * up, 0.05 * up),
        "sway": 1 - 2 * up,
    }


def _spin(t: Times) -> dict[str, object]:
    turn = 2 * np.pi * t / _TURN_S
    out = math.radians(8) + 0.15 * np.sin(2 * turn)
    return {
        "turn": turn,
        "lift": 0.03 * np.abs(np.sin(turn)),
        "squash": 1 + 0.03 * np.cos(2 * turn),
        "arms": (out, out),
        "feet": (0.05 * np.cos(turn), 0.05 * np.cos(turn + np.pi)),
        "sway": np.sin(turn),
    }


def _dance(t: Times) -> dict[str, object]:
    beat = np.pi * t / _BEAT_S
    side = np.sin(beat)
    up = np.abs(np.cos(beat))
    return {
        "x": 0.1 * side,
        "lift": 0.05 * up,
        "squash": 0.94 + 0.09 * up,
        "lean": 0.09 * side,
        "turn": 0.55 * side,
        "arms": (
            math.radians(20) - math.radians(52) * side,
            math.radians(20) + math.radians(52) * side,
        ),
        "steps": (0.1 * np.maximum(0, side), 0.1 * np.maximum(0, -side)),
        "sway": side,
    }


def _single(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(np.asarray(v, np.float32) for v in value)
    return np.asarray(value, np.float32)
