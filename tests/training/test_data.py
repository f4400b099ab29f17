from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config.training import TrainStageConfig
from schemas.errors import ManifestError
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import make_sample, make_scene
from training.cache import choose_frames, training_samples
from training.data import plan_step
from training.engine import Ranks


def stage(**changes) -> TrainStageConfig:
    return TrainStageConfig(**{"batch_size": 4, "micro_batch_size": 1, **changes})


@given(st.integers(0, 10_000), st.integers(1, 50), st.integers(0, 5))
def test_a_step_is_a_pure_function_of_seed_and_step(step, num_samples, seed):
    plan = plan_step(step, stage(seed=seed), num_samples, 1000)
    for other in (0, step + 1, step // 2):  # what was asked before must not matter
        plan_step(other, stage(seed=seed), num_samples, 1000)
    assert plan_step(step, stage(seed=seed), num_samples, 1000) == plan
    assert all(0 <= d.index < num_samples and 0 <= d.timestep < 1000 for d in plan.draws)


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 7))
def test_every_sample_once_per_epoch(num_samples, batch):
    cfg = stage(batch_size=batch)
    steps = -(-3 * num_samples // batch)
    drawn = [d.index for k in range(steps) for d in plan_step(k, cfg, num_samples, 1000).draws]
    for epoch in range(3):
        seen = drawn[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(seen) == list(range(num_samples))


def test_shares_are_those_of_the_config():
    cfg = stage(conditional_p=0.5, text_dropout=0.1)
    plans = [plan_step(k, cfg, 10, 1000) for k in range(1000)]
    draws = [d for p in plans for d in p.draws]
    assert 0.45 < sum(p.conditional for p in plans) / 1000 < 0.55
    assert 0.08 < sum(d.drop_text for d in draws) / 4000 < 0.12
    quarters = Counter(d.timestep // 250 for d in draws)
    assert all(900 < quarters[q] < 1100 for q in range(4))
    assert len({d.noise_seed for d in draws}) == 4000
    assert not any(plan_step(k, stage(), 10, 1000).conditional for k in range(100))


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_share_the_same_global_batch(world, micro):
    rows = []
    for rank in range(world):
        ranks = Ranks(rank, world, torch.device("cpu"))
        rows += [r for m in ranks.micro_batches(stage(micro_batch_size=micro)) for r in m]
    assert sorted(rows) == [0, 1, 2, 3]


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 6))
def test_chosen_frames_follow_the_trainers_rule(num_frames, wanted, max_stride):
    frames = choose_frames(num_frames, wanted, max_stride)
    if num_frames < wanted:
        assert frames is None
        return
    assert frames is not None
    assert len(frames) == wanted
    assert frames[0] >= 0
    assert frames[-1] < num_frames
    if wanted > 1:
        (stride,) = {b - a for a, b in pairwise(frames)}
        fitting = [s for s in range(1, max_stride + 1) if (wanted - 1) * s <= num_frames - 1]
        assert stride == max(fitting)
    before, after = frames[0], num_frames - 1 - frames[-1]
    assert after - before in (0, 1)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 6))
def test_a_drawn_start_moves_the_span_and_reaches_every_place(num_frames, wanted, max_stride):
    centred = choose_frames(num_frames, wanted, max_stride)
    drawn = [choose_frames(num_frames, wanted, max_stride, draw) for draw in range(num_frames)]
    if centred is None:
        assert drawn == [None] * num_frames
        return
    relative = [f - centred[0] for f in centred]
    starts = set()
    for frames in drawn:
        assert frames is not None
        assert [f - frames[0] for f in frames] == relative
        starts.add(frames[0])
    assert starts == set(range(num_frames - relative[-1]))


def test_only_trainable_training_samples_are_used(tmp_path):
    path = tmp_path / "m.parquet"
    samples = [
        make_sample(0, split="val"),
        make_sample(1, trainable=False),
        make_sample(2),
    ]
    write_table(path, SAMPLES, samples)
    assert [s.sample_id for s in training_samples(path, 3)] == ["sample-2"]
    assert [s.sample_id for s in training_samples(path, 3, "val")] == ["sample-0"]
    write_table(path, SAMPLES, samples[:2])
    with pytest.raises(ManifestError, match="2 samples, 1 of them trainable"):
        training_samples(path, 3)
    write_table(path, SAMPLES, [make_sample(3, scenes=[make_scene(3, 0)])])
    with pytest.raises(ManifestError, match="found: 1"):
        training_samples(path, 3)
