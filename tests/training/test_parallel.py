"""Real DeepSpeed runs: however many ranks, whatever the ZeRO stage, the same training."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from schemas.config.training import LaunchConfig, TrainStageConfig
from schemas.storage import read_done
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import make_sample, painted_frames
from tests.training.test_launch_commands import PDSH, SSH, programs
from training.base_model import load_components
from training.checkpoints import newest_complete
from training.data import plan_step
from training.deepspeed_config import learning_rate
from training.latents_job import encode_manifest
from training.launch import run_stage

STEPS = 20
WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ground(ground, tmp_path_factory):
    """As for all, with two held-out samples."""
    manifest = tmp_path_factory.mktemp("manifest") / "sft.parquet"
    samples = [make_sample(i, split="val" if i > 4 else "train") for i in range(7)]
    write_table(manifest, SAMPLES, samples)
    encode_manifest(ground.config.training, manifest, ground.base, ground.workspace, painted_frames)
    return dataclasses.replace(ground, manifest=manifest)


def run(ground, run_dir, training=None, **stage):
    settings = TrainStageConfig(
        steps=STEPS,
        batch_size=2,
        micro_batch_size=1,
        conditional_p=0.5,
        checkpoint_every=10,
        keep_every=10,
        max_grad_norm=0.5,
        ema_decay=0.9,
        validate_every=10,
        validation_samples=3,
        **stage,
    )
    config = ground.config.training.model_copy(update={"sft": settings, **(training or {})})
    whole = ground.config.model_copy(update={"training": config})
    run_stage(whole, "sft", ground.manifest, ground.base, run_dir)
    return run_dir


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other, rel=1e-5):
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "grad_norm", "grad_norm_clipped"):
            assert b[name] == pytest.approx(a[name], rel=rel), (a["step"], name)
        if "validation_loss" in a:
            assert b["validation_loss"] == pytest.approx(a["validation_loss"], rel=rel)
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=rel, atol=rel)


@pytest.fixture(scope="module")
def alone(ground, tmp_path_factory):
    """One rank without ZeRO: plain AdamW on whole weights."""
    return run(ground, tmp_path_factory.mktemp("runs") / "alone", {"zero_stage": 0})


@pytest.fixture(scope="module")
def two(ground, tmp_path_factory):
    """Two ranks, ZeRO-2, the same global batches."""
    training = {"zero_stage": 2, "num_processes": 2}
    return run(ground, tmp_path_factory.mktemp("runs") / "two", training)


def test_the_log_shows_warm_up_clipping_and_validation(ground, alone):
    lines = metrics(alone)
    stage = TrainStageConfig()
    assert [line["lr"] for line in lines] == [learning_rate(stage, k) for k in range(STEPS)]
    clipped = 0
    for line in lines:
        expected = min(line["grad_norm"], 0.5)
        assert line["grad_norm_clipped"] == pytest.approx(expected, rel=1e-4)
        clipped += line["grad_norm"] > 0.5
    assert clipped > 0
    assert [line["step"] for line in lines if "validation_loss" in line] == [10, 20]
    assert all("validation_loss_conditional" in lines[k] for k in (9, 19))
    assert all(line["mfu"] > 0 and line["tokens_per_s"] > 0 for line in lines)
    for k, line in enumerate(lines):
        settings = TrainStageConfig(batch_size=2, micro_batch_size=1, conditional_p=0.5)
        plan = plan_step(k, settings, 5, 1000)
        filled = {int(d.timestep / 250) for d in plan.draws}
        assert {i for i, v in enumerate(line["loss_by_timestep"]) if v is not None} == filled
    assert list((alone / "tensorboard").glob("events.out.tfevents.*"))


def test_two_ranks_equal_one(alone, two):
    assert_same(alone, two)


def test_the_average_in_the_model_is_that_of_the_weights_on_the_way(ground, alone):
    """The exported model is the average, and lies between the start and the last weights."""
    _, newest = newest_complete(alone / "checkpoints")
    assert read_done(newest)["zero_stage"] == 0
    stored = load_file(newest / "rank_00000.safetensors")
    exported = load_components(alone / "model").transformer.state_dict()
    for name, weight in exported.items():
        assert torch.equal(stored[f"ema|0|{name}"].view_as(weight), weight)
    moved = sum(
        float((stored[f"ema|0|{k}"] - stored[f"weight|0|{k}"]).abs().sum()) for k in exported
    )
    assert moved > 0


@pytest.mark.parametrize(
    "layout",
    [
        {"zero_stage": 1, "num_processes": 1},
        {"zero_stage": 3, "num_processes": 2, "offload": "all", "activation_checkpointing": 2},
    ],
    ids=["one-rank-zero-1", "two-ranks-zero-3-offloaded"],
)
def test_a_run_goes_on_at_another_number_of_ranks_and_zero_stage(
    ground, alone, two, tmp_path, layout
):
    run_dir = shutil.copytree(two, tmp_path / "moved")
    for left in ("model", "checkpoints/step_00000020"):
        shutil.rmtree(run_dir / left)
    (run_dir / "_DONE.json").unlink()
    run(ground, run_dir, layout)
    assert (
        read_done(run_dir / "checkpoints" / "step_00000020")["zero_stage"] == layout["zero_stage"]
    )
    assert "resumed step=10" in (run_dir / "log.txt").read_text()
    assert_same(alone, run_dir)


def test_two_ranks_that_share_each_sample_equal_one(ground, alone, tmp_path):
    training = {"zero_stage": 2, "num_processes": 2, "sequence_parallel": 2}
    assert_same(alone, run(ground, tmp_path / "shared", training), rel=1e-4)


def test_two_machines_equal_one(ground, alone, tmp_path, monkeypatch):
    """DeepSpeed's runner and launchers; pdsh and ssh are scripts that stay on this machine."""
    env = programs(tmp_path / "bin", pdsh=PDSH, ssh=SSH)
    monkeypatch.setenv("PATH", env["PATH"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "hosts").write_text("node-3 slots=1\nnode-4 slots=1\n")
    launch = LaunchConfig(launcher="pdsh", hostfile=str(tmp_path / "hosts"), num_nodes=2)
    assert_same(alone, run(ground, tmp_path / "run", {"zero_stage": 2, "launch": launch}))
