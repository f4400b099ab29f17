"""Base models for ToonWorld: the embedded VAE and text encoder around a transformer.

Usage: python -m training.tiny.base OUT [--seed 0] [--layers 4] [--heads 8] [--mask v1]

A latent frame of 16 x 16 becomes 64 tokens (patches of 2 x 2, as in CogVideoX), so that a story of
three scenes of five frames has 960 video tokens.

A token holds 64 numbers, nearly all of them noise at nearly every timestep, and before it can draw
anything the transformer has to learn to let that through. It starts knowing how: tokens enter
as the principal components of the VAE's latents and leave by the same ones, so that the best linear
denoiser is one gain per channel and timestep, which is what adaptive layer norm is. Width is not to
be less than 64, or the components left out are never denoised. What it saves: docs/experiments.md.

:func:`make_toon_base` writes a fresh one, :func:`make_picture_base` one that draws single pictures.

Shape legend: N patches, P numbers of a patch, T frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from curation.toonworld.world import draw_episode
from schemas.config.presets import toonworld
from schemas.config.training import ModelConfig
from schemas.storage import fingerprint_folder, read_json
from training.base_model import load_vae, make_base, write_index
from training.latents import encode_frames
from training.tiny.stories import TRAIN_SEED, film_scene
from training.transformer import Mask2DiTTransformer3DModel

EMBEDDED = Path("assets/tiny/model")
LAYERS, HEADS = 4, 8
"""Of the embedded transformer; heads are 32 wide."""
COPIED = ("vae", "text_encoder", "tokenizer")
HEAD_WIDTH = 32
TIME_WIDTH = 32
PATCH = 2
_VERSION = 4
"""Raise when the same arguments give another folder."""
_SCENES = 48
"""Enough for directions of 64 numbers: each scene has 320 patches."""


def make_toon_base(
    folder: Path, model: ModelConfig, layers: int, heads: int, embedded: Path = EMBEDDED
) -> Path:
    """Write a model folder whose transformer has seeded random weights.

    Args:
        folder: Where it is to be; a finished one of the same settings is reused.
        model: Frame size and count, text length, seed, mask and positions are taken from here.
        layers: Blocks of the transformer.
        heads: Attention heads; each is 32 wide.
        embedded: Folder whose VAE, text encoder and tokenizer are copied.

    Raises:
        ConfigError: Something else is in the way.
    """
    pieces = pieces_of(embedded)
    shape = model.model_dump(include={"frames", "height_px", "width_px", "text_tokens"})
    sizes = {"layers": layers, "heads": heads}

    def write(to: Path) -> None:
        _copy_pieces(to, embedded)
        _transformer(to, model, layers, heads).save_pretrained(to / "transformer")

    made_from = {**pieces, **shape, **model.scene_settings, **sizes, "version": _VERSION}
    return make_base(folder, made_from, model.seed, write)


def make_picture_base(folder: Path, pictures: Path, embedded: Path = EMBEDDED) -> Path:
    """Write a model folder whose transformer draws lone frames (:mod:`training.tiny.dit`, stage 1).

    Args:
        folder: Where it is to be; a finished one of the same weights is reused.
        pictures: Folder of the transformer.
        embedded: Folder whose VAE, text encoder and tokenizer are copied.

    Raises:
        ConfigError: Something else is in the way.
    """
    made_from = {
        **pieces_of(embedded),
        "pictures": fingerprint_folder(pictures),
        "version": _VERSION,
    }

    def write(to: Path) -> None:
        _copy_pieces(to, embedded)
        shutil.copytree(pictures, to / "transformer")

    return make_base(folder, made_from, 0, write)


def write_model(
    folder: Path, transformer: Mask2DiTTransformer3DModel, embedded: Path = EMBEDDED
) -> None:
    """Write a model folder around a transformer; one that is there is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _copy_pieces(partial, embedded)
    transformer.save_pretrained(partial / "transformer")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def pieces_of(embedded: Path) -> dict[str, str]:
    """Fingerprints of the VAE, text encoder and tokenizer, by name."""
    return {name: fingerprint_folder(embedded / name) for name in COPIED}


def _copy_pieces(to: Path, embedded: Path) -> None:
    for name in COPIED:
        shutil.copytree(embedded / name, to / name)
    write_index(to, read_json(to / "tokenizer" / "tokenizer_config.json")["tokenizer_class"])


def _transformer(
    folder: Path, model: ModelConfig, layers: int, heads: int
) -> Mask2DiTTransformer3DModel:
    vae = read_json(folder / "vae" / "config.json")
    ratio = 2 ** (len(vae["block_out_channels"]) - 1)
    transformer = Mask2DiTTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD_WIDTH,
        in_channels=vae["latent_channels"],
        out_channels=vae["latent_channels"],
        time_embed_dim=TIME_WIDTH,
        text_embed_dim=read_json(folder / "text_encoder" / "config.json")["d_model"],
        num_layers=layers,
        sample_width=model.width_px // ratio,
        sample_height=model.height_px // ratio,
        sample_frames=model.frames,
        temporal_compression_ratio=vae["temporal_compression_ratio"],
        patch_size=PATCH,
        max_text_seq_length=model.text_tokens,
        use_rotary_positional_embeddings=True,
        **model.scene_settings,
    )
    _pass_through(transformer, principal_directions(folder))
    return transformer


@torch.no_grad()
def _pass_through(transformer: Mask2DiTTransformer3DModel, directions: Tensor) -> None:
    embed, out = cast("Any", transformer.patch_embed.proj), cast("Any", transformer.proj_out)
    count = min(len(directions), len(embed.weight))
    embed.weight[:count] = directions[:count].unflatten(1, embed.weight.shape[1:])
    out.weight.zero_()  # what else there is in a token adds nothing yet
    out.weight[:, :count] = directions[:count].T
    embed.bias.zero_()
    out.bias.zero_()


@torch.no_grad()
def principal_directions(folder: Path) -> Tensor:
    """(P, P) principal directions of latent patches of ToonWorld, those of most variance first.

    Args:
        folder: Model folder with the VAE.
    """
    vae = load_vae(folder)
    shots = [draw_episode(TRAIN_SEED, k).shots[0] for k in range(_SCENES)]
    scenes = [film_scene(shot, "directions", k)[::2] for k, shot in enumerate(shots)]
    latents = torch.cat([encode_frames(vae, scene)[0] for scene in scenes])  # (T, C, H, W)
    tiles = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (T, C, h, p, w, p)
    patches = tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)  # (N, P)
    directions = torch.linalg.eigh(patches.T.cov()).eigenvectors.T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign()  # the sign of an eigenvector is up to the library


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--mask", default="v1")
    args = parser.parse_args()
    shape = toonworld().training.model.model_dump() | {"seed": args.seed, "mask": args.mask}
    make_toon_base(args.out, ModelConfig(**shape), args.layers, args.heads)


if __name__ == "__main__":
    main()
