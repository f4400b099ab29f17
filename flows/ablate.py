"""Flow ``ablate-thresholds``: what each similarity threshold keeps, from one scoring pass."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.ablation import Ablation
from flows.ablation_page import headline, render
from flows.ablation_tables import CellResult
from flows.artifacts import leave_summary, progress
from flows.console import narrow_table, out
from flows.refresh import refresh_dataset
from flows.train import base_model, encode, train_stage
from schemas.config import TriptychConfig
from schemas.layout import Snapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AblateResult:
    """Folder with ``index.html`` and ``results.parquet``, and what stands in them.

    ``left_out`` are cells that should have been trained when the time was up; ``unchanged`` says
    that all of it was there already.
    """

    folder: Path
    cells: list[CellResult]
    left_out: list[int]
    unchanged: bool


@flow(name="ablate-thresholds", description=__doc__)
def ablate_thresholds(config: TriptychConfig) -> AblateResult:
    """Score once (through ``refresh-dataset``), then try ``curation.ablation``'s thresholds.

    All other rules are those of ``curation.manifests``. With ``train_cells`` the pre-trained model
    is fine-tuned on the windows of some cells, and its videos are scored.

    Raises:
        ConfigError: Thresholds are to be quantiles, and are not.
        InputError: The ground truth cannot be used.
        TrainingFailed: A training process ended early; running the flow again resumes.
    """
    dataset = refresh_dataset(config)
    ablation = Ablation(config, Snapshot(dataset.snapshot))
    sweep(ablation)
    unchanged, left_out = ablation.done(), []
    if not unchanged:
        if config.curation.ablation.train_cells:
            left_out = train_cells(ablation, pretrained(config, ablation.snapshot))
        publish(ablation, left_out)
    ablation.point()
    cells = ablation.results()
    create_table_artifact(key="ablation", table=[dataclasses.asdict(c) for c in cells])
    leave_summary(
        "ablation-summary",
        "Threshold ablation",
        {
            "result": headline(cells),
            "page": ablation.folder / "index.html",
            "table": ablation.folder / "results.parquet",
            "unchanged": unchanged,
            "cells left out": ", ".join(map(str, left_out)) or "none",
        },
    )
    return AblateResult(ablation.folder, cells, left_out, unchanged)


@task(name="sweep", cache_policy=NO_CACHE)
def sweep(ablation: Ablation) -> None:
    """Apply every threshold to the stored similarities; nothing is scored again."""
    started = time.monotonic()
    cells = ablation.sweep.cells
    for number, cell in enumerate(cells):
        log.info(
            "stage=ablate cell=%d statistic=%s low=%g kept=%d input=%d",
            number, cell.statistic, cell.low, cell.kept_windows, cell.input_windows,
        )  # fmt: skip
    seconds = time.monotonic() - started
    log.info("stage=ablate state=swept cells=%d seconds=%.1f", len(cells), seconds)


def pretrained(config: TriptychConfig, snapshot: Snapshot) -> Path:
    """The model that every cell starts from; the workspace's own where it has been trained."""
    model = base_model(config)
    if config.training.pretrain.steps:
        encode(config, "pretrain", snapshot, model)
        model, _ = train_stage(config, "pretrain", snapshot, model)
    return model


@task(name="train-cells", cache_policy=NO_CACHE)
def train_cells(ablation: Ablation, base: Path) -> list[int]:
    """Train, generate and evaluate with the chosen cells; returns those there was no time for."""
    cfg = ablation.config.curation.ablation
    started = time.monotonic()
    chosen = ablation.chosen()
    left_out: list[int] = []
    with progress("ablation-progress", "train cells") as tell:
        for done, cell in enumerate(chosen):
            if ablation.is_trained(cell):
                continue
            if time.monotonic() - started > 60 * cfg.max_minutes:
                left_out.append(cell)
                log.warning("stage=ablate cell=%d state=left_out minutes=%g", cell, cfg.max_minutes)
                continue
            scores = ablation.train(cell, base, lambda what, n=done: tell(n, len(chosen), what))
            log.info(
                "stage=ablate cell=%d state=trained samples=%d seconds=%.1f",
                cell, scores.samples, scores.seconds,
            )  # fmt: skip
    return left_out


@task(name="publish-ablation", cache_policy=NO_CACHE)
def publish(ablation: Ablation, left_out: list[int]) -> None:
    """Write the page and the tables."""
    page = render(ablation, left_out)
    ablation.publish(page, left_out)
    log.info(
        "stage=ablate state=done cells=%d page_bytes=%d folder=%s",
        len(ablation.sweep.cells), len(page), ablation.folder,
    )  # fmt: skip


def show_cells(cells: Sequence[CellResult]) -> None:
    """Print one row per cell (it fits 80 columns); columns nothing is known of are left out."""
    quantile = cells[0].band == "quantile"
    several = len({c.statistic for c in cells}) > 1
    columns: dict[str, list[str]] = {
        "statistic": [c.statistic if several else "" for c in cells],
        "low": [f"{c.low:g}" for c in cells],
        "similarity": [f"{c.low_similarity:.3f}" if quantile else "" for c in cells],
        "kept": [str(c.kept_windows) for c in cells],
        "clips": [str(c.clips) for c in cells],
        "sources": [str(c.sources) for c in cells],
        "minutes": [f"{60 * c.hours:.1f}" for c in cells],
        "mean": [_number(c.mean_similarity, 3) for c in cells],
        "text": [_number(c.caption_similarity, 2) for c in cells],
        "prec.": [_number(c.precision, 2) for c in cells],
        "recall": [_number(c.recall, 2) for c in cells],
        "sequence": [_number(c.sequence, 2) for c in cells],
    }
    shown = {name: texts for name, texts in columns.items() if any(texts)}
    by = "low threshold" if several else f"lowest {cells[0].statistic}"
    table = narrow_table(f"{cells[0].input_windows} windows: kept for sft, by {by}", *shown)
    for texts in zip(*shown.values(), strict=True):
        table.add_row(*texts)
    out.print(table)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
