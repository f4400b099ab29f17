"""What a step trains on (samples, noise, timesteps …): a pure function of (seed, step).

Nothing here depends on the number of ranks, the micro-batch, or on what ran before: row i of step k
is the same on any machine layout and after any restart. Each number is drawn from a hash of its
name, not from a generator that has a position.

Legend: B batch, S scenes, F latent frames of all scenes, C channels, H W latent height width, T
text tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from schemas.config.training import TrainStageConfig
from schemas.errors import ManifestError
from schemas.rows import Sample
from schemas.storage import fingerprint
from training.cache import LatentCache, training_samples
from training.noise import scene_noise

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        latents: (B, F, C, H, W).
        text: (B, S, T, text width).
        noise: (B, F, C, H, W) standard normal.
        timestep: (B,) int64.
        generated: (B, S) bool, or None where every scene is generated.
    """

    latents: Tensor
    text: Tensor
    noise: Tensor
    timestep: Tensor
    generated: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Move to a device; floating tensors take ``dtype``."""
        return Batch(
            self.latents.to(device, dtype),
            self.text.to(device, dtype),
            self.noise.to(device, dtype),
            self.timestep.to(device),
            None if self.generated is None else self.generated.to(device),
        )


class LatentDataset:
    """Encoded samples of a manifest.

    Args:
        samples: Samples whose files are all in the cache.
        cache: Names the files.
    """

    def __init__(self, samples: Sequence[Sample], cache: LatentCache) -> None:
        self.samples = list(samples)
        self.cache = cache
        self.scene_frames = [cache.latent_frames] * cache.shape.scenes

    @classmethod
    def open(cls, manifest: Path, cache: LatentCache) -> LatentDataset:
        """The training samples of a manifest that could be encoded.

        Raises:
            ManifestError: Nothing to train on, or samples that were never encoded.
        """
        samples = training_samples(manifest, cache.shape.scenes)
        ready, left_out = cache.split_by_readiness(samples)
        if left_out:
            log.warning(
                "samples_left_out count=%d of=%d reason=scene_not_encodable", left_out, len(samples)
            )
        if not ready:
            raise ManifestError(
                "no sample could be encoded",
                where=manifest,
                found=f"all {len(samples)} samples have a scene that is too short or unreadable",
                do="see the latents stage's rejects; lower training.model.frames or mend them",
            )
        return cls(ready, cache)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """Changes with the samples or their order."""
        return fingerprint([s.sample_id for s in self.samples])

    def latents(self, index: int) -> Tensor:
        """(F, C, H, W) of all scenes of a sample."""
        scenes = self.samples[index].scenes
        return torch.cat([load_file(self.cache.scene_file(s))["latents"] for s in scenes])

    def text(self, index: int, dropped: bool = False) -> Tensor:
        """(S, T, text width); with ``dropped`` every caption is the empty one."""
        captions = ["" if dropped else s.caption for s in self.samples[index].scenes]
        return torch.stack([load_file(self.cache.caption_file(c))["text"] for c in captions])

    def batch(self, plan: StepPlan, rows: Sequence[int]) -> Batch:
        """The rows of a global batch as tensors on the CPU."""
        draws = [plan.draws[row] for row in rows]
        latents = torch.stack([self.latents(d.index) for d in draws])
        noise = [scene_noise(d.noise_seed, self.scene_frames, latents.shape[2:]) for d in draws]
        generated = None
        if plan.conditional:
            generated = torch.zeros(len(draws), len(self.scene_frames), dtype=torch.bool)
            generated[:, -1] = True
        return Batch(
            latents,
            torch.stack([self.text(d.index, d.drop_text) for d in draws]),
            torch.stack(noise),
            torch.tensor([d.timestep for d in draws]),
            generated,
        )
