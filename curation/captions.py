"""Captions given per time span, in the CSV form of Panda-70M.

One row describes one source video. ``timestamp``, ``caption`` and ``matching_score`` are Python
lists written as text, one entry per clip; they are read as literals only, never evaluated.
``desirable_filtering`` and ``shot_boundary_detection`` may be absent; where present their lengths
are checked.
Source: Panda-70M dataset files (github.com/snap-research/Panda-70M).
"""

from __future__ import annotations

import ast
import csv
import math
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import InputError

CSV_SOURCE = "panda70m_csv"
"""``Clip.caption_source`` of captions read here."""

_REQUIRED = ("videoID", "url", "timestamp", "caption", "matching_score")
_OPTIONAL = ("desirable_filtering", "shot_boundary_detection")
_MIN_OVERLAP = 0.5
"""Share of a clip that a span must cover: with less it mostly describes something else."""


@dataclass(frozen=True)
class CaptionSpan:
    """What one span of a video shows. Seconds count from the first frame."""

    start_s: float
    end_s: float
    caption: str
    matching_score: float | None


def read_captions(csv_path: Path) -> dict[str, list[CaptionSpan]]:
    """Read captions, by absolute path of the video.

    ``url`` is a path relative to the CSV's folder, or absolute. Several rows of one video are
    joined.

    Raises:
        InputError: The file is missing, lacks a column, or a row is malformed; the row's line is
            named.
    """
    if not csv_path.is_file():
        raise InputError(
            "captions file not found",
            where=csv_path,
            do="give the right path in curation.sources.captions_csv, or leave it empty",
        )
    # One row holds every clip of a video; the longest of Panda-70M pass the default of 131,072
    # characters.
    csv.field_size_limit(2**31 - 1)
    spans: dict[str, list[CaptionSpan]] = {}
    with csv_path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in _REQUIRED if c not in (reader.fieldnames or ())]
        if missing:
            raise InputError(
                "the captions file lacks columns",
                where=csv_path,
                found=f"columns {reader.fieldnames}",
                expected=f"{', '.join(_REQUIRED)} (optional: {', '.join(_OPTIONAL)})",
            )
        for row in reader:
            where = f"{csv_path}, line {reader.line_num}, videoID {row['videoID']!r}"
            path = os.path.normpath(csv_path.parent.absolute() / row["url"])
            spans.setdefault(path, []).extend(_read_row(row, where))
    for found in spans.values():
        found.sort(key=lambda s: (s.start_s, s.end_s, s.caption))
    return spans


def _read_row(row: dict[str, str | None], where: str) -> list[CaptionSpan]:
    lists = {c: _literal_list(row[c], c, where) for c in _REQUIRED[2:]}
    for column in _OPTIONAL:
        if row.get(column):
            lists[column] = _literal_list(row[column], column, where)
    lengths = {column: len(values) for column, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            "the lists of a captions row have different lengths",
            where=where,
            found=", ".join(f"{c}: {n}" for c, n in lengths.items()),
            expected="one entry per clip in every list",
            do="mend or remove the row",
        )
    return [
        _span(timestamp, caption, score, where)
        for timestamp, caption, score in zip(
            lists["timestamp"], lists["caption"], lists["matching_score"], strict=True
        )
    ]


def _literal_list(text: str | None, column: str, where: str) -> Sequence[object]:
    try:
        value = ast.literal_eval(text or "")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise InputError(
            f"column {column} of the captions file is not a Python list",
            where=where,
            found=repr((text or "")[:80]),
            expected="for example ['first', 'second']",
        )
    return value


def _span(timestamp: object, caption: object, score: object, where: str) -> CaptionSpan:
    match timestamp:
        case [str(start), str(end)]:
            start_s, end_s = _seconds(start, where), _seconds(end, where)
        case _:
            raise InputError(
                "a timestamp of the captions file is not a pair of times",
                where=where,
                found=repr(timestamp),
                expected="['H:MM:SS.mmm', 'H:MM:SS.mmm']",
            )
    if end_s <= start_s or not isinstance(caption, str):
        raise InputError(
            "a clip of the captions file has no length or no text",
            where=where,
            found=f"{timestamp!r}, {caption!r}",
            expected="start before end, and a string",
        )
    match score:
        case int() | float() if math.isfinite(score):
            return CaptionSpan(start_s, end_s, caption.strip(), float(score))
        case None:
            return CaptionSpan(start_s, end_s, caption.strip(), None)
        case _:
            raise InputError(
                "a matching_score of the captions file is not a number", where=where, found=score
            )


def _seconds(text: str, where: str) -> float:
    """``H:MM:SS.mmm`` as seconds."""
    try:
        hours, minutes, seconds = text.split(":")
        value = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(
            "a time of the captions file cannot be read",
            where=where,
            found=repr(text),
            expected="H:MM:SS.mmm",
        )
    return value


def caption_for(spans: Sequence[CaptionSpan], start_s: float, end_s: float) -> CaptionSpan | None:
    """The span that overlaps ``[start_s, end_s)`` most, if it covers at least half of it."""
    best = max(spans, key=lambda s: min(s.end_s, end_s) - max(s.start_s, start_s), default=None)
    if best is None:
        return None
    overlap_s = min(best.end_s, end_s) - max(best.start_s, start_s)
    return best if overlap_s >= _MIN_OVERLAP * (end_s - start_s) else None
