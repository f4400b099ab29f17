"""The guard of a refresh on real films: a snapshot that differs too much waits for a decision."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from curation.mp4 import write_mp4
from curation.pipeline import stop_ray
from curation.refresh import Refresh
from curation.snapshot_diff import Reason, diff_snapshots, previous_of
from schemas.config.curation import CurationConfig, DriftConfig, ManifestsConfig, SourcesConfig
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.errors import DriftTooLarge
from schemas.layout import Snapshot
from schemas.storage import latest, read_done

pytestmark = pytest.mark.slow


def counted(reasons: Iterable[Reason]) -> dict[tuple[str, str], int]:
    return {(r.stage, r.reason): r.count for r in reasons}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Refresh]]:
    """Refreshes of a folder of real files in one workspace."""
    root = tmp_path_factory.mktemp("diff")
    films = root / "films"
    films.mkdir()
    for number in range(4):
        write_film(films / f"{number}.mp4", number)
    rows = ["videoID,url,timestamp,caption,matching_score"]
    spans = "\"[['0:00:00.000', '0:01:00.000']]\",['A red ball.'],[1]"
    rows += [f"{n},{n}.mp4,{spans}" for n in range(6)]
    (films / "captions.csv").write_text("\n".join(rows))

    def make(**changes: object) -> Refresh:
        curation = CurationConfig(
            sources=SourcesConfig(inputs=(str(films),), captions_csv=str(films / "captions.csv")),
            manifests=ManifestsConfig(low=-1.0),
        ).model_copy(update=changes)
        engine = EngineConfig(num_cpus=2, object_store_mb=80)
        return Refresh(
            TriptychConfig(workspace=str(root / "workspace"), curation=curation, engine=engine)
        )

    yield make
    stop_ray()


def write_film(path: Path, seed: int) -> None:
    """Three shots of noise patterns that drift to the side."""
    patterns = np.random.default_rng(seed).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    wide = [np.kron(pattern, np.ones((8, 8, 1), np.uint8)) for pattern in patterns]
    write_mp4(path, np.stack([np.roll(w, i, 1) for w in wide for i in range(30)]), 12)


def run(refresh: Refresh) -> Snapshot:
    refresh.sources()
    if refresh.published() is None:
        for stage in ("shots", "clips", "filters", "embeddings", "dedup", "windows", "manifests"):
            getattr(refresh, stage)()
    return refresh.publish()


def test_real_refreshes_are_compared_guarded_and_published(make: Callable[..., Refresh]) -> None:
    first = run(make())
    dataset = first.root.parent
    assert (read_done(first.root) or {})["previous"] is None
    assert previous_of(first) is None
    tables = {p: p.read_bytes() for p in first.root.rglob("*.parquet")}

    films = Path(make().config.curation.sources.inputs[0])
    (films / "0.mp4").rename(films / "5.mp4")
    write_film(films / "1.mp4", seed=10)
    (films / "2.mp4").write_bytes(b"")
    write_film(films / "4.mp4", seed=4)

    strict = make(drift=DriftConfig(max_dropped_ratio=0.25))
    with pytest.raises(DriftTooLarge, match=r"6 of 12 clips are gone \(0\.500\)"):
        run(strict)
    assert latest(dataset) == first.root
    refused = strict.published()
    assert refused is not None
    assert "previous" not in (read_done(refused.root) or {})
    made = {p: p.read_bytes() for p in refused.root.rglob("*.parquet")}

    accepting = make(drift=DriftConfig(max_dropped_ratio=0.5))
    accepting.sources()
    assert accepting.published() == refused  # nothing is left to compute
    assert accepting.publish() == refused
    assert latest(dataset) == refused.root
    assert previous_of(refused) == first
    assert made == {p: p.read_bytes() for p in refused.root.rglob("*.parquet")}
    assert tables == {p: p.read_bytes() for p in first.root.rglob("*.parquet")}

    diff = diff_snapshots(first, refused)
    assert counted(diff.sources.why_dropped) == {
        ("sources", "content_changed"): 1, ("sources", "empty_file"): 1,
    }  # fmt: skip
    assert counted(diff.sources.why_added) == {
        ("sources", "content_changed"): 1, ("sources", "new_file"): 1,
    }  # fmt: skip
    assert counted(diff.sources.altered) == {("sources", "renamed"): 1}
    assert counted(diff.clips.why_dropped) == {
        ("sources", "content_changed"): 3, ("sources", "empty_file"): 3,
    }  # fmt: skip
    assert (diff.sft.old, diff.sft.kept, diff.sft.dropped, diff.sft.added) == (4, 2, 2, 2)
    assert diff.settings == []

    # The same again changes nothing, not even what it remembers as the one before.
    again = make()
    done = read_done(refused.root)
    assert run(again) == refused
    assert read_done(refused.root) == done
    shutil.rmtree(first.root)
    assert previous_of(refused) is None
