"""Configuration: one frozen model per stage, whole-pipeline presets, commented YAML files."""

from schemas.config.curation import (
    AblationConfig,
    ClipsConfig,
    CurationConfig,
    DedupConfig,
    DriftConfig,
    EmbeddingConfig,
    ExportConfig,
    FiltersConfig,
    ManifestsConfig,
    ScorersConfig,
    ShotsConfig,
    SimilarityModelConfig,
    SourcesConfig,
    WindowsConfig,
)
from schemas.config.files import dump_yaml, load_config
from schemas.config.generation import EvaluationConfig, GenerationConfig, SamplingConfig
from schemas.config.presets import PRESETS, preset
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.config.training import ModelConfig, TrainingConfig, TrainStageConfig

__all__ = [
    "PRESETS",
    "AblationConfig",
    "ClipsConfig",
    "CurationConfig",
    "DedupConfig",
    "DriftConfig",
    "EmbeddingConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FiltersConfig",
    "GenerationConfig",
    "ManifestsConfig",
    "ModelConfig",
    "SamplingConfig",
    "ScorersConfig",
    "ShotsConfig",
    "SimilarityModelConfig",
    "SourcesConfig",
    "TrainStageConfig",
    "TrainingConfig",
    "TriptychConfig",
    "WindowsConfig",
    "dump_yaml",
    "load_config",
    "preset",
]
