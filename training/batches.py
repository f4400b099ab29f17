"""Rows of a step as tensors, and reading a step ahead.

Legend: B batch, S scenes, F latent frames of all scenes, C channels, H W latent height width, T
text tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from schemas.errors import TriptychError
from training.data import StepPlan
from training.noise import scene_noise

T = TypeVar("T")

ReadRow = tuple[int, Tensor, Tensor]
"""Number of a row in its step, latents (F, C, H, W), text (S, T, text width)."""


@dataclass(frozen=True)
class Batch:
    """Rows of a step whose scenes have equal lengths.

    Attributes:
        latents: (B, F, C, H, W), F over all scenes.
        text: (B, S, T, text width).
        noise: (B, F, C, H, W) standard normal.
        timestep: (B,) int64.
        generated: (B, S) bool, or None where every scene is generated.
        rows: Which rows of the step these are, length B.
        scene_frames: Latent frames of each scene, length S.
    """

    latents: Tensor
    text: Tensor
    noise: Tensor
    timestep: Tensor
    generated: Tensor | None
    rows: tuple[int, ...]
    scene_frames: tuple[int, ...]

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Move to a device; floating tensors take ``dtype``. Pinned ones are copied alongside."""
        return dataclasses.replace(
            self,
            latents=self.latents.to(device, non_blocking=True).to(dtype),
            text=self.text.to(device, non_blocking=True).to(dtype),
            noise=self.noise.to(device, non_blocking=True).to(dtype),
            timestep=self.timestep.to(device, non_blocking=True),
            generated=None if self.generated is None else self.generated.to(device),
        )

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        names = ("latents", "text", "noise", "timestep")
        return dataclasses.replace(self, **{n: getattr(self, n).pin_memory() for n in names})


@dataclass(frozen=True)
class Reading:
    """What became of some rows of a step: each is in one batch, or in ``bad`` with the reason."""

    batches: list[Batch]
    bad: dict[int, TriptychError]


def make_batch(plan: StepPlan, scene_frames: tuple[int, ...], group: list[ReadRow]) -> Batch:
    """Rows of a step as a batch.

    Args:
        plan: The step.
        scene_frames: Latent frames of each scene, the same in every row.
        group: The rows, at least one.
    """
    rows = tuple(row for row, _, _ in group)
    draws = [plan.draws[row] for row in rows]
    latents = torch.stack([latents for _, latents, _ in group])
    noise = [scene_noise(d.noise_seed, scene_frames, latents.shape[2:]) for d in draws]
    generated = None
    if plan.conditional:
        generated = torch.zeros(len(rows), len(scene_frames), dtype=torch.bool)
        generated[:, -1] = True
    return Batch(
        latents=latents,
        text=torch.stack([text for _, _, text in group]),
        noise=torch.stack(noise),
        timestep=torch.tensor([d.timestep for d in draws]),
        generated=generated,
        rows=rows,
        scene_frames=scene_frames,
    )


class Prefetched(Generic[T]):
    """Reads the next step in a thread while the caller works on this one.

    Steps are pure functions of their number, so there is nothing to save or restore.

    Args:
        read: What a step reads, by its number.
        steps: Steps in all; none beyond is read ahead.
    """

    def __init__(self, read: Callable[[int], T], steps: int) -> None:
        self._read = read
        self._steps = steps
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[T]] | None = None

    def __call__(self, step: int) -> T:
        """What a step reads; errors of ``read`` are raised here, for the step they belong to."""
        if self._ahead is not None and self._ahead[0] == step:
            future = self._ahead[1]
        else:
            future = self._pool.submit(self._read, step)
        value = future.result()
        self._ahead = None
        if step + 1 < self._steps:
            self._ahead = (step + 1, self._pool.submit(self._read, step + 1))
        return value

    def __enter__(self) -> Prefetched[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
