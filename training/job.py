"""What the parent and its ranks agree on: job file, exit codes, file names, what names a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from schemas.config.base import StageConfig
from schemas.config.curation import SourcesConfig
from schemas.config.training import TrainingConfig, TrainStageConfig
from schemas.errors import ConfigError

EXIT_INTERRUPTED = 75
"""The rank was asked to stop and has saved a checkpoint (EX_TEMPFAIL: try again later)."""

EXIT_GAVE_UP = 65
"""The rank ended with an error of ours, which starting it again would only repeat (EX_DATAERR)."""

METRICS = "metrics.jsonl"
LOG = "log.txt"
CHECKPOINTS = "checkpoints"
MODEL = "model"
STOP = "STOP"
"""A file whose presence in the run folder asks ranks on other machines to save and end."""

StageName = Literal["pretrain", "sft"]

HOW_NOT_WHAT = frozenset(
    {
        *("steps", "micro_batch_size", "checkpoint_every", "keep_checkpoints", "keep_every"),
        *("validate_every", "validation_samples", "sample_every", "max_bad_samples"),
    }
)
"""Settings of a stage that leave what step k computes as it is, so a run goes on with others."""

_LAUNCHERS = (
    # DeepSpeed's own launcher, and any other that speaks torch's variables
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"),
    # before Slurm's: mpirun inside an allocation has both, and srun's then speak of one task
    *[tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))],
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
)


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
        manifest_sha256: Fingerprint of the manifest.
        init_sha256: Fingerprint of the model folder to start from.
        sources: How videos are fetched, where training reads them itself.
    """

    stage: StageName
    training: TrainingConfig
    workspace: Path
    manifest: Path
    init_model: Path
    run_dir: Path
    samples: str
    manifest_sha256: str
    init_sha256: str
    sources: SourcesConfig = SourcesConfig()

    @property
    def settings(self) -> TrainStageConfig:
        """Settings of the job's stage."""
        return stage_settings(self.training, self.stage)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.run_dir / CHECKPOINTS


def stage_settings(training: TrainingConfig, stage: StageName) -> TrainStageConfig:
    """Settings of one stage."""
    return training.pretrain if stage == "pretrain" else training.sft


def maths(training: TrainingConfig, stage: StageName) -> dict[str, Any]:
    """What names a run besides its manifest and the model it starts from; plain values.

    All that changes the weights after step k is in it, up to the order of sums. Not in it is how a
    run is laid out and watched (ranks, ZeRO, offloading, micro-batch, checkpoints, validation):
    that may be another at every resume. Nor is the number of steps: after the warm-up the learning
    rate is constant, so a longer run begins with the steps of a shorter one.
    """
    settings = stage_settings(training, stage)
    return {
        "stage": stage,
        # base and seed make the model it starts from; the backends of attention are all exact
        "model": training.model.model_dump(
            mode="json", exclude={"base", "seed", "attention_backend"}
        ),
        "settings": settings.model_dump(mode="json", exclude=set(HOW_NOT_WHAT)),
        "dtype": training.dtype,
        "lora": None if training.lora is None else training.lora.model_dump(mode="json"),
        "trainable": list(training.trainable),
        "latents": training.latents.model_dump(mode="json", include={"source", "sample_posterior"}),
    }


def ranks_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables by which torch and DeepSpeed know a rank, from those its launcher set.

    Under DeepSpeed's launcher they are there already; Open MPI and Slurm have names of their own.
    Where ranks meet (``MASTER_ADDR``, ``MASTER_PORT``) is set by whoever started them.

    Returns:
        RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, to be put into the
        environment before anything joins the others.

    Raises:
        ConfigError: No launcher's variables are there, or the meeting point is missing.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    found = next((known for known in _LAUNCHERS if all(n in env for n in known[:3])), None)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if found is None or missing:
        raise ConfigError(
            "this process does not know its place among the ranks",
            where="environment",
            found=f"without {', '.join(missing)}" if found else "no launcher's variables",
            expected="MASTER_ADDR, MASTER_PORT and those of DeepSpeed's launcher, mpirun or srun",
            do="let `triptych train` start the ranks",
        )
    values = {name: env[key] for name, key in zip(names, found, strict=True) if key in env}
    # srun writes "8" or "8(x2)": tasks per machine, and on how many; all machines have the same
    values["LOCAL_SIZE"] = values.get("LOCAL_SIZE", "1").partition("(")[0]
    return {**values, "MASTER_ADDR": env["MASTER_ADDR"], "MASTER_PORT": env["MASTER_PORT"]}
