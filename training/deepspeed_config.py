"""DeepSpeed's JSON, derived from our config. Nothing is kept twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from schemas.config.training import TrainingConfig, TrainStageConfig
from schemas.errors import ConfigError


def deepspeed_config(
    cfg: TrainingConfig, stage: TrainStageConfig, run_dir: Path | None = None
) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``.

    Args:
        cfg: Ranks, ZeRO stage, offload, compute type and monitors.
        stage: Batch, optimizer and clipping.
        run_dir: Where monitors write; None = no monitors.

    Raises:
        ConfigError: The global batch is not a multiple of what the ranks take in one pass.
    """
    shares = cfg.world_size // cfg.sequence_parallel
    at_once = stage.micro_batch_size * shares
    if stage.batch_size % at_once:
        raise ConfigError(
            "the batch does not divide over the ranks",
            where="batch_size, micro_batch_size, num_processes, sequence_parallel",
            found=f"batch_size {stage.batch_size}, micro_batch_size {stage.micro_batch_size}, "
            f"{cfg.world_size} ranks, {cfg.sequence_parallel} of them per sample",
            expected=f"batch_size a multiple of micro_batch_size x {shares} = {at_once}",
            do="change batch_size or micro_batch_size",
        )
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {
        "stage": cfg.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        # elements of a buffer DeepSpeed keeps; its default of 500 M takes 2 GB in float32
        "reduce_bucket_size": 100_000_000,
    }
    if cfg.offload != "none":
        zero["offload_optimizer"] = offload
    if cfg.offload == "all":
        zero["offload_param"] = offload
    return {
        # DeepSpeed counts a sample once for each rank that has a part of its tokens
        "train_batch_size": stage.batch_size * cfg.sequence_parallel,
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": stage.batch_size // at_once,
        # the official launch lacks this line, so its clipping never happened
        "gradient_clipping": stage.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": stage.lr,
                "betas": [stage.adam_beta1, stage.adam_beta2],
                "eps": stage.adam_eps,
                "weight_decay": stage.weight_decay,
                # torch's own AdamW: DeepSpeed's is compiled on first use and needs a C++ compiler
                "torch_adam": True,
                "adam_w_mode": True,
            },
        },
        "bf16": {"enabled": cfg.dtype == "bfloat16"},
        "zero_optimization": zero,
        # with offload, DeepSpeed insists on its own compiled AdamW unless told that it need not
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # metrics.jsonl holds every step
        **({} if run_dir is None else monitors(cfg, run_dir)),
    }


def monitors(cfg: TrainingConfig, run_dir: Path) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that says where metrics go (MLflow is not DeepSpeed's).

    Args:
        cfg: Names the monitors.
        run_dir: Parent of the folders ``tensorboard`` and ``csv``, and the run's name for W&B.
    """
    known: dict[str, Any] = {
        "tensorboard": {"output_path": str(run_dir), "job_name": "tensorboard"},
        "csv": {"output_path": str(run_dir), "job_name": "csv"},
        "wandb": {"project": "triptych", "group": run_dir.name},
    }
    names = {"csv": "csv_monitor"}
    return {
        names.get(name, name): {"enabled": True, **known[name]}
        for name in cfg.monitors
        if name in known
    }


def learning_rate(stage: TrainStageConfig, step: int) -> float:
    """Learning rate of a step (0 is the first): linear warm-up, then constant."""
    return stage.lr * min(1.0, (step + 1) / (stage.warmup_steps + 1))
