"""diffusers' step caches on our transformer: parts of earlier steps in place of computing them.

All of them are approximations and change the videos. What they reuse depends on the whole batch,
so with them a story may also come out differently in another micro-batch.

diffusers attaches them to modules. Its First Block Cache holds on to blocks and has to be told
where ours take and return video and text. Pyramid Attention Broadcast and FasterCache hold on to
attention modules, but ours attends in a method, so each block gets a module that calls it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.faster_cache import FasterCacheConfig
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from schemas.errors import GenerationError
from training.block import Mask2DiTBlock
from training.transformer import Mask2DiTTransformer3DModel

if TYPE_CHECKING:
    from inference.pipeline import Mask2DiTPipeline

CacheConfig = FasterCacheConfig | FirstBlockCacheConfig | PyramidAttentionBroadcastConfig

_ATTENTION = ("transformer_blocks.*cached_attention",)

# private to diffusers 0.42, which has no public way to say it for a block whose arguments have
# other names; positions as in Mask2DiTBlock.forward
TransformerBlockRegistry.register(
    Mask2DiTBlock,
    TransformerBlockMetadata(
        return_hidden_states_index=0,
        return_encoder_hidden_states_index=1,
        _cached_parameter_indices={"hidden_states": 0, "encoder_hidden_states": 1},
    ),
)


def step_cache(
    name: Literal["first_block", "pyramid", "faster"], pipeline: Mask2DiTPipeline
) -> CacheConfig:
    """The settings of a cache: those of diffusers' documentation for CogVideoX."""

    def timestep() -> int:
        return int(cast("Tensor", pipeline.current_timestep))

    if name == "first_block":
        return FirstBlockCacheConfig(threshold=0.05)
    if name == "pyramid":
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            spatial_attention_block_identifiers=_ATTENTION,
            current_timestep_callback=timestep,
        )
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        low_frequency_weight_update_timestep_range=(99, 641),
        high_frequency_weight_update_timestep_range=(-1, 301),
        spatial_attention_block_identifiers=_ATTENTION,
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW",
        current_timestep_callback=timestep,
        _unconditional_conditional_input_kwargs_identifiers=[
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "generated",
        ],
    )


def enable_step_cache(transformer: Mask2DiTTransformer3DModel, cache: CacheConfig) -> None:
    """Let a transformer reuse parts of earlier steps; ``disable_cache`` ends it."""
    if not isinstance(cache, FirstBlockCacheConfig):
        for block in transformer.transformer_blocks:
            if not hasattr(block, "cached_attention"):
                block.cached_attention = _Attention(cast("Mask2DiTBlock", block).attend)
                # a module's own attributes go before the methods of its class
                block.__dict__["attend"] = block.cached_attention
    transformer.enable_cache(cache)


def start_step_cache(
    transformer: Mask2DiTTransformer3DModel, *, guided: bool, scene_guided: bool = False
) -> None:
    """Begin a call: forget the steps of the one before, which may have failed half-way.

    Raises:
        GenerationError: FasterCache without guidance: it leaves out the negative prompts' half of
            the batch, and would take half of the stories for it. Any cache with scene guidance: it
            would take the second pass of a step for the next step.
    """
    model = cast("Any", transformer)
    if model.is_cache_enabled and scene_guided:
        raise GenerationError(
            "step caches know one pass a step, scene guidance makes two",
            expected="one of the two",
            do="set generation.step_cache=none, or generation.scene_guidance=false",
        )
    if isinstance(model._cache_config, FasterCacheConfig) and not guided:
        raise GenerationError(
            "FasterCache needs guidance",
            expected="guidance above 1",
            do="set generation.guidance, or another generation.step_cache",
        )
    model._reset_stateful_cache()


class _Attention(nn.Module, AttentionModuleMixin):
    """A module around the attention of a block, without weights of its own."""

    _supports_qkv_fusion: ClassVar = False

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self._attend = attend

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return self._attend(*arguments, **named)
