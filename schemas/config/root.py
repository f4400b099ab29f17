"""The whole pipeline's config."""

from __future__ import annotations

from pydantic import Field

from schemas.config.base import StageConfig
from schemas.config.curation import CurationConfig
from schemas.config.generation import EvaluationConfig, GenerationConfig
from schemas.config.training import TrainingConfig


class EngineConfig(StageConfig):
    """Where work runs."""

    ray_address: str | None = Field(
        default=None,
        description="Ray cluster address ('auto' inside one); empty = start a local one.",
    )
    num_cpus: int = Field(default=2, description="CPUs of the local Ray, 1 to 1024.", ge=1, le=1024)
    object_store_mb: int = Field(
        default=128,
        description="Object store of the local Ray in MB, 80 to 1,000,000. Rows hold paths, not "
        "frames.",
        ge=80,
        le=1_000_000,
    )


class TriptychConfig(StageConfig):
    """Every setting of every stage: the parameter of flows, YAML files and commands."""

    workspace: str = Field(
        default="workspace", description="Folder where everything is kept.", min_length=1
    )
    engine: EngineConfig = Field(default=EngineConfig(), description="Where work runs.")
    curation: CurationConfig = Field(
        default=CurationConfig(), description="Videos to three-scene manifests."
    )
    training: TrainingConfig = Field(
        default=TrainingConfig(), description="Pre-training, then SFT."
    )
    generation: GenerationConfig = Field(
        default=GenerationConfig(), description="Videos from prompts."
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="Consistency scores."
    )
