"""What the embedded DiT learns from: scenes of ToonWorld as latents, and the batches of its stages.

Where frames stand alone, each step puts them at other times of a story, as rotary positions let
text see where a frame is. Half of the rows of stories have the last scene generated from the
others, which stay clean.

Shape legend: B rows, N scenes of the data, S scenes of a row, F latent frames of a scene, T = S
times the frames taken of each, C channels, H W latent height and width, K text tokens, D text
width.
"""

from __future__ import annotations

import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from curation.toonworld.captions import caption
from curation.toonworld.world import draw_episode
from curation.toonworld.write import LOOK
from schemas.config.presets import toonworld
from schemas.storage import atomic_path, fingerprint, fingerprint_folder
from training.base_model import load_text_encoder, load_tokenizer, load_vae
from training.data import draw_int, draw_uniform
from training.latents import encode_texts
from training.tiny.stories import SCENES, TRAIN_SEED, film_scene

log = logging.getLogger(__name__)

_TEXT_DROPOUT, _CONDITIONAL = 0.1, 0.5
_NAME = "dit"
_CHUNK = 50
"""Episodes of one piece of work."""


@dataclass(frozen=True)
class Batch:
    """What a step sees: one row or more.

    Attributes:
        latents: (B, T, C, H, W) frames of the scenes, one after the other.
        texts: (B, S, K, D).
        generated: (B, S) bool; scenes that are False stay clean. None: all are generated.
        positions: When in a story each of the T frames is.
    """

    latents: Tensor
    texts: Tensor
    generated: Tensor | None
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Scenes:
    """Latent frames of scenes and what is told of them; every SCENES of them are a story.

    Attributes:
        latents: (N, F, C, H, W) float16.
        texts: (N, K, D) float16.
        empty: (K, D) the empty caption.
    """

    latents: Tensor
    texts: Tensor
    empty: Tensor


@dataclass(frozen=True)
class Rows:
    """How the batches of a stage are made of scenes. What a step sees depends on its number alone.

    Attributes:
        data: The scenes.
        scenes: S, of a row: 1, or those of a story, in any order.
        frames: Of each scene in a row: 1, any one, or all F.
    """

    data: Scenes
    scenes: int = 1
    frames: int = 1

    @property
    def count(self) -> int:
        """B: as many as make 32 frames, but four at least."""
        return max(4, 32 // (self.scenes * self.frames))

    def batch(self, step: int) -> Batch:
        """What a step sees."""
        chosen = [self._choose(step, row) for row in range(self.count)]
        latents = [
            torch.cat([self._frames(scene, step, row) for scene in scenes])
            for row, scenes in enumerate(chosen)
        ]
        dropped = [draw_uniform(_NAME, "text", step, r) < _TEXT_DROPOUT for r in range(self.count)]
        texts = [
            self.data.empty.expand(self.scenes, -1, -1) if drop else self.data.texts[scenes]
            for scenes, drop in zip(chosen, dropped, strict=True)
        ]
        generated = None
        if self.scenes > 1:
            generated = torch.ones(self.count, self.scenes, dtype=torch.bool)
            for row in range(self.count):
                given = draw_uniform(_NAME, "given", step, row) < _CONDITIONAL
                generated[row, :-1] = not given
        all_texts = torch.stack(texts).float()
        return Batch(torch.stack(latents).float(), all_texts, generated, self._positions(step))

    def _choose(self, step: int, row: int) -> list[int]:
        count = len(self.data.latents)
        scene = draw_int(_NAME, step, row) % count
        if self.scenes == 1:
            return [scene]
        first = scene // SCENES * SCENES
        story = range(first, first + SCENES)
        return sorted(story, key=lambda n: draw_int(_NAME, "order", step, row, n))

    def _frames(self, scene: int, step: int, row: int) -> Tensor:
        latents = self.data.latents[scene]
        if self.frames == len(latents):
            return latents
        at = draw_int(_NAME, "frame", step, row, scene) % len(latents)
        return latents[at : at + 1]

    def _positions(self, step: int) -> tuple[int, ...]:
        whole = self.data.latents.shape[1]
        first = draw_int(_NAME, "place", step) % (SCENES - self.scenes + 1)
        starts = [(first + scene) * whole for scene in range(self.scenes)]
        if self.frames == whole:
            return tuple(start + at for start in starts for at in range(whole))
        return tuple(start + draw_int(_NAME, "time", step, start) % whole for start in starts)


def encoded_scenes(folder: Path, base: Path, episodes: int, processes: int) -> Scenes:
    """The first scenes of the first episodes, drawn and encoded on the first call.

    Args:
        folder: Keeps the latents, 123 kB a story.
        base: Model folder whose VAE, tokenizer and text encoder encode them.
        episodes: How many.
        processes: That draw and encode side by side, about ten scenes a second each.
    """
    pieces = [fingerprint_folder(base / name) for name in ("vae", "text_encoder", "tokenizer")]
    key = fingerprint("scenes", LOOK, TRAIN_SEED, SCENES, episodes, *pieces)[:16]
    path = folder / f"scenes-{key}.safetensors"
    if not path.is_file():
        chunks = [range(k, min(k + _CHUNK, episodes)) for k in range(0, episodes, _CHUNK)]
        latents: list[Tensor] = []
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            for part in pool.map(_encode_episodes, [base] * len(chunks), chunks):
                latents.append(torch.from_numpy(part))
                log.info("scenes encoded=%d of=%d", sum(map(len, latents)), SCENES * episodes)
        shots = [draw_episode(TRAIN_SEED, k).shots[:SCENES] for k in range(episodes)]
        told = ["", *(caption(shot) for story in shots for shot in story)]
        length = toonworld().training.model.text_tokens
        with torch.no_grad():
            texts = encode_texts(load_tokenizer(base), load_text_encoder(base), told, length).half()
        tensors = {
            "latents": torch.cat(latents),
            "texts": texts[1:].clone(),
            "empty": texts[0].clone(),
        }
        with atomic_path(path) as tmp:
            save_file(tensors, tmp)
    return Scenes(**load_file(path))


@torch.inference_mode()
def _encode_episodes(base: Path, episodes: range) -> npt.NDArray[np.float16]:
    """(N, F, C, H, W) float16 latents times the scaling factor, as numpy: it crosses processes."""
    torch.set_num_threads(1)
    vae = load_vae(base)
    step, scale = toonworld().training.model.max_stride, cast("Any", vae.config).scaling_factor
    latents: list[Tensor] = []
    for k in episodes:
        shots = draw_episode(TRAIN_SEED, k).shots[:SCENES]
        films = [film_scene(shot, TRAIN_SEED, k, n, every=step) for n, shot in enumerate(shots)]
        video = torch.from_numpy(np.stack(films)).permute(0, 4, 1, 2, 3).to(vae.dtype)
        mean = cast("Any", vae.encode(video / 127.5 - 1.0)).latent_dist.mean  # (S, C, F, H, W)
        latents.append((mean * scale).transpose(1, 2).half())
    return torch.cat(latents).numpy()
