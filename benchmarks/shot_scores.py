"""How good shot boundaries are, beside ground truth."""

from __future__ import annotations

from typing import Any

from curation.fast_shots import Transition

SOFT_TOLERANCE = 3
"""Frames around a soft transition in which a boundary counts as finding it."""

Truth = dict[str, dict[str, Any]]
"""By file: ``nframes``, ``cuts``, ``soft`` and ``ambiguous`` ([first, last] frames)."""


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


def foreign_frames(start: int, end: int, entry: dict[str, Any]) -> set[int]:
    """Frames of transitions in ``[start, end)``, and those on the shorter side of a cut in it."""
    found = {f for s, e in entry["soft"] for f in range(max(s, start), min(e + 1, end))}
    for cut in entry["cuts"]:
        if start < cut < end:
            found |= set(min(range(start, cut), range(cut, end), key=len))
    return found


def _meets(t: Transition, start: int, end: int) -> bool:
    return t.start_frame <= end and t.end_frame >= start
