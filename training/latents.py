"""Turning scenes and captions into tensors: decoding, the VAE, T5, and one shard of the cache.

Nothing here needs Ray; :mod:`training.latents_job` spreads the shards of a manifest over workers.
Scenes and captions are encoded one at a time, so what is stored does not depend on what was encoded
with it.

Legend: F latent frames of a scene, C channels, H W latent height width, T text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from torch import Tensor

from curation.inputs.downloads import Downloads
from curation.video import read_frames
from schemas.config.curation import SourcesConfig
from schemas.errors import InputError, VideoDecodeError
from schemas.layout import Workspace
from schemas.rows import Latent, Scene
from training.base_model import load_text_encoder, load_tokenizer, load_vae
from training.cache import LatentCache
from training.shards import write_shard

log = logging.getLogger(__name__)

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


_LEAST_FOR_ONEDNN = 20480
"""Source: PyTorch, aten/src/ATen/native/Convolution.cpp, ``use_mkldnn``."""


class Encoder:
    """Encodes with the VAE and the text encoder of a model folder; each is loaded when needed.

    Args:
        cache: Names the model folder, the shape and where shards go.
        read: Reads the frames of a scene (:func:`scene_reader`).
        device: Where the models run; None = the first GPU where there is one, else the CPU.
    """

    def __init__(
        self, cache: LatentCache, read: FrameReader, device: torch.device | None = None
    ) -> None:
        self.cache = cache
        self.read = read
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype: torch.dtype = getattr(torch, cache.dtype)

    @cached_property
    def _vae(self) -> AutoencoderKLCogVideoX:
        return cast("Any", load_vae(self.cache.model, self._dtype)).to(self.device)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.cache.model)

    @cached_property
    def _text_encoder(self) -> Any:
        return load_text_encoder(self.cache.model, self._dtype).to(self.device)

    def scene(self, scene: Scene, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a scene's latents, (F, C, H, W) each, on the CPU.

        Args:
            scene: A scene of a sample.
            frames: Frame numbers in its source.

        Raises:
            VideoDecodeError: The frames cannot be read, or the VAE makes something else than
                finite numbers of them (reason ``not_finite``).
            OSError: A file cannot be read.
        """
        pixels = self.read(scene, frames, self.cache.shape.height_px, self.cache.shape.width_px)
        assert len(pixels) == len(frames), "read_frames gives one frame per index or raises"
        mean, logvar = encode_frames(self._vae, pixels)
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            raise VideoDecodeError(
                "the VAE makes something else than finite numbers of a scene",
                reason="not_finite",
                where=f"clip {scene.clip_id} of {scene.uri}",
                found=f"{int((~mean.isfinite()).sum())} of {mean.numel()} means are not finite",
                do="encode in float32 (training.dtype), or look at the clip",
            )
        return mean, logvar

    def caption(self, caption: str) -> Tensor:
        """The embedding of a caption, (T, text width), on the CPU."""
        tokens = self.cache.shape.text_tokens
        return encode_texts(self._tokenizer, self._text_encoder, [caption], tokens)[0]

    def write_scenes(self, scenes: Sequence[Scene]) -> None:
        """Write a shard of scenes. Those that cannot be read become rows with a reason.

        Raises:
            CheckpointError: The model folder cannot be loaded.
        """
        rows: list[Latent] = []
        tensors: dict[str, Tensor] = {}
        for scene in scenes:
            key = self.cache.scene_key(scene)
            frames = self.cache.frames(scene)
            assert frames is not None, "scenes that are too short are not given to an encoder"
            reason = detail = None
            try:
                tensors[f"{key}.mean"], tensors[f"{key}.logvar"] = self.scene(scene, frames)
            except (InputError, OSError) as error:
                reason = error.reason if isinstance(error, VideoDecodeError) else "unreadable"
                detail = str(error)
            rows.append(Latent(key, scene.clip_id, None, list(frames), None, reason, detail))
        metadata = {
            "vae_sha256": self.cache.vae_sha256,
            "scaling_factor": str(self.cache.scaling_factor),  # not applied to what is stored
            "size_px": f"{self.cache.shape.height_px}x{self.cache.shape.width_px}",
        }
        write_shard(self.cache.scene_folder, rows, tensors, metadata)

    def write_captions(self, captions: Sequence[str]) -> None:
        """Write a shard of captions.

        Raises:
            CheckpointError: The model folder cannot be loaded.
        """
        longest = self.cache.shape.text_tokens
        lengths = [len(ids) for ids in self._tokenizer(list(captions)).input_ids]
        if max(lengths) > longest:
            cut = sum(n > longest for n in lengths)
            log.warning(
                "captions_cut count=%d text_tokens=%d longest=%d", cut, longest, max(lengths)
            )
        keys = [self.cache.caption_key(c) for c in captions]
        rows = [
            Latent(key, None, caption, [], None, None, None)
            for key, caption in zip(keys, captions, strict=True)
        ]
        texts = [self.caption(c).contiguous() for c in captions]
        tensors = {f"{key}.text": text for key, text in zip(keys, texts, strict=True)}
        metadata = {"text_sha256": self.cache.text_sha256, "text_tokens": str(longest)}
        write_shard(self.cache.caption_folder, rows, tensors, metadata)


@torch.no_grad()
def encode_frames(
    vae: AutoencoderKLCogVideoX,
    frames: npt.NDArray[np.uint8],
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents of one scene, as the VAE's posterior.

    Args:
        vae: CogVideoX's VAE.
        frames: (frames, height, width, 3) uint8 RGB, frames = 1 + a multiple of 4.
        device: Where it computes, if not where its weights are (offloading).

    Returns:
        Mean and log-variance on the CPU, each (F, C, H, W), not multiplied by the VAE's scaling
        factor. The official trainer draws from them anew at every visit.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device or vae.device)
    video = (pixels.permute(3, 0, 1, 2)[None].to(vae.dtype) / 127.5) - 1.0  # (1, 3, T, H, W)
    posterior = cast("Any", vae.encode(in_pairs(vae, video))).latent_dist
    mean, logvar = (
        x[0].transpose(0, 1).contiguous().cpu() for x in (posterior.mean, posterior.logvar)
    )
    return mean, logvar


def in_pairs(vae: AutoencoderKLCogVideoX, video: Tensor) -> Tensor:
    """A lone small video on a CPU twice, all else as it is; take the first of what comes out.

    PyTorch convolves a batch of one by a path of its own while channels x frames x height are few,
    four to five times slower per video than oneDNN, which batches of two take.

    Args:
        vae: What is to encode or decode it.
        video: (B, C, T, H, W) frames or latents.
    """
    config = cast("Any", vae.config)
    widths = config.block_out_channels
    ratio = 1 if video.shape[1] == config.in_channels else 2 ** (len(widths) - 1)
    values = widths[0] * video.shape[2] * video.shape[3] * ratio
    slow = len(video) == 1 and values <= _LEAST_FOR_ONEDNN
    return torch.cat([video, video]) if slow and video.device.type == "cpu" else video


@torch.no_grad()
def encode_texts(tokenizer: Any, encoder: Any, texts: Sequence[str], text_tokens: int) -> Tensor:
    """Text embeddings, (texts, T, text width) on the CPU, T = ``text_tokens``.

    Short texts are padded and long ones cut; the padding is encoded and never masked, as in
    CogVideoX.
    """
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=text_tokens,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return encoder(tokens.to(encoder.device))[0].cpu()
