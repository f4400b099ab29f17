"""Outputs of video2dataset, in its ``files`` and ``webdataset`` layouts, also Panda-70M's fork.

::

    00000/ or 00000.tar     <key>.mp4, <key>.txt (caption), <key>.json (what is known of the sample)
    00000.parquet           a row per sample: key, status, error_message, url, caption, ...
    00000_stats.json        counts

``key`` begins with the shard; a clip of a sample has ``<key>_00000``. Samples that failed are in
the Parquet file alone; a shard that was not finished has no Parquet file, then what lies there is
taken.
Source: video2dataset (github.com/iejMac/video2dataset), data_writer.py and workers.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from curation.captions import CaptionSpan
from curation.inputs import uris
from curation.inputs.lists import BadRow, Listed, ListFile, read_rows
from curation.sources import STAGE
from schemas.rows import Reject

V2D_SOURCE = "video2dataset"

_SHARD = re.compile(r"(\d{5,})(?:_stats\.json|\.tar|\.parquet)")
_SUCCESS = "success"
_TAR_BLOCK = 512


@dataclass
class _Sample:
    """What lies there of one key."""

    video: str = ""
    caption: Callable[[], bytes] | None = None
    known: Callable[[], bytes] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


def is_video2dataset(folder: Path) -> bool:
    """Whether a folder looks like an output: shards beside their Parquet files or statistics."""
    return any(_SHARD.fullmatch(p.name) for p in folder.iterdir())


def read_video2dataset(folder: Path, suffixes: Collection[str]) -> Iterator[Listed | Reject]:
    """Read an output folder, shard by shard.

    Raises:
        InputError: The Parquet file of a shard cannot be read.
        OSError: The folder cannot be listed.
    """
    matches = (_SHARD.fullmatch(p.name) for p in folder.iterdir())
    folders = {p.name for p in folder.iterdir() if p.is_dir() and p.name.isdigit()}
    for shard in sorted({m[1] for m in matches if m} | folders):
        samples: dict[str, _Sample] = {}
        yield from _read_folder(folder / shard, suffixes, samples)
        yield from _read_tar(folder / f"{shard}.tar", suffixes, samples)
        yield from _read_rows(folder / f"{shard}.parquet", samples)
        for key in sorted(samples):
            yield _result(f"{uris.uri_of(folder)}, sample {uris.printable(key)}", samples[key])


def _read_folder(
    folder: Path, suffixes: Collection[str], samples: dict[str, _Sample]
) -> Iterator[Reject]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            _add(samples, path.name, uris.uri_of(path), path.read_bytes, suffixes)
    yield from ()


def _read_tar(
    path: Path, suffixes: Collection[str], samples: dict[str, _Sample]
) -> Iterator[Reject]:
    if not path.is_file():
        return
    uri = uris.uri_of(path)
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _TAR_BLOCK) * _TAR_BLOCK
                if member.isreg():
                    name = PurePosixPath(member.name).name
                    read = partial(_read_at, path, member.offset_data, member.size)
                    _add(samples, name, uris.tar_member(member.name, uri), read, suffixes)
        if _read_at(path, end, _TAR_BLOCK) != bytes(_TAR_BLOCK):
            # tarfile takes a header that breaks off for the end.
            raise tarfile.ReadError("it ends without its end mark")
    except (tarfile.TarError, OSError) as error:
        # What came before the damage is taken.
        yield Reject(uri, STAGE, "bad_tar", uris.printable(str(error)), uri, failed=False)


def _read_at(path: Path, offset: int, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size_bytes)


def _add(
    samples: dict[str, _Sample],
    name: str,
    uri: str,
    read: Callable[[], bytes],
    suffixes: Collection[str],
) -> None:
    # A key holds no dot; names such as 00000000.en.vtt are subtitles.
    key, _, ending = name.partition(".")
    if not key:
        return
    if f".{ending.lower()}" in suffixes:
        samples.setdefault(key, _Sample()).video = uri
    elif ending == "txt":
        samples.setdefault(key, _Sample()).caption = read
    elif ending == "json":
        samples.setdefault(key, _Sample()).known = read


def _read_rows(path: Path, samples: dict[str, _Sample]) -> Iterator[Reject]:
    if not path.is_file():
        return
    file = ListFile(uris.uri_of(path), path, "")
    for label, row in read_rows(file):
        if isinstance(row, BadRow) or not isinstance(row.get("key"), str):
            yield file.reject(label, BadRow("bad_row", "the row has no key"))
        else:
            samples.setdefault(row["key"], _Sample()).row = row


def _result(where: str, sample: _Sample) -> Listed | Reject:
    try:
        known = dict(sample.row) | (json.loads(sample.known()) if sample.known else {})
        text = sample.caption().decode() if sample.caption else known.get("caption")
    except (ValueError, TypeError, OSError) as error:
        detail = uris.printable(f"its caption or JSON cannot be read: {error}")
        return Reject(where, STAGE, "bad_row", detail, sample.video, failed=False)
    status = known.get("status") or _SUCCESS
    url = known.get("url")
    named = sample.video or (url if isinstance(url, str) else "")
    if status != _SUCCESS:
        detail = uris.printable(str(known.get("error_message") or "no message"))
        return Reject(where, STAGE, str(status), detail, named, failed=False)
    if not sample.video:
        detail = "the sample is a success, but there is no video"
        return Reject(where, STAGE, "missing_media", detail, named, failed=False)
    score = known.get("matching_score")
    span = CaptionSpan(
        start_s=0.0,
        end_s=math.inf,
        caption=text.strip() if isinstance(text, str) else "",
        matching_score=float(score) if isinstance(score, int | float) else None,
        source=V2D_SOURCE,
    )
    return Listed(sample.video, (span,) if span.caption else ())
