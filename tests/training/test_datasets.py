import dataclasses
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from curation.mp4 import write_mp4
from schemas.config.curation import SourcesConfig
from schemas.config.training import LatentsConfig, TrainingConfig, TrainStageConfig
from schemas.errors import InputError, ManifestError, VideoDecodeError
from schemas.layout import Workspace
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import SHAPE, make_sample, make_scene, painted_frames
from training.batches import Prefetched
from training.cache import LatentCache
from training.data import Draw, StepPlan, plan_step
from training.datasets import LatentDataset, PixelDataset, check_dataset, open_dataset
from training.latents import scene_reader
from training.latents_job import encode_manifest
from training.noise import scene_generator, scene_noise
from training.shards import Shards

CONFIG = TrainingConfig(model=SHAPE)
UNEQUAL = SHAPE.model_copy(update={"frames": 9, "shorter_frames": (5,)})


def plan_of(*indices: int, conditional: bool = False) -> StepPlan:
    draws = [Draw(index, 100 * i, 7 + i, i % 2 == 1) for i, index in enumerate(indices)]
    return StepPlan(0, conditional, tuple(draws))


def shard_of(data: LatentDataset, sample: int, place: int):
    scene = data.samples[sample].scenes[place]
    return Shards(data.cache.scene_folder).path(data.cache.scene_key(scene))


@pytest.fixture
def own(ground, tmp_path):
    """Three samples, two of them of equal lengths, a scene per shard; and how to open them."""
    config = CONFIG.model_copy(update={"model": UNEQUAL, "latents": LatentsConfig(shard_scenes=1)})
    lengths = [(12, 12, 12), (12, 6, 12), (9, 11, 10)]
    samples = [
        make_sample(i, scenes=[make_scene(i, place, n) for place, n in enumerate(frames)])
        for i, frames in enumerate(lengths)
    ]
    manifest = tmp_path / "m.parquet"
    write_table(manifest, SAMPLES, samples)
    workspace = Workspace(tmp_path / "ws")
    encode_manifest(config, manifest, ground.base, workspace, painted_frames)
    return lambda: open_dataset(config, manifest, ground.base, workspace)


def test_a_batch_holds_what_the_plan_says(ground):
    data = open_dataset(CONFIG, ground.manifest, ground.base, ground.workspace)
    check_dataset(data)
    assert isinstance(data, LatentDataset)
    stage = TrainStageConfig(batch_size=4, micro_batch_size=1, conditional_p=1.0, text_dropout=0.5)
    plan = next(
        p
        for p in (plan_step(k, stage, len(data), 1000) for k in range(20))
        if 0 < sum(d.drop_text for d in p.draws) < 4
    )
    reading = data.read(plan, range(4))
    (batch,) = reading.batches
    assert reading.bad == {}
    assert batch.latents.shape == batch.noise.shape == (4, 6, 16, 4, 4)
    assert batch.text.shape == (4, 3, 16, 64)
    assert (batch.rows, batch.scene_frames) == ((0, 1, 2, 3), (2, 2, 2))
    assert batch.generated is not None
    assert batch.generated.tolist() == [[False, False, True]] * 4
    for row, draw in enumerate(plan.draws):
        (alone,) = data.read(plan, [row]).batches
        assert torch.equal(alone.noise[0], batch.noise[row])
        assert torch.equal(alone.latents[0], batch.latents[row])
        assert torch.equal(batch.text[row, 0], batch.text[row, 1]) == draw.drop_text
        assert batch.timestep[row] == draw.timestep


def test_moving_a_batch_keeps_its_numbers(ground):
    data = open_dataset(CONFIG, ground.manifest, ground.base, ground.workspace)
    (batch,) = data.read(plan_of(0, 1, conditional=True), [1, 0]).batches
    moved = batch.to(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(moved.latents, batch.latents.bfloat16())
    assert moved.text.dtype == moved.noise.dtype == torch.bfloat16
    assert torch.equal(moved.timestep, batch.timestep)
    assert (moved.rows, moved.scene_frames) == ((1, 0), (2, 2, 2))


def test_rows_of_unequal_lengths_do_not_share_a_batch(own):
    data = own()
    check_dataset(data)
    assert [data.scene_frames(i) for i in range(3)] == [(3, 3, 3), (3, 2, 3), (3, 3, 3)]
    plan = plan_of(1, 0, 2, 1)
    reading = data.read(plan, [0, 1, 2, 3])
    assert [b.rows for b in reading.batches] == [(0, 3), (1, 2)]
    assert [b.scene_frames for b in reading.batches] == [(3, 2, 3), (3, 3, 3)]
    assert [b.latents.shape[1] for b in reading.batches] == [8, 9]
    for batch in reading.batches:
        for i, row in enumerate(batch.rows):
            expected = scene_noise(plan.draws[row].noise_seed, batch.scene_frames, (16, 4, 4))
            assert torch.equal(batch.noise[i], expected)
            assert torch.equal(batch.latents[i], data.latents(plan.draws[row].index, 0))


def test_latents_are_the_mean_or_a_draw_from_the_posterior(ground):
    data = open_dataset(CONFIG, ground.manifest, ground.base, ground.workspace)
    sampled = CONFIG.model_copy(update={"latents": LatentsConfig(sample_posterior=True)})
    drawn = open_dataset(sampled, ground.manifest, ground.base, ground.workspace)
    shards = Shards(data.cache.scene_folder)
    keys = [data.cache.scene_key(s) for s in data.samples[2].scenes]
    mean = torch.cat([shards.tensor(k, "mean") for k in keys])
    std = torch.cat([shards.tensor(k, "logvar") for k in keys]).exp().sqrt()
    eps = [torch.randn(2, 16, 4, 4, generator=scene_generator(5, i, "posterior")) for i in range(3)]
    factor = data.cache.scaling_factor
    torch.testing.assert_close(data.latents(2, 5), mean * factor)
    torch.testing.assert_close(drawn.latents(2, 5), (mean + std * torch.cat(eps)) * factor)
    assert torch.equal(data.latents(2, 5), data.latents(2, 6))
    assert not torch.equal(drawn.latents(2, 5), drawn.latents(2, 6))
    assert not torch.equal(drawn.latents(2, 5)[:2], drawn.latents(2, 5)[2:4])


def test_a_row_that_cannot_be_read_is_in_no_batch_and_says_why(own):
    data = own()
    shard_of(data, 2, 1).write_bytes(b"not a shard")
    reading = own().read(plan_of(0, 2, 1), [0, 1, 2])
    assert [b.rows for b in reading.batches] == [(0,), (2,)]
    assert list(reading.bad) == [1]
    message = str(reading.bad[1])
    assert "sample sample-2" in message
    assert shard_of(data, 2, 1).name in message


def test_the_check_lists_what_is_damaged_gone_or_of_a_wrong_shape(own):
    data = own()
    shard_of(data, 0, 1).write_bytes(b"not a shard")
    shard_of(data, 2, 2).unlink()
    other = shard_of(data, 1, 1)
    other.write_bytes(shard_of(data, 0, 0).read_bytes())

    with pytest.raises(ManifestError, match=r"sample sample-0: .*cannot be read") as found:
        check_dataset(data)
    for sample in ("sample-0", "sample-1", "sample-2"):
        assert f"sample {sample}: " in str(found.value)
    assert "and 1 more" in str(found.value)
    with pytest.raises(ManifestError, match="1 of 3 samples lack latents"):
        own()


def test_a_tensor_of_another_length_is_found(own):
    data = own()
    data.cache = dataclasses.replace(data.cache, shape=UNEQUAL.model_copy(update={"width_px": 48}))
    with pytest.raises(ManifestError, match=r"has shape \(3, 16, 4, 4\), not \(3, 16, 4, 6\)"):
        # the same folder read as if it were of another size
        check_dataset(LatentDataset(data.samples, data.cache, data._scenes, data._captions))


def test_samples_with_a_scene_that_failed_are_left_out(ground, tmp_path):
    manifest = tmp_path / "m.parquet"
    workspace = Workspace(tmp_path / "ws")
    short = make_sample(2, scenes=[make_scene(2, 0), make_scene(2, 1, 4), make_scene(2, 2)])
    write_table(manifest, SAMPLES, [make_sample(0), make_sample(1), short])

    def read(scene, frames, height_px, width_px):
        if scene.clip_id == "clip-1-2":
            raise VideoDecodeError("broken", reason="decode_error", where=scene.uri)
        return painted_frames(scene, frames, height_px, width_px)

    def ids() -> list[str]:
        data = open_dataset(CONFIG, manifest, ground.base, workspace)
        return [s.sample_id for s in data.samples]

    encode_manifest(CONFIG, manifest, ground.base, workspace, read)
    assert ids() == ["sample-0"]
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    assert ids() == ["sample-0", "sample-1"]
    write_table(manifest, SAMPLES, [short])
    with pytest.raises(ManifestError, match="no sample could be encoded"):
        ids()


def test_samples_that_were_never_encoded_are_an_error(ground, tmp_path):
    path = tmp_path / "m.parquet"
    write_table(path, SAMPLES, [make_sample(0), make_sample(77)])
    with pytest.raises(ManifestError, match="1 of 2 samples lack latents"):
        open_dataset(CONFIG, path, ground.base, ground.workspace)


def test_the_validation_split_may_be_empty(ground, tmp_path):
    data = open_dataset(CONFIG, ground.manifest, ground.base, ground.workspace, "val")
    assert len(data) == 0
    path = tmp_path / "m.parquet"
    write_table(path, SAMPLES, [make_sample(0), make_sample(1, split="val")])
    data = open_dataset(CONFIG, path, ground.base, ground.workspace, "val")
    assert [s.sample_id for s in data.samples] == ["sample-1"]


@pytest.fixture(scope="module")
def video(ground, tmp_path_factory):
    """A manifest of one real video: scenes as long as needed, longer, and not there."""
    folder = tmp_path_factory.mktemp("video")
    frames = np.random.default_rng(0).integers(0, 256, (40, 4, 6, 3), np.uint8)
    write_mp4(folder / "v.mp4", frames.repeat(16, 1).repeat(16, 2), 12)

    def scene(place: int, start: int, num_frames: int, name: str = "v.mp4"):
        times = {"start_frame": start, "end_frame": start + num_frames, "start_pts": 0}
        return dataclasses.replace(
            make_scene(9, place, num_frames),
            clip_id=f"{name}-{start}-{num_frames}",
            uri=str(folder / name),
            **times,
        )

    exact = make_sample(0, scenes=[scene(i, 0, 5) for i in range(3)])
    longer = make_sample(1, scenes=[scene(i, 0, 30) for i in range(3)])
    gone = make_sample(2, scenes=[*exact.scenes[:2], scene(2, 0, 5, "gone.mp4")])
    short = make_sample(3, scenes=[*exact.scenes[:2], scene(2, 0, 4)])
    write_table(folder / "m.parquet", SAMPLES, [exact, longer, gone, short])
    return folder / "m.parquet"


def pixels(ground, video, **latents) -> PixelDataset:
    latents = LatentsConfig(source="pixels", **latents)
    config = CONFIG.model_copy(update={"latents": latents})
    data = open_dataset(config, video, ground.base, Workspace(video.parent))
    assert isinstance(data, PixelDataset)
    return data


@pytest.mark.parametrize("sampled", [False, True])
def test_pixels_give_what_the_cache_gives_where_there_is_no_choice(ground, video, sampled):

    data = pixels(ground, video, sample_posterior=sampled)
    workspace = Workspace(video.parent)
    encode_manifest(CONFIG, video, ground.base, workspace, scene_reader(workspace, SourcesConfig()))
    config = CONFIG.model_copy(update={"latents": LatentsConfig(sample_posterior=sampled)})
    cached = open_dataset(config, video, ground.base, workspace)
    assert [s.sample_id for s in cached.samples] == ["sample-0", "sample-1"]
    (a,) = data.read(plan_of(0, 0, conditional=True), [0, 1]).batches
    (b,) = cached.read(plan_of(0, 0, conditional=True), [0, 1]).batches
    for name in ("latents", "text", "noise", "timestep", "generated"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_pixels_start_at_a_random_frame_of_the_seed(ground, video):
    data = pixels(ground, video)
    assert [s.sample_id for s in data.samples] == ["sample-0", "sample-1", "sample-2"]
    asked = []
    real = data._encoder.read
    data._encoder.read = lambda scene, frames, *size: (
        asked.append(frames) or real(scene, frames, *size)
    )
    first = data.latents(1, 5)
    assert torch.equal(first, data.latents(1, 5))
    assert asked[:3] == asked[3:]
    for seed in range(6, 12):
        data.latents(1, seed)
    starts = {frames[0] for frames in asked}
    assert len(starts) > 5
    for frames in asked:
        assert len(frames) == 5
        assert all(b - a == 3 for a, b in pairwise(frames))
        assert frames[0] >= 0
        assert frames[-1] < 30


def test_a_video_that_is_gone_is_found_before_and_during_training(ground, video):
    data = pixels(ground, video)
    with pytest.raises(ManifestError, match=r"sample sample-2: .*gone\.mp4 is not there"):
        check_dataset(data)
    reading = data.read(plan_of(0, 2), [0, 1])
    assert [b.rows for b in reading.batches] == [(0,)]
    assert "sample sample-2" in str(reading.bad[1])
    assert "gone.mp4" in str(reading.bad[1])


def test_reading_ahead_gives_the_same_and_errors_where_they_belong(ground):
    data = open_dataset(CONFIG, ground.manifest, ground.base, ground.workspace)
    stage = TrainStageConfig(batch_size=2, micro_batch_size=1)
    threads = set()

    def read(step: int):
        threads.add(threading.current_thread().name)
        if step == 3:
            raise InputError("step 3")
        return data.read(plan_step(step, stage, len(data), 1000), range(2))

    with Prefetched(read, steps=4) as ahead:
        for step in (0, 1, 2, 0):  # also when a step is asked for out of turn
            (batch,) = ahead(step).batches
            (expected,) = read(step).batches
            assert torch.equal(batch.latents, expected.latents)
        ahead(2)
        with pytest.raises(InputError, match="step 3"):
            ahead(3)
    assert len(threads) == 2  # this one and one beside it


def test_the_cache_key_holds_what_latents_depend_on(ground, tmp_path):
    cache = LatentCache(Workspace(tmp_path), ground.base, SHAPE, "float32")
    other = LatentCache(Workspace(tmp_path), ground.base, SHAPE, "bfloat16")
    wider = LatentCache(
        Workspace(tmp_path), ground.base, SHAPE.model_copy(update={"width_px": 48}), "float32"
    )
    assert len({c.scene_folder for c in (cache, other, wider)}) == 3
    assert cache.caption_folder == wider.caption_folder != other.caption_folder
    longer = LatentCache(
        Workspace(tmp_path), ground.base, SHAPE.model_copy(update={"max_stride": 1}), "float32"
    )
    assert cache.scene_folder == longer.scene_folder
    assert cache.scene_key(make_scene(0, 0)) != longer.scene_key(make_scene(0, 0))
