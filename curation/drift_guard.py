"""The guard of a refresh: limits to how far a snapshot may lie from the one before it."""

from __future__ import annotations

from collections.abc import Iterable

from curation.snapshot_diff import SnapshotDiff
from schemas.config.curation import DriftConfig
from schemas.errors import DriftTooLarge
from schemas.layout import Snapshot

_GUARDED = ("duration_s", "height_px", "similarity", "caption_similarity")
"""Distributions that ``max_distance`` is about."""


def check_drift(diff: SnapshotDiff, new: Snapshot, limits: DriftConfig) -> None:
    """Refuse a snapshot that differs too much from the one before.

    Raises:
        DriftTooLarge: It passes a limit. The message names each that is passed.
    """
    passed = [*_dropped_too_many(diff, limits), *_shares_too_far(diff, limits)]
    passed += _too_distant(diff, limits)
    if passed:
        raise DriftTooLarge(
            "the new snapshot differs more from the one before than curation.drift allows",
            where=new.root,
            found="; ".join(found for found, _ in passed),
            expected="; ".join(dict.fromkeys(expected for _, expected in passed)),
            do=f"the snapshot is finished, but LATEST still names {diff.old}. Look at it with "
            f"`triptych diff {diff.old} {diff.new}`. To accept it, raise the limit or leave it "
            "empty, and refresh again: nothing is computed anew. Else mend the inputs or settings",
        )


def _dropped_too_many(diff: SnapshotDiff, limits: DriftConfig) -> Iterable[tuple[str, str]]:
    clips, limit = diff.clips, limits.max_dropped_ratio
    if limit is not None and clips.old and clips.dropped / clips.old > limit:
        why = clips.why_dropped[0]
        yield (
            f"{clips.dropped} of {clips.old} clips are gone ({clips.dropped / clips.old:.3f}), "
            f"{why.count} of them by {why.stage}/{why.reason}",
            f"a share of at most {limit:g} (max_dropped_ratio)",
        )


def _shares_too_far(diff: SnapshotDiff, limits: DriftConfig) -> Iterable[tuple[str, str]]:
    limit = limits.max_reject_change
    for share in diff.shares:
        if limit is not None and share.reason is None and abs(share.change) > limit:
            yield (
                f"stage {share.stage} left out {share.old_share:.3f} of its records, now "
                f"{share.new_share:.3f}",
                f"a change of at most {limit:g} (max_reject_change)",
            )


def _too_distant(diff: SnapshotDiff, limits: DriftConfig) -> Iterable[tuple[str, str]]:
    limit = limits.max_distance
    for drift in diff.drift:
        if limit is not None and drift.name in _GUARDED and drift.distance > limit:
            yield (
                f"the distributions of {drift.name} are {drift.distance:.3f} apart",
                f"a Kolmogorov-Smirnov distance of at most {limit:g} (max_distance)",
            )
