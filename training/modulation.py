"""Adaptive layer norm where some scenes are noisy (time t) and some are clean conditions (time 0).

Legend: B batch, S scenes, L video tokens, K text tokens of all scenes, D width, M width of the time
embedding.

Source: Mask2DiT (arXiv 2503.19881) section 3.3 and the official code: conditions are modulated with
the embedding of t = 0 in every norm1, norm2, gate and the final norm. The official code slices the
sequence and concatenates it again; here every token selects its modulation, so any set of scenes
can be a condition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero
from torch import Tensor

from training.attention import Plan


@dataclass(frozen=True)
class Conditioning:
    """Time embeddings, and which tokens use which.

    Attributes:
        noisy: (B, M) embedding of the step's t.
        clean: (B, M) embedding of t = 0, or None where every scene is generated.
        video_clean: (B, L, 1) bool, True for the video tokens of condition scenes; None with
            ``clean``.
        text_clean: (B, K, 1) bool, likewise for text tokens.
    """

    noisy: Tensor
    clean: Tensor | None = None
    video_clean: Tensor | None = None
    text_clean: Tensor | None = None

    @classmethod
    def of(
        cls, noisy: Tensor, clean: Tensor | None, generated: Tensor | None, plan: Plan
    ) -> Conditioning:
        """From (B, M) embeddings and (B, S) flags of generated scenes."""
        if generated is None:
            return cls(noisy)
        conditions = ~generated.to(device=noisy.device, dtype=torch.bool)

        def per_token(lengths: tuple[int, ...]) -> Tensor:
            counts = torch.tensor(lengths, device=noisy.device)
            return conditions.repeat_interleave(counts, dim=1)[..., None]

        return cls(noisy, clean, per_token(plan.video_lengths), per_token(plan.text_lengths))


def _select(noisy: Tensor, clean: Tensor | None, is_clean: Tensor | None) -> Tensor:
    """(B, 1, D) where all tokens are noisy, else (B, tokens, D) with each token's own row."""
    if clean is None or is_clean is None:
        return noisy[:, None]
    return torch.where(is_clean, clean[:, None], noisy[:, None])


def modulate(
    norm: CogVideoXLayerNormZero, video: Tensor, text: Tensor, conditioning: Conditioning
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise, scale and shift (B, L, D) video and (B, K, D) text.

    Returns:
        video, text, and the gates for what the next layer adds to video and to text.
    """

    def rows(embedding: Tensor | None) -> list[Tensor] | list[None]:
        if embedding is None:
            return [None] * 6
        return list(norm.linear(norm.silu(embedding)).chunk(6, dim=1))

    noisy, clean = rows(conditioning.noisy), rows(conditioning.clean)
    flags = [conditioning.video_clean] * 3 + [conditioning.text_clean] * 3
    shift, scale, gate, text_shift, text_scale, text_gate = (
        _select(n, c, f) for n, c, f in zip(noisy, clean, flags, strict=True) if n is not None
    )
    video = norm.norm(video) * (1 + scale) + shift
    text = norm.norm(text) * (1 + text_scale) + text_shift
    return video, text, gate, text_gate


def modulate_out(norm: AdaLayerNorm, video: Tensor, conditioning: Conditioning) -> Tensor:
    """The model's last norm on (B, L, D) video tokens."""
    noisy_shift, noisy_scale = norm.linear(norm.silu(conditioning.noisy)).chunk(2, dim=1)
    clean_shift = clean_scale = None
    if conditioning.clean is not None:
        clean_shift, clean_scale = norm.linear(norm.silu(conditioning.clean)).chunk(2, dim=1)
    shift = _select(noisy_shift, clean_shift, conditioning.video_clean)
    scale = _select(noisy_scale, clean_scale, conditioning.video_clean)
    return norm.norm(video) * (1 + scale) + shift
