"""The latent and caption cache: which samples train, which frames are read, names of the folders.

Folders and keys are content-addressed: they hold everything the content depends on (clip, frames,
size, encoder weights, type), so a changed model or setting never meets an old file and equal work
is never done twice. What lies in a folder is :mod:`training.shards`.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from schemas.arrow_compute import pc
from schemas.config.training import ModelConfig, TrainingConfig
from schemas.errors import CheckpointError, ManifestError
from schemas.layout import Workspace
from schemas.rows import Sample, Scene
from schemas.storage import fingerprint, fingerprint_folder, read_json
from schemas.tables import SAMPLES, from_arrow, read_arrow
from training.shards import Shards

log = logging.getLogger(__name__)

ENCODING_VERSION = 2
"""Raise when the same inputs give other tensors or other names, so that old files are not read."""


def training_samples(manifest: Path, scenes: int, split: str = "train") -> list[Sample]:
    """The samples of a manifest that are trained on: ``trainable`` ones of a split.

    Args:
        manifest: A SAMPLES table.
        scenes: Scenes every sample must have.
        split: ``train``, or ``val``, which may be empty.

    Raises:
        ManifestError: No sample is left in ``train``, a sample has another number of scenes, or the
            table is not readable.
    """
    table = read_arrow(manifest, SAMPLES)
    kept = table.filter(pc.and_(table["trainable"], pc.equal(table["split"], split)))
    if split == "train" and not kept.num_rows:
        splits = dict(Counter(table["split"].to_pylist()))
        raise ManifestError(
            "the manifest has nothing to train on",
            where=manifest,
            found=f"{table.num_rows} samples, {pc.sum(table['trainable']).as_py() or 0} of them "
            f"trainable; splits {splits}",
            expected="at least one trainable sample in split 'train'",
            do="add source videos, or loosen curation's similarity threshold and length rules",
        )
    samples = from_arrow(SAMPLES, kept)
    wrong = next((s for s in samples if len(s.scenes) != scenes), None)
    if wrong is not None:
        raise ManifestError(
            "a sample has another number of scenes than the model is trained on",
            where=f"{manifest}, sample {wrong.sample_id}",
            found=len(wrong.scenes),
            expected=f"{scenes} (training.model.scenes)",
            do="set curation.windows.scenes_per_sample and training.model.scenes alike",
        )
    return samples


def choose_frames(
    num_frames: int, wanted: int, max_stride: int, draw: int | None = None
) -> tuple[int, ...] | None:
    """Frames to read from a scene, counted from its first; None where it is too short.

    The largest stride <= ``max_stride`` with ``(wanted - 1) * stride <= num_frames - 1``. The
    official trainer then starts at a random frame at every visit, as we do with a ``draw``;
    without one the span is centred, always the same, so that a scene is encoded once.

    Args:
        num_frames: Frames the scene has.
        wanted: Frames to choose.
        max_stride: Largest step between two of them.
        draw: A random integer >= 0, large beside ``num_frames``; None = the span in the middle.

    Source: facts of the official SFT dataset class (Mask2DiT repository).
    """
    if num_frames < wanted:
        return None
    stride = min(max_stride, (num_frames - 1) // (wanted - 1)) if wanted > 1 else 1
    room = num_frames - 1 - (wanted - 1) * stride
    start = room // 2 if draw is None else draw % (room + 1)
    return tuple(start + i * stride for i in range(wanted))


@dataclass(frozen=True)
class LatentCache:
    """Names what is in the cache for one model folder and one shape of training data.

    Attributes:
        workspace: Where the cache lies.
        model: Model folder whose VAE, tokenizer and text encoder are used.
        shape: Frames, size, stride and text length.
        dtype: ``float32`` or ``bfloat16``, the type of what is stored.
    """

    workspace: Workspace
    model: Path
    shape: ModelConfig
    dtype: str

    @classmethod
    def of(cls, config: TrainingConfig, model: Path, workspace: Workspace) -> LatentCache:
        """The cache of a training."""
        return cls(workspace, model, config.model, config.dtype)

    @cached_property
    def vae_sha256(self) -> str:
        """Fingerprint of the VAE's config and weights."""
        return fingerprint_folder(self.model / "vae")

    @cached_property
    def text_sha256(self) -> str:
        """Fingerprint of the tokenizer and the text encoder."""
        return fingerprint(
            fingerprint_folder(self.model / "tokenizer"),
            fingerprint_folder(self.model / "text_encoder"),
        )

    @property
    def scene_folder(self) -> Path:
        """Scenes of this size, VAE and type."""
        size = (self.shape.height_px, self.shape.width_px)
        key = fingerprint(ENCODING_VERSION, size, self.vae_sha256, self.dtype)
        return self.workspace.cache("latents") / key

    @property
    def caption_folder(self) -> Path:
        """Captions of this length, text encoder and type."""
        key = fingerprint(ENCODING_VERSION, self.shape.text_tokens, self.text_sha256, self.dtype)
        return self.workspace.cache("texts") / key

    def scene_key(self, scene: Scene) -> str:
        """What a scene's tensors are found by in :attr:`scene_folder`."""
        return fingerprint(scene.clip_id, self.frames(scene))

    def caption_key(self, caption: str) -> str:
        """What a caption's tensor is found by in :attr:`caption_folder`."""
        return fingerprint(caption)

    def frames(self, scene: Scene, draw: int | None = None) -> tuple[int, ...] | None:
        """Frame numbers to read, in the source; None where the scene is too short for any length.

        The first of ``shape.lengths`` that the scene can fill decides how many.

        Args:
            scene: A scene of a sample.
            draw: As in :func:`choose_frames`.
        """
        for wanted in self.shape.lengths:
            chosen = choose_frames(scene.num_frames, wanted, self.shape.max_stride, draw)
            if chosen is not None:
                return tuple(scene.start_frame + i for i in chosen)
        return None

    def latent_frames(self, scene: Scene) -> int:
        """Latent frames of a scene; 0 where it is too short."""
        frames = self.frames(scene)
        return 0 if frames is None else self.encoded_frames(len(frames))

    def encoded_frames(self, frames: int) -> int:
        """Latent frames of so many frames, 1 or more."""
        return (frames - 1) // self.time_compression + 1

    @cached_property
    def time_compression(self) -> int:
        """Frames per latent frame after the first one; CogVideoX: 4."""
        return int(self._read_config("vae")["temporal_compression_ratio"])

    @cached_property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by before the transformer sees them."""
        return float(self._read_config("vae")["scaling_factor"])

    @cached_property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent frame."""
        config = self._read_config("vae")
        ratio = 2 ** (len(config["block_out_channels"]) - 1)
        shape = self.shape
        return config["latent_channels"], shape.height_px // ratio, shape.width_px // ratio

    @cached_property
    def text_shape(self) -> tuple[int, int]:
        """(T, text width) of one caption."""
        return self.shape.text_tokens, int(self._read_config("text_encoder")["d_model"])

    def _read_config(self, piece: str) -> dict[str, Any]:
        path = self.model / piece / "config.json"
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the config of the {piece} cannot be read",
                where=path,
                found=error,
                do="give a whole model folder in diffusers' CogVideoX layout",
            ) from error

    def split_by_readiness(
        self, samples: list[Sample], scenes: Shards, captions: Shards
    ) -> tuple[list[Sample], int]:
        """Samples that can be read, and how many are left out for a scene that cannot be encoded.

        Args:
            samples: Of a manifest.
            scenes: What is in :attr:`scene_folder`.
            captions: What is in :attr:`caption_folder`.

        Raises:
            ManifestError: A scene or caption was never encoded.
        """
        ready: list[Sample] = []
        missing: list[str] = []
        left_out = 0
        for sample in samples:
            keys = [self.scene_key(s) for s in sample.scenes]
            too_short = any(self.frames(s) is None for s in sample.scenes)
            if too_short or any(scenes.failure(key) for key in keys):
                left_out += 1
                continue
            texts = [self.caption_key(c) for c in ("", *(s.caption for s in sample.scenes))]
            if all(k in scenes for k in keys) and all(k in captions for k in texts):
                ready.append(sample)
            else:
                missing.append(sample.sample_id)
        if missing:
            raise ManifestError(
                "samples are not encoded yet",
                where=f"samples {', '.join(missing[:3])}",
                found=f"{len(missing)} of {len(samples)} samples lack latents or text embeddings",
                expected="every scene and caption in the workspace's cache",
                do="run training.latents_job.encode_manifest on this manifest first",
            )
        return ready, left_out
