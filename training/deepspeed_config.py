"""DeepSpeed's JSON, derived from our config. Nothing is kept twice."""

from __future__ import annotations

from typing import Any

from schemas.config.training import TrainingConfig, TrainStageConfig
from schemas.errors import ConfigError


def deepspeed_config(
    cfg: TrainingConfig, stage: TrainStageConfig, world_size: int
) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``.

    Args:
        cfg: ZeRO stage and compute type.
        stage: Batch, optimizer and clipping.
        world_size: Ranks in all.

    Raises:
        ConfigError: The global batch is not a multiple of what the ranks take in one pass.
    """
    at_once = stage.micro_batch_size * world_size
    if stage.batch_size % at_once:
        raise ConfigError(
            "the batch does not divide over the ranks",
            where="batch_size, micro_batch_size, num_processes",
            found=f"batch_size {stage.batch_size}, micro_batch_size {stage.micro_batch_size}, "
            f"{world_size} ranks",
            expected=f"batch_size a multiple of micro_batch_size x ranks = {at_once}",
            do="change batch_size or micro_batch_size",
        )
    return {
        "train_batch_size": stage.batch_size,
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
        "zero_optimization": {
            "stage": cfg.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
        },
        "steps_per_print": 2**31,  # metrics.jsonl holds every step
    }


def learning_rate(stage: TrainStageConfig, step: int) -> float:
    """Learning rate of a step (0 is the first): linear warm-up, then constant."""
    return stage.lr * min(1.0, (step + 1) / (stage.warmup_steps + 1))
