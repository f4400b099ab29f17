"""Mechanical measurements of a shot, made from what its detection has decoded anyway.

Two kinds of input: thumbnails of every decoded frame (``curation.thumbs``) tell brightness and
change; *looks*, one a second at full size, tell sharpness, black bars and interlacing combs. Scores
are stored; thresholds are applied later, by ``curation.filters``.

Shape legend: N thumbnails, H W height and width of the coded picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Luma = npt.NDArray[np.uint8]

# Workers run side by side, one per CPU; OpenCV's own threads only compete with them.
cv2.setNumThreads(1)

LOOK_EVERY_S = 1.0
"""Time between looks. Sharpness, bars and combs change slowly; a look costs half a millisecond."""

_SPARSE = 8
"""Bars are looked for in every eighth row and column, combs in every eighth column or fewer."""
_COMB_POINTS = 24_000
"""Points that are looked at for combs: arrays of more take most of their time from page faults."""

_LOOK_HEIGHT_PX = 180
"""Sharpness is measured at this height, so that it does not depend on the size of the file."""

# All on 8-bit luma as coded, where black is 16 (or 0 in full-range files).
_BRIGHT = 40
"""Luma above this is not black."""
_BLACK_SHARE = 0.02
"""A frame, row or column with fewer bright points than this is black: grain, logos' edges."""
_STILL = 0.5
"""Frames whose luma differs by less than this on average look the same."""
_COMB = 400
"""A point combs when it leaves both of its vertical neighbours by 20 levels in one direction."""
_COMB_SHARE = 0.02
"""A frame with more combed points than this is interlaced; progressive film stays below 0.005."""


@dataclass(frozen=True)
class Look:
    """One frame at full size.

    Attributes:
        pts: Its PTS.
        sharpness: Variance of the Laplacian of luma, 180 pixels high.
        combed: Whether fields of two moments are woven into one picture.
        box: (x, y, width, height) of the picture inside black bars; None for a black frame.
        size: (width, height) of the coded picture.
    """

    pts: int
    sharpness: float
    combed: bool
    box: tuple[int, int, int, int] | None
    size: tuple[int, int]


@dataclass(frozen=True)
class Measured:
    """The measured columns of ``schemas.rows.Shot``, under the same names."""

    luminance: float
    motion: float
    sharpness: float
    black_ratio: float
    duplicate_ratio: float
    still_ratio: float
    comb_ratio: float
    flicker: float
    crop_x_px: int
    crop_y_px: int
    crop_width_px: int
    crop_height_px: int


def look_at(pts: int, luma: Luma) -> Look:
    """Measure one (H, W) luma plane."""
    height, width = luma.shape
    small_width = max(1, round(width * _LOOK_HEIGHT_PX / height))
    small = luma
    while small.shape[0] >= 1.9 * _LOOK_HEIGHT_PX and small.shape[1] > 1:  # halving is cheap
        even = small[: small.shape[0] // 2 * 2, : small.shape[1] // 2 * 2]
        half = (even.shape[1] // 2, even.shape[0] // 2)
        small = cv2.resize(even, half, interpolation=cv2.INTER_AREA)
    small = cv2.resize(small, (small_width, _LOOK_HEIGHT_PX), interpolation=cv2.INTER_AREA)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(small, cv2.CV_16S))
    sharpness = float(deviation[0, 0]) ** 2
    return Look(pts, sharpness, _is_combed(luma), _picture_box(luma), (width, height))


def measure(
    frames: npt.NDArray[np.int64], luma: npt.NDArray[np.uint8], looks: Sequence[Look]
) -> Measured:
    """Measure one shot, transitions left out.

    Args:
        frames: (N,) numbers of the decoded frames among all frames of the source, N >= 1.
        luma: (N, h, w) their thumbnails.
        looks: Looks at frames of this shot, at least one.
    """
    assert len(frames) and looks, "a shot has at least one decoded frame and one look"
    flat = luma.reshape(len(luma), -1).astype(np.float32)
    brightness = flat.mean(1)
    steps = np.maximum(np.diff(frames), 1)
    change = np.abs(np.diff(flat, axis=0)).mean(1)
    x, y, width, height = _common_box(looks)
    return Measured(
        luminance=float(brightness.mean()) / 255,
        motion=float((change / steps).mean()) / 255 if len(change) else 0.0,
        sharpness=float(np.mean([look.sharpness for look in looks])),
        black_ratio=float(((flat > _BRIGHT).mean(1) < _BLACK_SHARE).mean()),
        duplicate_ratio=float((change == 0).mean()) if len(change) else 0.0,
        still_ratio=float((change < _STILL).mean()) if len(change) else 1.0,
        comb_ratio=float(np.mean([look.combed for look in looks])),
        flicker=_flicker(brightness) / 255,
        crop_x_px=x,
        crop_y_px=y,
        crop_width_px=width,
        crop_height_px=height,
    )


def _flicker(brightness: npt.NDArray[np.float32]) -> float:
    """Mean change of brightness that the next frame takes back, in levels."""
    steps = np.diff(brightness)
    if len(steps) < 2:
        return 0.0
    taken_back = np.minimum(np.abs(steps[:-1]), np.abs(steps[1:]))
    return float(np.where(steps[:-1] * steps[1:] < 0, taken_back, 0).mean())


def _is_combed(luma: Luma) -> bool:
    if luma.shape[0] < 3:
        return False
    every = max(_SPARSE, luma.size // _COMB_POINTS)
    rows = np.ascontiguousarray(luma[:, ::every]).astype(np.int16)
    above, below = rows[:-2] - rows[1:-1], rows[2:] - rows[1:-1]
    combed = above.astype(np.int32) * below > _COMB
    # A fine texture combs by itself; two fields comb where the fields, taken alone, are smooth.
    smooth = np.abs(rows[:-2] - rows[2:]) < 10
    return bool((combed & smooth).mean() > _COMB_SHARE)


def _picture_box(luma: Luma) -> tuple[int, int, int, int] | None:
    rows = np.flatnonzero((luma[:, ::_SPARSE] > _BRIGHT).mean(1) >= _BLACK_SHARE)
    columns = np.flatnonzero((luma[::_SPARSE] > _BRIGHT).mean(0) >= _BLACK_SHARE)
    if not len(rows) or not len(columns):
        return None
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _common_box(looks: Sequence[Look]) -> tuple[int, int, int, int]:
    """The smallest box that holds the picture of every look; the whole picture if all are black."""
    boxes = [look.box for look in looks if look.box is not None]
    if not boxes:
        return (0, 0, *looks[0].size)
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
    return left, top, right - left, bottom - top
