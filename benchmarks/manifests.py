"""Windows, similarities and manifests of a million clips, beside plain pandas and numpy.

Usage: python -m benchmarks.manifests [--clips 1000000] [--peer-clips 100000] [--repeat 3]

Synthetic clips: 20 per source, vectors of 768 half floats. Every case is a process of its own,
which also gives its peak memory, file pages it maps included; nothing else than the case is in it.
``windows and sft manifest`` is what a refresh does between the tables ``clips`` and ``embeddings``
and the table ``manifests/sft``, both written. The peer does the same with the tools at hand: one
data frame, a group per source, a matrix product per window, lists of dicts, ``to_parquet``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from benchmarks.memory import peak_mb
from benchmarks.tables import target, write_report
from curation import ablation
from curation.manifests import CLIP_COLUMNS, SCENE_COLUMNS, pretrain_manifest, sft_manifest
from curation.selection import WINDOW_COLUMNS
from curation.windows import described_clips, score_windows
from schemas.config.curation import ManifestsConfig, WindowsConfig
from schemas.rows import stable_id, stable_ids
from schemas.tables import (
    CLIPS,
    EMBEDDINGS,
    SAMPLES,
    WINDOWS,
    iter_tables,
    read_arrow,
    vectors_of,
    write_batches,
)

PER_SOURCE = 20
DIM = 768
RULES = ManifestsConfig(low=0.45)
"""Keeps about half of the windows."""
LOWS = tuple(round(0.05 * i, 2) for i in range(20))

SECONDS, MEMORY_GB, SWEEP, LINEAR, OVER_PEER = 60, 3, 1.3, 1.15, 5
"""Targets: of a million clips; of 20 thresholds over one; of time per clip, all over a tenth of
them; and over the peer."""


def main() -> None:
    """Measure, print a table, write the JSON. With ``--case``: do that one, in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--peer-clips", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench/manifests.json"))
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.case:
        started = time.perf_counter()
        CASES[args.case](args.folder)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "gb": peak_mb() / 1024}))
        return
    sizes = {n: args.out.parent / "manifests" / str(n) for n in (args.clips, args.peer_clips)}
    for clips, folder in sizes.items():
        make(folder, clips)
    large, small = sizes[args.clips], sizes[args.peer_clips]
    plan = [
        ("read", large), ("windows and sft manifest", large), ("pretrain manifest", large),
        ("one threshold", large), ("twenty thresholds", large),
        ("windows and sft manifest", small), ("peer", small),
    ]  # fmt: skip
    found: dict[tuple[str, Path], list[dict[str, float]]] = {step: [] for step in plan}
    for _ in range(args.repeat):
        for case, folder in plan:
            found[case, folder].append(run(case, folder))
    medians = {
        step: {key: statistics.median(r[key] for r in results) for key in ("seconds", "gb")}
        for step, results in found.items()
    }
    rows, targets = report(medians, large, small, args.clips, args.peer_clips)
    about = f"""{args.clips:,} clips of {PER_SOURCE} per source, vectors of {DIM} half floats; the
        median of {args.repeat} interleaved runs, each a process of its own. `windows and sft
        manifest` includes reading and writing all tables; `read` only reads the vectors. The peer
        is a straightforward implementation with pandas and numpy, on {args.peer_clips:,} clips."""
    write_report(args.out, "Windows and manifests", about, rows, targets)


def report(
    medians: dict[tuple[str, Path], dict[str, float]],
    large: Path,
    small: Path,
    clips: int,
    peer_clips: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets."""
    rows: list[dict[str, Any]] = []
    for (case, folder), found in medians.items():
        number = clips if folder == large else peer_clips
        name = f"{case}, {number:,} clips"
        row = {"case": name, "seconds": found["seconds"], "peak_gb": found["gb"]}
        rows.append({**row, "clips_per_second": round(number / found["seconds"])})
    ours, few = (
        medians["windows and sft manifest", large],
        medians["windows and sft manifest", small],
    )
    over_peer = medians["peer", small]["seconds"] / few["seconds"]
    linear = (ours["seconds"] / clips) / (few["seconds"] / peer_clips)
    sweep = medians["twenty thresholds", large]["seconds"]
    sweep /= medians["one threshold", large]["seconds"]
    reading = ours["seconds"] / medians["read", large]["seconds"]
    rows.append({"case": "windows and sft manifest over reading the vectors", "ratio": reading})
    targets = [
        target(f"seconds for {clips:,} clips", ours["seconds"], SECONDS, at_most=True),
        target(f"peak memory for {clips:,} clips, GB", ours["gb"], MEMORY_GB, at_most=True),
        target("time of 20 thresholds over one", sweep, SWEEP, at_most=True),
        target(f"time per clip, {clips:,} over {peer_clips:,}", linear, LINEAR, at_most=True),
        target("speed over pandas and numpy", over_peer, OVER_PEER),
    ]
    return rows, targets


def run(case: str, folder: Path) -> dict[str, float]:
    """One case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.manifests", "--case", case, "--folder", folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def make(folder: Path, number: int) -> None:
    """Write the tables ``clips`` and ``embeddings``, if they are not there."""
    if (folder / "embeddings.parquet").is_file():
        return
    write_batches(folder / "clips.parquet", CLIPS, _clips(number))
    write_batches(folder / "embeddings.parquet", EMBEDDINGS, _embeddings(folder))


def _clips(number: int) -> Iterator[pa.Table]:
    step = 1000 * PER_SOURCE
    names = sorted(stable_id("source", i).replace("-", "") for i in range(number // PER_SOURCE))
    for begin in range(0, number, step):
        rows = np.arange(begin, min(begin + step, number))
        index = rows % PER_SOURCE
        source = [names[i] for i in rows // PER_SOURCE]
        ids = stable_ids((s, str(i)) for s, i in zip(source, index, strict=True))
        yield pa.table(
            {
                "clip_id": ids,
                "shot_id": ids,
                "source_id": source,
                "uri": [f"s3://films/panda70m/{s}.mp4" for s in source],
                "index": index,
                "start_pts": index * 5000,
                "end_pts": index * 5000 + 4800,
                "start_frame": index * 125,
                "end_frame": index * 125 + 120,
                "num_frames": np.full(len(rows), 120),
                "start_s": index * 5.0,
                "end_s": index * 5.0 + 4.8,
                "fps": np.full(len(rows), 25.0),
                "width_px": np.full(len(rows), 1280),
                "height_px": np.full(len(rows), 720),
                "caption": [f"A person in scene {i} walks over the bridge." for i in rows],
                "caption_source": pa.repeat("panda70m_csv", len(rows)),
                "matching_score": pa.nulls(len(rows), pa.float64()),
                "trainable_pretrain": np.ones(len(rows), bool),
                "trainable_sft": np.ones(len(rows), bool),
            },
            schema=CLIPS.schema,
        )


def _embeddings(folder: Path) -> Iterator[pa.Table]:
    """Clips of one source share half of their direction."""
    generator = np.random.default_rng(0)
    columns = ("clip_id", "source_id", "start_pts")
    for clips in iter_tables(folder / "clips.parquet", CLIPS, columns, 1000 * PER_SOURCE):
        shape = (clips.num_rows // PER_SOURCE, PER_SOURCE, DIM)
        vectors = generator.standard_normal(shape, np.float32)
        vectors += 0.9 * generator.standard_normal((shape[0], 1, DIM), np.float32)
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        flat = pa.array(vectors.astype(np.float16).ravel())
        yield pa.table(
            {
                **{name: clips[name] for name in columns},
                "model_id": pa.repeat("synthetic", clips.num_rows),
                "weights_sha256": pa.repeat("none", clips.num_rows),
                "vector": pa.FixedSizeListArray.from_arrays(flat, DIM),
            }
        ).select(EMBEDDINGS.schema.names)


def read(folder: Path) -> None:
    """Read every vector."""
    for batch in iter_tables(folder / "embeddings.parquet", EMBEDDINGS, ("vector",), 16384):
        vectors_of(batch)


def windows_and_sft(folder: Path) -> None:
    """Ours, as a refresh does it."""

    def scored() -> Iterator[pa.Table]:
        tables = (folder / "clips.parquet", folder / "embeddings.parquet")
        for clips, vectors in described_clips(*tables):
            yield score_windows(clips, vectors, WindowsConfig())[0]

    write_batches(folder / "windows.parquet", WINDOWS, scored())
    clips = read_arrow(folder / "clips.parquet", CLIPS, CLIP_COLUMNS)
    windows = read_arrow(folder / "windows.parquet", WINDOWS, WINDOW_COLUMNS)
    manifest = sft_manifest(windows, clips, RULES)
    write_batches(folder / "sft.parquet", SAMPLES, manifest.samples())


def pretrain(folder: Path) -> None:
    """Two uses of every clip."""
    clips = read_arrow(folder / "clips.parquet", CLIPS, CLIP_COLUMNS)
    manifest = pretrain_manifest(clips, 3, RULES)
    write_batches(folder / "pretrain.parquet", SAMPLES, manifest.samples())


def sweep(folder: Path, lows: tuple[float, ...]) -> None:
    """What the ablation flow does with stored windows."""
    clips = read_arrow(folder / "clips.parquet", CLIPS, ablation.CLIP_COLUMNS)
    windows = read_arrow(folder / "windows.parquet", WINDOWS, WINDOW_COLUMNS)
    found = ablation.sweep(windows, clips, RULES, lows, ["min_pairwise"])
    assert len(found.overlap()) == len(lows)


def peer(folder: Path) -> None:
    """The same tables the straightforward way."""
    clips = pd.read_parquet(folder / "clips.parquet")
    embeddings = pd.read_parquet(folder / "embeddings.parquet")
    frame = clips.merge(embeddings[["clip_id", "vector"]], on="clip_id")
    windows, samples = [], []
    for source_id, group in frame.sort_values(["source_id", "index"]).groupby("source_id"):
        vectors = np.stack(group["vector"].to_list()).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        records = group[[*SCENE_COLUMNS, "index"]].to_dict("records")
        for i in range(len(records) - 2):
            run_of = records[i : i + 3]
            gap = max(b["start_s"] - a["end_s"] for a, b in pairwise(run_of))
            if run_of[2]["index"] != run_of[0]["index"] + 2 or gap > WindowsConfig().max_gap_s:
                continue
            cosines = vectors[i : i + 3] @ vectors[i : i + 3].T
            upper = cosines[np.triu_indices(3, 1)]
            adjacent = np.diagonal(cosines, 1)
            ids = [r["clip_id"] for r in run_of]
            window = {
                "sample_id": stable_id(*ids), "source_id": source_id, "clip_ids": ids,
                "similarities": upper.tolist(), "min_adjacent": adjacent.min(),
                "mean_adjacent": adjacent.mean(), "min_pairwise": upper.min(),
                "mean_pairwise": upper.mean(), "max_pairwise": upper.max(), "largest_gap_s": gap,
            }  # fmt: skip
            windows.append(window)
            if RULES.low <= upper.min() and upper.max() < (RULES.near_duplicate or 2):
                scenes = [{k: r[k] for k in SCENE_COLUMNS} for r in run_of]
                sample = {"sample_id": window["sample_id"], "kind": "sft", "split": "train"}
                similarity = float(upper.min())
                samples.append(
                    {**sample, "scenes": scenes, "similarity": similarity, "trainable": True}
                )
    pd.DataFrame(windows).to_parquet(folder / "peer_windows.parquet")
    pd.DataFrame(samples).to_parquet(folder / "peer_sft.parquet")
    same = read_arrow(folder / "windows.parquet", WINDOWS, ["sample_id"]).num_rows
    assert len(windows) == same, (len(windows), same)


CASES: dict[str, Callable[[Path], None]] = {
    "read": read,
    "windows and sft manifest": windows_and_sft,
    "pretrain manifest": pretrain,
    "one threshold": lambda folder: sweep(folder, LOWS[:1]),
    "twenty thresholds": lambda folder: sweep(folder, LOWS),
    "peer": peer,
}

if __name__ == "__main__":
    main()
