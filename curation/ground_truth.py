"""Ground truth of windows: which span of which video belongs to which story.

A window is *related* if all its scenes are of one story. Where a scene lies is decided by the
middle of its clip, so a boundary that a detector finds a few frames late changes nothing.

Shape legend: W windows, N clips per window, B clips.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from curation.inputs import uris
from curation.selection import member_rows
from schemas.arrow_compute import pc
from schemas.errors import InputError

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {"uri": pa.string(), "start_s": pa.float64(), "end_s": pa.float64(), "story": pa.string()}
)
_EXPECTED = f"columns {', '.join(SCHEMA.names)}: one row per span, seconds from the first frame"
_FORM = "give a Parquet or CSV file with these columns in curation.ablation.truth"

Floats = npt.NDArray[np.float64]


def read_truth(path: Path) -> pa.Table:
    """Spans as a table with the columns of ``SCHEMA``.

    Raises:
        InputError: The file is missing, not a table, lacks a column or holds an impossible span.
    """
    if not path.is_file():
        raise InputError("the ground truth is not there", where=path, do=_FORM)
    try:
        found = pq.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
        table = found.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, KeyError) as error:
        raise InputError(
            "the ground truth cannot be read",
            where=path,
            found=str(error).strip("'\""),
            expected=_EXPECTED,
            do=_FORM,
        ) from error
    starts, ends = (table[name].to_numpy() for name in ("start_s", "end_s"))
    empty = pc.or_(_blank(table["uri"]), _blank(table["story"]))
    # Written so that NaN, which a missing number becomes, is wrong too.
    wrong = ~((starts >= 0) & (starts < ends)) | np.asarray(empty)
    if wrong.any():
        row = table.slice(int(np.argmax(wrong)), 1).to_pylist()[0]
        raise InputError(
            "a span of the ground truth is impossible",
            where=f"{path}, row {int(np.argmax(wrong)) + 1}",
            found=row,
            expected="a uri, a story, and 0 <= start_s < end_s",
        )
    return table


def related_windows(
    truth: pa.Table, source_uris: Sequence[str], windows: pa.Table, clips: pa.Table
) -> Floats:
    """(W,) 1 where a window is related, 0 where it is not, NaN where a scene lies in no span.

    Args:
        truth: Spans, as :func:`read_truth` gives them. A ``uri`` is that of a source, a path to it,
            or its file name where no other source has the same.
        source_uris: The sources of the snapshot.
        windows: ``clip_ids``.
        clips: ``clip_id``, ``uri``, ``start_s``, ``end_s``.

    Raises:
        InputError: A file name is that of several sources, no span is of any source, or spans of
            one source overlap.
    """
    names = _source_of(pc.unique(truth["uri"]).to_pylist(), source_uris)
    spans: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    columns = (truth[name].to_pylist() for name in SCHEMA.names)
    for uri, start_s, end_s, story in zip(*columns, strict=True):
        if uri in names:
            spans[names[uri]].append((start_s, end_s, story))
    stories = _stories(spans, clips)[member_rows(windows, clips)]
    known = (stories >= 0).all(axis=1)
    return np.where(known, (stories == stories[:, :1]).all(axis=1), np.nan)


def _read_csv(path: Path) -> pa.Table:
    # Without types a story named 007 would be a number.
    convert = pcsv.ConvertOptions(column_types=SCHEMA)
    return pcsv.read_csv(path, convert_options=convert)


def _blank(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.equal(pc.fill_null(column, ""), "")


def _source_of(wanted: Sequence[str], source_uris: Sequence[str]) -> dict[str, str]:
    """The source that each uri of the ground truth names; none for one that is not of the set."""
    known = set(source_uris)
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for source in source_uris:
        by_name[Path(source).name].append(source)
    found: dict[str, str] = {}
    for uri in wanted:
        exact = next((u for u in (uri, uris.normal(uri)) if u in known), None)
        same_name = by_name[Path(uri).name]
        if exact is None and len(same_name) > 1:
            raise InputError(
                "a file name of the ground truth is that of several sources",
                found=uri,
                expected="one of " + ", ".join(same_name),
                do="write the whole uri in the ground truth",
            )
        if exact is not None or same_name:
            found[uri] = exact or same_name[0]
    if not found:
        raise InputError(
            "the ground truth is of no source of this snapshot",
            found=f"uri {wanted[0]}" if wanted else "no rows",
            expected=f"such as {source_uris[0]}" if source_uris else "sources",
            do="write the sources' uri, or their file name, in the ground truth",
        )
    log.info("ground truth sources=%d of=%d", len(found), len(wanted))
    return found


def _stories(
    spans: Mapping[str, list[tuple[float, float, str]]], clips: pa.Table
) -> npt.NDArray[np.int64]:
    """(B,) number of the story each clip's middle lies in, -1 where it lies in none."""
    stories = np.full(clips.num_rows, -1)
    numbers: dict[str, int] = {}
    middle = (clips["start_s"].to_numpy() + clips["end_s"].to_numpy()) / 2
    source = pc.fill_null(pc.index_in(clips["uri"], value_set=pa.array(list(spans))), -1).to_numpy()
    order = np.argsort(source, kind="stable")
    limits = np.searchsorted(source[order], np.arange(len(spans) + 1))
    for number, (uri, listed) in enumerate(spans.items()):
        listed.sort()
        overlap = next((b for a, b in pairwise(listed) if b[0] < a[1]), None)
        if overlap is not None:
            raise InputError(
                "spans of the ground truth overlap",
                where=uri,
                found=f"one ends after the next begins, at {overlap[0]:g} s",
                expected="each moment in at most one span",
            )
        starts, ends = (np.array(side) for side in list(zip(*listed, strict=True))[:2])
        codes = np.array([numbers.setdefault(story, len(numbers)) for *_, story in listed])
        mine = order[limits[number] : limits[number + 1]]
        at = np.searchsorted(starts, middle[mine], side="right") - 1
        inside = (at >= 0) & (middle[mine] < ends[at])
        stories[mine[inside]] = codes[at[inside]]
    return stories
