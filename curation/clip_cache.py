"""What is computed once per clip (embeddings, scores), kept in the workspace's cache.

Each finished batch of clips is a file of its own; only clips that no file has are computed. Scores
are small and kept in a folder per source; vectors are not held and may share a file across sources
(``curation.vector_cache``).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.pipeline import Failure, Piece
from schemas.rows import Clip, ClipScore
from schemas.storage import fingerprint
from schemas.tables import CLIP_SCORES, read_table

_CLIPS_PER_PIECE = 64
_TEXTS_PER_PIECE = 512
_FEW_PIECES = 8
"""Little work is still shared by as many workers, as long as every piece fills a batch."""


@dataclass(frozen=True)
class Scored:
    """Scores by clip id; the clips that had theirs before; and what could not be scored now."""

    rows: dict[str, ClipScore]
    reused: set[str]
    failures: list[Failure]


def score_clips(
    clips: Iterable[Clip], cache: Path, work: Callable[[list[Piece]], list[Failure]]
) -> Scored:
    """One score per clip, from the cache or made by ``work`` in batches of one source.

    Args:
        clips: What is wanted.
        cache: Folder of everything made the same way (model, weights, settings).
        work: Writes the pieces that are missing, and returns what failed.
    """
    known: dict[str, ClipScore] = {}
    pieces: list[Piece] = []
    wanted = {c.clip_id: c for c in clips}
    for source_id, of_source in by_source(wanted.values()).items():
        known |= _read_pieces(cache / source_id)
        missing = [c for c in of_source if c.clip_id not in known]
        for i in range(0, len(missing), _CLIPS_PER_PIECE):
            batch = missing[i : i + _CLIPS_PER_PIECE]
            name = fingerprint([c.clip_id for c in batch])
            rows = [dataclasses.asdict(c) for c in batch]
            pieces.append(Piece(name, cache / source_id / f"{name}.parquet", {"clips": rows}))
    reused = wanted.keys() & known.keys()
    failures = work(pieces)
    for folder in sorted({p.path.parent for p in pieces}):
        known |= _read_pieces(folder)
    found = {clip_id: known[clip_id] for clip_id in wanted if clip_id in known}
    return Scored(found, reused, failures)


def _read_pieces(folder: Path) -> dict[str, ClipScore]:
    """Rows of finished pieces by clip id. Unfinished pieces have a hidden temporary name."""
    paths = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))
    return {row.clip_id: row for path in paths for row in read_table(path, CLIP_SCORES)}


def vector_pieces(clips: Sequence[Clip], folder: Path, batch_clips: int) -> list[Piece]:
    """Pieces for ``pipeline.embed_clips``, each of full batches, across sources."""
    at_once = min(-(-_CLIPS_PER_PIECE // batch_clips), len(clips) // (_FEW_PIECES * batch_clips))
    size = batch_clips * max(1, at_once)
    pieces: list[Piece] = []
    for i in range(0, len(clips), size):
        batch = clips[i : i + size]
        name = fingerprint([c.clip_id for c in batch])
        rows = [dataclasses.asdict(c) for c in batch]
        pieces.append(Piece(name, folder / f"{name}.parquet", {"clips": rows}))
    return pieces


def caption_pieces(texts: Sequence[str], folder: Path) -> list[Piece]:
    """Pieces for ``pipeline.embed_captions``."""
    pieces: list[Piece] = []
    for i in range(0, len(texts), _TEXTS_PER_PIECE):
        batch = list(texts[i : i + _TEXTS_PER_PIECE])
        name = fingerprint(batch)
        pieces.append(Piece(name, folder / f"{name}.parquet", {"texts": batch}))
    return pieces


def by_source(rows: Iterable[Any]) -> dict[str, list[Any]]:
    """Rows grouped by ``source_id``, in order."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        groups[row.source_id].append(row)
    return dict(groups)
