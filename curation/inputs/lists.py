"""Lists of videos in CSV, Parquet and JSON lines: their rows, their kinds, and our own kind.

The reader of each kind turns rows into ``Listed`` videos and rejects; a bad row costs no other. Our
own kind has a column ``path``, ``uri`` or ``url`` and, if wanted, ``caption``, ``start_s``,
``end_s``, ``matching_score``; several rows may be of one video.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.captions import CaptionSpan
from curation.inputs import uris
from curation.sources import STAGE
from schemas.errors import InputError
from schemas.rows import Reject

LIST_SOURCE = "list"
LIST_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")

_PLACE_COLUMNS = ("path", "uri", "url")
_KINDS = {
    "panda70m": {"videoID", "url", "timestamp"},
    "pretrain_csv": {"fps", "width", "height", "caption", "path", "num_frame"},
}
"""Columns that tell other kinds of tables from our own."""


@dataclass(frozen=True)
class Listed:
    """One video that a list names."""

    uri: str
    captions: tuple[CaptionSpan, ...] = ()


@dataclass(frozen=True)
class ListFile:
    """A list: its name, where its bytes can be read, and the folder its relative paths are in."""

    uri: str
    path: Path
    base: str

    @property
    def suffix(self) -> str:
        """The ending of its name, in small letters."""
        return PurePosixPath(self.uri.split("?")[0]).suffix.lower()

    def reject(self, label: str, error: BadRow, uri: str = "") -> Reject:
        """The reject of one row."""
        where = f"{self.uri}, {label}"
        detail = error.what if error.found is None else f"{error.what}: {error.found}"
        return Reject(where, STAGE, error.reason, uris.printable(detail), uri, failed=False)


class BadRow(InputError):
    """One row of a list cannot be used; ``reason`` is the snake_case word of its reject."""

    def __init__(self, reason: str, what: str, found: object = None) -> None:
        super().__init__(what, found=found)
        self.reason = reason


def read_list(file: ListFile) -> Iterator[Listed | Reject]:
    """Read our own kind of list.

    Raises:
        InputError: The file cannot be read, or has no column with places.
    """
    require_any(file, _PLACE_COLUMNS)
    for label, row in read_rows(file):
        uri = ""
        try:
            if isinstance(row, BadRow):
                raise row
            place = next((row[c] for c in _PLACE_COLUMNS if row.get(c)), None)
            if not isinstance(place, str):
                raise BadRow("missing_path", "the row names no video", place)
            uri = uris.join(file.base, place)
            yield Listed(uri, _captions(row))
        except BadRow as error:
            yield file.reject(label, error, uri)


def _captions(row: Mapping[str, Any]) -> tuple[CaptionSpan, ...]:
    start_s = number(row, "start_s", 0.0)
    end_s = number(row, "end_s", math.inf)
    score = number(row, "matching_score", None)
    text = row.get("caption") or ""
    if start_s is None or end_s is None or not 0 <= start_s < end_s:
        raise BadRow("bad_span", "start_s and end_s are no span", f"{start_s} to {end_s}")
    if not isinstance(text, str):
        raise BadRow("bad_caption", "the caption is no text", repr(text)[:80])
    text = text.strip()
    return (CaptionSpan(start_s, end_s, text, score, LIST_SOURCE),) if text else ()


def number(row: Mapping[str, Any], column: str, default: float | None) -> float | None:
    """A finite number of a row, or ``default`` where the cell is empty.

    Raises:
        BadRow: It is something else.
    """
    value = row.get(column)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return default
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or isinstance(value, bool):
        raise BadRow("bad_number", f"{column} is not a finite number", repr(value)[:80])
    return found


def detect_kind(file: ListFile) -> tuple[str, str]:
    """Which kind of list a file is, and by what that was seen.

    Raises:
        InputError: It is none of them.
    """
    if file.suffix == ".json":
        return "sft_json", "suffix .json"
    columns = set(columns_of(file))
    for kind, wanted in _KINDS.items():
        if wanted <= columns:
            return kind, f"columns {', '.join(sorted(wanted))}"
    require_any(file, _PLACE_COLUMNS)
    return "list", f"column {next(c for c in _PLACE_COLUMNS if c in columns)}"


def require_any(file: ListFile, wanted: tuple[str, ...]) -> None:
    """Check that a list has one of the columns.

    Raises:
        InputError: It has none.
    """
    columns = columns_of(file)
    if not set(wanted) & set(columns):
        raise InputError(
            "the list lacks columns",
            where=file.uri,
            found=f"columns {', '.join(columns) or 'none'}",
            expected=f"one of {', '.join(wanted)}",
        )


def require_all(file: ListFile, wanted: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Check that a list has all of the columns.

    Raises:
        InputError: It lacks some.
    """
    columns = columns_of(file)
    if not set(wanted) <= set(columns):
        raise InputError(
            "the list lacks columns",
            where=file.uri,
            found=f"columns {', '.join(columns) or 'none'}",
            expected=", ".join(wanted)
            + (f" (optional: {', '.join(optional)})" if optional else ""),
        )


def columns_of(file: ListFile) -> list[str]:
    """The columns of a list; of JSON lines, the keys of the first row that can be read.

    Raises:
        InputError: The file cannot be read.
    """
    if file.suffix == ".parquet":
        return list(_parquet(file).schema_arrow.names)
    if file.suffix == ".csv":
        return next(_CsvRows(file), [])
    rows = (row for _, row in read_rows(file) if not isinstance(row, BadRow))
    return list(next(rows, {}))


def read_rows(file: ListFile) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """Rows with what to call them: ``line 3`` of a text file, ``row 3`` (from 1) of a table.

    Raises:
        InputError: The file cannot be read.
    """
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
    elif file.suffix == ".csv":
        rows = _CsvRows(file)
        header = next(rows, [])
        for values in rows:
            label = f"line {rows.line_num}"
            if values and len(values) != len(header):
                found = f"{len(values)} fields, header {len(header)}"
                yield label, BadRow("bad_row", "the row has not one field per column", found)
            elif values:
                yield label, dict(zip(header, values, strict=True))
    else:
        yield from _json_rows(file)


class _CsvRows:
    """Rows of a CSV file as lists of text, with the line number of the last."""

    def __init__(self, file: ListFile) -> None:
        # One row of Panda-70M holds every clip of a video; the longest pass the default of 131,072
        # characters.
        csv.field_size_limit(2**31 - 1)
        self.line_num = 0
        self._rows = self._read(file)

    def __iter__(self) -> Iterator[list[str]]:
        return self._rows

    def __next__(self) -> list[str]:
        return next(self._rows)

    def _read(self, file: ListFile) -> Iterator[list[str]]:
        try:
            with file.path.open(newline="", encoding="utf-8-sig") as text:
                reader = csv.reader(text)
                for row in reader:
                    self.line_num = reader.line_num
                    yield row
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise _unreadable(file, f"{error}, after line {self.line_num}") from error


def _parquet(file: ListFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _parquet_rows(file: ListFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    count = 0
    try:
        for batch in _parquet(file).iter_batches():
            for row in batch.to_pylist():
                count += 1
                yield f"row {count}", row
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, f"{error}, after row {count}") from error


def _json_rows(file: ListFile) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    try:
        with file.path.open("rb") as lines:
            for count, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {count}", _json_row(line)
    except OSError as error:
        raise _unreadable(file, error) from error


def _json_row(line: bytes) -> Mapping[str, Any] | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return BadRow("bad_json", "the line is not JSON", error)
    if not isinstance(row, dict):
        return BadRow("bad_json", "the line is not a JSON object", repr(row)[:80])
    return row


def _unreadable(file: ListFile, found: object) -> InputError:
    return InputError(
        "the list cannot be read",
        where=file.uri,
        found=found,
        expected="CSV or JSON lines in UTF-8, or Parquet; by suffix",
        do="correct the file or curation.sources.format",
    )
