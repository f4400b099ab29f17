"""CogVideoX's two samplers behind one step, with noise that belongs to a scene.

Shapes: N scenes (of all stories), F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from torch import Tensor

Scheduler = CogVideoXDDIMScheduler | CogVideoXDPMScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    "ddim": CogVideoXDDIMScheduler,
    "dpm": CogVideoXDPMScheduler,
}


def denoising_timesteps(scheduler: Scheduler, num_steps: int, device: torch.device) -> Tensor:
    """Set the number of steps and return the timesteps, from noisy to clean.

    diffusers' trailing spacing adds a spurious last step at t = -1 for some counts (61, 103, 121
    ...) through floating-point rounding; it is dropped.
    """
    scheduler.set_timesteps(num_steps, device=device)
    return scheduler.timesteps[scheduler.timesteps >= 0]


def denoise_step(
    scheduler: Scheduler,
    velocity: Tensor,
    previous: Tensor | None,
    t: Tensor,
    before: Tensor | None,
    latents: Tensor,
    noise: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor | None]:
    """One step of the scheduler.

    Args:
        scheduler: DDIM or DPM++, with its timesteps set.
        velocity: The v prediction, (N, F, C, H, W).
        previous: The clean prediction of the step before (only DPM++ looks back), None at first.
        t: This timestep, scalar.
        before: The timestep before, None at first.
        latents: (N, F, C, H, W).
        noise: One generator per scene; only DPM++ draws from them.

    Returns:
        The new latents, and the clean prediction to give as ``previous`` next time.
    """
    step = cast(
        "int", t
    )  # diffusers annotates an int and takes a tensor, as its own pipelines give
    if isinstance(scheduler, CogVideoXDPMScheduler):
        stepped, clean = scheduler.step(
            velocity,
            cast("Tensor", previous),
            step,
            cast("int", before),
            latents,
            generator=cast("torch.Generator", list(noise)),
            return_dict=False,
        )
        return stepped, clean
    result = scheduler.step(velocity, step, latents, return_dict=False)
    return cast("tuple[Tensor, Tensor]", result)[0], None
