"""The DeepSpeed side of a rank: joining the others, starting the engine, gathering weights."""

from __future__ import annotations

import os
import pickle
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from schemas.config.training import TrainStageConfig
from schemas.errors import CheckpointError

CHECKPOINT_CLASSES: list[Any] = [LossScaler, ZeroStageEnum, fragment_address]
"""All that DeepSpeed's ZeRO 0-3 checkpoints hold besides tensors and plain values."""


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    @contextmanager
    def joined(cls) -> Generator[Ranks]:
        """Join the process group for the time of a ``with`` block."""
        gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        if not gpu:
            # DeepSpeed would compile this op with g++ at start; gloo does its work as well, and
            # most machines that train on a CPU have no compiler
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
        device = torch.device("cpu")
        if gpu:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), device)
        finally:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over all ranks."""
        value = value.float().clone()
        dist.all_reduce(value)
        return float(value) / self.world_size

    def any(self, value: bool) -> bool:
        """Whether the value is true on any rank."""
        flag = torch.tensor([int(value)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def micro_batches(self, stage: TrainStageConfig) -> Iterator[range]:
        """Rows of the global batch that this rank takes, one range per forward pass."""
        size = stage.micro_batch_size
        for start in range(self.rank * size, stage.batch_size, self.world_size * size):
            yield range(start, start + size)

    @staticmethod
    def plain_grad_norm(engine: Any) -> float | None:
        """Gradient norm before clipping where DeepSpeed has none: without ZeRO, in float32."""
        if engine.zero_optimization() or engine.bfloat16_enabled():
            return None
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        return float(nn.utils.get_total_norm(grads))


def start_deepspeed(model: nn.Module, config: dict[str, Any]) -> Any:
    """The DeepSpeed engine around a model, and its optimizer."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=cast("Any", trainable), config=config
    )
    return engine


def load_checkpoint(engine: Any, folder: Path, tag: str) -> None:
    """Load model, optimizer and counters from a checkpoint of the same world size and ZeRO stage.

    DeepSpeed reads with unrestricted pickle unless ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` is set, as our
    launcher does; then only tensors, plain values and :data:`CHECKPOINT_CLASSES` are accepted.

    Raises:
        CheckpointError: The checkpoint is not there, cannot be read or does not fit.
    """
    try:
        with torch.serialization.safe_globals(CHECKPOINT_CLASSES):
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
    except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "DeepSpeed cannot load the checkpoint",
            where=folder,
            found=error,
            do="remove this checkpoint folder to resume from the one before",
        ) from error
    if path is None:
        raise CheckpointError("there is no DeepSpeed checkpoint in the folder", where=folder)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU, on every rank; gathers what ZeRO-3 has sharded."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
