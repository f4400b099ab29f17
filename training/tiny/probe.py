"""Train the probe that reads ToonWorld scenes back: ``python -m training.tiny.probe``.

Half of what it learns from is softened as autoencoders soften pictures, so that it reads generated
scenes as fairly as rendered ones.

Shape legend: B scenes, T frames, H W pixels.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from curation.toonworld.probe import (
    FRAMES,
    OF_ACTOR,
    WEIGHTS,
    Probe,
    load_probe,
    targets,
)
from curation.toonworld.world import ACTIONS, LIGHTS
from schemas.storage import atomic_path, fingerprint
from training.tiny.stories import HELD_OUT_SEED, TRAIN_SEED, load_stories

log = logging.getLogger(__name__)

Targets = dict[str, Tensor]
_LOG_EVERY = 50
_SAVE_EVERY = 100
_STATE = "probe-{}.ckpt"
_SPECKLE = 0.03
"""Noise of a softened scene at most, of the range from -1 to 1."""
_PARTS = 4
"""Pieces of a batch; each of the first half is softened in its own way."""
_SOFT = (0.7, 0.1, 0.02)
"""How held-out scenes are softened: size, blend, noise."""


def train(
    stories: Path, out: Path, count: int, steps: int, batch: int, rate: float, seed: int
) -> None:
    """Train and write ``probe.safetensors`` (float16).

    What a step sees follows from the seed and its number alone, and :data:`_STATE` beside the
    stories keeps what training is at: the same call goes on where a stopped one was.

    Args:
        stories: Cache of rendered stories.
        out: Folder of the weights.
        count: Stories to learn from.
        steps: Updates.
        batch: Scenes per update.
        rate: Largest learning rate.
        seed: Of everything random.
    """
    frames, wanted = _scenes(stories, TRAIN_SEED, count)
    torch.manual_seed(seed)
    probe = Probe().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(probe.parameters(), rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    kept = stories / _STATE.format(fingerprint(count, steps, batch, rate, seed)[:16])
    parts = {"probe": probe, "optimizer": optimizer, "schedule": schedule}
    done, spent = _resume(kept, parts)
    begun, shown = time.process_time() - spent, 0.0
    for step in range(done + 1, steps + 1):
        random.seed(f"{seed}/{step}")
        torch.manual_seed(random.getrandbits(62))
        rows = _rows(len(frames), batch, step, seed)
        pictures, answers = varied(
            torch.from_numpy(frames[rows]), {k: v[rows] for k, v in wanted.items()}
        )
        # Fewer frames than are looked at later, so a step costs less.
        looked_at = random.sample(range(FRAMES), 2)
        actors, scene = probe(pictures, looked_at)
        loss = objective(actors, scene, answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        shown += loss.item() / _LOG_EVERY
        if step % _LOG_EVERY == 0:
            log.info("probe step=%d loss=%.3f cpu_s=%.0f", step, shown, time.process_time() - begun)
            shown = 0.0
        if step % _SAVE_EVERY == 0 or step == steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            with atomic_path(kept) as tmp:
                torch.save({**state, "step": step, "cpu_s": time.process_time() - begun}, tmp)
    save(probe, out)


def _scenes(folder: Path, seed: int, count: int) -> tuple[npt.NDArray[np.uint8], Targets]:
    """(B, T, H, W, 3) all scenes of stories, in the frames that the probe sees, and their truth."""
    data = load_stories(folder, seed, count)
    frames = data.frames.reshape(-1, *data.frames.shape[2:])
    wanted = targets([shot for story in data.shots for shot in story])
    apart = (frames.shape[1] - 1) // (FRAMES - 1)
    return frames[:, ::apart], {name: torch.from_numpy(array) for name, array in wanted.items()}


def _rows(scenes: int, batch: int, step: int, seed: int) -> list[int]:
    """The scenes of a step; every scene comes once in each round."""
    per_round = scenes // batch
    turn, place = divmod(step - 1, per_round)
    order = np.random.default_rng((seed, turn)).permutation(scenes)
    return sorted(order[place * batch : (place + 1) * batch].tolist())


def _resume(path: Path, parts: Mapping[str, Any]) -> tuple[int, float]:
    """Fill the parts from a file, if there is one; steps and seconds of processor done before."""
    if not path.is_file():
        return 0, 0.0
    kept = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    log.info("probe resumed step=%d", kept["step"])
    return kept["step"], kept["cpu_s"]


def objective(actors: dict[str, Tensor], scene: dict[str, Tensor], wanted: Targets) -> Tensor:
    """Mean cross-entropy of all attributes, empty slots left out."""
    losses = [
        functional.cross_entropy(
            scores.flatten(0, -2), wanted[name].flatten(), ignore_index=-1, label_smoothing=0.02
        )
        for name, scores in (actors | scene).items()
    ]
    return torch.stack(losses).mean()


def varied(frames: Tensor, wanted: Targets) -> tuple[Tensor, Targets]:
    """Scenes (B, T, H, W, 3) uint8, changed in ways that keep their truth, as (B, T, 3, H, W)."""
    pictures = frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    half = len(pictures) // 2
    pictures = torch.cat([pictures[:half].flip(4), pictures[half:]])
    wanted = {name: torch.cat([_mirrored(name, w[:half]), w[half:]]) for name, w in wanted.items()}
    mixed = torch.randperm(len(pictures))
    pictures, wanted = pictures[mixed], {name: w[mixed] for name, w in wanted.items()}
    parts = list(pictures.chunk(_PARTS))
    for k in range(_PARTS // 2):
        parts[k] = soften(
            parts[k], random.uniform(0.6, 1), random.uniform(0, 0.2), _SPECKLE * random.random()
        )
    return _brightened(_moved(torch.cat(parts))), wanted


def soften(pictures: Tensor, size: float, blend: float, noise: float) -> Tensor:
    """Take detail away as an autoencoder does.

    Args:
        pictures: (B, T, 3, H, W).
        size: Share of the size they are reduced to and enlarged from again.
        blend: Share of each frame that comes from its two neighbours in time.
        noise: Standard deviation of what is added.
    """
    count, _, _, height, width = pictures.shape
    small = functional.interpolate(
        pictures.flatten(0, 1), (round(height * size), round(width * size)),
        mode="bilinear", antialias=True,
    )  # fmt: skip
    pictures = functional.interpolate(small, (height, width), mode="bicubic").unflatten(
        0, (count, -1)
    )
    around = torch.cat([pictures[:, :1], pictures, pictures[:, -1:]], dim=1)
    pictures = (1 - blend) * pictures + blend / 2 * (around[:, :-2] + around[:, 2:])
    return (pictures + noise * torch.randn_like(pictures)).clamp_(-1, 1)


def save(probe: Probe, out: Path) -> None:
    """Write the weights in half precision."""
    out.mkdir(parents=True, exist_ok=True)
    half = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in probe.state_dict().items()
    }
    with atomic_path(out / WEIGHTS) as tmp:
        save_file(half, tmp)


def _mirrored(name: str, wanted: Tensor) -> Tensor:
    """What a scene seen in a mirror shows."""
    if name in OF_ACTOR:
        wanted = wanted[:, [0, 2, 1]]
    swap = {"action": (ACTIONS, "walk_left", "walk_right"), "light": (LIGHTS, "morning", "evening")}
    if name not in swap:
        return wanted
    options, a, b = swap[name]
    one, other = (wanted == options.index(word) for word in (a, b))
    return wanted.masked_fill(one, options.index(b)).masked_fill(other, options.index(a))


def _moved(pictures: Tensor) -> Tensor:
    """All of a batch by the same few pixels; edges are repeated."""
    count = len(pictures)
    down, right = random.randrange(5), random.randrange(5)
    height, width = pictures.shape[3:]
    padded = functional.pad(pictures.flatten(0, 1), (2, 2, 2, 2), mode="replicate")
    return padded[:, :, down : down + height, right : right + width].unflatten(0, (count, -1))


def _brightened(pictures: Tensor) -> Tensor:
    """Each scene a little brighter or darker, with more or less contrast."""
    shape = (len(pictures), 1, 1, 1, 1)
    gain, lift = 1 + 0.08 * (torch.rand(shape) - 0.5), 0.06 * (torch.rand(shape) - 0.5)
    return (pictures * gain + lift).clamp_(-1, 1)


def measure(probe: Probe, stories: Path, count: int, softened: bool) -> dict[str, float]:
    """Share of held-out scenes or actors read right, per attribute.

    Args:
        probe: Trained.
        stories: Cache of rendered stories.
        count: Stories to read.
        softened: Read them softened by :data:`_SOFT`.
    """
    frames, wanted = _scenes(stories, HELD_OUT_SEED, count)
    torch.manual_seed(0)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    probe.eval()
    with torch.inference_mode():
        for part in np.array_split(np.arange(len(frames)), math.ceil(len(frames) / 30)):
            pictures = torch.from_numpy(frames[part]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
            pictures = soften(pictures, *_SOFT) if softened else pictures
            for scores in probe(pictures):
                for name, rows in scores.items():
                    found[name].append(rows.argmax(-1))
    return {
        name: float((torch.cat(said) == wanted[name])[wanted[name] >= 0].float().mean())
        for name, said in found.items()
    }


def main() -> None:
    """Train, then say how well held-out scenes are read."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="Train the probe that reads ToonWorld back.")
    parser.add_argument("--stories", type=Path, default=Path("build/tiny"))
    parser.add_argument("--out", type=Path, default=Path("assets/tiny/probe"))
    parser.add_argument("--count", type=int, default=4000, help="stories to learn from")
    parser.add_argument("--held-out", type=int, default=300, help="stories to measure on")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # One thread: the same weights on every run, and sums that do not depend on the machine's cores.
    torch.set_num_threads(1)
    train(args.stories, args.out, args.count, args.steps, args.batch, args.rate, args.seed)
    probe = load_probe(args.out)
    for softened in (False, True):
        shares = measure(probe, args.stories, args.held_out, softened)
        table = " ".join(f"{name}={share:.4f}" for name, share in shares.items())
        log.info("probe held_out=%d softened=%s mean=%.4f %s", args.held_out, softened,
                 fmean(shares.values()), table)  # fmt: skip


if __name__ == "__main__":
    main()
