"""Configs of generation and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.config.base import StageConfig
from schemas.config.curation import SimilarityModelConfig


class SamplingConfig(StageConfig):
    """How one video is sampled. A row of a prompt manifest may override each of these."""

    scheduler: Literal["ddim", "dpm"] = Field(
        default="ddim", description="CogVideoX DDIM or DPM++. Paper: ddim."
    )
    steps: int = Field(
        default=12, description="Denoising steps, 1 to 1000. Paper: 50.", ge=1, le=1000
    )
    guidance: float = Field(
        default=6.0,
        description="Classifier-free guidance; 1 or less switches it off. Paper: 6.",
        ge=0,
    )
    dynamic_guidance: bool = Field(
        default=False,
        description="Let guidance swing between 1 and 1 + its value from step to step, as "
        "CogVideoX's own pipeline can. Paper: off.",
    )
    guidance_rescale: float = Field(
        default=0.0,
        description="Share of the guided prediction scaled back to the standard deviation of the "
        "unguided one, 0 to 1 (arXiv 2305.08891, section 3.4). Paper: 0.",
        ge=0,
        le=1,
    )
    scene_guidance: bool = Field(
        default=False,
        description="Let guidance lead a scene to the other scenes as well as to its text: its "
        "negative pass computes each scene apart, as with mask v1. Scenes have more in common, "
        "without a further pass. For models that saw lone scenes too; not with step_cache. "
        "Paper: off.",
    )
    context_scenes: int = Field(
        default=2,
        description="Last scenes given as clean conditions when a story is extended, 1 to 15. "
        "Paper: 2.",
        ge=1,
        le=15,
    )
    condition_noise: bool = Field(
        default=False,
        description="Add the noise of the scheduler's first level to given scenes, as the official "
        "inference does (training used clean ones). Off: they stay clean.",
    )


class GenerationConfig(SamplingConfig):
    """Batch generation over a prompt manifest."""

    prompts: str = Field(
        default="assets/samples/prompts.parquet",
        description="Prompt manifest: Parquet, CSV, JSONL or JSON, one story per row "
        "(`triptych generate --help` lists the columns).",
    )
    model: str | None = Field(
        default=None,
        description="Model folder; empty = the result of the newest SFT run in the workspace.",
    )
    fps: int = Field(
        default=8,
        description="Frames per second of the written mp4, 1 to 120. Paper: 8.",
        ge=1,
        le=120,
    )
    actors: int = Field(
        default=0,
        description="Model copies at work side by side, 0 to 1024; 0 = one per GPU, without GPU "
        "one per engine.num_cpus / threads.",
        ge=0,
        le=1024,
    )
    threads: int = Field(
        default=1,
        description="CPU threads of one copy, 1 to 256. Another number may change the last bits.",
        ge=1,
        le=256,
    )
    micro_batch: int = Field(
        default=1,
        description="Most stories of equal shape denoised together, 1 to 64; halved where memory "
        "runs out.",
        ge=1,
        le=64,
    )
    retries: int = Field(
        default=1, description="Further tries of a story that failed, 0 to 10.", ge=0, le=10
    )
    offload: Literal["none", "model", "sequential", "group"] = Field(
        default="none",
        description="Keep weights in CPU memory and bring them to the GPU by piece, by layer or by "
        "group of layers: slower, smaller.",
    )
    quantize: Literal["none", "int8", "fp8"] = Field(
        default="none",
        description="Store the transformer's linear weights in 8 bits (torchao); computing stays "
        "in training.dtype. Changes the videos.",
    )
    compile: bool = Field(
        default=False, description="Compile each transformer block with torch.compile."
    )
    vae_tiling: bool = Field(
        default=False,
        description="Decode in overlapping tiles: less memory, and seams are blended.",
    )
    vae_slicing: bool = Field(
        default=False, description="Decode one story at a time where a batch has several."
    )
    step_cache: Literal["none", "first_block", "pyramid", "faster"] = Field(
        default="none",
        description="Reuse parts of earlier steps (diffusers' FirstBlockCache, Pyramid Attention "
        "Broadcast, FasterCache): an approximation that changes the videos.",
    )
    kv_cache: bool = Field(
        default=True,
        description="Keep keys and values of given scenes where that is exact, which is with the "
        "mask scene_causal; other masks have no such cache.",
    )
    save_frames: bool = Field(default=False, description="Also write every frame as PNG.")
    save_scenes: bool = Field(default=False, description="Also write every scene as an mp4.")
    save_latents: bool = Field(
        default=False, description="Also write the latents of every scene as safetensors."
    )
    max_error_ratio: float = Field(
        default=0.5,
        description="The run fails when a larger share of prompts or videos fails, 0 to 1.",
        ge=0,
        le=1,
    )


class EvaluationConfig(SimilarityModelConfig):
    """Consistency scores of generated videos. Paper: ViCLIP."""

    frames_per_scene: int = Field(
        default=8, description="Frames scored per scene, 1 to 64. ViCLIP: 8.", ge=1, le=64
    )
