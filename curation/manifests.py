"""Manifests, which training reads: ``sft`` of related scenes, ``pretrain`` of unrelated ones.

Verdicts are taken here from stored scores, so another threshold costs one pass over a table.
Everything is a pure function of its inputs, whatever order they come in.

Shape legend: W windows, M samples, N scenes per sample, B clips.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from pandas.util import hash_array

from curation.selection import KEPT, REASONS, Candidates, candidates
from schemas.config.curation import ManifestsConfig
from schemas.errors import ManifestError
from schemas.rows import Scene, stable_ids
from schemas.tables import REJECTS, SAMPLES, list_column

pc: Any = pyarrow.compute
"""Its functions are made at run time, where type checkers do not see them."""

SFT_STAGE = "manifest_sft"
PRETRAIN_STAGE = "manifest_pretrain"

SCENE_COLUMNS = tuple(field.name for field in dataclasses.fields(Scene))
CLIP_COLUMNS = (*SCENE_COLUMNS, "trainable_pretrain", "trainable_sft")
"""What of the clips is needed here."""

_ROWS = 16384
"""Samples made at once."""

_MIXING_ROUNDS = 16

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
    place = _number("split", source_id) % 100
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
    names = clips["clip_id"].to_numpy()
    hashes: Any = hash_array(names, hash_key=_KEY, categorize=False)  # pyright: ignore
    keys = _mixed(hashes, cfg.seed)
    splits = _splits(clips, cfg)
    trainable = clips["trainable_pretrain"].to_numpy()
    silent = np.repeat(np.flatnonzero(~captioned), cfg.uses_per_clip)
    drawn: list[Rows] = []
    unused: list[Rows] = []
    for split in np.unique(splits):
        for accepted in (False, True):
            group = np.flatnonzero(captioned & (splits == split) & (trainable == accepted))
            rows, left = _draw(
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


def _draw(
    clips: Rows, sources: Rows, keys: npt.NDArray[np.uint64], n: int, uses: int
) -> tuple[Rows, Rows]:
    """Rows of ``n`` clips from different sources, and the uses left over.

    There are R rows for the largest R with ``sum(min(uses of source, R)) >= n * R``. The uses are
    laid down column by column, those of a source one after the other: so they come to different
    rows. Then rows exchange clips at random, wherever both keep ``n`` sources.
    """
    # Uses of a source: all its clips in the order of their keys, then all again.
    order = np.lexsort((keys, sources))
    begins = np.flatnonzero(np.diff(sources[order], prepend=-1))
    counts = np.diff(begins, append=len(order))
    rounds = np.tile(np.arange(uses), (len(order), 1)).T
    place = np.arange(len(order)) - np.repeat(begins, counts)
    turn = (rounds * np.repeat(counts, counts) + place).ravel()  # of a use within its source
    clip = np.tile(order, uses)
    group = np.tile(np.repeat(np.arange(len(counts)), counts), uses)
    num_rows = _most_rows(counts * uses, n)
    takes = np.minimum(counts * uses, num_rows)
    spare = int(takes.sum()) - n * num_rows
    # A few uses too many: the sources with most uses give one each.
    takes[np.lexsort((np.arange(len(takes)), -takes))[:spare]] -= 1
    used = turn < takes[group]
    left = np.sort(clip[~used])
    if not num_rows:
        return np.empty((0, n), np.intp), clips[left]
    shuffled = np.argsort(np.argsort(keys[order][begins], kind="stable"))
    laid = np.lexsort((turn[used], shuffled[group[used]]))
    grid = clip[used][laid].reshape(n, num_rows).T
    generator = np.random.Generator(np.random.PCG64(int(keys.min())))
    return clips[_exchange(grid, sources, generator)], clips[left]


def _most_rows(counts: Rows, n: int) -> int:
    """The largest R with ``sum(min(counts, R)) >= n * R``."""
    low, high = 0, int(counts.sum()) // n
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() >= n * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _exchange(grid: Rows, sources: Rows, generator: np.random.Generator) -> Rows:
    """Exchange clips of a column between random pairs of rows that both keep distinct sources."""
    grid = grid.copy()
    for _ in range(_MIXING_ROUNDS):
        for column in range(grid.shape[1]):
            shuffled = generator.permutation(len(grid))
            a, b = shuffled[: len(grid) // 2], shuffled[len(grid) // 2 :][: len(grid) // 2]
            others = [k for k in range(grid.shape[1]) if k != column]
            of_a, of_b = sources[grid[a, column]], sources[grid[b, column]]
            clash = (sources[grid[a[:, None], others]] == of_b[:, None]).any(axis=1)
            clash |= (sources[grid[b[:, None], others]] == of_a[:, None]).any(axis=1)
            a, b = a[~clash], b[~clash]
            grid[a, column], grid[b, column] = grid[b, column], grid[a, column]
    return grid


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


_KEY = "triptych-clip-id"
"""Sixteen bytes that pandas' string hash wants."""


def _mixed(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Other random-looking numbers for every seed. Source: SplitMix64 (Steele et al., 2014)."""
    z = keys + np.uint64(_number(seed))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _number(*parts: object) -> int:
    """A number that depends only on ``parts`` and looks random."""
    digest = hashlib.sha256("\x1f".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")
