"""What an ablation stores: one row per cell, one per pair of cells, and a trained cell's scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schemas.tables import Table


@dataclass(frozen=True)
class CellScores:
    """What a model trained on one cell's windows came to; scores are means x 100.

    ``samples`` counts what it was trained on, ``scored`` the videos the means stand on.
    """

    cell: int
    samples: int
    visual: float | None
    semantic: float | None
    sequence: float | None
    scored: int
    videos: int
    seconds: float


@dataclass(frozen=True)
class CellResult:
    """One row of ``results.parquet``: a cell, why windows were left out of it, and its scores.

    The first columns are those of ``curation.ablation.Cell``. ``trained_as`` is the cell whose
    model was scored: cells that keep the same windows share it.
    """

    cell: int
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
    precision: float | None
    recall: float | None
    related: int | None
    rejected_no_caption: int
    rejected_near_duplicate: int
    rejected_below_threshold: int
    rejected_above_threshold: int
    rejected_overlapping: int
    rejected_source_full: int
    trained_as: int | None
    trained_samples: int | None
    visual: float | None
    semantic: float | None
    sequence: float | None
    scored_videos: int | None


@dataclass(frozen=True)
class Overlap:
    """Windows that two cells both keep, over those that either keeps."""

    cell: int
    other: int
    jaccard: float


RESULTS = Table("ablation_results", CellResult, ("cell",), ("cell",))
OVERLAP = Table("ablation_overlap", Overlap, ("cell", "other"), ("cell", "other"))


def score_columns(scores: CellScores | None) -> Mapping[str, Any]:
    """The score columns of a result; None where the cell has not been trained."""
    names = {
        "cell": "trained_as",
        "samples": "trained_samples",
        "visual": "visual",
        "semantic": "semantic",
        "sequence": "sequence",
        "scored": "scored_videos",
    }
    return {to: None if scores is None else getattr(scores, name) for name, to in names.items()}
