"""Encoding on real Ray workers. Ray takes half a minute to start, so it is started once."""

import dataclasses
import os
import signal

import numpy as np
import pytest

from schemas.config.root import EngineConfig
from schemas.config.training import LatentsConfig, TrainingConfig
from schemas.errors import CheckpointError, ConfigError, ExternalToolError
from schemas.layout import Workspace
from schemas.storage import fingerprint_file
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import SHAPE, make_sample, make_scene
from training.cache import LatentCache
from training.latents_job import encode_manifest
from training.shards import Shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def config(workers: int) -> TrainingConfig:
    latents = LatentsConfig(workers=workers, shard_scenes=2)
    return TrainingConfig(model=SHAPE, latents=latents)


def reader(marker=None, deadly=""):
    """Frames painted by the clip's name, in a closure that Ray can send.

    Reading the clip ``deadly`` kills the process: once, if ``marker`` is a file to be written.
    """

    def read(scene, frames, height_px, width_px):
        if scene.clip_id == deadly and not (marker and marker.exists()):
            if marker:
                marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        colour = np.random.default_rng(list(scene.clip_id.encode())).integers(0, 256, 3)
        picture = np.broadcast_to(colour.astype(np.uint8), (height_px, width_px, 3))
        return np.stack([picture] * len(frames))

    return read


def contents(workspace: Workspace) -> dict[str, str]:
    """Fingerprints of all files of the cache."""
    files = (p for p in workspace.cache("").rglob("*") if p.is_file())
    return {p.relative_to(workspace.root).as_posix(): fingerprint_file(p) for p in files}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    path = tmp_path_factory.mktemp("m") / "m.parquet"
    samples = [make_sample(i) for i in range(2)]
    short = make_sample(2, scenes=[make_scene(0, 0), make_scene(0, 1), make_scene(2, 2, 3)])
    write_table(path, SAMPLES, [*samples, short])
    return path


@pytest.fixture(scope="module")
def ray_here():
    from curation.pipeline import start_ray, stop_ray

    start_ray(EngineConfig(num_cpus=2))
    yield
    stop_ray()


def test_two_workers_write_the_files_of_one_even_if_one_dies(ground, manifest, ray_here, tmp_path):
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    alone = encode_manifest(config(1), manifest, ground.base, one, reader())
    done = []
    read = reader(tmp_path / "died", deadly="clip-0-2")
    both = encode_manifest(config(2), manifest, ground.base, two, read, lambda *n: done.append(n))
    assert (tmp_path / "died").is_file()
    assert contents(one) == contents(two)
    assert len(contents(one)) == 2 * 3 + 2 * 4  # shards of 6 scenes and 8 captions, with tables
    assert done[0] == (1, 7)
    assert [n for n, _ in sorted(done)] == [1, 3, 5, 7]
    for a, b in ((alone.scenes, both.scenes), (alone.captions, both.captions)):
        assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)
    assert alone.rejects == both.rejects


def test_errors_of_workers_are_clear(ground, manifest, ray_here, tmp_path):
    workspace = Workspace(tmp_path / "ws")
    with pytest.raises(ExternalToolError, match="clip clip-0-2") as died:
        encode_manifest(config(2), manifest, ground.base, workspace, reader(deadly="clip-0-2"))
    assert "what is finished is kept" in str(died.value)
    cache = LatentCache(workspace, ground.base, SHAPE, "float32")
    shards = Shards(cache.scene_folder)
    assert cache.scene_key(make_scene(0, 0)) in shards
    assert cache.scene_key(make_scene(0, 2)) not in shards

    (tmp_path / "base" / "vae").mkdir(parents=True)
    write = (tmp_path / "base" / "vae" / "config.json").write_text
    write((ground.base / "vae" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="AutoencoderKLCogVideoX cannot be loaded"):
        encode_manifest(config(2), manifest, tmp_path / "base", workspace, reader())
    with pytest.raises(ConfigError, match="3 workers, 2 CPUs"):
        encode_manifest(config(3), manifest, ground.base, Workspace(tmp_path / "x"), reader())
