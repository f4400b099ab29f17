"""Flow ``ablate-thresholds``: what each similarity threshold keeps, from one scoring pass."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pandas as pd
from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from curation.manifests import sft_samples
from flows.artifacts import leave_summary
from flows.console import narrow_table, out
from flows.refresh import refresh_dataset
from schemas.config import ManifestsConfig, TriptychConfig
from schemas.layout import Snapshot, Workspace
from schemas.rows import Clip, Window
from schemas.storage import atomic_path, fingerprint, mark_done, point_latest
from schemas.tables import CLIPS, WINDOWS, read_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """What one threshold keeps of the windows.

    ``hours`` counts each clip once; ``mean_similarity`` is None where nothing is kept.
    """

    statistic: str
    low: float
    high: float
    input_windows: int
    kept_windows: int
    below: int
    above: int
    no_caption: int
    clips: int
    sources: int
    hours: float
    mean_similarity: float | None


@dataclass(frozen=True)
class AblateResult:
    """Folder with ``results.parquet``, and the cells."""

    folder: Path
    cells: list[Cell]


@flow(name="ablate-thresholds", description=__doc__)
def ablate_thresholds(config: TriptychConfig) -> AblateResult:
    """Score once (through ``refresh-dataset``), then apply each threshold of ``curation.ablation``.

    The upper limit and the statistic are those of ``curation.manifests``.
    """
    dataset = refresh_dataset(config)
    snapshot = Snapshot(dataset.snapshot)
    cells = sweep(snapshot, config.curation.manifests, config.curation.ablation)
    folder = publish(config, snapshot, cells)
    create_table_artifact(key="ablation", table=[dataclasses.asdict(c) for c in cells])
    leave_summary("ablation-summary", "Threshold ablation", {"results": folder})
    return AblateResult(folder, cells)


@task(name="sweep", cache_policy=NO_CACHE)
def sweep(snapshot: Snapshot, manifests: ManifestsConfig, lows: Sequence[float]) -> list[Cell]:
    """One cell per threshold, from stored similarities; nothing is scored again."""
    windows = read_table(snapshot.table("windows"), WINDOWS)
    clips = read_table(snapshot.table("clips"), CLIPS)
    cells: list[Cell] = []
    for low in sorted(set(lows)):
        high = max(low, manifests.high)
        at = manifests.model_copy(update={"low": low, "high": high})
        cells.append(cell(windows, clips, at))
    return cells


def cell(windows: Sequence[Window], clips: Sequence[Clip], manifests: ManifestsConfig) -> Cell:
    """What the sft manifest would hold with these settings."""
    samples, rejects = sft_samples(windows, clips, manifests)
    scenes = {s.clip_id: s for sample in samples for s in sample.scenes}
    reasons = [r.reason for r in rejects]
    scores = [s.similarity for s in samples if s.similarity is not None]
    return Cell(
        statistic=manifests.statistic,
        low=manifests.low,
        high=manifests.high,
        input_windows=len(windows),
        kept_windows=len(samples),
        below=reasons.count("below_threshold"),
        above=reasons.count("above_threshold"),
        no_caption=reasons.count("no_caption"),
        clips=len(scenes),
        sources=len({s.source_id for s in scenes.values()}),
        hours=sum(s.end_s - s.start_s for s in scenes.values()) / 3600,
        mean_similarity=fmean(scores) if scores else None,
    )


@task(name="publish-ablation", cache_policy=NO_CACHE)
def publish(config: TriptychConfig, snapshot: Snapshot, cells: list[Cell]) -> Path:
    """Write ``results.parquet``, named by its inputs, and let LATEST name it."""
    workspace = Workspace(Path(config.workspace))
    rows = [dataclasses.asdict(c) for c in cells]
    folder = workspace.ablations / fingerprint(snapshot.root.name, rows)
    with atomic_path(folder / "results.parquet") as tmp:
        pd.DataFrame(rows).to_parquet(tmp, index=False)
    mark_done(folder, {"snapshot": snapshot.root.name, "cells": len(cells)})
    point_latest(workspace.ablations, folder.name)
    log.info("stage=ablate state=done cells=%d folder=%s", len(cells), folder)
    return folder


def show_cells(cells: Sequence[Cell]) -> None:
    """Print one row per threshold; ``mean`` is the mean similarity of the windows kept."""
    title = f"sft windows kept, by lowest {cells[0].statistic}" if cells else "no thresholds"
    names = ("low", "high", "windows", "kept", "below", "above", "clips", "sources", "minutes")
    table = narrow_table(title, *names, "mean")
    for c in cells:
        mean = "" if c.mean_similarity is None else f"{c.mean_similarity:.3f}"
        numbers = (c.input_windows, c.kept_windows, c.below, c.above, c.clips, c.sources)
        minutes = f"{60 * c.hours:.1f}"
        table.add_row(f"{c.low:g}", f"{c.high:g}", *map(str, numbers), minutes, mean)
    out.print(table)
