import pytest
import torch
import torch.distributed as dist

from schemas.config.training import LatentsConfig, TrainingConfig, TrainStageConfig
from schemas.errors import ManifestError, TrainingFailed
from schemas.layout import Workspace
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import SHAPE, make_sample, painted_frames
from training.data import plan_step, validation_plan
from training.datasets import check_dataset, open_dataset
from training.engine import Ranks
from training.latents_job import encode_manifest
from training.reading import StepReader


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A process group of one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def data(ground, tmp_path):
    """Three samples, each in a shard of its own; that of sample 1 is spoiled after opening."""
    training = TrainingConfig(model=SHAPE, latents=LatentsConfig(shard_scenes=3))
    manifest, workspace = tmp_path / "m.parquet", Workspace(tmp_path)
    write_table(manifest, SAMPLES, [make_sample(i) for i in range(3)])
    encode_manifest(training, manifest, ground.base, workspace, painted_frames)
    opened = open_dataset(training, manifest, ground.base, workspace)
    check_dataset(opened)
    spoil(opened, 1)
    with pytest.raises(ManifestError, match="sample-1"):
        check_dataset(open_dataset(training, manifest, ground.base, workspace))
    return open_dataset(training, manifest, ground.base, workspace)


def spoil(data, sample: int) -> None:
    """Replace the shard of a sample; an open one stays readable, as it was mapped into memory."""
    path = data._scenes.path(data.cache.scene_key(data.samples[sample].scenes[0]))
    path.unlink()
    path.write_bytes(b"spoiled")


def stage(**changes) -> TrainStageConfig:
    return TrainStageConfig(**{"steps": 9, "batch_size": 3, "micro_batch_size": 3, **changes})


def test_the_first_bad_sample_fails_the_step_with_its_id(data, ranks):
    reader = StepReader(data, stage(), ranks, 1000)
    with pytest.raises(TrainingFailed, match="step 1, samples sample-1") as failed:
        reader.read(0)
    assert "max_bad_samples" in str(failed.value)
    assert not failed.value.retryable


def test_bad_samples_that_are_allowed_are_left_out_and_counted_once(data, ranks, caplog):
    reader = StepReader(data, stage(max_bad_samples=1), ranks, 1000)
    for step in range(3):
        plan, (reading,) = reader.read(step)
        rows = [row for row, draw in enumerate(plan.draws) if draw.index != 1]
        (batch,) = reading.batches
        assert batch.rows == tuple(rows)
        reader.settle(plan)
        assert reader.bad == {"sample-1"}
    assert caplog.text.count("bad_sample step=") == 1
    alone = data.read(plan, rows[:1]).batches[0]
    assert torch.equal(alone.latents[0], batch.latents[0])


def test_one_more_than_allowed_fails_the_run(data, ranks):
    spoil(data, 2)
    reader = StepReader(data, stage(max_bad_samples=1), ranks, 1000)
    plan, _ = reader.read(0)
    with pytest.raises(TrainingFailed, match="at most 1 such samples"):
        reader.settle(plan)


def test_a_micro_batch_of_bad_rows_gets_any_other_row_to_go_on_with(data, ranks):
    one_at_a_time = stage(micro_batch_size=1, max_bad_samples=1)
    reader = StepReader(data, one_at_a_time, ranks, 1000)
    plan, readings = reader.read(0)
    assert sorted(len(r.batches) for r in readings) == [0, 1, 1]
    assert reader.any_batch(plan).rows[0] in (0, 1, 2)


def test_a_step_of_which_nothing_can_be_read_is_an_error(data, ranks):
    for sample in (0, 2):
        spoil(data, sample)
    reader = StepReader(data, stage(max_bad_samples=9), ranks, 1000)
    plan, (reading,) = reader.read(0)
    assert not reading.batches
    with pytest.raises(TrainingFailed, match="no sample of a step can be read"):
        reader.any_batch(plan)


def test_steps_read_ahead_are_those_read_alone(ground, ranks):
    opened = open_dataset(ground.config.training, ground.manifest, ground.base, ground.workspace)
    ahead = StepReader(opened, stage(), ranks, 1000)
    for step in (0, 1, 2, 5, 6):  # a resumed run begins anywhere
        plan, (reading,) = ahead.read(step)
        assert plan == plan_step(step, stage(), len(opened), 1000)
        again = opened.read(plan, range(3)).batches[0]
        assert torch.equal(reading.batches[0].latents, again.latents)
        assert torch.equal(reading.batches[0].noise, again.noise)


def test_a_validation_is_always_over_the_same_rows():
    plan = validation_plan(stage(validation_samples=4), 3, 1000, False)
    assert plan == validation_plan(stage(validation_samples=4, batch_size=9), 3, 1000, False)
    assert [d.index for d in plan.draws] == [0, 1, 2, 0]
    assert [d.timestep for d in plan.draws] == [125, 375, 625, 875]
    assert not any(d.drop_text for d in plan.draws)
    assert len({d.noise_seed for d in plan.draws}) == 4
    other = validation_plan(stage(validation_samples=4, seed=1), 3, 1000, False)
    assert other.draws[0].noise_seed != plan.draws[0].noise_seed
