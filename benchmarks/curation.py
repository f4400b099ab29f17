"""The curation run at length: two workers beside one, its memory, and a run that was killed.

Usage: python -m benchmarks.curation [--files 500] [--pair-files 240] [--repeat 3]
    [--out build/bench/curation.json]

Films are the project's mp4 samples over and over, each copy with an empty box of its own at the end
(so it is another file; the check for equal packets is switched off). Every run is a program of its
own in a workspace of its own, and Ray is started before its clock.

Workers: the same ``--pair-files`` films with one and with two workers, in turns with the command
line of PySceneDetect, which ``xargs -P`` runs once per film, as many side by side. The start of
Ray's worker pools is measured in turns too, as a refresh of four films of a second.

Memory: one run over ``--files`` films with two workers; twice a second the resident memory of the
driver, Ray, its workers and the decoding children is added up. Growth is that of a straight line
through the samples of one stage after its first fifth, for stages differ in what they load.

Killed: the same films once more, SIGKILL when half of them have their shots, and run again; counts
and tables must equal those of the run before.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.memory import Sample, line, sample
from benchmarks.tables import target, write_report
from curation.mp4 import write_mp4
from curation.pipeline import start_ray, stop_ray
from curation.refresh import Refresh
from curation.video import read_frames
from schemas.config.curation import CurationConfig, DedupConfig, ManifestsConfig, SourcesConfig
from schemas.config.files import dump_yaml, load_config
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.layout import Workspace
from schemas.storage import read_json, write_json

SAMPLES = [
    Path("assets/samples") / name
    for name in ("big_buck_bunny.mp4", "chaplin.mp4", "sintel_trailer.mp4")
]
EVERY_S = 0.5

PEER_VERSION = version("scenedetect-headless")

ABOUT = f"""
Three sample films (8 to 30 s) over and over, each copy another file. A refresh goes from files to
manifests; the peer is PySceneDetect {PEER_VERSION}'s `detect-adaptive list-scenes`, which finds
cuts only, once per film by `xargs -P`. Ray's start is not counted; `pools` is what starting its
workers costs in each refresh, and is taken off for the ratio of two workers to one. Memory is
resident memory added up over the driver, Ray, its workers and the decoding children.
"""


def main() -> None:
    """Measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=500, help="of the long run")
    parser.add_argument("--pair-files", type=int, default=240, help="of one and two workers")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench/curation.json"))
    parser.add_argument("--refresh", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.refresh:
        refresh(*args.refresh)
        return
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
        scratch = Path(folder)
        rows, targets = compare_workers(scratch, args.pair_files, args.repeat)
        for part in (measure_memory, measure_kill):
            more_rows, more_targets = part(scratch, args.files)
            rows += more_rows
            targets += more_targets
    write_report(args.out, "Curation at length", ABOUT, rows, targets)


def refresh(config: Path, result: Path) -> None:
    """One refresh, as a program of its own: seconds, counts, and when which stage ran."""
    work = Refresh(load_config(config))
    start_ray(work.config.engine)
    counts, stages = [], {}
    started = time.monotonic()
    for stage in (
        work.sources, work.shots, work.clips, work.filters, work.embeddings, work.dedup,
        work.windows, work.manifests,
    ):  # fmt: skip
        began = time.time()
        made = stage()
        stages[stage.__name__] = (began, time.time())
        counts += made if isinstance(made, tuple) else (made,)
    snapshot = work.publish()
    spent = time.monotonic() - started
    stop_ray()
    ends = [(c.stage, c.input, c.kept, c.rejected, c.failed, c.reasons) for c in counts]
    found = {"seconds": spent, "stages": stages, "ends": ends, "snapshot": snapshot.root}
    write_json(result, found)


Part = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def compare_workers(scratch: Path, count: int, repeat: int) -> Part:
    """Rows of one and two workers, beside the peer with as many processes."""
    films, starters = copies(scratch / f"{count}_films", count), starter_films(scratch / "starters")
    spent: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeat):
        for workers in (1, 2):
            works: dict[str, Callable[[], float]] = {
                "pools": lambda n=workers: finished(scratch, starters, n)["seconds"],
                "ours": lambda n=workers: finished(scratch, films, n)["seconds"],
                "peer": lambda n=workers: scenedetect(films, n),
            }
            for who, work in works.items():
                spent.setdefault((who, workers), []).append(seconds := work())
                print(f"{who}, {workers} side by side: {seconds:.1f} s", flush=True)
    median = {key: statistics.median(values) for key, values in spent.items()}
    rows = [
        {
            "group": f"Workers ({count} films)",
            "case": f"{workers} {'worker' if workers == 1 else 'workers'}",
            "ours": round(median["ours", workers], 1),
            "peer": round(median["peer", workers], 1),
            "ratio": round(median["peer", workers] / median["ours", workers], 2),
            "unit": "s",
            "pools": round(median["pools", workers], 1),
            "repetitions": repeat,
        }
        for workers in (1, 2)
    ]
    one, two = (median["ours", n] - median["pools", n] for n in (1, 2))
    return rows, [target("speed of two workers over one, pools apart", one / two, 1.7)]


def measure_memory(scratch: Path, count: int) -> Part:
    """Rows of the stages of a long run; a target for the longest of them."""
    films = copies(scratch / f"{count}_films", count)
    process, result = started(scratch / "long", films, 2)
    samples: list[Sample] = []
    while process.poll() is None:
        samples.append(sample(process.pid))
        time.sleep(EVERY_S)
    assert process.returncode == 0, "the long run failed"
    stages: dict[str, tuple[float, float]] = read_json(result)["stages"]
    longest = max(stages, key=lambda name: stages[name][1] - stages[name][0])
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for name, (start, end) in stages.items():
        within = [s for s in samples if start + 0.2 * (end - start) <= s.at < end]
        if len(within) < 20:  # too short for a slope
            continue
        first, last = line([s.at for s in within], [s.total for s in within])
        growth = 100 * (last / first - 1)
        rows.append(
            {
                "group": f"Memory ({count} films, two workers)",
                "case": f"stage {name}",
                "ours": round(last),
                "unit": "MB",
                "seconds": round(end - start, 1),
                "at_a_fifth": round(first),
                "growth_percent": round(growth, 2),
                "peak": round(max(s.total for s in within)),
                **{
                    f"{who}_median": round(statistics.median(getattr(s, who) for s in within))
                    for who in ("driver", "ray", "workers", "children", "object_store")
                },
            }
        )
        if name == longest:
            what = f"memory growth in per cent, stage {name}, {count} films"
            targets.append(target(what, growth, 5, at_most=True))
    return rows, targets


def measure_kill(scratch: Path, count: int) -> Part:
    """A row of the run that was killed and run again, compared with the undisturbed one."""
    films = copies(scratch / f"{count}_films", count)
    process, _ = started(scratch / "killed", films, 2)
    done = Workspace(scratch / "killed").cache("shots")
    while len(list(done.glob("[!.]*.json"))) < count / 2:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(family, timeout=60)
    print("left a minute after the kill:", [(p.name(), p.status()) for p in left if p.is_running()])
    reused = len(list(done.glob("[!.]*.json")))
    process, result = started(scratch / "killed", films, 2)
    assert process.wait() == 0, "the second run failed"
    again, whole = read_json(result), read_json(scratch / "long.json")
    differing = sum(a != b for a, b in zip(again["ends"], whole["ends"], strict=True))
    tables = [
        {p.name: p.read_bytes() for p in Path(run["snapshot"]).rglob("*.parquet")}
        for run in (again, whole)
    ]
    differing += sum(tables[0].get(name) != data for name, data in tables[1].items())
    row = {
        "group": f"Killed once ({count} films, two workers)",
        "case": "second run",
        "ours": round(again["seconds"], 1),
        "unit": "s",
        "undisturbed": round(whole["seconds"], 1),
        "films_with_shots_at_the_kill": reused,
        "processes_left_after_a_minute": len(left),
        "counts_and_tables_that_differ": differing,
    }
    what = "counts and tables that differ after a kill"
    return [row], [target(what, differing, 0, at_most=True)]


def copies(folder: Path, count: int) -> Path:
    """A folder of that many films with captions, made when it is not there yet."""
    if folder.is_dir():
        return folder
    folder.mkdir()
    for i in range(count):
        source = SAMPLES[i % len(SAMPLES)]
        path = Path(shutil.copy(source, folder / f"{i:05}_{source.name}"))
        with path.open("ab") as file:  # a box of 16 bytes that means nothing (ISO 14496-12)
            file.write((16).to_bytes(4, "big") + b"free" + i.to_bytes(8, "big"))
    return with_captions(folder)


def starter_films(folder: Path) -> Path:
    """Four films of a second: as good as no work, but every stage starts its workers."""
    folder.mkdir()
    for i in range(4):
        numbers = range(50 + 40 * (i // 2), 74 + 40 * (i // 2))
        frames = read_frames(SAMPLES[i % 2], numbers, height_px=72, width_px=96)
        write_mp4(folder / f"{i}.mp4", frames, 24)
    return with_captions(folder)


def with_captions(folder: Path) -> Path:
    """Give every film a caption, which the pre-training manifest asks for."""
    rows = ["videoID,url,timestamp,caption,matching_score"]
    for path in sorted(folder.glob("*.mp4")):
        spans = "\"[['0:00:00.000', '0:01:00.000']]\",['A film.'],[1]"
        rows.append(f"{path.stem},{path.name},{spans}")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


def started(workspace: Path, films: Path, workers: int) -> tuple[subprocess.Popen[bytes], Path]:
    """Start one refresh; gives its process, and where its result will be."""
    workspace.mkdir(exist_ok=True)
    config = TriptychConfig(
        workspace=str(workspace),
        curation=CurationConfig(
            sources=SourcesConfig(inputs=(str(films),), captions_csv=str(films / "captions.csv")),
            dedup=DedupConfig(exact=False),
            manifests=ManifestsConfig(low=-1.0),
        ),
        engine=EngineConfig(num_cpus=workers),
    )
    path, result = workspace.with_suffix(".yaml"), workspace.with_suffix(".json")
    path.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "benchmarks.curation", "--refresh", path, result]
    return subprocess.Popen(command), result


def finished(scratch: Path, films: Path, workers: int) -> dict[str, Any]:
    """The result of one refresh in a workspace that is thrown away."""
    process, result = started(scratch / "once", films, workers)
    assert process.wait() == 0, f"the refresh of {films.name} failed"
    shutil.rmtree(scratch / "once")
    return read_json(result)


def scenedetect(films: Path, processes: int) -> float:
    """Wall-clock seconds of PySceneDetect over a folder, file by file."""
    program = Path(sys.executable).parent / "scenedetect"
    with tempfile.TemporaryDirectory() as folder:
        command = ["xargs", "-0", "-P", str(processes), "-I{}", program, "-q", "-i", "{}"]
        command += ["-o", folder, "detect-adaptive", "list-scenes", "-q"]
        names = "\0".join(str(path) for path in sorted(films.glob("*.mp4")))
        began = time.monotonic()
        subprocess.run(command, input=names.encode(), check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began


if __name__ == "__main__":
    main()
