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


def initial_noise(
    seeds: Sequence[int], scenes: Sequence[int], scene_shape: tuple[int, int, int, int]
) -> Tensor:
    """Standard normal noise of a batch of stories, float32 on the CPU.

    Args:
        seeds: One seed per story, length B.
        scenes: Index of each scene within its story, length S.
        scene_shape: Shape of one scene's latents, (F, C, H, W).

    Returns:
        Noise of shape (B, S, F, C, H, W).
    """
    return torch.stack(
        [
            torch.stack(
                [
                    torch.randn(scene_shape, generator=scene_generator(seed, scene, "initial"))
                    for scene in scenes
                ]
            )
            for seed in seeds
        ]
    )
