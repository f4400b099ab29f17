"""How different two thumbnails are: colour levels times structure.

The product is small for the same scene under other light (structure alike) and for grain or small
movement (colours alike), and large only where both change.

Shape legend: M, K thumbnails; C cells of a 9 x 16 grid, F cells of an 18 x 32 grid, both less
letterbox; B histogram bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from curation.thumbs import Thumbs

T = TypeVar("T", bound=np.generic)
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Area = tuple[slice, slice]
"""Rows and columns of the 9 x 16 grid."""

_BLACK = 32
"""Luma up to which a border counts as letterbox: studio black is 16, compression adds some."""
_BINS = 32
_HISTOGRAM_LEVELS = 10.0
"""Levels that a histogram distance of 1 is worth. All luma in other bins counts 20."""
_NOISE_LEVELS = 2.0
"""Contrast, in levels, below which structure is not trusted."""


@dataclass(frozen=True)
class Described:
    """Numbers of M thumbnails.

    Attributes:
        levels: (M, 3C) luma, Cb, Cr of the coarse cells.
        histogram: (M, B) shares.
        coarse: (M, C) coarse luma less its mean.
        coarse_std: (M,) its standard deviation.
        fine: (M, F) fine luma less its mean.
        fine_std: (M,) its standard deviation.
    """

    levels: Floats
    histogram: Floats
    coarse: Floats
    coarse_std: Floats
    fine: Floats
    fine_std: Floats

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, rows: slice | Ints) -> Described:
        return Described(
            self.levels[rows],
            self.histogram[rows],
            self.coarse[rows],
            self.coarse_std[rows],
            self.fine[rows],
            self.fine_std[rows],
        )

    def pairs(self, a: Ints, b: Ints) -> Floats:
        """(K,) distances of thumbnails ``a[k]`` and ``b[k]``, without copying all at once."""
        parts = [self[a[i : i + 256]].distance(self[b[i : i + 256]]) for i in range(0, len(a), 256)]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def distance(self, other: Described) -> Floats:
        """(M,) distances row by row."""
        colour = np.abs(self.levels - other.levels).mean(1)
        colour += _HISTOGRAM_LEVELS * np.abs(self.histogram - other.histogram).sum(1)
        coarse = np.einsum("md,md->m", self.coarse, other.coarse) / self.coarse.shape[1]
        fine = np.einsum("md,md->m", self.fine, other.fine) / self.fine.shape[1]
        alike = np.maximum(
            _correlation(coarse, self.coarse_std, other.coarse_std),
            _correlation(fine, self.fine_std, other.fine_std),
        )
        return colour * (1 - alike)

    def distances(self, other: Described) -> Floats:
        """(M, K) distances of all to all."""
        colour = np.abs(self.levels[:, None] - other.levels).mean(2)
        colour += _HISTOGRAM_LEVELS * np.abs(self.histogram[:, None] - other.histogram).sum(2)
        # Not "@": BLAS would wake its threads for these small products.
        coarse = np.einsum("md,kd->mk", self.coarse, other.coarse) / self.coarse.shape[1]
        fine = np.einsum("md,kd->mk", self.fine, other.fine) / self.fine.shape[1]
        alike = np.maximum(
            _correlation(coarse, self.coarse_std[:, None], other.coarse_std),
            _correlation(fine, self.fine_std[:, None], other.fine_std),
        )
        return colour * (1 - alike)


def _correlation(covariance: Floats, std: Floats, other_std: Floats) -> Floats:
    """Correlation that goes to 0, not to chance, where a picture has no contrast."""
    noise = np.float32(_NOISE_LEVELS) * np.maximum(std, other_std) + np.float32(1)
    return np.divide(covariance, std * other_std + noise, dtype=np.float32)


def picture_area(thumbs: Thumbs) -> Area:
    """Rows and columns of the 9 x 16 grid that are not black in every frame (letterbox)."""
    brightest = thumbs.luma.max(0)
    # Half-black cells count as black: a fixed edge makes all pictures alike.
    rows = np.flatnonzero(brightest.max(1).reshape(-1, 2).min(1) > _BLACK)
    columns = np.flatnonzero(brightest.max(0).reshape(-1, 2).min(1) > _BLACK)
    if not len(rows) or not len(columns):
        return slice(0, 9), slice(0, 16)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def describe(thumbs: Thumbs, area: Area, which: slice | Ints) -> Described:
    """Numbers of some thumbnails, outside the letterbox left out."""
    luma, chroma = inside(thumbs, area, which)
    fine = _flat(luma).astype(np.float32)
    coarse = _flat(_halved(luma)).astype(np.float32) / np.float32(4)
    levels: Floats = np.concatenate([coarse, _flat(chroma)], 1, dtype=np.float32)
    histogram = np.concatenate(
        [
            _histogram(luma),
            0.5 * _histogram(chroma[:, 0]),
            0.5 * _histogram(chroma[:, 1]),
        ],
        1,
    )
    coarse = coarse - coarse.mean(1, keepdims=True)
    fine -= fine.mean(1, keepdims=True)
    return Described(
        levels=levels,
        histogram=histogram,
        coarse=coarse,
        coarse_std=_rms(coarse),
        fine=fine,
        fine_std=_rms(fine),
    )


def mixable(thumbs: Thumbs, area: Area) -> Bytes:
    """(N, D) levels whose weighted sums are tested: coarse luma, every fourth chroma cell."""
    luma, chroma = inside(thumbs, area, slice(None))
    coarse = _halved(luma) >> 2
    return np.concatenate([_flat(coarse).astype(np.uint8), _flat(chroma[:, :, ::2, ::2])], 1)


def flatness(thumbs: Thumbs, area: Area, which: Ints) -> Floats:
    """Standard deviation of the luma cells, in levels."""
    luma = _flat(inside(thumbs, area, which)[0]).astype(np.float32)
    return _rms(luma - luma.mean(1, keepdims=True))


def inside(
    thumbs: Thumbs, area: Area, which: slice | Ints
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Luma (M, h, w) and chroma (M, 2, h/2, w/2) cells of some thumbnails, letterbox left out."""
    rows, columns = area
    fine_rows = slice(2 * rows.start, 2 * rows.stop)
    fine_columns = slice(2 * columns.start, 2 * columns.stop)
    return thumbs.luma[which][:, fine_rows, fine_columns], thumbs.chroma[which][..., rows, columns]


def _halved(luma: Bytes) -> npt.NDArray[np.uint16]:
    """(M, F cells) to (M, C cells): sums of four."""
    pairs = luma[:, ::2].astype(np.uint16) + luma[:, 1::2]
    return pairs[..., ::2] + pairs[..., 1::2]


def _flat(grids: npt.NDArray[T]) -> npt.NDArray[T]:
    """(M, ...) to (M, D), also for no thumbnails at all."""
    return grids.reshape(len(grids), math.prod(grids.shape[1:]))


def _rms(values: Floats) -> Floats:
    return np.sqrt(np.einsum("md,md->m", values, values) / values.shape[1])


def _histogram(cells: Bytes) -> Floats:
    """(M, 32) share of cells in each range of eight levels."""
    m = len(cells)
    bins = np.add(_flat(cells) >> 3, _BINS * np.arange(m)[:, None], dtype=np.intp)
    counts = np.bincount(bins.ravel(), minlength=_BINS * m).reshape(m, _BINS)
    return (counts / bins.shape[1]).astype(np.float32)
