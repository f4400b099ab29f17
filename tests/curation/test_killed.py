"""Processes of a running refresh are killed; nothing may be lost, rejected for it or half-written.

A victim is known to be in the middle of a film: decoding children are halted, and only one that has
a film open then is killed, or its Ray worker or its Ray node.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from curation.pipeline import stop_ray
from curation.refresh import Refresh
from schemas.config.curation import CurationConfig, DedupConfig, ManifestsConfig, SourcesConfig
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.counts import StageCount
from schemas.errors import ExternalToolError
from schemas.layout import Snapshot

pytestmark = pytest.mark.slow

_SLICE_S = 0.005
"""A film takes tens of these."""
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 1024 * 1024}

Make = Callable[[Path], Refresh]
Done = tuple[Snapshot, dict[str, StageCount]]


@pytest.fixture(scope="module")
def films(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample films, each twice with other bytes at the end, so that there is enough to do."""
    folder = tmp_path_factory.mktemp("films")
    rows = ["videoID,url,timestamp,caption,matching_score"]
    for name in ("big_buck_bunny.mp4", "chaplin.mp4", "sintel_trailer.mp4"):
        for copy in range(2):
            path = Path(shutil.copy(samples / name, folder / f"{copy}_{name}"))
            with path.open("ab") as file:  # an empty box of ISO 14496-12
                file.write((8 + copy).to_bytes(4, "big") + b"free" + bytes(copy))
            spans = "\"[['0:00:00.000', '0:01:00.000']]\",['A red ball.'],[1]"
            rows.append(f"{path.stem},{path.name},{spans}")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Ray with one node of one worker, on which this process is the driver."""
    before = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    yield cluster
    stop_ray()
    cluster.shutdown()
    signal.signal(signal.SIGTERM, before)  # Ray's own would end the tests that come after


@pytest.fixture(scope="module")
def make(films: Path, cluster: Cluster) -> Make:
    def make(workspace: Path) -> Refresh:
        curation = CurationConfig(
            sources=SourcesConfig(inputs=(str(films),), captions_csv=str(films / "captions.csv")),
            dedup=DedupConfig(exact=False),
            manifests=ManifestsConfig(low=-1.0),
        )
        engine = EngineConfig(ray_address=cluster.address)
        return Refresh(TriptychConfig(workspace=str(workspace), curation=curation, engine=engine))

    return make


@pytest.fixture(scope="module")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """An uninterrupted run in a workspace of its own."""
    return run(make(tmp_path_factory.mktemp("whole")))


def run(refresh: Refresh) -> Done:
    counts = [refresh.sources(), refresh.shots(), refresh.clips(), refresh.filters()]
    counts += [refresh.embeddings(), refresh.dedup(), refresh.windows(), *refresh.manifests()]
    return refresh.publish(), {c.stage: c for c in counts}


def check_same(done: Done, whole: Done) -> None:
    """The same end for every record, and the same bytes in every table."""
    ends = [
        {c.stage: (c.input, c.kept, c.rejected, c.failed, c.reasons) for c in counts.values()}
        for _, counts in (done, whole)
    ]
    assert ends[0] == ends[1]
    tables = [
        {p.relative_to(s.root): p.read_bytes() for p in s.root.rglob("*.parquet")}
        for s, _ in (done, whole)
    ]
    assert len(tables[1]) == 9
    assert tables[0] == tables[1]


def decoders(root: int) -> list[psutil.Process]:
    """The decoding children below process ``root``, halted."""
    found: list[psutil.Process] = []
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "curation.isolation" in process.cmdline():
                process.suspend()
                found.append(process)
    return found


@contextmanager
def killing(
    victim: Callable[[psutil.Process], int],
    films: Path,
    *,
    below: int | None = None,
    name: str = "*.mp4",
    times: int = 1,
) -> Generator[list[int]]:
    """Kill, while other work goes on, ``victim(child)`` of a child with such a film open.

    Children are let go on only ``_SLICE_S`` at a time and halted while they are looked at, so that
    on a busy machine, too, none gets through a film unseen.

    Gives the list of the process ids that were killed.
    """
    killed: list[int] = []
    over = threading.Event()

    def has_film(child: psutil.Process) -> bool:
        opened = [Path(file.path) for file in child.open_files()]
        return any(path.parent == films and path.match(name) for path in opened)

    def look() -> None:
        children: list[psutil.Process] = []
        while len(killed) < times and not over.wait(_SLICE_S):
            for child in children:  # before the search for new ones, which takes a while
                with suppress(psutil.NoSuchProcess):
                    child.suspend()
            children = decoders(below or os.getpid())
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    if len(killed) < times and has_film(child):
                        killed.append(victim(child))
                        os.kill(killed[-1], signal.SIGKILL)
                    child.resume()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_killed_processes_cost_nothing(
    whole: Done, make: Make, films: Path, tmp_path: Path
) -> None:
    refresh = make(tmp_path)
    refresh.sources()
    victims = [psutil.Process.ppid, lambda child: child.pid]  # a child, then a Ray worker
    with killing(lambda child: victims.pop()(child), films, times=2) as killed:
        refresh.shots()
    assert len(killed) == 2
    done = run(make(tmp_path))
    assert done[1]["shots"].reused == 6
    check_same(done, whole)


def test_a_film_that_always_takes_its_worker_along_ends_the_run_and_not_the_others_work(
    whole: Done, make: Make, films: Path, tmp_path: Path
) -> None:
    refresh = make(tmp_path)
    refresh.sources()
    with (
        killing(lambda child: child.ppid(), films, name="0_sintel*", times=100) as killed,
        pytest.raises(ExternalToolError, match="what is finished is kept"),
    ):
        refresh.shots()
    assert 1 < len(killed) < 100
    done = run(make(tmp_path))
    assert 0 < done[1]["shots"].reused < 6
    check_same(done, whole)


def test_a_lost_node_costs_nothing(
    whole: Done, make: Make, films: Path, tmp_path: Path, cluster: Cluster
) -> None:
    node = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    raylet = node.all_processes["raylet"][0].process.pid
    refresh = make(tmp_path)
    refresh.sources()
    with killing(lambda _: raylet, films, below=raylet) as killed:
        refresh.shots()
    assert killed == [raylet]
    done = run(make(tmp_path))
    assert done[1]["shots"].reused == 6
    check_same(done, whole)
