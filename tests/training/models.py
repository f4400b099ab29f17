"""Tiny transformers of the three CogVideoX shapes, with weights that hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.transformer import Mask2DiTTransformer3DModel

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": 5,
}
GRID = (3, 4)

SHAPES: dict[str, dict[str, Any]] = {
    "2b": {**TINY, "use_rotary_positional_embeddings": False},
    "5b": {**TINY, "use_rotary_positional_embeddings": True},
    "1.5": {**TINY, "use_rotary_positional_embeddings": True, "patch_size_t": 2},
}


def model(shape: str, **changes: Any) -> Mask2DiTTransformer3DModel:
    """A seeded model in evaluation mode."""
    torch.manual_seed(0)
    made = Mask2DiTTransformer3DModel(**SHAPES[shape], **changes).eval()
    for p in made.parameters():  # layer norms start as ones and zeros, which would hide mistakes
        torch.nn.init.normal_(p, std=0.2)
    return made


def inputs(
    batch: int = 2, frames: int = 9, scenes: int = 3, size: tuple[int, int] = (6, 8)
) -> tuple[Tensor, Tensor, Tensor]:
    """Video, text and timesteps."""
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(batch, frames, 4, *size, generator=generator)
    text = torch.randn(batch, scenes, 5, 8, generator=generator)
    return video, text, torch.tensor([37, 900, 512][:batch])
