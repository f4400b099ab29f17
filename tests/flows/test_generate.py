"""What ``triptych generate`` says; the work itself is in tests/inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from flows.artifacts import _Remaining
from flows.console import out
from flows.generate import MAX_LISTED, show_plan, show_rejects
from inference.outputs import VideoFiles, VideoWriter
from inference.plan import plan_batch
from schemas.config import TriptychConfig
from schemas.config.training import ModelConfig
from schemas.errors import ManifestError
from schemas.layout import Workspace
from schemas.rows import Reject
from training.base_model import make_tiny_base

SHAPE = ModelConfig(frames=5, height_px=32, width_px=32, text_tokens=48)
MANIFEST = """prompt_id,prompt_1,prompt_2,seed
bird,It wakes.,It flies.,7
bull,It stands.,,8
bad,It sits.,,-1
bird,Twice.,,1
"""


@pytest.fixture
def config(tmp_path: Path) -> TriptychConfig:
    (tmp_path / "prompts.csv").write_text(MANIFEST)
    model = make_tiny_base(tmp_path / "tiny", SHAPE)
    generation = {"prompts": str(tmp_path / "prompts.csv"), "model": str(model), "steps": 2}
    return TriptychConfig.model_validate(
        {
            "workspace": str(tmp_path / "workspace"),
            "training": {"model": SHAPE.model_dump()},
            "generation": generation,
        }
    )


def test_the_plan_counts_rows_and_cost_and_names_bad_lines(config: TriptychConfig, capsys):
    out.width = 200
    workspace = Workspace(Path(config.workspace))
    plan = plan_batch(config, Path(config.generation.model or ""), workspace)
    done = plan.jobs[1]
    files = VideoFiles.of(workspace, done.files.stem)
    with VideoWriter(files, 8, ["It stands."], done.key) as video:
        video.add_scene(np.zeros((5, 32, 32, 3), np.uint8))
        video.finish(1.0)
    show_plan(config)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for expected in ("rows 4", "bad 2", "finished already 1", "videos to make 1", "scenes 2",
                     "frames 10", "texts to encode 3"):  # fmt: skip
        assert expected in lines
    (cost,) = [line for line in lines if line.startswith("denoising")]
    assert cost.endswith("MFLOP")
    assert any("bad row bad: invalid_seed: line 4" in line for line in lines)
    assert any("bad row bird: duplicate_prompt_id: line 5" in line for line in lines)
    assert not (Path(config.workspace) / "cache").exists()  # nothing was encoded


def test_without_a_model_the_plan_says_what_to_do(config: TriptychConfig):
    generation = config.generation.model_copy(update={"model": None})
    with pytest.raises(ManifestError, match="triptych train"):
        show_plan(config.model_copy(update={"generation": generation}))


def test_many_bad_rows_are_cut_short(capsys):
    out.width = 200
    rejects = [Reject(f"r{i}", "prompts", "x", f"line {i}: [bold]", "", False) for i in range(30)]
    show_rejects(rejects)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == MAX_LISTED + 1
    assert lines[0] == "bad row r0: x: line 0: [bold]"
    assert lines[-1].startswith("and 10 more")


def test_the_bar_shows_the_time_it_is_told():
    with Progress(disable=True) as bar:
        bar.add_task("generate", total=10, left_s=3725.4)
        (task,) = bar.tasks
        assert _Remaining().render(task).plain == "1:02:05"
        bar.update(task.id, left_s=None)
        assert _Remaining().render(task).plain == "-:--:--"
