"""What the reproduction shows: means with intervals, and whether the paper's trends hold.

An interval is of a bootstrap over both stories and seeds: each of 2,000 times as many stories as
there are, and as many seeds, are drawn again with replacement, the same stories for every seed, as
all cells are scored on the same ones; it spans 95 % of the means. Two cells are compared by the
interval of their difference, for which both are drawn alike.

Shape legend: R seeds, T stories, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flows.reproduce_cells import Cell, Row

Floats = npt.NDArray[np.float64]
Records = Mapping[str, Mapping[str, Any]]
"""What was kept of each finished cell, by its key (``reproduce_work.do_cell``)."""

DRAWS = 2000
MEASURES = {
    "visual": "visual",
    "semantic": "semantic",
    "sequence": "sequence",
    "style": "same style",
    "told": "as told",
}
"""The paper's three scores, and the two of the ground truth, by their names in a record."""


@dataclass(frozen=True)
class Estimate:
    """A mean x 100 and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """For a table."""
        return f"{self.mean:.1f} ({self.low:.1f}..{self.high:.1f})"

    @property
    def short(self) -> str:
        """For a table that has little room: the mean, and half of the interval's width."""
        return f"{self.mean:.1f}±{(self.high - self.low) / 2:.1f}"


@dataclass(frozen=True)
class Trend:
    """Something the paper found.

    Attributes:
        table: Of which table.
        said: In words.
        more: Name of the row that has more.
        less: Name of the row that has less.
        measures: By what it is seen: the ground truth's measure, then the paper's score.
        or_equal: Whether it also holds where there is no difference.
    """

    table: str
    said: str
    more: str
    less: str
    measures: tuple[str, str]
    or_equal: bool = False


_STYLE, _TEXT, _ALL = ("style", "visual"), ("told", "semantic"), ("both", "sequence")
TRENDS = (
    Trend("masks", "v1 < v2, visual", "v2", "v1", _STYLE),
    Trend("masks", "v2 <= v3, visual", "v3", "v2", _STYLE, or_equal=True),
    Trend("masks", "v2 > v5, semantic", "v2", "v5", _TEXT),
    Trend("thresholds", "0.0 > none, visual", "0.0", "none", _STYLE),
    Trend("thresholds", "0.8 > none, visual", "0.8", "none", _STYLE),
    Trend("thresholds", "0.8 > 0.0, visual", "0.8", "0.0", _STYLE),
    Trend("stages", "both > pre-training only", "both", "pre-training only", _ALL),
    Trend("stages", "both > SFT only", "both", "SFT only", _ALL),
    Trend("stages", "both > SFT only, longer", "both", "SFT only, longer", _ALL),
)
Verdict = Literal["holds", "not separated", "does not hold"]


@dataclass(frozen=True)
class Seen:
    """A trend in our figures: the difference by both measures, and what follows from the first."""

    trend: Trend
    truth: Estimate
    score: Estimate
    verdict: Verdict


def estimate(values: Floats) -> Estimate:
    """Mean and interval of (R, T) values, x 100."""
    drawn = np.random.default_rng(0)
    seeds, stories = (
        drawn.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in values.shape
    )  # (D, R), (D, T): how often each was drawn
    means = np.einsum("dr,rt,dt->d", seeds, values, stories)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(100 * float(values.mean()), 100 * float(low), 100 * float(high))


def values_of(records: Records, cell: Cell, seeds: Sequence[int], measure: str) -> Floats:
    """(R, T) a measure of a cell, for seeds in which it is finished; stories in one order."""
    stories = [records[_key(cell, seed)]["stories"] for seed in seeds]
    return np.array([[s[name][measure] for name in sorted(stories[0])] for s in stories])


def seeds_of(records: Records, cell: Cell) -> list[int]:
    """Seeds in which a cell is finished."""
    return [
        r["seed"] for r in records.values() if _key(cell, r["seed"]) in records and _same(cell, r)
    ]


def estimates(records: Records, row: Row) -> dict[str, Estimate] | None:
    """All measures of a row's cell; None where no seed of it is finished."""
    seeds = seeds_of(records, row.cell)
    if not seeds:
        return None
    return {m: estimate(values_of(records, row.cell, seeds, m)) for m in MEASURES}


def trends(records: Records, rows: Mapping[str, Sequence[Row]]) -> list[Seen]:
    """The trends of which both rows have been measured in a common seed."""
    seen: list[Seen] = []
    for trend in TRENDS:
        cells = {row.name: row.cell for row in rows.get(trend.table, ())}
        if trend.more not in cells or trend.less not in cells:
            continue
        more, less = cells[trend.more], cells[trend.less]
        seeds = sorted({*seeds_of(records, more)} & {*seeds_of(records, less)})
        if seeds:
            truth, score = (
                estimate(
                    values_of(records, more, seeds, measure)
                    - values_of(records, less, seeds, measure)
                )
                for measure in trend.measures
            )
            seen.append(Seen(trend, truth, score, verdict(truth, trend.or_equal)))
    return seen


def verdict(difference: Estimate, or_equal: bool) -> Verdict:
    """What an interval of a difference says of "more than" (or "not less than")."""
    if difference.high < 0:
        return "does not hold"
    return "holds" if or_equal or difference.low > 0 else "not separated"


def _key(cell: Cell, seed: int) -> str:
    return Cell(cell.mask, cell.stages, cell.low, seed).key


def _same(cell: Cell, record: Mapping[str, Any]) -> bool:
    return (record["mask"], record["stages"], record["low"]) == (cell.mask, cell.stages, cell.low)
