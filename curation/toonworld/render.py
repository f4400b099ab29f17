"""Filming ToonWorld: frames of a shot, of a video.

A frame depends on its shot, its time and its size alone; filming several at once only saves time.

Shape legend: T frames, H W height and width in pixels, h w those of an actor's window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld.actors import actor_parts
from curation.toonworld.backdrop import Look, View, slide
from curation.toonworld.draws import Draw
from curation.toonworld.figure import REACH, figure
from curation.toonworld.motion import Pose, pose
from curation.toonworld.palettes import INK, WHITE, shift
from curation.toonworld.places import Scenery, build
from curation.toonworld.shapes import Fill, Sheet, ellipse, paint, paint_lined
from curation.toonworld.timeline import timeline, weights
from curation.toonworld.world import Act, Shot, Texture, Video
from schemas.errors import InputError

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]
Times = npt.NDArray[np.float64]

_HEIGHT = {1: 0.50, 2: 0.42}
"""Height of an actor in units, by how many there are."""
_PLACE_X = {1: (0.0,), 2: (-0.235, 0.225)}
"""Where actors are, in widths of the frame from its middle."""
_GROUND_Y = (0.165, 0.145)
_WALK = 0.27
"""How far a lone actor's walk leads to either side, in widths of the frame; two have less room."""
_FOLLOW = 0.5
"""Share of a lone actor's walk that the camera goes along with."""
_LINE = {"none": 0.0, "ink": 0.024, "sticker": 0.04}
"""Width of the outline, in heights of the actor."""
_GRAIN = 0.05
"""How much brighter or darker the paper's texture makes the picture."""
_CHUNK_VALUES = 400_000
"""Numbers per plane that are worked on at once: they should stay in the processor's cache."""


@dataclass(frozen=True)
class Stage:
    """A shot made ready to be filmed in one size."""

    shot: Shot
    view: View
    scenery: Scenery
    paper: Floats


def stage(shot: Shot, height_px: int, width_px: int) -> Stage:
    """Draw what stays the same during a shot.

    Raises:
        InputError: The size is odd or below 32 x 32.
    """
    if min(height_px, width_px) < 32 or height_px % 2 or width_px % 2:
        raise InputError(
            "ToonWorld cannot be drawn in this size",
            found=f"{width_px} x {height_px}",
            expected="even numbers of pixels, 32 or more",
        )
    view = View(height_px, width_px, shot.framing)
    scenery = build(shot.place, shot.style, shot.scenery, view)
    return Stage(shot, view, scenery, _paper(shot.style.texture, view))


def film(set_: Stage, times: Times) -> Frames:
    """Frames of a shot.

    Args:
        set_: What :func:`stage` made of it.
        times: (T,) seconds since the shot's start.

    Returns:
        (T, H, W, 3) RGB.
    """
    view = set_.view
    size = max(1, _CHUNK_VALUES // (view.height_px * view.width_px))
    out = np.empty((len(times), view.height_px, view.width_px, 3), np.uint8)
    for start in range(0, len(times), size):
        part = np.asarray(times[start : start + size], np.float64)
        out[start : start + size] = _film(set_, part)
    return out


def render(shot: Shot, seconds: float, height_px: int, width_px: int) -> Frames:
    """One frame of a shot, (H, W, 3) RGB, ``seconds`` after the shot's start."""
    return film(stage(shot, height_px, width_px), np.array([seconds]))[0]


def render_video(video: Video, fps: float, height_px: int, width_px: int) -> Frames:
    """All frames of a video, (T, H, W, 3) RGB, held in memory."""
    line = timeline(video, fps)
    out = np.zeros((line.num_frames, height_px, width_px, 3), np.uint8)
    for k, (shot, span) in enumerate(zip(video.shots, line.shots, strict=True)):
        before = line.transitions[k - 1] if k else None
        after = line.transitions[k] if k < len(line.transitions) else None
        share = weights(span, before, after)
        frames = film(stage(shot, height_px, width_px), np.arange(len(share)) / fps)
        mixed = np.flatnonzero(share < 1)
        scaled = frames[mixed] * share[mixed, None, None, None] + np.float32(0.5)
        frames[mixed] = scaled.astype(np.uint8)
        # Shares of a dissolve add up to one, so this cannot run over but for rounding.
        under = out[span.first : span.last]
        np.copyto(under, under + np.minimum(frames, 255 - under))
    return out


def _film(set_: Stage, t: Times) -> Frames:
    shot, view = set_.shot, set_.view
    look = Look(shot.style.palette, shot.style.light)
    count = len(shot.acts)
    reach = _WALK * view.width_px / view.pixels / _HEIGHT[count] * (1 if count == 1 else 0.3)
    follow = _FOLLOW if count == 1 else 0.0
    camera = shot.pan * (t - shot.seconds / 2)
    poses: list[Pose] = []
    for act in shot.acts:
        phase = Draw("phase", shot.scenery, act.number).number()
        poses.append(pose(act.action, t, shot.seconds, phase, reach / (1 - follow)))
        if act.action in ("walk_left", "walk_right"):
            camera = camera + follow * poses[-1].x.astype(np.float64) * _HEIGHT[count]
    frames = np.empty((len(t), 3, view.height_px, view.width_px), np.float32)
    track = (camera + shot.camera * 4.0) * view.pixels
    for frame, at, seconds in zip(frames, track, t, strict=True):
        frame[:] = set_.scenery.sky
        for layer in set_.scenery.layers:
            slide(frame, layer, float(at), float(seconds))
    for k, (act, moves) in enumerate(zip(shot.acts, poses, strict=True)):
        height = _HEIGHT[count] * view.pixels
        x = view.width_px * (0.5 + _PLACE_X[count][k]) - camera * view.pixels + moves.x * height
        y = view.height_px - (_GROUND_Y[k] - view.base) * view.pixels
        _place(frames, _draw(act, shot, look, moves, x, y, height), x, y, height)
    for frame, at, seconds in zip(frames, track, t, strict=True):
        for layer in set_.scenery.front:
            slide(frame, layer, float(at), float(seconds))
    frames *= set_.paper
    np.clip(frames, 0, 1, out=frames)
    frames *= 255
    frames += np.float32(0.5)
    return frames.astype(np.uint8).transpose(0, 2, 3, 1)


def _corner(x: Times, y: float, height: float) -> tuple[npt.NDArray[np.int64], int]:
    """Left column (per frame) and upper row of an actor's window."""
    left, _, _, top = REACH
    return np.floor(x + left * height).astype(np.int64), math.floor(y - (top + _LIFT) * height)


_LIFT = 0.36
"""Highest jump, in heights of the actor: its window has that much more room."""


def _draw(
    act: Act, shot: Shot, look: Look, moves: Pose, x: Times, y: float, height: float
) -> Floats:
    """An actor and its shadow, (4, h, w, T) premultiplied, in a window that moves with it."""
    columns, row = _corner(x, y, height)
    left, right, low, top = REACH
    w, h = math.ceil((right - left) * height) + 1, math.ceil((top + _LIFT - low) * height) + 1
    flat_x = ((columns + 0.5 - x) / height)[None, None] + (np.arange(w) / height)[None, :, None]
    flat_y = np.broadcast_to(
        ((y - row - 0.5 - np.arange(h)) / height)[:, None, None], (h, 1, len(x))
    )
    flat = Sheet.blank(flat_x.astype(np.float32), flat_y.astype(np.float32), height)
    spread = 1 - 0.9 * moves.lift
    style = shot.style
    shade = ellipse(
        np.float32(-0.14 * look.toward[0]), np.float32(0.01), 0.34 * spread, 0.055 * spread
    )
    dark = 0.5 if shot.place in ("night", "moon") else 0.3
    paint(flat, [(shade, Fill((0.05, 0.04, 0.12), np.float32(dark) * spread))])
    wide = 1 / np.sqrt(moves.squash)
    own = Sheet(flat.rgba, flat.x / wide, (flat.y - moves.lift) / moves.squash, height)
    parts = actor_parts(figure(act.actor, act.action, style.build, style.palette, moves))
    line = shift(INK if style.outline == "ink" else WHITE, style.palette)
    if style.outline == "none":
        paint(own, parts, look.toward)
    else:
        paint_lined(own, parts, look.toward, line, _LINE[style.outline])
    return flat.rgba


def _place(frames: Floats, drawn: Floats, x: Times, y: float, height: float) -> None:
    """Lay an actor's windows over frames (T, 3, H, W)."""
    columns, row = _corner(x, y, height)
    _, h, w, _ = drawn.shape
    rows, cols = frames.shape[2:]
    windows = np.ascontiguousarray(drawn.transpose(3, 0, 1, 2))
    for frame, window, column in zip(frames, windows, columns.tolist(), strict=True):
        r0, r1, c0, c1 = max(0, row), min(rows, row + h), max(0, column), min(cols, column + w)
        if c0 >= c1 or r0 >= r1:
            continue
        seen = window[:, r0 - row : r1 - row, c0 - column : c1 - column]
        under = frame[:, r0:r1, c0:c1]
        under *= 1 - seen[3]
        under += seen[:3]


@lru_cache(maxsize=8)
def paper_pattern(texture: Texture, height_px: int, width_px: int) -> Floats:
    """(H, W) from -1 to 1: the texture of the paper, fixed to the frame; zeros for smooth paper."""
    unit = min(height_px, width_px)
    y, x = np.mgrid[0:height_px, 0:width_px] + 0.5
    if texture == "smooth":
        return np.zeros((height_px, width_px), np.float32)
    if texture == "grainy":
        # Turned, so that the grid behind it does not show.
        return _blotches((4 * x + 3 * y) / unit * 6, (3 * (width_px - x) + 4 * y) / unit * 6)
    if texture == "hatched":
        wave = np.cos(2 * np.pi * (x + y) / unit * 9)
    else:
        wave = (np.cos(2 * np.pi * x / unit * 11) + np.cos(2 * np.pi * y / unit * 11)) / 2
    return np.clip(1.8 * wave, -1, 1).astype(np.float32)


def _blotches(x: Times, y: Times) -> Floats:
    """Noise at whole numbers, blended between them."""
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    rows, columns = int(row.max()) + 2, int(column.max()) + 2
    draws = [Draw("paper", number) for number in range(rows)]
    noise = np.array([[draw.number(-1.6, 1.6) for _ in range(columns)] for draw in draws])
    u, v = x - column, y - row
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    top = noise[row, column] * (1 - u) + noise[row, column + 1] * u
    low = noise[row + 1, column] * (1 - u) + noise[row + 1, column + 1] * u
    return np.clip(top * (1 - v) + low * v, -1, 1).astype(np.float32)


def _paper(texture: Texture, view: View) -> Floats:
    return 1 + np.float32(_GRAIN) * paper_pattern(texture, view.height_px, view.width_px)


def still(shots: Sequence[Shot], height_px: int, width_px: int) -> Frames:
    """One frame from the middle of each shot, (S, H, W, 3): a look at a story."""
    return np.stack([render(shot, shot.seconds / 2, height_px, width_px) for shot in shots])
