"""Train the embedded DiT's first stage: single pictures of ToonWorld from their captions.

Usage: python -m training.tiny.pictures OUT [--workspace build/toonworld] [--steps 8000]
    [--start MODEL] [--weights assets/tiny/pictures]

The frames of a scene have most things in common, so what a caption means is learnt from single ones
in a fraction of the time that videos take (image before video training, as video diffusion models
are usually made). The pictures are the latent frames of the pretrain manifest of a workspace,
encoded beforehand as for any training. Each step puts them at another time of a story, as rotary
positions let text see where a frame is. An interrupted run goes on from its last checkpoint.

Shape legend: B pictures, N samples, F latent frames of a sample, S scenes, C channels, H W latent
height and width, T text tokens, D text width.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.config.presets import toonworld
from schemas.config.training import TrainingConfig
from schemas.layout import Snapshot, Workspace
from schemas.storage import atomic_path, latest, write_json
from training.base_model import load_scheduler
from training.data import draw_int, draw_uniform
from training.datasets import open_dataset
from training.diffusion import diffusion_losses
from training.latents import scene_reader
from training.latents_job import encode_manifest
from training.positions import Timeline
from training.tiny.base import HEADS, LAYERS, make_toon_base, write_model
from training.tiny.muon import Muon
from training.transformer import Mask2DiTTransformer3DModel
from training.weights import load_transformer

log = logging.getLogger(__name__)

BATCH = 32
_LR, _MUON_LR, _DECAY, _WARMUP, _TEXT_DROPOUT = 2e-3, 1e-2, 0.03, 100, 0.1
_EVERY = 100
_NAME = "pictures"


@dataclass(frozen=True)
class Pictures:
    """Latent frames and what is told of them.

    Attributes:
        latents: (N, F, C, H, W) float16.
        texts: (N, S, T, D) float16.
        empty: (T, D) the empty caption.
    """

    latents: Tensor
    texts: Tensor
    empty: Tensor

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(B, 1, C, H, W) latents and (B, 1, T, D) texts of a step."""
        count, frames, scenes = *self.latents.shape[:2], self.texts.shape[1]
        numbers = [draw_int(_NAME, step, row) % (count * frames) for row in range(BATCH)]
        places = [(number // frames, number % frames) for number in numbers]
        latents = torch.stack([self.latents[n, f] for n, f in places])
        dropped = [draw_uniform(_NAME, "text", step, r) < _TEXT_DROPOUT for r in range(BATCH)]
        texts = [
            self.empty if drop else self.texts[n, f * scenes // frames]
            for (n, f), drop in zip(places, dropped, strict=True)
        ]
        return latents[:, None].float(), torch.stack(texts)[:, None].float()


def main() -> None:
    """Encode what is not encoded yet, train, and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workspace", type=Path, default=Path("build/toonworld"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="model folder to go on from; default: none")
    parser.add_argument("--weights", type=Path, help="also write the transformer in float16 here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    config = toonworld()
    shape = config.training.model.model_copy(update={"mask": "v1"})
    work = args.workspace / _NAME
    base = make_toon_base(work / "base", shape, LAYERS, HEADS)
    pictures = load_pictures(args.workspace, base, config.training)
    transformer = load_transformer(args.start or base)
    curve = train(transformer, pictures, base, args.steps, work / "checkpoint.ckpt")
    write_model(args.out, transformer)
    if args.weights is not None:
        transformer.half().save_pretrained(args.weights)
    write_json(work / "curve.json", curve)


def load_pictures(root: Path, base: Path, training: TrainingConfig) -> Pictures:
    """The pictures of the newest snapshot of a workspace.

    Raises:
        TriptychError: There is no snapshot, or nothing could be encoded.
    """
    workspace, curation = Workspace(root), toonworld().curation
    folder = latest(workspace.dataset(curation.dataset))
    assert folder is not None, f"no snapshot in {root}: run `triptych refresh -p toonworld` there"
    manifest = Snapshot(folder).manifest("pretrain")
    encode_manifest(training, manifest, base, workspace, scene_reader(workspace, curation.sources))
    data = open_dataset(training, manifest, base, workspace)
    latents = torch.stack([data.latents(n, 0).half() for n in range(len(data))])
    texts = torch.stack([data.text(n).half() for n in range(len(data))])
    log.info("pictures samples=%d frames=%d", len(data), latents.shape[1])
    return Pictures(latents, texts, data.text(0, dropped=True)[0].half())


def train(
    transformer: Mask2DiTTransformer3DModel,
    pictures: Pictures,
    base: Path,
    steps: int,
    checkpoint: Path,
) -> list[dict[str, float]]:
    """Train in place; gives the curve. What a step sees depends on its number alone."""
    scheduler = load_scheduler(base)
    optimizers = _optimizers(transformer)
    curve: list[dict[str, float]] = []
    first, seconds = 0, 0.0
    if checkpoint.is_file():
        state: Any = torch.load(checkpoint, weights_only=True)
        transformer.load_state_dict(state["transformer"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds, curve = state["step"], state["seconds"], state["curve"]
        log.info("pictures resumed step=%d of=%d", first, steps)
    transformer.train()
    losses: list[float] = []
    started = time.process_time() - seconds
    for step in range(first, steps):
        share = min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)
        loss = _loss(transformer, scheduler, pictures, step)
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
            log.info("pictures step=%d of=%d loss=%.4f cpu_s=%.0f", step + 1, steps, mean, seconds)
            losses.clear()
            state = {
                "transformer": transformer.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                **{"step": step + 1, "seconds": seconds, "curve": curve},
            }
            with atomic_path(checkpoint) as tmp:
                torch.save(state, tmp)
    return curve


def _optimizers(transformer: Mask2DiTTransformer3DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for what goes in, comes out and the rest."""
    inner = [p for p in transformer.transformer_blocks.parameters() if p.ndim == 2]
    outer = [p for p in transformer.parameters() if p not in {*inner}]
    return [
        Muon(inner, _MUON_LR, weight_decay=_DECAY),
        torch.optim.AdamW(outer, _LR, (0.9, 0.99), weight_decay=_DECAY),
    ]


def _loss(
    transformer: Mask2DiTTransformer3DModel, scheduler: Any, pictures: Pictures, step: int
) -> Tensor:
    latents, texts = pictures.batch(step)
    generator = torch.Generator().manual_seed(draw_int(_NAME, "noise", step))
    noise = torch.randn(latents.shape, generator=generator)
    # one timestep in each of B equal parts of all: a steadier loss than B free ones
    parts = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    timestep = (parts * scheduler.config.num_train_timesteps).long()
    at = draw_int(_NAME, "time", step) % pictures.latents.shape[1]

    def predict(noisy: Tensor, text: Tensor, t: Tensor, frames: Any, generated: Any) -> Tensor:
        return transformer(noisy, text, t, frames, generated, Timeline((at,), at + 1, 1))

    losses = diffusion_losses(predict, scheduler, latents, texts, noise, timestep, (1,))
    return losses.mean()


if __name__ == "__main__":
    main()
