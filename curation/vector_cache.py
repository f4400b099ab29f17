"""Vectors of clips and captions in the workspace's cache, found by id without holding them.

A piece is a Parquet file with the rows of one batch of work, of whichever sources it was made of.
Only ids are kept in memory; vectors are read a piece at a time, where they are used.

Shape legend: N rows, D vector length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.rows import Clip, stable_id
from schemas.storage import atomic_path

Vector = npt.NDArray[np.float32]

CLIP_ID = "clip_id"
TEXT_ID = "text_id"

ROWS_AT_ONCE = 4096
"""A batch of float16 vectors of 768 numbers takes 6 MB."""
_PIECES_HELD = 32


class PieceCache:
    """The rows of all finished pieces in a folder, by id.

    Unfinished pieces have a hidden temporary name.

    Args:
        folder: Of everything made the same way (model, weights, settings).
        key: The column with the id.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = key
        self._paths: list[Path] = []
        self._where: dict[str, tuple[int, int]] = {}
        self._piece = lru_cache(maxsize=_PIECES_HELD)(_read_piece)
        self.look()

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._where

    def look(self) -> None:
        """Find the pieces finished since the last look."""
        known = set(self._paths)
        for path in sorted(self.folder.glob("[!.]*.parquet")):
            if path in known:
                continue
            ids: list[str] = pq.read_table(path, columns=[self._key])[self._key].to_pylist()
            number = len(self._paths)
            self._where |= {row_id: (number, row) for row, row_id in enumerate(ids)}
            self._paths.append(path)

    def rows(self, ids: Sequence[str]) -> pa.Table:
        """The rows of some ids, in their order, repeats allowed; all must be there."""
        places = [self._where[row_id] for row_id in ids]
        order = sorted(range(len(ids)), key=lambda i: places[i])
        parts: list[pa.Table] = []
        for number, group in groupby(order, key=lambda i: places[i][0]):
            rows = [places[i][1] for i in group]
            parts.append(self._piece(self._paths[number]).take(rows))
        back = np.empty(len(ids), np.int64)
        back[order] = np.arange(len(ids))
        return pa.concat_tables(parts).take(back)

    def batches(self, ids: Sequence[str]) -> Iterator[pa.Table]:
        """:meth:`rows`, ``ROWS_AT_ONCE`` at a time."""
        for i in range(0, len(ids), ROWS_AT_ONCE):
            yield self.rows(ids[i : i + ROWS_AT_ONCE])


def _read_piece(path: Path) -> pa.Table:
    return pq.read_table(path).replace_schema_metadata(None).combine_chunks()


def vectors_table(
    clips: Sequence[Clip], vectors: Vector, model_id: str, weights_sha256: str
) -> pa.Table:
    """Rows of the table ``embeddings``, from one vector (N, D) per clip."""
    return pa.table(
        {
            CLIP_ID: [c.clip_id for c in clips],
            "model_id": [model_id] * len(clips),
            "source_id": [c.source_id for c in clips],
            "start_pts": [c.start_pts for c in clips],
            "weights_sha256": [weights_sha256] * len(clips),
            "vector": _list_column(vectors.astype(np.float16)),
        }
    )


def text_id(text: str) -> str:
    """What a caption's vector is found by."""
    return stable_id(text)


def write_captions(
    path: Path,
    texts: Sequence[str],
    vectors: Sequence[Vector | None],
    chunks: Sequence[int],
    dim: int,
) -> None:
    """Write a piece of captions: a vector of NaN where the model has nothing to say of one."""
    unknown = np.full(dim, np.nan, np.float32)
    stacked = np.stack([unknown if vector is None else vector for vector in vectors])
    rows = {
        TEXT_ID: [text_id(text) for text in texts],
        "text_chunks": list(chunks),
        "vector": _list_column(stacked.astype(np.float32)),
    }
    with atomic_path(path) as tmp:
        pq.write_table(pa.table(rows), tmp, use_dictionary=False)


def _list_column(vectors: npt.NDArray[np.floating]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
