"""The ``fast`` shot detector: transitions from thumbnails alone.

A *cut* is a place where every frame shortly before differs from every frame shortly after, in
colour and in structure, by far more than neighbouring frames differ on either side. Flashes, things
passing the lens and splices fail that test by themselves: what returns, or only changes its
brightness, is the same shot. Dissolves and fades are in ``blends.py``, what neither finds (wipes,
mixing under movement) in ``turnovers.py``.

Shape legend: N thumbnails.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from curation.blends import find_blends
from curation.thumb_distance import Area, describe, picture_area
from curation.thumbs import Thumbs, fill_in, read_thumbs
from curation.turnovers import find_turnovers

Floats = npt.NDArray[np.float32]
Kind = Literal["cut", "dissolve", "fade", "wipe", "forced", "doubt"]

# Constants without a source were set on the project's verified files and checked on made-up films.
_RATIO = 2.4
"""Least ratio of the distance across a cut to the distances within its sides."""
_DOUBTFUL = 0.8
"""Share of that ratio from which skipped frames are decoded before deciding."""
_FLOOR = 2.0
"""Distance taken for granted within a shot: grain and compression."""
_NEAR = 3
"""Thumbnails on each side whose distances say what is usual there."""
_RETURN_S = 0.5
"""What is back within this time was a flash, an occlusion or a splice, not another shot."""
_MIXED_ADVANTAGE = 1.3
"""By how much leaving a mixed frame out of a cut must raise its ratio to be believed."""


@dataclass(frozen=True)
class Transition:
    """A change of shot, or what may be one.

    Frames in ``[start_frame, end_frame)`` belong to neither shot; for a clean cut the span is empty
    and both are the new shot's first frame. PTS likewise.

    Attributes:
        kind: ``cut``, ``dissolve``, ``fade``, ``wipe`` or ``forced`` (by a length rule, the take
            goes on); ``doubt`` is no boundary, but a place that clips had better avoid (a dissolve
            under movement, or a quick pan).
        start_frame: First frame that is not purely of the shot before.
        end_frame: First frame that is purely of the shot after; the number of frames where a fade
            ends the file.
        middle_frame: About the first frame that shows more of the shot after than of that before.
        start_pts: PTS of ``start_frame``.
        end_pts: PTS of ``end_frame``, or the end of the file.
        score: The statistic over its threshold, >= 1.
    """

    kind: Kind
    start_frame: int
    end_frame: int
    middle_frame: int
    start_pts: int
    end_pts: int
    score: float


@dataclass(frozen=True)
class _Cut:
    """A hard cut: thumbnail ``old`` is the last before it, ``new`` the first after it.

    They are neighbours, or have one thumbnail between them that mixes both.
    """

    old: int
    new: int
    ratio: float


def find_transitions(path: Path) -> tuple[list[Transition], Thumbs]:
    """Detect the transitions of one file: a cheap pass proposes, exact decoding decides.

    Returns:
        Transitions in order, only doubts overlapping, and thumbnails with the PTS of every frame.

    Raises:
        VideoDecodeError: as :func:`curation.thumbs.read_thumbs`.
    """
    thumbs = read_thumbs(path)
    thumbs = fill_in(path, thumbs, doubtful_spans(thumbs))
    return decide(thumbs), thumbs


def doubtful_spans(thumbs: Thumbs) -> list[tuple[int, int]]:
    """Spans of frames, half-open, to decode exactly: a cut may lie among their skipped frames."""
    if len(thumbs) == len(thumbs.all_pts):
        return []
    cuts = _cuts(thumbs, picture_area(thumbs), _DOUBTFUL * _RATIO)
    spans = [(int(thumbs.frames[cut.old]), int(thumbs.frames[cut.new]) + 1) for cut in cuts]
    return [(start, end) for start, end in spans if end - start > 2]


def decide(thumbs: Thumbs) -> list[Transition]:
    """All transitions that these thumbnails show, in order; only doubts may overlap others."""
    area = picture_area(thumbs)
    cuts = {(cut.old, cut.new): cut for cut in _cuts(thumbs, area, _RATIO)}
    blends, left = find_blends(thumbs, list(cuts))
    found = [_cut_transition(thumbs, cuts[key]) for key in left]
    for blend in blends:
        span = (blend.start_frame, blend.end_frame)
        found.append(_transition(thumbs, blend.kind, span, blend.middle_frame, blend.score))
    found = _apart(thumbs, found)
    doubts: list[Transition] = []
    for turn in find_turnovers(thumbs, area, _takes(thumbs, found)):
        span = (turn.start_frame, turn.end_frame)
        kind = turn.kind or "doubt"
        kept = found if turn.kind else doubts
        kept.append(_transition(thumbs, kind, span, turn.middle_frame, turn.score))
    return sorted(_apart(thumbs, found) + doubts, key=lambda t: (t.start_frame, t.end_frame))


def _takes(thumbs: Thumbs, found: list[Transition]) -> list[tuple[int, int]]:
    """Half-open ranges of thumbnails between transitions."""
    ends = np.searchsorted(thumbs.frames, [0, *(t.end_frame for t in found)])
    starts = np.searchsorted(thumbs.frames, [*(t.start_frame for t in found)])
    return list(zip(ends.tolist(), [*starts.tolist(), len(thumbs)], strict=True))


def _cuts(thumbs: Thumbs, area: Area, threshold: float) -> list[_Cut]:
    near = _neighbour_distances(thumbs, area)
    padded = np.pad(near, (2, 3))
    # A cheap test first: distances across hardly exceed those of the next frames, distances within
    # a side hardly fall below those around.
    around = (padded[:-5] + padded[1:-4] + padded[3:-2] + padded[4:-1]) / 4
    clean = np.flatnonzero(near >= threshold * (_FLOOR + 0.7 * around))
    around = (padded[:-5] + padded[1:-4] + padded[4:-1] + padded[5:]) / 4
    needed = _MIXED_ADVANTAGE * threshold * (_FLOOR + 0.7 * around)
    mixed = np.flatnonzero(np.minimum(near, padded[3:-2]) >= needed / 8)
    over = describe(thumbs, area, mixed - 1).distance(describe(thumbs, area, mixed + 1))
    mixed = mixed[over >= needed[mixed]]
    tried = [_Cut(i - 1, i, _ratio(thumbs, area, i - 1, i)) for i in clean.tolist()]
    for i in mixed.tolist():
        ratio = _ratio(thumbs, area, i - 1, i + 1)
        tried.append(_Cut(i - 1, i + 1, ratio / _MIXED_ADVANTAGE))
    found: list[_Cut] = []
    for cut in sorted(tried, key=lambda c: -c.ratio):
        if cut.ratio >= threshold and all(abs(cut.new - other.new) > 2 for other in found):
            found.append(cut)
    return found


def _neighbour_distances(thumbs: Thumbs, area: Area) -> Floats:
    """(N,) distance of each thumbnail to the one before; 0 for the first."""
    out = np.zeros(len(thumbs), np.float32)
    for start in range(1, len(thumbs), 256):
        stop = min(len(thumbs), start + 256)
        d = describe(thumbs, area, slice(start - 1, stop))
        out[start:stop] = d[1:].distance(d[:-1])
    return out


def _ratio(thumbs: Thumbs, area: Area, old: int, new: int) -> float:
    """Distance across a cut (the least over half a second) by distance within its sides (mean)."""
    reach = int(_RETURN_S / thumbs.time_base)
    start = int(np.searchsorted(thumbs.pts, thumbs.pts[old] - reach))
    stop = int(np.searchsorted(thumbs.pts, thumbs.pts[new] + reach, side="right"))
    start, stop = min(start, max(0, new - _NEAR)), max(stop, min(len(thumbs), new + _NEAR))
    d = describe(thumbs, area, slice(start, stop))
    before, after = d[: old + 1 - start], d[new - start :]
    across = float(before.distances(after).min())
    within: list[float] = []
    for side in (before[-_NEAR:], after[:_NEAR]):
        each = side.distances(side)
        within += each[np.triu_indices(len(each), 1)].tolist()
    return across / (_FLOOR + (float(np.mean(within)) if within else 0.0))


def _cut_transition(thumbs: Thumbs, cut: _Cut) -> Transition:
    # Not neighbours: a mixed frame between them, or skipped frames that could not be had.
    span = (int(thumbs.frames[cut.old]) + 1, int(thumbs.frames[cut.new]))
    return _transition(thumbs, "cut", span, span[1], cut.ratio / _RATIO)


def _apart(thumbs: Thumbs, found: list[Transition]) -> list[Transition]:
    """In order; where the margins of two blends meet, they share the frames between."""
    out: list[Transition] = []
    for t in sorted(found, key=lambda t: (t.start_frame, t.end_frame)):
        if not out or t.start_frame >= out[-1].end_frame:
            out.append(t)
        elif t.end_frame > out[-1].end_frame:
            before = out.pop()
            border = (t.start_frame + before.end_frame) // 2
            for part, span in ((before, (before.start_frame, border)), (t, (border, t.end_frame))):
                out.append(_transition(thumbs, part.kind, span, part.middle_frame, part.score))
    return out


def _transition(
    thumbs: Thumbs, kind: Kind, span: tuple[int, int], middle: int, score: float
) -> Transition:
    start, end = span
    return Transition(
        kind=kind,
        start_frame=start,
        end_frame=end,
        middle_frame=min(max(start, middle), end),
        start_pts=_pts_at(thumbs, start),
        end_pts=_pts_at(thumbs, end),
        score=score,
    )


def _pts_at(thumbs: Thumbs, frame: int) -> int:
    """PTS of a frame; past the last one, the end of the file."""
    if frame < len(thumbs.all_pts):
        return int(thumbs.all_pts[frame])
    return int(thumbs.all_pts[-1]) + max(1, thumbs.last_duration)
