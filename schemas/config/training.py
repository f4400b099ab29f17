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
    shorter_frames: tuple[int, ...] = Field(
        default=(),
        description="Other lengths a scene may have, each 1 + a multiple of 4 and below frames: a "
        "clip too short for frames takes the longest of these it can fill. () = such a clip is "
        "left out, as the paper's trainer does.",
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
        wrong = [n for n in self.shorter_frames if n < 1 or n >= self.frames or (n - 1) % 4]
        if wrong:
            raise ValueError(
                f"shorter_frames must be 1 + a multiple of 4 each and below frames={self.frames}, "
                f"found {wrong}"
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
    def lengths(self) -> tuple[int, ...]:
        """Frames a scene may have, the most first."""
        return tuple(sorted({self.frames, *self.shorter_frames}, reverse=True))

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
    keep_every: int = Field(
        default=0,
        description="Checkpoints at multiples of this step are never removed, >= 0; 0 = none.",
        ge=0,
    )
    ema_decay: float = Field(
        default=0.0,
        description="Decay of the exponential moving average of the weights per step, 0 to 1; the "
        "exported model then holds the average. 0 = no average. Paper: none; finetuners use 0.999 "
        "to 0.9999.",
        ge=0,
        lt=1,
    )
    validate_every: int = Field(
        default=0,
        description="Steps between validation losses (samples of the manifest's val split, always "
        "the same noise and timesteps), >= 0; 0 = never.",
        ge=0,
    )
    validation_samples: int = Field(
        default=8, description="Samples of the val split a validation loss is taken over.", ge=1
    )
    sample_every: int = Field(
        default=0,
        description="Steps between sample videos, made from the checkpoint of that step (with the "
        "averaged weights where ema_decay is set); a multiple of checkpoint_every; 0 = never.",
        ge=0,
    )
    max_bad_samples: int = Field(
        default=0,
        description="Samples that may turn out unreadable while training; each is left out of its "
        "batch, logged and counted. One more fails the run. 0 = the first one fails it.",
        ge=0,
    )
    seed: int = Field(
        default=0, description="Seed of sample order, noise and timesteps, >= 0.", ge=0
    )

    @model_validator(mode="after")
    def _samples(self) -> TrainStageConfig:
        if self.sample_every % self.checkpoint_every:
            raise ValueError(
                f"sample_every must be a multiple of checkpoint_every={self.checkpoint_every} (the "
                f"videos are made from a checkpoint), found {self.sample_every}"
            )
        return self


class LatentsConfig(StageConfig):
    """How training meets its videos: encoded once beforehand, or at every visit."""

    source: Literal["cache", "pixels"] = Field(
        default="cache",
        description="cache: every scene goes through the VAE and every caption through T5 once, "
        "before training. pixels: at every visit, from a random start frame, as the paper's "
        "trainer does; many times slower.",
    )
    workers: int = Field(
        default=1,
        description="Ray actors that encode, >= 1, each with a GPU of its own where there are GPUs "
        "and with a CPU where not. 1 = in the calling process, without Ray.",
        ge=1,
    )
    shard_scenes: int = Field(
        default=64,
        description="Scenes (or captions) per shard file of the cache, >= 1. A killed job repeats "
        "at most the shards it was at. 64 scenes at the paper's size take 580 MB in bfloat16.",
        ge=1,
    )
    sample_posterior: bool = Field(
        default=False,
        description="Draw latents from the VAE's posterior anew at every visit, as the paper's "
        "trainer does, or take its mean (false).",
    )


class LoraConfig(StageConfig):
    """Low-rank adapters in place of whole weights."""

    rank: int = Field(default=16, description="Rank of the adapters, >= 1.", ge=1)
    alpha: float = Field(
        default=16.0, description="Scale: the adapter's product is multiplied by alpha/rank.", gt=0
    )
    targets: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"),
        description="Names of the layers that get an adapter, as they end.",
    )


class LaunchConfig(StageConfig):
    """Where the ranks run."""

    launcher: Literal["local", "pdsh", "openmpi", "slurm"] = Field(
        default="local",
        description="local: this machine. pdsh and openmpi: DeepSpeed's launchers over the hosts "
        "of hostfile. slurm: srun inside an allocation (sbatch or salloc).",
    )
    hostfile: str = Field(
        default="",
        description="DeepSpeed host file, a line 'name slots=8' per machine; pdsh and openmpi need "
        "it, slurm makes its own from the allocation.",
    )
    num_nodes: int = Field(default=1, description="Machines, >= 1; 1 for local.", ge=1)
    master_addr: str = Field(
        default="", description="Address of the first machine; '' = found by the launcher."
    )
    master_port: int = Field(
        default=0, description="TCP port of the first rank; 0 = a free one.", ge=0, le=65535
    )

    @model_validator(mode="after")
    def _nodes(self) -> LaunchConfig:
        if self.launcher == "local" and (self.hostfile or self.num_nodes != 1):
            raise ValueError(
                "launcher=local takes neither hostfile nor num_nodes; choose pdsh, openmpi or slurm"
            )
        if self.launcher in ("pdsh", "openmpi") and not self.hostfile:
            raise ValueError(f"launcher={self.launcher} needs hostfile")
        return self


Monitor = Literal["tensorboard", "wandb", "csv", "mlflow"]


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
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none",
        description="What lies in the CPU's memory between uses: nothing, the optimizer's state "
        "(zero_stage 1 to 3), or the parameters too (zero_stage 3).",
    )
    activation_checkpointing: int = Field(
        default=0,
        description="Every how many blocks one is computed again in the backward pass, >= 0: 1 = "
        "every block (a forward pass more, and the memory of one block in place of all), 2 = every "
        "second, 0 = none. Paper: 1.",
        ge=0,
    )
    compile_blocks: bool = Field(
        default=False,
        description="torch.compile each block. On a GPU worth the minutes it takes at the start.",
    )
    lora: LoraConfig | None = Field(
        default=None, description="Train low-rank adapters only; null = the weights themselves."
    )
    trainable: tuple[str, ...] = Field(
        default=(),
        description="Regular expressions; weights whose name one of them finds are trained, the "
        "others are left as they are. () = all weights.",
    )
    num_processes: int = Field(
        default=1, description="Ranks per machine (GPUs, or CPU processes), >= 1.", ge=1
    )
    sequence_parallel: int = Field(
        default=1,
        description="Ranks that share one sample, each with a part of its tokens (DeepSpeed "
        "Ulysses), >= 1; divides the number of ranks and of attention heads.",
        ge=1,
    )
    launch: LaunchConfig = Field(default=LaunchConfig(), description="Where the ranks run.")
    latents: LatentsConfig = Field(
        default=LatentsConfig(), description="How videos become latents."
    )
    monitors: tuple[Monitor, ...] = Field(
        default=("tensorboard",),
        description="Where metrics go besides metrics.jsonl. wandb and mlflow need their package.",
    )
    retries: int = Field(
        default=1,
        description="Times the flow starts a training process again that died, >= 0; it goes on "
        "from the newest checkpoint.",
        ge=0,
    )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.num_processes * self.launch.num_nodes

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "dtype=bfloat16 needs zero_stage 1, 2 or 3, which keep float32 weights"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload=all needs zero_stage=3, found {self.zero_stage}")
        if self.world_size % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel={self.sequence_parallel} does not divide the "
                f"{self.world_size} ranks (num_processes x launch.num_nodes)"
            )
        if self.compile_blocks and self.sequence_parallel > 1:
            raise ValueError("compile_blocks and sequence_parallel exclude each other")
        if self.compile_blocks and len(self.model.lengths) > 1:
            raise ValueError(
                "compile_blocks needs scenes of one length (torch compiles each combination of "
                "lengths anew and stops at the eighth); set model.shorter_frames=()"
            )
        if self.lora is not None and self.trainable:
            raise ValueError("lora and trainable exclude each other: lora says itself what trains")
        return self
