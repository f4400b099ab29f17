"""Encode a manifest once: every distinct scene through the VAE, every distinct caption through T5.

Training then reads latents and never touches video, VAE or text encoder. Runs are incremental: what
is in the cache is reused. A scene that cannot be read ends as a reject, with its id and reason.

Legend: F latent frames of a scene, C channels, H W latent height width, T text tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from safetensors.torch import save_file
from torch import Tensor

from curation.inputs.downloads import Downloads
from curation.video import read_frames
from schemas.config.curation import SourcesConfig
from schemas.config.training import TrainingConfig
from schemas.counts import StageCount, count_reasons
from schemas.errors import InputError, VideoDecodeError
from schemas.layout import Workspace
from schemas.rows import Reject, Scene
from schemas.storage import atomic_path, write_json
from training.base_model import load_text_encoder, load_tokenizer, load_vae
from training.cache import LatentCache, training_samples

log = logging.getLogger(__name__)

STAGE = "latents"
CAPTIONS_AT_ONCE = 16

FrameReader = Callable[[Scene, Sequence[int], int, int], npt.NDArray[np.uint8]]
"""(scene, frame numbers in its source, height_px, width_px) to (frames, height, width, 3) RGB."""


def scene_reader(workspace: Workspace, sources: SourcesConfig) -> FrameReader:
    """Reads frames as the official trainer does: scaled on the short side, centre-cropped.

    The reader raises VideoDecodeError where a source cannot be fetched or read, has changed, or
    ends before a wanted frame. Remote sources are taken from the workspace, or fetched again.
    """
    downloads = Downloads(workspace.cache("downloads"), sources)

    def read(
        scene: Scene, frames: Sequence[int], height_px: int, width_px: int
    ) -> npt.NDArray[np.uint8]:
        with downloads.opened(scene.uri, scene.source_id) as path:
            return read_frames(
                path,
                frames,
                height_px=height_px,
                width_px=width_px,
                mode="cover",
                start=(scene.start_frame, scene.start_pts),
            )

    return read


@dataclass(frozen=True)
class Encoded:
    """What :func:`encode_manifest` did.

    Attributes:
        scenes: Distinct scenes: kept, rejected (too short), failed (unreadable), reused from the
            cache.
        captions: Distinct captions, the empty one included.
        rejects: One row per rejected or failed scene; the record id is the clip's.
    """

    scenes: StageCount
    captions: StageCount
    rejects: list[Reject]


def encode_manifest(
    config: TrainingConfig,
    manifest: Path,
    model: Path,
    workspace: Workspace,
    read: FrameReader,
    on_progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Fill the cache with all that training on ``manifest`` reads.

    Args:
        config: Shapes and the type of the stored tensors.
        manifest: SAMPLES table; only its training samples are encoded.
        model: Model folder with ``vae``, ``tokenizer`` and ``text_encoder``.
        workspace: Whose ``latents`` and ``captions`` caches are filled.
        read: Reads the frames of a scene (:func:`scene_reader`).
        on_progress: Called with (scenes done, scenes in all).

    Raises:
        ManifestError: The manifest has nothing to train on.
        CheckpointError: The model folder cannot be loaded.
    """
    started = time.monotonic()
    cache = LatentCache(workspace, model, config.model, config.dtype)
    samples = training_samples(manifest, config.model.scenes)
    scenes = {s.clip_id: s for sample in samples for s in sample.scenes}
    captions = sorted({"", *(s.caption for sample in samples for s in sample.scenes)})

    rejects, reused = _encode_scenes(cache, list(scenes.values()), read, on_progress)
    failed = sum(r.failed for r in rejects)
    scene_count = StageCount(
        stage=STAGE,
        unit="scene",
        input=len(scenes),
        kept=len(scenes) - len(rejects),
        rejected=len(rejects) - failed,
        failed=failed,
        reused=reused,
        seconds=time.monotonic() - started,
        reasons=count_reasons(r.reason for r in rejects),
    ).check()
    started = time.monotonic()
    known = _encode_captions(cache, captions)
    caption_count = StageCount(
        stage="captions",
        unit="caption",
        input=len(captions),
        kept=len(captions),
        reused=known,
        seconds=time.monotonic() - started,
    ).check()
    log.info(
        "encoded scenes=%d rejected=%d failed=%d reused=%d captions=%d captions_reused=%d",
        scene_count.input,
        scene_count.rejected,
        scene_count.failed,
        scene_count.reused,
        caption_count.input,
        known,
    )
    return Encoded(scene_count, caption_count, rejects)


def _encode_scenes(
    cache: LatentCache,
    scenes: list[Scene],
    read: FrameReader,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Reject], int]:
    rejects: list[Reject] = []
    reused = 0
    vae = None
    for done, scene in enumerate(scenes):
        if on_progress is not None:
            on_progress(done, len(scenes))
        frames = cache.frames(scene)
        target = cache.scene_file(scene)
        if frames is None:
            detail = f"{scene.num_frames} frames, {cache.shape.frames} needed"
            rejects.append(_reject(scene, "too_few_frames", detail, failed=False))
            continue
        if target.is_file():
            reused += 1
            continue
        if vae is None:
            vae = load_vae(cache.model, getattr(torch, cache.dtype))
            cast("Any", vae).to(device())
        try:
            pixels = read(scene, frames, cache.shape.height_px, cache.shape.width_px)
        except (InputError, OSError) as error:
            reason = error.reason if isinstance(error, VideoDecodeError) else "unreadable"
            rejects.append(_reject(scene, reason, str(error), failed=True))
            record = {"clip_id": scene.clip_id, "reason": reason, "detail": str(error)}
            write_json(cache.failure_file(scene), record)
            continue
        assert len(pixels) == len(frames), "read_frames gives one frame per index or raises"
        _save(target, "latents", encode_frames(vae, pixels), {"clip_id": scene.clip_id})
        cache.failure_file(scene).unlink(missing_ok=True)
    if on_progress is not None:
        on_progress(len(scenes), len(scenes))
    return rejects, reused


def _reject(scene: Scene, reason: str, detail: str, failed: bool) -> Reject:
    return Reject(
        record_id=scene.clip_id,
        stage=STAGE,
        reason=reason,
        detail=detail,
        uri=scene.uri,
        failed=failed,
    )


@torch.no_grad()
def encode_frames(vae: AutoencoderKLCogVideoX, frames: npt.NDArray[np.uint8]) -> Tensor:
    """Latents of one scene.

    Args:
        vae: CogVideoX's VAE.
        frames: (frames, height, width, 3) uint8 RGB, frames = 1 + a multiple of 4.

    Returns:
        (F, C, H, W) on the CPU: the mean of the posterior times the VAE's scaling factor. The
        official trainer samples the posterior anew at every visit.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(vae.device)
    video = (pixels.permute(3, 0, 1, 2)[None].to(vae.dtype) / 127.5) - 1.0  # (1, 3, T, H, W)
    posterior = cast("Any", vae.encode(video)).latent_dist
    latents = posterior.mode() * cast("Any", vae.config).scaling_factor
    return latents[0].transpose(0, 1).contiguous().cpu()


def _encode_captions(cache: LatentCache, captions: list[str]) -> int:
    """Encode the captions that are not in the cache; returns how many already were."""
    missing = [c for c in captions if not cache.caption_file(c).is_file()]
    if missing:
        tokenizer = load_tokenizer(cache.model)
        encoder = load_text_encoder(cache.model, getattr(torch, cache.dtype)).to(device())
        for start in range(0, len(missing), CAPTIONS_AT_ONCE):
            group = missing[start : start + CAPTIONS_AT_ONCE]
            embedded = encode_texts(tokenizer, encoder, group, cache.shape.text_tokens)
            for caption, text in zip(group, embedded, strict=True):
                _save(cache.caption_file(caption), "text", text.contiguous(), {})
    return len(captions) - len(missing)


@torch.no_grad()
def encode_texts(tokenizer: Any, encoder: Any, texts: Sequence[str], text_tokens: int) -> Tensor:
    """Text embeddings, (texts, T, text width) on the CPU, T = ``text_tokens``.

    Short texts are padded and long ones cut; the padding is encoded and never masked, as in
    CogVideoX.
    """
    lengths = [len(ids) for ids in tokenizer(list(texts)).input_ids]
    cut = sum(n > text_tokens for n in lengths)
    if cut:
        log.warning(
            "captions_cut count=%d text_tokens=%d longest=%d", cut, text_tokens, max(lengths)
        )
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=text_tokens,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return encoder(tokens.to(encoder.device))[0].cpu()


def _save(path: Path, name: str, tensor: Tensor, metadata: dict[str, str]) -> None:
    with atomic_path(path) as tmp:
        save_file({name: tensor}, tmp, metadata=metadata)


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
