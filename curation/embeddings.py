"""Similarity models: what a clip looks like, and what a caption says, as unit vectors.

One without weights is here; ``curation.viclip`` and ``curation.openclip`` have the others.

Shape legend: B clips, T frames, H W pixels, D vector length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ImageColor

from curation.video import Frames, ResizeMode
from schemas.config.curation import EmbeddingConfig, SimilarityModelConfig
from schemas.errors import ConfigError

Vector = npt.NDArray[np.float32]

_VICLIP_FRAMES = 8
_WEIGHTS = {
    "viclip": "an official .pth or .safetensors file, or a folder with model.safetensors",
    "openclip": "a folder with open_clip_config.json and open_clip_model.safetensors",
}


@dataclass(frozen=True)
class ModelName:
    """What results depend on of a model, however it is run and wherever its weights lie.

    Attributes:
        model_id: As :class:`Embedder` has it.
        weights_sha256: Likewise.
        image_px: Where that can be chosen.
    """

    model_id: str
    weights_sha256: str
    image_px: int | None


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

    @property
    def mode(self) -> ResizeMode:
        """How frames are brought to that size."""
        ...

    def embed_clips(self, frames: Frames) -> Vector:
        """(B, T, H, W, 3) uint8 RGB to (B, D) float32 unit vectors."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> list[Vector | None]:
        """One (D,) unit vector per text, None where the model cannot say anything about it."""
        ...

    def text_chunks(self, text: str) -> int:
        """How many pieces a text is read in; 1 where it fits, or where the rest is cut off."""
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
    mode: ResizeMode = "stretch"

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

    def text_chunks(self, text: str) -> int:
        """Always 1: a text of any length is read at once."""
        return 1

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


def name_model(cfg: SimilarityModelConfig) -> ModelName:
    """What the configured model is called; weights are hashed, and not loaded.

    Raises:
        ConfigError: It needs weights that are not given, or not there, or another number of frames.
        CheckpointError: A folder with an OpenCLIP model lacks a file.
    """
    if cfg.model == "color-layout":
        model = _color_layout(cfg)
        return ModelName(model.model_id, model.weights_sha256, model.image_px)
    path = _weights(cfg)
    stats = tuple((p.as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(path))
    return _name_of_weights(cfg.model, path, stats)


def load_embedder(cfg: SimilarityModelConfig, device: str | None = None) -> Embedder:
    """The configured similarity model.

    Args:
        cfg: The section that asks for it.
        device: Where a model with weights runs; None = a GPU if this process sees one, else the
            CPU.

    Raises:
        ConfigError: It needs weights that are not given, or not there, or another number of frames.
        CheckpointError: Its weights cannot be used.
    """
    if cfg.model == "color-layout":
        return _color_layout(cfg)
    path = _weights(cfg)
    # torch takes seconds to import, also in child processes that decode for color-layout.
    if cfg.model == "viclip":
        from curation.viclip import ViCLIPEmbedder

        return ViCLIPEmbedder(path, cfg.long_text, device)
    from curation.openclip import OpenClipEmbedder

    return OpenClipEmbedder(path, cfg.long_text, device)


M = TypeVar("M", bound=SimilarityModelConfig)


def with_absolute_weights(cfg: M) -> M:
    """The same config for a worker, which may run in another folder."""
    if cfg.weights is None:
        return cfg
    return cfg.model_copy(update={"weights": str(Path(cfg.weights).absolute())})


def _color_layout(cfg: SimilarityModelConfig) -> ColorLayout:
    return ColorLayout(cfg.height_px) if isinstance(cfg, EmbeddingConfig) else ColorLayout()


def _weights(cfg: SimilarityModelConfig) -> Path:
    """Where the weights are, after a look at what else the model needs."""
    embeds = isinstance(cfg, EmbeddingConfig)
    section = "curation.embedding" if embeds else "evaluation"
    if cfg.weights is None or not Path(cfg.weights).exists():
        raise ConfigError(
            f"the similarity model {cfg.model} needs its weights",
            where=f"{section}.weights",
            found=cfg.weights or "nothing",
            expected=_WEIGHTS[cfg.model],
            do=f"set {section}.weights to where they are, or {section}.model to color-layout",
        )
    key = "frames_per_clip" if embeds else "frames_per_scene"
    frames = getattr(cfg, key, _VICLIP_FRAMES)
    if cfg.model == "viclip" and frames != _VICLIP_FRAMES:
        raise ConfigError(
            "ViCLIP is made for another number of frames",
            where=f"{section}.{key}",
            found=frames,
            expected=_VICLIP_FRAMES,
            do=f"set {section}.{key} to {_VICLIP_FRAMES}",
        )
    return Path(cfg.weights)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


@lru_cache(maxsize=4)
def _name_of_weights(model: str, path: Path, stats: tuple[tuple[str, int, int], ...]) -> ModelName:
    """Hashing gigabytes takes seconds, so once for each state (``stats``) of the files."""
    if model == "viclip":
        from curation.viclip import ViCLIPEmbedder, weights_hash

        return ModelName(ViCLIPEmbedder.model_id, weights_hash(path), None)
    from curation.openclip import OpenClipEmbedder, clip_hash

    return ModelName(OpenClipEmbedder.model_id, clip_hash(path), None)


def spread_frames(start_frame: int, num_frames: int, count: int) -> list[int]:
    """``count`` frame numbers: the middles of equal parts of a span. A short one repeats frames."""
    return [start_frame + (2 * i + 1) * num_frames // (2 * count) for i in range(count)]
