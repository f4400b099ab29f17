"""A snapshot in the making: tables in a hidden folder, which a rename makes immutable."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from schemas.config.files import dump_yaml
from schemas.config.root import TriptychConfig
from schemas.counts import StageCount, count_reasons
from schemas.layout import Snapshot
from schemas.rows import Reject
from schemas.storage import (
    fingerprint,
    fingerprint_folder,
    latest,
    mark_done,
    point_latest,
    read_done,
    read_json,
    write_json,
    write_text,
)
from schemas.tables import (
    REJECTS,
    Table,
    read_arrow,
    read_table,
    to_arrow,
    write_batches,
    write_table,
)

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

    def write_batches(self, table: Table[Any], path: Path, batches: Iterable[pa.Table]) -> int:
        """Like :meth:`write`, from Arrow tables in order. Returns the number of rows."""
        return write_batches(path, table, batches, {"snapshot": self.snapshot_id, **self.metadata})

    def finish(
        self,
        stage: str,
        unit: str,
        started: float,
        *,
        received: int,
        kept: int,
        rejects: Sequence[Reject] | pa.Table,
        reused: int = 0,
        produced: int | None = None,
    ) -> StageCount:
        """Reconcile a stage's counts and keep them and its rejects; ``started`` is monotonic time.

        Raises:
            ReconciliationError: The counts do not add up.
        """
        table: Any = rejects if isinstance(rejects, pa.Table) else to_arrow(REJECTS, rejects)
        table = table.sort_by([(name, "ascending") for name in REJECTS.sort])
        failed = int(table["failed"].to_numpy().sum())
        count = StageCount(
            stage=stage,
            unit=unit,
            input=received,
            kept=kept,
            rejected=table.num_rows - failed,
            failed=failed,
            reused=reused,
            produced=produced,
            seconds=round(time.monotonic() - started, 3),
            reasons=count_reasons(table["reason"].to_pylist()),
        ).check()
        self.write_batches(REJECTS, self._part(stage, "parquet"), [table])
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

    def complete(self, stages: Sequence[str], config: TriptychConfig) -> Snapshot:
        """Join the stages' rejects and counts, mark as done, and rename.

        If this very snapshot is already there, it stays. One with failed records gets an id of its
        own, so that the next refresh tries them again.
        """
        snapshot = self.published() or self._complete(stages, config)
        shutil.rmtree(self.tables.root, ignore_errors=True)
        return snapshot

    def publish(self, snapshot: Snapshot) -> None:
        """Let ``LATEST`` name a complete snapshot, which notes which one it named before."""
        before, done = latest(self.dataset), read_done(snapshot.root)
        assert done is not None, "complete() must run first"
        if before != snapshot.root:
            mark_done(snapshot.root, {**done, "previous": before.name if before else None})
            point_latest(self.dataset, snapshot.root.name)
        log.info("stage=publish state=done snapshot=%s", snapshot.root.name)

    def _complete(self, stages: Sequence[str], config: TriptychConfig) -> Snapshot:
        root = self.tables.root
        # Each stage's rejects are in order, and the stage comes first in it.
        parts = [read_arrow(self._part(s, "parquet"), REJECTS) for s in sorted(stages)]
        counts = [read_json(self._part(s, "json")) for s in stages]
        failed = sorted(i for p in parts for i in p.filter(p["failed"])["record_id"].to_pylist())
        name = fingerprint(self.snapshot_id, failed) if failed else self.snapshot_id
        self.write_batches(REJECTS, self.tables.table("rejects"), parts)
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
