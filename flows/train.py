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
from schemas.config import TrainStageConfig, TriptychConfig
from schemas.counts import StageCount
from schemas.errors import ConfigError, ManifestError
from schemas.layout import Snapshot, Workspace
from schemas.storage import fingerprint, fingerprint_file, latest, point_latest, read_done
from training.base_model import make_tiny_base
from training.checkpoints import model_sha256
from training.job import MODEL
from training.latents import encode_manifest, scene_reader
from training.launch import run_stage

log = logging.getLogger(__name__)

Stage = Literal["pretrain", "sft"]


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
    stages: tuple[Stage, ...] = ("pretrain", "sft")
    for stage in stages:
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
    return config.training.pretrain if stage == "pretrain" else config.training.sft


@task(name="base-model", cache_policy=NO_CACHE)
def base_model(config: TriptychConfig) -> Path:
    """The folder of the base model; ``tiny`` is made on the spot, once."""
    model = config.training.model
    if model.base == "tiny":
        folder = Workspace(Path(config.workspace)).model(f"tiny-{model.hash()}")
        return make_tiny_base(folder, model)
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
    """Encode every scene of a manifest with the VAE and every caption with T5, once."""
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
        )
    for reject in encoded.rejects:
        log.warning("stage=encode-%s clip_id=%s reason=%s", stage, reject.record_id, reject.reason)
    counts = (encoded.scenes, encoded.captions)
    return [dataclasses.replace(c, stage=f"{stage} {c.stage}") for c in counts]


@task(name="train-stage", task_run_name="{stage}", cache_policy=NO_CACHE)
def train_stage(
    config: TriptychConfig, stage: Stage, snapshot: Snapshot, init: Path
) -> tuple[Path, StageCount]:
    """Run one stage in DeepSpeed's launcher, or take the finished run of the same inputs."""
    workspace = Workspace(Path(config.workspace))
    settings = stage_config(config, stage)
    manifest = snapshot.manifest(stage)
    training = config.training
    run_id = fingerprint(
        settings.model_dump(),
        training.model.model_dump(),
        (training.zero_stage, training.dtype, training.num_processes),
        fingerprint_file(manifest),
        model_sha256(init),
    )
    run_dir = workspace.runs / f"{stage}-{run_id}"
    started = time.monotonic()
    finished = read_done(run_dir) is not None
    with progress(f"{stage}-progress", stage) as tell:
        on_metrics = _on_metrics(tell, settings.steps)
        run_stage(config, stage, manifest, init, run_dir, on_metrics)
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


def _on_metrics(
    tell: Callable[[int, int, str], None], steps: int
) -> Callable[[dict[str, Any]], None]:
    def on_metrics(line: dict[str, Any]) -> None:
        tell(int(line["step"]), steps, f"loss {line['loss']:.3f}")

    return on_metrics
