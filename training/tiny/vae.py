"""Train the embedded VAE: diffusers' CogVideoX autoencoder, made small, on scenes of ToonWorld.

Usage: python -m training.tiny.vae [--image-steps 6000] [--video-steps 150] [--stories 1000]

4 x 4 pixels become one latent vector of 16 numbers, and time is not compressed (the real one: 8 x 8
pixels and 4 frames): at 64 x 64 pixels every cell is full of edges; the best linear code of that
size reaches 29.5 dB, with 4 frames to a vector 23.5 (docs/experiments.md). Single frames are learnt
first, through the newest tap of each causal convolution alone, which saves the others' work; then
videos, through all taps. The loss is the mean squared error, which is what PSNR measures, and a
weak pull of the posterior towards a unit normal. An interrupted run goes on from its last
checkpoint.

Shape legend: B clips, T frames, H W pixels, C channels.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    AutoencoderKLCogVideoX,
    CogVideoXCausalConv3d,
)
from torch import Tensor
from torch.nn import functional as F

from schemas.storage import atomic_path, write_json
from training.data import draw_int
from training.tiny.stories import (
    HELD_OUT_SEED,
    PIXELS,
    TRAIN_SEED,
    Stories,
    load_stories,
)

log = logging.getLogger(__name__)

WIDTHS = (16, 32, 64)
CHANNELS = 16
_GROUPS = 8
_IMAGES, _CLIPS, _CLIP_FRAMES = 4, 3, 5
"""Frames of a step on single frames; clips of a step on videos, and their frames."""
_LR, _VIDEO_LR, _WARMUP = 2e-3, 3e-4, 100
_KL = 2e-5
"""Weight of the divergence, beside the squared error: too little to be seen in a picture."""
_EVERY = 100


def main() -> None:
    """Train, score on what was held out, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--image-steps", type=int, default=6000)
    parser.add_argument("--video-steps", type=int, default=150)
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=100, help="stories to score on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--out", type=Path, default=Path("assets/tiny/model/vae"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    vae = make_vae()
    stories = load_stories(args.work, TRAIN_SEED, args.stories)
    curve = train(vae, stories, args.image_steps, args.video_steps, args.work / "vae.ckpt")
    held_out = load_stories(args.work, HELD_OUT_SEED, args.held_out)
    scores = score(vae, held_out)
    vae.register_to_config(scaling_factor=scores["scaling_factor"])
    vae.half().save_pretrained(args.out)
    write_json(args.work / "vae.json", {"scores": scores, "curve": curve})
    log.info("vae scores=%s", scores)


def make_vae() -> AutoencoderKLCogVideoX:
    """An untrained one, the same every time, whose frames do not yet see those before them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = cast("Any", AutoencoderKLCogVideoX)(  # its annotations say tuples of one
            down_block_types=("CogVideoXDownBlock3D",) * len(WIDTHS),
            up_block_types=("CogVideoXUpBlock3D",) * len(WIDTHS),
            block_out_channels=WIDTHS,
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=_GROUPS,
            temporal_compression_ratio=1,
            sample_height=PIXELS,
            sample_width=PIXELS,
        )
    with torch.no_grad():
        for conv in _causal(vae):
            conv.conv.weight[:, :, -1] *= conv.time_kernel_size**0.5
            conv.conv.weight[:, :, :-1] = 0
        # Else the decoder learns from latents that are mostly noise.
        vae.encoder.conv_out.conv.bias[CHANNELS:] = -6
    return vae


def train(
    vae: AutoencoderKLCogVideoX,
    stories: Stories,
    image_steps: int,
    video_steps: int,
    checkpoint: Path,
) -> list[dict[str, float]]:
    """Train in place; gives the curve. What a step sees depends on its number alone."""
    optimizer = torch.optim.AdamW(vae.parameters(), _LR, betas=(0.9, 0.99), weight_decay=0.0)
    curve: list[dict[str, float]] = []
    first, seconds, steps = 0, 0.0, image_steps + video_steps
    if checkpoint.is_file():
        state: Any = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, curve = state["step"], state["seconds"], state["curve"]
        log.info("vae resumed step=%d of=%d", first, steps)
    vae.train()
    errors: list[float] = []
    started = time.process_time() - seconds
    for step in range(first, steps):
        still = step < image_steps
        lr = (
            _decay(_LR, step, image_steps)
            if still
            else _decay(_VIDEO_LR, step - image_steps, video_steps)
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        clips = _frames(stories, step) if still else _clips(stories, step)
        with _newest_tap(vae) if still else nullcontext():
            loss, error = _losses(vae, clips, step)
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        errors.append(error)
        if (step + 1) % _EVERY == 0 or step + 1 in (image_steps, steps):
            seconds = time.process_time() - started
            db = _psnr(torch.tensor(errors).mean())
            curve.append({"step": step + 1, "psnr_db": round(db, 2), "cpu_s": round(seconds)})
            log.info("vae step=%d of=%d psnr_db=%.2f cpu_s=%.0f", step + 1, steps, db, seconds)
            errors.clear()
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "seconds": seconds, "curve": curve}
            with atomic_path(checkpoint) as tmp:
                torch.save(state, tmp)
    return curve


def _losses(vae: AutoencoderKLCogVideoX, clips: Tensor, step: int) -> tuple[Tensor, float]:
    mean, log_variance = _moments(vae, clips)
    generator = torch.Generator().manual_seed(draw_int("vae noise", step))
    noise = torch.randn(mean.shape, generator=generator)
    seen = vae.decoder(mean + noise * (0.5 * log_variance).exp())[0]
    error = (seen - clips).square().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error + _KL * divergence, float(error.detach())


def _decay(lr: float, step: int, steps: int) -> float:
    return lr * min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)


def _causal(vae: AutoencoderKLCogVideoX) -> list[Any]:
    return [m for m in vae.modules() if isinstance(m, CogVideoXCausalConv3d)]


@contextmanager
def _newest_tap(vae: AutoencoderKLCogVideoX) -> Generator[None]:
    """Causal convolutions as they are for single frames that have nothing before them."""

    def flat(self: Any, inputs: Tensor, conv_cache: Any = None) -> tuple[Tensor, None]:
        conv = self.conv
        padding = conv.kernel_size[-1] // 2
        out = F.conv2d(inputs[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=padding)
        return out[:, :, None], None

    convs = _causal(vae)
    for conv in convs:
        conv.forward = MethodType(flat, conv)
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


@torch.no_grad()
def score(vae: AutoencoderKLCogVideoX, stories: Stories) -> dict[str, float]:
    """PSNR over all pixels of the scenes, and the scale that gives latents a unit square mean."""
    vae.eval()
    error = square = 0.0
    scenes = [scene for story in stories.frames for scene in story]
    for scene in scenes:
        clip = to_clip(torch.from_numpy(scene.copy()))[None]
        mean, _ = _moments(vae, clip)
        seen = vae.decoder(mean)[0].clamp(-1, 1)
        error += float((seen - clip).square().mean())
        square += float(mean.square().mean())
    return {
        "scenes": len(scenes),
        "psnr_db": round(_psnr(torch.tensor(error / len(scenes))), 2),
        "scaling_factor": round((square / len(scenes)) ** -0.5, 6),
    }


def to_clip(frames: Tensor) -> Tensor:
    """(T, H, W, 3) uint8 as the VAE takes it: (3, T, H, W) from -1 to 1."""
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1


def _frames(stories: Stories, step: int) -> Tensor:
    """(B, 3, 1, H, W) any frames, half of them mirrored."""
    frames = stories.frames.reshape(-1, 1, PIXELS, PIXELS, 3)
    return torch.stack([_one_of(frames, step, place) for place in range(_IMAGES)])


def _clips(stories: Stories, step: int) -> Tensor:
    """(B, 3, T, H, W) every second frame of any scenes, half of them mirrored."""
    scenes = stories.frames.reshape(-1, *stories.frames.shape[2:])
    scenes = scenes[:, :: (scenes.shape[1] - 1) // (_CLIP_FRAMES - 1)]
    return torch.stack([_one_of(scenes, step, place) for place in range(_CLIPS)])


def _one_of(clips: npt.NDArray[np.uint8], step: int, place: int) -> Tensor:
    number = draw_int("vae", step, place)
    clip = to_clip(torch.from_numpy(clips[number // 2 % len(clips)].copy()))
    return clip.flip(-1) if number % 2 else clip


def _moments(vae: AutoencoderKLCogVideoX, clips: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = vae.encoder(clips)[0].chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def _psnr(error: Tensor) -> float:
    """Decibels, of a squared error of values from -1 to 1."""
    return float(10 * torch.log10(4 / error))


if __name__ == "__main__":
    main()
