"""The whole of curation through a real Ray, on real and synthetic films."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from curation.mp4 import write_mp4
from curation.pipeline import stop_ray
from curation.refresh import Refresh
from schemas.config.curation import CurationConfig, ManifestsConfig, SourcesConfig
from schemas.config.files import dump_yaml
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.counts import StageCount
from schemas.errors import TooManyFailures
from schemas.layout import Snapshot, Workspace
from schemas.storage import latest, read_done, read_json
from schemas.tables import CLIPS, REJECTS, SAMPLES, SOURCES, read_table

pytestmark = pytest.mark.slow

RUN = """
import sys
from pathlib import Path
from curation.refresh import Refresh
from schemas.config.files import load_config
refresh = Refresh(load_config(Path(sys.argv[1])))
refresh.sources()
refresh.shots()
refresh.clips()
refresh.filters()
refresh.embeddings()
refresh.dedup()
"""


@pytest.fixture(scope="module")
def films(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real and synthetic films, each defect once, a duplicate, and captions for all but one."""
    folder = tmp_path_factory.mktemp("films")
    for name in ("big_buck_bunny.mp4", "chaplin.mp4", "sintel_trailer.mp4"):
        shutil.copy(samples / name, folder)
    shutil.copytree(samples / "broken", folder / "broken")
    shutil.copy(samples / "chaplin.mp4", folder / "second_copy.mp4")
    (folder / "text.mp4").write_text("not a video")
    rows = ["videoID,url,timestamp,caption,matching_score"]
    patches = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 12, 3), dtype=np.uint8)
    for film, shots in enumerate(patches):
        # each shot a pattern of its own that drifts to the side
        wide = [np.kron(shot, np.ones((8, 8, 1), np.uint8)) for shot in shots]
        frames = np.stack([np.roll(w, i, 1) for w in wide for i in range(30)])
        write_mp4(folder / f"made_{film}.mp4", frames, 12)
    for path in sorted(folder.glob("*.mp4")):
        if path.name != "sintel_trailer.mp4":
            rows.append(
                f"{path.stem},{path.name},\"[['0:00:00.000', '0:01:00.000']]\",['A red ball.'],[1]"
            )
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def make(films: Path) -> Iterator[Callable[..., Refresh]]:
    def make(workspace: Path, **changes: object) -> Refresh:
        curation = CurationConfig(
            sources=SourcesConfig(inputs=(str(films),), captions_csv=str(films / "captions.csv")),
            manifests=ManifestsConfig(low=-1.0),
        ).model_copy(update=changes)
        config = TriptychConfig(
            workspace=str(workspace),
            curation=curation,
            engine=EngineConfig(num_cpus=2, object_store_mb=80),
        )
        return Refresh(config)

    yield make
    stop_ray()


@pytest.fixture(scope="module")
def whole(
    make: Callable[..., Refresh], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Snapshot, dict[str, StageCount]]:
    """An uninterrupted run in a workspace of its own."""
    return run(make(tmp_path_factory.mktemp("whole")))


def run(refresh: Refresh) -> tuple[Snapshot, dict[str, StageCount]]:
    counts = [refresh.sources(), refresh.shots(), refresh.clips(), refresh.filters()]
    counts += [refresh.embeddings(), refresh.dedup(), refresh.windows(), *refresh.manifests()]
    return refresh.publish(), {c.stage: c for c in counts}


def tables(snapshot: Snapshot) -> dict[str, bytes]:
    paths = sorted(snapshot.root.rglob("*.parquet"))
    assert len(paths) == 9
    return {p.relative_to(snapshot.root).as_posix(): p.read_bytes() for p in paths}


def test_every_source_ends_in_one_place(whole: tuple[Snapshot, dict[str, StageCount]]) -> None:
    snapshot, counts = whole
    assert counts["sources"].reasons == {
        "cannot_open": 1, "duplicate_source": 1, "empty_file": 1, "no_video_stream": 1,
        "truncated": 1,
    }  # fmt: skip
    assert (counts["sources"].input, counts["sources"].kept) == (11, 6)
    assert counts["shots"].kept == counts["shots"].input
    # Each shot is a span or more: doubtful places and the length limit cut them up.
    assert 0 < counts["shots"].produced <= counts["clips"].input
    assert counts["filters"].input == counts["clips"].kept
    assert counts["embeddings"].kept == counts["filters"].kept == counts["embeddings"].input
    assert counts["dedup"].kept == counts["embeddings"].kept
    assert counts["windows"].kept == counts["manifest_sft"].input
    assert counts["manifest_pretrain"].reasons["no_caption"] > 0  # sintel
    rejects = read_table(snapshot.table("rejects"), REJECTS)
    assert len(rejects) == sum(c.rejected + c.failed for c in counts.values())
    assert read_json(snapshot.counts) == [c.to_dict() for c in counts.values()]


def test_the_tables_are_consistent(whole: tuple[Snapshot, dict[str, StageCount]]) -> None:
    snapshot, _ = whole
    sources = {s.source_id: s for s in read_table(snapshot.table("sources"), SOURCES)}
    clips = {c.clip_id: c for c in read_table(snapshot.table("clips"), CLIPS)}
    bunny = next(s for s in sources.values() if s.uri.endswith("big_buck_bunny.mp4"))
    assert (bunny.num_frames, bunny.is_vfr) == (240, False)
    for kind, distinct in (("sft", 1), ("pretrain", 3)):
        samples = read_table(snapshot.manifest(kind), SAMPLES)
        assert samples
        for sample in samples:
            assert len({s.source_id for s in sample.scenes}) == distinct
            for scene in sample.scenes:
                clip = clips[scene.clip_id]
                assert scene.caption == clip.caption != ""
                assert clip.source_id in sources
    plain = pd.read_parquet(snapshot.table("embeddings"))  # nothing of ours needed to read it
    assert set(plain["clip_id"]) == set(clips)


def test_the_snapshot_is_finished_and_named(
    whole: tuple[Snapshot, dict[str, StageCount]], make: Callable[..., Refresh]
) -> None:
    snapshot, _ = whole
    dataset = snapshot.root.parent
    done = read_done(snapshot.root)
    assert done is not None
    assert (done["snapshot_id"], done["complete"]) == (snapshot.root.name, True)
    assert latest(dataset) == snapshot.root
    assert {p.name for p in dataset.iterdir()} == {"LATEST", snapshot.root.name}
    # another config is another snapshot; going back costs nothing and moves LATEST
    workspace = dataset.parents[1]
    other = make(workspace, manifests=ManifestsConfig(low=0.9))
    other.sources()
    assert other.published() is None
    moved, counts = run(other)
    assert moved.root != snapshot.root
    assert counts["shots"].reused == counts["shots"].input
    assert counts["embeddings"].reused == counts["embeddings"].input
    back = make(workspace)
    assert back.sources().reused == 11
    assert back.published() == snapshot
    assert back.publish() == snapshot
    assert latest(dataset) == snapshot.root


def test_input_order_and_a_second_run_change_nothing(
    whole: tuple[Snapshot, dict[str, StageCount]],
    make: Callable[..., Refresh],
    films: Path,
    tmp_path: Path,
) -> None:
    inputs = tuple(str(p) for p in sorted(films.rglob("*.mp4"), reverse=True))
    sources = SourcesConfig(inputs=inputs, captions_csv=str(films / "captions.csv"))
    snapshot, _ = run(make(tmp_path, sources=sources))
    assert tables(snapshot) == tables(whole[0])
    again, counts = run(make(tmp_path))
    assert again == snapshot
    for stage in ("sources", "shots", "embeddings"):
        assert counts[stage].reused == counts[stage].input
    assert tables(again) == tables(whole[0])


def test_killed_midway_and_run_again_gives_the_same_tables(
    whole: tuple[Snapshot, dict[str, StageCount]], make: Callable[..., Refresh], tmp_path: Path
) -> None:
    config = make(tmp_path).config
    config = config.model_copy(update={"engine": EngineConfig(num_cpus=1, object_store_mb=80)})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "config.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    finished = Workspace(tmp_path).cache("shots")
    deadline = time.monotonic() + 200
    while not list(finished.glob("[!.]*.json")):
        assert process.poll() is None, "ended before any shot was found"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(3)  # its workers die with it, maybe in the middle of a write
    snapshot, counts = run(make(tmp_path))
    assert 0 < counts["shots"].reused < counts["shots"].input
    assert tables(snapshot) == tables(whole[0])


def test_failed_records_are_counted_and_tried_again(
    whole: tuple[Snapshot, dict[str, StageCount]],
    make: Callable[..., Refresh],
    films: Path,
    tmp_path: Path,
) -> None:
    refresh = make(tmp_path)
    refresh.sources()
    refresh.shots()
    refresh.clips()
    refresh.filters()
    victim = films / "made_0.mp4"
    away = films / "made_0.away"
    victim.rename(away)
    try:
        count = refresh.embeddings()
        assert (count.failed, count.reasons) == (4, {"not_found": 4})
        strict = make(tmp_path, max_error_ratio=0.0)
        strict.snapshot_id = refresh.snapshot_id
        with pytest.raises(TooManyFailures, match="4 x not_found"):
            strict.embeddings()
    finally:
        away.rename(victim)
    refresh.dedup()
    refresh.windows()
    refresh.manifests()
    incomplete = refresh.publish()
    done = read_done(incomplete.root)
    assert done is not None
    assert not done["complete"]
    again = make(tmp_path)
    again.sources()
    assert again.published() is None
    snapshot, counts = run(again)
    assert counts["embeddings"].reused == counts["embeddings"].input - 4
    assert tables(snapshot) == tables(whole[0])
