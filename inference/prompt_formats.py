"""Prompt manifests as files: Parquet, CSV, JSONL and JSON to plain records, and back.

A record is what a row says, by column name, with the place it stands at. What a column means is
``inference.prompts``' business; here only what is no record at all is a mistake.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ManifestError
from schemas.storage import write_text
from schemas.tables import PROMPTS, read_metadata

SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")
LISTS = {
    "prompts": "prompt",
    "extend_prompts": "extend_prompt",
    "negative_prompts": "negative_prompt",
    "seeds": "seed",
    "frames": "frames",
    "given": "given",
}
"""Columns that hold lists, each with the name of its numbered columns: ``prompt_1``, ``prompt_2``
and so on may stand in place of ``prompts``."""


@dataclass(frozen=True)
class Record:
    """One row: where it stands (``line 7`` or ``row 3``) and what it says, or why it says nothing.

    ``mistakes`` are (reason, text) as in ``inference.prompts``.
    """

    place: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    mistakes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def read_records(path: Path) -> list[Record]:
    """The rows of a manifest in file order, without cells that hold nothing (empty, null, NaN).

    A row of CSV or JSONL is named by the line it begins at, others by their number, from 1.

    Raises:
        ManifestError: The file is missing, of no known format, empty, not UTF-8, or broken in a way
            that no single row can answer for.
    """
    if not path.is_file():
        raise ManifestError(
            "the prompt manifest is not there",
            where=path,
            do="give a Parquet, CSV, JSONL or JSON file",
        )
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl, ".json": _json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ManifestError(
            "the format of the prompt manifest is not known",
            where=path,
            found=f"a name ending in {path.suffix!r}",
            expected=f"one of {', '.join(SUFFIXES)}",
        )
    return list(reader(path))


def write_text_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records as CSV, JSONL or JSON, by the name's ending; CSV gets one column per scene."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        rows = [_numbered(r) for r in records]
        names = sorted({name for row in rows for name in row}, key=_column_order)
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
        with_lines = text.getvalue()
    elif suffix == ".jsonl":
        with_lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    elif suffix == ".json":
        with_lines = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    else:
        raise ManifestError(
            "the format of the prompt manifest is not known",
            where=path,
            expected=f"a name ending in one of {', '.join(SUFFIXES)}",
        )
    write_text(path, with_lines)


def _parquet(path: Path) -> Iterator[Record]:
    try:
        data = pq.ParquetFile(path).read()
        ours = read_metadata(path).get("table", PROMPTS.name)
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(
            "the prompt manifest cannot be read as Parquet",
            where=path,
            found=error,
            expected="a Parquet file with the columns prompt_id and prompts",
        ) from error
    if ours != PROMPTS.name:
        raise ManifestError(
            "this file is another table", where=path, found=ours, expected=PROMPTS.name
        )
    _check_columns(path, data.column_names)
    for number, row in enumerate(data.to_pylist(), start=1):
        yield Record(f"row {number}", _said(row))


def _csv(path: Path) -> Iterator[Record]:
    """Rows of CSV; the separator (comma, semicolon or tab) is the header's commonest."""
    text = text_of(path)
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ManifestError(
                "the CSV is broken: all that follows would be read wrongly",
                where=f"{path}, line {line}",
                found=error,
                do='close every double quote, and write one inside a text as ""',
            ) from error
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            _check_columns(path, names)
        elif len(cells) != len(names):
            more = len(cells) > len(names)
            advice = "put a text with the separator in double quotes" if more else "one is missing"
            mistake = f"{len(cells)} cells for {len(names)} columns: {advice}"
            yield Record(f"line {line}", {}, [("wrong_number_of_cells", mistake)])
        else:
            yield Record(f"line {line}", _said(dict(zip(names, cells, strict=True))))


def _jsonl(path: Path) -> Iterator[Record]:
    # Not splitlines(): a JSON text may hold characters that it takes for line ends.
    for line, text in enumerate(text_of(path).split("\n"), start=1):
        if text.strip():
            try:
                value = json.loads(text, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:
                yield Record(f"line {line}", {}, [("invalid_json", f"not JSON: {error}")])
            else:
                yield _json_record(f"line {line}", value)


def _json(path: Path) -> Iterator[Record]:
    text = text_of(path)
    try:
        rows = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            "the prompt manifest is not JSON", where=path, found=error, expected="a JSON array"
        ) from error
    if not isinstance(rows, list):
        raise ManifestError(
            "the prompt manifest is no JSON array",
            where=path,
            found=type(rows).__name__,
            expected='[{"prompt_id": …, "prompts": […]}, …]',
            do="files of other systems: `triptych prompts import --help`",
        )
    for number, value in enumerate(cast("list[Any]", rows), start=1):
        yield _json_record(f"row {number}", value)


def _json_record(place: str, value: object) -> Record:
    if not isinstance(value, dict):
        mistake = f"a row is an object, found {type(value).__name__}"
        return Record(place, {}, [("wrong_type", mistake)])
    return Record(place, _said(cast("dict[str, Any]", value)))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice: one of the two would be lost without a word."""
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ManifestError: It is empty or not UTF-8.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            "the prompt manifest is not UTF-8",
            where=f"{path}, line {line}",
            found=error.reason,
            do="save it as UTF-8 (in a spreadsheet: 'CSV UTF-8')",
        ) from error
    if not text.strip():
        raise ManifestError("the prompt manifest is empty", where=path)
    return text


def _check_columns(path: Path, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise ManifestError(
            "two columns of the prompt manifest have one name", where=path, found=twice[0]
        )


def _said(row: dict[str, Any]) -> dict[str, Any]:
    """The cells that hold something, under a name (pandas writes row numbers under none)."""
    return {name: value for name, value in row.items() if name and not is_nothing(value)}


def is_nothing(value: object) -> bool:
    """Null, an empty text, or NaN, which pandas writes where a column of numbers has a gap."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _numbered(record: dict[str, Any]) -> dict[str, Any]:
    """A record with a column per scene in place of lists, and JSON in place of objects."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        items = cast("list[Any]", value) if isinstance(value, list) else []
        if items and "" not in items:
            flat |= {f"{LISTS[name]}_{i}": item for i, item in enumerate(items, start=1)}
        else:  # an empty cell would say nothing, so empty texts need the list itself
            text = json.dumps(value, ensure_ascii=False)
            flat[name] = text if isinstance(value, (list, dict)) else value
    return flat


def _column_order(name: str) -> tuple[int, int, str]:
    """Columns in the order of their kinds, a list's columns in the order of scenes."""
    kinds = ["prompt_id", "prompt", "extend_prompt", "negative_prompt", "seed", "frames", "given"]
    stem, _, number = name.rpartition("_")
    kind = stem if number.isdigit() else name
    place = kinds.index(kind) if kind in kinds else len(kinds)
    return place, int(number) if number.isdigit() else 0, name
