"""The two kinds of list that Mask²DiT's published trainer reads.

Pre-training: a CSV with ``fps,width,height,caption,path,num_frame``, one clip file per row.
Fine-tuning: a JSON array of groups ``{"prefix", "values": [{"url", "caption", ...}, ...]}``, whose
values are clip files in order. Both name files of their own, so each becomes a source of its own;
what they say about size and length is measured anew, and a group's order is not kept.
Source: Mask²DiT (github.com/Tianhao-Qi/Mask2DiT), readers of the training scripts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from curation.captions import CaptionSpan
from curation.inputs import uris
from curation.inputs.lists import BadRow, Listed, ListFile, read_rows, require_all
from schemas.errors import InputError
from schemas.rows import Reject

PRETRAIN_SOURCE = "pretrain_csv"
SFT_SOURCE = "sft_json"


def read_pretrain_csv(file: ListFile) -> Iterator[Listed | Reject]:
    """Read the pre-training list.

    Raises:
        InputError: The file cannot be read or lacks columns.
    """
    require_all(file, ("path", "caption"))
    for label, row in read_rows(file):
        try:
            if isinstance(row, BadRow):
                raise row
            yield _listed(file, row["path"], row["caption"], PRETRAIN_SOURCE)
        except BadRow as error:
            yield file.reject(label, error)


def read_sft_json(file: ListFile) -> Iterator[Listed | Reject]:
    """Read the fine-tuning list.

    Raises:
        InputError: The file is no JSON array of groups.
    """
    try:
        groups = json.loads(file.path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("the list cannot be read", where=file.uri, found=error) from error
    if not isinstance(groups, list):
        raise InputError(
            "the list is not of the official fine-tuning form",
            where=file.uri,
            found=type(groups).__name__,
            expected='[{"prefix": …, "values": [{"url": …, "caption": …}, …]}, …]',
        )
    for number, group in enumerate(groups, 1):
        values = group.get("values") if isinstance(group, dict) else None
        if not isinstance(values, list):
            error = BadRow("bad_group", "the group has no values", repr(group)[:80])
            yield file.reject(f"group {number}", error)
            continue
        for place, value in enumerate(values, 1):
            try:
                if not isinstance(value, dict):
                    raise BadRow("bad_row", "the value is no object", repr(value)[:80])
                yield _listed(file, value.get("url"), value.get("caption"), SFT_SOURCE)
            except BadRow as error:
                yield file.reject(f"group {number}, value {place}", error)


def _listed(file: ListFile, place: object, caption: object, source: str) -> Listed:
    if not isinstance(place, str) or not place:
        raise BadRow("missing_path", "the row names no video", place)
    if not isinstance(caption, str | None):
        raise BadRow("bad_caption", "the caption is no text", repr(caption)[:80])
    text = (caption or "").strip()
    spans = (CaptionSpan(0.0, math.inf, text, None, source),) if text else ()
    return Listed(uris.join(file.base, place), spans)
