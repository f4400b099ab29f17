"""What a newer snapshot of a dataset added to an older one, what it dropped, and why.

Everything is derived from the two snapshots' own tables. A record that only one of them has is
there for exactly one reason, named by the stage at which the two part. The same search serves both
directions: what was added is what the older snapshot lacks of the newer one.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curation.clips import STAGE as CLIPS_STAGE
from curation.diff_search import KEYS, TRAINER_SETTINGS, Search, Side, Why
from curation.drift import Drift, ShareChange, measure_drift, share_changes
from curation.manifests import PRETRAIN_STAGE, SFT_STAGE
from curation.sources import STAGE as SOURCES_STAGE
from schemas.arrow_compute import pc
from schemas.layout import Snapshot
from schemas.storage import read_done
from schemas.tables import read_metadata

_NO_DATA = (
    "curation.ablation.", "curation.drift.", "curation.max_error_ratio",
    "curation.sources.cache_limit_gb", "curation.embedding.batch_clips",
    "curation.embedding.num_gpus",
)  # fmt: skip
"""Settings that change no table."""

_NOTES = {
    "similarity model": "model_id",
    "similarity weights": "weights_sha256",
    "triptych version": "code_version",
}
"""Named by the metadata of tables: the weights behind a path may change, and so may the code."""

_EXAMPLES = 3


@dataclass(frozen=True)
class Reason:
    """How many records share a reason.

    ``examples`` are files: those of the first few sources or clips; none for samples.
    """

    stage: str
    reason: str
    count: int
    examples: list[str]


@dataclass(frozen=True)
class RecordsDiff:
    """What became of the records of one kind.

    Attributes:
        old: How many the older snapshot has: kept + dropped.
        new: How many the newer one has: kept + added.
        kept: How many have the same id in both.
        dropped: How many only the older one has.
        added: How many only the newer one has.
        why_dropped: One reason for each dropped record, commonest first. Rejected ones have the
            reason of the newer snapshot's rejects table. Others: ``gone`` (a file that the inputs
            no longer give), ``content_changed`` (other bytes under the same name),
            ``boundaries_changed`` (no such shot), ``span_changed`` (the shot is cut up otherwise),
            ``neighbours_changed`` (other clips follow each other), ``settings_changed``,
            ``redrawn`` (pretrain samples: the draw depends on all clips).
        why_added: Likewise; ``was_<reason>`` for what the older snapshot rejected, ``new_file``
            instead of ``gone``.
        altered: Kept records that differ: ``renamed`` sources (same bytes, other name),
            ``recaptioned`` clips, ``split_changed`` and ``trainable_changed`` samples.
    """

    old: int
    new: int
    kept: int
    dropped: int
    added: int
    why_dropped: list[Reason]
    why_added: list[Reason]
    altered: list[Reason]


@dataclass(frozen=True)
class SettingChange:
    """A setting (dotted key), or a model or version behind the tables, with another value.

    None where it was not set or not known.
    """

    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class SnapshotDiff:
    """All differences of two snapshots, of which ``old`` and ``new`` are the names."""

    old: str
    new: str
    sources: RecordsDiff
    clips: RecordsDiff
    sft: RecordsDiff
    pretrain: RecordsDiff
    settings: list[SettingChange]
    drift: list[Drift]
    shares: list[ShareChange]

    @property
    def records(self) -> dict[str, RecordsDiff]:
        """By kind, in the order in which one is made of the other."""
        return {
            "sources": self.sources,
            "clips": self.clips,
            "SFT samples": self.sft,
            "pretrain samples": self.pretrain,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def previous_of(snapshot: Snapshot) -> Snapshot | None:
    """The snapshot that ``LATEST`` named when this one took its place.

    None where there was none, or where it has been removed since.
    """
    name = (read_done(snapshot.root) or {}).get("previous")
    folder = snapshot.root.parent / str(name)
    return Snapshot(folder) if name and read_done(folder) else None


def diff_snapshots(old: Snapshot, new: Snapshot) -> SnapshotDiff:
    """Compare two finished snapshots of one dataset.

    Raises:
        ManifestError: A table or ``config.yaml`` is missing, or of an unknown version.
    """
    before, after = Side(old), Side(new)
    settings = _changed_settings(before, after)
    changed = {s.key for s in settings}
    dropped = Search(before, after, changed, backwards=False)
    added = Search(after, before, changed, backwards=True)
    return SnapshotDiff(
        old=old.root.name,
        new=new.root.name,
        sources=_records("sources", dropped, added),
        clips=_records("clips", dropped, added),
        sft=_records("sft", dropped, added),
        pretrain=_records("pretrain", dropped, added),
        settings=settings,
        drift=measure_drift(old, new, after.settings["curation.manifests.statistic"]),
        shares=share_changes(old, new),
    )


_ALTERED = {
    "sources": {"uri": (SOURCES_STAGE, "renamed")},
    "clips": {"caption": (CLIPS_STAGE, "recaptioned")},
    "sft": {"split": (SFT_STAGE, "split_changed"), "trainable": (SFT_STAGE, "trainable_changed")},
    "pretrain": {
        "split": (PRETRAIN_STAGE, "split_changed"),
        "trainable": (PRETRAIN_STAGE, "trainable_changed"),
    },
}


def _records(kind: str, dropped: Search, added: Search) -> RecordsDiff:
    old, new = dropped.here.rows[kind], added.here.rows[kind]
    why_dropped, why_added = dropped.why(kind), added.why(kind)
    return RecordsDiff(
        old=old.num_rows,
        new=new.num_rows,
        kept=old.num_rows - len(why_dropped),
        dropped=len(why_dropped),
        added=len(why_added),
        why_dropped=_tally(kind, dropped.lost[kind], why_dropped),
        why_added=_tally(kind, added.lost[kind], why_added),
        altered=_altered(kind, old, new),
    )


def _tally(kind: str, lost: pa.Table, why: Mapping[str, Why]) -> list[Reason]:
    counts: dict[Why, int] = defaultdict(int)
    files: dict[Why, dict[str, None]] = defaultdict(dict)
    ids = lost[KEYS[kind]].to_pylist()
    uris = lost["uri"].to_pylist() if "uri" in lost.column_names else [None] * len(ids)
    for record_id, uri in zip(ids, uris, strict=True):
        reason = why[record_id]
        counts[reason] += 1
        if uri is not None and len(files[reason]) < _EXAMPLES:
            files[reason][uri] = None
    ordered = sorted(counts, key=lambda r: (-counts[r], r))
    return [Reason(*reason, counts[reason], list(files[reason])) for reason in ordered]


def _altered(kind: str, old: pa.Table, new: pa.Table) -> list[Reason]:
    key = KEYS[kind]
    at = pc.index_in(new[key], value_set=old[key])
    before, after = old.take(at.drop_null()), new.filter(at.is_valid())
    reasons: list[Reason] = []
    for column, why in _ALTERED[kind].items():
        other = pc.not_equal(before[column], after[column])
        if count := pc.sum(other).as_py():
            examples = _renamings(before.filter(other), after.filter(other))
            reasons.append(Reason(*why, count, examples))
    return reasons


def _renamings(before: pa.Table, after: pa.Table) -> list[str]:
    """Files of the first few rows, with both names where they differ."""
    if "uri" not in before.column_names:
        return []
    pairs = zip(before["uri"].to_pylist(), after["uri"].to_pylist(), strict=True)
    names = dict.fromkeys(a if a == b else f"{a} → {b}" for a, b in pairs)
    return list(names)[:_EXAMPLES]


def _changed_settings(old: Side, new: Side) -> list[SettingChange]:
    """What the tables depend on, where it differs: settings, model behind them, code."""
    keys = dict.fromkeys([*new.settings, *old.settings])
    relevant = [
        key
        for key in keys
        if key in TRAINER_SETTINGS or (key.startswith("curation.") and not key.startswith(_NO_DATA))
    ]
    changes = [SettingChange(k, old.settings.get(k), new.settings.get(k)) for k in relevant]
    notes = [read_metadata(side.snapshot.manifest("sft")) for side in (old, new)]
    changes += [SettingChange(label, *(n.get(key) for n in notes)) for label, key in _NOTES.items()]
    return [c for c in changes if c.old != c.new]
