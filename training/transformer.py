"""The masked diffusion transformer: CogVideoX over several scenes at once.

Built from diffusers' own CogVideoX layers with the same names, so the state dict of a CogVideoX-2B
or -5B folder loads unchanged and ours loads back into diffusers. What differs is the forward pass:
a text per scene, an attention mask, and modulation per scene.

Legend: B batch, S scenes, F latent frames of all scenes, C channels, H W latent height width, T
text tokens of a scene, L video tokens, N heads, D width, M width of the time embedding.

Source: Mask2DiT (arXiv 2503.19881) sections 3.2 and 3.3, on CogVideoX (arXiv 2408.06072).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import (
    CogVideoXPatchEmbed,
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNorm
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from schemas.errors import ConfigError
from training.attention import Plan, attend
from training.masks import predicate
from training.modulation import Conditioning, modulate, modulate_out
from training.positions import add_sincos, rotary


class Mask2DiTBlock(CogVideoXBlock):
    """diffusers' CogVideoX block (same layers) with masked attention and modulation per scene."""

    # another signature than the parent's, whose forward is never called
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        video: Tensor,
        text: Tensor,
        conditioning: Conditioning,
        plan: Plan,
        rotary_embedding: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            video: (B, L, D) video tokens of all scenes.
            text: (B, S*T, D) text tokens of all scenes.
            conditioning: Time embeddings and which tokens are clean.
            plan: The attention mask and the lengths of the scenes.
            rotary_embedding: cos and sin of (L, E) each for the video tokens, or None.

        Returns:
            The new video and text tokens.
        """
        split = [text.shape[1], video.shape[1]]
        video_in, text_in, video_gate, text_gate = modulate(self.norm1, video, text, conditioning)
        attended = self.attend(torch.cat([text_in, video_in], 1), split[0], plan, rotary_embedding)
        text_out, video_out = attended.split(split, 1)
        video = video + video_gate * video_out
        text = text + text_gate * text_out

        video_in, text_in, video_gate, text_gate = modulate(self.norm2, video, text, conditioning)
        text_out, video_out = self.ff(torch.cat([text_in, video_in], 1)).split(split, 1)
        return video + video_gate * video_out, text + text_gate * text_out

    def attend(
        self,
        tokens: Tensor,
        num_text: int,
        plan: Plan,
        rotary_embedding: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Self-attention over (B, S*T + L, D) tokens, text first; text tokens are not rotated."""
        layer = cast("Any", self.attn1)
        query, key, value = (
            projection(tokens).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for projection in (layer.to_q, layer.to_k, layer.to_v)
        )
        if layer.norm_q is not None:
            query, key = layer.norm_q(query), layer.norm_k(key)
        if rotary_embedding is not None:
            query = rotate_video(query, num_text, rotary_embedding)
            key = rotate_video(key, num_text, rotary_embedding)
        mixed = attend(query, key, value.to(query.dtype), plan)
        return layer.to_out[1](layer.to_out[0](mixed.transpose(1, 2).flatten(2)))


class Mask2DiTTransformer3DModel(ModelMixin, ConfigMixin):
    """CogVideoX's transformer for several scenes, with a symmetric attention mask.

    The config is that of diffusers' ``CogVideoXTransformer3DModel`` plus ``mask``; weights are
    exchanged with it freely in both directions.
    """

    config: Any  # a FrozenDict with attributes, put there by register_to_config
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Mask2DiTBlock", "CogVideoXPatchEmbed"]  # noqa: RUF012  (as in diffusers)

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int = 16,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        time_embed_dim: int = 512,
        ofs_embed_dim: int | None = None,
        text_embed_dim: int = 4096,
        num_layers: int = 30,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_width: int = 90,
        sample_height: int = 60,
        sample_frames: int = 49,
        patch_size: int = 2,
        patch_size_t: int | None = None,
        temporal_compression_ratio: int = 4,
        max_text_seq_length: int = 226,
        activation_fn: str = "gelu-approximate",
        timestep_activation_fn: str = "silu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        use_rotary_positional_embeddings: bool = False,
        use_learned_positional_embeddings: bool = False,
        patch_bias: bool = True,
        mask: str = "v2",
    ) -> None:
        super().__init__()
        predicate(mask)
        if (
            patch_size_t is not None
            or ofs_embed_dim is not None
            or use_learned_positional_embeddings
        ):
            raise ConfigError(
                "this CogVideoX variant is not supported",
                where="transformer/config.json",
                found=f"patch_size_t={patch_size_t}, ofs_embed_dim={ofs_embed_dim}, "
                f"use_learned_positional_embeddings={use_learned_positional_embeddings}",
                expected="a text-to-video CogVideoX 1.0 transformer (2B or 5B)",
                do="use THUDM/CogVideoX-2b or -5b, not an image-to-video or 1.5 model",
            )
        width = num_attention_heads * attention_head_dim
        self.patch_embed = CogVideoXPatchEmbed(
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=width,
            text_embed_dim=text_embed_dim,
            bias=patch_bias,
            sample_width=sample_width,
            sample_height=sample_height,
            sample_frames=sample_frames,
            temporal_compression_ratio=temporal_compression_ratio,
            max_text_seq_length=max_text_seq_length,
            spatial_interpolation_scale=spatial_interpolation_scale,
            temporal_interpolation_scale=temporal_interpolation_scale,
            use_positional_embeddings=not use_rotary_positional_embeddings,
            use_learned_positional_embeddings=False,
        )
        self.embedding_dropout = nn.Dropout(dropout)
        self.time_proj = Timesteps(width, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(width, time_embed_dim, timestep_activation_fn)
        self.transformer_blocks = nn.ModuleList(
            Mask2DiTBlock(
                dim=width,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                time_embed_dim=time_embed_dim,
                dropout=dropout,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm_final = nn.LayerNorm(width, norm_eps, norm_elementwise_affine)
        self.norm_out = AdaLayerNorm(
            embedding_dim=time_embed_dim,
            output_dim=2 * width,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            chunk_dim=1,
        )
        self.proj_out = nn.Linear(width, patch_size * patch_size * out_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        scene_frames: Sequence[int],
        generated: Tensor | None = None,
    ) -> Tensor:
        """Predict v for every latent frame.

        Args:
            hidden_states: (B, F, C, H, W), the latent frames of all scenes one after the other.
                Scenes that are not generated hold their clean latents.
            encoder_hidden_states: (B, S, T, text_embed_dim), one padded text per scene, padding
                included.
            timestep: (B,) integer diffusion timesteps.
            scene_frames: Latent frames of each scene; they add up to F and need not be equal.
            generated: (B, S) bool, False for scenes that are clean conditions: their video and
                their text tokens are modulated with the embedding of t = 0. None means all are
                generated.

        Returns:
            (B, F, C_out, H, W). Frames of condition scenes carry no meaning and no loss.
        """
        batch, frames, _, height, width = hidden_states.shape
        scenes, text_tokens = encoder_hidden_states.shape[1:3]
        patch = int(self.config.patch_size)
        grid = (height // patch, width // patch)
        assert sum(scene_frames) == frames, f"{scene_frames} latent frames, given {frames}"
        assert len(scene_frames) == scenes, f"{scenes} texts for {len(scene_frames)} scenes"
        plan = Plan(
            mask=self.config.mask,
            text_lengths=(text_tokens,) * scenes,
            video_lengths=tuple(f * grid[0] * grid[1] for f in scene_frames),
        )
        conditioning = Conditioning.of(
            self.embed_time(timestep, hidden_states.dtype),
            self.embed_time(torch.zeros_like(timestep), hidden_states.dtype)
            if generated is not None
            else None,
            generated,
            plan,
        )
        text = self.patch_embed.text_proj(encoder_hidden_states.flatten(1, 2))
        video = self.patch_embed.proj(hidden_states.flatten(0, 1))  # (B*F, D, H/p, W/p)
        video = video.flatten(2).transpose(1, 2).unflatten(0, (batch, frames)).flatten(1, 2)
        rotary_embedding = None
        if self.config.use_rotary_positional_embeddings:
            base = (self.config.sample_height // patch, self.config.sample_width // patch)
            head = int(self.config.attention_head_dim)
            cos, sin = rotary(head, frames, grid, base)
            rotary_embedding = (cos.to(video.device), sin.to(video.device))
        else:
            video = add_sincos(self.patch_embed, video, (height, width), scene_frames)
        video, text = self.embedding_dropout(video), self.embedding_dropout(text)

        for block in self.transformer_blocks:
            arguments = (video, text, conditioning, plan, rotary_embedding)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                # put there by diffusers' enable_gradient_checkpointing()
                video, text = cast("Any", self)._gradient_checkpointing_func(block, *arguments)
            else:
                video, text = block(*arguments)

        video = modulate_out(self.norm_out, self.norm_final(video), conditioning)
        return unpatchify(self.proj_out(video), frames, grid, patch)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) timesteps to (B, M)."""
        # the sinusoids are always float32; the layers after them may not be
        return self.time_embedding(self.time_proj(timestep).to(dtype))


def rotate_video(x: Tensor, num_text: int, rotary_embedding: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the video tokens of a (B, N, S*T + L, E) query or key."""
    rotated = apply_rotary_emb(x[:, :, num_text:], cast("Any", rotary_embedding))
    return torch.cat([x[:, :, :num_text], cast("Tensor", rotated)], 2)


def unpatchify(tokens: Tensor, frames: int, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, F*h*w, C*p*p) tokens back to (B, F, C, h*p, w*p) frames."""
    tiles = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, (frames, *grid))
    return tiles.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
