"""Train the embedded DiT on ToonWorld, in stages that go from lone pictures to whole stories.

Usage: python -m training.tiny.dit OUT [--scenes 1] [--frames 1] [--steps 8000] [--start MODEL]
    [--episodes 4000] [--work build/tiny] [--weights DIR] [--heads 8] [--bf16]

What a caption means is learnt from single frames in a fraction of the time that videos take, as the
frames of a scene have most things in common (image before video training, as video diffusion models
are usually made); likewise what the scenes of a story share. Each stage starts from the one before:

1. ``--scenes 1``: lone frames, with mask v1;
2. ``--scenes 3``: a frame of each of three scenes of an episode, with mask v2;
3. ``--scenes 3 --frames 5``: all frames of such scenes.

An interrupted run goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from schemas.config.presets import toonworld
from schemas.storage import atomic_path, fingerprint, fingerprint_folder, write_json
from training.base_model import load_scheduler
from training.data import draw_int
from training.diffusion import diffusion_losses
from training.positions import Timeline
from training.tiny.base import HEADS, LAYERS, make_toon_base, write_model
from training.tiny.dit_data import Rows, encoded_scenes
from training.tiny.muon import Muon
from training.tiny.stories import SCENES
from training.transformer import Mask2DiTTransformer3DModel
from training.weights import load_transformer

log = logging.getLogger(__name__)

_LR, _MUON_LR, _DECAY, _WARMUP = 2e-3, 1e-2, 0.03, 100
_EVERY = 100
_SHARD = "4MB"
"""No file in the repository is larger than 5 MB."""


def main() -> None:
    """Encode what is not encoded yet, train, and write the model folder."""
    model = toonworld().training.model
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--episodes", type=int, default=4000)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="data, checkpoint")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--scenes", type=int, default=1, choices=(1, SCENES), help="of a row")
    parser.add_argument(
        "--frames", type=int, default=1, choices=(1, model.frames), help="of a scene"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="times the learning rates")
    parser.add_argument(
        "--heads", type=int, default=HEADS, help="of 32, where --start is not given"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="model folder to go on from; default: none")
    parser.add_argument(
        "--bf16", action="store_true", help="multiply in bfloat16: faster on processors with AMX"
    )
    parser.add_argument("--weights", type=Path, help="also write the transformer in float16 here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    mask = "v1" if args.scenes == 1 else "v2"
    base = make_toon_base(args.work / f"base-{args.heads}", model, LAYERS, args.heads)
    scenes = encoded_scenes(args.work, base, args.episodes, args.threads)
    data = Rows(scenes, args.scenes, args.frames)
    start = args.start or base
    transformer = load_transformer(start, mask=mask)
    run = fingerprint(fingerprint_folder(start), args.steps, args.rate, args.episodes, args.bf16)
    stage = args.work / f"dit-{args.scenes}x{args.frames}-{run[:8]}"
    checkpoint = stage.with_suffix(".ckpt")
    curve = train(transformer, data, base, args.steps, checkpoint, args.rate, args.bf16)
    write_model(args.out, transformer)
    if args.weights is not None:
        for old in args.weights.glob("diffusion_pytorch_model*"):
            old.unlink()  # a file of all would stay beside new shards
        transformer.half().save_pretrained(args.weights, max_shard_size=_SHARD)
    write_json(stage.with_suffix(".json"), curve)


def train(
    transformer: Mask2DiTTransformer3DModel,
    data: Rows,
    base: Path,
    steps: int,
    checkpoint: Path,
    rate: float = 1.0,
    is_bf16: bool = False,
) -> list[dict[str, float]]:
    """Train in place; gives the curve. What a step sees depends on its number alone."""
    scheduler = load_scheduler(base)
    if is_bf16:
        _multiply_in_bfloat16(transformer)
    optimizers = _optimizers(transformer, torch.bfloat16 if is_bf16 else torch.float32)
    curve: list[dict[str, float]] = []
    first, seconds = 0, 0.0
    if checkpoint.is_file():
        state: Any = torch.load(checkpoint, weights_only=True)
        transformer.load_state_dict(state["transformer"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds, curve = state["step"], state["seconds"], state["curve"]
        log.info("resumed step=%d of=%d", first, steps)
    transformer.train()
    losses: list[float] = []
    started = time.process_time() - seconds
    for step in range(first, steps):
        share = rate * min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)
        loss = _loss(transformer, scheduler, data, step)
        transformer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * share
            optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % _EVERY == 0 or step + 1 == steps:
            seconds, mean = time.process_time() - started, sum(losses) / len(losses)
            curve.append({"step": step + 1, "loss": round(mean, 4), "cpu_s": round(seconds)})
            log.info("step=%d of=%d loss=%.4f cpu_s=%.0f", step + 1, steps, mean, seconds)
            losses.clear()
            state = {
                "transformer": transformer.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                **{"step": step + 1, "seconds": seconds, "curve": curve},
            }
            with atomic_path(checkpoint) as tmp:
                torch.save(state, tmp)
    return curve


def _multiply_in_bfloat16(transformer: Mask2DiTTransformer3DModel) -> None:
    """The matrices of the blocks; attention, whose bfloat16 is slow on CPUs, stays in float32."""

    def within(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(tokens: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(tokens).float()

        return call

    for block in cast("Any", transformer.transformer_blocks):
        attention = block.attn1
        for layer in (
            attention.to_q,
            attention.to_k,
            attention.to_v,
            attention.to_out[0],
            block.ff,
        ):
            layer.forward = within(layer.forward)


def _optimizers(
    transformer: Mask2DiTTransformer3DModel, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for what goes in, comes out and the rest."""
    inner = [p for p in transformer.transformer_blocks.parameters() if p.ndim == 2]
    outer = [p for p in transformer.parameters() if p not in {*inner}]
    return [
        Muon(inner, _MUON_LR, weight_decay=_DECAY, dtype=dtype),
        torch.optim.AdamW(outer, _LR, (0.9, 0.99), weight_decay=_DECAY),
    ]


def _loss(transformer: Mask2DiTTransformer3DModel, scheduler: Any, data: Rows, step: int) -> Tensor:
    batch, count = data.batch(step), data.count
    generator = torch.Generator().manual_seed(draw_int("dit noise", step))
    noise = torch.randn(batch.latents.shape, generator=generator)
    # one timestep in each of B equal parts of all: a steadier loss than B free ones
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timestep = (parts * scheduler.config.num_train_timesteps).long()
    timeline = Timeline(batch.positions, batch.positions[-1] + 1, data.frames)

    def predict(noisy: Tensor, text: Tensor, t: Tensor, frames: Any, generated: Any) -> Tensor:
        return transformer(noisy, text, t, frames, generated, timeline)

    losses = diffusion_losses(
        predict,
        scheduler,
        batch.latents,
        batch.texts,
        noise,
        timestep,
        (data.frames,) * data.scenes,
        batch.generated,
    )
    return losses.mean()


if __name__ == "__main__":
    main()
