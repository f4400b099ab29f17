"""Flow ``evaluate``: visual, semantic and sequence consistency of a batch of generated videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import leave_counts, leave_summary
from flows.console import narrow_table, out
from inference.evaluation import aggregate, evaluate
from schemas.config import TriptychConfig
from schemas.counts import StageCount
from schemas.errors import ManifestError
from schemas.layout import Workspace
from schemas.storage import latest


@dataclass(frozen=True)
class EvaluateResult:
    """The scored batch, its mean scores x 100, and the counts."""

    batch: Path
    summary: dict[str, Any]
    counts: list[StageCount]


@flow(name="evaluate", description=__doc__)
def evaluate_batch(config: TriptychConfig) -> EvaluateResult:
    """Score the newest batch of the workspace.

    Raises:
        ManifestError: Nothing has been generated yet.
    """
    workspace = Workspace(Path(config.workspace))
    batch = latest(workspace.generations)
    if batch is None:
        raise ManifestError(
            "no batch of generated videos in the workspace",
            where=workspace.generations,
            do="run `triptych generate` first",
        )
    summary, count = score(config, batch)
    leave_counts("evaluate-counts", [count])
    leave_summary("evaluate-summary", "Consistency x 100", {**summary, "batch": batch})
    return EvaluateResult(batch, summary, [count])


@task(name="score", cache_policy=NO_CACHE)
def score(config: TriptychConfig, batch: Path) -> tuple[dict[str, Any], StageCount]:
    """Score every video of a batch; the means and the count."""
    scores, count = evaluate(config, Workspace(Path(config.workspace)), batch)
    count.check_failures(config.generation.max_error_ratio)
    return aggregate(scores, count.input), count


def show_scores(summary: dict[str, Any]) -> None:
    """Print the means: the three scores x 100, and how many videos they stand on."""
    names = ("visual", "semantic", "sequence", "scored", "videos")
    table = narrow_table("consistency x 100", *names)
    means = [summary[n] for n in ("visual", "semantic", "sequence")]
    texts = ["none" if m is None else f"{m:.2f}" for m in means]
    table.add_row(*texts, str(summary["scored"]), str(summary["videos"]))
    out.print(table)
