"""How well captions say what clips show, from vectors that are already there.

Shape legend: N clips.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from curation.embeddings import ModelName
from curation.vector_cache import CLIP_ID, ROWS_AT_ONCE, PieceCache, text_id
from schemas.rows import Clip
from schemas.tables import vectors_of


def caption_scores(
    clips: Sequence[Clip],
    vectors: PieceCache,
    texts: PieceCache,
    model: ModelName,
    long_text: str,
) -> pa.Table:
    """Rows of the table ``caption_scores``, one per clip with a caption.

    Args:
        clips: Each has its vector.
        vectors: Of clips.
        texts: Of all captions, made with ``long_text``.
        model: Of both.
        long_text: What was done to captions longer than the model reads.
    """
    captioned = [c for c in clips if c.caption]
    similarities = np.empty(len(captioned))
    chunks = np.empty(len(captioned), np.int64)
    for i in range(0, len(captioned), ROWS_AT_ONCE):
        batch = captioned[i : i + ROWS_AT_ONCE]
        said = texts.rows([text_id(c.caption) for c in batch])
        shown = vectors.rows([c.clip_id for c in batch])
        a, b = (vectors_of(rows).astype(np.float32) for rows in (shown, said))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        similarities[i : i + ROWS_AT_ONCE] = np.einsum("nd,nd->n", a, b) / lengths
        chunks[i : i + ROWS_AT_ONCE] = said["text_chunks"].to_numpy()
    return pa.table(
        {
            CLIP_ID: pa.array([c.clip_id for c in captioned], pa.string()),
            "model_id": pa.array([model.model_id] * len(captioned), pa.string()),
            "weights_sha256": pa.array([model.weights_sha256] * len(captioned), pa.string()),
            "long_text": pa.array([long_text] * len(captioned), pa.string()),
            "text_chunks": pa.array(chunks),
            # NaN is what the cache has where the model has nothing to say of a caption.
            "similarity": pa.array(similarities, pa.float64(), from_pandas=True),
        }
    ).sort_by([(CLIP_ID, "ascending"), ("model_id", "ascending")])
