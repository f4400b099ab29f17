import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from schemas.errors import ConfigError
from training.base_model import SCHEDULER
from training.diffusion import check_scheduler, diffusion_losses, masked_mse

FRAMES = [2, 1, 3]


def tensors():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 6, 4, 2, 2, generator=generator)
    return latents, noise, torch.randn(2, 3, 5, 8, generator=generator), torch.tensor([0, 999])


class Recorder:
    """A denoiser that gives back a fixed answer and keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, noisy, text, timestep, scene_frames, generated):
        self.noisy = noisy
        return self.answer


def test_velocity_is_the_target():
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    latents, noise, text, timestep = tensors()
    alpha = scheduler.alphas_cumprod[timestep].float()[:, None, None, None, None]
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    model = Recorder(velocity)
    loss = diffusion_losses(model, scheduler, latents, text, noise, timestep, FRAMES)
    assert loss.max() < 1e-10
    # zero terminal SNR: at the last timestep nothing of the sample is left
    torch.testing.assert_close(model.noisy[1], noise[1])


def test_conditional_loss_counts_only_generated_scenes_and_keeps_the_others_clean():
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    latents, noise, text, timestep = tensors()
    generated = torch.tensor([[False, False, True], [True, False, False]])
    wrong = scheduler.get_velocity(latents, noise, timestep)
    wrong[0, :3] += 100.0  # condition frames of sample 0: must not count
    wrong[1, 2:] += 100.0
    wrong[0, 3] += 2.0  # one of the three generated frames of its row
    model = Recorder(wrong)
    losses = diffusion_losses(model, scheduler, latents, text, noise, timestep, FRAMES, generated)
    torch.testing.assert_close(losses, torch.tensor([4.0 / 3, 0.0]))
    assert torch.equal(model.noisy[0, :3], latents[0, :3])
    assert torch.equal(model.noisy[1, 2:], latents[1, 2:])
    assert not torch.equal(model.noisy[1, :2], latents[1, :2])


def test_mean_over_all_frames_is_the_plain_mse():
    latents, noise, _, _ = tensors()
    everywhere = torch.ones(2, 6, dtype=torch.bool)
    expected = torch.stack(
        [torch.nn.functional.mse_loss(a, b) for a, b in zip(latents, noise, strict=True)]
    )
    torch.testing.assert_close(masked_mse(latents, noise, everywhere), expected)
    torch.testing.assert_close(masked_mse(latents, noise), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0], ids=["5b", "2b"])
def test_schedule_is_that_of_the_scheduler_config_and_ends_in_pure_noise(shift):
    """Restated: scaled-linear betas, SNR shift, rescaling so that nothing is left at the end."""
    scheduler = CogVideoXDDIMScheduler(**{**SCHEDULER, "snr_shift_scale": shift})
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    root = (kept / (shift + (1 - shift) * kept)).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    latents, noise, text, _ = tensors()
    timestep = torch.tensor([250, 999])
    model = Recorder(torch.zeros_like(latents))
    loss = diffusion_losses(model, scheduler, latents, text, noise, timestep, FRAMES)
    a = root[timestep][:, None, None, None, None]
    b = (1 - a**2).sqrt()
    torch.testing.assert_close(model.noisy, (a * latents + b * noise).float())
    expected = (a * noise - b * latents).square().mean((1, 2, 3, 4)).float()
    torch.testing.assert_close(loss, expected)
    assert a[1] == 0


def test_bfloat16_latents_are_noised_in_float32():
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    latents, noise, text, timestep = tensors()
    low, low_noise = latents.bfloat16(), noise.bfloat16()
    model = Recorder(torch.zeros_like(low))
    loss = diffusion_losses(model, scheduler, low, text, low_noise, timestep, FRAMES)
    exact = Recorder(torch.zeros_like(latents))
    expected = diffusion_losses(
        exact, scheduler, low.float(), text, low_noise.float(), timestep, FRAMES
    )
    assert torch.equal(model.noisy, exact.noisy.bfloat16())
    assert torch.equal(loss, expected)


def test_other_prediction_types_are_refused():
    with pytest.raises(ConfigError, match="epsilon"):
        check_scheduler(CogVideoXDDIMScheduler(prediction_type="epsilon"))
