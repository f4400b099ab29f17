from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inference.pipeline import Mask2DiTPipeline
from inference.prompts import write_prompts
from schemas.config import TriptychConfig
from schemas.config.training import ModelConfig
from schemas.layout import Workspace
from schemas.rows import Prompt
from training.base_model import make_tiny_base

SHAPE = ModelConfig(frames=5, height_px=32, width_px=32, text_tokens=48)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("models") / "tiny", SHAPE)


@pytest.fixture(scope="session")
def loaded(tiny_base: Path) -> Mask2DiTPipeline:
    return Mask2DiTPipeline.from_pretrained(tiny_base)


@pytest.fixture
def pipeline(loaded: Mask2DiTPipeline) -> Mask2DiTPipeline:
    loaded.set_scheduler("ddim")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def config_for(tmp_path: Path) -> Callable[..., TriptychConfig]:
    """A config for the tiny model with the given prompts, and changes to its generation section."""

    def make(prompts: list[Prompt], **generation) -> TriptychConfig:
        path = tmp_path / "prompts.parquet"
        write_prompts(path, prompts)
        values = {
            "training": {"model": SHAPE.model_dump()},
            "generation": {"prompts": str(path), "steps": 2, "fps": 8, **generation},
        }
        return TriptychConfig.model_validate(values)

    return make
