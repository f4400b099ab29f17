"""The DeepSpeed side of a rank: joining the others, starting the engine, norms of gradients."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from schemas.config.training import TrainStageConfig


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together.

    Ranks next to each other share a sample where the sequence is parallel: with 8 ranks and
    ``sequence_parallel`` 2 there are 4 *shares* of the global batch.

    Attributes:
        rank: This one.
        world_size: All.
        device: Where this rank computes.
        sequence_parallel: Ranks that share one sample.
        sequence_group: Their process group; None where a rank has a sample to itself.
    """

    rank: int
    world_size: int
    device: torch.device
    sequence_parallel: int = 1
    sequence_group: dist.ProcessGroup | None = None

    @classmethod
    @contextmanager
    def joined(cls, sequence_parallel: int = 1) -> Generator[Ranks]:
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
        rank, world_size = dist.get_rank(), dist.get_world_size()
        group = None
        if sequence_parallel > 1:
            for start in range(0, world_size, sequence_parallel):  # every rank makes every group
                ranks = range(start, start + sequence_parallel)
                made = dist.new_group([*ranks])
                group = made if rank in ranks else group
        try:
            yield cls(rank, world_size, device, sequence_parallel, cast("Any", group))
        finally:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """Parts the global batch is cut into."""
        return self.world_size // self.sequence_parallel

    @property
    def share(self) -> int:
        """The part that this rank takes."""
        return self.rank // self.sequence_parallel

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, float64 on the CPU."""
        total = values.double().to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def max(self, value: int) -> int:
        """The largest value of any rank."""
        largest = torch.tensor([value], device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def any(self, value: bool) -> bool:
        """Whether the value is true on any rank."""
        return bool(self.max(int(value)))

    def gather(self, value: Any) -> list[Any]:
        """A small plain value of every rank, in their order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def micro_batches(self, stage: TrainStageConfig) -> Iterator[range]:
        """Rows of the global batch that this rank takes, one range per forward pass."""
        size = stage.micro_batch_size
        for start in range(self.share * size, stage.batch_size, self.shares * size):
            yield range(start, start + size)


def start_deepspeed(model: nn.Module, config: dict[str, Any]) -> Any:
    """The DeepSpeed engine around a model, and its optimizer."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=cast("Any", trainable), config=config
    )
    return engine


class ClippedNorm:
    """Norm of the gradients AdamW is given, that is after clipping; measured, not worked out.

    Args:
        engine: A DeepSpeed engine. Its ranks hold the same gradients without ZeRO, and each its own
            part with ZeRO.
        ranks: All of them.
    """

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        self._squares: list[Tensor] = []
        self._ranks = ranks
        self._parts = 1 if engine.zero_optimization() else ranks.world_size
        engine.basic_optimizer.register_step_pre_hook(self._note)

    def take(self) -> float:
        """The norm over all weights and ranks, of the step just done."""
        local = torch.stack(self._squares).sum() if self._squares else torch.tensor(0.0)
        self._squares.clear()
        return float((self._ranks.sum(local) / self._parts).sqrt())

    def _note(self, optimizer: Any, arguments: object, keywords: object) -> None:
        del arguments, keywords
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    # in pieces: a float64 copy of all gradients takes longer than AdamW on a CPU
                    size = 2**28 if p.grad.is_cuda else 2**16
                    for part in p.grad.detach().flatten().split(size):
                        norm = torch.linalg.vector_norm(part, dtype=torch.float64)
                        self._squares.append(norm.square())


def plain_grad_norm(engine: Any) -> float | None:
    """Gradient norm before clipping where DeepSpeed has none: without ZeRO."""
    if engine.zero_optimization():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(grads))


def scaled_loss(losses: Sequence[Tensor], micro_batch_size: int) -> Tensor:
    """What ``engine.backward`` is given: DeepSpeed takes the mean over micro-batches and ranks.

    Args:
        losses: Loss of each row that could be read, any shape.
        micro_batch_size: Rows of a whole micro-batch; a row left out counts as nothing.
    """
    return torch.cat([x.flatten() for x in losses]).sum() / micro_batch_size
