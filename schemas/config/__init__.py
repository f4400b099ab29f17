"""Configuration: one frozen model per stage, whole-pipeline presets, commented YAML files."""

from schemas.config.curation import (
    ClipsConfig,
    CurationConfig,
    DedupConfig,
    EmbeddingConfig,
    ExportConfig,
    FiltersConfig,
    ManifestsConfig,
    ScorersConfig,
    ShotsConfig,
    SourcesConfig,
    WindowsConfig,
)
from schemas.config.files import dump_yaml, load_config
from schemas.config.generation import EvaluationConfig, GenerationConfig
from schemas.config.presets import PRESETS, preset
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.config.training import ModelConfig, TrainingConfig, TrainStageConfig

__all__ = [
    "PRESETS",
    "ClipsConfig",
    "CurationConfig",
    "DedupConfig",
    "EmbeddingConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FiltersConfig",
    "GenerationConfig",
    "ManifestsConfig",
    "ModelConfig",
    "ScorersConfig",
    "ShotsConfig",
    "SourcesConfig",
    "TrainStageConfig",
    "TrainingConfig",
    "TriptychConfig",
    "WindowsConfig",
    "dump_yaml",
    "load_config",
    "preset",
]
