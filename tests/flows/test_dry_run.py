"""What `triptych train --dry-run` prints, and that it leaves everything as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import cli, dry_run
from flows.console import out
from flows.train import run_folder, with_retries
from schemas.config import TriptychConfig, dump_yaml
from schemas.config.training import ModelConfig, TrainingConfig, TrainStageConfig
from schemas.errors import ConfigError, ManifestError, TrainingFailed
from schemas.layout import Snapshot, Workspace
from schemas.storage import mark_done, point_latest
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import make_sample, make_scene
from training.base_model import make_tiny_base

runner = CliRunner()
SHAPE = ModelConfig(frames=5, height_px=32, width_px=32, text_tokens=16)


@pytest.fixture
def settings(tmp_path: Path) -> TriptychConfig:
    """A workspace with a snapshot of four samples, one too short, and nothing else."""
    stage = TrainStageConfig(steps=60, batch_size=4, micro_batch_size=1)
    training = TrainingConfig(model=SHAPE, pretrain=stage, sft=stage, num_processes=2)
    config = TriptychConfig(workspace=str(tmp_path / "space"), training=training)
    dataset = Workspace(Path(config.workspace)).dataset(config.curation.dataset)
    short = make_sample(3, scenes=[make_scene(3, 0), make_scene(3, 1), make_scene(3, 2, 4)])
    held_out = make_sample(2, split="val")
    for kind in ("pretrain", "sft"):
        manifest = Snapshot(dataset / "one").manifest(kind)
        samples = [make_sample(0), make_sample(1), held_out, short]
        write_table(manifest, SAMPLES, [dataclasses.replace(s, kind=kind) for s in samples])
    mark_done(dataset / "one", {})
    point_latest(dataset, "one")
    return config


def shown(config: TriptychConfig, tmp_path: Path) -> list[list[str]]:
    """The words of every line."""
    (tmp_path / "my.yaml").write_text(dump_yaml(config))
    done = runner.invoke(cli.app, ["train", "-c", str(tmp_path / "my.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output
    return [line.split() for line in done.output.splitlines()]


def files(root: Path) -> dict[Path, float]:
    return {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def test_a_first_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(out, "width", 80)
    before = files(Path(settings.workspace))
    lines = shown(settings, tmp_path)
    assert files(Path(settings.workspace)) == before
    for expected in (
        ["samples", "2", "2"],
        ["left", "out,", "a", "scene", "is", "too", "short", "1", "1"],
        ["held", "out", "for", "validation", "1", "1"],
        ["scenes", "11", "11"],
        ["to", "encode", "11", "11"],
        ["captions", "13", "13"],
        ["to", "encode", "13", "13"],
    ):
        assert expected in lines
    # 11 scenes of 2 latent frames of 16 x 4 x 4, twice; 13 captions of 16 x 64
    size = dry_run.scaled(4 * (2 * 11 * 2 * 16 * 4 * 4 + 13 * 16 * 64)) + "B"
    assert ["cached", "latents", "and", "texts", *size.split() * 2] in lines
    base = make_tiny_base(tmp_path / "base", SHAPE)
    dataset = Workspace(Path(settings.workspace)).dataset(settings.curation.dataset)
    run_dir = run_folder(settings, "pretrain", Snapshot(dataset / "one"), base)
    assert ["pretrain:", "starts", "at", "step", "0,", "in", str(run_dir)] in lines
    command = next(line for line in lines if line[:1] == ["command:"])
    assert command[command.index("--job") + 1] == str(run_dir / "job.json")
    assert ["sft:", "its", "run", "folder", "is", "named"] in [line[:6] for line in lines]
    assert any(line[:2] == ["predicted", "time"] for line in lines)


def test_an_interrupted_run(settings, tmp_path):
    base = make_tiny_base(tmp_path / "base", SHAPE)
    dataset = Workspace(Path(settings.workspace)).dataset(settings.curation.dataset)
    run_dir = run_folder(settings, "pretrain", Snapshot(dataset / "one"), base)
    mark_done(run_dir / "checkpoints" / "step_00000020", {"step": 20, "files": {}})
    lines = shown(settings, tmp_path)
    assert ["pretrain:", "goes", "on", "from", "step", "20,", "in", str(run_dir)] in lines
    left = next(line for line in lines if line[:3] == ["all", "steps", "left"])
    assert (left[left.index("for") + 1], left[-1]) == ("40", "60")


def test_without_a_snapshot_or_a_launcher(settings, tmp_path):
    empty = settings.model_copy(update={"workspace": str(tmp_path / "empty")})
    with pytest.raises(ManifestError, match="no finished snapshot"):
        dry_run.dry_run(empty)
    slurm = {"launch": {"launcher": "slurm"}}
    values = {**settings.training.model_dump(), **slurm}
    no_slurm = settings.model_copy(update={"training": TrainingConfig(**values)})
    with pytest.raises(ConfigError, match="needs programs that are not there"):
        dry_run.dry_run(no_slurm)


def test_retries_only_what_a_restart_may_mend():
    calls: list[int] = []

    def dies(times: int, *, retryable: bool = True):
        def train() -> None:
            calls.append(1)
            if len(calls) <= times:
                raise TrainingFailed("died", retryable=retryable)

        calls.clear()
        return train

    assert with_retries(dies(0), 2) == 0
    assert with_retries(dies(2), 2) == 2
    for times, retryable, made in ((3, True, 3), (1, False, 1)):
        with pytest.raises(TrainingFailed):
            with_retries(dies(times, retryable=retryable), 2)
        assert len(calls) == made


def test_numbers_are_easy_to_read():
    assert [dry_run.scaled(x) for x in (0, 950, 1_680_000, 8.517e15, 12.08e12)] == [
        *("0 ", "950 ", "1.68 M", "8.52 P", "12.1 T"),
    ]
    assert [dry_run.duration(x) for x in (0.0123, 5, 600, 7200, 86400 * 3)] == [
        *("12.3 ms", "5 s", "10 min", "2 h", "3 days"),
    ]
