"""ToonWorld: how fast it is drawn, and how well our shot detector finds its transitions.

Usage: python -m benchmarks.toonworld_shots [--out FILE]

Episodes of the held-out seed are drawn and written as mp4 in two sizes, and ``fast`` at its
defaults looks for their cuts, dissolves and fades. Where these are is known by construction
(``truth.json``), and scored as in ``benchmarks.shots``. Drawing is timed in processor seconds of
one thread, encoding left out.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.shot_scores import Truth, score, soft_scores
from benchmarks.spliced import read_truth
from benchmarks.tables import target, write_report
from curation.fast_shots import Transition, find_transitions
from curation.toonworld.render import render_video
from curation.toonworld.world import draw_episode
from curation.toonworld.write import write_dataset
from training.tiny.stories import FPS, HELD_OUT_SEED

SIZES = {(64, 64): 20, (128, 192): 5, (480, 720): 1}
"""Height and width in pixels, and how many episodes are drawn for the time."""
DETECTED = {(64, 64): 100, (128, 192): 25}
"""Sizes in which shots are looked for, and in how many episodes."""

ABOUT = f"""
Cartoon episodes of the held-out seed {HELD_OUT_SEED} at {FPS} frames per second, none of which any
constant of the detector was chosen on. `ours` is frames drawn per second of processor time, one
thread, without encoding. Cuts count as found within a frame; a dissolve or fade counts as found,
and one that is claimed as right, where both overlap within three frames. `soft found` is the share
of dissolves and fades in which any boundary was put.
"""


def main() -> None:
    """Measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("build/bench/toonworld_shots.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for (height, width), count in SIZES.items():
        speed = frames_per_second(height, width, count)
        rows.append(
            {
                "group": f"drawing ({os.cpu_count()} shared cores)",
                "case": f"{width} x {height}",
                "ours": round(speed),
                "peer": None,
                "ratio": None,
                "unit": "frames/s per core",
            }
        )
        if (height, width) == (64, 64):
            targets.append(target("frames drawn per second per core, 64 x 64", speed, 200))
    for (height, width), count in DETECTED.items():
        folder = args.out.parent / f"toonworld_{width}x{height}"
        write_dataset(folder, HELD_OUT_SEED, count, 0, height, width, FPS)
        truth = read_truth(folder)
        row = detected(folder, truth)
        kind = f"{count} episodes of {width} x {height}"
        rows.append({"group": f"shots found by fast ({_contents(truth)})", "case": kind, **row})
        targets += [
            target(f"cut F1, tolerance 1: {kind}", row["cut_f1"], 0.98),
            target(f"soft transition F1: {kind}", row["soft_f1"], 0.9),
        ]
    write_report(args.out, "ToonWorld", ABOUT, rows, targets)


def frames_per_second(height: int, width: int, episodes: int) -> float:
    """Frames drawn per processor second, whole episodes with their scenery and transitions."""
    frames, spent = 0, 0.0
    for index in range(episodes):
        video = draw_episode(HELD_OUT_SEED, index)
        started = time.process_time()
        frames += len(render_video(video, FPS, height, width))
        spent += time.process_time() - started
    return frames / spent


def detected(folder: Path, truth: Truth) -> dict[str, Any]:
    """Scores of the detector at its defaults on files of a folder."""
    found: dict[str, list[Transition]] = {
        name: [t for t in find_transitions(folder / name)[0] if t.kind != "doubt"] for name in truth
    }
    middles = {name: [t.middle_frame for t in of] for name, of in found.items()}
    cuts = score(middles, truth, 1)
    recall, precision = soft_scores(found, truth)
    return {
        "cut_f1": cuts["F1"],
        "cut_precision": cuts["P"],
        "cut_recall": cuts["R"],
        "soft_f1": round(2 * precision * recall / max(1e-9, precision + recall), 3),
        "soft_precision": round(precision, 3),
        "soft_recall": round(recall, 3),
        "soft_found": cuts["soft_recall"],
    }


def _contents(truth: Truth) -> str:
    cuts, soft = (sum(len(entry[kind]) for entry in truth.values()) for kind in ("cuts", "soft"))
    frames = sum(entry["nframes"] for entry in truth.values())
    return f"{cuts} cuts, {soft} dissolves and fades, {frames:,} frames"


if __name__ == "__main__":
    main()
