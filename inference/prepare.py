"""Bringing a loaded pipeline to its device the way the config says: memory and speed."""

from __future__ import annotations

import logging
from math import ceil
from typing import Any, cast

import torch

from inference.pipeline import Mask2DiTPipeline
from inference.quantization import quantize
from inference.step_caches import enable_step_cache, step_cache
from schemas.config import GenerationConfig
from schemas.errors import ConfigError

log = logging.getLogger(__name__)


def prepare(pipeline: Mask2DiTPipeline, config: GenerationConfig, device: torch.device) -> None:
    """Make a pipeline ready to sample on a device; once per pipeline.

    Args:
        pipeline: As ``from_pretrained`` returns it, in CPU memory.
        config: Scheduler, offload, quantize, compile, vae_tiling, vae_slicing and step_cache are
            used.
        device: Where to compute.

    Raises:
        ConfigError: Settings that cannot work together, or not on this device.
    """
    _check(config, device)
    pipeline.set_scheduler(config.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if config.vae_tiling:
        _tile(pipeline)
    if config.vae_slicing:
        pipeline.vae.enable_slicing()
    if config.quantize != "none":
        quantize(pipeline.transformer, config.quantize)
    if config.step_cache != "none":
        enable_step_cache(pipeline.transformer, step_cache(config.step_cache, pipeline))
    if config.compile:
        pipeline.transformer.compile_blocks()
    if config.offload == "none":
        pipeline.to(device)
    elif config.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        # leaf by leaf, the next one on its way while one computes. Blocks of the VAE are no
        # module list that diffusers could group.
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=True)
    log.info("prepared device=%s offload=%s quantize=%s compile=%s step_cache=%s", device,
             config.offload, config.quantize, config.compile, config.step_cache)  # fmt: skip


def _tile(pipeline: Mask2DiTPipeline) -> None:
    """Decode in tiles of about half the VAE's own height and width, as diffusers does.

    diffusers lets tiles overlap by a sixth and a fifth. Where that is no whole number of latent
    cells it returns videos of another size, so tiles are made larger until it is.
    """
    vae, cell = cast("Any", pipeline.vae), pipeline.space_compression
    height, width = (
        ceil(size / (cell * parts)) * cell * parts
        for size, parts in (
            (vae.tile_sample_min_height, round(1 / vae.tile_overlap_factor_height)),
            (vae.tile_sample_min_width, round(1 / vae.tile_overlap_factor_width)),
        )
    )
    vae.enable_tiling(tile_sample_min_height=height, tile_sample_min_width=width)


def _check(config: GenerationConfig, device: torch.device) -> None:
    """Refuse what cannot work together, before anything is changed."""
    by_layer = config.offload in ("sequential", "group")
    refusals = {
        f"offload: {config.offload} on {device}": (
            config.offload != "none" and device.type == "cpu",
            "a GPU: without one the weights are in CPU memory already",
        ),
        f"compile with offload: {config.offload}": (
            config.compile and by_layer,
            "offload none or model: weights that move in the middle of a block cannot be compiled",
        ),
        f"compile with step_cache: {config.step_cache}": (
            config.compile and config.step_cache != "none",
            "one of them: a compiled block cannot be left out in the middle",
        ),
    }
    for found, (wrong, expected) in refusals.items():
        if wrong:
            raise ConfigError(
                "these settings cannot work together", where="generation", found=found,
                expected=expected, do="change one of them",
            )  # fmt: skip
