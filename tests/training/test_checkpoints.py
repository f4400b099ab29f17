import json
import threading

import pytest
import torch
from torch import Tensor, nn

from schemas.config.training import LaunchConfig, TrainingConfig, TrainStageConfig
from schemas.errors import CheckpointError, ConfigError
from schemas.storage import read_done
from tests.training.states import cut
from training.checkpoints import (
    Saver,
    StoredState,
    newest_complete,
    partial_folder,
    remove_partial,
    set_aside_damaged,
)
from training.deepspeed_config import deepspeed_config, learning_rate
from training.metrics import MetricsTail, keep_until
from training.zero_state import KINDS, MovingAverage, trained

RANKS = (1, 2, 3)


def weights(seed: int) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    return {k: {name: torch.randn(shape) for name, shape in shapes.items()} for k in KINDS}


def save(folder, step, values=None, ranks=1, keep=2, keep_every=0):
    """Write a checkpoint as ``ranks`` processes do, the first one first."""
    values = values or weights(step)
    savers = [Saver(folder, rank, ranks, keep, keep_every) for rank in range(ranks)]
    for rank, saver in enumerate(savers):
        state = cut(values, rank, ranks)
        saver.start(step, state, None, {"world_size": ranks})
    for saver in savers:
        saver.wait()
    return folder / f"step_{step:08d}"


def test_a_half_written_checkpoint_is_never_taken(tmp_path):
    assert newest_complete(tmp_path) is None
    first, second = (Saver(tmp_path, rank, 2, 2, 0) for rank in range(2))
    first.start(10, cut(weights(0), 0, 2), None, {})
    while not (partial_folder(tmp_path, 10) / "rank_00000.json").is_file():
        threading.Event().wait(0.01)
    assert newest_complete(tmp_path) is None  # the other rank's part is missing
    second.start(10, cut(weights(0), 1, 2), None, {})
    first.wait()
    second.wait()
    assert newest_complete(tmp_path) == (10, tmp_path / "step_00000010")

    first.start(20, cut(weights(0), 0, 2), None, {})
    first.abandon()  # the other rank has died
    (tmp_path / "step_00000030").mkdir()  # renamed by something else, never marked
    assert newest_complete(tmp_path) == (10, tmp_path / "step_00000010")
    remove_partial(tmp_path)
    assert not partial_folder(tmp_path, 20).exists()


@pytest.mark.parametrize("written", RANKS)
@pytest.mark.parametrize("read", RANKS)
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path, written, read):
    values = weights(1)
    stored = StoredState(save(tmp_path, 7, values, written))
    parts = [cut(weights(2), rank, read) for rank in range(read)]
    for part in parts:
        average = MovingAverage(part, 0.9)
        assert stored.load_into(part, average) == 7
        assert part.published == [7]
        # a checkpoint without an average starts it from the weights
        for piece, mean in zip(part.fragments, average.tensors, strict=True):
            assert torch.equal(mean, piece.tensors["weight"])
    for kind in KINDS:
        for name, whole in values[kind].items():
            found = torch.full_like(whole.flatten(), torch.nan)
            for piece in (f for part in parts for f in part.fragments if f.name == name):
                found[piece.start : piece.start + piece.numel] = piece.tensors[kind]
            assert torch.equal(found, whole.flatten())


def test_what_does_not_fit_is_refused(tmp_path):
    stored = StoredState(save(tmp_path, 5))
    other = cut(weights(0), 0, 1)
    other.shapes["d"] = (2,)
    with pytest.raises(CheckpointError, match="3 weights, 4 are trained"):
        stored.load_into(other, None)
    with pytest.raises(CheckpointError, match="12 of elements 0 to 13"):
        stored.read("weight", "a", 0, 13)
    file = tmp_path / "step_00000005" / "rank_00000.safetensors"
    file.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        StoredState(tmp_path / "step_00000005")


def test_an_error_while_writing_reaches_the_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    saver = Saver(tmp_path / "file", 0, 1, 2, 0)
    saver.start(5, cut(weights(0), 0, 1), None, {})
    with pytest.raises(CheckpointError, match="could not be written"):
        saver.wait()


def test_later_steps_do_not_change_what_is_being_written(tmp_path):
    state = cut(weights(3), 0, 1)
    before = {f.name: f.tensors["weight"].clone() for f in state.fragments}
    saver = Saver(tmp_path, 0, 1, 2, 0)
    saver.start(1, state, None, {})
    for piece in state.fragments:
        piece.tensors["weight"].zero_()
    saver.wait()
    stored = StoredState(tmp_path / "step_00000001")
    assert all(torch.equal(stored.read("weight", n, 0, len(w)), w) for n, w in before.items())


def test_retention_keeps_the_newest_and_every_so_manieth(tmp_path):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step, keep=2, keep_every=10)
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == ["step_00000010", "step_00000020", "step_00000025"]


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, harm, caplog):
    for step in (5, 10):
        save(tmp_path, step)
    set_aside_damaged(tmp_path)
    assert newest_complete(tmp_path) == (10, tmp_path / "step_00000010")
    spoil(tmp_path / "step_00000010", harm)
    set_aside_damaged(tmp_path)
    assert newest_complete(tmp_path) == (5, tmp_path / "step_00000005")
    assert (tmp_path / "damaged_step_00000010").is_dir()
    assert "step=10 state=damaged missing or changed: rank_00000.safetensors" in caplog.text
    spoil(tmp_path / "step_00000005", harm)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        set_aside_damaged(tmp_path)
    set_aside_damaged(tmp_path)  # the person has read it: run again to start over
    assert newest_complete(tmp_path) is None


def spoil(folder, harm):
    file = folder / "rank_00000.safetensors"
    if harm == "gone":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b"x" if harm == "changed" else content[:-9])


def test_the_record_names_every_file(tmp_path):
    done = read_done(save(tmp_path, 3, ranks=3))
    assert sorted(done["files"]) == [f"rank_0000{i}.safetensors" for i in range(3)]
    assert done["world_size"] == 3


def test_the_moving_average_is_that_of_its_formula():
    state = cut(weights(4), 0, 1)
    average = MovingAverage(state, 0.5)
    expected = [t.double().clone() for t in average.tensors]
    for step in range(1, 30):
        for piece in state.fragments:
            piece.tensors["weight"].add_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [
            decay * e + (1 - decay) * f.tensors["weight"].double()
            for e, f in zip(expected, state.fragments, strict=True)
        ]
    for found, wanted in zip(average.tensors, expected, strict=True):
        torch.testing.assert_close(found, wanted.float())


def test_only_what_takes_gradients_is_trained():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(trained(model)) == ["weight"]


def test_deepspeed_config_holds_the_whole_recipe():
    stage = TrainStageConfig(batch_size=8, micro_batch_size=2, max_grad_norm=0.05, lr=1e-5)
    made = deepspeed_config(TrainingConfig(dtype="bfloat16", num_processes=2), stage)
    assert made["train_batch_size"] == 8
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.05
    assert made["optimizer"]["params"]["lr"] == 1e-5
    assert made["optimizer"]["params"]["torch_adam"] is True
    assert made["bf16"]["enabled"] is True
    assert made["zero_optimization"]["stage"] == 2
    json.dumps(made)
    with pytest.raises(ConfigError, match="multiple of micro_batch_size x 3 = 6"):
        deepspeed_config(TrainingConfig(num_processes=3), stage)


def test_ranks_that_share_a_sample_take_one_row_together():
    stage = TrainStageConfig(batch_size=8, micro_batch_size=2)
    nodes = LaunchConfig(launcher="slurm", num_nodes=2)
    training = TrainingConfig(num_processes=4, sequence_parallel=4, launch=nodes)
    made = deepspeed_config(training, stage)
    assert made["gradient_accumulation_steps"] == 2
    # DeepSpeed checks that the three agree
    assert made["train_batch_size"] == 2 * 2 * training.world_size


def test_offload_and_monitors_reach_deepspeed(tmp_path):
    training = TrainingConfig(
        zero_stage=3, offload="all", monitors=("tensorboard", "csv", "mlflow")
    )
    made = deepspeed_config(training, TrainStageConfig(), tmp_path)
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert made["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert made["tensorboard"]["enabled"] is made["csv_monitor"]["enabled"] is True
    assert "wandb" not in made


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
