"""Shot detectors side by side: accuracy, and processor time per frame.

Usage: python benchmarks/shots.py [MEDIA_FOLDER] [--repeat 3] [--out build/bench/shots.json]

MEDIA_FOLDER (the project's samples unless given) holds videos and their ground truth,
``truth.json`` or ``cuts.json``: per file ``nframes``, ``cuts`` (first frame of each new shot),
``soft`` and ``ambiguous`` ([start, end] spans).

A boundary inside a soft transition, give or take three frames, counts as finding it and never as a
false cut; boundaries in ambiguous spans are ignored.

Peers run as their own command line at its defaults, less its start-up time; ``fast`` and the bare
decode run in this process. All times are processor seconds (user and system, every thread), taken
in turns file by file; figures are medians over the repetitions.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.fast_shots import Transition, find_transitions
from curation.video import open_video

PEERS = ("detect-adaptive", "detect-content", "detect-hist", "detect-hash")
TIMED_PEER = "detect-adaptive"
SOFT_TOLERANCE = 3  # frames, as in score.py

Truth = dict[str, dict[str, Any]]


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("media", type=Path, nargs="?", default=Path("assets/samples"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench/shots.json"))
    args = parser.parse_args()
    names = (args.media / name for name in ("truth.json", "cuts.json"))
    truth: Truth = json.loads(next(p for p in names if p.is_file()).read_text())

    transitions: dict[str, list[Transition]] = {}
    cuts: dict[str, dict[str, list[int]]] = {"fast": {}, **{peer: {} for peer in PEERS}}
    seconds: dict[str, dict[str, list[float]]] = {}

    def record(who: str, name: str, spent: float) -> None:
        seconds.setdefault(who, {}).setdefault(name, []).append(spent)

    startup = statistics.median(_child(["scenedetect", "version"]) for _ in range(5))
    for repetition in range(args.repeat):
        for name in truth:
            path = args.media / name
            record("decode, same skips", name, _spent(lambda path=path: _decode(path, skip=True)))
            record("decode, all", name, _spent(lambda path=path: _decode(path, skip=False)))
            started = time.process_time()
            transitions[name], _ = find_transitions(path)
            record("fast", name, time.process_time() - started)
            for peer in PEERS:
                if repetition and peer != TIMED_PEER:
                    continue
                found, spent = _scenedetect(path, peer)
                cuts[peer][name] = found
                record(peer, name, spent - startup)
    cuts["fast"] = {n: [t.middle_frame for t in found] for n, found in transitions.items()}

    frames = sum(entry["nframes"] for entry in truth.values())
    total = {
        who: sum(statistics.median(s) for s in by_file.values()) for who, by_file in seconds.items()
    }
    rows = [
        _row(who, found, truth, frames / total[who], total[who] / total["decode, same skips"])
        for who, found in cuts.items()
    ]
    recall, precision = soft_scores(transitions, truth)
    rows[0]["soft_precision"] = round(precision, 3)
    rows[0]["soft_recall_by_overlap"] = round(recall, 3)
    rows[0]["transition_frames_left_in_shots"] = leaked_frames(transitions, truth)
    _report(rows, total, seconds, frames, startup, args.out)


def score(found: dict[str, list[int]], truth: Truth, tolerance: int) -> dict[str, float]:
    """Precision, recall and F1 of hard cuts, and the share of soft transitions found."""
    right = false = missed = soft_right = soft_missed = 0
    for name, entry in truth.items():
        left = sorted(found[name])
        for cut in entry["cuts"]:
            hit = next((x for x in left if abs(x - cut) <= tolerance), None)
            right, missed = right + (hit is not None), missed + (hit is None)
            left = [x for x in left if x != hit]
        for start, end in entry["soft"]:
            inside = [x for x in left if start - SOFT_TOLERANCE <= x <= end + SOFT_TOLERANCE]
            soft_right, soft_missed = soft_right + bool(inside), soft_missed + (not inside)
            left = [x for x in left if x not in inside]
        ambiguous = entry["ambiguous"]
        false += sum(not any(s - 1 <= x <= e + 1 for s, e in ambiguous) for x in left)
    precision, recall = right / max(1, right + false), right / max(1, right + missed)
    return {
        "P": round(precision, 3),
        "R": round(recall, 3),
        "F1": round(2 * precision * recall / max(1e-9, precision + recall), 3),
        "soft_recall": round(soft_right / max(1, soft_right + soft_missed), 3),
    }


def soft_scores(found: dict[str, list[Transition]], truth: Truth) -> tuple[float, float]:
    """Recall and precision of dissolves and fades: overlap within three frames.

    Ambiguous ranges count neither way.
    """
    recalled = expected = right = claimed = 0
    for name, entry in truth.items():
        soft = [t for t in found[name] if t.kind != "cut"]
        spans = [(s - SOFT_TOLERANCE, e + SOFT_TOLERANCE) for s, e in entry["soft"]]
        expected += len(spans)
        recalled += sum(any(_meets(t, *span) for t in soft) for span in spans)
        for t in soft:
            hit = any(_meets(t, *span) for span in spans)
            if hit or not any(_meets(t, s - 1, e + 1) for s, e in entry["ambiguous"]):
                claimed += 1
                right += hit
    return recalled / max(1, expected), right / max(1, claimed)


def leaked_frames(found: dict[str, list[Transition]], truth: Truth, trim: int = 2) -> int:
    """Frames of found dissolves and fades that shots still hold after trimming ``trim`` frames."""
    leaked = 0
    for name, entry in truth.items():
        for s, e in entry["soft"]:
            near = [t for t in found[name] if _meets(t, s - SOFT_TOLERANCE, e + SOFT_TOLERANCE)]
            covered = {f for t in near for f in range(t.start_frame - trim, t.end_frame + trim)}
            leaked += sum(f not in covered for f in range(s, e + 1)) if near else 0
    return leaked


def _meets(t: Transition, start: int, end: int) -> bool:
    return t.start_frame <= end and t.end_frame >= start


def _row(
    who: str,
    found: dict[str, list[int]],
    truth: Truth,
    fps: float,
    ratio: float,
) -> dict[str, Any]:
    exact, near = (score(found, truth, tolerance) for tolerance in (0, 1))
    return {
        "case": who,
        "f1_tolerance_0": exact["F1"],
        "precision": near["P"],
        "recall": near["R"],
        "f1": near["F1"],
        "soft_recall": near["soft_recall"],
        "fps_per_core": round(fps),
        "times_decode": round(ratio, 2),
    }


def _report(
    rows: list[dict[str, Any]],
    total: dict[str, float],
    seconds: dict[str, dict[str, list[float]]],
    frames: int,
    startup: float,
    out: Path,
) -> None:
    fast, adaptive = rows[0], next(row for row in rows if row["case"] == TIMED_PEER)
    speed = total[TIMED_PEER] / total["fast"]
    targets = [
        _target("hard-cut F1, tolerance 1", fast["f1"], 0.92),
        _target("soft transitions found", fast["soft_recall"], 0.75),
        _target("soft precision", fast["soft_precision"], 0.8),
        _target("speed over scenedetect detect-adaptive", speed, 3.0),
        _target("time over decoding with the same skips", fast["times_decode"], 1.3, at_most=True),
    ]
    print(f"{frames} frames; scenedetect start-up {startup:.2f} s left out of its times")
    head = list(adaptive)
    print(" ".join(f"{name[:16]:>16}" for name in head))
    for row in rows:
        print(" ".join(f"{row[name]!s:>16}" for name in head))
    for who in ("decode, same skips", "decode, all"):
        print(f"{who}: {frames / total[who]:.0f} frames per second per core")
    print("per file, fast over decode with the same skips:")
    for name, spent in seconds["fast"].items():
        base = statistics.median(seconds["decode, same skips"][name])
        peer = statistics.median(seconds[TIMED_PEER][name])
        mine = statistics.median(spent)
        print(
            f"  {name:32} {mine / base:5.2f}   over {TIMED_PEER}: {peer / mine:5.1f} times faster"
        )
    print(
        f"soft recall by overlap {fast['soft_recall_by_overlap']}, "
        f"transition frames left in shots {fast['transition_frames_left_in_shots']}"
    )
    for target in targets:
        print(f"{'met   ' if target['met'] else 'MISSED'} {target['name']}: {target['value']}")
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine()}
    report = {"machine": machine, "rows": rows, "targets": targets}
    out.write_text(json.dumps(report, indent=2) + "\n")


def _target(name: str, value: float, target: float, *, at_most: bool = False) -> dict[str, Any]:
    met = value <= target if at_most else value >= target
    return {"name": name, "value": round(value, 3), "target": target, "met": met}


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
