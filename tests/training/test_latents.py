import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from curation.mp4 import write_mp4
from schemas.config.curation import SourcesConfig
from schemas.config.training import TrainingConfig
from schemas.errors import ManifestError, VideoDecodeError
from schemas.layout import Workspace
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import SHAPE, make_sample, make_scene, painted_frames
from training.base_model import load_text_encoder, load_tokenizer, load_vae
from training.cache import LatentCache
from training.data import LatentDataset
from training.latents import encode_manifest, encode_texts, scene_reader

CONFIG = TrainingConfig(model=SHAPE)


@pytest.fixture
def work(ground, tmp_path):
    """An empty workspace of its own, and a manifest whose samples share two clips."""
    shared = make_sample(1, scenes=[make_scene(0, 1), make_scene(0, 2), make_scene(1, 0)])
    manifest = tmp_path / "m.parquet"
    write_table(manifest, SAMPLES, [make_sample(0), shared])
    workspace = Workspace(tmp_path / "ws")
    return manifest, workspace, LatentCache(workspace, ground.base, SHAPE, "float32")


def test_every_scene_and_caption_once_and_again_only_what_is_missing(ground, work):
    manifest, workspace, cache = work
    asked = []

    def read(scene, frames, height_px, width_px):
        asked.append((scene.clip_id, frames))
        return painted_frames(scene, frames, height_px, width_px)

    first = encode_manifest(CONFIG, manifest, ground.base, workspace, read)
    assert sorted(asked) == [(f"clip-{c}", (1, 3, 5, 7, 9)) for c in ("0-0", "0-1", "0-2", "1-0")]
    assert (first.scenes.input, first.scenes.kept, first.scenes.reused) == (4, 4, 0)
    assert (first.captions.input, first.captions.reused) == (5, 0)  # four and the empty one
    again = encode_manifest(CONFIG, manifest, ground.base, workspace, read)
    assert len(asked) == 4
    assert (again.scenes.kept, again.scenes.reused) == (4, 4)
    assert again.captions.reused == 5
    cache.scene_file(make_scene(0, 1)).unlink()
    third = encode_manifest(CONFIG, manifest, ground.base, workspace, read)
    assert third.scenes.reused == 3
    assert asked[4][0] == "clip-0-1"


def test_latents_are_the_posterior_mean_in_the_transformers_order(ground, work):
    manifest, workspace, cache = work
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    scene = make_scene(0, 2)
    vae = load_vae(ground.base)
    frames = torch.from_numpy(painted_frames(scene, range(5), 32, 32).copy())
    with torch.no_grad():
        mean = vae.encode((frames / 127.5 - 1).permute(3, 0, 1, 2)[None]).latent_dist.mean
    found = load_file(cache.scene_file(scene))["latents"]
    assert found.shape == (2, 16, 4, 4)
    expected = mean[0].transpose(0, 1) * vae.config.scaling_factor
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_unreadable_and_short_scenes_are_rejects_and_their_samples_left_out(ground, tmp_path):
    manifest = tmp_path / "m.parquet"
    workspace = Workspace(tmp_path / "ws")
    short = make_sample(2, scenes=[make_scene(2, 0), make_scene(2, 1, 4), make_scene(2, 2)])
    write_table(manifest, SAMPLES, [make_sample(0), make_sample(1), short])

    def read(scene, frames, height_px, width_px):
        if scene.clip_id == "clip-1-2":
            raise VideoDecodeError("broken", reason="decode_error", where=scene.uri)
        return painted_frames(scene, frames, height_px, width_px)

    done = encode_manifest(CONFIG, manifest, ground.base, workspace, read)
    assert (done.scenes.input, done.scenes.kept) == (9, 7)
    assert {(r.record_id, r.reason, r.failed) for r in done.rejects} == {
        ("clip-1-2", "decode_error", True),
        ("clip-2-1", "too_few_frames", False),
    }
    cache = LatentCache(workspace, ground.base, SHAPE, "float32")
    assert [s.sample_id for s in LatentDataset.open(manifest, cache).samples] == ["sample-0"]
    # once the source can be read, the sample is back
    encode_manifest(CONFIG, manifest, ground.base, workspace, painted_frames)
    ids = [s.sample_id for s in LatentDataset.open(manifest, cache).samples]
    assert ids == ["sample-0", "sample-1"]
    write_table(manifest, SAMPLES, [short])
    with pytest.raises(ManifestError, match="no sample could be encoded"):
        LatentDataset.open(manifest, cache)


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
