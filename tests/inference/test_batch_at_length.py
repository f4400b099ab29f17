"""Long batches on Ray: processes are killed, and nothing is lost, half-written or made twice."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from curation.pipeline import start_ray, stop_ray
from inference.batch import run_batch
from inference.plan import plan_batch
from schemas.config import EngineConfig, TriptychConfig
from schemas.errors import ConfigError
from schemas.layout import Workspace
from schemas.rows import Prompt
from schemas.storage import latest, read_json
from schemas.tables import GENERATIONS, REJECTS, read_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Driver = subprocess.Popen[bytes]

ROWS = int(os.environ.get("TRIPTYCH_BATCH_ROWS", "24"))
"""The whole proof has 200; on two cores that takes minutes."""

BAD = [
    {"prompt_id": "bad-seed", "prompts": '["A."]', "seed": "-1"},
    {"prompt_id": "bad-frames", "prompts": '["A."]', "frames": "4"},
    {"prompt_id": "bad-steps", "prompts": '["A."]', "steps": "0"},
    {"prompt_id": "no-scene", "prompts": "[]"},
    {"prompt_id": "row-0", "prompts": '["Twice the same id."]'},
]

DRIVER = """
import logging, sys
from pathlib import Path
from inference.batch import run_batch
from schemas.config import TriptychConfig
from schemas.layout import Workspace

logging.basicConfig(level="INFO")
config = TriptychConfig.model_validate_json(Path("config.json").read_text())
run_batch(config, Path(sys.argv[1]), Workspace(Path(config.workspace)))
"""


def write_manifest(path: Path) -> None:
    columns = ("prompt_id", "prompts", "extend_prompts", "seed", "frames", "steps")
    rows: list[dict[str, str]] = []
    for number in range(ROWS - len(BAD)):
        scenes = [f"Scene {s} of story {number}." for s in range(1 + number % 2)]
        row = {"prompt_id": f"row-{number}", "prompts": json.dumps(scenes), "seed": str(number)}
        row |= {"frames": "1"} if number % 3 else {"frames": "5"}
        row |= {"extend_prompts": '["One more."]'} if number % 20 == 7 else {}
        rows.append(row)
    for place, bad in enumerate(BAD):
        rows.insert((1 + place) * len(rows) // len(BAD), bad)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def start(tmp_path: Path, tiny_base: Path, config_for) -> Iterator[Callable[..., Driver]]:
    """Starts a driver in a folder of its own; ``workspace`` there is a relative path."""
    started: list[Driver] = []

    def start(name: str, **generation) -> Driver:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        write_manifest(folder / "prompts.csv")
        config = config_for([], steps=1, guidance=1.0, **generation)
        relative = config.generation.model_copy(update={"prompts": "prompts.csv"})
        config = config.model_copy(update={"workspace": "workspace", "generation": relative})
        (folder / "config.json").write_text(config.model_dump_json())
        log = (folder / "log.txt").open("ab")
        command = [sys.executable, "-c", DRIVER, str(tiny_base)]
        started.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Sidecars, and what changes when one is written again."""
    found = (folder / "workspace" / "generations" / "videos").glob("[!.]*.json")
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def wait_for(count: int, folder: Path, process: Driver) -> None:
    wait_until(lambda: len(finished(folder)) >= count, folder, process)


def wait_until(done: Callable[[], bool], folder: Path, process: Driver) -> None:
    deadline = time.monotonic() + 900
    while not done():
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def actors_of(process: Driver) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("VideoMaker" in part for part in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(process: Driver, folder: Path) -> dict[str, tuple[int, int]]:
    """SIGKILL the driver; gives what is finished once its actors are gone too."""
    actors = actors_of(process)
    assert actors
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(actors, timeout=60)
    assert not alive, f"{alive} outlive their driver"
    return finished(folder)


def test_killed_again_and_again_the_table_is_that_of_an_uninterrupted_run(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    good = ROWS - len(BAD)

    # Two actors; the driver is killed, then an actor, then the driver again.
    process = start("killed", actors=2)
    wait_for(good // 4, killed, process)
    first = kill(process, killed)
    process = start("killed", actors=2)
    wait_for(len(first) + good // 8, killed, process)
    victim = actors_of(process)[0]
    victim.send_signal(signal.SIGKILL)
    wait_until(lambda: "actor_died" in (killed / "log.txt").read_text(), killed, process)
    wait_for(len(first) + good // 4, killed, process)
    second = kill(process, killed)
    assert first.items() <= second.items()
    assert len(second) < good, "everything was finished before the second kill"
    process = start("killed", actors=2)
    assert process.wait(timeout=900) == 0, (killed / "log.txt").read_text()[-3000:]

    # One actor, in its driver's process, undisturbed.
    process = start("whole", actors=1)
    assert process.wait(timeout=900) == 0, (whole / "log.txt").read_text()[-3000:]
    assert "ray=False" in (whole / "log.txt").read_text()

    last = finished(killed)
    assert len(last) == good
    assert second.items() <= last.items(), "a finished video was made again"
    batches = [latest(folder / "workspace" / "generations") for folder in (killed, whole)]
    counts = [read_json(batch / "counts.json")[0] for batch in batches]
    assert counts[0]["reused"] == len(second)
    for count in counts:
        assert (count["input"], count["kept"], count["rejected"]) == (ROWS, good, len(BAD))
        assert count["failed"] == 0
    for table in ("generations.parquet", "rejects.parquet"):
        assert (batches[0] / table).read_bytes() == (batches[1] / table).read_bytes()
    rows = read_table(batches[0] / "generations.parquet", GENERATIONS)
    assert len({row.video_sha256 for row in rows}) == good
    for row in rows:
        assert (killed / row.video_uri).read_bytes() == (whole / row.video_uri).read_bytes()
    rejects = read_table(batches[0] / "rejects.parquet", REJECTS)
    assert all(r.detail.startswith("line ") for r in rejects)
    assert {r.reason for r in rejects} == {
        "invalid_seed", "invalid_frames", "invalid_settings", "empty_prompts",
        "duplicate_prompt_id",
    }  # fmt: skip


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """Ray in this process, shared by the tests below; a batch leaves it running."""
    before = signal.getsignal(signal.SIGTERM)
    start_ray(EngineConfig(num_cpus=2))
    yield
    stop_ray()
    signal.signal(signal.SIGTERM, before)


def test_more_actors_than_there_is_room_for_are_refused(
    ray_here, tiny_base: Path, workspace: Workspace, config_for
):
    for changes in ({"actors": 3}, {"actors": 2, "threads": 2}):
        config = config_for([Prompt(f"p{i}", ["One."]) for i in range(3)], **changes)
        with pytest.raises(ConfigError, match="no room for the actors"):
            run_batch(config, tiny_base, workspace)


def test_a_row_that_kills_its_actors_fails_and_the_others_are_made(
    ray_here, tiny_base: Path, workspace: Workspace, config_for
):
    """The killer is real: a process that kills whatever actor makes that row's video."""
    prompts = [Prompt(f"p{i}", ["One."], seed=i) for i in range(6)]
    # long, with its frames as images: there to be seen for hundreds of milliseconds
    prompts[2] = Prompt("p2", ["One.", "Two."], seed=2, frames=[97, 97])
    config: TriptychConfig = config_for(
        prompts, steps=1, guidance=1.0, actors=2, retries=0, save_frames=True
    )
    plan = plan_batch(config, tiny_base, workspace)
    target = plan.jobs[2].files.video
    watcher = subprocess.Popen([sys.executable, "-c", KILLER, str(target), str(os.getpid())])
    try:
        folder, count = run_batch(config, tiny_base, workspace)
    finally:
        watcher.kill()
        watcher.wait()
    assert (count.kept, count.failed, count.reasons) == (5, 1, {"actor_died": 1})
    failed = [g for g in read_table(folder / "generations.parquet", GENERATIONS) if g.error]
    assert [g.prompt_id for g in failed] == ["p2"]
    # undisturbed, it is made like any other
    _, count = run_batch(config, tiny_base, workspace)
    assert (count.kept, count.reused) == (6, 5)


KILLER = """
import os, signal, sys, time
from pathlib import Path

video = Path(sys.argv[1])
while True:
    # a writer's temporary name is .<stem>.<process id>.tmp.mp4
    for path in video.parent.glob(f".{video.stem}.*.tmp.mp4"):
        pid = int(path.name.split(".")[-3])
        if pid != int(sys.argv[2]):
            path.unlink(missing_ok=True)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    time.sleep(0.001)
"""
