"""Reading a scene's attributes back from its frames by a small trained network.

It says how many actors are seen, who they are, what they wear and do, the place, and the hidden
style but for the texture, which is measured (``measure.py``): its faint pattern is known exactly.
Framing is not read: no caption tells it.

Two paths share a scene. Looks: a few whole frames, each through the same convolutions. Motion: all
frames at half size, laid on one another as channels, so that their order is seen. From the features
of both, learned places to look at gather one vector per *slot*: the lone actor, the left one of two
and the right one.

Shape legend: B scenes, T frames, K frames looked at, H W pixels, h w cells of a feature map, C
channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from curation.toonworld.measure import measure_texture
from curation.toonworld.world import (
    ACCESSORIES,
    ACTIONS,
    BUILDS,
    COLORS,
    LIGHTS,
    OUTLINES,
    PALETTES,
    PLACES,
    SPECIES,
    Action,
    Actor,
    Place,
    Shot,
    Style,
    Texture,
)
from curation.weights import check_filled, check_weights, read_weights
from schemas.errors import InputError

FRAMES, PIXELS = 5, 64
"""What it sees, a quarter of a second apart; other lengths and sizes are brought to these."""
WEIGHTS = "probe.safetensors"
SLOTS = ("alone", "left", "right")
OF_ACTOR: dict[str, tuple[str, ...]] = {
    "species": SPECIES,
    "color": COLORS,
    "accessory": ACCESSORIES,
    "accessory_color": COLORS,
    "action": ACTIONS,
}
"""Per attribute of an actor, what it can be."""
OF_SCENE: dict[str, tuple[str, ...]] = {
    "actors": ("1", "2"),
    "place": PLACES,
    "palette": PALETTES,
    "outline": OUTLINES,
    "build": BUILDS,
    "light": LIGHTS,
}
STYLE = tuple(Style.__dataclass_fields__)
_CELLS = PIXELS // 8
_ALONE, _PAIR = 6, 5
"""Columns of cells where a lone actor is, and where one of two is."""


@dataclass(frozen=True)
class Reading:
    """What a scene shows, as far as its frames tell.

    Attributes:
        acts: Per actor, from left to right, who it is and what it does.
        place: Where.
        style: The hidden style.
    """

    acts: tuple[tuple[Actor, Action], ...]
    place: Place
    style: Style


class Probe(nn.Module):
    """The network: frames to one row of scores per attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_block(3, 24, 5, 2), _block(24, 48, 3, 2), _block(48, 48))
        self.coarse = nn.Sequential(_block(48, 96, 3, 2), _block(96, 128))
        self.motion = nn.Sequential(
            _block(3 * FRAMES, 48, 5, 2), _block(48, 64, 3, 2), _block(64, 64)
        )
        self.look_slots, self.motion_slots = Slots(128, 32, 128), Slots(64, 32, 96)
        looked = 128 + 2 * 128 + 2 * 48
        self.actor = _hidden(looked + 96 + 2 * 64, 256)
        self.squeeze = _block(128, 24, 1)
        self.scene = _hidden(24 * _CELLS**2 + len(SLOTS) * looked, 160)
        self.actor_heads = nn.ModuleDict({k: nn.Linear(256, len(v)) for k, v in OF_ACTOR.items()})
        self.scene_heads = nn.ModuleDict({k: nn.Linear(160, len(v)) for k, v in OF_SCENE.items()})

    def forward(
        self, frames: Tensor, looked_at: Sequence[int] = range(FRAMES)
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores of all attributes.

        Args:
            frames: (B, T, 3, H, W) from -1 to 1, of :data:`FRAMES` frames of :data:`PIXELS`.
            looked_at: Which frames are looked at in full.

        Returns:
            Per attribute of an actor (B, slots, options), per attribute of a scene (B, options).
        """
        shape = len(frames), len(looked_at)
        looked = frames[:, list(looked_at)].flatten(0, 1)
        fine = self.fine(looked.contiguous(memory_format=torch.channels_last))
        looks = self.coarse(fine)
        small = functional.avg_pool2d(frames.flatten(1, 2), 2)
        motion = self.motion(small.contiguous(memory_format=torch.channels_last))
        # What shows in one frame only, such as a face that turns away, is kept.
        seen = torch.cat([self.look_slots(looks), _pooled(looks), _pooled(fine)], dim=2)
        seen = seen.unflatten(0, shape).amax(1)
        slots = self.actor(torch.cat([seen, self.motion_slots(motion), _pooled(motion)], dim=2))
        whole = self.squeeze(looks).unflatten(0, shape).mean(1).flatten(1)
        scene = self.scene(torch.cat([whole, seen.flatten(1)], dim=1))
        return (
            {name: head(slots) for name, head in self.actor_heads.items()},
            {name: head(scene) for name, head in self.scene_heads.items()},
        )


class Slots(nn.Module):
    """One vector per slot of what there is at each place of it."""

    def __init__(self, channels: int, squeezed: int, width: int) -> None:
        super().__init__()
        self.squeeze = _block(channels, squeezed, 1)
        self.alone, self.pair = (
            nn.Linear(squeezed * _CELLS * columns, width) for columns in (_ALONE, _PAIR)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, slots, width)."""
        cells = self.squeeze(features)
        alone, left, right = _parts(cells)
        rows = [
            self.alone(alone.flatten(1)),
            self.pair(left.flatten(1)),
            self.pair(right.flatten(1)),
        ]
        return functional.relu(torch.stack(rows, dim=1))


def load_probe(folder: Path) -> Probe:
    """The trained probe of a folder.

    Raises:
        CheckpointError: The weights cannot be read, or are not those of this network.
    """
    path = folder / WEIGHTS
    probe = Probe()
    state = read_weights(path)
    check_weights(path, state, probe.state_dict(), "the ToonWorld probe")
    probe.load_state_dict(state)
    check_filled(path, probe, "the ToonWorld probe")
    return probe.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.inference_mode()
def read_scenes(
    probe: Probe, scenes: Sequence[npt.NDArray[np.uint8]], batch: int = 32
) -> list[Reading]:
    """Read scenes.

    Args:
        probe: From :func:`load_probe`; it may be on any device.
        scenes: Each (T, H, W, 3), without transitions.
        batch: How many are read at once.

    Raises:
        InputError: Something is not the frames of a scene.
    """
    device = next(probe.parameters()).device
    readings: list[Reading] = []
    for start in range(0, len(scenes), batch):
        frames = torch.stack([_resampled(frames) for frames in scenes[start : start + batch]])
        actors, scene = probe(frames.to(device).float().div_(127.5).sub_(1))
        best = {name: scores.argmax(-1).tolist() for name, scores in (actors | scene).items()}
        pictures = frames.permute(0, 1, 3, 4, 2).numpy()
        readings += [_reading(best, i, measure_texture(p)) for i, p in enumerate(pictures)]
    return readings


def targets(shots: Sequence[Shot]) -> dict[str, npt.NDArray[np.int64]]:
    """What the probe should say of shots.

    Returns:
        Per attribute of an actor (B, slots), -1 where a slot is empty; per attribute of a scene
        (B,).
    """
    wanted = {name: np.full((len(shots), len(SLOTS)), -1) for name in OF_ACTOR}
    wanted |= {name: np.zeros(len(shots), np.int64) for name in OF_SCENE}
    for i, shot in enumerate(shots):
        for slot, act in zip(_slots(len(shot.acts)), shot.acts, strict=True):
            told = {**vars(act.actor), "action": act.action}
            for name, options in OF_ACTOR.items():
                wanted[name][i, slot] = options.index(told[name])
        shown = {"actors": str(len(shot.acts)), "place": shot.place, **vars(shot.style)}
        for name, options in OF_SCENE.items():
            wanted[name][i] = options.index(shown[name])
    return wanted


def _slots(actors: int) -> tuple[int, ...]:
    return (0,) if actors == 1 else (1, 2)


def _reading(best: Mapping[str, Any], i: int, texture: Texture) -> Reading:
    def said(name: str) -> Any:
        return OF_SCENE[name][best[name][i]]

    acts: list[tuple[Actor, Action]] = []
    for slot in _slots(int(said("actors"))):
        *who, action = (OF_ACTOR[name][best[name][i][slot]] for name in OF_ACTOR)
        acts.append((Actor(*who), action))  # type: ignore[arg-type]
    style = Style(
        palette=said("palette"),
        outline=said("outline"),
        texture=texture,
        build=said("build"),
        light=said("light"),
    )
    return Reading(tuple(acts), said("place"), style)


def _resampled(frames: npt.NDArray[np.uint8]) -> Tensor:
    """(T, 3, H, W) uint8 in the length and size that the probe sees."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise InputError(
            "these are not the frames of a scene",
            found=f"{frames.dtype} of shape {frames.shape}",
            expected="uint8 of shape (frames, height, width, 3)",
        )
    picked = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    pictures = torch.from_numpy(np.ascontiguousarray(frames[picked])).permute(0, 3, 1, 2)
    if pictures.shape[2:] == (PIXELS, PIXELS):
        return pictures
    resized = functional.interpolate(
        pictures.float(), (PIXELS, PIXELS), mode="bilinear", antialias=True
    )
    return resized.round().clamp(0, 255).to(torch.uint8)


def _parts(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of a feature map in which the actor of each slot stands."""
    columns = features.shape[3]
    pair, edge = columns * _PAIR // _CELLS, columns * (_CELLS - _ALONE) // (2 * _CELLS)
    return features[..., edge:-edge], features[..., :pair], features[..., -pair:]


def _pooled(features: Tensor) -> Tensor:
    """(B, slots, 2 C): what there is in each slot, wherever exactly, and how much of it."""
    return torch.stack(
        [torch.cat([part.amax((2, 3)), part.mean((2, 3))], dim=1) for part in _parts(features)],
        dim=1,
    )


def _block(channels: int, out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


def _hidden(width: int, out: int) -> nn.Sequential:
    layers = (nn.LayerNorm(width), nn.Linear(width, out), nn.ReLU(inplace=True), nn.Dropout(0.1))
    return nn.Sequential(*layers)
