"""Presets: functions that return a whole config.

The fields' own defaults are the embedded ``tiny`` preset.
"""

from __future__ import annotations

from collections.abc import Callable

from schemas.config.curation import (
    ClipsConfig,
    CurationConfig,
    EmbeddingConfig,
    FiltersConfig,
    ManifestsConfig,
    SourcesConfig,
    WindowsConfig,
)
from schemas.config.generation import EvaluationConfig, GenerationConfig
from schemas.config.root import TriptychConfig
from schemas.config.training import ModelConfig, TrainingConfig, TrainStageConfig
from schemas.errors import ConfigError


def tiny() -> TriptychConfig:
    """Embedded default: a random model of the real classes, small enough for a laptop's CPU."""
    return TriptychConfig()


def _paper(base: str, num_processes: int) -> TriptychConfig:
    stage = TrainStageConfig(
        steps=10_000,
        batch_size=8,
        micro_batch_size=1,
        lr=1e-5,
        warmup_steps=100,
        adam_eps=1e-10,
        max_grad_norm=0.05,
        checkpoint_every=500,
        keep_checkpoints=3,
    )
    return TriptychConfig(
        curation=CurationConfig(
            dataset="cartoons",
            clips=ClipsConfig(min_frames=49),
            windows=WindowsConfig(scenes_per_sample=3),
        ),
        training=TrainingConfig(
            model=ModelConfig(base=base, frames=49, height_px=480, width_px=720, text_tokens=226),
            pretrain=stage,
            sft=stage.model_copy(update={"conditional_p": 0.5}),
            dtype="bfloat16",
            activation_checkpointing=1,
            num_processes=num_processes,
        ),
        generation=GenerationConfig(steps=50),
    )


def cogvideox_2b() -> TriptychConfig:
    """CogVideoX-2B in a local folder, the paper's recipe, 8 GPUs."""
    return _paper("models/CogVideoX-2b", 8)


def cogvideox_5b() -> TriptychConfig:
    """CogVideoX-5B in a local folder, the paper's recipe, 8 GPUs."""
    return _paper("models/CogVideoX-5b", 8)


def paper_pretrain() -> TriptychConfig:
    """The paper's stage 1 alone: CogVideoX-5B, 10,000 steps on unrelated scenes."""
    config = cogvideox_5b()
    sft = config.training.sft.model_copy(update={"steps": 0})
    return config.model_copy(update={"training": config.training.model_copy(update={"sft": sft})})


def paper_sft() -> TriptychConfig:
    """The paper's stage 2 alone: 10,000 steps with p = 0.5 from ``training.model.base``."""
    config = cogvideox_5b()
    pretrain = config.training.pretrain.model_copy(update={"steps": 0})
    return config.model_copy(
        update={"training": config.training.model_copy(update={"pretrain": pretrain})}
    )


def toonworld(folder: str = "toonworld") -> TriptychConfig:
    """Cartoons (`triptych toonworld`) and the embedded model that knows them, trained on for a bit.

    Args:
        folder: Where ``triptych toonworld`` wrote its videos.
    """
    stage = TrainStageConfig(
        steps=10, batch_size=4, micro_batch_size=4, lr=2e-4, warmup_steps=5, checkpoint_every=10
    )
    viclip = "assets/tiny/viclip"
    return TriptychConfig(
        curation=CurationConfig(
            dataset="toonworld",
            sources=SourcesConfig(inputs=(folder,), captions_csv=f"{folder}/captions.csv"),
            clips=ClipsConfig(min_frames=10),
            # measured on films, these would take dark, flat or calm cartoons for black or still
            filters=FiltersConfig(max_black_ratio=None, max_still_ratio=None, max_comb_ratio=None),
            embedding=EmbeddingConfig(model="viclip", weights=viclip, long_text="chunk"),
            # three quarters of the related windows and no other (assets/tiny/viclip/CARD.md)
            manifests=ManifestsConfig(low=0.6),
        ),
        training=TrainingConfig(
            model=ModelConfig(
                base="assets/tiny/model",
                frames=5,
                height_px=64,
                width_px=64,
                max_stride=2,
                text_tokens=40,
            ),
            pretrain=stage,
            sft=stage.model_copy(update={"steps": 30, "conditional_p": 0.5}),
            zero_stage=0,  # one rank has nothing to share
        ),
        generation=GenerationConfig(
            prompts="assets/tiny/stories.jsonl",
            steps=20,
            guidance=3.0,
            scene_guidance=True,
            micro_batch=8,
            fps=4,
        ),
        evaluation=EvaluationConfig(model="viclip", weights=viclip, long_text="chunk"),
    )


PRESETS: dict[str, Callable[[], TriptychConfig]] = {
    f.__name__: f for f in (tiny, toonworld, cogvideox_2b, cogvideox_5b, paper_pretrain, paper_sft)
}


def preset(name: str) -> TriptychConfig:
    """The preset called ``name``.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError("unknown preset", found=name, expected=f"one of {', '.join(PRESETS)}")
    return PRESETS[name]()
