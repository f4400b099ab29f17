"""Flow ``train``: encode a snapshot's manifests once, pre-train, then fine-tune from there."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import leave_counts, leave_summary, progress
from flows.sample_videos import FOLDER as VIDEOS
from flows.sample_videos import SampleVideos
from schemas.config import TrainStageConfig, TriptychConfig
from schemas.counts import StageCount
from schemas.errors import ConfigError, ManifestError, TrainingFailed
from schemas.layout import Snapshot, Workspace
from schemas.storage import fingerprint, fingerprint_file, latest, point_latest, read_done
from training.base_model import make_tiny_base, model_sha256
from training.job import MODEL, maths, stage_settings
from training.latents import scene_reader
from training.latents_job import encode_manifest
from training.launch import run_stage

log = logging.getLogger(__name__)

Stage = Literal["pretrain", "sft"]
STAGES: tuple[Stage, ...] = ("pretrain", "sft")


@dataclass(frozen=True)
class TrainResult:
    """Where the trained model lies, and what became of every record on the way."""

    model: Path
    counts: list[StageCount]


@flow(name="train", description=__doc__)
def train(config: TriptychConfig) -> TrainResult:
    """Train on the newest snapshot of ``curation.dataset``.

    Raises:
        ManifestError: There is no finished snapshot yet.
        TrainingFailed: The DeepSpeed process ended early; running the flow again resumes.
    """
    workspace = Workspace(Path(config.workspace))
    snapshot = newest_snapshot(config, workspace)
    model = base_model(config)
    counts: list[StageCount] = []
    for stage in STAGES:
        if stage_config(config, stage).steps == 0:
            continue
        counts += encode(config, stage, snapshot, model)
        model, count = train_stage(config, stage, snapshot, model)
        counts.append(count)
    leave_counts("train-counts", counts)
    leave_summary("train-summary", "Training", {"snapshot": snapshot.root, "model": model})
    return TrainResult(model, counts)


def newest_snapshot(config: TriptychConfig, workspace: Workspace) -> Snapshot:
    """The newest finished snapshot of the configured dataset."""
    folder = latest(workspace.dataset(config.curation.dataset))
    if folder is None or read_done(folder) is None:
        raise ManifestError(
            f"dataset {config.curation.dataset!r} has no finished snapshot",
            where=workspace.dataset(config.curation.dataset),
            do="run `triptych refresh` with the same workspace first",
        )
    return Snapshot(folder)


def stage_config(config: TriptychConfig, stage: Stage) -> TrainStageConfig:
    """The settings of one training stage."""
    return stage_settings(config.training, stage)


@task(name="base-model", cache_policy=NO_CACHE)
def base_model(config: TriptychConfig) -> Path:
    """The folder of the base model; ``tiny`` is made on the spot, once."""
    folder = base_folder(config)
    if config.training.model.base == "tiny":
        make_tiny_base(folder, config.training.model)
    return folder


def base_folder(config: TriptychConfig) -> Path:
    """Where the base model lies, or ``tiny`` is to lie.

    Raises:
        ConfigError: There is no model.
    """
    model = config.training.model
    if model.base == "tiny":
        return Workspace(Path(config.workspace)).model(f"tiny-{model.hash()}")
    folder = Path(model.base)
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            "the base model is not a folder in diffusers' layout",
            where=f"training.model.base = {model.base}",
            found="no model_index.json",
            expected="a folder with model_index.json, transformer, vae, text_encoder, tokenizer",
            do="download CogVideoX there, or set training.model.base=tiny",
        )
    return folder


@task(name="encode", task_run_name="encode-{stage}", cache_policy=NO_CACHE)
def encode(
    config: TriptychConfig, stage: Stage, snapshot: Snapshot, model: Path
) -> list[StageCount]:
    """Encode every scene and caption of a manifest once; nothing if training reads pixels."""
    if config.training.latents.source == "pixels":
        log.info("stage=encode-%s state=skipped reason=latents_from_pixels", stage)
        return []
    workspace = Workspace(Path(config.workspace))
    manifest = snapshot.manifest(stage)
    with progress(f"encode-{stage}-progress", f"encode {stage}") as tell:
        encoded = encode_manifest(
            config.training,
            manifest,
            model,
            workspace,
            scene_reader(workspace, config.curation.sources),
            on_progress=lambda done, total: tell(done, total, ""),
            engine=config.engine,
        )
    for reject in encoded.rejects:
        log.warning("stage=encode-%s clip_id=%s reason=%s", stage, reject.record_id, reject.reason)
    counts = (encoded.scenes, encoded.captions)
    return [dataclasses.replace(c, stage=f"{stage} {c.stage}") for c in counts]


def run_folder(config: TriptychConfig, stage: Stage, snapshot: Snapshot, init: Path) -> Path:
    """The folder of a stage's run, named by all that its weights depend on."""
    run_id = fingerprint(
        maths(config.training, stage),
        fingerprint_file(snapshot.manifest(stage)),
        model_sha256(init),
    )
    return Workspace(Path(config.workspace)).runs / f"{stage}-{run_id}"


@task(name="train-stage", task_run_name="{stage}", cache_policy=NO_CACHE)
def train_stage(
    config: TriptychConfig, stage: Stage, snapshot: Snapshot, init: Path
) -> tuple[Path, StageCount]:
    """Run one stage in DeepSpeed's launcher, or take the finished run of the same inputs.

    A training process that died is started again, up to ``training.retries`` times.
    """
    workspace = Workspace(Path(config.workspace))
    settings = stage_config(config, stage)
    run_dir = run_folder(config, stage, snapshot, init)
    started = time.monotonic()
    done = read_done(run_dir)
    finished = done is not None and done["steps"] == settings.steps
    with progress(f"{stage}-progress", stage) as tell:
        videos = SampleVideos(config, run_dir, settings.sample_every)
        on_metrics = _on_metrics(tell, settings.steps, videos)
        manifest = snapshot.manifest(stage)
        retries = with_retries(
            lambda: run_stage(config, stage, manifest, init, run_dir, on_metrics),
            config.training.retries,
        )
        videos.catch_up()
    facts: dict[str, object] = {"folder": run_dir, "started again": retries}
    if (run_dir / VIDEOS).is_dir():
        facts["sample videos"] = run_dir / VIDEOS
    leave_summary(f"{stage}-run", f"Run {run_dir.name}", facts)
    point_latest(workspace.runs, run_dir.name)
    count = StageCount(
        stage=stage,
        unit="step",
        input=settings.steps,
        kept=settings.steps,
        reused=settings.steps if finished else 0,
        seconds=time.monotonic() - started,
    )
    return run_dir / MODEL, count.check()


def with_retries(train: Callable[[], object], retries: int) -> int:
    """Call again what trains while it dies of something a restart may mend.

    Args:
        train: Goes on from the newest checkpoint each time.
        retries: How often at most.

    Returns:
        How often it was called again.

    Raises:
        TrainingFailed: It died once more than that, was interrupted, or gave up.
    """
    for done in range(retries + 1):
        try:
            train()
            return done
        except TrainingFailed as error:
            if not error.retryable or done == retries:
                raise
            cause = error.what.partition("\n")[0]
            log.warning("train retry=%d of=%d cause=%r", done + 1, retries, cause)
    raise AssertionError("the last try returns or raises")


def _on_metrics(
    tell: Callable[[int, int, str], None], steps: int, videos: SampleVideos
) -> Callable[[dict[str, Any]], None]:
    def on_metrics(line: dict[str, Any]) -> None:
        tell(int(line["step"]), steps, f"loss {line['loss']:.3f}")
        videos.catch_up()

    return on_metrics
