"""Similarity models: what a clip looks like, and what a caption says, as unit vectors.

Shape legend: B clips, T frames, H W pixels, D vector length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ImageColor

from curation.video import Frames
from schemas.errors import ConfigError

Vector = npt.NDArray[np.float32]


class Embedder(Protocol):
    """A model that puts clips, and texts where it can, into one space of unit vectors."""

    @property
    def model_id(self) -> str:
        """Name and version, as stored in the ``embeddings`` table."""
        ...

    @property
    def weights_sha256(self) -> str:
        """Hash of the loaded weights, or ``"none"`` for a model without any."""
        ...

    @property
    def dim(self) -> int:
        """Vector length D."""
        ...

    @property
    def image_px(self) -> int:
        """Frames are given as squares of this many pixels."""
        ...

    def embed_clips(self, frames: Frames) -> Vector:
        """(B, T, H, W, 3) uint8 RGB to (B, D) float32 unit vectors."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> list[Vector | None]:
        """One (D,) unit vector per text, None where the model cannot say anything about it."""
        ...


class ColorLayout:
    """Where which colours are, early and late in the clip. A cheap real descriptor without weights.

    Frames go to CIE Lab. The clip is split into ``PARTS`` halves in time, each half averaged and
    reduced to the mean colours of a ``GRID`` x ``GRID`` grid. Lightness is centred on
    ``LIGHTNESS_CENTRE`` (or every pair of pictures would look alike), a and b are multiplied by
    ``CHROMA_WEIGHT`` (or lightness would drown them). One constant component ``BIAS`` keeps the
    vector of a mid-grey picture away from zero. The result is scaled to length one.

    Two grey clips are alike in this space, and a red and a green picture are not: it compares
    palettes and composition, not meaning. The constants are ours, chosen on ten real films:
    adjacent shots of one film have a mean cosine of 0.40, shots of different films 0.15; on the
    films in assets/samples 0.58 and 0.13.
    """

    GRID = 4
    PARTS = 2
    LIGHTNESS_CENTRE = 40.0
    CHROMA_WEIGHT = 2.0
    BIAS = 5.0

    model_id = "color-layout-1"
    weights_sha256 = "none"
    dim = PARTS * GRID * GRID * 3 + 1

    def __init__(self, image_px: int = 32) -> None:
        self.image_px = image_px

    def embed_clips(self, frames: Frames) -> Vector:
        """(B, T, H, W, 3) uint8 RGB to (B, D) float32 unit vectors; T >= 1, any H and W."""
        return np.stack([self._embed(clip) for clip in frames])

    def embed_texts(self, texts: Sequence[str]) -> list[Vector | None]:
        """The mean of the colours a text names, all over the picture.

        Words: CSS colour names, golden, dark, bright, night. None where a text names none.
        """
        return [self._embed_text(text) for text in texts]

    def _embed(self, clip: Frames) -> Vector:
        lab = np.stack([self._centred_lab(frame) for frame in clip])
        # A clip of one frame is early and late at once.
        halves = np.array_split(lab, self.PARTS) if len(lab) >= self.PARTS else [lab] * self.PARTS
        size = (self.GRID, self.GRID)
        cells = [cv2.resize(half.mean(0), size, interpolation=cv2.INTER_AREA) for half in halves]
        return self._unit(np.stack(cells))

    def _embed_text(self, text: str) -> Vector | None:
        words = re.findall(r"[a-z]+", text.lower())
        colours = [_COLOUR_WORDS[word] for word in words if word in _COLOUR_WORDS]
        if not colours:
            return None
        lab = self._centred_lab(np.array([colours], np.uint8)).mean((0, 1))
        return self._unit(np.broadcast_to(lab, (self.PARTS, self.GRID, self.GRID, 3)))

    def _centred_lab(self, rgb: Frames) -> Vector:
        lab = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
        lab -= np.array([self.LIGHTNESS_CENTRE, 0, 0], np.float32)
        lab *= np.array([1, self.CHROMA_WEIGHT, self.CHROMA_WEIGHT], np.float32)
        return np.asarray(lab, np.float32)

    def _unit(self, cells: npt.NDArray[np.floating]) -> Vector:
        """(PARTS, GRID, GRID, 3) to a unit vector; the bias weighs like BIAS in every cell."""
        bias = self.BIAS * np.sqrt(self.PARTS * self.GRID * self.GRID)
        vector = np.append(cells.astype(np.float64).ravel(), bias)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def _colour_words() -> dict[str, tuple[int, ...]]:
    words = {name: ImageColor.getrgb(name)[:3] for name in ImageColor.colormap}
    words |= {"golden": words["gold"], "dark": (30, 30, 30), "bright": (235, 235, 235)}
    words["night"] = (15, 20, 45)
    return words


_COLOUR_WORDS = _colour_words()


def load_embedder(name: str, image_px: int | None = None) -> Embedder:
    """The similarity model called ``name``; ``image_px`` sets its picture size where it has none.

    Raises:
        ConfigError: There is none of that name.
    """
    if name == "color-layout":
        return ColorLayout() if image_px is None else ColorLayout(image_px)
    raise ConfigError("unknown similarity model", found=name, expected="color-layout")


def spread_frames(start_frame: int, num_frames: int, count: int) -> list[int]:
    """``count`` frame numbers: the middles of equal parts of a span. A short one repeats frames."""
    return [start_frame + (2 * i + 1) * num_frames // (2 * count) for i in range(count)]
