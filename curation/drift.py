"""How far what was measured on one snapshot lies from what was measured on another.

Two things are compared: distributions over clips and windows, and the share of its records that
each stage leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.config.curation import Statistic
from schemas.counts import StageCount
from schemas.layout import Snapshot
from schemas.storage import read_json
from schemas.tables import CAPTION_SCORES, CLIPS, WINDOWS, Table, read_arrow

Values = npt.NDArray[np.float64]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 30

UNITS = {
    "duration_s": "clip",
    "height_px": "clip",
    "fps": "clip",
    "similarity": "window",
    "caption_similarity": "clip",
}
"""What is measured, and on what. ``similarity`` is the statistic that the newer snapshot judges by.
"""


@dataclass(frozen=True)
class Distribution:
    """One snapshot's values.

    Attributes:
        n: How many there are.
        mean: None where there are none.
        quantiles: At ``QUANTILES``; empty where there are no values.
        counts: Values per bin of ``Drift.edges``.
    """

    n: int
    mean: float | None
    quantiles: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Drift:
    """One measured quantity in an older and a newer snapshot.

    Attributes:
        name: A key of ``UNITS``.
        unit: What one value belongs to.
        old: In the older snapshot.
        new: In the newer one.
        edges: Limits of the bins of both, one more than there are bins.
        distance: Two-sample Kolmogorov-Smirnov distance, 0 (same distribution) to 1.
    """

    name: str
    unit: str
    old: Distribution
    new: Distribution
    edges: list[float]
    distance: float


@dataclass(frozen=True)
class ShareChange:
    """Which share of its input a stage left out, for one reason or (``reason=None``) for any.

    A stage that one snapshot did not run left out nothing there. Failed records count as left out.
    """

    stage: str
    reason: str | None
    old_count: int
    new_count: int
    old_share: float
    new_share: float
    change: float


def measure_drift(old: Snapshot, new: Snapshot, statistic: Statistic) -> list[Drift]:
    """Compare everything that was measured in both snapshots.

    Args:
        old: The older snapshot.
        new: The newer one.
        statistic: Which similarity of a window is compared.

    Raises:
        ManifestError: A table is missing or of an unknown version.
    """
    before, after = _measured(old, statistic), _measured(new, statistic)
    return [_drift(name, before[name], after[name]) for name in before if name in after]


def ks_distance(a: Values, b: Values) -> float:
    """Largest gap between two empirical distribution functions, exactly.

    Where one sample is empty and the other is not, that is 1: all there was is gone, or new.
    """
    if not a.size or not b.size:
        return float(a.size != b.size)
    a, b = np.sort(a), np.sort(b)
    steps = np.concatenate([a, b])
    below_a = np.searchsorted(a, steps, side="right") / a.size
    below_b = np.searchsorted(b, steps, side="right") / b.size
    return float(np.abs(below_a - below_b).max())


def share_changes(old: Snapshot, new: Snapshot) -> list[ShareChange]:
    """Per stage, and per reason within it, in the order in which the stages run."""
    before, after = _counts(old.counts), _counts(new.counts)
    changes: list[ShareChange] = []
    for stage in [*after, *(s for s in before if s not in after)]:
        was, now = before.get(stage), after.get(stage)
        reasons = {**(now.reasons if now else {}), **(was.reasons if was else {})}
        changes.append(_share(stage, None, was, now))
        changes += [_share(stage, reason, was, now) for reason in sorted(reasons)]
    return changes


def _measured(snapshot: Snapshot, statistic: Statistic) -> dict[str, Values]:
    clips = _columns(snapshot.table("clips"), CLIPS, ("start_s", "end_s", "height_px", "fps"))
    windows = _columns(snapshot.table("windows"), WINDOWS, (statistic,))
    measured = {
        "duration_s": clips["end_s"] - clips["start_s"],
        "height_px": clips["height_px"],
        "fps": clips["fps"],
        "similarity": windows[statistic],
    }
    captions = snapshot.table("caption_scores")
    if captions.is_file():
        scores = _columns(captions, CAPTION_SCORES, ("similarity",))
        measured["caption_similarity"] = scores["similarity"]
    return measured


def _columns(path: Path, table: Table[Any], names: Sequence[str]) -> Mapping[str, Values]:
    read = read_arrow(path, table, names)
    return {
        name: read[name].drop_null().to_numpy().astype(np.float64, copy=False) for name in names
    }


def _drift(name: str, old: Values, new: Values) -> Drift:
    both = np.concatenate([old, new])
    edges = _bins(both) if both.size else np.zeros(0)
    return Drift(
        name=name,
        unit=UNITS[name],
        old=_distribution(old, edges),
        new=_distribution(new, edges),
        edges=edges.tolist(),
        distance=ks_distance(old, new),
    )


def _bins(values: Values) -> Values:
    low, high = values.min(), values.max()
    if np.isclose(low, high):
        # Lengths computed from other starts differ in their last digit alone: that is one bin.
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _BINS + 1)


def _distribution(values: Values, edges: Values) -> Distribution:
    if not values.size:
        return Distribution(0, None, [], [0] * max(0, edges.size - 1))
    return Distribution(
        n=values.size,
        mean=float(values.mean()),
        quantiles=np.quantile(values, QUANTILES).tolist(),
        counts=np.histogram(values, edges)[0].tolist(),
    )


def _counts(path: Path) -> dict[str, StageCount]:
    return {record["stage"]: StageCount(**record) for record in read_json(path)}


def _share(
    stage: str, reason: str | None, old: StageCount | None, new: StageCount | None
) -> ShareChange:
    old_count, new_count = _left_out(old, reason), _left_out(new, reason)
    old_share = old_count / old.input if old and old.input else 0.0
    new_share = new_count / new.input if new and new.input else 0.0
    return ShareChange(
        stage, reason, old_count, new_count, old_share, new_share, new_share - old_share
    )


def _left_out(count: StageCount | None, reason: str | None) -> int:
    if count is None:
        return 0
    return count.rejected + count.failed if reason is None else count.reasons.get(reason, 0)
