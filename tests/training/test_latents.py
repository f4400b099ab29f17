import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from curation.mp4 import write_mp4
from schemas.config.curation import SourcesConfig
from schemas.config.training import LatentsConfig, TrainingConfig
from schemas.errors import InputError, VideoDecodeError
from schemas.layout import Workspace
from schemas.tables import LATENTS, SAMPLES, read_metadata, read_table, write_table
from tests.training.conftest import SHAPE, make_sample, make_scene, painted_frames
from training.base_model import load_text_encoder, load_tokenizer, load_vae
from training.cache import LatentCache
from training.latents import encode_frames, encode_texts, in_pairs, scene_reader
from training.latents_job import encode_manifest
from training.shards import LEFTOVER_AGE_S, Shards

EMBEDDED = Path(__file__).parents[2] / "assets/tiny/model"
CONFIG = TrainingConfig(model=SHAPE, latents=LatentsConfig(shard_scenes=2))


@pytest.fixture
def work(ground, tmp_path):
    """An empty workspace of its own, and a manifest whose samples share two clips."""
    shared = make_sample(1, scenes=[make_scene(0, 1), make_scene(0, 2), make_scene(1, 0)])
    manifest = tmp_path / "m.parquet"
    write_table(manifest, SAMPLES, [make_sample(0), shared])
    workspace = Workspace(tmp_path / "ws")
    return manifest, workspace, LatentCache(workspace, ground.base, SHAPE, "float32")


class Counting:
    """Paints frames and notes which were asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, scene, frames, height_px, width_px):
        self.asked.append((scene.clip_id, frames))
        return painted_frames(scene, frames, height_px, width_px)


def test_every_scene_and_caption_once_and_again_only_what_is_missing(ground, work):
    manifest, workspace, cache = work
    read = Counting()
    done = []

    def encode():
        progress = lambda *numbers: done.append(numbers)  # noqa: E731
        return encode_manifest(CONFIG, manifest, ground.base, workspace, read, progress)

    first = encode()
    assert read.asked == [(f"clip-{c}", (1, 3, 5, 7, 9)) for c in ("0-0", "0-1", "0-2", "1-0")]
    assert done == [(0, 4), (2, 4), (4, 4)]
    assert (first.scenes.input, first.scenes.kept, first.scenes.reused) == (4, 4, 0)
    assert (first.captions.input, first.captions.reused) == (5, 0)  # four and the empty one
    again = encode()
    assert len(read.asked) == 4
    assert (again.scenes.kept, again.scenes.reused, again.captions.reused) == (4, 4, 5)
    lost = Shards(cache.scene_folder).path(cache.scene_key(make_scene(0, 1)))
    lost.unlink()
    third = encode()
    assert third.scenes.reused == 2
    assert [clip for clip, _ in read.asked[4:]] == ["clip-0-0", "clip-0-1"]
    assert lost.is_file()


def test_validation_samples_are_encoded_too(ground, tmp_path):
    manifest = tmp_path / "m.parquet"
    write_table(manifest, SAMPLES, [make_sample(0), make_sample(1, split="val")])
    done = encode_manifest(CONFIG, manifest, ground.base, Workspace(tmp_path), painted_frames)
    assert (done.scenes.kept, done.captions.kept) == (6, 7)


def test_a_scene_is_its_posterior_in_the_transformers_order(ground, work):
    manifest, workspace, cache = work
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    scene = make_scene(0, 2)
    vae = load_vae(ground.base)
    frames = torch.from_numpy(painted_frames(scene, range(5), 32, 32).copy())
    with torch.no_grad():
        posterior = vae.encode((frames / 127.5 - 1).permute(3, 0, 1, 2)[None]).latent_dist
    shards = Shards(cache.scene_folder)
    for what, expected in (("mean", posterior.mean), ("logvar", posterior.logvar)):
        found = shards.tensor(cache.scene_key(scene), what)
        assert found.shape == (2, 16, 4, 4)
        torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_the_table_beside_a_shard_says_what_is_in_it(ground, work):
    manifest, workspace, cache = work
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    parts = sorted(cache.scene_folder.glob("*.parquet"))
    assert len(parts) == 2
    rows = [row for part in parts for row in read_table(part, LATENTS)]
    assert sorted(r.clip_id for r in rows) == ["clip-0-0", "clip-0-1", "clip-0-2", "clip-1-0"]
    assert all(r.frames == [1, 3, 5, 7, 9] and r.reason is None for r in rows)
    for part in parts:
        assert float(read_metadata(part)["scaling_factor"]) == cache.scaling_factor
        with safe_open(part.with_suffix(".safetensors"), framework="pt") as shard:
            names = {f"{r.key}.{w}" for r in read_table(part, LATENTS) for w in ("mean", "logvar")}
            assert set(shard.keys()) == names
    captions = [r for p in cache.caption_folder.glob("*.parquet") for r in read_table(p, LATENTS)]
    assert {r.caption for r in captions} == {
        "",
        *(f"Actor{i} in place 0" for i in range(3)),
        "Actor0 in place 1",
    }


def test_what_is_stored_does_not_depend_on_the_shards(ground, work, tmp_path):
    manifest, workspace, cache = work
    other = Workspace(tmp_path / "other")
    one_by_one = CONFIG.model_copy(update={"latents": LatentsConfig(shard_scenes=1)})
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    encode_manifest(one_by_one, manifest, ground.base, other, painted_frames)
    again = dataclasses.replace(cache, workspace=other)
    assert len(list(again.scene_folder.glob("*.safetensors"))) == 4
    both = [Shards(c.scene_folder) for c in (cache, again)]
    for scene in (make_scene(0, i) for i in range(3)):
        a, b = (s.tensor(cache.scene_key(scene), "mean") for s in both)
        assert torch.equal(a, b)
    both = [Shards(c.caption_folder) for c in (cache, again)]
    a, b = (s.tensor(cache.caption_key("Actor1 in place 0"), "text") for s in both)
    assert torch.equal(a, b)


def test_scenes_have_the_first_length_they_can_fill(ground, tmp_path):
    shape = SHAPE.model_copy(update={"frames": 9, "shorter_frames": (5, 1)})
    config = CONFIG.model_copy(update={"model": shape})
    scenes = [make_scene(0, place, n) for place, n in enumerate((9, 8, 4))]
    manifest = tmp_path / "m.parquet"
    write_table(manifest, SAMPLES, [make_sample(0, scenes=scenes)])
    read = Counting()
    done = encode_manifest(config, manifest, ground.base, Workspace(tmp_path), read)
    assert done.rejects == []
    assert [frames for _, frames in read.asked] == [tuple(range(9)), (1, 2, 3, 4, 5), (1,)]
    cache = LatentCache.of(config, ground.base, Workspace(tmp_path))
    shards = Shards(cache.scene_folder)
    for scene, frames in zip(scenes, (3, 2, 1), strict=True):
        assert shards.tensor(cache.scene_key(scene), "mean").shape == (frames, 16, 4, 4)
        assert cache.latent_frames(scene) == frames


def test_time_is_compressed_as_the_vae_does(ground, tmp_path):
    for model, latent_frames in ((ground.base, [1, 2, 3]), (EMBEDDED, [1, 5, 9])):
        cache = LatentCache.of(CONFIG, model, Workspace(tmp_path))
        assert [cache.encoded_frames(n) for n in (1, 5, 9)] == latent_frames


def test_a_lone_small_video_on_a_cpu_is_encoded_as_one_of_two():
    vae = load_vae(EMBEDDED)
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3), np.uint8)
    video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        together = vae.encode(video).latent_dist.mean
    for one, latents in zip(frames, together, strict=True):
        torch.testing.assert_close(encode_frames(vae, one)[0], latents.transpose(0, 1))
    assert len(in_pairs(vae, video[:1])) == len(in_pairs(vae, video)) == 2
    assert len(in_pairs(vae, torch.empty(1, 3, 5, 480, 720))) == 1
    assert len(in_pairs(vae, torch.empty(1, 16, 5, 16, 16))) == 2
    assert len(in_pairs(vae, torch.empty(1, 16, 5, 120, 180))) == 1


def test_unreadable_and_short_scenes_are_rejects_and_tried_again(ground, tmp_path):
    manifest = tmp_path / "m.parquet"
    workspace = Workspace(tmp_path / "ws")
    short = make_sample(2, scenes=[make_scene(2, 0), make_scene(2, 1, 4), make_scene(2, 2)])
    write_table(manifest, SAMPLES, [make_sample(0), make_sample(1), short])

    def read(scene, frames, height_px, width_px):
        if scene.clip_id == "clip-1-2":
            raise VideoDecodeError("broken", reason="decode_error", where=scene.uri)
        if scene.clip_id == "clip-1-1":
            raise PermissionError(scene.uri)
        return painted_frames(scene, frames, height_px, width_px)

    too_short = ("clip-2-1", "too_few_frames", False)
    for reused in (0, 6):
        done = encode_manifest(CONFIG, manifest, ground.base, workspace, read)
        assert (done.scenes.input, done.scenes.kept, done.scenes.reused) == (9, 6, reused)
        assert {(r.record_id, r.reason, r.failed) for r in done.rejects} == {
            ("clip-1-2", "decode_error", True),
            ("clip-1-1", "unreadable", True),
            too_short,
        }
    # once the source can be read, the tensors win over the failures before
    done = encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    assert [(r.record_id, r.reason, r.failed) for r in done.rejects] == [too_short]
    assert (done.scenes.kept, done.scenes.reused) == (8, 6)


def test_what_the_vae_makes_no_numbers_of_is_a_reject(ground, work, monkeypatch):
    manifest, workspace, _ = work
    broken = load_vae(ground.base)
    broken.encoder.conv_out.conv.bias.data.fill_(float("nan"))
    monkeypatch.setattr("training.latents.load_vae", lambda *_: broken)
    done = encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    assert done.scenes.kept == 0
    assert done.scenes.reasons == {"not_finite": 4}


def test_a_shard_without_its_table_is_never_read_and_goes_in_time(ground, work):
    manifest, workspace, cache = work
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    key = cache.scene_key(make_scene(0, 0))
    shard = Shards(cache.scene_folder).path(key)
    shard.with_suffix(".parquet").unlink()  # as if killed between the two
    temporary = shard.with_name(f".{shard.stem}.1.tmp.safetensors")
    temporary.write_bytes(b"half")
    shards = Shards(cache.scene_folder)
    assert key not in shards
    shards.remove_leftovers()
    assert shard.is_file()  # another process may be about to write the table
    assert temporary.is_file()
    old = time.time() - LEFTOVER_AGE_S - 1
    for path in cache.scene_folder.iterdir():
        os.utime(path, (old, old))
    before = set(cache.scene_folder.iterdir())
    shards.remove_leftovers()
    assert before - set(cache.scene_folder.iterdir()) == {shard, temporary}


def test_a_killed_job_does_only_what_it_had_not_finished(ground, work):
    manifest, workspace, cache = work
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)

    def contents():
        return {p: p.read_bytes() for p in cache.scene_folder.iterdir()}

    before = contents()
    shard = Shards(cache.scene_folder).path(cache.scene_key(make_scene(0, 0)))
    shard.with_suffix(".parquet").unlink()
    shard.write_bytes(b"half")
    read = Counting()
    done = encode_manifest(CONFIG, manifest, ground.base, workspace, read)
    assert [clip for clip, _ in read.asked] == ["clip-0-0", "clip-0-1"]
    assert (done.scenes.reused, done.captions.reused) == (2, 5)
    assert contents() == before


def test_a_damaged_shard_is_an_error_that_names_it(ground, work):
    manifest, workspace, cache = work
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    key = cache.scene_key(make_scene(0, 0))
    path = Shards(cache.scene_folder).path(key)
    shards = Shards(cache.scene_folder)
    whole = path.read_bytes()
    for damage in (whole[:-8], b"", None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(InputError, match=f"{path.name}, tensor {key}.mean"):
            shards.tensor(key, "mean")
    path.write_bytes(whole)
    with pytest.raises(InputError, match="does not contain tensor"):
        shards.tensor(key, "text")
    assert shards.tensor(key, "mean").shape == (2, 16, 4, 4)


def test_scenes_are_read_from_real_video(ground, tmp_path):
    frames = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 64 * 128 * 3)
    write_mp4(tmp_path / "v.mp4", frames.reshape(24, 64, 128, 3), 12)
    scenes = [dataclasses.replace(make_scene(0, i), uri=str(tmp_path / "v.mp4")) for i in range(3)]
    manifest = tmp_path / "m.parquet"
    write_table(manifest, SAMPLES, [make_sample(0, scenes=scenes)])
    workspace = Workspace(tmp_path / "ws")
    read = scene_reader(workspace, SourcesConfig())
    done = encode_manifest(CONFIG, manifest, ground.base, workspace, read)
    assert done.rejects == []
    assert done.scenes.kept == 3


def test_texts_are_padded_never_masked_and_cut_when_long(ground):
    tokenizer, encoder = load_tokenizer(ground.base), load_text_encoder(ground.base)
    texts = ["", "a", "a much longer caption than sixteen bytes", "zwölf Möwen"]
    together = encode_texts(tokenizer, encoder, texts, 16)
    assert together.shape == (4, 16, 64)
    for text, row in zip(texts, together, strict=True):
        alone = encode_texts(tokenizer, encoder, [text], 16)[0]
        torch.testing.assert_close(alone, row)
    # unmasked padding: the same byte gives another embedding when another number of pads follow
    assert not torch.allclose(
        together[1, 0], encode_texts(tokenizer, encoder, ["a"], 8)[0, 0], atol=1e-3
    )
