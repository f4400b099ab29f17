"""Where a video token is: rotary embeddings (5B-like models) or added sinusoids (2B-like ones).

Both families start from one timeline: the temporal position of every latent frame of every scene.
How scenes lie on it is the position policy. Text has no position in either family.

Legend: B batch, F positions in time of all scenes (latent frames, or pairs of them in CogVideoX
1.5), L video tokens, K text tokens of all scenes, D width, E width of a head.

Source: Mask2DiT (arXiv 2503.19881) section 4.1 and the official code; diffusers' CogVideoX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor
from torch.nn import functional

from schemas.errors import ConfigError

POLICIES = ("continuous", "reset", "gap")

ROTARY_BASE = 10000.0
"""Base of the rotary frequencies, as in diffusers' CogVideoX."""


@dataclass(frozen=True)
class Timeline:
    """The temporal positions of a sample.

    Attributes:
        positions: The position of each of the F frames.
        length: Positions from the first to the last, gaps included.
        longest: Frames of the longest scene.
    """

    positions: tuple[int, ...]
    length: int
    longest: int

    @classmethod
    def of(cls, scene_frames: Sequence[int], policy: str, gap: int = 0) -> Timeline:
        """Lay scenes out in time.

        Args:
            scene_frames: Frames (positions in time) of each scene.
            policy: ``continuous``: time runs on over the scenes, as in the paper. ``reset``: every
                scene starts at 0. ``gap``: as continuous, with ``gap`` positions left out between
                two scenes.
            gap: For policy ``gap``, >= 0.

        Raises:
            ConfigError: There is no such policy, or a gap where the policy has none.
        """
        check_policy(policy, gap)
        longest, step = max(scene_frames), gap if policy == "gap" else 0
        positions: list[int] = []
        start = 0
        for frames in scene_frames:
            positions += range(start, start + frames)
            start = 0 if policy == "reset" else start + frames + step
        return cls(tuple(positions), max(positions) + 1, longest)


def check_policy(policy: str, gap: int) -> None:
    """Raise ConfigError unless this is a position policy with a gap that it can have."""
    if policy not in POLICIES:
        raise ConfigError(
            "unknown position policy", found=policy, expected=f"one of {', '.join(POLICIES)}"
        )
    if gap < 0 or (gap and policy != "gap"):
        raise ConfigError(
            "this position_gap does not go with the position policy",
            found=f"position_gap={gap}, position_policy={policy}",
            expected="0, or a positive number with position_policy=gap",
        )


@lru_cache(maxsize=4)  # 13 MB each at 3 x 13 frames of 480 x 720
def rotary(
    head_dim: int,
    text_tokens: int,
    positions: tuple[int, ...],
    grid: tuple[int, int],
    base_grid: tuple[int, int],
    *,
    sliced: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Rotations of all tokens as complex numbers of modulus one; text tokens are not turned.

    A head's width is shared out to time, height and width as 2 : 3 : 3.

    In space, CogVideoX 1.0 stretches the grid over the one it was trained at, keeping its aspect;
    1.5 counts patches. Where the aspect differs from the trained one this follows diffusers; the
    official code spaces the shifted axis a little differently (without its end point).

    Args:
        head_dim: Width of a head, E; a multiple of 16.
        text_tokens: Text tokens of all scenes, K.
        positions: Temporal position of each of the F frames.
        grid: Patches in height and width.
        base_grid: Patches in height and width of the size the base model was trained at.
        sliced: CogVideoX 1.5's grid in place of 1.0's.
        dtype: float32, or float64 where the model computes in it.
        device: Where the result is to be.

    Returns:
        (K + L, E/2) complex. It is cached: do not write to it.
    """

    def angles(where: Tensor, width: int) -> Tensor:
        step = torch.arange(0, width, 2, dtype=dtype, device=device) / width
        return torch.outer(where, 1.0 / ROTARY_BASE**step)

    in_time = angles(torch.tensor(positions, dtype=dtype, device=device), head_dim // 4)
    rows, columns = _spatial_positions(grid, base_grid, sliced, dtype, device)
    in_rows, in_columns = (angles(axis, head_dim // 8 * 3) for axis in (rows, columns))
    volume = (len(positions), *grid, -1)
    turns = torch.cat(
        [
            in_time[:, None, None].expand(volume),
            in_rows[None, :, None].expand(volume),
            in_columns[None, None].expand(volume),
        ],
        -1,
    ).flatten(0, 2)
    turns = torch.cat([turns.new_zeros(text_tokens, head_dim // 2), turns])
    return torch.polar(torch.ones_like(turns), turns)


def _spatial_positions(
    grid: tuple[int, int],
    base_grid: tuple[int, int],
    sliced: bool,
    dtype: torch.dtype,
    device: torch.device | None,
) -> tuple[Tensor, Tensor]:
    """Positions of the rows and of the columns of patches."""
    if sliced:
        rows, columns = (torch.arange(n, dtype=dtype, device=device) for n in grid)
        return rows, columns
    first, end = get_resize_crop_region_for_grid(grid, base_grid[1], base_grid[0])
    rows, columns = (
        torch.linspace(low, high * (n - 1) / n, n, dtype=dtype, device=device)
        for low, high, n in zip(first, end, grid, strict=True)
    )
    return rows, columns


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn pairs of neighbouring features of a (B, K + L, N, E) query or key."""
    # one complex product: on a CPU ten times faster than the sines and cosines apart
    wide = x if x.dtype == torch.float64 else x.float()
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * rotations[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def add_sincos(
    video: Tensor,
    timeline: Timeline,
    grid: tuple[int, int],
    *,
    time_scale: float,
    space_scale: float,
) -> Tensor:
    """Add sinusoidal positions to (B, F*h*w, D) video tokens.

    The positions of one scene (the longest) are stretched over the whole timeline, linearly and
    without aligned corners. With one scene, or at the paper's 3 x 13 frames of 480 x 720, this is
    what diffusers and the official code do. At other sizes the official code also stretches the
    table of its configured 13 x 30 x 45, in time and in space; like diffusers we compute it for the
    size at hand.

    The first quarter of the features depends on time alone and the rest on space alone, so there is
    no table of the size of the video.

    Args:
        video: The tokens.
        timeline: Temporal positions of the F frames.
        grid: Patches in height and width.
        time_scale: CogVideoX's ``temporal_interpolation_scale``.
        space_scale: CogVideoX's ``spatial_interpolation_scale``.
    """
    width = video.shape[-1]
    quarter = width // 4

    def table(frames: int, height: int, columns: int) -> Tensor:
        size = (columns, height)
        return get_3d_sincos_pos_embed(
            width, size, frames, space_scale, time_scale, device=video.device
        )

    in_space = table(1, *grid)[0, :, quarter:].to(video.dtype)
    in_time = table(timeline.longest, 1, 1)[:, 0, :quarter]
    if timeline.length != timeline.longest:
        in_time = functional.interpolate(
            in_time.T[None], size=timeline.length, mode="linear", align_corners=False
        )[0].T
    in_time = in_time[list(timeline.positions)].to(video.dtype)
    frames = video.unflatten(1, (len(timeline.positions), -1))
    placed = torch.cat(
        [frames[..., :quarter] + in_time[:, None], frames[..., quarter:] + in_space], -1
    )
    return placed.flatten(1, 2)
