"""A tiny base model, a manifest and its cache, made once per session."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.config.root import TriptychConfig
from schemas.config.training import ModelConfig, TrainingConfig, TrainStageConfig
from schemas.layout import Workspace
from schemas.rows import Sample, Scene
from schemas.tables import SAMPLES, write_table
from training.base_model import make_tiny_base
from training.latents_job import encode_manifest

torch.set_num_threads(1)

SHAPE = ModelConfig(frames=5, height_px=32, width_px=32, text_tokens=16)


def make_scene(sample: int, place: int, num_frames: int = 12) -> Scene:
    return Scene(
        clip_id=f"clip-{sample}-{place}",
        source_id="source",
        uri="missing.mp4",
        start_pts=0,
        end_pts=num_frames,
        start_frame=0,
        end_frame=num_frames,
        num_frames=num_frames,
        start_s=0.0,
        end_s=1.0,
        fps=12.0,
        width_px=48,
        height_px=32,
        caption=f"Actor{place} in place {sample}",
    )


def make_sample(number: int, **changes: object) -> Sample:
    values: dict[str, object] = {
        "sample_id": f"sample-{number}",
        "kind": "sft",
        "split": "train",
        "scenes": [make_scene(number, place) for place in range(3)],
        "similarity": 0.9,
        "trainable": True,
        **changes,
    }
    return Sample(**values)  # type: ignore[arg-type]


def painted_frames(scene: Scene, frames, height_px: int, width_px: int) -> np.ndarray:
    """Frames of one colour that depends on the clip, for tests that are not about decoding."""
    colour = np.random.default_rng(list(scene.clip_id.encode())).integers(0, 256, 3)
    picture = np.broadcast_to(colour.astype(np.uint8), (height_px, width_px, 3))
    return np.stack([picture] * len(frames))


@dataclass(frozen=True)
class Ground:
    """What training starts from."""

    config: TriptychConfig
    workspace: Workspace
    base: Path
    manifest: Path


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    root = tmp_path_factory.mktemp("ground")
    workspace = Workspace(root)
    stage = TrainStageConfig(
        steps=60, batch_size=2, micro_batch_size=1, checkpoint_every=10, conditional_p=0.5
    )
    config = TriptychConfig(
        workspace=str(root), training=TrainingConfig(model=SHAPE, pretrain=stage, sft=stage)
    )
    base = make_tiny_base(workspace.model("tiny"), SHAPE)
    manifest = root / "sft.parquet"
    write_table(manifest, SAMPLES, [make_sample(i) for i in range(5)])
    encode_manifest(config.training, manifest, base, workspace, painted_frames)
    return Ground(config, workspace, base, manifest)


@pytest.fixture
def without_lazy_modules(monkeypatch):
    """Torch's compiler pickles, which asks every loaded module for attributes; yt-dlp's break."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "yt_dlp"]:
        monkeypatch.delitem(sys.modules, name)
