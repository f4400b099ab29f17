"""Panda-70M tables: one row is one source video, its columns lists with one entry per clip.

The lists are Python literals written as text; they are read as literals only, never evaluated. In
Parquet copies they may be real lists. Shots are given relative to their clip's start.
``desirable_filtering`` and ``shot_boundary_detection`` may be absent; where present their lengths
are checked.
Source: Panda-70M dataset files (github.com/snap-research/Panda-70M).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from curation.captions import CSV_SOURCE, CaptionSpan
from curation.inputs import uris
from curation.inputs.lists import BadRow, Listed, ListFile, read_rows, require_all
from schemas.rows import Reject

_REQUIRED = ("videoID", "url", "timestamp", "caption", "matching_score")
_OPTIONAL = ("desirable_filtering", "shot_boundary_detection")


def read_panda70m(
    file: ListFile, media: Mapping[str, str] | None = None
) -> Iterator[Listed | Reject]:
    """Read a table.

    Args:
        file: The table.
        media: Names of downloaded videos by file name and by file name without ending; a row's
            video is the one called ``<videoID>.*``, or like the last part of its url. None: the
            video is where ``url`` says, a URI or a path.

    Raises:
        InputError: The file cannot be read or lacks columns.
    """
    require_all(file, _REQUIRED, _OPTIONAL)
    for label, row in read_rows(file):
        uri = ""
        if not isinstance(row, BadRow):
            label = f"{label}, videoID {row['videoID']!r}"
        try:
            if isinstance(row, BadRow):
                raise row
            uri = _place(row, file, media)
            yield Listed(uri, _spans(row))
        except BadRow as error:
            yield file.reject(label, error, uri)


def _place(row: Mapping[str, Any], file: ListFile, media: Mapping[str, str] | None) -> str:
    video, url = row["videoID"], row["url"]
    if not isinstance(url, str) or not url:
        raise BadRow("missing_path", "the row has no url", url)
    if media is None:
        return uris.join(file.base, url)
    last = PurePosixPath(urlsplit(url).path).name
    found = media.get(str(video)) or media.get(last) or media.get(PurePosixPath(last).stem)
    if found is None:
        raise BadRow("missing_media", "no file of media_root is called like the video", video)
    return found


def _spans(row: Mapping[str, Any]) -> tuple[CaptionSpan, ...]:
    lists = {c: _literal_list(row[c], c) for c in _REQUIRED[2:]}
    for column in _OPTIONAL:
        if row.get(column):
            lists[column] = _literal_list(row[column], column)
    if len(lists["caption"]) == 1 and _is_pair(lists["timestamp"]):
        lists["timestamp"] = [lists["timestamp"]]  # a single clip, not nested
    lengths = {column: len(values) for column, values in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{c}: {n}" for c, n in lengths.items())
        raise BadRow("unequal_lengths", "the lists of the row have different lengths", found)
    shots = lists.get("shot_boundary_detection") or [[]] * lengths["caption"]
    return tuple(
        _span(*values)
        for values in zip(
            lists["timestamp"], lists["caption"], lists["matching_score"], shots, strict=True
        )
    )


def _literal_list(value: object, column: str) -> Sequence[object]:
    found = value
    if isinstance(value, str):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
    if not isinstance(found, list):
        raise BadRow("bad_literal", f"column {column} is not a Python list", repr(value)[:80])
    return found


def _span(timestamp: object, caption: object, score: object, shots: object) -> CaptionSpan:
    start_s, end_s = _interval(timestamp, "bad_timestamp")
    if end_s <= start_s:
        raise BadRow("bad_timestamp", "a clip has no length", timestamp)
    if not isinstance(caption, str):
        raise BadRow("bad_caption", "a caption is no text", repr(caption)[:80])
    match score:
        case bool():
            matching_score = math.nan
        case int() | float():
            matching_score = float(score)
        case None:
            matching_score = None
        case _:
            matching_score = math.nan
    if matching_score is not None and not math.isfinite(matching_score):
        raise BadRow("bad_score", "a matching_score is not a finite number", repr(score)[:80])
    # Times are in milliseconds; a float's error must not look like a gap.
    inside = tuple(
        (round(start_s + a, 3), round(start_s + b, 3)) for a, b in _intervals(shots) if b > a
    )
    return CaptionSpan(start_s, end_s, caption.strip(), matching_score, CSV_SOURCE, inside)


def _intervals(shots: object) -> list[tuple[float, float]]:
    """The shots of one clip: a list of intervals, or one interval that is not nested."""
    if shots is None:
        return []
    if _is_pair(shots):
        return [_interval(shots, "bad_shots")]
    if not isinstance(shots, list):
        raise BadRow("bad_shots", "the shots of a clip are no list", repr(shots)[:80])
    return [_interval(shot, "bad_shots") for shot in shots]


def _is_pair(value: object) -> bool:
    match value:
        case [str(), str()]:
            return True
        case _:
            return False


def _interval(value: object, reason: str) -> tuple[float, float]:
    match value:
        case [str(start), str(end)]:
            return _seconds(start, reason), _seconds(end, reason)
        case _:
            raise BadRow(reason, "not a pair of times ['H:MM:SS.mmm', …]", repr(value)[:80])


def _seconds(text: str, reason: str) -> float:
    """``H:MM:SS.mmm`` as seconds."""
    try:
        hours, minutes, seconds = text.split(":")
        value = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise BadRow(reason, "not a time H:MM:SS.mmm", repr(text))
    return value
