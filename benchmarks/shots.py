"""Shot detectors side by side: accuracy, and processor time per frame.

Usage: python -m benchmarks.shots [MEDIA_FOLDER ...] [--repeat 3] [--out build/bench/shots.json]

A MEDIA_FOLDER (the project's samples unless given) holds videos and their ground truth,
``truth.json`` or ``cuts.json``: per file ``nframes``, ``cuts`` (first frame of each new shot),
``soft`` and ``ambiguous`` ([start, end] spans). Each folder gets a group of rows, and so do films
spliced from the first one.

A boundary inside a soft transition, give or take three frames, counts as finding it and never as a
false cut; boundaries in ambiguous spans are ignored.

Peers run as their own command line at its defaults, less its start-up time; ``fast`` and the bare
decode run in this process. All times are processor seconds (user and system, every thread), taken
in turns file by file; figures are medians over the repetitions.
"""

from __future__ import annotations

import argparse
import csv
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.shot_scores import Truth, foreign_frames, score, soft_scores
from benchmarks.spliced import make_films, read_truth
from benchmarks.tables import target, write_report
from curation.clips import make_clips
from curation.fast_shots import Transition, find_transitions
from curation.shots import detect_shots
from curation.sources import read_source
from curation.video import open_video
from schemas.config.curation import ClipsConfig, ShotsConfig
from schemas.rows import Source

PEERS = ("detect-adaptive", "detect-content", "detect-hist", "detect-hash")
TIMED_PEER = "detect-adaptive"

PEER_VERSION = version("scenedetect-headless")

ABOUT = f"""
Ours is `fast`, which also measures sharpness, black bars, combs, motion and more; peers are the
detectors of PySceneDetect {PEER_VERSION}, run as its command line at its defaults, their start-up
left out. Speed is frames per second of processor time. F1, precision and recall are of hard cuts,
f1 at a tolerance of one frame; soft recall is the share of dissolves, fades and wipes found. Clips
with foreign frames hold a frame of a transition or of two shots; peers' shots are trimmed as ours
are. `times decode` is the time over bare decoding with the same skips. The constants of `fast` were
chosen on the verified films, so the spliced ones tell more: pieces of verified shots, joined by
cuts, dissolves, fades and wipes of known place (`benchmarks/spliced.py`).
"""

SAMPLES = Path("assets/samples")
SEED = 200
"""Of the spliced films. Constants were set looking at seeds 0, 1 and 100; take another one then."""


@dataclass
class Measured:
    """What was found and spent in one folder."""

    truth: Truth
    transitions: dict[str, list[Transition]] = field(default_factory=dict)
    cuts: dict[str, dict[str, list[int]]] = field(
        default_factory=lambda: {"fast": {}, **{peer: {} for peer in PEERS}}
    )
    clips: dict[str, dict[str, list[tuple[int, int]]]] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Of all files."""
        return sum(entry["nframes"] for entry in self.truth.values())

    def total(self, who: str) -> float:
        """Seconds over all files, the median repetition of each."""
        return sum(statistics.median(spent) for spent in self.seconds[who].values())

    def record(self, who: str, name: str, spent: float) -> None:
        """Note one repetition."""
        self.seconds.setdefault(who, {}).setdefault(name, []).append(spent)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("media", type=Path, nargs="*", default=[SAMPLES])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--spliced", type=int, default=4, help="films to splice; 0: none")
    parser.add_argument("--out", type=Path, default=Path("build/bench/shots.json"))
    args = parser.parse_args()
    startup = statistics.median(_child(["scenedetect", "version"]) for _ in range(5))
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    folders = {
        folder: "the project's samples" if folder == SAMPLES else "other verified films"
        for folder in args.media
    }
    if args.spliced:
        spliced = args.out.parent / "spliced"
        make_films(args.media[0], spliced, SEED, args.spliced)
        folders[spliced] = f"films spliced from them, seed {SEED}"
    for folder, kind in folders.items():
        measured = measure(folder, args.repeat, startup)
        group = f"{kind} ({len(measured.truth)} films, {measured.frames:,} frames)"
        found = _rows(measured)
        rows += [{"group": group, **row} for row in found]
        targets += _targets(measured, found, kind)
        _print_files(measured)
    write_report(args.out, "Shots", ABOUT, rows, targets)


def measure(media: Path, repeat: int, startup: float) -> Measured:
    """Run every detector and the bare decode, in turns, file by file."""
    measured = Measured(read_truth(media))
    for repetition in range(repeat):
        for name in measured.truth:
            path = media / name
            for who, skip in (("decode, same skips", True), ("decode, all", False)):
                spent = _spent(lambda path=path, skip=skip: _decode(path, skip=skip))
                measured.record(who, name, spent)
            started = time.process_time()
            found, _ = find_transitions(path)
            measured.record("fast", name, time.process_time() - started)
            measured.transitions[name] = [t for t in found if t.kind != "doubt"]
            for peer in PEERS:
                if repetition and peer != TIMED_PEER:
                    continue
                measured.cuts[peer][name], spent = _scenedetect(path, peer)
                measured.record(peer, name, spent - startup)
    found = measured.transitions.items()
    measured.cuts["fast"] = {name: [t.middle_frame for t in of] for name, of in found}
    for who, cuts in measured.cuts.items():
        measured.clips[who] = {
            name: _clips(media / name)
            if who == "fast"
            else _clips_between(cuts[name], entry["nframes"])
            for name, entry in measured.truth.items()
        }
    return measured


def _clips(path: Path) -> list[tuple[int, int]]:
    """Clips of our whole curation at its defaults, (first frame, end)."""
    source = read_source(path, path.name)
    assert isinstance(source, Source), f"{path} is rejected"
    found = detect_shots(path, source, ShotsConfig())
    clips, _ = make_clips(
        source, found.shots, found.frame_pts, (), ClipsConfig(), frames=17, max_stride=1
    )
    return [(clip.start_frame, clip.end_frame) for clip in clips]


def _clips_between(cuts: list[int], num_frames: int) -> list[tuple[int, int]]:
    """What a peer's cuts leave, trimmed and of a least length as ours are."""
    cfg = ClipsConfig()
    spans = pairwise([-cfg.trim_frames, *sorted(cuts), num_frames + cfg.trim_frames])
    trimmed = [(start + cfg.trim_frames, end - cfg.trim_frames) for start, end in spans]
    return [(start, end) for start, end in trimmed if end - start >= cfg.min_frames]


def _rows(measured: Measured) -> list[dict[str, Any]]:
    """One per detector; ``ours`` is the speed of ``fast``, ``peer`` that of the other one."""
    bare = measured.total("decode, same skips")
    ours = measured.frames / measured.total("fast")
    rows: list[dict[str, Any]] = []
    for who, cuts in measured.cuts.items():
        exact, near = (score(cuts, measured.truth, tolerance) for tolerance in (0, 1))
        spent = measured.total(who)
        peer = None if who == "fast" else measured.frames / spent
        clips = [(name, *span) for name, spans in measured.clips[who].items() for span in spans]
        rows.append(
            {
                "case": who,
                "f1_tolerance_0": exact["F1"],
                "f1": near["F1"],
                "precision": near["P"],
                "recall": near["R"],
                "soft_recall": near["soft_recall"],
                "clips": len(clips),
                "clips_with_foreign_frames": sum(
                    bool(foreign_frames(start, end, measured.truth[name]))
                    for name, start, end in clips
                ),
                "frames_in_clips": round(sum(e - s for _, s, e in clips) / measured.frames, 3),
                "times_decode": round(spent / bare, 2),
                "ours": round(ours),
                "peer": peer and round(peer),
                "ratio": peer and round(ours / peer, 2),
                "unit": "frames/s per core",
            }
        )
    recall, precision = soft_scores(measured.transitions, measured.truth)
    rows[0]["soft_precision"] = round(precision, 3)
    rows[0]["soft_recall_by_overlap"] = round(recall, 3)
    return rows


def _targets(measured: Measured, rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    fast = rows[0]
    times = measured.total("fast") / measured.total("decode, same skips")
    speed = measured.total(TIMED_PEER) / measured.total("fast")
    return [
        target(f"hard-cut F1, tolerance 1: {kind}", fast["f1"], 0.92),
        target(f"soft transitions found: {kind}", fast["soft_recall"], 0.75),
        target(f"soft precision: {kind}", fast["soft_precision"], 0.8),
        target(
            f"clips with foreign frames: {kind}",
            fast["clips_with_foreign_frames"],
            0,
            at_most=True,
        ),
        target(f"speed over scenedetect {TIMED_PEER}: {kind}", speed, 3.0),
        target(f"time over decoding with the same skips: {kind}", times, 1.3, at_most=True),
    ]


def _print_files(measured: Measured) -> None:
    for who in ("decode, same skips", "decode, all"):
        print(f"{who}: {measured.frames / measured.total(who):.0f} frames per second per core")
    print("per file, fast over decode with the same skips:")
    for name, spent in measured.seconds["fast"].items():
        base = statistics.median(measured.seconds["decode, same skips"][name])
        peer = statistics.median(measured.seconds[TIMED_PEER][name])
        mine = statistics.median(spent)
        print(
            f"  {name:32} {mine / base:5.2f}   over {TIMED_PEER}: {peer / mine:5.1f} times faster"
        )


def _decode(path: Path, *, skip: bool) -> None:
    with open_video(path) as (container, stream):
        if skip:
            stream.codec_context.skip_frame = "NONREF"
            stream.codec_context.options = {"skip_loop_filter": "all"}
        for _ in container.decode(stream):
            pass


def _spent(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _scenedetect(path: Path, detector: str) -> tuple[list[int], float]:
    """First frames of new scenes by PySceneDetect's command line, and its processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        listing = ["list-scenes", "-q", "-s", "-f", "scenes.csv"]
        spent = _child(["scenedetect", "-q", "-i", str(path), "-o", folder, detector, *listing])
        with (Path(folder) / "scenes.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    return [int(row["Start Frame"]) - 1 for row in rows][1:], spent


def _child(command: list[str]) -> float:
    """Run a program of this environment; processor seconds it used."""
    program = shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([program, *command[1:]], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
