"""Stories of ToonWorld as arrays: what the embedded models learn from and are measured on.

Shape legend: N stories, S scenes, T frames, H W pixels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld.captions import caption
from curation.toonworld.draws import Draw
from curation.toonworld.render import film, stage
from curation.toonworld.world import Shot, draw_episode
from curation.toonworld.write import LOOK
from schemas.storage import atomic_path, fingerprint

log = logging.getLogger(__name__)

TRAIN_SEED, HELD_OUT_SEED = 1, 2
"""Seeds of ToonWorld: nothing held out is ever trained on, by any of the embedded models."""
SCENES, FRAMES, FPS, PIXELS = 3, 9, 8, 64
_LOG_EVERY = 200


@dataclass(frozen=True)
class Stories:
    """The first shots of the first episodes of a seed.

    Attributes:
        frames: (N, S, T, H, W, 3) uint8, mapped from a file.
        shots: (N, S) what they show.
    """

    frames: npt.NDArray[np.uint8]
    shots: tuple[tuple[Shot, ...], ...]

    @property
    def captions(self) -> list[list[str]]:
        """(N, S) what is told of them."""
        return [[caption(shot) for shot in story] for story in self.shots]


def load_stories(folder: Path, seed: int, count: int) -> Stories:
    """Stories 0 to ``count`` of a seed, rendered on the first call, about 7 a second.

    Scenes are :data:`FRAMES` frames at :data:`FPS` from a random place of their shot. Every episode
    has three shots or more, so there is a story in each.

    Args:
        folder: Keeps the frames, 332 kB a story.
        seed: Of ToonWorld.
        count: How many, >= 1.
    """
    shots = tuple(draw_episode(seed, index).shots[:SCENES] for index in range(count))
    shape = (count, SCENES, FRAMES, PIXELS, PIXELS, 3)
    path = folder / f"stories-{fingerprint('stories', LOOK, seed, *shape)[:16]}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as tmp:
            _render(tmp, seed, shots, shape)
    return Stories(np.load(path, mmap_mode="r"), shots)


def film_scene(shot: Shot, *names: str | int, every: int = 1) -> npt.NDArray[np.uint8]:
    """(T, H, W, 3) a scene of a shot, or every second, third, ... frame of it.

    ``names`` say which scene, so that it is the same every time.
    """
    room = shot.seconds - (FRAMES - 1) / FPS
    start = Draw("scene", *names).number(0, max(0.0, room))
    return film(stage(shot, PIXELS, PIXELS), start + np.arange(0, FRAMES, every) / FPS)


def _render(path: Path, seed: int, shots: tuple[tuple[Shot, ...], ...], shape: Any) -> None:
    frames = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    for i, story in enumerate(shots):
        for k, shot in enumerate(story):
            frames[i, k] = film_scene(shot, seed, i, k)
        if (i + 1) % _LOG_EVERY == 0:
            log.info("stories seed=%d rendered=%d of=%d", seed, i + 1, len(shots))
    frames.flush()
