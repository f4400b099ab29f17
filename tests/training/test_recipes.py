"""Real DeepSpeed runs of what a recipe may ask for: adapters, bfloat16, monitors, one sample."""

import json

import pytest
import torch
from safetensors.torch import load_file

from schemas.config.training import LoraConfig, TrainStageConfig
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import make_sample, painted_frames
from training.export import LORA_FILE
from training.latents_job import encode_manifest
from training.launch import run_stage
from training.weights import load_transformer

pytestmark = pytest.mark.slow


def run(ground, folder, samples, stage, **training):
    manifest = folder / "sft.parquet"
    write_table(manifest, SAMPLES, samples)
    config = ground.config.training.model_copy(update={"sft": stage, **training})
    encode_manifest(config, manifest, ground.base, ground.workspace, painted_frames)
    whole = ground.config.model_copy(update={"training": config})
    run_dir = run_stage(whole, "sft", manifest, ground.base, folder / "run")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return run_dir, [json.loads(line) for line in lines]


def test_adapters_in_bfloat16_with_monitors(ground, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    stage = TrainStageConfig(steps=6, batch_size=2, micro_batch_size=2, ema_decay=0.5)
    run_dir, lines = run(
        ground,
        tmp_path,
        [make_sample(i) for i in range(3)],
        stage,
        lora=LoraConfig(rank=2, targets=("to_q", "to_v")),
        dtype="bfloat16",
        activation_checkpointing=2,
        monitors=("tensorboard", "csv", "mlflow"),
    )
    assert [line["step"] for line in lines] == list(range(1, 7))
    base = dict(load_transformer(ground.base, dtype=torch.bfloat16).named_parameters())
    changed = set()
    for name, p in load_transformer(run_dir / "model", dtype=torch.bfloat16).named_parameters():
        if not torch.equal(p.data, base[name].data):
            changed.add(name.rpartition(".attn1.")[2])
    assert changed == {"to_q.weight", "to_v.weight"}
    adapters = load_file(run_dir / "model" / LORA_FILE)
    assert len(adapters) == 4 * 2 * 2
    # a checkpoint holds what is trained, in float32
    stored = load_file(run_dir / "checkpoints" / "step_00000006" / "rank_00000.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert all(".lora_" in name for name in stored)

    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert (run_dir / "csv" / "train_loss.csv").is_file()
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'triptych'")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.run_name == run_dir.name
    assert logged.data.metrics["loss"] == pytest.approx(lines[-1]["loss"])


@pytest.mark.timeout(600)
def test_one_sample_is_learnt_by_heart(ground, tmp_path):
    held_out = make_sample(0, sample_id="the-same-again", split="val")
    stage = TrainStageConfig(
        steps=400,
        batch_size=8,
        micro_batch_size=8,
        lr=5e-4,
        weight_decay=0.0,
        text_dropout=0.0,
        checkpoint_every=400,
        validate_every=200,
        validation_samples=16,
    )
    _, lines = run(ground, tmp_path, [make_sample(0), held_out], stage)
    start = sum(line["loss"] for line in lines[:5]) / 5
    assert lines[-1]["validation_loss"] < 0.05 * start
