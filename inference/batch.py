"""A batch: every row of a prompt manifest becomes a video, once.

A video's id is a content key over its prompt row, seed, settings and model weights, so running a
batch again makes only what is missing or failed. An error stays within its row.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from inference.extension import extend_stories
from inference.outputs import VideoFiles, is_finished, write_video
from inference.pipeline import Mask2DiTPipeline
from inference.prompts import read_prompts
from schemas.config import TriptychConfig
from schemas.counts import StageCount, count_reasons
from schemas.errors import CheckpointError, GenerationError, ManifestError, TriptychError
from schemas.layout import Workspace
from schemas.rows import Generation, Prompt, Reject, stable_id
from schemas.storage import (
    DONE,
    fingerprint,
    fingerprint_folder,
    mark_done,
    point_latest,
    write_json,
)
from schemas.tables import GENERATIONS, REJECTS, write_table

log = logging.getLogger(__name__)

STAGE = "generate"
SAMPLER_VERSION = "1"
"""Part of every content key. Raise it when a change of code changes the videos."""

OnProgress = Callable[[int, int, str], None]
"""Called after every row with (rows done, rows in all, what happened)."""


@dataclass(frozen=True)
class _Job:
    """One good prompt row with all that decides its video."""

    prompt: Prompt
    planned: Generation
    key: dict[str, Any]
    files: VideoFiles


def run_batch(
    config: TriptychConfig,
    model_dir: Path,
    workspace: Workspace,
    on_progress: OnProgress | None = None,
) -> tuple[Path, StageCount]:
    """Generate the videos of the prompt manifest ``config.generation.prompts``.

    Writes ``generations.parquet`` (one row per good prompt, done or failed), ``rejects.parquet``
    (bad rows, and the failed ones again with their error), ``counts.json``, ``_DONE.json`` and
    ``LATEST``.

    Args:
        config: The generation section and the model's frame count and size are used.
        model_dir: Model folder in diffusers' layout.
        workspace: Where videos and tables go.
        on_progress: Progress callback.

    Returns:
        The batch folder and the count of prompt rows: kept (a video exists), rejected, failed.

    Raises:
        ManifestError: The manifest cannot be read, or none of its rows is usable.
        CheckpointError: The model folder is missing or does not load.
        GenerationError: Every row failed. The tables are written, but the batch is not marked done.
    """
    started = time.monotonic()
    manifest = Path(config.generation.prompts)
    prompts, rejects = read_prompts(manifest)
    if not prompts:
        lines = "; ".join(f"{r.detail} ({r.reason})" for r in rejects) or "no rows"
        raise ManifestError("no row of the prompt manifest is usable", where=manifest, found=lines)
    if not (model_dir / "model_index.json").is_file():
        raise CheckpointError(
            "the model folder is not there",
            where=model_dir,
            expected="a folder with model_index.json",
            do="train a model first, or give its folder in generation.model",
        )
    # The files of the pieces only: notes beside them, such as _DONE.json, do not change a video.
    model_sha256 = fingerprint_folder(model_dir, "*/*")
    jobs = [_plan(p, config, model_sha256, workspace) for p in prompts]
    log.info("stage=%s start rows=%d bad=%d model=%s", STAGE, len(jobs), len(rejects), model_dir)

    generations, failures, reused = _run(jobs, config, model_dir, on_progress)
    rejects += failures
    count = StageCount(
        stage=STAGE,
        unit="prompt",
        input=len(prompts) + len(rejects) - len(failures),
        kept=len(generations) - len(failures),
        rejected=len(rejects) - len(failures),
        failed=len(failures),
        reused=reused,
        produced=sum(g.num_scenes for g in generations if g.status == "done"),
        seconds=time.monotonic() - started,
        reasons=count_reasons(r.reason for r in rejects),
    ).check()
    folder = _publish(workspace, generations, rejects, count, model_sha256)
    log.info("stage=%s end kept=%d reused=%d failed=%d seconds=%.1f",
             STAGE, count.kept, count.reused, count.failed, count.seconds)  # fmt: skip
    return folder, count


def _plan(prompt: Prompt, config: TriptychConfig, model_sha256: str, workspace: Workspace) -> _Job:
    """The row a prompt will have if all goes well, and its content key."""
    sampling, shape = config.generation, config.training.model
    num_scenes = len(prompt.prompts) + len(prompt.extend_prompts)
    key: dict[str, Any] = {
        **asdict(prompt),
        "scheduler": sampling.scheduler,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        # Context only matters to stories that are extended.
        "context_scenes": sampling.context_scenes if prompt.extend_prompts else None,
        "fps": sampling.fps,
        "frames_per_scene": shape.frames,
        "width_px": shape.width_px,
        "height_px": shape.height_px,
        "dtype": config.training.dtype,
        "model_sha256": model_sha256,
        "sampler_version": SAMPLER_VERSION,
    }
    generation_id = stable_id("generation", fingerprint(key))
    files = VideoFiles.of(workspace, generation_id)
    planned = Generation(
        generation_id=generation_id,
        prompt_id=prompt.prompt_id,
        status="done",
        video_uri=str(files.video),
        prompts=[*prompt.prompts, *prompt.extend_prompts],
        num_scenes=num_scenes,
        extended_scenes=len(prompt.extend_prompts),
        frames_per_scene=shape.frames,
        num_frames=num_scenes * shape.frames,
        width_px=shape.width_px,
        height_px=shape.height_px,
        fps=sampling.fps,
        seed=prompt.seed,
        scheduler=sampling.scheduler,
        steps=sampling.steps,
        guidance=sampling.guidance,
        model_sha256=model_sha256,
        error="",
    )
    return _Job(prompt, planned, key, files)


def _run(
    jobs: Sequence[_Job], config: TriptychConfig, model_dir: Path, on_progress: OnProgress | None
) -> tuple[list[Generation], list[Reject], int]:
    """Every job's row, the rejects of those that failed, and how many videos were there already."""
    pipeline: Mask2DiTPipeline | None = None
    rows: list[Generation] = []
    failures: list[Reject] = []
    reused = 0
    for number, job in enumerate(jobs, start=1):
        row, happened = job.planned, "reused"
        if is_finished(job.files):
            reused += 1
        else:
            # Loaded only when something is missing, and outside the row's error handling: a model
            # that does not load is no row's fault.
            pipeline = pipeline or _load(config, model_dir)
            happened = "generated"
            try:
                _generate(pipeline, job, config)
            except Exception as error:
                log.exception("stage=%s failed prompt_id=%s", STAGE, job.prompt.prompt_id)
                happened = "failed"
                reject = _failure(job, error)
                failures.append(reject)
                row = replace(row, status="failed", video_uri="", error=reject.detail)
        rows.append(row)
        log.info("stage=%s prompt_id=%s result=%s", STAGE, job.prompt.prompt_id, happened)
        if on_progress is not None:
            on_progress(number, len(jobs), f"{job.prompt.prompt_id}: {happened}")
    return rows, failures, reused


def _load(config: TriptychConfig, model_dir: Path) -> Mask2DiTPipeline:
    dtype = getattr(torch, config.training.dtype)
    pipeline = Mask2DiTPipeline.from_pretrained(model_dir, torch_dtype=dtype)
    pipeline.set_scheduler(config.generation.scheduler)
    return pipeline.to("cuda") if torch.cuda.is_available() else pipeline


def _generate(pipeline: Mask2DiTPipeline, job: _Job, config: TriptychConfig) -> None:
    """Make one video and write its files."""
    started = time.monotonic()
    sampling, shape, prompt = config.generation, config.training.model, job.prompt
    latents = pipeline(
        prompt.prompts,
        frames=shape.frames,
        height=shape.height_px,
        width=shape.width_px,
        negative_prompt=prompt.negative_prompt,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        seed=prompt.seed,
        output_type="latent",
    ).latents
    if prompt.extend_prompts:
        latents = extend_stories(
            pipeline,
            latents,
            [prompt.prompts],
            [prompt.extend_prompts],
            seeds=[prompt.seed],
            context_scenes=sampling.context_scenes,
            negative_prompt=prompt.negative_prompt,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
        )
    provenance = {
        "generation_id": job.planned.generation_id,
        **job.key,
        "num_frames": job.planned.num_frames,
        "truncated_prompts": pipeline.truncated_prompts(job.planned.prompts),
        "versions": {p: version(p) for p in ("triptych", "torch", "diffusers", "transformers")},
    }
    scenes = pipeline.decode(latents)[0]
    write_video(job.files, scenes, sampling.fps, provenance, time.monotonic() - started)


def _failure(job: _Job, error: Exception) -> Reject:
    """The error of one row as a reject; the reason is the error's class in snake_case."""
    name = type(error).__name__
    text = str(error) if isinstance(error, TriptychError) else f"{name}: {error}"
    return Reject(
        record_id=job.prompt.prompt_id,
        stage=STAGE,
        reason=re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower(),
        detail=text,
        uri=str(job.files.video),
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
