"""The latent and caption cache: which samples train, which frames are read, names of files.

Files are content-addressed: a key holds everything the content depends on (clip, frames, size,
encoder weights, type), so a changed model or setting never meets an old file and equal work is
never done twice.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from schemas.config.training import ModelConfig
from schemas.errors import ManifestError
from schemas.layout import Workspace
from schemas.rows import Sample, Scene
from schemas.storage import fingerprint, fingerprint_folder
from schemas.tables import SAMPLES, read_table

log = logging.getLogger(__name__)

TIME_COMPRESSION = 4
"""Frames per latent frame after the first one (CogVideoX's VAE)."""


def training_samples(manifest: Path, scenes: int) -> list[Sample]:
    """The samples of a manifest that are trained on: ``trainable`` ones of the ``train`` split.

    Args:
        manifest: A SAMPLES table.
        scenes: Scenes every sample must have.

    Raises:
        ManifestError: No sample is left, a sample has another number of scenes, or the table is not
            readable.
    """
    samples = read_table(manifest, SAMPLES)
    kept = [s for s in samples if s.trainable and s.split == "train"]
    if not kept:
        splits = dict(Counter(s.split for s in samples))
        raise ManifestError(
            "the manifest has nothing to train on",
            where=manifest,
            found=f"{len(samples)} samples, {sum(s.trainable for s in samples)} of them trainable; "
            f"splits {splits}",
            expected="at least one trainable sample in split 'train'",
            do="add source videos, or loosen curation's similarity threshold and length rules",
        )
    wrong = next((s for s in kept if len(s.scenes) != scenes), None)
    if wrong is not None:
        raise ManifestError(
            "a sample has another number of scenes than the model is trained on",
            where=f"{manifest}, sample {wrong.sample_id}",
            found=len(wrong.scenes),
            expected=f"{scenes} (training.model.scenes)",
            do="set curation.windows.scenes_per_sample and training.model.scenes alike",
        )
    return kept


def choose_frames(num_frames: int, wanted: int, max_stride: int) -> tuple[int, ...] | None:
    """Frames to read from a scene, counted from its first; None where it is too short.

    The largest stride <= ``max_stride`` with ``(wanted - 1) * stride <= num_frames - 1``. The
    official trainer then starts at a random frame at every visit; we start so that the span is
    centred, always the same, so that a scene is encoded once.

    Source: facts of the official SFT dataset class (Mask2DiT repository).
    """
    if num_frames < wanted:
        return None
    stride = min(max_stride, (num_frames - 1) // (wanted - 1)) if wanted > 1 else 1
    start = (num_frames - 1 - (wanted - 1) * stride) // 2
    return tuple(start + i * stride for i in range(wanted))


@dataclass(frozen=True)
class LatentCache:
    """Names the cache files for one model folder and one shape of training data.

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
    def latent_frames(self) -> int:
        """Latent frames of one scene."""
        return (self.shape.frames - 1) // TIME_COMPRESSION + 1

    def frames(self, scene: Scene) -> tuple[int, ...] | None:
        """Frame numbers to read, in the source; None where the scene is too short."""
        chosen = choose_frames(scene.num_frames, self.shape.frames, self.shape.max_stride)
        return None if chosen is None else tuple(scene.start_frame + i for i in chosen)

    def scene_file(self, scene: Scene) -> Path:
        """Where the latents of a scene are kept: ``latents`` (F, C, H, W)."""
        key = fingerprint(
            scene.clip_id,
            self.frames(scene),
            self.shape.height_px,
            self.shape.width_px,
            self.vae_sha256,
            self.dtype,
        )
        return self.workspace.cache("latents") / f"{key}.safetensors"

    def failure_file(self, scene: Scene) -> Path:
        """Where it is written down that a scene could not be encoded, and why."""
        return self.scene_file(scene).with_suffix(".failed.json")

    def caption_file(self, caption: str) -> Path:
        """Where the text embedding of a caption is kept: ``text`` (T, text width)."""
        key = fingerprint(caption, self.text_sha256, self.shape.text_tokens, self.dtype)
        return self.workspace.cache("captions") / f"{key}.safetensors"

    def split_by_readiness(self, samples: list[Sample]) -> tuple[list[Sample], int]:
        """Samples that can be read, and how many are left out for a scene that cannot be encoded.

        Raises:
            ManifestError: A scene or caption was never encoded.
        """
        ready: list[Sample] = []
        missing: list[str] = []
        left_out = 0
        for sample in samples:
            if any(self.frames(s) is None or self.failure_file(s).is_file() for s in sample.scenes):
                left_out += 1
                continue
            files = [self.scene_file(s) for s in sample.scenes]
            files += [self.caption_file(c) for c in ["", *(s.caption for s in sample.scenes)]]
            if all(f.is_file() for f in files):
                ready.append(sample)
            else:
                missing.append(sample.sample_id)
        if missing:
            raise ManifestError(
                "samples are not encoded yet",
                where=f"samples {', '.join(missing[:3])}",
                found=f"{len(missing)} of {len(samples)} samples lack latents or text embeddings",
                expected="every scene and caption in the workspace's cache",
                do="run training.latents.encode_manifest on this manifest first",
            )
        return ready, left_out
