"""Windows: N consecutive clips of one source with all pairwise similarities. No verdicts here.

Whole columns at a time, for a dataset has millions of clips: each pair of clips is compared once,
though it is part of several windows.

Shape legend: B clips, D vector length, N clips per window, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.arrow_compute import pc
from schemas.config.curation import WindowsConfig
from schemas.errors import ManifestError
from schemas.rows import stable_ids
from schemas.tables import (
    CLIPS,
    EMBEDDINGS,
    REJECTS,
    WINDOWS,
    iter_tables,
    list_column,
    read_arrow,
    vectors_of,
)

STAGE = "windows"
CLIP_COLUMNS = ("clip_id", "source_id", "uri", "index", "start_s", "end_s")
"""What of the clips is needed here."""

_ROWS = 4096
"""Vectors read at once: 12 MB of 768 numbers in single precision."""

Vectors = npt.NDArray[np.floating]


def described_clips(clips: Path, embeddings: Path) -> Iterator[tuple[pa.Table, Vectors]]:
    """Clips that have a vector, with their vectors (B, D): some sources at a time, none in pieces.

    Args:
        clips: Table ``clips``.
        embeddings: Table ``embeddings``, which may describe other clips too.

    Raises:
        ManifestError: A table cannot be read, or the two are not in the same order.
    """
    known = read_arrow(clips, CLIPS, CLIP_COLUMNS).combine_chunks()
    described = read_arrow(embeddings, EMBEDDINGS, ("clip_id",))["clip_id"].combine_chunks()
    found = pc.index_in(described, value_set=known["clip_id"].combine_chunks())
    place = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    if (np.diff(place[place >= 0]) <= 0).any():
        raise ManifestError(
            "the clips of table 'embeddings' are not in the order of table 'clips'",
            where=embeddings,
            do="make the snapshot anew: this code did not write that table",
        )
    source = pc.dictionary_encode(known["source_id"].combine_chunks()).indices.to_numpy()
    waiting: list[tuple[npt.NDArray[np.int64], Vectors]] = []
    begin = 0
    for batch in iter_tables(embeddings, EMBEDDINGS, ("vector",), _ROWS):
        values = vectors_of(batch)
        at = place[begin : begin + batch.num_rows]
        begin += batch.num_rows
        wanted = at >= 0
        waiting.append((at, values) if wanted.all() else (at[wanted], values[wanted]))
        rows = np.concatenate([rows for rows, _ in waiting])
        # The last source may go on in the next batch.
        whole = int(np.searchsorted(source[rows], source[rows[-1]])) if rows.size else 0
        if whole:
            vectors = np.concatenate([vectors for _, vectors in waiting])
            yield known.take(pa.array(rows[:whole])), vectors[:whole]
            waiting = [(rows[whole:], vectors[whole:])]
    if waiting and (rows := np.concatenate([rows for rows, _ in waiting])).size:
        yield known.take(pa.array(rows)), np.concatenate([vectors for _, vectors in waiting])


def score_windows(
    clips: pa.Table, vectors: Vectors, cfg: WindowsConfig
) -> tuple[pa.Table, pa.Table]:
    """Score every run of N clips of one source.

    A run with a shot missing in between (too short, or unreadable) is rejected as
    ``not_consecutive``, one with a longer pause than ``cfg.max_gap_s`` as ``gap_too_large`` (the
    score is the gap). Similarities are rounded to six digits, which half floats do not have.

    Args:
        clips: ``CLIP_COLUMNS`` of whole sources, sorted by source and index. A clip without a
            vector is left out like a missing shot.
        vectors: (B, D) descriptors, one per clip, of any length.
        cfg: N and the largest gap.

    Returns:
        Tables ``windows`` and ``rejects``: one row per run, ``max(0, clips - N + 1)`` per source.
    """
    n = cfg.scenes_per_sample
    source = pc.dictionary_encode(clips["source_id"].combine_chunks()).indices.to_numpy()
    first = np.flatnonzero(source[: max(0, len(source) - n + 1)] == source[n - 1 :])
    index = clips["index"].to_numpy()
    starts, ends = clips["start_s"].to_numpy(), clips["end_s"].to_numpy()
    gaps = np.max([starts[first + k + 1] - ends[first + k] for k in range(n - 1)], axis=0)
    spread = index[first + n - 1] != index[first] + n - 1
    late = ~spread & (gaps > cfg.max_gap_s)
    clip_ids = clips["clip_id"].combine_chunks()
    names = clip_ids.take(pa.array((first[:, None] + np.arange(n)).ravel())).to_pylist()
    sample_ids = pa.array(stable_ids(zip(*[iter(names)] * n, strict=True)), pa.string())
    rejects = _rejects(clips, sample_ids, first, gaps, spread, late, cfg)
    good = ~(spread | late)
    scored = _scores(clips, vectors, first[good], gaps[good], n)
    scored = scored.add_column(0, "sample_id", sample_ids.filter(pa.array(good)))
    return scored.cast(WINDOWS.schema), rejects


def num_runs(clips: pa.Table, n: int) -> int:
    """How many runs of ``n`` clips there are, ``max(0, clips - n + 1)`` per source."""
    counts = pc.value_counts(clips["source_id"]).field("counts").to_numpy()
    return int(np.maximum(0, counts - n + 1).sum())


def _scores(
    clips: pa.Table, vectors: Vectors, first: npt.NDArray[np.intp], gaps: Vectors, n: int
) -> pa.Table:
    """Table ``windows`` without ids, of the windows that begin at the rows ``first``."""
    rows = vectors.astype(np.float32)
    # products[k][i] is the product of clips i and i + k.
    products = [
        np.einsum("ij,ij->i", rows[: max(0, len(rows) - k)], rows[k:]).astype(np.float64)
        for k in range(n)
    ]
    # Stored vectors are rounded to float16, so their length is one only to three digits.
    length = np.sqrt(products[0])
    near = [products[k] / (length[: max(0, len(rows) - k)] * length[k:]) for k in range(1, n)]
    pairs = np.stack([near[b - a - 1][first + a] for a, b in combinations(range(n), 2)], axis=1)
    pairs = np.round(np.clip(pairs, -1.0, 1.0), 6)
    adjacent = pairs[:, [b - a == 1 for a, b in combinations(range(n), 2)]]
    at = pa.array(first)
    members = pa.array((first[:, None] + np.arange(n)).ravel())
    return pa.table(
        {
            "source_id": clips["source_id"].take(at),
            "index": clips["index"].take(at),
            "clip_ids": list_column(clips["clip_id"].combine_chunks().take(members), n),
            "similarities": list_column(pa.array(pairs.ravel()), pairs.shape[1]),
            "min_adjacent": adjacent.min(axis=1),
            "mean_adjacent": adjacent.mean(axis=1),
            "min_pairwise": pairs.min(axis=1),
            "mean_pairwise": pairs.mean(axis=1),
            "max_pairwise": pairs.max(axis=1),
            "largest_gap_s": gaps,
        }
    )


def _rejects(
    clips: pa.Table,
    sample_ids: pa.Array,
    first: npt.NDArray[np.intp],
    gaps: Vectors,
    spread: npt.NDArray[np.bool_],
    late: npt.NDArray[np.bool_],
    cfg: WindowsConfig,
) -> pa.Table:
    bad = np.flatnonzero(spread | late)
    index = clips["index"].to_numpy()
    n = cfg.scenes_per_sample
    details = [
        f"spans {index[first[i] : first[i] + n].tolist()}"
        if spread[i]
        else f"{gaps[i]:.3f} s between clips, more than {cfg.max_gap_s:g} s"
        for i in bad
    ]
    reasons = np.where(spread[bad], "not_consecutive", "gap_too_large")
    return pa.table(
        {
            "record_id": sample_ids.take(pa.array(bad)),
            "stage": pa.array([STAGE] * len(bad), pa.string()),
            "reason": pa.array(reasons.tolist(), pa.string()),
            "detail": pa.array(details, pa.string()),
            "uri": clips["uri"].take(pa.array(first[bad])),
            "failed": np.zeros(len(bad), np.bool_),
            "score": pa.array(gaps[bad], mask=spread[bad]),
        },
        schema=REJECTS.schema,
    )
