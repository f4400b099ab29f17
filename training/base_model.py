"""Base models: folders in diffusers' CogVideoX layout, and the tiny one made on the spot.

A folder holds ``model_index.json`` and ``transformer/ vae/ text_encoder/ tokenizer/ scheduler/``.
The index names diffusers' own classes, so a stock ``CogVideoXPipeline`` opens the same folder.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.utils.import_utils import is_accelerate_available

from schemas.config.training import ModelConfig
from schemas.errors import CheckpointError, ConfigError
from schemas.storage import fingerprint_folder, mark_done, read_done, write_json
from training.transformer import Mask2DiTTransformer3DModel
from training.weights import load_transformer

log = logging.getLogger(__name__)

PIECES = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TINY_VERSION = 1
"""Raise when make_tiny_base changes, so that folders of the older make are not taken for it."""

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
"""CogVideoX-5B's scheduler config."""

# diffusers' own default, said aloud so that it does not warn where accelerate is not installed
_LOW_MEMORY = {"low_cpu_mem_usage": is_accelerate_available()}


@dataclass(frozen=True)
class Components:
    """The pieces of a model folder; text encoder and tokenizer are transformers' classes."""

    transformer: Mask2DiTTransformer3DModel
    vae: AutoencoderKLCogVideoX
    text_encoder: Any
    tokenizer: Any
    scheduler: CogVideoXDDIMScheduler


def model_sha256(folder: Path) -> str:
    """Fingerprint of a model folder: configs and weights of all its pieces."""
    return fingerprint_folder(folder, "*/*")


def load_components(folder: Path, dtype: torch.dtype = torch.float32) -> Components:
    """Load every piece of a model folder.

    Raises:
        CheckpointError: A piece is missing, cannot be read, or its weights do not fit.
    """
    return Components(
        load_transformer(folder, dtype=dtype),
        load_vae(folder, dtype),
        load_text_encoder(folder, dtype),
        load_tokenizer(folder),
        load_scheduler(folder),
    )


def load_vae(folder: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKLCogVideoX:
    """Load ``vae/``.

    Raises:
        CheckpointError: The folder is missing, or a weight is missing, unexpected or of another
            shape.
    """
    return _load_strictly(
        AutoencoderKLCogVideoX, _piece(folder, "vae"), torch_dtype=dtype, **_LOW_MEMORY
    ).eval()


def load_text_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load ``text_encoder/``, transformers' T5EncoderModel (errors as :func:`load_vae`)."""
    from transformers import T5EncoderModel  # takes seconds; training alone never needs it

    return _load_strictly(T5EncoderModel, _piece(folder, "text_encoder"), dtype=dtype).eval()


def load_tokenizer(folder: Path) -> Any:
    """Load ``tokenizer/``, whatever tokenizer of transformers its config names.

    Raises:
        CheckpointError: The folder is missing or cannot be read.
    """
    from transformers import AutoTokenizer  # see load_text_encoder

    piece = _piece(folder, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(piece, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError("the tokenizer cannot be read", where=piece, found=error) from error


def load_scheduler(folder: Path) -> CogVideoXDDIMScheduler:
    """Load ``scheduler/`` as CogVideoX DDIM; other CogVideoX schedulers share its config."""
    scheduler: Any = CogVideoXDDIMScheduler.from_pretrained(_piece(folder, "scheduler"))
    return scheduler


def _piece(folder: Path, name: str) -> Path:
    piece = folder / name
    if not piece.is_dir():
        raise CheckpointError(
            f"the model folder has no {name}",
            where=folder,
            expected=f"diffusers' CogVideoX layout: {', '.join(PIECES)}",
            do="give training.model.base a whole model folder, or 'tiny'",
        )
    return piece


def _load_strictly(cls: Any, folder: Path, **options: Any) -> Any:
    """``from_pretrained`` where every weight must be there, be wanted and fit."""
    try:
        model, info = cls.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{cls.__name__} cannot be loaded",
            where=folder,
            found=error,
            expected="a config.json and safetensors weights that fit it",
        ) from error
    wrong = {
        k: sorted(map(str, info.get(k) or ()))[:10]
        for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    }
    if any(wrong.values()):
        raise CheckpointError(
            f"the weights do not fit {cls.__name__}",
            where=folder,
            found={k: v for k, v in wrong.items() if v},
            expected="exactly the keys and shapes of its config.json",
        )
    return model


def make_tiny_base(folder: Path, model_cfg: ModelConfig) -> Path:
    """Write a seeded random model of the real classes, small enough for a laptop's CPU.

    The transformer is 5B-like (rotary positions) with 1.7 M parameters, the VAE compresses 8x in
    space and 4x in time like the real one, and the byte-level tokenizer needs no vocabulary file. A
    finished folder of the same settings is reused; anything else in its place is replaced.

    Args:
        folder: Where the model is to be, e.g. ``workspace.model("tiny")``.
        model_cfg: Frame size and count, text length, seed, mask and positions are taken from
            here.

    Returns:
        ``folder``.
    """
    made_from = {
        "version": TINY_VERSION,
        **model_cfg.scene_settings,
        **model_cfg.model_dump(include={"frames", "height_px", "width_px", "text_tokens"}),
    }
    return make_base(folder, made_from, model_cfg.seed, lambda at: _write_tiny(at, model_cfg))


def make_base(
    folder: Path, made_from: Mapping[str, Any], seed: int, write: Callable[[Path], None]
) -> Path:
    """Write a seeded model folder, whole or not at all.

    Args:
        folder: Where it is to be; a finished folder made from the same is reused, one made from
            something else replaced.
        made_from: All that decides what is written but the seed; JSON-able.
        seed: Of torch, while ``write`` works.
        write: Fills a folder.

    Raises:
        ConfigError: Something else is in the way.
    """
    made_from = {**made_from, "seed": seed}
    done = read_done(folder)
    if done is not None and done.get("made_from") == made_from:
        return folder
    if done is None and folder.exists():
        raise ConfigError(
            "there is something else where a base model is to be written",
            where=folder,
            expected="a base model that was made here, or nothing",
            do="move it away, or choose another workspace",
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write(partial)
    mark_done(partial, {"made_from": made_from, "sha256": fingerprint_folder(partial)})
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    log.info("base folder=%s seed=%d", folder, seed)
    return folder


def _write_tiny(folder: Path, cfg: ModelConfig) -> None:
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel  # see load_text_encoder

    text_width = 64
    latent_channels = 16
    Mask2DiTTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=latent_channels,
        out_channels=latent_channels,
        time_embed_dim=128,
        text_embed_dim=text_width,
        num_layers=4,
        sample_width=cfg.width_px // 8,
        sample_height=cfg.height_px // 8,
        sample_frames=cfg.frames,
        max_text_seq_length=cfg.text_tokens,
        use_rotary_positional_embeddings=True,
        mask=cfg.mask,
        position_policy=cfg.position_policy,
        position_gap=cfg.position_gap,
    ).save_pretrained(folder / "transformer")

    vae = cast("Any", AutoencoderKLCogVideoX)(  # its annotations say tuples of one
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_height=cfg.height_px,
        sample_width=cfg.width_px,
    ).eval()
    vae.register_to_config(scaling_factor=_unit_scale(vae))
    vae.save_pretrained(folder / "vae")

    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    text_config = T5Config(
        vocab_size=len(tokenizer),
        d_model=text_width,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(text_config).save_pretrained(folder / "text_encoder")
    write_index(folder, "ByT5Tokenizer")


def write_index(folder: Path, tokenizer: str) -> None:
    """Write what a model folder has besides its networks: ``scheduler/`` and the index.

    Args:
        folder: The model folder.
        tokenizer: transformers' class of its tokenizer.
    """
    CogVideoXDDIMScheduler(**cast("Any", SCHEDULER)).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "CogVideoXPipeline",
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    }
    write_json(folder / "model_index.json", index)


@torch.no_grad()
def _unit_scale(vae: AutoencoderKLCogVideoX) -> float:
    """The scaling factor that gives latents of smooth random frames a root mean square of one."""
    coarse = torch.rand(4, 3, 5, 6, 8)
    frames = torch.nn.functional.interpolate(coarse, size=(5, 48, 64), mode="trilinear") * 2 - 1
    latents = cast("Any", vae.encode(frames)).latent_dist.mode()
    return round(1.0 / float(latents.square().mean().sqrt()), 6)
