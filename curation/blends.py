"""Dissolves and fades among thumbnails.

A blend is a span whose frames are weighted sums of its two ends, the weight rising steadily. Motion
fails: its middle is no mix of its ends. What moves as fast before and after is motion too, however
soft the picture.

Shape legend: N thumbnails, M windows, D numbers per thumbnail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from curation.thumb_distance import Area, describe, flatness, mixable, picture_area
from curation.thumbs import Thumbs

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# Constants without a source were set on the project's verified files and checked on made-up films.
_WINDOWS_S = (0.25, 0.4, 0.65, 1.0, 1.5, 2.2, 3.3)
"""Lengths at which blends are looked for."""
_RESIDUAL = 0.2
"""Most that a frame may lie off the line between the ends, as a share of their distance."""
_MOST_RESIDUAL = 0.35
"""The same where the ends are far apart: both shots may move while they mix."""
_DISTANCE = 9.0
"""Least distance between the ends of a dissolve; grows with the square of a larger residual."""
_FLAT = 3.0
"""A thumbnail whose cells deviate less than this many luma levels is one colour."""
_NEARLY_FLAT = 4.5
"""The same beside a fade, where a few words on black belong to it."""
_LEAST_CHANGE = 3.0
"""Least RMS change, in levels, between the ends of any blend; less is noise."""
_LEAST_FADE = 1.0
"""The same where one end is uniform and the other is not: a line of text fades on black."""
_UNIFORM = 0.5
"""A thumbnail whose cells deviate less than this many luma levels shows nothing at all."""
_PASSING = 0.7
"""Pace on both sides, as a share of a blend's own, from which it is taken for movement."""
_SUDDEN = 0.6
"""Most of a blend's change that may fall into two frames."""
_CUT_SHARE = 0.5
"""Least jump, as a share of a blend's change, of a cut that is not just a part of the blend."""
_STILL_MOVING = 0.15
"""A blend has ended where its weight changes at less than this share of its own pace."""
_MARGIN_FRAMES = 2
_MARGIN_SHARE = 0.12
"""Added to both ends of a blend: its first and last percents are below the noise."""
_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in a window thumbnails are compared."""


@dataclass(frozen=True)
class Blend:
    """A dissolve or fade over the frames ``[start_frame, end_frame)``.

    ``middle_frame`` is about half-way; ``score`` is the change over the least that counts.
    """

    kind: Literal["dissolve", "fade"]
    start_frame: int
    end_frame: int
    middle_frame: int
    score: float


@dataclass(frozen=True)
class _Window:
    """Thumbnails ``[a, b]`` that look like a blend of these ends; ``middle`` is half-way."""

    a: int
    middle: int
    b: int
    change: float
    residual: float

    @property
    def rank(self) -> float:
        return self.change * (1 - self.residual / (2 * _MOST_RESIDUAL))


def find_blends(
    thumbs: Thumbs, cuts: list[tuple[int, int]]
) -> tuple[list[Blend], list[tuple[int, int]]]:
    """Find all blends, best first taken.

    Args:
        thumbs: Thumbnails of one file.
        cuts: Hard cuts as (last thumbnail before, first after).

    Returns:
        The blends, in no order, and those cuts that are not steps of one of them (a picture that
        breaks out of the dark begins with one).
    """
    area = picture_area(thumbs)
    mix = mixable(thumbs, area)
    windows = [w for length_s in _WINDOWS_S for w in _windows(thumbs, area, mix, length_s)]
    jumps = {cut: float(_rms(mix[cut[1]], mix[cut[0]])) for cut in cuts}
    found: list[Blend] = []
    taken: list[tuple[int, int]] = []
    for window in sorted(windows, key=lambda w: -w.rank):
        if any(start <= (window.a + window.b) / 2 <= stop for start, stop in taken):
            continue
        real = [cut for cut, jump in jumps.items() if jump > _CUT_SHARE * window.change]
        crossed = any(new > window.a and old < window.b for old, new in real)
        if crossed or _sudden(thumbs, mix, window):
            continue
        left = max((new for _, new in real if new <= window.a), default=0)
        right = min((old for old, _ in real if old >= window.b), default=len(thumbs) - 1)
        start, stop = _extent(thumbs, mix, window, left, right)
        taken.append((start, stop))
        found.append(_blend(thumbs, area, window, (start, stop), (left, right)))
        steps = [cut for cut in jumps if cut not in real and start < cut[1] and cut[0] < stop]
        for step in steps:
            del jumps[step]
    return found, list(jumps)


def _windows(thumbs: Thumbs, area: Area, mix: Bytes, length_s: float) -> list[_Window]:
    """Windows of one length that pass as blends."""
    length = length_s / float(thumbs.time_base)
    starts = np.arange(thumbs.pts[0], thumbs.pts[-1] - length, max(1.0, length / 8))
    at = np.stack([_nearest(thumbs.pts, starts + part * length) for part in _PARTS])
    # Without repeats; with fewer than five thumbnails a weight cannot be seen to rise.
    at = np.unique(at[:, (np.diff(at, axis=0) > 0).all(0)], axis=1)
    change = _rms(mix[at[-1]], mix[at[0]])
    some = change >= _LEAST_CHANGE
    small = np.flatnonzero((change >= _LEAST_FADE) & ~some)
    ends = np.stack([flatness(thumbs, area, at[0, small]), flatness(thumbs, area, at[-1, small])])
    some[small] = (ends.min(0) < _UNIFORM) & (ends.max(0) >= _FLAT)
    at, change = at[:, some], change[some]
    if not len(change):
        return []
    weights, residual = _on_line(mix, at)
    ok = (residual <= _MOST_RESIDUAL) & _steady(weights)
    at, change, residual = at[:, ok], change[ok], residual[ok]
    if not len(change):
        return []
    a, b = at[0], at[-1]
    flat = np.minimum(flatness(thumbs, area, a), flatness(thumbs, area, b)) < _FLAT
    apart = describe(thumbs, area, a).distance(describe(thumbs, area, b))
    enough = apart >= _DISTANCE * np.maximum(1, residual / _RESIDUAL) ** 2
    ok = np.where(flat, residual <= _RESIDUAL, enough)
    ok &= ~_passing(thumbs.pts, mix, a, b, change, length / 2)
    return [
        _Window(int(at[0, k]), int(at[2, k]), int(at[-1, k]), float(change[k]), float(residual[k]))
        for k in np.flatnonzero(ok).tolist()
    ]


def _on_line(mix: Bytes, at: Ints) -> tuple[Floats, Floats]:
    """Of inner thumbnails: (3, M) weights of the far end, (M,) greatest distance off the line."""
    first = mix[at[0]].astype(np.float32)
    line = mix[at[-1]] - first
    square = np.einsum("md,md->m", line, line)
    weights: list[Floats] = []
    residuals: list[Floats] = []
    for inner in at[1:-1]:
        moved = mix[inner] - first
        weight = np.einsum("md,md->m", moved, line) / square
        off = np.einsum("md,md->m", moved, moved) / square - weight**2
        weights.append(weight)
        residuals.append(np.sqrt(np.maximum(off, 0)))
    return np.stack(weights), np.stack(residuals).max(0)


def _steady(weights: Floats) -> npt.NDArray[np.bool_]:
    """(M,) whether the weights at a quarter, a half and three quarters rise as a blend's do."""
    low, mid, high = weights
    return (
        (low > 0.05)
        & (low < mid - 0.1)
        & (mid > 0.25)
        & (mid < 0.75)
        & (mid < high - 0.1)
        & (high < 0.95)
    )


def _passing(
    pts: Ints, mix: Bytes, a: Ints, b: Ints, change: Floats, reach: float
) -> npt.NDArray[np.bool_]:
    """(M,) whether the picture changes as fast before and after as within: movement, not a blend.

    A soft picture that moves is, cell by cell, nearly a mix of its ends. A side cut short by the
    end of the file does not count.
    """
    moving = np.ones(len(a), dtype=bool)
    for near, away in ((a, -reach), (b, reach)):
        far = _nearest(pts, pts[near] + away)
        share = np.abs(pts[far] - pts[near]) / reach
        pace = _rms(mix[far], mix[near])
        moving &= (share < 0.5) | (pace > _PASSING * change / 2 * share)
    return moving


def _sudden(thumbs: Thumbs, mix: Bytes, window: _Window) -> bool:
    """Whether two frames carry most of the change: a cut among movement, not a blend."""
    weight, frames = _weights(thumbs, mix, window, window.a, window.b + 1)
    before = np.minimum(np.searchsorted(frames, frames - 2), np.arange(len(frames)) - 1)
    return bool((weight - weight[np.maximum(before, 0)]).max() > _SUDDEN)


def _weights(
    thumbs: Thumbs, mix: Bytes, window: _Window, start: int, stop: int
) -> tuple[Floats, Ints]:
    """Weights of the window's far end in thumbnails ``start`` to ``stop``, and their frames."""
    first = mix[window.a].astype(np.float32)
    line = mix[window.b] - first
    weight = np.einsum("nd,d->n", mix[start:stop] - first, line) / np.einsum("d,d->", line, line)
    return weight, thumbs.frames[start:stop]


def _extent(thumbs: Thumbs, mix: Bytes, window: _Window, left: int, right: int) -> tuple[int, int]:
    """Thumbnails at which the weight begins and ends to move.

    At most a length beyond the window, and within ``left`` and ``right``.
    """
    length = window.b - window.a
    start, stop = max(left, window.a - length), min(right, window.b + length) + 1
    weight, frames = _weights(thumbs, mix, window, start, stop)
    pace = 1.0 / float(thumbs.frames[window.b] - thumbs.frames[window.a])
    step = max(1, length // 6)

    def moving(i: int, j: int) -> bool:
        return float(weight[j] - weight[i]) >= _STILL_MOVING * pace * float(frames[j] - frames[i])

    first = last = window.middle - start
    while first > 0 and moving(max(0, first - step), first):
        first -= 1
    while last < len(weight) - 1 and moving(last, min(len(weight) - 1, last + step)):
        last += 1
    return start + first, start + last


def _blend(
    thumbs: Thumbs, area: Area, window: _Window, extent: tuple[int, int], limits: tuple[int, int]
) -> Blend:
    ends = np.array([window.a, window.b, *extent])
    flat = bool(flatness(thumbs, area, ends).min() < _FLAT)
    first, end = int(thumbs.frames[extent[0]]) + 1, int(thumbs.frames[extent[1]])
    margin = max(_MARGIN_FRAMES, round(_MARGIN_SHARE * (end - first)))
    # Limits are pure frames of cuts next to it, or the first and last frame of the file.
    start = max(int(thumbs.frames[limits[0]]), first - margin)
    end = min(int(thumbs.frames[limits[1]]) + 1, end + margin)
    if flat:
        start, end = _with_uniform(thumbs, area, (start, end), limits)
    return Blend(
        kind="fade" if flat else "dissolve",
        start_frame=start,
        end_frame=end,
        middle_frame=min(max(start, int(thumbs.frames[window.middle])), end),
        score=window.change / _LEAST_CHANGE,
    )


def _with_uniform(
    thumbs: Thumbs, area: Area, span: tuple[int, int], limits: tuple[int, int]
) -> tuple[int, int]:
    """A fade with the nearly uniform frames it borders: black, and what is too faint to be seen."""
    start, end = span
    low, high = np.searchsorted(thumbs.frames, span)
    before = np.arange(limits[0], low)
    after = np.arange(high, limits[1] + 1)
    shown = before[flatness(thumbs, area, before) >= _NEARLY_FLAT]
    if len(before):
        first = int(shown[-1]) + 1 if len(shown) else limits[0]
        start = min(start, int(thumbs.frames[first]))
    shown = after[flatness(thumbs, area, after) >= _NEARLY_FLAT]
    if len(after):
        last = int(shown[0]) - 1 if len(shown) else limits[1]
        end = max(end, int(thumbs.frames[last]) + 1)
    return start, end


def _rms(a: Bytes, b: Bytes) -> Floats:
    """Root mean square difference over the last axis, in levels."""
    difference = a.astype(np.float32) - b
    return np.sqrt(np.mean(difference * difference, axis=-1, dtype=np.float32))


def _nearest(pts: Ints, wanted: npt.NDArray[np.floating]) -> Ints:
    """Indices of the thumbnails nearest in time."""
    right = np.clip(np.searchsorted(pts, wanted), 1, max(1, len(pts) - 1))
    left = right - 1
    right = np.minimum(right, len(pts) - 1)
    return np.where(wanted - pts[left] <= pts[right] - wanted, left, right)
