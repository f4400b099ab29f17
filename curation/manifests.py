"""Manifests, which training reads: ``sft`` of related scenes, ``pretrain`` of unrelated ones.

Verdicts are taken here from stored scores, so another threshold costs one pass over a table.
Everything is a pure function of its inputs, whatever order they come in.

Shape legend: W windows, M samples, N scenes per sample, B clips.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from curation.selection import KEPT, REASONS, Candidates, candidates
from curation.unrelated import draw, keys_of
from schemas.arrow_compute import pc
from schemas.config.curation import ManifestsConfig
from schemas.errors import ManifestError
from schemas.rows import Scene, stable_ids
from schemas.tables import REJECTS, SAMPLES, list_column

SFT_STAGE = "manifest_sft"
PRETRAIN_STAGE = "manifest_pretrain"

SCENE_COLUMNS = tuple(field.name for field in dataclasses.fields(Scene))
CLIP_COLUMNS = (*SCENE_COLUMNS, "trainable_pretrain", "trainable_sft")
"""What of the clips is needed here."""

_ROWS = 16384
"""Samples made at once."""

Split = Literal["train", "val", "test"]
Rows = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Which clips make up which sample, before the rows are written out.

    Attributes:
        kind: ``sft`` or ``pretrain``.
        clips: ``CLIP_COLUMNS`` in the table's order.
        sample_ids: (M,) ids.
        rows: (M, N) rows of ``clips``.
        splits: (M,) split of each sample's sources.
        similarity: (M,) the statistic that decided; None for pretrain samples.
        rejects: Table ``rejects``: what found no place, and why.
        limits: What low and high were as similarities; empty for pretrain samples.
    """

    kind: Literal["sft", "pretrain"]
    clips: pa.Table
    sample_ids: pa.Array
    rows: Rows
    splits: npt.NDArray[np.str_]
    similarity: npt.NDArray[np.float64] | None
    rejects: pa.Table
    limits: dict[str, str]

    def samples(self) -> Iterator[pa.Table]:
        """Table ``samples``, some rows at a time."""
        trainable = self.clips[f"trainable_{self.kind}"].to_numpy()
        for begin in range(0, len(self.rows), _ROWS):
            part = slice(begin, begin + _ROWS)
            rows = self.rows[part]
            similarity = None if self.similarity is None else self.similarity[part]
            yield pa.table(
                {
                    "sample_id": self.sample_ids[part],
                    "kind": pa.repeat(self.kind, len(rows)),
                    "split": pa.array(self.splits[part]),
                    "scenes": self._scenes(rows),
                    "similarity": pa.nulls(len(rows), pa.float64())
                    if similarity is None
                    else pa.array(similarity),
                    "trainable": trainable[rows].all(axis=1),
                },
                schema=SAMPLES.schema,
            )

    def _scenes(self, rows: Rows) -> pa.ListArray:
        """(M, N) rows of clips as a column of lists of scenes."""
        at = pa.array(rows.ravel())
        taken = [self.clips[name].take(at).combine_chunks() for name in SCENE_COLUMNS]
        fields = list(SAMPLES.schema.field("scenes").type.value_type)
        return list_column(pa.StructArray.from_arrays(taken, fields=fields), rows.shape[1])


def split_of(source_id: str, val_percent: int, test_percent: int = 0) -> Split:
    """``val`` or ``test`` for so many % of sources, by hash: others do not move it."""
    digest = hashlib.sha256(f"split\x1f{source_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") % 100
    if place < val_percent:
        return "val"
    return "test" if place < val_percent + test_percent else "train"


def sft_manifest(windows: pa.Table, clips: pa.Table, cfg: ManifestsConfig) -> Manifest:
    """Windows whose statistic lies between ``cfg.low`` and ``cfg.high``, both included, as samples.

    Rejected with the score (:data:`curation.selection.REASONS`): ``no_caption`` (a scene without
    one cannot be trained on), ``near_duplicate``, ``below_threshold``, ``above_threshold``,
    ``overlapping`` and ``source_full``. One sample or one reject per window.

    Args:
        windows: ``curation.selection.WINDOW_COLUMNS`` in the table's order.
        clips: ``CLIP_COLUMNS`` in the table's order.
        cfg: The rules.

    Raises:
        ManifestError: A window names a clip that is not there.
    """
    found = candidates(windows, clips, cfg, cfg.statistic)
    verdicts = found.judged(cfg.low)
    kept = np.flatnonzero(verdicts == KEPT)
    rows = found.members[kept]
    return Manifest(
        kind="sft",
        clips=clips,
        sample_ids=windows["sample_id"].combine_chunks().take(pa.array(kept)),
        rows=rows,
        splits=_splits(clips, cfg)[rows[:, 0]],
        similarity=found.scores[kept],
        rejects=_refused(windows, clips, found, verdicts, cfg),
        limits={
            "low_similarity": repr(found.similarity(cfg.low)),
            "high_similarity": repr(found.similarity(cfg.high)),
        },
    )


def _refused(
    windows: pa.Table,
    clips: pa.Table,
    found: Candidates,
    verdicts: npt.NDArray[np.int8],
    cfg: ManifestsConfig,
) -> pa.Table:
    refused = np.flatnonzero(verdicts != KEPT)
    details = (
        "",
        "a scene without a caption",
        f"two scenes at least {cfg.near_duplicate} alike",
        f"{cfg.statistic} below {found.similarity(cfg.low):g}",
        f"{cfg.statistic} above {found.similarity(cfg.high):g}",
        f"shares more than {cfg.max_shared_clips} clips with a more similar window",
        f"{cfg.max_per_source} more similar windows of this source",
    )
    codes = pa.array(verdicts[refused])
    return _rejects(
        windows["sample_id"].take(pa.array(refused)),
        SFT_STAGE,
        pa.array(REASONS).take(codes),
        pa.array(details).take(codes),
        clips["uri"].take(pa.array(found.members[refused, 0])),
        pa.array(found.scores[refused]),
    )


def pretrain_manifest(clips: pa.Table, scenes_per_sample: int, cfg: ManifestsConfig) -> Manifest:
    """Rows of N unrelated clips: each row takes N different sources.

    Every clip offers ``cfg.uses_per_clip`` uses. Rows are drawn within a split, and clips that the
    trainer would refuse only meet their like, so that one short clip does not spoil a row. There
    are as many rows as there can be; which clips meet comes from the seed. A clip is used again
    only after all others of its source.

    Every use becomes part of a sample or a reject (``no_caption`` or ``unused_clip_use``), so
    ``clips * uses_per_clip == samples * N + rejects``.

    Args:
        clips: ``CLIP_COLUMNS`` in the table's order.
        scenes_per_sample: N.
        cfg: The rules.

    Raises:
        ManifestError: The captioned clips come from fewer than N sources.
    """
    captioned = pc.not_equal(clips["caption"], "").to_numpy()
    sources = pc.dictionary_encode(clips["source_id"].combine_chunks()).indices.to_numpy()
    if len(np.unique(sources[captioned])) < scenes_per_sample:
        raise ManifestError(
            "too few sources for pre-training samples of unrelated scenes",
            found=f"{len(np.unique(sources[captioned]))} sources with captioned clips",
            expected=f"at least {scenes_per_sample} (curation.windows.scenes_per_sample)",
            do="add videos with captions",
        )
    keys = keys_of(clips["clip_id"].to_numpy(), cfg.seed)
    splits = _splits(clips, cfg)
    trainable = clips["trainable_pretrain"].to_numpy()
    silent = np.repeat(np.flatnonzero(~captioned), cfg.uses_per_clip)
    drawn: list[Rows] = []
    unused: list[Rows] = []
    for split in np.unique(splits):
        for accepted in (False, True):
            group = np.flatnonzero(captioned & (splits == split) & (trainable == accepted))
            rows, left = draw(
                group, sources[group], keys[group], scenes_per_sample, cfg.uses_per_clip
            )
            drawn.append(rows)
            unused.append(left)
    rows = np.concatenate(drawn)
    left = np.concatenate(unused)
    places = np.concatenate([silent, left])
    reasons = ["no_caption"] * len(silent) + ["unused_clip_use"] * len(left)
    details = ["clip without a caption"] * len(silent)
    details += ["no other source had a use left to pair with"] * len(left)
    return Manifest(
        kind="pretrain",
        clips=clips,
        sample_ids=_pretrain_ids(clips, rows),
        rows=rows,
        splits=splits[rows[:, 0]] if rows.size else np.empty(0, splits.dtype),
        similarity=None,
        rejects=_rejects(
            clips["clip_id"].take(pa.array(places)),
            PRETRAIN_STAGE,
            pa.array(reasons, pa.string()),
            pa.array(details, pa.string()),
            clips["uri"].take(pa.array(places)),
            pa.nulls(len(places), pa.float64()),
        ),
        limits={},
    )


def _pretrain_ids(clips: pa.Table, rows: Rows) -> pa.Array:
    """Ids of rows; where sources are few the same row can be drawn again, as another sample."""
    n = rows.shape[1]
    repeats = pd.DataFrame(rows).groupby(list(range(n))).cumcount().to_numpy()
    names = clips["clip_id"].take(pa.array(rows.ravel())).to_pylist()
    members = zip(*[iter(names)] * n, strict=True)
    parts = (("pretrain", *m, str(k)) for m, k in zip(members, repeats, strict=True))
    return pa.array(stable_ids(parts), pa.string())


def _splits(clips: pa.Table, cfg: ManifestsConfig) -> npt.NDArray[np.str_]:
    """(B,) split of each clip's source."""
    sources = pc.dictionary_encode(clips["source_id"].combine_chunks())
    names = [split_of(s, cfg.val_percent, cfg.test_percent) for s in sources.dictionary.to_pylist()]
    return np.array(names, dtype="U5")[sources.indices.to_numpy()]


def _rejects(
    ids: pa.ChunkedArray,
    stage: str,
    reasons: pa.Array,
    details: pa.Array,
    uris: pa.ChunkedArray,
    scores: pa.Array,
) -> pa.Table:
    columns = {
        "record_id": ids,
        "stage": pa.repeat(stage, len(reasons)),
        "reason": reasons,
        "detail": details,
        "uri": uris,
        "failed": np.zeros(len(reasons), np.bool_),
        "score": scores,
    }
    return pa.table(columns, schema=REJECTS.schema)
