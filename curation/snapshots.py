"""A snapshot in the making: tables in a hidden folder, which a rename makes immutable."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from schemas.config.files import dump_yaml
from schemas.config.root import TriptychConfig
from schemas.counts import StageCount, count_reasons
from schemas.layout import Snapshot
from schemas.rows import Reject
from schemas.storage import (
    fingerprint,
    fingerprint_folder,
    mark_done,
    point_latest,
    read_done,
    read_json,
    write_json,
    write_text,
)
from schemas.tables import REJECTS, Table, read_table, write_table

log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True)
class Building:
    """Tables of one refresh before they are published.

    Attributes:
        dataset: Folder of all snapshots of the dataset.
        snapshot_id: Fingerprint of everything the tables are made from.
        metadata: Key-value metadata of every table.
    """

    dataset: Path
    snapshot_id: str
    metadata: Mapping[str, str]

    @property
    def tables(self) -> Snapshot:
        """Where the tables lie until they are published."""
        return Snapshot(self.dataset / f".building-{self.snapshot_id}")

    def read(self, table: Table[R], name: str) -> list[R]:
        """A table that an earlier stage has written."""
        return read_table(self.tables.table(name), table)

    def write(self, table: Table[R], path: Path, rows: Iterable[R]) -> None:
        """Write a table atomically, with the snapshot's metadata."""
        write_table(path, table, rows, {"snapshot": self.snapshot_id, **self.metadata})

    def finish(
        self,
        stage: str,
        unit: str,
        started: float,
        *,
        received: int,
        kept: int,
        rejects: Sequence[Reject],
        reused: int = 0,
        produced: int | None = None,
    ) -> StageCount:
        """Reconcile a stage's counts and keep them and its rejects; ``started`` is monotonic time.

        Raises:
            ReconciliationError: The counts do not add up.
        """
        failed = sum(r.failed for r in rejects)
        count = StageCount(
            stage=stage,
            unit=unit,
            input=received,
            kept=kept,
            rejected=len(rejects) - failed,
            failed=failed,
            reused=reused,
            produced=produced,
            seconds=round(time.monotonic() - started, 3),
            reasons=count_reasons(r.reason for r in rejects),
        ).check()
        self.write(REJECTS, self._part(stage, "parquet"), rejects)
        write_json(self._part(stage, "json"), count.to_dict())
        log.info(
            "stage=%s state=done input=%d kept=%d rejected=%d failed=%d reused=%d seconds=%.1f",
            stage, received, kept, count.rejected, failed, reused, count.seconds,
        )  # fmt: skip
        return count

    def published(self) -> Snapshot | None:
        """The finished snapshot of exactly these inputs, if there is one."""
        folder = self.dataset / self.snapshot_id
        return Snapshot(folder) if read_done(folder) else None

    def publish(self, stages: Sequence[str], config: TriptychConfig) -> Snapshot:
        """Join the stages' rejects and counts, mark as done, rename, and move ``LATEST``.

        If this very snapshot is already there, only ``LATEST`` moves. A snapshot with failed
        records gets an id of its own, so that the next refresh tries them again.
        """
        snapshot = self.published() or self._complete(stages, config)
        shutil.rmtree(self.tables.root, ignore_errors=True)
        point_latest(self.dataset, snapshot.root.name)
        log.info("stage=publish state=done snapshot=%s", snapshot.root.name)
        return snapshot

    def _complete(self, stages: Sequence[str], config: TriptychConfig) -> Snapshot:
        root = self.tables.root
        rejects = [r for s in stages for r in read_table(self._part(s, "parquet"), REJECTS)]
        counts = [read_json(self._part(s, "json")) for s in stages]
        failed = sorted(r.record_id for r in rejects if r.failed)
        name = fingerprint(self.snapshot_id, failed) if failed else self.snapshot_id
        self.write(REJECTS, self.tables.table("rejects"), rejects)
        write_json(self.tables.counts, counts)
        write_text(root / "config.yaml", dump_yaml(config))
        shutil.rmtree(root / "stages")
        mark_done(
            root,
            {
                "snapshot_id": name,
                "fingerprint": fingerprint_folder(root, "**/*.parquet"),
                "complete": not failed,
                "counts": counts,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        snapshot = Snapshot(self.dataset / name)
        if not read_done(snapshot.root):
            root.rename(snapshot.root)
        return snapshot

    def _part(self, stage: str, suffix: str) -> Path:
        """Rejects (parquet) and count (json) of one stage, until publish joins them."""
        return self.tables.root / "stages" / f"{stage}.{suffix}"
