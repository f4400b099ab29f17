"""A sweep over thresholds: what each would keep, all of them from one pass over stored scores.

Windows, clips and sources are sorted once by the highest threshold that keeps them. What a
threshold keeps is then the head of each list, and its sums are running sums: a further threshold
costs a few binary searches.

Shape legend: W windows, N clips per window, B clips, C cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.selection import KEPT, NEAR_DUPLICATE, NO_CAPTION, REASONS, Candidates, candidates
from schemas.arrow_compute import pc
from schemas.config.curation import ManifestsConfig, Statistic

CLIP_COLUMNS = ("clip_id", "source_id", "caption", "start_s", "end_s")
"""What of the clips is needed here."""

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Cell:
    """What one threshold of one statistic keeps.

    Attributes:
        statistic: The statistic compared.
        band: ``similarity`` or ``quantile``: what low and high are.
        low: Low threshold.
        high: High threshold.
        low_similarity: The low threshold as a similarity.
        high_similarity: The high threshold as a similarity.
        input_windows: All windows.
        kept_windows: Windows that would become sft samples.
        clips: Different clips in them.
        sources: Different sources of them.
        hours: Length of these clips, each counted once.
        mean_similarity: Mean statistic of the windows kept; None where there are none.
        caption_similarity: Mean over the clips kept that have one; None where there are none.
        rejects: Windows left out, by reason.
        precision: Share of related windows among those kept whose truth is known; None without.
        recall: Share of the related windows that is kept; None without ground truth.
        related: Related windows among all; None without ground truth.
    """

    statistic: str
    band: str
    low: float
    high: float
    low_similarity: float
    high_similarity: float
    input_windows: int
    kept_windows: int
    clips: int
    sources: int
    hours: float
    mean_similarity: float | None
    caption_similarity: float | None
    rejects: dict[str, int]
    precision: float | None
    recall: float | None
    related: int | None


class Sweep:
    """All cells of a grid, and which windows each keeps."""

    def __init__(self, cells: Sequence[Cell], judged: dict[str, Candidates]) -> None:
        self.cells = list(cells)
        self._judged = judged

    def kept(self, cell: int) -> Rows:
        """Rows of the windows that a cell keeps."""
        verdicts = self._judged[self.cells[cell].statistic].judged(self.cells[cell].low)
        return np.flatnonzero(verdicts == KEPT)

    def near(self, cell: int, count: int) -> tuple[list[int], list[int]]:
        """Rows of up to ``count`` windows just below and just above a cell's low threshold.

        Nearest first. Below are those that only the threshold keeps out, above those kept.
        """
        found = self._judged[self.cells[cell].statistic]
        low = found.similarity(self.cells[cell].low)
        rows = np.flatnonzero(found.verdicts == KEPT)
        rows = rows[np.argsort(found.scores[rows], kind="stable")]
        split = int(np.searchsorted(found.scores[rows], low))
        below = rows[max(0, split - count) : split][::-1]
        return below.tolist(), rows[split : split + count].tolist()

    def overlap(self) -> Floats:
        """(C, C) windows that two cells both keep, over those that either keeps; 1 if both none."""
        names = list(dict.fromkeys(cell.statistic for cell in self.cells))
        kept = np.array([cell.kept_windows for cell in self.cells])
        both = np.zeros((len(self.cells), len(self.cells)), np.int64)
        for name in names:
            for other in names:
                a = [i for i, cell in enumerate(self.cells) if cell.statistic == name]
                b = [i for i, cell in enumerate(self.cells) if cell.statistic == other]
                both[np.array(a)[:, None], b] = self._both(a, b)
        either = kept[:, None] + kept[None, :] - both
        return np.where(either > 0, both / np.maximum(either, 1), 1.0)

    def _both(self, a: list[int], b: list[int]) -> npt.NDArray[np.int64]:
        """(len(a), len(b)) windows that cells of one statistic and cells of another both keep."""
        one, other = (self._judged[self.cells[cells[0]].statistic] for cells in (a, b))
        open_to_both = (one.verdicts == KEPT) & (other.verdicts == KEPT)
        # Of each window, how many of the rising thresholds let it pass; then count "at least".
        passed: list[npt.NDArray[np.intp]] = []
        places: list[npt.NDArray[np.intp]] = []
        for found, cells in ((one, a), (other, b)):
            lows = np.array([found.similarity(self.cells[i].low) for i in cells])
            order = np.argsort(lows, kind="stable")
            passed.append(np.searchsorted(lows[order], found.scores[open_to_both], side="right"))
            places.append(np.argsort(order, kind="stable"))
        counts = np.zeros((len(a) + 1, len(b) + 1), np.int64)
        np.add.at(counts, (passed[0], passed[1]), 1)
        least = counts[::-1, ::-1].cumsum(axis=0).cumsum(axis=1)[::-1, ::-1]
        return least[places[0][:, None] + 1, places[1] + 1]


def sweep(
    windows: pa.Table,
    clips: pa.Table,
    cfg: ManifestsConfig,
    lows: Sequence[float],
    statistics: Sequence[Statistic],
    *,
    caption_scores: pa.Table | None = None,
    related: Floats | None = None,
) -> Sweep:
    """What each low threshold of each statistic keeps, in the order given.

    Args:
        windows: ``curation.selection.WINDOW_COLUMNS`` in the table's order.
        clips: ``CLIP_COLUMNS`` in the table's order.
        cfg: All other rules of the sft manifest.
        lows: Low thresholds, in the unit of ``cfg.band``.
        statistics: Statistics to compare with each.
        caption_scores: ``clip_id`` and ``similarity`` of captions with their clips.
        related: (W,) whether a window's scenes belong together: 1 or 0, NaN where nobody knows.

    Raises:
        ManifestError: A window names a clip that is not there.
    """
    lengths = clips["end_s"].to_numpy() - clips["start_s"].to_numpy()
    sources = pc.dictionary_encode(clips["source_id"].combine_chunks()).indices.to_numpy()
    texts = _caption_similarities(clips, caption_scores)
    cells: list[Cell] = []
    judged: dict[str, Candidates] = {}
    for statistic in dict.fromkeys(statistics):
        found = judged[statistic] = candidates(windows, clips, cfg, statistic)
        heads = _heads(found, lengths, sources, texts, related)
        cells += [_cell(found, heads, cfg, low, statistic) for low in dict.fromkeys(lows)]
    return Sweep(cells, judged)


@dataclass(frozen=True)
class _Head:
    """Things by the highest similarity threshold that keeps them, with running sums over them.

    ``best`` falls; ``sums[name][k]`` is the sum over the first k things.
    """

    best: Floats
    sums: dict[str, Floats]

    @classmethod
    def of(cls, best: Floats, **values: Floats) -> _Head:
        order = np.argsort(-best, kind="stable")
        sums = {k: np.append(0.0, np.cumsum(v[order])) for k, v in values.items()}
        return cls(best[order], sums)

    def count(self, low: float) -> int:
        """How many of them a low threshold keeps."""
        return int(np.searchsorted(-self.best, -low, side="right"))

    def total(self, name: str, low: float) -> float:
        """The sum over those it keeps."""
        return float(self.sums[name][self.count(low)])

    def ratio(self, name: str, over: str, low: float) -> float | None:
        """One sum over another; None where that is 0."""
        divisor = self.total(over, low)
        return self.total(name, low) / divisor if divisor else None


@dataclass(frozen=True)
class _Heads:
    windows: _Head
    clips: _Head
    sources: _Head
    rejected: dict[str, _Head]
    related: int | None


def _heads(
    found: Candidates,
    lengths: Floats,
    sources: Rows,
    texts: Floats,
    related: Floats | None,
) -> _Heads:
    open_to_low = found.verdicts == KEPT
    scores, members = found.scores[open_to_low], found.members[open_to_low]
    known = np.full(len(found.scores), np.nan) if related is None else related
    known = known[open_to_low]
    clip_best = np.full(len(lengths), -np.inf)
    for column in members.T:  # a clip is at most once at each place of a window
        clip_best[column] = np.maximum(clip_best[column], scores)
    source_best = np.full(int(sources.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(source_best, sources, clip_best)
    used = clip_best > -np.inf
    told = ~np.isnan(texts[used])
    return _Heads(
        windows=_Head.of(
            scores,
            one=np.ones(len(scores)),
            score=scores,
            known=(~np.isnan(known)).astype(np.float64),
            related=np.nan_to_num(known),
        ),
        clips=_Head.of(
            clip_best[used],
            seconds=lengths[used],
            text=np.nan_to_num(texts[used]),
            told=told.astype(np.float64),
        ),
        sources=_Head.of(source_best[source_best > -np.inf]),
        rejected={
            reason: _Head.of(found.scores[found.verdicts == number])
            for number, reason in enumerate(REASONS)
            if number != KEPT and (found.verdicts == number).any()
        },
        related=None if related is None else int(np.nansum(related)),
    )


def _cell(
    found: Candidates, heads: _Heads, cfg: ManifestsConfig, low: float, statistic: Statistic
) -> Cell:
    at = found.similarity(low)
    kept = heads.windows.count(at)
    # Only the two reasons that come first hold whatever the threshold.
    always = [REASONS[number] for number in (NO_CAPTION, NEAR_DUPLICATE)]
    rejects = {
        reason: len(head.best) if reason in always else head.count(at)
        for reason, head in heads.rejected.items()
    }
    below = len(found.scores) - kept - sum(rejects.values())
    rejects["below_threshold"] = below
    truth = heads.related
    return Cell(
        statistic=statistic,
        band=cfg.band,
        low=low,
        high=cfg.high,
        low_similarity=at,
        high_similarity=found.similarity(cfg.high),
        input_windows=len(found.scores),
        kept_windows=kept,
        clips=heads.clips.count(at),
        sources=heads.sources.count(at),
        hours=heads.clips.total("seconds", at) / 3600,
        mean_similarity=heads.windows.ratio("score", "one", at),
        caption_similarity=heads.clips.ratio("text", "told", at),
        rejects={reason: n for reason, n in sorted(rejects.items()) if n},
        precision=None if truth is None else heads.windows.ratio("related", "known", at),
        recall=heads.windows.total("related", at) / truth if truth else None,
        related=truth,
    )


def _caption_similarities(clips: pa.Table, caption_scores: pa.Table | None) -> Floats:
    """(B,) similarity of each clip's caption; NaN where there is none."""
    if caption_scores is None or not caption_scores.num_rows:
        return np.full(clips.num_rows, np.nan)
    ids = caption_scores["clip_id"].combine_chunks()
    at = pc.index_in(clips["clip_id"].combine_chunks(), value_set=ids)
    found = caption_scores["similarity"].combine_chunks().take(at)
    return pc.fill_null(found, np.nan).to_numpy(zero_copy_only=False).astype(np.float64)
