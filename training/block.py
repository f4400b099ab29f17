"""One layer of the masked diffusion transformer.

Legend: B batch, S scenes, T text tokens of a scene, L video tokens, N heads, E width of a head, D
width, M width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor

from training.attention import Plan, attend
from training.modulation import add_gated, modulate
from training.positions import rotate

Mix = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]
"""Attention: :func:`training.attention.attend` or something with the same arguments."""


class Mask2DiTBlock(CogVideoXBlock):
    """diffusers' CogVideoX block (same layers) with masked attention and modulation per scene."""

    # another signature than the parent's, whose forward is never called
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        video: Tensor,
        text: Tensor,
        times: Tensor,
        plan: Plan,
        rotations: Tensor | None,
        mix: Mix = attend,
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            video: (B, L, D) video tokens of all scenes, or of them those of this rank.
            text: (B, S*T, D) text tokens of all scenes, or of them those of this rank.
            times: (B, S, M) time embedding of every scene, or (B, 1, M) of all.
            plan: The attention mask, the lengths of the scenes, and who shares the sequence.
            rotations: (S*T + L, E/2) complex, of these text and video tokens, or None.
            mix: What attends.

        Returns:
            The new video and text tokens.
        """
        split = [text.shape[1], video.shape[1]]
        text_lengths, video_lengths = plan.own_lengths
        video_in, text_in, video_gate, text_gate = modulate(self.norm1, video, text, times, plan)
        attended = self.attend(torch.cat([text_in, video_in], 1), plan, rotations, mix)
        text_out, video_out = attended.split(split, 1)
        video = add_gated(video, video_gate, video_out, video_lengths)
        text = add_gated(text, text_gate, text_out, text_lengths)

        video_in, text_in, video_gate, text_gate = modulate(self.norm2, video, text, times, plan)
        text_out, video_out = self.ff(torch.cat([text_in, video_in], 1)).split(split, 1)
        video = add_gated(video, video_gate, video_out, video_lengths)
        return video, add_gated(text, text_gate, text_out, text_lengths)

    def attend(
        self, tokens: Tensor, plan: Plan, rotations: Tensor | None, mix: Mix = attend
    ) -> Tensor:
        """Self-attention over (B, S*T + L, D) tokens, text first."""
        layer = cast("Any", self.attn1)
        query, key, value = (
            projection(tokens).unflatten(-1, (layer.heads, -1))  # (B, S*T + L, N, E)
            for projection in (layer.to_q, layer.to_k, layer.to_v)
        )
        if layer.norm_q is not None:
            query, key = layer.norm_q(query), layer.norm_k(key)
        if rotations is not None:
            query, key = rotate(query, rotations), rotate(key, rotations)
        value = value.to(query.dtype)  # under autocast the norms give float32
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = mix(query, key, value, plan)
        return layer.to_out[1](layer.to_out[0](mixed.transpose(1, 2).flatten(2)))
