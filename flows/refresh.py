"""Flow ``refresh-dataset``: from videos to an immutable snapshot with three-scene manifests."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from curation.pipeline import stop_ray
from curation.refresh import Refresh
from curation.snapshot_diff import diff_snapshots
from flows.artifacts import leave_counts, leave_summary
from flows.diff import headline
from schemas.config import TriptychConfig
from schemas.counts import StageCount
from schemas.errors import ManifestError
from schemas.layout import Snapshot
from schemas.storage import read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RefreshResult:
    """The published snapshot's folder, and what became of every record."""

    snapshot: Path
    counts: list[StageCount]


@flow(name="refresh-dataset", description=__doc__)
def refresh_dataset(config: TriptychConfig) -> RefreshResult:
    """Publish a snapshot of the configured sources; unchanged inputs give the snapshot there is.

    Raises:
        InputError: A configured input matches nothing.
        TooManyFailures: A stage's share of failed records passes ``max_error_ratio``.
        ReconciliationError: A stage lost or invented records.
        DriftTooLarge: The snapshot passes a limit of ``curation.drift``; LATEST stays as it is.
    """
    refresh = Refresh(config)
    try:
        counts = [find_sources(refresh)]
        unchanged = refresh.published()
        if unchanged is not None:
            counts += stored_counts(unchanged)[1:]
        else:
            counts.append(detect_shots(refresh))
            counts.append(trim_clips(refresh))
            counts.append(filter_clips(refresh))
            if refresh.scorers:
                counts.append(score_clips(refresh))
            counts.append(embed_clips(refresh))
            counts.append(drop_duplicates(refresh))
            counts.append(compare_windows(refresh))
            counts += write_manifests(refresh)
            if config.curation.export.mode != "none":
                counts.append(export_clips(refresh))
    finally:
        stop_ray()
    before = refresh.latest()
    snapshot = publish(refresh)
    if before is not None and before != snapshot:
        compare(before, snapshot)
    leave_counts("refresh-counts", counts)
    facts = {"snapshot": snapshot.root, "unchanged": unchanged is not None}
    leave_summary("refresh-summary", "Dataset refresh", facts)
    return RefreshResult(snapshot.root, counts)


def stored_counts(snapshot: Snapshot) -> list[StageCount]:
    """The counts a finished snapshot was made with, all marked as reused."""
    counts = [StageCount(**values) for values in read_json(snapshot.counts)]
    return [dataclasses.replace(c, reused=c.input, seconds=0.0) for c in counts]


@task(name="sources", cache_policy=NO_CACHE)
def find_sources(refresh: Refresh) -> StageCount:
    """Find, fingerprint and probe the videos."""
    return refresh.sources()


@task(name="shots", cache_policy=NO_CACHE)
def detect_shots(refresh: Refresh) -> StageCount:
    """Cut every source into shots."""
    return refresh.shots()


@task(name="clips", cache_policy=NO_CACHE)
def trim_clips(refresh: Refresh) -> StageCount:
    """Trim shots to clips and give them their captions."""
    return refresh.clips()


@task(name="filters", cache_policy=NO_CACHE)
def filter_clips(refresh: Refresh) -> StageCount:
    """Leave out clips by their measured scores."""
    return refresh.filters()


@task(name="scores", cache_policy=NO_CACHE)
def score_clips(refresh: Refresh) -> StageCount:
    """Score clips by the configured networks, and leave out those below a threshold."""
    return refresh.scores()


@task(name="embeddings", cache_policy=NO_CACHE)
def embed_clips(refresh: Refresh) -> StageCount:
    """Describe every clip by a vector."""
    return refresh.embeddings()


@task(name="dedup", cache_policy=NO_CACHE)
def drop_duplicates(refresh: Refresh) -> StageCount:
    """Leave out clips that look almost like another one."""
    return refresh.dedup()


@task(name="windows", cache_policy=NO_CACHE)
def compare_windows(refresh: Refresh) -> StageCount:
    """Compare consecutive clips."""
    return refresh.windows()


@task(name="manifests", cache_policy=NO_CACHE)
def write_manifests(refresh: Refresh) -> list[StageCount]:
    """Write the sft and the pretrain manifest."""
    return list(refresh.manifests())


@task(name="export", cache_policy=NO_CACHE)
def export_clips(refresh: Refresh) -> StageCount:
    """Write clips as files of their own."""
    return refresh.export()


@task(name="publish", cache_policy=NO_CACHE)
def publish(refresh: Refresh) -> Snapshot:
    """Make the finished tables a snapshot and let LATEST name it."""
    return refresh.publish()


@task(name="diff", cache_policy=NO_CACHE)
def compare(before: Snapshot, snapshot: Snapshot) -> None:
    """Say what changed since the snapshot that LATEST named before."""
    try:
        diff = diff_snapshots(before, snapshot)
    except ManifestError as error:
        # The new snapshot is published by now; only the old one may be unreadable.
        log.warning("stage=diff state=skipped old=%s error=%s", before.root.name, error.what)
        return
    changes = [f"{k.replace(' ', '_')}=+{r.added}-{r.dropped}" for k, r in diff.records.items()]
    log.info("stage=diff state=done old=%s %s", diff.old, " ".join(changes))
    command = f"`triptych diff {diff.old} {diff.new}`"
    leave_summary("refresh-diff", f"Since snapshot {diff.old}", {**headline(diff), "more": command})
