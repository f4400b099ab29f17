"""What the parent and the DeepSpeed child agree on: the job file, exit code, file names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from schemas.config.base import StageConfig
from schemas.config.training import TrainingConfig, TrainStageConfig

EXIT_INTERRUPTED = 75
"""The rank was asked to stop and has saved a checkpoint (EX_TEMPFAIL: try again later)."""

METRICS = "metrics.jsonl"
LOG = "log.txt"
CHECKPOINTS = "checkpoints"
MODEL = "model"

StageName = Literal["pretrain", "sft"]


class Job(StageConfig):
    """Everything a training run depends on; written to ``job.json`` and read by every rank.

    Attributes:
        stage: Which stage's settings are used.
        training: Model shape and settings of both stages.
        workspace: Workspace whose latent cache is read.
        manifest: SAMPLES table.
        init_model: Model folder to start from.
        run_dir: Folder of the run.
        samples: Fingerprint of the samples trained on, in order; a resumed run must find the same.
    """

    stage: StageName
    training: TrainingConfig
    workspace: Path
    manifest: Path
    init_model: Path
    run_dir: Path
    samples: str

    @property
    def settings(self) -> TrainStageConfig:
        """Settings of the job's stage."""
        return self.training.pretrain if self.stage == "pretrain" else self.training.sft

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.run_dir / CHECKPOINTS
