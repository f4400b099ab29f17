"""A batch: every row of a prompt manifest becomes a video, once.

A video's id is a content key over its prompt row, seeds, settings and model weights, so running a
batch again makes only what is missing or failed. An error stays within its row, and so does the
death of the actor that was at it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from inference.driver import OnProgress, Outcome, make_missing
from inference.plan import STAGE, Job, plan_batch
from inference.schedule import Failure
from schemas.config import TriptychConfig
from schemas.counts import StageCount, count_reasons
from schemas.errors import GenerationError
from schemas.layout import Workspace
from schemas.rows import Generation, Reject
from schemas.storage import DONE, fingerprint, mark_done, point_latest, write_json
from schemas.tables import GENERATIONS, REJECTS, write_table

log = logging.getLogger(__name__)


def run_batch(
    config: TriptychConfig,
    model_dir: Path,
    workspace: Workspace,
    on_progress: OnProgress | None = None,
) -> tuple[Path, StageCount]:
    """Generate the videos of the prompt manifest ``config.generation.prompts``.

    Writes ``generations.parquet`` (one row per good prompt, done or failed), ``rejects.parquet``
    (bad rows, and the failed ones again with their error), ``counts.json``, ``_DONE.json`` and
    ``LATEST``. Neither a model is loaded nor Ray started where every video is there.

    Args:
        config: The sections generation, training (size, type), engine and curation (limits of
            decoding) are used.
        model_dir: Model folder in diffusers' layout.
        workspace: Where videos and tables go.
        on_progress: Progress callback.

    Returns:
        The batch folder and the count of prompt rows: kept (a video exists), rejected, failed.

    Raises:
        InputError: The manifest cannot be read, or none of its rows is usable.
        CheckpointError: The model folder is missing or does not load.
        ConfigError: A setting does not go with the model or this machine.
        ExternalToolError: Ray does not start, or actors die before they begin.
        GenerationError: Every row failed. The tables are written, but the batch is not marked done.
    """
    started = time.monotonic()
    plan = plan_batch(config, model_dir, workspace)
    log.info("stage=%s start rows=%d bad=%d finished=%d model=%s", STAGE, len(plan.jobs),
             len(plan.rejects), len(plan.finished), model_dir)  # fmt: skip
    outcomes: dict[int, Outcome] = dict(plan.finished)
    if plan.missing:
        outcomes |= make_missing(plan, config, model_dir, on_progress or (lambda *_: None))
    generations = [_generation(job, outcomes[row]) for row, job in enumerate(plan.jobs)]
    failures = [
        _reject(job, outcome)
        for row, job in enumerate(plan.jobs)
        if isinstance(outcome := outcomes[row], Failure)
    ]
    made = [g for g in generations if g.status == "done"]
    count = StageCount(
        stage=STAGE,
        unit="prompt",
        input=len(plan.jobs) + len(plan.rejects),
        kept=len(made),
        rejected=len(plan.rejects),
        failed=len(failures),
        reused=len(plan.finished),
        produced=sum(g.num_scenes for g in made),
        seconds=time.monotonic() - started,
        reasons=count_reasons(r.reason for r in [*plan.rejects, *failures]),
    ).check()
    folder = _publish(workspace, generations, [*plan.rejects, *failures], count, plan.model_sha256)
    log.info("stage=%s end kept=%d reused=%d failed=%d seconds=%.1f", STAGE, count.kept,
             count.reused, count.failed, count.seconds)  # fmt: skip
    return folder, count


def _generation(job: Job, outcome: Outcome) -> Generation:
    if isinstance(outcome, str):
        return replace(job.planned, video_sha256=outcome)
    return replace(job.planned, status="failed", video_uri="", error=outcome.detail)


def _reject(job: Job, failure: Failure) -> Reject:
    return Reject(
        record_id=job.story.prompt_id,
        stage=STAGE,
        reason=failure.reason,
        detail=failure.detail,
        uri=job.planned.video_uri,
        failed=True,
    )


def _publish(
    workspace: Workspace,
    generations: Sequence[Generation],
    rejects: Sequence[Reject],
    count: StageCount,
    model_sha256: str,
) -> Path:
    """Write a batch's tables and mark it done. Its id is a content key of what was asked for."""
    asked = sorted(g.generation_id for g in generations)
    bad = sorted((r.record_id, r.reason) for r in rejects if not r.failed)
    batch_id = fingerprint("batch", asked, bad)
    folder = workspace.generations / batch_id
    metadata = {"code_version": version("triptych"), "model_sha256": model_sha256}
    write_table(folder / "generations.parquet", GENERATIONS, generations, metadata)
    write_table(folder / "rejects.parquet", REJECTS, rejects, metadata)
    write_json(folder / "counts.json", [count.to_dict()])
    if not count.kept:
        (folder / DONE).unlink(missing_ok=True)
        reasons = ", ".join(f"{n} x {r}" for r, n in list(count.reasons.items())[:3])
        raise GenerationError(
            "no video was generated: every row failed",
            where=folder,
            found=reasons,
            do="read the error column of generations.parquet, mend the cause and run again",
        )
    mark_done(folder, {"batch_id": batch_id, "kept": count.kept, "input": count.input})
    point_latest(workspace.generations, batch_id)
    return folder
