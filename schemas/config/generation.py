"""Configs of generation and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.config.base import StageConfig
from schemas.config.curation import SimilarityModelConfig


class GenerationConfig(StageConfig):
    """Batch generation over a prompt manifest."""

    prompts: str = Field(
        default="assets/samples/prompts.parquet",
        description="Prompt manifest (Parquet): prompt_id, prompts, negative_prompt, seed, "
        "extend_prompts.",
    )
    model: str | None = Field(
        default=None,
        description="Model folder; empty = the result of the newest SFT run in the workspace.",
    )
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
    context_scenes: int = Field(
        default=2,
        description="Last scenes given as clean conditions when a story is extended, 1 to 15. "
        "Paper: 2.",
        ge=1,
        le=15,
    )
    fps: int = Field(
        default=8,
        description="Frames per second of the written mp4, 1 to 120. Paper: 8.",
        ge=1,
        le=120,
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
