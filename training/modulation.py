"""Adaptive layer norm where every scene has its own time: noisy (t) or a clean condition (0).

A modulation is one row per scene, (B, R, D) with R = S, or R = 1 where all scenes share it. It is
applied to views of the scenes, so that no tensor of the size of the tokens is made for it.

Legend: B batch, S scenes, R rows of modulation, L video tokens, K text tokens of all scenes, D
width, M width of the time embedding.

Source: Mask2DiT (arXiv 2503.19881) section 3.3 and the official code: conditions are modulated with
the embedding of t = 0 in every norm1, norm2, gate and the final norm. The official code slices the
sequence around the one generated scene and concatenates it again; here any set of scenes can be a
condition, and another one in every sample of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero
from torch import Tensor

from training.attention import Plan


def scene_times(noisy: Tensor, clean: Tensor, generated: Tensor | None) -> Tensor:
    """The time embedding of every scene.

    Args:
        noisy: (B, M) embedding of the step's t.
        clean: (1, M) embedding of t = 0.
        generated: (B, S) bool, False for conditions; None where all scenes are generated.

    Returns:
        (B, S, M); (B, 1, M) where all scenes are generated.
    """
    if generated is None:
        return noisy[:, None]
    flags = generated.to(device=noisy.device, dtype=torch.bool)
    return torch.where(flags[..., None], noisy[:, None], clean[:, None])


def modulate(
    norm: CogVideoXLayerNormZero, video: Tensor, text: Tensor, times: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise, scale and shift (B, L, D) video and (B, K, D) text, or the tokens of this rank.

    Returns:
        video, text, and their gates (B, R, D) for :func:`add_gated`.
    """
    text_lengths, video_lengths = plan.own_lengths
    rows = norm.linear(norm.silu(times)).chunk(6, dim=-1)
    shift, scale, gate, text_shift, text_scale, text_gate = rows
    video = _scale_and_shift(norm.norm(video), scale, shift, video_lengths)
    text = _scale_and_shift(norm.norm(text), text_scale, text_shift, text_lengths)
    return video, text, gate, text_gate


def modulate_out(norm: AdaLayerNorm, video: Tensor, times: Tensor, plan: Plan) -> Tensor:
    """The model's last norm on (B, L, D) video tokens, or those of this rank."""
    shift, scale = norm.linear(norm.silu(times)).chunk(2, dim=-1)
    return _scale_and_shift(norm.norm(video), scale, shift, plan.own_lengths[1])


def add_gated(residual: Tensor, gate: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """``residual + gate * tokens`` for (B, tokens, D) and (B, R, D) gates."""
    return _by_scene(lambda g, r, t: torch.addcmul(r, g, t), [gate], [residual, tokens], lengths)


def _scale_and_shift(
    tokens: Tensor, scale: Tensor, shift: Tensor, lengths: Sequence[int]
) -> Tensor:
    return _by_scene(torch.addcmul, [shift, 1 + scale], [tokens], lengths)


def _by_scene(
    function: Callable[..., Tensor],
    rows: Sequence[Tensor],
    tokens: Sequence[Tensor],
    lengths: Sequence[int],
) -> Tensor:
    """``function(*rows, *tokens)``, elementwise, where each scene's tokens meet its own row."""
    count = rows[0].shape[1]
    if count == 1:
        return function(*rows, *tokens)
    if len(set(lengths)) == 1:
        views = (t.unflatten(1, (count, lengths[0])) for t in tokens)
        return function(*(r[:, :, None] for r in rows), *views).flatten(1, 2)
    scenes = zip(
        *(r.split(1, 1) for r in rows), *(t.split(list(lengths), 1) for t in tokens), strict=True
    )
    return torch.cat([function(*scene) for scene in scenes], 1)
