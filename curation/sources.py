"""Making one ``sources`` row of each video. ``curation.inputs`` finds what is to be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from curation.defects import defect, open_plain, os_reject
from curation.inputs import uris
from curation.probe import probe
from schemas.errors import VideoDecodeError
from schemas.rows import Reject, Source

STAGE = "sources"


def read_source(path: Path, uri: str | None = None) -> Source | Reject:
    """Probe one local file; a file that is no usable video becomes a reject with its reason.

    Args:
        path: Where its bytes are (``Downloads.opened``).
        uri: Its name in tables; None: its path.
    """
    name = uri or uris.uri_of(path)
    try:
        open_plain(path)
        return dataclasses.replace(probe(path), uri=name)
    except VideoDecodeError as error:
        return defect(error, name, STAGE, name)
    except OSError as error:
        return os_reject(error, STAGE, name)


def reject_duplicates(sources: Iterable[Source]) -> tuple[list[Source], list[Reject]]:
    """Keep, of files with the same bytes, the one whose name sorts first."""
    kept: dict[str, Source] = {}
    rejects: list[Reject] = []
    for source in sorted(sources, key=lambda s: s.uri):
        first = kept.setdefault(source.source_id, source)
        if first is not source:
            detail = f"same bytes as {first.uri}"
            rejects.append(
                Reject(source.uri, STAGE, "duplicate_source", detail, source.uri, failed=False)
            )
    return list(kept.values()), rejects
