"""Flow ``generate-batch``: a video for every row of a prompt manifest, never made twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import leave_counts, leave_summary, progress
from inference.batch import run_batch
from schemas.config import TriptychConfig
from schemas.counts import StageCount
from schemas.errors import ManifestError
from schemas.layout import Workspace
from schemas.storage import read_done


@dataclass(frozen=True)
class GenerateResult:
    """The batch folder, the folder of its videos, and the counts."""

    batch: Path
    videos: Path
    counts: list[StageCount]


@flow(name="generate-batch", description=__doc__)
def generate_batch(config: TriptychConfig) -> GenerateResult:
    """Generate with ``generation.model``, or with the workspace's newest SFT (else pretrain) run.

    Raises:
        InputError: The prompt manifest is missing or not readable; bad rows are rejects instead.
        ManifestError: There is no trained model yet.
    """
    workspace = Workspace(Path(config.workspace))
    model = trained_model(config, workspace)
    batch, count = generate(config, model)
    counts = [count]
    leave_counts("generate-counts", counts)
    leave_summary(
        "generate-summary",
        "Generation",
        {"model": model, "batch": batch, "videos": workspace.videos},
    )
    return GenerateResult(batch, workspace.videos, counts)


def trained_model(config: TriptychConfig, workspace: Workspace) -> Path:
    """``generation.model``, or the model of the newest finished run, SFT before pretrain."""
    if config.generation.model is not None:
        return Path(config.generation.model)
    for stage in ("sft", "pretrain"):
        done = [d for d in workspace.runs.glob(f"{stage}-*") if read_done(d) is not None]
        if done:
            return max(done, key=lambda d: (d / "_DONE.json").stat().st_mtime) / "model"
    raise ManifestError(
        "there is no trained model in the workspace",
        where=workspace.runs,
        do="run `triptych train` first, or give one with `triptych generate --model DIR`",
    )


@task(name="generate", cache_policy=NO_CACHE)
def generate(config: TriptychConfig, model: Path) -> tuple[Path, StageCount]:
    """Generate what is missing of a batch."""
    workspace = Workspace(Path(config.workspace))
    with progress("generate-progress", "generate") as tell:
        batch, count = run_batch(config, model, workspace, tell)
    return batch, count.check_failures(config.generation.max_error_ratio)
