"""Repeats: the same video in another container, and clips that look almost the same.

Shape legend: N clips, K kept ones, B a block of clips, D vector length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.filters import STAGE as FILTERS_STAGE
from schemas.config.curation import DedupConfig
from schemas.layout import Snapshot
from schemas.rows import Clip, Reject, Source
from schemas.tables import CLIPS, REJECTS, read_arrow, vectors_of

log = logging.getLogger(__name__)

STAGE = "dedup"
SOURCES_STAGE = "sources"
"""``Reject.stage`` of whole videos, which are refused before anything is decoded."""

Vector = npt.NDArray[np.floating]
Matrix = npt.NDArray[np.float32]

_BLOCK = 2048
"""Clips compared at a time: a block of float32 vectors of 768 numbers takes 6 MB, of cosines 16."""

_MARGIN = 1e-4
"""Block products, in float32, only propose: what comes this close is computed exactly."""


def reject_remuxed(sources: Iterable[Source]) -> tuple[list[Source], list[Reject]]:
    """Keep, of sources with the same video packets, the one with the smallest ``source_id``.

    That is a hash of bytes, so neither names nor order matter. The rejects' reason is
    ``duplicate_video``.
    """
    kept: dict[str, Source] = {}
    rejects: list[Reject] = []
    for source in sorted(sources, key=lambda s: s.source_id):
        first = kept.setdefault(source.packet_sha256, source)
        if first is not source:
            detail = f"same video packets as {first.uri}"
            rejects.append(
                Reject(source.uri, SOURCES_STAGE, "duplicate_video", detail, source.uri, False)
            )
    return sorted(kept.values(), key=lambda s: s.uri), rejects


def find_duplicates(
    clips: Iterable[Clip],
    vectors: Mapping[str, Vector],
    earlier: Iterable[tuple[Sequence[str], Vector]],
    cfg: DedupConfig,
) -> tuple[list[str], list[Reject]]:
    """Sort out clips that look almost like another one.

    Two clips are duplicates if their cosine, rounded to six digits, reaches ``cfg.near_threshold``.
    Clips stand in a row: first those that an earlier refresh kept, then longest first, then by
    ``clip_id``. One after the other is kept unless it is a duplicate of one kept before it. So no
    two kept clips are duplicates, every rejected one is a duplicate of a kept one, and there are
    no chains: if A is like B and B like C, but A not like C, then A and C stay when A comes first,
    B alone when B does. The order in which clips are given does not matter.

    A clip new to this refresh is also rejected if it is a duplicate of any clip that an earlier
    one kept, whether or not that clip is still there. One that was kept earlier itself never
    is, so the same refresh again, compared with its own snapshot, keeps the same clips.

    Args:
        clips: All clips of this refresh.
        vectors: Descriptor by clip id, of any length; a clip without one is left out.
        earlier: Blocks of clip ids and (B, D) vectors of earlier refreshes
            (:func:`earlier_vectors`); read once, block by block.
        cfg: The threshold; without one every clip is kept.

    Returns:
        Ids of the clips kept, in the order given, and one reject per other clip: reason
        ``near_duplicate``, its score the cosine with the clip that the detail names.
    """
    given = [c for c in clips if c.clip_id in vectors]
    threshold = cfg.near_threshold
    if threshold is None or not given:
        return [c.clip_id for c in given], []
    known, like = _compare_with_earlier(given, vectors, earlier, threshold)
    rejects = [
        _reject(c, *like[c.clip_id], "of an earlier refresh") for c in given if c.clip_id in like
    ]
    ordered = sorted(
        (c for c in given if c.clip_id not in like),
        key=lambda c: (c.clip_id not in known, -c.num_frames, c.clip_id),
    )
    kept: list[Clip] = []
    for begin in range(0, len(ordered), _BLOCK):
        block = ordered[begin : begin + _BLOCK]
        repeats = _compare_with_kept(block, kept, vectors, threshold)
        rejects += [_reject(c, *repeats[c.clip_id]) for c in block if c.clip_id in repeats]
        kept += [c for c in block if c.clip_id not in repeats]
    kept_ids = {c.clip_id for c in kept}
    log.info("stage=dedup clips=%d kept=%d known=%d", len(given), len(kept), len(known))
    rejects.sort(key=lambda r: r.record_id)
    return [c.clip_id for c in given if c.clip_id in kept_ids], rejects


def earlier_vectors(
    snapshots: Iterable[Snapshot], model_id: str, weights_sha256: str
) -> Iterator[tuple[list[str], Vector]]:
    """Blocks of the clips that earlier snapshots kept, with their vectors under one model.

    Clips that a snapshot's rejects table names (as filtered or as duplicates) are left out.

    Raises:
        ManifestError: A snapshot's table is missing or of an unknown version.
    """
    for snapshot in sorted(snapshots, key=lambda s: s.root.name):
        # Ids alone are held whole: a hundred bytes per clip.
        usable = _kept_ids(snapshot)
        for batch in pq.ParquetFile(snapshot.table("embeddings")).iter_batches(_BLOCK):
            columns = [batch[c].to_pylist() for c in ("clip_id", "model_id", "weights_sha256")]
            rows = [
                i
                for i, (clip_id, model, weights) in enumerate(zip(*columns, strict=True))
                if clip_id in usable and (model, weights) == (model_id, weights_sha256)
            ]
            if rows:
                vectors = vectors_of(pa.Table.from_batches([batch]))
                yield [columns[0][i] for i in rows], vectors[rows]


def _kept_ids(snapshot: Snapshot) -> set[str]:
    clip_ids = read_arrow(snapshot.table("clips"), CLIPS, ["clip_id"])["clip_id"]
    rejects = read_arrow(snapshot.table("rejects"), REJECTS, ["record_id", "stage"])
    refused = {
        record_id
        for record_id, stage in zip(*(column.to_pylist() for column in rejects), strict=True)
        if stage in (FILTERS_STAGE, STAGE)
    }
    return set(clip_ids.to_pylist()) - refused


def _compare_with_earlier(
    clips: Sequence[Clip],
    vectors: Mapping[str, Vector],
    earlier: Iterable[tuple[Sequence[str], Vector]],
    threshold: float,
) -> tuple[set[str], dict[str, tuple[str, float]]]:
    """Ids of clips that were there earlier, and for others the first earlier one like them."""
    current = {c.clip_id for c in clips}
    known: set[str] = set()
    like: dict[str, tuple[str, float]] = {}
    for ids, rows in earlier:
        known |= current.intersection(ids)
        others = _unit(rows)
        for begin in range(0, len(clips), _BLOCK):
            block = [c.clip_id for c in clips[begin : begin + _BLOCK] if c.clip_id not in like]
            near = _near(block, others, vectors, threshold)
            for clip_id, columns in zip(block, near, strict=True):
                candidates = ((ids[j], rows[j]) for j in columns)
                if hit := _first_duplicate(vectors[clip_id], candidates, threshold):
                    like[clip_id] = hit
    return known, {clip_id: hit for clip_id, hit in like.items() if clip_id not in known}


def _compare_with_kept(
    block: Sequence[Clip],
    kept: Sequence[Clip],
    vectors: Mapping[str, Vector],
    threshold: float,
) -> dict[str, tuple[str, float]]:
    """Clips of a block that repeat a kept one or an earlier one of the block, and the first such.

    Kept clips are taken in blocks too, so memory does not grow with their number.
    """
    repeats: dict[str, tuple[str, float]] = {}
    for begin in range(0, len(kept), _BLOCK):
        others = [c.clip_id for c in kept[begin : begin + _BLOCK]]
        rows = [c.clip_id for c in block if c.clip_id not in repeats]
        near = _near(rows, _matrix(others, vectors), vectors, threshold)
        for clip_id, columns in zip(rows, near, strict=True):
            candidates = ((others[j], vectors[others[j]]) for j in columns)
            if hit := _first_duplicate(vectors[clip_id], candidates, threshold):
                repeats[clip_id] = hit
    rows = [c.clip_id for c in block if c.clip_id not in repeats]
    near = _near(rows, _matrix(rows, vectors), vectors, threshold)
    for i, (clip_id, columns) in enumerate(zip(rows, near, strict=True)):
        before = (rows[j] for j in columns if j < i and rows[j] not in repeats)
        candidates = ((other, vectors[other]) for other in before)
        if hit := _first_duplicate(vectors[clip_id], candidates, threshold):
            repeats[clip_id] = hit
    return repeats


def _near(
    ids: Sequence[str], others: Matrix, vectors: Mapping[str, Vector], threshold: float
) -> list[list[int]]:
    """For each id the rows of ``others`` (K, D) that may be its duplicates."""
    if not ids or not len(others):
        return [[] for _ in ids]
    proposed = _matrix(ids, vectors) @ others.T >= threshold - _MARGIN
    return [np.flatnonzero(row).tolist() for row in proposed]


def _first_duplicate(
    vector: Vector, others: Iterable[tuple[str, Vector]], threshold: float
) -> tuple[str, float] | None:
    for other_id, other in others:
        cosine = _cosine(vector, other)
        if cosine >= threshold:
            return other_id, cosine
    return None


def _cosine(a: Vector, b: Vector) -> float:
    """Cosine to six digits: the same whatever block it is computed in, and 1 for equal vectors."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return round(float(a @ b / np.sqrt((a @ a) * (b @ b))), 6)


def _matrix(ids: Sequence[str], vectors: Mapping[str, Vector]) -> Matrix:
    """(B, D) unit rows."""
    return _unit(np.stack([vectors[clip_id] for clip_id in ids])) if ids else np.empty((0, 0), "f4")


def _unit(rows: Vector) -> Matrix:
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _reject(clip: Clip, other_id: str, cosine: float, whose: str = "of this refresh") -> Reject:
    detail = f"cosine {cosine:g} with clip {other_id} {whose}"
    return Reject(clip.clip_id, STAGE, "near_duplicate", detail, clip.uri, False, cosine)
