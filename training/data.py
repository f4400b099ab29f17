"""What a step trains on (samples, noise, timesteps …): a pure function of (seed, step).

Nothing here depends on the number of ranks, the micro-batch, or on what ran before: row i of step k
is the same on any machine layout and after any restart. Each number is drawn from a hash of its
name, not from a generator that has a position.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from schemas.config.training import TrainStageConfig


def draw_int(*name: object) -> int:
    """A uniform integer in [0, 2**63) that depends only on its name."""
    text = "\x1f".join(map(str, name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def draw_uniform(*name: object) -> float:
    """A uniform number in [0, 1) that depends only on its name."""
    return (draw_int(*name) >> 10) / 2**53


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw_int(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator)


@dataclass(frozen=True)
class Draw:
    """One row of a global batch."""

    index: int
    timestep: int
    noise_seed: int
    drop_text: bool


@dataclass(frozen=True)
class StepPlan:
    """A global batch; ``conditional``: the last scene is generated from the clean earlier ones."""

    step: int
    conditional: bool
    draws: tuple[Draw, ...]


def plan_step(step: int, stage: TrainStageConfig, num_samples: int, num_timesteps: int) -> StepPlan:
    """The global batch of a step.

    Every sample comes up once per epoch, in an order of that epoch's own; timesteps are uniform.

    Args:
        step: 0 for the first one.
        stage: Seed, batch size, conditional share and text dropout.
        num_samples: Size of the dataset.
        num_timesteps: Diffusion timesteps.
    """
    draws: list[Draw] = []
    for row in range(stage.batch_size):
        epoch, place = divmod(step * stage.batch_size + row, num_samples)
        key = (stage.seed, step, row)
        draws.append(
            Draw(
                index=int(_order(stage.seed, epoch, num_samples)[place]),
                timestep=int(draw_uniform("timestep", *key) * num_timesteps),
                noise_seed=draw_int("noise", *key),
                drop_text=draw_uniform("text", *key) < stage.text_dropout,
            )
        )
    conditional = draw_uniform("conditional", stage.seed, step) < stage.conditional_p
    return StepPlan(step, conditional, tuple(draws))


def validation_plan(
    stage: TrainStageConfig, num_samples: int, num_timesteps: int, conditional: bool
) -> StepPlan:
    """What a validation loss is taken over: always the same samples, noise and timesteps.

    The first samples in their order, one after the other at timesteps that lie evenly between 0 and
    the last; no caption is dropped.

    Args:
        stage: Seed and number of samples.
        num_samples: Held-out samples there are; each may come up several times.
        num_timesteps: Diffusion timesteps.
        conditional: Whether the last scene is generated from the earlier ones.
    """
    count = stage.validation_samples
    draws = [
        Draw(
            index=i % num_samples,
            timestep=int((i + 0.5) / count * num_timesteps),
            noise_seed=draw_int("validation", stage.seed, i),
            drop_text=False,
        )
        for i in range(count)
    ]
    return StepPlan(-1, conditional, tuple(draws))
