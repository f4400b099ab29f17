"""Which windows become sft samples, decided from stored scores: no score is computed again.

One pass serves all thresholds of a statistic. Of windows that share clips the best is kept first,
whatever the low threshold, so a higher one never adds a window.

Shape legend: W windows, N clips per window, B clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.arrow_compute import pc
from schemas.config.curation import ManifestsConfig, Statistic
from schemas.errors import ManifestError

REASONS = (
    "", "no_caption", "near_duplicate", "below_threshold", "above_threshold", "overlapping",
    "source_full",
)  # fmt: skip
"""Verdicts by number; 0 is kept. Where several hold, the first of them is given."""

KEPT, NO_CAPTION, NEAR_DUPLICATE, BELOW, ABOVE, OVERLAPPING, SOURCE_FULL = range(len(REASONS))

WINDOW_COLUMNS = (
    "sample_id", "source_id", "index", "clip_ids", "min_adjacent", "mean_adjacent", "min_pairwise",
    "mean_pairwise", "max_pairwise",
)  # fmt: skip
"""What of the windows is needed here."""

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Candidates:
    """Windows under one statistic, judged by everything but the low threshold.

    Attributes:
        scores: (W,) the statistic.
        verdicts: (W,) numbers of ``REASONS``; KEPT where only the low threshold may still say no.
        members: (W, N) rows of the clips.
        quantiles: Whether thresholds are quantiles of ``scores``.
    """

    scores: npt.NDArray[np.float64]
    verdicts: npt.NDArray[np.int8]
    members: npt.NDArray[np.intp]
    quantiles: bool

    def similarity(self, threshold: float) -> float:
        """A threshold as a similarity; with quantiles, one of the windows has it."""
        return similarity_of(threshold, self.scores, self.quantiles)

    def judged(self, low: float) -> npt.NDArray[np.int8]:
        """(W,) verdicts with this low threshold."""
        below = self.scores < self.similarity(low)
        open_to_it = ~np.isin(self.verdicts, (NO_CAPTION, NEAR_DUPLICATE))
        return np.where(below & open_to_it, np.int8(BELOW), self.verdicts)


def similarity_of(threshold: float, scores: npt.NDArray[np.float64], quantiles: bool) -> float:
    """A threshold as a similarity: itself, or that quantile of the scores."""
    if not quantiles or not scores.size:
        return threshold
    return float(np.quantile(scores, threshold, method="inverted_cdf"))


def candidates(
    windows: pa.Table, clips: pa.Table, cfg: ManifestsConfig, statistic: Statistic
) -> Candidates:
    """Judge windows by everything but the low threshold.

    Args:
        windows: ``WINDOW_COLUMNS`` in the table's order.
        clips: ``clip_id`` and ``caption``, in the table's order.
        cfg: The rules; its ``low`` and ``statistic`` are not used.
        statistic: The column compared with thresholds.

    Raises:
        ManifestError: A window names a clip that is not there.
    """
    scores = windows[statistic].to_numpy()
    members = member_rows(windows, clips)
    silent = pc.equal(clips["caption"], "").to_numpy()[members].any(axis=1)
    verdicts = np.zeros(len(scores), np.int8)
    verdicts[scores > similarity_of(cfg.high, scores, cfg.band == "quantile")] = ABOVE
    if cfg.near_duplicate is not None:
        verdicts[windows["max_pairwise"].to_numpy() >= cfg.near_duplicate] = NEAR_DUPLICATE
    verdicts[silent] = NO_CAPTION
    if cfg.max_shared_clips is not None or cfg.max_per_source is not None:
        codes = pc.dictionary_encode(windows["source_id"].combine_chunks()).indices.to_numpy()
        alive = verdicts == KEPT
        if cfg.max_shared_clips is not None:
            reach = members.shape[1] - cfg.max_shared_clips
            chosen = _apart(codes, windows["index"].to_numpy(), scores, alive, reach)
            verdicts[alive & ~chosen] = OVERLAPPING
            alive = chosen
        if cfg.max_per_source is not None:
            verdicts[alive & ~_best_of_each(codes, scores, alive, cfg.max_per_source)] = SOURCE_FULL
    return Candidates(scores, verdicts, members, cfg.band == "quantile")


def member_rows(windows: pa.Table, clips: pa.Table) -> npt.NDArray[np.intp]:
    """(W, N) rows of the windows' clips."""
    if not windows.num_rows:
        return np.empty((0, 1), np.intp)
    names = windows["clip_ids"].combine_chunks()
    length = len(names[0])
    ids = clips["clip_id"].combine_chunks()
    # A window's clips are consecutive, so the first is enough to find the others.
    firsts = names.flatten().take(pa.array(np.arange(0, len(names) * length, length)))
    found = pc.index_in(firsts, value_set=ids)
    rows = pc.fill_null(found, 0).to_numpy().astype(np.intp)[:, None] + np.arange(length)
    rows = np.minimum(rows, len(ids) - 1)
    wrong = pc.not_equal(ids.take(pa.array(rows.ravel())), names.flatten())
    if pc.any(wrong).as_py():
        raise ManifestError(
            "a window's clips are not those of table 'clips'",
            found=names.flatten()[pc.index(wrong, True).as_py()].as_py(),
            expected="tables windows and clips of one snapshot",
            do="make the snapshot anew",
        )
    return rows


def _apart(
    source: Rows,
    index: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    alive: npt.NDArray[np.bool_],
    reach: int,
) -> npt.NDArray[np.bool_]:
    """Best first, of those alive: windows of a source whose indexes differ by at least ``reach``.

    Each round keeps every window that is better than all its living neighbours, and drops theirs:
    the same as going through all of them in order of their scores.
    """
    rank = np.empty(len(scores), np.int64)
    rank[np.lexsort((np.arange(len(scores)), -scores))] = np.arange(len(scores))
    near = [(source[k:] == source[:-k]) & (index[k:] - index[:-k] < reach) for k in range(1, reach)]
    chosen = np.zeros(len(scores), np.bool_)
    worst = len(scores)
    while alive.any():
        value = np.where(alive, rank, worst)
        best = np.full(len(value), worst)
        for k, close in enumerate(near, 1):
            best[k:][close] = np.minimum(best[k:], value[:-k])[close]
            best[:-k][close] = np.minimum(best[:-k], value[k:])[close]
        new = alive & (value < best)
        chosen |= new
        gone = new.copy()
        for k, close in enumerate(near, 1):
            gone[k:] |= close & new[:-k]
            gone[:-k] |= close & new[k:]
        alive = alive & ~gone
    return chosen


def _best_of_each(
    source: Rows,
    scores: npt.NDArray[np.float64],
    alive: npt.NDArray[np.bool_],
    count: int,
) -> npt.NDArray[np.bool_]:
    """The ``count`` best of those alive of each source; of equal ones the earlier."""
    rows = np.flatnonzero(alive)
    ordered = rows[np.lexsort((rows, -scores[rows], source[rows]))]
    begins = np.flatnonzero(np.diff(source[ordered], prepend=-1))
    place = np.arange(len(ordered)) - np.repeat(begins, np.diff(begins, append=len(ordered)))
    kept = np.zeros(len(scores), np.bool_)
    kept[ordered[place < count]] = True
    return kept
