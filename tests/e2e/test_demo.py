"""``make demo``: cartoons drawn on the spot, and new stories from the embedded model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from curation.toonworld.probe import load_probe
from flows.demo import COMPILATIONS, EPISODES, FILMS
from flows.reproduce_work import scenes_of
from inference.toon_scores import score_stories
from schemas.layout import Workspace
from schemas.storage import latest
from schemas.tables import GENERATIONS, SAMPLES, read_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FEWER = ("training.pretrain.steps=1", "training.sft.steps=1", "generation.steps=10")
PROBE = Path(__file__).parents[2] / "assets/tiny/probe"


def test_the_embedded_model_draws_the_stories_it_is_told(tmp_path: Path):
    command = [sys.executable, "-m", "flows.cli", "demo", "-w", str(tmp_path)]
    done = subprocess.run(
        [*command, *(f"--set={s}" for s in FEWER)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "texture" not in done.stdout
    assert len([*(tmp_path / FILMS).glob("*.mp4")]) == EPISODES + COMPILATIONS

    workspace = Workspace(tmp_path)
    snapshot = latest(workspace.dataset("toonworld"))
    assert snapshot is not None
    related = read_table(snapshot / "manifests" / "sft.parquet", SAMPLES)
    assert related
    assert all("episode" in scene.uri for sample in related for scene in sample.scenes)

    batch = latest(workspace.generations)
    assert batch is not None
    rows = read_table(batch / "generations.parquet", GENERATIONS)
    assert sorted(row.num_scenes for row in rows) == [3, 3, 3, 4]
    stories = [scenes_of(workspace, row) for row in rows]
    scores = score_stories(load_probe(PROBE), stories, [row.prompts for row in rows])
    assert fmean(s.semantic for s in scores) > 0.6
