"""CogVideoX's two samplers behind one step, and which noise schedules they may run on.

A CogVideoX model learns v over a schedule that ends in pure noise (alpha_bar = 0, "zero terminal
SNR", arXiv 2305.08891). Sampling is right only if it starts there, on the very last timestep, and
if no step divides by the root of alpha_bar. diffusers' two CogVideoX schedulers do both, given the
right config; :func:`check_scheduler` refuses the others, whose videos would be wrong without a sign
of it.

Shapes: B stories, F latent frames of a scene, C channels, H W latent height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from torch import Tensor

from schemas.errors import ConfigError

log = logging.getLogger(__name__)

Scheduler = CogVideoXDDIMScheduler | CogVideoXDPMScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    "ddim": CogVideoXDDIMScheduler,
    "dpm": CogVideoXDPMScheduler,
}

_REQUIRED: dict[str, tuple[Any, str]] = {
    "prediction_type": (
        "v_prediction",
        "a prediction of the noise says nothing about the video where all is noise",
    ),
    "rescale_betas_zero_snr": (
        True,
        "the last timestep must be the pure noise that sampling starts from",
    ),
    "timestep_spacing": (
        "trailing",
        "the other spacings leave out the last timestep, or step between the ones asked for",
    ),
    "set_alpha_to_one": (True, "the last step would leave noise in the video"),
}
"""Config values of a scheduler that sampling needs, and what goes wrong otherwise."""


def make_scheduler(name: str, config: Mapping[str, Any]) -> Scheduler:
    """The scheduler called ``ddim`` or ``dpm`` with the noise schedule of a scheduler's config.

    Raises:
        ConfigError: There is no such scheduler, or the schedule cannot be sampled with it.
    """
    if name not in SCHEDULERS:
        raise ConfigError(
            "this scheduler cannot sample a CogVideoX model",
            found=name,
            expected="ddim or dpm: the only two that know CogVideoX's SNR shift and can step from "
            "alpha_bar = 0",
            do="set generation.scheduler",
        )
    return check_scheduler(cast("Any", SCHEDULERS[name]).from_config(config))


def check_scheduler(scheduler: Any) -> Scheduler:
    """Return the scheduler if it can sample a CogVideoX model.

    Raises:
        ConfigError: It is of another class, or its config gives wrong videos.
    """
    if not isinstance(scheduler, tuple(SCHEDULERS.values())):
        raise ConfigError(
            "this scheduler cannot sample a CogVideoX model",
            found=type(scheduler).__name__,
            expected="CogVideoXDDIMScheduler or CogVideoXDPMScheduler: others lack CogVideoX's SNR "
            "shift, and divide by the root of alpha_bar, which is 0 at the first step",
            do='call pipeline.set_scheduler("ddim") or ("dpm")',
        )
    config = cast("Any", scheduler.config)
    for key, (wanted, reason) in _REQUIRED.items():
        if config[key] != wanted:
            raise ConfigError(
                "this noise schedule cannot be sampled",
                where=f"scheduler/scheduler_config.json: {key}",
                found=config[key],
                expected=f"{wanted}: {reason}",
                do="use the scheduler config of the CogVideoX base model",
            )
    return scheduler


def denoising_timesteps(scheduler: Scheduler, num_steps: int, device: torch.device) -> Tensor:
    """Set the number of steps and return the timesteps, from noisy to clean.

    diffusers' trailing spacing adds a spurious last step at t = -1 for some counts (61, 103, 121
    ...) through floating-point rounding; it is dropped. For counts that do not divide the schedule,
    diffusers' step lands beside the next timestep; that is kept, and said.

    Raises:
        ConfigError: More steps than the schedule has.
    """
    trained = int(cast("Any", scheduler.config).num_train_timesteps)
    if not 1 <= num_steps <= trained:
        raise ConfigError("too many or too few steps", found=num_steps, expected=f"1 to {trained}")
    scheduler.set_timesteps(num_steps, device=device)
    steps = scheduler.timesteps[scheduler.timesteps >= 0]
    left = int(steps[-1]) - trained // num_steps
    if left >= 0:
        sigma = float((1 - scheduler.alphas_cumprod[left]) ** 0.5)
        log.warning("noise is left steps=%d sigma=%.4f do=%r", num_steps, sigma,
                    f"choose a number that divides {trained}")  # fmt: skip
    return steps


def denoise_step(
    scheduler: Scheduler,
    velocity: Tensor,
    previous: Tensor | None,
    t: Tensor,
    before: Tensor | None,
    latents: Tensor,
    noise: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor | None]:
    """One step of the scheduler for one scene.

    Args:
        scheduler: DDIM or DPM++, with its timesteps set.
        velocity: The v prediction, (B, F, C, H, W).
        previous: The clean prediction of the step before (only DPM++ looks back), None at first.
        t: This timestep, scalar.
        before: The timestep before, None at first.
        latents: (B, F, C, H, W).
        noise: One generator per story; only DPM++ draws from them.

    Returns:
        The new latents, and the clean prediction to give as ``previous`` next time.
    """
    step = cast("int", t)  # diffusers annotates an int and takes a tensor, as its pipelines give
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
