"""Changes of content that are neither clean cuts nor clear blends.

For gaps of many lengths: is the picture after the gap far more unlike the picture before it than
the picture changes over as long a time on either side? Dissolves under motion, wipes and cuts among
fast movement pass, and so do a few quick pans and things that cover the lens. What looks like a
dissolve or a wipe is one; the rest is doubtful: reason enough to keep it out of clips, not to call
it a new shot.

Shape legend: N thumbnails of one take, K gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from curation.thumb_distance import Area, Described, describe, inside
from curation.thumbs import Thumbs

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# Constants without a source were set on the project's verified films and on films spliced with
# seeds 0 and 1 (benchmarks/spliced.py), and checked on other seeds.
_GAPS_S = (0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 2.1)
"""Lengths of gaps across which pictures are compared."""
_DISTANCE = 24.0
"""Least distance across a gap; movement within a shot seldom passes it."""
_RETURN_DISTANCE = 16.0
"""Least distance of anything before to anything after: what comes back is the same shot."""
_RETURN_S = 1.3
_RATIO = 1.3
"""Least ratio of the distance across a gap to that over an equal time on the busier side."""
_FLOOR = 2.0
"""Distance taken for granted within a shot: grain and compression."""
_SAME = 0.6
"""Gaps that meet a better one and reach this share of its ratio belong to the same change."""
_CLEAR = 4.0
"""Ratio from which more says nothing more."""
_SPREAD = 1.6
"""Longest gap that tells where a change begins and ends, over the shortest clear one."""
_CORE = 0.7
"""The shortest gap that reaches this share of the best ratio is where the change happens."""
_MIX_RESIDUAL = 0.45
"""Most that a dissolve's frames may lie off the line between its ends, on a 3 x 4 grid."""
_CERTAIN = 2.0
"""Least ratio of what may be called a dissolve or a wipe."""
_PLAIN = 8.0
"""A picture whose cells deviate less than this many luma levels may be an object at the lens."""
_STANDS_OUT = 1.7
"""Least ratio of a cut's step to any other step around it."""
_WIPED = 0.7
"""Least share of cells that show one side of a wipe or the other, not a mix."""
_CHANGED_LEVELS = 24
"""Luma levels between the two sides from which a cell is asked which side it shows."""
_CHUNK = 4096
"""Most thumbnails described at once (5 kB each)."""
_OVERLAP_S = 3 * _GAPS_S[-1]
_MARGIN_FRAMES = 2
_MARGIN_SHARE = 0.3


@dataclass(frozen=True)
class Turnover:
    """A change of content over the frames ``[start_frame, end_frame)``.

    Attributes:
        kind: ``cut`` (among fast movement), ``dissolve`` or ``wipe``; None where it is doubtful.
        start_frame: First frame that may not be purely of what was before.
        end_frame: First frame that is purely of what comes after.
        middle_frame: About half-way.
        score: The ratio over the least that counts, >= 1.
    """

    kind: Literal["cut", "dissolve", "wipe"] | None
    start_frame: int
    end_frame: int
    middle_frame: int
    score: float


@dataclass(frozen=True)
class _Gap:
    """Thumbnails ``a`` (last before) and ``b`` (first after) with their ratio."""

    ratio: float
    a: int
    b: int


def find_turnovers(thumbs: Thumbs, area: Area, takes: Sequence[tuple[int, int]]) -> list[Turnover]:
    """All turnovers within takes.

    Args:
        thumbs: Thumbnails of one file.
        area: The picture without its letterbox.
        takes: Half-open ranges of thumbnails between the transitions that are known.

    Returns:
        In order, without overlaps within a take.
    """
    found: list[Turnover] = []
    for take in takes:
        gaps = _gaps(thumbs, area, *take)
        found += [_turnover(thumbs, area, group, take) for group in _groups(gaps)]
    return sorted(found, key=lambda t: t.start_frame)


def _gaps(thumbs: Thumbs, area: Area, first: int, stop: int) -> list[_Gap]:
    """Gaps of one take that pass, a chunk of thumbnails at a time."""
    out: list[_Gap] = []
    start = first
    while stop - start > 2:
        end = min(stop, start + _CHUNK)
        described = describe(thumbs, area, slice(start, end))
        times = np.asarray(thumbs.pts[start:end] * float(thumbs.time_base), np.float64)
        for length_s in _GAPS_S:
            out += [
                _Gap(g.ratio, start + g.a, start + g.b) for g in _of(described, times, length_s)
            ]
        if end == stop:
            break
        overlap = int(np.searchsorted(times, times[-1] - _OVERLAP_S))
        start += max(1, overlap)
    return out


def _of(described: Described, times: npt.NDArray[np.float64], length_s: float) -> list[_Gap]:
    """Gaps of one length that pass."""
    n = len(times)
    b = np.searchsorted(times, times + length_s - 1e-6)
    a = np.flatnonzero(b < n)
    b = b[a]
    step = max(1, int(np.median(b - a)) // 6) if len(a) else 1
    a, b = a[::step], b[::step]
    across = described.pairs(a, b)
    a, b, across = a[across >= _DISTANCE], b[across >= _DISTANCE], across[across >= _DISTANCE]
    if not len(a):
        return []
    within, seen = np.zeros(len(a), np.float32), np.zeros(len(a))
    for ends, others in ((a, times[a] - length_s), (b, times[b] + length_s)):
        far = np.minimum(np.searchsorted(times, others), n - 1)
        # A side cut short by the end of the take moves on at its pace, as far as one can tell.
        share = np.abs(times[far] - times[ends]) / length_s
        within = np.maximum(within, described.pairs(far, ends) / np.clip(share, 1 / 4, 1))
        seen = np.maximum(seen, share)
    ratio = np.where(seen >= 1 / 2, across / (_FLOOR + within), 0)
    gaps: list[_Gap] = []
    for k in np.flatnonzero(ratio >= _RATIO).tolist():
        last, first = float(times[a[k]]), float(times[b[k]])
        left = _sides(times, last - _RETURN_S, last)
        right = _sides(times, first, first + _RETURN_S)
        nearest = float(described[left].distances(described[right]).min())
        least = min(float(across[k]), nearest) / (_FLOOR + float(within[k]))
        if nearest >= _RETURN_DISTANCE and least >= _RATIO:
            gaps.append(_Gap(least, int(a[k]), int(b[k])))
    return gaps


def _sides(times: npt.NDArray[np.float64], start_s: float, end_s: float) -> Ints:
    """Six thumbnails spread over a time, both ends included; a short one repeats some."""
    low, high = np.searchsorted(times, (start_s - 1e-6, end_s + 1e-6)).tolist()
    return low + max(0, high - 1 - low) * np.arange(6) // 5


def _groups(gaps: list[_Gap]) -> list[list[_Gap]]:
    """Gaps of one change together; first the one that tells best where it is: short and clear."""
    groups: list[list[_Gap]] = []
    for gap in sorted(gaps, key=lambda g: (-min(g.ratio, _CLEAR), g.b - g.a, g.a)):
        for group in groups:
            if gap.a <= group[0].b and gap.b >= group[0].a:
                group.append(gap)
                break
        else:
            groups.append([gap])
    return groups


def _turnover(thumbs: Thumbs, area: Area, group: list[_Gap], take: tuple[int, int]) -> Turnover:
    best = group[0]
    clear = min(best.ratio, _CLEAR)
    core = min((g for g in group if g.ratio >= _CORE * clear), key=lambda g: (g.b - g.a, -g.ratio))
    longest = _SPREAD * (core.b - core.a)
    same = [g for g in group if g.ratio >= _SAME * clear and g.b - g.a <= longest]
    first = int(thumbs.frames[min(g.a for g in same)]) + 1
    end = int(thumbs.frames[max(g.b for g in same)])
    margin = max(_MARGIN_FRAMES, round(_MARGIN_SHARE * (end - first)))
    score = best.ratio / _RATIO
    new = _step(thumbs, area, core, take)
    if new is not None:
        frame = int(thumbs.frames[new])
        return Turnover("cut", int(thumbs.frames[new - 1]) + 1, frame, frame, score)
    pure_first, pure_last = int(thumbs.frames[take[0]]), int(thumbs.frames[take[1] - 1])
    return Turnover(
        kind=_kind(thumbs, area, core) if best.ratio >= _CERTAIN else None,
        start_frame=max(pure_first, first - margin),
        end_frame=min(pure_last, end + margin),
        middle_frame=int(thumbs.frames[(core.a + core.b + 1) // 2]),
        score=score,
    )


def _step(thumbs: Thumbs, area: Area, gap: _Gap, take: tuple[int, int]) -> int | None:
    """First thumbnail after a cut that stands out from the movement around it, if there is one."""
    start, stop = max(take[0], gap.a - 2), min(take[1] - 1, gap.b + 2)
    described = describe(thumbs, area, slice(start, stop + 1))
    steps = described[:-1].distance(described[1:])
    at = int(steps.argmax())
    rest = np.delete(steps, at).max(initial=0.0)
    return start + at + 1 if steps[at] >= max(_DISTANCE, _STANDS_OUT * rest) else None


def _kind(thumbs: Thumbs, area: Area, gap: _Gap) -> Literal["dissolve", "wipe"] | None:
    at = np.linspace(gap.a, gap.b, 5).round().astype(np.int64)
    if len(np.unique(at)) < len(at):
        return None
    luma, chroma = inside(thumbs, area, at)
    if min(luma[0].std(), luma[-1].std()) < _PLAIN:
        return None
    if _is_wipe(luma):
        return "wipe"
    return "dissolve" if _is_mix(luma, chroma) else None


def _is_mix(luma: npt.NDArray[np.uint8], chroma: npt.NDArray[np.uint8]) -> bool:
    """Whether three pictures lie near the line between those around them, one after the other.

    On a grid so coarse that movement within the two shots hardly counts.
    """
    planes = [*luma[:, None].swapaxes(0, 1), *chroma.swapaxes(0, 1)]
    cells = [
        [cv2.resize(p.astype(np.float32), (4, 3), interpolation=cv2.INTER_AREA) for p in plane]
        for plane in planes
    ]
    points = np.concatenate([np.stack(plane).reshape(len(luma), -1) for plane in cells], 1)
    line = points[-1] - points[0]
    square = float(np.einsum("d,d->", line, line))
    moved = points[1:-1] - points[0]
    weight = np.einsum("md,d->m", moved, line) / square
    off = np.sqrt(np.maximum(0, np.einsum("md,md->m", moved, moved) / square - weight**2))
    rising = 0 < weight[0] < weight[1] < weight[2] < 1
    return bool(rising and off.max() <= _MIX_RESIDUAL)


def _is_wipe(luma: npt.NDArray[np.uint8]) -> bool:
    """Whether every cell shows one side or the other, and more and more the side after."""
    levels = luma.reshape(len(luma), -1).astype(np.float32)
    apart = np.abs(levels[-1] - levels[0])
    changed = apart >= _CHANGED_LEVELS
    if changed.mean() < 1 / 4:
        return False
    old = np.abs(levels[1:-1] - levels[0])[:, changed]
    new = np.abs(levels[1:-1] - levels[-1])[:, changed]
    clear = (np.minimum(old, new) < 0.2 * apart[changed]).mean(1)
    done = (new < old).mean(1)
    return bool(clear.min() >= _WIPED and done[0] < 0.5 < done[2] and done[0] < done[1] < done[2])
