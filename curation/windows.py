"""Windows: N consecutive clips of one source with all pairwise similarities. No verdicts here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from schemas.config.curation import WindowsConfig
from schemas.rows import Clip, Reject, Window, stable_id

STAGE = "windows"


def make_windows(
    clips: Sequence[Clip],
    vectors: Mapping[str, npt.NDArray[np.floating]],
    cfg: WindowsConfig,
) -> tuple[list[Window], list[Reject]]:
    """Score every run of N clips of one source.

    A run with a shot missing in between (too short, or unreadable) is rejected as
    ``not_consecutive``, one with a longer pause than ``cfg.max_gap_s`` as ``gap_too_large`` (the
    score is the gap).

    Args:
        clips: All clips of one source, in any order.
        vectors: Descriptor by clip id; a clip without one is left out like a missing shot.
        cfg: N and the largest gap.

    Returns:
        One window or one reject per run: ``max(0, clips - N + 1)`` in all.
    """
    ordered = sorted((c for c in clips if c.clip_id in vectors), key=lambda c: c.index)
    windows: list[Window] = []
    rejects: list[Reject] = []
    n = cfg.scenes_per_sample
    for i in range(len(ordered) - n + 1):
        run = ordered[i : i + n]
        sample_id = stable_id(*(c.clip_id for c in run))
        gap_s = max(b.start_s - a.end_s for a, b in pairwise(run))
        if any(b.index != a.index + 1 for a, b in pairwise(run)):
            detail = f"spans {[c.index for c in run]}"
            rejects.append(Reject(sample_id, STAGE, "not_consecutive", detail, run[0].uri, False))
        elif gap_s > cfg.max_gap_s:
            detail = f"{gap_s:.3f} s between clips, more than {cfg.max_gap_s:g} s"
            rejects.append(
                Reject(sample_id, STAGE, "gap_too_large", detail, run[0].uri, False, gap_s)
            )
        else:
            windows.append(_score(sample_id, run, vectors, gap_s))
    return windows, rejects


def _score(
    sample_id: str,
    run: Sequence[Clip],
    vectors: Mapping[str, npt.NDArray[np.floating]],
    gap_s: float,
) -> Window:
    rows = np.stack([vectors[c.clip_id] for c in run]).astype(np.float64)
    # Stored vectors are rounded to float16, so their length is one only to three digits.
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = np.clip(rows @ rows.T, -1.0, 1.0)
    upper = cosines[np.triu_indices(len(run), k=1)]
    adjacent = np.diagonal(cosines, offset=1)
    return Window(
        sample_id=sample_id,
        source_id=run[0].source_id,
        clip_ids=[c.clip_id for c in run],
        similarities=[float(s) for s in upper],
        min_adjacent=float(adjacent.min()),
        mean_adjacent=float(adjacent.mean()),
        min_pairwise=float(upper.min()),
        mean_pairwise=float(upper.mean()),
        largest_gap_s=gap_s,
    )
