"""Where a video token is: rotary embeddings (5B-like models) or added sinusoids (2B-like ones).

Time runs on over the scenes, as in the paper: scene 2 continues where scene 1 ended, and there is
no scene index. Text has no position in either family.

Source: Mask2DiT (arXiv 2503.19881) section 4.1 and the official code; tables from diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from diffusers.models.embeddings import CogVideoXPatchEmbed, get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor
from torch.nn import functional


@lru_cache(maxsize=8)
def rotary(
    head_dim: int, frames: int, grid: tuple[int, int], base_grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (frames * h * w, head_dim) each, float32 on the CPU.

    Args:
        head_dim: Width of a head.
        frames: Latent frames of all scenes together.
        grid: Patches in height and width.
        base_grid: Patches in height and width of the size the base model was trained at.
    """
    crop = get_resize_crop_region_for_grid(grid, base_grid[1], base_grid[0])
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=head_dim, crops_coords=crop, grid_size=grid, temporal_size=frames
    )
    return cos, sin


def add_sincos(
    patch_embed: CogVideoXPatchEmbed,
    video: Tensor,
    size: tuple[int, int],
    scene_frames: Sequence[int],
) -> Tensor:
    """Add sinusoidal positions to (B, F*h*w, D) video tokens.

    The table of one scene (the longest) is stretched over all F frames, trilinearly without aligned
    corners. With one scene, or at the paper's 3 x 13 frames of 480 x 720, this is what diffusers
    and the official code do. At other frame sizes the official code also stretches the 480 x 720
    table in space; like diffusers we compute it for the size at hand.

    Args:
        patch_embed: diffusers' layer, which makes the table.
        video: The tokens.
        size: Latent height and width, before patching.
        scene_frames: Latent frames of each scene.
    """
    longest, total = max(scene_frames), sum(scene_frames)
    grid = (size[0] // patch_embed.patch_size, size[1] // patch_embed.patch_size)
    pixels = (longest - 1) * patch_embed.temporal_compression_ratio + 1
    make_table = cast("Any", patch_embed)._get_positional_embeddings  # diffusers has no public one
    table = make_table(size[0], size[1], pixels, device=video.device)
    table = table[:, patch_embed.max_text_seq_length :]  # the text part of the table is zeros
    if total != longest:
        volume = table.unflatten(1, (longest, *grid)).permute(0, 4, 1, 2, 3)  # (1, D, F, h, w)
        volume = functional.interpolate(
            volume, size=(total, *grid), mode="trilinear", align_corners=False
        )
        table = volume.flatten(2).transpose(1, 2)
    return video + table.to(video.dtype)
