"""Base models for ToonWorld: the embedded VAE and text encoder around a fresh transformer.

Usage: python -m training.tiny.base OUT [--seed 0] [--layers 6] [--heads 6] [--mask v2]

A latent frame of 16 x 16 becomes 16 tokens (patches of 4 x 4), so that a story of three scenes of
five frames has 240 video tokens and trains on one core.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from schemas.config.presets import toonworld
from schemas.config.training import ModelConfig
from schemas.storage import fingerprint_folder, read_json
from training.base_model import make_base, write_index
from training.transformer import Mask2DiTTransformer3DModel

EMBEDDED = Path("assets/tiny/model")
COPIED = ("vae", "text_encoder", "tokenizer")
HEAD_WIDTH = 32
PATCH = 4


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
    pieces = {name: fingerprint_folder(embedded / name) for name in COPIED}
    shape = model.model_dump(include={"frames", "height_px", "width_px", "text_tokens"})
    sizes = {"layers": layers, "heads": heads}

    def write(to: Path) -> None:
        for name in COPIED:
            shutil.copytree(embedded / name, to / name)
        _transformer(to, model, layers, heads).save_pretrained(to / "transformer")
        write_index(to, read_json(to / "tokenizer" / "tokenizer_config.json")["tokenizer_class"])

    made_from = {**pieces, **shape, **model.scene_settings, **sizes}
    return make_base(folder, made_from, model.seed, write)


def _transformer(
    folder: Path, model: ModelConfig, layers: int, heads: int
) -> Mask2DiTTransformer3DModel:
    vae = read_json(folder / "vae" / "config.json")
    ratio = 2 ** (len(vae["block_out_channels"]) - 1)
    return Mask2DiTTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD_WIDTH,
        in_channels=vae["latent_channels"],
        out_channels=vae["latent_channels"],
        time_embed_dim=heads * HEAD_WIDTH,
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


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--mask", default="v2")
    args = parser.parse_args()
    shape = toonworld().training.model.model_dump() | {"seed": args.seed, "mask": args.mask}
    make_toon_base(args.out, ModelConfig(**shape), args.layers, args.heads)


if __name__ == "__main__":
    main()
