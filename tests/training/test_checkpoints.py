import json

import pytest

from schemas.config.training import TrainingConfig, TrainStageConfig
from schemas.errors import CheckpointError, ConfigError
from training.checkpoints import (
    commit,
    newest_complete,
    partial_folder,
    remove_partial,
    set_aside_damaged,
)
from training.deepspeed_config import deepspeed_config, learning_rate
from training.metrics import MetricsTail, keep_until


def write_partial(folder, step):
    state = partial_folder(folder, step) / "state"
    state.mkdir(parents=True)
    (state / "weights.pt").write_bytes(b"w")


def test_a_half_written_checkpoint_is_never_taken(tmp_path):
    assert newest_complete(tmp_path) is None
    write_partial(tmp_path, 10)
    assert newest_complete(tmp_path) is None
    commit(tmp_path, 10, {}, keep=2)
    write_partial(tmp_path, 20)
    (tmp_path / "step_00000030").mkdir()  # renamed by something else, never marked
    assert newest_complete(tmp_path) == (10, tmp_path / "step_00000010")
    remove_partial(tmp_path)
    assert not partial_folder(tmp_path, 20).exists()


def test_retention_keeps_the_newest(tmp_path):
    for step in (5, 10, 100):
        write_partial(tmp_path, step)
        commit(tmp_path, step, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, harm, caplog):
    for step in (5, 10):
        write_partial(tmp_path, step)
        commit(tmp_path, step, {}, keep=3)
    set_aside_damaged(tmp_path)
    assert newest_complete(tmp_path) == (10, tmp_path / "step_00000010")
    spoil(tmp_path / "step_00000010", harm)
    set_aside_damaged(tmp_path)
    assert newest_complete(tmp_path) == (5, tmp_path / "step_00000005")
    assert (tmp_path / "damaged_step_00000010").is_dir()
    assert "step=10 state=damaged missing or changed: state/weights.pt" in caplog.text
    spoil(tmp_path / "step_00000005", harm)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        set_aside_damaged(tmp_path)
    set_aside_damaged(tmp_path)  # the person has read it: run again to start over
    assert newest_complete(tmp_path) is None


def spoil(folder, harm):
    weights = folder / "state" / "weights.pt"
    if harm == "gone":
        weights.unlink()
    else:
        weights.write_bytes(b"v" if harm == "changed" else b"")


def test_deepspeed_config_holds_the_whole_recipe():
    stage = TrainStageConfig(batch_size=8, micro_batch_size=2, max_grad_norm=0.05, lr=1e-5)
    made = deepspeed_config(TrainingConfig(dtype="bfloat16"), stage, world_size=2)
    assert made["train_batch_size"] == 8
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.05
    assert made["optimizer"]["params"]["lr"] == 1e-5
    assert made["optimizer"]["params"]["torch_adam"] is True
    assert made["bf16"]["enabled"] is True
    assert made["zero_optimization"]["stage"] == 2
    json.dumps(made)
    with pytest.raises(ConfigError, match="multiple of micro_batch_size x ranks = 6"):
        deepspeed_config(TrainingConfig(), stage, world_size=3)


def test_learning_rate_warms_up_linearly_then_stays():
    stage = TrainStageConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(stage, k) for k in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert learning_rate(TrainStageConfig(lr=1.0, warmup_steps=0), 0) == 1


def test_metrics_are_followed_across_a_restart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path, last_step=0)
    assert tail.new_lines() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in tail.new_lines()] == [1, 2]
    keep_until(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    resumed = MetricsTail(path, last_step=1)
    with path.open("a") as f:
        f.write('{"step": 2}\n')
    assert [line["step"] for line in resumed.new_lines()] == [2]
    assert resumed.new_lines() == []
