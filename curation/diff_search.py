"""Why a record of one snapshot is not in another: one reason for each, from the tables alone.

The same search serves both directions: what a newer snapshot added is what the older one lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import yaml

from curation.clips import STAGE as CLIPS_STAGE
from curation.dedup import STAGE as DEDUP_STAGE
from curation.filters import SCORES_STAGE
from curation.filters import STAGE as FILTERS_STAGE
from curation.manifests import PRETRAIN_STAGE, SFT_STAGE
from curation.sources import STAGE as SOURCES_STAGE
from curation.windows import STAGE as WINDOWS_STAGE
from schemas.arrow_compute import pc
from schemas.errors import ManifestError
from schemas.layout import Snapshot
from schemas.tables import CLIPS, REJECTS, SAMPLES, SHOTS, SOURCES, read_arrow

SHOTS_STAGE = "shots"

_CLIP_STAGES = (CLIPS_STAGE, FILTERS_STAGE, SCORES_STAGE, "embeddings", DEDUP_STAGE)
"""Stages that take clips away. Later ones name clips too, but leave them in the table."""

TRAINER_SETTINGS = (
    "training.model.frames",
    "training.model.shorter_frames",
    "training.model.max_stride",
)
"""They decide which clips are trainable."""

_DRAW_SETTINGS = {
    "curation.manifests.uses_per_clip",
    "curation.manifests.seed",
    "curation.manifests.val_percent",
    "curation.manifests.test_percent",
    "curation.windows.scenes_per_sample",
    *TRAINER_SETTINGS,
}
"""The draw of pretrain samples depends on them."""

_SILENT = ("no_caption", "was_no_caption")
"""The one verdict on a clip that keeps it out of every pretrain sample."""

Why = tuple[str, str]
"""Stage and reason."""

KEYS = {
    "sources": "source_id",
    "clips": "clip_id",
    "sft": "sample_id",
    "pretrain": "sample_id",
}
"""The column that identifies a record of each kind."""


class Side:
    """One snapshot: of its tables the columns that are compared, read when they are needed."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    @cached_property
    def rows(self) -> dict[str, pa.Table]:
        """Tables by kind of record, and ``shots`` and ``rejects``."""
        at = self.snapshot
        # Of the scenes only their clips: the rest of them is in the clips table.
        sample = ["sample_id", "split", "trainable", "scenes.list.element.clip_id"]
        clip = ["clip_id", "shot_id", "source_id", "uri", "caption"]
        return {
            "sources": read_arrow(at.table("sources"), SOURCES, ["source_id", "uri"]),
            "shots": read_arrow(at.table("shots"), SHOTS, ["shot_id"]),
            "clips": read_arrow(at.table("clips"), CLIPS, clip),
            "sft": read_arrow(at.manifest("sft"), SAMPLES, sample),
            "pretrain": read_arrow(at.manifest("pretrain"), SAMPLES, sample),
            "rejects": read_arrow(
                at.table("rejects"), REJECTS, ["record_id", "stage", "reason", "uri"]
            ),
        }

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting by its dotted key, as the snapshot's own version of the code wrote it."""
        path = self.snapshot.root / "config.yaml"
        if not path.is_file():
            raise ManifestError(
                "a snapshot does not hold the settings it was made with",
                where=path,
                expected="config.yaml beside the tables",
                do="compare snapshots that `triptych refresh` has finished",
            )
        return dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8")), ""))


@dataclass
class Search:
    """Why records that are ``here`` are not ``there``.

    Attributes:
        here: The snapshot that has them.
        there: The one that has not.
        changed: Settings with another value.
        backwards: Whether ``there`` is the older one, so that its verdicts are past.
    """

    here: Side
    there: Side
    changed: set[str]
    backwards: bool

    @cached_property
    def lost(self) -> dict[str, pa.Table]:
        """The rows of each kind that only ``here`` has."""
        lost: dict[str, pa.Table] = {}
        for kind, key in KEYS.items():
            rows = self.here.rows[kind]
            found = pc.is_in(rows[key], value_set=self.there.rows[kind][key])
            lost[kind] = rows.filter(pc.invert(found))
        return lost

    def why(self, kind: str) -> dict[str, Why]:
        """One reason by id of each lost record of a kind."""
        match kind:
            case "sources":
                return self._sources
            case "clips":
                return self._clips
            case "sft":
                return self._sft()
            case _:
                return self._pretrain()

    @cached_property
    def _sources(self) -> dict[str, Why]:
        lost = self.lost["sources"]
        names = set(self.there.rows["sources"]["uri"].to_pylist())
        rejected = self._rejected((SOURCES_STAGE,), "uri", lost["uri"])
        gone = (SOURCES_STAGE, "new_file" if self.backwards else "gone")
        return {
            row["source_id"]: (SOURCES_STAGE, "content_changed")
            if row["uri"] in names
            else rejected.get(row["uri"], gone)
            for row in lost.to_pylist()
        }

    @cached_property
    def _clips(self) -> dict[str, Why]:
        lost = self.lost["clips"].select(["clip_id", "shot_id", "source_id"])
        unread = self._rejected((SHOTS_STAGE,), "record_id", lost["source_id"])
        # A shot that gave no clip at all is rejected under its own id.
        whole = self._rejected((CLIPS_STAGE,), "record_id", lost["shot_id"])
        rejected = self._rejected(_CLIP_STAGES, "record_id", lost["clip_id"])
        same_shot = pc.is_in(lost["shot_id"], value_set=self.there.rows["shots"]["shot_id"])
        why: dict[str, Why] = {}
        for row, has_shot in zip(lost.to_pylist(), same_shot.to_pylist(), strict=True):
            why[row["clip_id"]] = (
                self._sources.get(row["source_id"])
                or rejected.get(row["clip_id"])
                or whole.get(row["shot_id"])
                or unread.get(row["source_id"])
                or (
                    (CLIPS_STAGE, "span_changed")
                    if has_shot
                    else (SHOTS_STAGE, "boundaries_changed")
                )
            )
        return why

    def _sft(self) -> dict[str, Why]:
        lost = self.lost["sft"]
        rejected = self._rejected((WINDOWS_STAGE, SFT_STAGE), "record_id", lost["sample_id"])
        other_length = "curation.windows.scenes_per_sample" in self.changed
        reason = "settings_changed" if other_length else "neighbours_changed"
        return {
            sample_id: rejected.get(sample_id) or self._of_clips(clips) or (WINDOWS_STAGE, reason)
            for sample_id, clips in _scenes(lost)
        }

    def _pretrain(self) -> dict[str, Why]:
        lost = self.lost["pretrain"]
        clip_ids = pc.struct_field(pc.list_flatten(lost["scenes"]), "clip_id")
        rejected = self._rejected((PRETRAIN_STAGE,), "record_id", clip_ids)
        silent = {c: why for c, why in rejected.items() if why[1] in _SILENT}
        reason = "settings_changed" if self.changed & _DRAW_SETTINGS else "redrawn"
        return {
            sample_id: self._of_clips(clips)
            or next((silent[c] for c in clips if c in silent), (PRETRAIN_STAGE, reason))
            for sample_id, clips in _scenes(lost)
        }

    def _of_clips(self, clip_ids: Iterable[str]) -> Why | None:
        """Why the first of a sample's clips that is not there is not."""
        return next((self._clips[c] for c in clip_ids if c in self._clips), None)

    def _rejected(
        self, stages: tuple[str, ...], column: str, values: pa.ChunkedArray
    ) -> dict[str, Why]:
        """Verdicts of some stages ``there`` by ``column``, where it is one of ``values``."""
        rejects = self.there.rows["rejects"]
        wanted = pc.and_(
            pc.is_in(rejects["stage"], value_set=pa.array(stages)),
            pc.is_in(rejects[column], value_set=values),
        )
        past = "was_" if self.backwards else ""
        found = rejects.filter(wanted).select([column, "stage", "reason"])
        return {r[column]: (r["stage"], past + r["reason"]) for r in found.to_pylist()}


def _scenes(samples: pa.Table) -> Iterable[tuple[str, list[str]]]:
    """Id and clips of each sample."""
    for row in samples.select(["sample_id", "scenes"]).to_pylist():
        yield row["sample_id"], [scene["clip_id"] for scene in row["scenes"]]


def _flat(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
