"""Noise that depends on a seed, the scene and its purpose, and on nothing else.

The same story therefore meets the same noise in any batch, on any device and on any number of
workers, and a scene keeps its own noise whatever the lengths of the others are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def scene_generator(seed: int, scene: int, purpose: str) -> torch.Generator:
    """A CPU generator keyed by (seed, scene index in the story, purpose).

    Always on the CPU: torch's CPU and CUDA generators give different numbers for one seed.
    """
    key = hashlib.sha256(f"triptych/{purpose}/{seed}/{scene}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little", signed=True))


def scene_noise(seed: int, scene_frames: Sequence[int], frame_shape: Sequence[int]) -> Tensor:
    """Noise of one training sample, drawn scene by scene.

    Args:
        seed: Seed of the sample in this step.
        scene_frames: Latent frames of each scene.
        frame_shape: (C, H, W).

    Returns:
        (F, C, H, W) standard normal, float32 on the CPU.
    """
    return torch.cat(
        [
            torch.randn(frames, *frame_shape, generator=scene_generator(seed, place, "training"))
            for place, frames in enumerate(scene_frames)
        ]
    )
