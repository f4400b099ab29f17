"""Flow ``end-to-end``: from raw video to scored multi-scene videos and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import leave_counts, leave_summary
from flows.evaluate import evaluate_batch
from flows.generate import generate_batch
from flows.refresh import refresh_dataset
from flows.report import build_report
from flows.train import train
from schemas.config import TriptychConfig
from schemas.counts import StageCount
from schemas.layout import Workspace


@dataclass(frozen=True)
class EndToEndResult:
    """Where the results lie, and what became of every record of every stage."""

    snapshot: Path
    model: Path
    videos: Path
    gallery: Path
    report: Path
    counts: list[StageCount]


@flow(name="end-to-end", description=__doc__)
def end_to_end(config: TriptychConfig) -> EndToEndResult:
    """Curate, train on the snapshot, generate with the trained model, score, report."""
    dataset = refresh_dataset(config)
    trained = train(config)
    generation = config.generation.model_copy(update={"model": str(trained.model)})
    generated = generate_batch(config.model_copy(update={"generation": generation}))
    evaluated = evaluate_batch(config)
    counts = [*dataset.counts, *trained.counts, *generated.counts, *evaluated.counts]
    report = write_report(config, counts)
    leave_counts("end-to-end-counts", counts)
    leave_summary(
        "end-to-end-summary",
        "End to end",
        {
            "snapshot": dataset.snapshot,
            "model": trained.model,
            "videos": generated.videos,
            "gallery": generated.gallery,
            "consistency x 100": evaluated.summary,
            "report": report,
        },
    )
    return EndToEndResult(
        dataset.snapshot, trained.model, generated.videos, generated.gallery, report, counts
    )


@task(name="report", cache_policy=NO_CACHE)
def write_report(config: TriptychConfig, counts: list[StageCount]) -> Path:
    """Write the HTML report."""
    return build_report(config, Workspace(Path(config.workspace)), extra_counts=counts)
