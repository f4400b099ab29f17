"""Flow ``generate-batch``: a video for every row of a prompt manifest, never made twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import leave_counts, leave_summary, progress
from flows.console import narrow_table, out
from flows.dry_run import scaled
from flows.gallery import build_gallery
from inference.batch import run_batch
from inference.plan import plan_batch
from inference.texts import missing_texts
from schemas.config import TriptychConfig
from schemas.counts import StageCount
from schemas.errors import ManifestError
from schemas.layout import Workspace
from schemas.rows import Reject
from schemas.storage import read_done
from schemas.tables import REJECTS, read_table

MAX_LISTED = 20
"""Bad rows and failures that are shown; all of them are in ``rejects.parquet`` and the gallery."""


@dataclass(frozen=True)
class GenerateResult:
    """The batch folder, the folder of its videos, its gallery page, and the counts."""

    batch: Path
    videos: Path
    gallery: Path
    counts: list[StageCount]


@flow(name="generate-batch", description=__doc__)
def generate_batch(config: TriptychConfig) -> GenerateResult:
    """Generate with ``generation.model``, or with the workspace's newest SFT (else pretrain) run.

    Raises:
        InputError: The prompt manifest is missing or not readable; bad rows are rejects instead.
        ManifestError: There is no trained model yet.
        TooManyFailures: More rows failed than ``generation.max_error_ratio`` allows; what was made
            is kept and shown in the gallery.
    """
    workspace = Workspace(Path(config.workspace))
    model = trained_model(config, workspace)
    batch, count = generate(config, model)
    gallery = write_gallery(workspace, batch)
    counts = [count]
    leave_counts("generate-counts", counts)
    leave_summary(
        "generate-summary",
        "Generation",
        {"model": model, "batch": batch, "videos": workspace.videos, "gallery": gallery},
    )
    count.check_failures(config.generation.max_error_ratio)
    return GenerateResult(batch, workspace.videos, gallery, counts)


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
        return run_batch(config, model, workspace, tell)


@task(name="gallery", cache_policy=NO_CACHE)
def write_gallery(workspace: Workspace, batch: Path) -> Path:
    """Write the page that shows a batch."""
    return build_gallery(workspace, batch)


def show_plan(config: TriptychConfig) -> None:
    """Check every row of the manifest and print what a run would make; nothing is loaded.

    Raises:
        InputError: The manifest cannot be read, or none of its rows is usable.
        CheckpointError: The model folder is missing, or is none.
    """
    workspace = Workspace(Path(config.workspace))
    model = trained_model(config, workspace)
    plan = plan_batch(config, model, workspace)
    missing = plan.missing
    scenes = sum(plan.jobs[row].planned.num_scenes for row in missing)
    frames = sum(plan.jobs[row].planned.num_frames for row in missing)
    texts = missing_texts(plan.cache, [plan.jobs[row].story for row in missing])
    table = narrow_table("generate-batch would make", "", "")
    table.show_header = False
    table.add_row("rows", f"{len(plan.jobs) + len(plan.rejects):,}")
    table.add_row("  bad", f"{len(plan.rejects):,}")
    table.add_row("  finished already", f"{len(plan.finished):,}")
    table.add_row("videos to make", f"{len(missing):,}")
    table.add_row("  scenes", f"{scenes:,}")
    table.add_row("  frames", f"{frames:,}")
    table.add_row("texts to encode", f"{sum(map(len, texts)):,}")
    table.add_row("denoising", f"{scaled(sum(plan.flops[row] for row in missing))}FLOP")
    out.print(table)
    out.print(f"model: {model}", soft_wrap=True, highlight=False)
    show_rejects(plan.rejects)


def show_batch_rejects(batch: Path) -> None:
    """Print the bad and failed rows of a batch."""
    show_rejects(
        [r for r in read_table(batch / "rejects.parquet", REJECTS) if r.stage != "evaluate"]
    )


def show_rejects(rejects: list[Reject]) -> None:
    """Print one line per bad or failed row: which, why, and where in the manifest."""
    for reject in rejects[:MAX_LISTED]:
        what = "failed" if reject.failed else "bad row"
        detail = " ".join(reject.detail.split())
        out.print(f"{what} {reject.record_id}: {reject.reason}: {detail}",
                  soft_wrap=True, highlight=False, markup=False)  # fmt: skip
    if len(rejects) > MAX_LISTED:
        out.print(f"and {len(rejects) - MAX_LISTED} more")
