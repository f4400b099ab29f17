"""Rows of N clips from different sources: as many as there can be, and well mixed.

There are R rows for the largest R with ``sum(min(uses of source, R)) >= N * R``. The uses are laid
down column by column, those of a source one after the other, so they come to different rows. Then
pairs of rows exchange clips at random, wherever both keep N sources.

Shape legend: B clips, N clips per row, M rows.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from pandas.util import hash_array

Rows = npt.NDArray[np.intp]
Keys = npt.NDArray[np.uint64]

_MIXING_ROUNDS = 16
"""Each exchanges about every clip of every column once."""

_KEY = "triptych-clip-id"
"""Sixteen bytes that pandas' string hash wants."""


def keys_of(names: npt.NDArray[np.object_], seed: int) -> Keys:
    """Random-looking numbers, others for every seed. Source: SplitMix64 (Steele et al., 2014)."""
    hashes: Any = hash_array(names, hash_key=_KEY, categorize=False)  # pyright: ignore
    digest = hashlib.sha256(str(seed).encode()).digest()
    z = hashes + np.uint64(int.from_bytes(digest[:8], "big"))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(clips: Rows, sources: Rows, keys: Keys, n: int, uses: int) -> tuple[Rows, Rows]:
    """Rows of N clips from different sources, and the uses left over.

    Args:
        clips: (B,) clips, as any numbers.
        sources: (B,) source of each, as numbers.
        keys: (B,) random numbers (:func:`keys_of`).
        n: N.
        uses: How often each clip is offered. It is used again only after all others of its source.

    Returns:
        (M, N) clips, and the clips left over, one for each use.
    """
    # Uses of a source: all its clips in the order of their keys, then all again.
    order = np.lexsort((keys, sources))
    begins = np.flatnonzero(np.diff(sources[order], prepend=-1))
    counts = np.diff(begins, append=len(order))
    rounds = np.tile(np.arange(uses), (len(order), 1)).T
    place = np.arange(len(order)) - np.repeat(begins, counts)
    turn = (rounds * np.repeat(counts, counts) + place).ravel()  # of a use within its source
    clip = np.tile(order, uses)
    group = np.tile(np.repeat(np.arange(len(counts)), counts), uses)
    num_rows = _most_rows(counts * uses, n)
    takes = np.minimum(counts * uses, num_rows)
    spare = int(takes.sum()) - n * num_rows
    # A few uses too many: the sources with most uses give one each.
    takes[np.lexsort((np.arange(len(takes)), -takes))[:spare]] -= 1
    used = turn < takes[group]
    left = np.sort(clip[~used])
    if not num_rows:
        return np.empty((0, n), np.intp), clips[left]
    shuffled = np.argsort(np.argsort(keys[order][begins], kind="stable"))
    laid = np.lexsort((turn[used], shuffled[group[used]]))
    grid = clip[used][laid].reshape(n, num_rows).T
    generator = np.random.Generator(np.random.PCG64(int(keys.min())))
    return clips[_exchange(grid, sources, generator)], clips[left]


def _most_rows(counts: Rows, n: int) -> int:
    """The largest R with ``sum(min(counts, R)) >= n * R``."""
    low, high = 0, int(counts.sum()) // n
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() >= n * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _exchange(grid: Rows, sources: Rows, generator: np.random.Generator) -> Rows:
    """Exchange clips of a column between random pairs of rows that both keep distinct sources."""
    grid = grid.copy()
    for _ in range(_MIXING_ROUNDS):
        for column in range(grid.shape[1]):
            shuffled = generator.permutation(len(grid))
            a, b = shuffled[: len(grid) // 2], shuffled[len(grid) // 2 :][: len(grid) // 2]
            others = [k for k in range(grid.shape[1]) if k != column]
            of_a, of_b = sources[grid[a, column]], sources[grid[b, column]]
            clash = (sources[grid[a[:, None], others]] == of_b[:, None]).any(axis=1)
            clash |= (sources[grid[b[:, None], others]] == of_a[:, None]).any(axis=1)
            a, b = a[~clash], b[~clash]
            grid[a, column], grid[b, column] = grid[b, column], grid[a, column]
    return grid
