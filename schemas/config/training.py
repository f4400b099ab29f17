"""Configs of the model and of training. Values from the paper name their section; ours say why."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from schemas.config.base import StageConfig


class ModelConfig(StageConfig):
    """The base model and the shape of what it is trained on."""

    base: str = Field(
        default="tiny",
        description="Folder in diffusers' CogVideoX layout (transformer, vae, text_encoder, "
        "tokenizer, scheduler), "
        "or 'tiny': a seeded random model of the same classes, made on the spot.",
    )
    mask: Literal["v1", "v2", "v3", "v4", "v5", "scene_causal"] = Field(
        default="v2",
        description="Attention mask. Paper: v2 (text sees its own scene; video sees its own text "
        "and all video).",
    )
    position_policy: Literal["continuous", "reset", "gap"] = Field(
        default="continuous",
        description="How scenes lie in time: continuous (time runs on over the scenes), reset "
        "(every scene starts at 0) or gap (position_gap is left out between scenes). Paper: "
        "continuous.",
    )
    position_gap: int = Field(
        default=0,
        description="Positions left out between two scenes, 0 to 1000; only with "
        "position_policy=gap. One position is a latent frame (4 frames of video), in CogVideoX 1.5 "
        "a pair of them.",
        ge=0,
        le=1000,
    )
    attention_backend: Literal["auto", "dense", "flex", "lse"] = Field(
        default="auto",
        description="How attention is computed; all are exact. auto chooses by device, mask and "
        "type and logs the choice. dense holds the whole mask.",
    )
    scenes: int = Field(default=3, description="Scenes per sample, 1 to 16. Paper: 3.", ge=1, le=16)
    frames: int = Field(
        default=9,
        description="Frames per scene; 1 + a multiple of 4 (VAE). Paper: 49.",
        ge=1,
        le=201,
    )
    height_px: int = Field(
        default=64, description="Frame height; a multiple of 16. Paper: 480.", ge=16, multiple_of=16
    )
    width_px: int = Field(
        default=96, description="Frame width; a multiple of 16. Paper: 720.", ge=16, multiple_of=16
    )
    max_stride: int = Field(
        default=3,
        description="Largest frame step when a scene is read, 1 to 30. Paper's code: 3.",
        ge=1,
        le=30,
    )
    text_tokens: int = Field(
        default=96,
        description="Text tokens per scene, always padded to this. CogVideoX: 226.",
        ge=8,
        le=1024,
    )
    seed: int = Field(default=0, description="Seed of the 'tiny' weights, >= 0.", ge=0)

    @model_validator(mode="after")
    def _frames(self) -> ModelConfig:
        if (self.frames - 1) % 4:
            raise ValueError(
                f"frames must be 1 + a multiple of 4 (the VAE's time compression), found "
                f"{self.frames}"
            )
        return self

    @model_validator(mode="after")
    def _gap(self) -> ModelConfig:
        if self.position_gap and self.position_policy != "gap":
            raise ValueError(
                f"position_gap is for position_policy=gap, found position_gap={self.position_gap} "
                f"with position_policy={self.position_policy}"
            )
        return self

    @property
    def scene_settings(self) -> dict[str, Any]:
        """The fields that are also keys of our transformer's config.json."""
        return self.model_dump(
            include={"mask", "position_policy", "position_gap", "attention_backend"}
        )


class TrainStageConfig(StageConfig):
    """One training stage (pretrain or sft)."""

    steps: int = Field(
        default=40,
        description="Optimizer steps, >= 0; 0 leaves the stage out. Paper: 10,000.",
        ge=0,
    )
    batch_size: int = Field(
        default=2, description="Samples per optimizer step over all ranks, >= 1. Paper: 8.", ge=1
    )
    micro_batch_size: int = Field(
        default=2, description="Samples per rank and forward pass, >= 1.", ge=1
    )
    lr: float = Field(
        default=1e-3,
        description="Learning rate, > 0. Paper: 1e-5; tiny random models need more.",
        gt=0,
    )
    warmup_steps: int = Field(
        default=5, description="Steps of linear warm-up, then constant, >= 0. Paper: 100.", ge=0
    )
    weight_decay: float = Field(
        default=3e-2, description="AdamW weight decay, >= 0. Paper: 3e-2.", ge=0
    )
    adam_beta1: float = Field(
        default=0.9, description="AdamW beta 1, 0 to 1. Paper: 0.9.", ge=0, lt=1
    )
    adam_beta2: float = Field(
        default=0.999, description="AdamW beta 2, 0 to 1. Paper: 0.999.", ge=0, lt=1
    )
    adam_eps: float = Field(default=1e-8, description="AdamW epsilon, > 0. Paper: 1e-10.", gt=0)
    max_grad_norm: float = Field(
        default=1.0,
        description="Gradient clipping norm, > 0. Paper: 0.05 (never applied by the official "
        "launch).",
        gt=0,
    )
    conditional_p: float = Field(
        default=0.0,
        description="Probability that a step trains the segment-level conditional mask: the last "
        "scene is "
        "generated from the clean earlier ones, 0 to 1. Paper: 0.5 in SFT.",
        ge=0,
        le=1,
    )
    text_dropout: float = Field(
        default=0.1,
        description="Probability that a sample's captions are emptied (for guidance), 0 to 1.",
        ge=0,
        le=1,
    )
    checkpoint_every: int = Field(default=20, description="Steps between checkpoints, >= 1.", ge=1)
    keep_checkpoints: int = Field(default=2, description="Newest checkpoints kept, >= 1.", ge=1)
    seed: int = Field(
        default=0, description="Seed of sample order, noise and timesteps, >= 0.", ge=0
    )


class TrainingConfig(StageConfig):
    """Pre-training on unrelated scenes, then SFT on related ones."""

    model: ModelConfig = Field(default=ModelConfig(), description="Base model and shapes.")
    pretrain: TrainStageConfig = Field(
        default=TrainStageConfig(), description="Stage 1: three unrelated scenes."
    )
    sft: TrainStageConfig = Field(
        default=TrainStageConfig(conditional_p=0.5),
        description="Stage 2: three related scenes, started from stage 1.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2, description="DeepSpeed ZeRO stage. Paper: 2."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Compute type. Paper: bfloat16; a CPU is faster and more exact in float32.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute every block again in the backward pass: a forward pass more, and the "
        "memory of one block in place of all. Paper: on.",
    )
    num_processes: int = Field(
        default=1, description="Ranks on this machine (GPUs, or CPU processes), >= 1.", ge=1
    )
