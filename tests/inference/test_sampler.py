from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler

from inference.sampler import (
    check_scheduler,
    denoise_step,
    denoising_timesteps,
    make_scheduler,
)
from schemas.errors import ConfigError
from training.base_model import SCHEDULER

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["ddim", "dpm"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_starts_from_pure_noise(name, shift):
    scheduler = make_scheduler(name, {**SCHEDULER, "snr_shift_scale": shift})
    for steps in (1, 2, 7, 50, 999):
        first = denoising_timesteps(scheduler, steps, CPU)[0]
        assert int(first) == 999
        assert float(scheduler.alphas_cumprod[first]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "epsilon"}, "says nothing about the video"),
        ({"rescale_betas_zero_snr": False}, "pure noise"),
        ({"timestep_spacing": "leading"}, "trailing"),
        ({"timestep_spacing": "linspace"}, "trailing"),
        ({"set_alpha_to_one": False}, "leave noise"),
    ],
)
def test_schedules_that_give_wrong_videos_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make_scheduler("ddim", {**SCHEDULER, **change})


def test_other_schedulers_are_refused():
    with pytest.raises(ConfigError, match="SNR shift"):
        make_scheduler("euler", SCHEDULER)
    with pytest.raises(ConfigError, match="DDIMScheduler"):
        check_scheduler(DDIMScheduler())
    for right in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler):
        scheduler = right(**SCHEDULER)
        assert check_scheduler(scheduler) is scheduler


def test_the_step_below_zero_is_left_out():
    """diffusers' trailing spacing makes 62 steps, the last at t = -1, of 61."""
    scheduler = make_scheduler("ddim", SCHEDULER)
    assert len(denoising_timesteps(scheduler, 61, CPU)) == 61
    for wrong in (0, 1001):
        with pytest.raises(ConfigError, match="steps"):
            denoising_timesteps(scheduler, wrong, CPU)


@pytest.mark.parametrize(("steps", "sigma"), [(2, 0), (30, 0), (50, 0), (15, 0.0292), (60, 0.0292)])
@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_noise_that_is_left_is_said(caplog, name, steps, sigma):
    """Even a model that knows the video exactly cannot take it out."""
    scheduler = make_scheduler(name, SCHEDULER)
    with caplog.at_level("WARNING", logger="inference.sampler"):
        timesteps = denoising_timesteps(scheduler, steps, CPU)
    assert (f"sigma={sigma:.4f}" in caplog.text) == bool(sigma)

    drawn = torch.Generator().manual_seed(0)
    x, video, clean = torch.randn(1, 1000, generator=drawn), torch.full((1, 1000), 3.0), None
    for i, t in enumerate(timesteps):
        alpha = scheduler.alphas_cumprod[t]
        noise = (x - alpha**0.5 * video) / (1 - alpha) ** 0.5
        velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * video
        before = timesteps[i - 1] if i else None
        x, clean = denoise_step(scheduler, velocity, clean, t, before, x, [drawn])
    assert float((x - video).std()) == pytest.approx(sigma, rel=0.3, abs=1e-4)
