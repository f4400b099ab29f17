"""The masked diffusion transformer: CogVideoX over several scenes at once.

Built from diffusers' own CogVideoX layers with the same names, so the state dict of a CogVideoX 2B,
5B or 1.5 folder loads unchanged and ours loads back into diffusers. What differs is the forward
pass: a text per scene, an attention mask, and modulation per scene.

Legend: B batch, S scenes, F latent frames of all scenes, C channels, H W latent height width, T
text tokens of a scene, L video tokens, N heads, E width of a head, D width, M width of the time
embedding.

Source: Mask2DiT (arXiv 2503.19881) sections 3.2 and 3.3, on CogVideoX (arXiv 2408.06072).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    CogVideoXPatchEmbed,
    TimestepEmbedding,
    Timesteps,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from schemas.errors import ConfigError
from training.attention import Plan, attend
from training.block import Mask2DiTBlock, Mix
from training.masks import predicate
from training.modulation import modulate_out, scene_times
from training.positions import Timeline, add_sincos, check_policy, rotary
from training.ulysses import (
    Sharing,
    check_shareable,
    compiled_and_shared,
    gather_video,
    own_part,
)


class Mask2DiTTransformer3DModel(ModelMixin, ConfigMixin, CacheMixin):
    """CogVideoX's transformer for several scenes, with a symmetric attention mask.

    The config is that of diffusers' ``CogVideoXTransformer3DModel`` plus what is about scenes:
    ``mask`` (:mod:`training.masks`), ``position_policy`` and ``position_gap``
    (:class:`training.positions.Timeline`) and ``attention_backend`` (:mod:`training.attention`).
    Weights are exchanged with it freely in both directions.

    Text-to-video CogVideoX 2B, 5B and 1.5 are supported. In 1.5 a token holds two latent frames, so
    every scene needs an even number of them.

    Attributes:
        checkpoint_every: Every how many blocks one is computed again in the backward pass: 1 every
            block, which keeps least in memory, 2 every second one, 0 none.
        sequence_group: The ranks that share a sequence, see :meth:`set_sequence_group`.
        compiled: Whether the blocks are compiled, see :meth:`compile_blocks`.

    Raises:
        ConfigError: The config is of another variant, or names a mask or policy that is not there.
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
        position_policy: str = "continuous",
        position_gap: int = 0,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        predicate(mask)
        check_policy(position_policy, position_gap)
        if ofs_embed_dim or use_learned_positional_embeddings or in_channels != out_channels:
            raise ConfigError(
                "this CogVideoX variant is not supported",
                where="transformer/config.json",
                found=f"ofs_embed_dim={ofs_embed_dim}, in_channels={in_channels}, out_channels="
                f"{out_channels}, use_learned_positional_embeddings="
                f"{use_learned_positional_embeddings}",
                expected="a text-to-video CogVideoX transformer (2B, 5B or 1.5)",
                do="use THUDM/CogVideoX-2b, CogVideoX-5b or CogVideoX1.5-5B, not an image-to-video "
                "model",
            )
        width = num_attention_heads * attention_head_dim
        self.patch_embed = CogVideoXPatchEmbed(
            patch_size=patch_size,
            patch_size_t=patch_size_t,
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
            use_positional_embeddings=False,  # they depend on the scenes, see forward
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
        self.proj_out = nn.Linear(width, (patch_size_t or 1) * patch_size**2 * out_channels)
        self.checkpoint_every = 0
        self.sequence_group: dist.ProcessGroup | None = None
        self.compiled = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        scene_frames: Sequence[int],
        generated: Tensor | None = None,
        timeline: Timeline | None = None,
        mixes: Sequence[Mix] | None = None,
        mask: str | None = None,
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
            timeline: Where these scenes are in time if they are part of a longer sequence
                (:mod:`training.scene_cache`); None lays them out from 0.
            mixes: What attends in each block, if not :func:`training.attention.attend`.
            mask: Attention mask in place of the model's own.

        Returns:
            (B, F, C, H, W). Frames of condition scenes carry no meaning and no loss.

        Raises:
            ConfigError: A scene's frames do not fit the model (CogVideoX 1.5 takes pairs).
        """
        frames, _, height, width = hidden_states.shape[1:]
        assert sum(scene_frames) == frames, f"{scene_frames} latent frames, given {frames}"
        scenes, text_tokens = encoder_hidden_states.shape[1:3]
        assert len(scene_frames) == scenes, f"{scenes} texts for {len(scene_frames)} scenes"
        patch = int(self.config.patch_size)
        grid = (height // patch, width // patch)
        scene_steps = self.patched_frames(scene_frames)
        plan = Plan(
            mask=mask or self.config.mask,
            text_lengths=(text_tokens,) * scenes,
            video_lengths=tuple(steps * grid[0] * grid[1] for steps in scene_steps),
            backend=self.config.attention_backend,
        )
        if self.sequence_group is not None:
            plan = replace(plan, sharing=Sharing.of(self.sequence_group, plan.tokens))
        dtype = hidden_states.dtype
        clean = self.embed_time(torch.zeros_like(timestep[:1]), dtype)
        times = scene_times(self.embed_time(timestep, dtype), clean, generated)

        embedded = self.patch_embed(encoder_hidden_states.flatten(1, 2), hidden_states)
        text, video = embedded.split([sum(plan.text_lengths), sum(plan.video_lengths)], 1)
        timeline = timeline or self.timeline(scene_frames)
        video, rotations = self.place(video, timeline, grid, sum(plan.text_lengths))
        video, text = self.embedding_dropout(video), self.embedding_dropout(text)
        if plan.sharing is not None:
            text, video, rotations = own_part(text, video, rotations, plan.sharing)
        if self.compiled:
            # these are views with other strides than a layer's output, which would compile twice
            text, video = (x.clone(memory_format=torch.contiguous_format) for x in (text, video))

        mixes = mixes or [attend] * len(self.transformer_blocks)
        for i, (block, mix) in enumerate(zip(self.transformer_blocks, mixes, strict=True)):
            arguments = (video, text, times, plan, rotations, mix)
            recomputed = self.checkpoint_every and i % self.checkpoint_every == 0
            if recomputed and torch.is_grad_enabled():
                video, text = checkpoint(block, *arguments, use_reentrant=False)
            else:
                video, text = block(*arguments)

        video = modulate_out(self.norm_out, self.norm_final(video), times, plan)
        patches = self.proj_out(video)
        if plan.sharing is not None:
            patches = gather_video(patches, sum(plan.text_lengths), plan.sharing)
        return unpatchify(patches, grid, int(self.config.patch_size_t or 1), patch)

    def set_sequence_group(self, group: dist.ProcessGroup | None) -> None:
        """Let the ranks of a group share every sequence, or none (None).

        They must then call the model together, with the same inputs, and compute the same loss of
        its output. The output is that of one rank; the gradient of the loss is the mean of the
        gradients over the ranks (:mod:`training.ulysses`).

        Raises:
            ConfigError: The group does not divide the attention heads, or the blocks are compiled.
        """
        if group is not None:
            check_shareable(self.config.num_attention_heads, group, compiled=self.compiled)
        self.sequence_group = group

    def compile_blocks(self) -> None:
        """Compile each block in place with torch.compile, which keeps the names of the weights.

        All blocks run the same compiled code. There is one for each combination of scene lengths,
        with and without conditions, with and without gradients; more than torch's recompile limit
        (8) are torch's error.

        Raises:
            ConfigError: Ranks share the sequence.
        """
        if self.sequence_group is not None:
            raise compiled_and_shared()
        for block in self.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False)
        self.compiled = True

    # diffusers' switches, which its tools and peft know: all blocks or none
    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any block is computed again in the backward pass."""
        return self.checkpoint_every > 0

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None
    ) -> None:
        """Compute every block again in the backward pass, with torch's own checkpoint function."""
        assert gradient_checkpointing_func is None, "another function than torch's is not supported"
        self.checkpoint_every = 1

    def disable_gradient_checkpointing(self) -> None:
        """Compute no block again."""
        self.checkpoint_every = 0

    def patched_frames(self, scene_frames: Sequence[int]) -> list[int]:
        """Positions in time of each scene: its latent frames, or pairs of them in CogVideoX 1.5.

        Raises:
            ConfigError: A scene's frames cannot be grouped.
        """
        together = int(self.config.patch_size_t or 1)
        if any(frames % together for frames in scene_frames):
            raise ConfigError(
                "a scene's latent frames do not fit this CogVideoX 1.5 model",
                found=f"{list(scene_frames)} latent frames",
                expected=f"a multiple of {together} in every scene",
                do="choose frames per scene so that 1 + (frames - 1) / 4 is such a multiple, "
                "e.g. 45 or 53",
            )
        return [frames // together for frames in scene_frames]

    def timeline(self, scene_frames: Sequence[int]) -> Timeline:
        """Where scenes of so many latent frames are in time."""
        steps = self.patched_frames(scene_frames)
        return Timeline.of(steps, self.config.position_policy, self.config.position_gap)

    def place(
        self, video: Tensor, timeline: Timeline, grid: tuple[int, int], text_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """Add sinusoidal positions to the video tokens, or make the rotations of all tokens."""
        config = self.config
        if not config.use_rotary_positional_embeddings:
            added = add_sincos(
                video,
                timeline,
                grid,
                time_scale=config.temporal_interpolation_scale,
                space_scale=config.spatial_interpolation_scale,
            )
            return added, None
        rotations = rotary(
            config.attention_head_dim,
            text_tokens,
            timeline.positions,
            grid,
            (config.sample_height // config.patch_size, config.sample_width // config.patch_size),
            sliced=config.patch_size_t is not None,
            dtype=torch.promote_types(video.dtype, torch.float32),
            device=video.device,
        )
        return video, rotations

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) timesteps to (B, M)."""
        # the sinusoids are always float32; the layers after them may not be
        return self.time_embedding(self.time_proj(timestep).to(dtype))


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_t: int, patch: int) -> Tensor:
    """(B, F/q*h*w, C*q*p*p) tokens back to (B, F, C, h*p, w*p); q frames and p x p in a token."""
    tiles = tokens.unflatten(2, (-1, patch_t, patch, patch)).unflatten(1, (-1, *grid))
    frames = tiles.permute(0, 1, 5, 4, 2, 6, 3, 7)  # (B, F/q, q, C, h, p, w, p)
    return frames.flatten(6, 7).flatten(4, 5).flatten(1, 2)
