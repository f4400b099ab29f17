"""The training objective: v-prediction over all scenes, or over the generated ones only.

The noise schedule comes from the base model's scheduler config alone: scaled-linear betas, the SNR
shift (1.0 for CogVideoX-5B, 3.0 for 2B) and the rescaling to zero terminal SNR.

Legend: B batch, S scenes, F latent frames of all scenes, C channels, H W latent height width.

Source: Mask2DiT (arXiv 2503.19881) section 3.3; CogVideoX (arXiv 2408.06072) for v-prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from torch import Tensor

from schemas.errors import ConfigError

Denoiser = Callable[..., Tensor]
"""A Mask2DiTTransformer3DModel, or the DeepSpeed engine around one."""


def check_scheduler(scheduler: CogVideoXDDIMScheduler) -> CogVideoXDDIMScheduler:
    """Return the scheduler if it is a v-prediction one.

    Raises:
        ConfigError: It predicts something else.
    """
    found = cast("Any", scheduler.config).prediction_type
    if found != "v_prediction":
        raise ConfigError(
            "the base model's scheduler does not predict v",
            where="scheduler/scheduler_config.json: prediction_type",
            found=found,
            expected="v_prediction",
            do="use a CogVideoX base model",
        )
    return scheduler


def frames_of_scenes(per_scene: Tensor, scene_frames: Sequence[int]) -> Tensor:
    """Spread (B, S) flags over the latent frames of their scenes: (B, F)."""
    counts = torch.tensor(list(scene_frames), device=per_scene.device)
    return per_scene.repeat_interleave(counts, dim=1)


def masked_mse(prediction: Tensor, target: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean squared error of each row, in float32 (or wider), over the frames that count.

    A mean, where the paper writes a sum: the gradient differs by a constant factor, and the loss of
    a conditional step is then comparable to that of a plain one.

    Args:
        prediction: (B, F, C, H, W).
        target: Likewise.
        counts: (B, F) bool, True where a frame counts; None = everywhere.

    Returns:
        (B,).
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    error = ((prediction.to(wide) - target.to(wide)) ** 2).flatten(2).mean(2)  # (B, F)
    if counts is None:
        return error.mean(1)
    weights = counts.to(error.dtype)
    return (error * weights).sum(1) / weights.sum(1)


def diffusion_losses(
    model: Denoiser,
    scheduler: CogVideoXDDIMScheduler,
    latents: Tensor,
    text: Tensor,
    noise: Tensor,
    timestep: Tensor,
    scene_frames: Sequence[int],
    generated: Tensor | None = None,
) -> Tensor:
    """The loss of each row of a micro-batch.

    Args:
        model: Predicts v.
        scheduler: The base model's; v-prediction.
        latents: (B, F, C, H, W) clean latents of all scenes.
        text: (B, S, T, text width).
        noise: (B, F, C, H, W) standard normal.
        timestep: (B,) integers in [0, num_train_timesteps).
        scene_frames: Latent frames of each scene.
        generated: (B, S) bool; scenes that are False stay clean, are modulated with t = 0 and carry
            no loss. None = all scenes are generated and count.

    Returns:
        (B,) losses, float32 (float64 for float64 latents).
    """
    steps = cast("Any", timestep)  # diffusers asks for an IntTensor; int64 is one
    # diffusers takes the schedule in the type of the latents, and bfloat16 has three digits
    wide = torch.promote_types(latents.dtype, torch.float32)
    exact = (latents.to(wide), noise.to(wide), steps)
    noisy = scheduler.add_noise(*exact).to(latents.dtype)
    target = scheduler.get_velocity(*exact)
    counts = None
    if generated is not None:
        counts = frames_of_scenes(generated, scene_frames)
        noisy = torch.where(counts[:, :, None, None, None], noisy, latents)
    prediction = model(noisy, text, timestep, scene_frames, generated)
    return masked_mse(prediction, target, counts)
