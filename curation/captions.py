"""Captions given per time span, whatever list they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CSV_SOURCE = "panda70m_csv"
"""``CaptionSpan.source`` of captions in the form of Panda-70M."""

_MIN_OVERLAP = 0.5
"""Share of a clip that a span must cover: with less it mostly describes something else."""


@dataclass(frozen=True)
class CaptionSpan:
    """What one span of a video shows. Seconds count from the first frame.

    ``end_s`` is infinite where the caption is of the whole video. ``source`` is the kind of list it
    was given in. ``shots`` are the shots the list names inside the span, as (start, end) in seconds
    of the video, half-open; empty where it names none.
    """

    start_s: float
    end_s: float
    caption: str
    matching_score: float | None
    source: str = CSV_SOURCE
    shots: tuple[tuple[float, float], ...] = ()


def caption_for(spans: Sequence[CaptionSpan], start_s: float, end_s: float) -> CaptionSpan | None:
    """The span that overlaps ``[start_s, end_s)`` most, if it covers at least half of it."""
    best = max(spans, key=lambda s: min(s.end_s, end_s) - max(s.start_s, start_s), default=None)
    if best is None:
        return None
    overlap_s = min(best.end_s, end_s) - max(best.start_s, start_s)
    return best if overlap_s >= _MIN_OVERLAP * (end_s - start_s) else None


def join_spans(spans: Iterable[CaptionSpan]) -> tuple[CaptionSpan, ...]:
    """Each different span once, in order of time; the order they came in does not matter."""
    return tuple(
        sorted(
            set(spans),
            key=lambda s: (
                s.start_s,
                s.end_s,
                s.caption,
                s.source,
                s.matching_score is not None,
                s.matching_score or 0.0,
                s.shots,
            ),
        )
    )
