"""A snapshot of one film with given similarities, for tests of the ablation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from curation.mp4 import write_mp4
from curation.probe import probe
from schemas.config import TriptychConfig, load_config
from schemas.layout import Snapshot
from schemas.rows import CaptionScore, Clip, Source, Window
from schemas.tables import CAPTION_SCORES, CLIPS, SOURCES, WINDOWS, write_table

EVIL = "A <script>alert('x')</script> & a \"red\" bull"
LOWS = (-1.0, 0.5, 0.9)
LENGTH = 6


def film(path: Path, shots: int) -> Source:
    frames = np.zeros((shots * LENGTH, 48, 64, 3), np.uint8)
    for i in range(len(frames)):
        frames[i] = (40 * (i // LENGTH) % 255, 90, 200)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, frames, 12)
    return replace(probe(path), num_frames=len(frames), duration_s=len(frames) / 12, is_vfr=False)


def clips_of(source: Source, count: int) -> list[Clip]:
    pts = source.time_base_den // source.time_base_num // 12
    return [
        Clip(
            f"clip{i}", f"shot{i}", source.source_id, source.uri, i, i * LENGTH * pts,
            (i + 1) * LENGTH * pts, i * LENGTH, (i + 1) * LENGTH, LENGTH, i / 2, (i + 1) / 2,
            12.0, 64, 48, EVIL if i == 0 else f"shot {i}", "", None, True, True,
        )
        for i in range(count)
    ]  # fmt: skip


def write_snapshot(root: Path, similarities: list[float]) -> Snapshot:
    """One film; window i has ``similarities[i]`` as its least, and a little more in between."""
    source = film(root / "videos" / "a <b>.mp4", max(3, len(similarities) + 2))
    clips = clips_of(source, max(3, len(similarities) + 2))
    windows = [
        Window(f"window{i}", source.source_id, i, [f"clip{i + k}" for k in range(3)],
               [s + 0.01, s, s + 0.02], s + 0.01, s + 0.015, s, s + 0.01, s + 0.02, 0.0)
        for i, s in enumerate(similarities)
    ]  # fmt: skip
    texts = [CaptionScore(c.clip_id, "m", "none", "truncate", 1, 0.25) for c in clips]
    snapshot = Snapshot(root / "workspace" / "datasets" / "demo" / "abc123")
    write_table(snapshot.table("sources"), SOURCES, [source])
    write_table(snapshot.table("clips"), CLIPS, clips)
    write_table(snapshot.table("windows"), WINDOWS, windows)
    write_table(snapshot.table("caption_scores"), CAPTION_SCORES, texts)
    return snapshot


def settings(root: Path, *more: str) -> TriptychConfig:
    changes = (f"workspace={root / 'workspace'}", f"curation.ablation.lows={list(LOWS)}", *more)
    return load_config(None, changes)
