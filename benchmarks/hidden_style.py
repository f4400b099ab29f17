"""An experiment: what masks and conditional steps are worth when scenes share a hidden style.

Usage: python -m benchmarks.hidden_style [--steps 1000] [--train 1200] [--held-out 200]
    [--cells v1 ...] [--out build/bench/hidden_style.json]

A cell that was trained before, with as many steps and stories, is read back: several can be trained
side by side by calls with other ``--cells``.

Stories are three consecutive shots of a ToonWorld episode, three frames each, 64 x 64 pixels, made
latents of 8 x 8 by area-averaging to 16 x 16 and moving two by two pixels into channels (12). Texts
are the captions, word by word, each word a fixed random vector. Palette, light and paper are the
same in all shots of an episode and in no caption. Three small models (3 layers, width 96) learn
from the same stories, timesteps and noise: v1 (scenes apart), v2 (video sees all video), and v2
with half of the steps conditional (the last scene from the clean earlier ones).

Every model is then scored on held-out episodes at four fixed timesteps with fixed noise, plain
(all scenes noisy) and conditional (the loss of the last scene, given the others). Differences are
story by story, with bootstrap intervals of 95 %.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from curation.toonworld.captions import caption
from curation.toonworld.render import film, stage
from curation.toonworld.world import draw_episode
from schemas.storage import atomic_path
from training.base_model import SCHEDULER
from training.data import draw_int, draw_uniform
from training.diffusion import diffusion_losses
from training.noise import scene_noise
from training.transformer import Mask2DiTTransformer3DModel

SCENES, FRAMES, WORDS, WIDTH = 3, 3, 40, 64
CELLS = {"v1": ("v1", 0.0), "v2": ("v2", 0.0), "v2, half conditional": ("v2", 0.5)}
TIMESTEPS = (200, 450, 700, 950)
BATCH, LR = 16, 2e-3
TRAIN_SEED, HELD_OUT_SEED = 1, 2


def main() -> None:
    """Render, train the three, score them, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--train", type=int, default=1200, help="stories")
    parser.add_argument("--held-out", type=int, default=200, help="stories")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--out", type=Path, default=Path("build/bench/hidden_style.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    stories = load_stories(args.out.parent, TRAIN_SEED, args.train)
    held_out = load_stories(args.out.parent, HELD_OUT_SEED, args.held_out)
    mean, std = stories[0].mean(), stories[0].std()
    stories, held_out = ((((x - mean) / std), t) for x, t in (stories, held_out))
    print(
        f"{args.train} + {args.held_out} stories: {time.process_time() - started:.0f} s", flush=True
    )
    losses: dict[str, dict[str, Tensor]] = {}
    for name in args.cells:
        stored = args.out.with_name(
            f"hidden_style_{name.replace(', ', '_')}_{args.steps}_{args.train}_{args.held_out}.npz"
        )
        if not stored.is_file():
            model = train(stories, *CELLS[name], args.steps)
            found = {kind: score(model, held_out, kind == "conditional") for kind in KINDS}
            with atomic_path(stored) as tmp, tmp.open("wb") as file:
                np.savez(file, **{kind: values.numpy() for kind, values in found.items()})
        with np.load(stored) as file:
            losses[name] = {kind: torch.from_numpy(file[kind]) for kind in KINDS}
        means = {kind: round(float(x.mean()), 4) for kind, x in losses[name].items()}
        print(name, means, f"{time.process_time() - started:.0f} s", flush=True)
    result = {"settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows(losses)}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        print(row)


KINDS = ("plain", "conditional")


def load_stories(folder: Path, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Latents (stories, F, C, H, W) in 0 to 1, and texts (stories, S, words, width)."""
    file = folder / f"hidden_style_{seed}_{count}.npz"
    if not file.is_file():
        made = [_story(seed, index) for index in range(count)]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.stack([x for x, _ in made])
        np.savez(file, pixels=pixels, captions=np.array([json.dumps(c) for _, c in made]))
    with np.load(file) as stored:
        pixels = torch.from_numpy(stored["pixels"]).float() / 255
        captions = [json.loads(text) for text in stored["captions"]]
    texts = torch.stack([torch.stack([_text(c) for c in story]) for story in captions])
    return pixels, texts


def _story(seed: int, index: int) -> tuple[np.ndarray, list[str]]:
    shots = draw_episode(seed, index).shots[:SCENES]
    scenes: list[np.ndarray] = []
    for shot in shots:
        times = np.linspace(0.3, shot.seconds - 0.3, FRAMES)
        for frame in film(stage(shot, 64, 64), times):
            small = cv2.resize(frame, (16, 16), interpolation=cv2.INTER_AREA)
            cells = small.reshape(8, 2, 8, 2, 3).transpose(1, 3, 4, 0, 2)
            scenes.append(cells.reshape(12, 8, 8))
    return np.stack(scenes), [caption(shot) for shot in shots]


def _text(text: str) -> Tensor:
    words = text.lower().replace(".", " .").split()[:WORDS]
    return torch.stack([_word(w) for w in [*words, *[""] * (WORDS - len(words))]])


@cache
def _word(word: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7])
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def train(
    stories: tuple[Tensor, Tensor], mask: str, conditional_p: float, steps: int
) -> Mask2DiTTransformer3DModel:
    """A model of its own; what a step sees does not depend on the mask."""
    latents, texts = stories
    torch.manual_seed(0)
    model = Mask2DiTTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=12,
        out_channels=12,
        time_embed_dim=96,
        text_embed_dim=WIDTH,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=WORDS,
        use_rotary_positional_embeddings=False,
        mask=mask,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01)
    scheduler = _scheduler()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 100) * (1 - step / steps)
        rows = [draw_int("row", step, i) % len(latents) for i in range(BATCH)]
        seeds = [draw_int("noise", step, i) for i in range(BATCH)]
        timestep = torch.tensor([int(draw_uniform("t", step, i) * 1000) for i in range(BATCH)])
        generated = None
        if draw_uniform("conditional", step) < conditional_p:
            generated = torch.tensor([[False, False, True]] * BATCH)
        loss = _losses(model, scheduler, latents[rows], texts[rows], seeds, timestep, generated)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def score(
    model: Mask2DiTTransformer3DModel, stories: tuple[Tensor, Tensor], conditional: bool
) -> Tensor:
    """(stories, timesteps) losses with fixed noise."""
    latents, texts = stories
    scheduler = _scheduler()
    columns: list[Tensor] = []
    for t in TIMESTEPS:
        seeds = [draw_int("held out", t, i) for i in range(len(latents))]
        timestep = torch.full((len(latents),), t)
        generated = torch.tensor([[False, False, True]] * len(latents)) if conditional else None
        columns.append(_losses(model, scheduler, latents, texts, seeds, timestep, generated))
    return torch.stack(columns, 1)


def _losses(
    model: Any,
    scheduler: Any,
    latents: Tensor,
    texts: Tensor,
    seeds: list[int],
    timestep: Tensor,
    generated: Tensor | None,
) -> Tensor:
    frames = [FRAMES] * SCENES
    noise = torch.stack([scene_noise(seed, frames, latents.shape[2:]) for seed in seeds])
    return diffusion_losses(model, scheduler, latents, texts, noise, timestep, frames, generated)


def _scheduler() -> Any:
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

    settings: Any = SCHEDULER
    return CogVideoXDDIMScheduler(**settings)


def rows(losses: dict[str, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Means by timestep, and what is saved beside the first, story by story."""
    table: list[dict[str, Any]] = []
    for kind in KINDS:
        for name, found in losses.items():
            row: dict[str, Any] = {"kind": kind, "cell": name}
            row |= {
                f"t={t}": round(float(x), 4)
                for t, x in zip(TIMESTEPS, found[kind].mean(0), strict=True)
            }
            row["mean"] = round(float(found[kind].mean()), 4)
            for other in losses:
                if other != name:
                    saved = (losses[other][kind] - found[kind]).mean(1)
                    row[f"below {other}"] = [
                        round(v, 4) for v in (float(saved.mean()), *_interval(saved))
                    ]
            table.append(row)
    return table


def _interval(values: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (2000, len(values)), generator=generator)
    low, high = torch.quantile(values[picks].mean(1), torch.tensor([0.025, 0.975])).tolist()
    return low, high


if __name__ == "__main__":
    main()
