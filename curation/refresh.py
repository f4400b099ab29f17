"""One refresh of a dataset, stage by stage, ending in an immutable snapshot.

Costly work (probing, decoding, embedding) is kept in the workspace's cache under content keys;
everything else is computed anew from it. Each stage writes its table into a hidden folder beside
the snapshots, which ``publish`` renames. Tables hold nothing but functions of the inputs: no times,
no run ids, no trace of what was reused.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curation import pipeline
from curation.captions import CaptionSpan, read_captions
from curation.clips import make_clips
from curation.embeddings import load_embedder
from curation.manifests import PRETRAIN_STAGE, SFT_STAGE, pretrain_samples, sft_samples
from curation.pipeline import Failure, Piece
from curation.shots import ShotDetection
from curation.snapshots import Building
from curation.sources import list_videos, reject_duplicates
from curation.windows import make_windows
from schemas.config.root import TriptychConfig
from schemas.counts import StageCount
from schemas.layout import Snapshot, Workspace
from schemas.rows import Clip, Embedding, Reject, Sample, Shot, Source
from schemas.storage import fingerprint, read_json
from schemas.tables import (
    CLIPS,
    EMBEDDINGS,
    SAMPLES,
    SHOTS,
    SOURCES,
    WINDOWS,
    read_table,
)

log = logging.getLogger(__name__)

STAGES = (
    "sources", "shots", "clips", "embeddings", "windows", SFT_STAGE, PRETRAIN_STAGE,
)  # fmt: skip
"""In the order they run."""

STAGE_VERSION = {
    "sources": 1,
    "shots": 1,
    "clips": 1,
    "embeddings": 1,
    "windows": 1,
    "manifests": 1,
}
"""Raise one when its stage's code gives other results: what was made before is then redone."""

_CLIPS_PER_PIECE = 64


class Refresh:
    """A refresh. Call the stages in order; each returns its reconciled count.

    ``sources()`` comes first and fixes ``snapshot_id``, a fingerprint of all inputs. If
    ``published()`` then gives a snapshot, nothing has changed and only ``publish()`` is left to
    call, which makes ``LATEST`` name it.
    """

    def __init__(self, config: TriptychConfig, workspace: Workspace | None = None) -> None:
        self.config = config
        self.workspace = workspace or Workspace(Path(config.workspace).absolute())
        self.snapshot_id = ""

    def sources(self) -> StageCount:
        """Find and probe the videos.

        Raises:
            InputError: A configured input matches nothing, or the captions file is malformed.
            TooManyFailures: A larger share than ``max_error_ratio`` met an unexpected error.
        """
        started = time.monotonic()
        paths = list_videos(self.config.curation.sources)
        pieces = [self._probe_piece(path) for path in paths]
        missing = [p for p in pieces if not p.path.is_file()]
        failures = pipeline.probe_sources(missing, self.config.engine)
        rejects = [_failed(f, "sources", f.record_id) for f in failures]
        found: list[Source] = []
        done = [p for p in pieces if p.record_id not in {f.record_id for f in failures}]
        for record in (read_json(p.path) for p in done):
            if "source" in record:
                found.append(Source(**record["source"]))
            else:
                rejects.append(Reject(**record["reject"]))
        kept, duplicates = reject_duplicates(found)
        rejects += duplicates
        self.snapshot_id = self._snapshot_id(found, rejects)
        self._building.write(SOURCES, self._building.tables.table("sources"), kept)
        return self._finish(
            "sources",
            "source",
            started,
            received=len(paths),
            kept=len(kept),
            rejects=rejects,
            reused=len(pieces) - len(missing),
        )

    def published(self) -> Snapshot | None:
        """The finished snapshot of exactly these inputs, if an earlier run has made it."""
        return self._building.published()

    def shots(self) -> StageCount:
        """Decode each source once and cut it into shots.

        Raises:
            TooManyFailures: A larger share than ``max_error_ratio`` met an unexpected error.
        """
        started = time.monotonic()
        sources = self._building.read(SOURCES, "sources")
        config = self.config.curation.shots.model_dump(mode="json")
        pieces = {
            s.source_id: Piece(
                s.source_id,
                self._shots_path(s.source_id),
                {"source": dataclasses.asdict(s), "config": config},
            )
            for s in sources
        }
        missing = [p for p in pieces.values() if not p.path.is_file()]
        failures = {f.record_id: f for f in pipeline.find_shots(missing, self.config.engine)}
        shots: list[Shot] = []
        rejects: list[Reject] = []
        measured: list[Source] = []
        kept = 0
        for source in sources:
            if source.source_id in failures:
                rejects.append(_failed(failures[source.source_id], "shots", source.uri))
                measured.append(source)
                continue
            detection = self._detection(source)
            if isinstance(detection, Reject):
                rejects.append(detection)
                measured.append(source)
                continue
            kept += 1
            shots += detection.shots
            measured.append(
                dataclasses.replace(
                    source,
                    num_frames=detection.num_frames,
                    duration_s=detection.duration_s,
                    avg_fps=detection.avg_fps,
                    is_vfr=detection.is_vfr,
                )
            )
        self._building.write(SOURCES, self._building.tables.table("sources"), measured)
        self._building.write(SHOTS, self._building.tables.table("shots"), shots)
        return self._finish(
            "shots",
            "source",
            started,
            received=len(sources),
            kept=kept,
            rejects=rejects,
            reused=len(pieces) - len(missing),
            produced=len(shots),
        )

    def clips(self) -> StageCount:
        """Trim shots to clips and give them their captions."""
        started = time.monotonic()
        shots = _by_source(self._building.read(SHOTS, "shots"))
        captions = self._captions()
        model = self.config.training.model
        clips: list[Clip] = []
        rejects: list[Reject] = []
        for source in self._building.read(SOURCES, "sources"):
            if source.source_id not in shots:
                continue
            detection = self._detection(source)
            assert isinstance(detection, ShotDetection)
            made, refused = make_clips(
                source,
                shots[source.source_id],
                detection.frame_pts,
                captions.get(source.uri, []),
                self.config.curation.clips,
                frames=model.frames,
                max_stride=model.max_stride,
            )
            clips += made
            rejects += refused
        self._building.write(CLIPS, self._building.tables.table("clips"), clips)
        received = sum(map(len, shots.values()))
        return self._finish(
            "clips", "shot", started, received=received, kept=len(clips), rejects=rejects
        )

    def embeddings(self) -> StageCount:
        """Describe every clip by a vector.

        Raises:
            TooManyFailures: A larger share than ``max_error_ratio`` met an unexpected error.
        """
        started = time.monotonic()
        clips = _by_source(self._building.read(CLIPS, "clips"))
        cache = self._embeddings_cache()
        known = {e.clip_id: e for source_id in clips for e in _read_pieces(cache / source_id)}
        pieces: list[Piece] = []
        for source_id, of_source in clips.items():
            missing = [c for c in of_source if c.clip_id not in known]
            for i in range(0, len(missing), _CLIPS_PER_PIECE):
                batch = missing[i : i + _CLIPS_PER_PIECE]
                name = fingerprint([c.clip_id for c in batch])
                rows = [dataclasses.asdict(c) for c in batch]
                pieces.append(Piece(name, cache / source_id / f"{name}.parquet", {"clips": rows}))
        wanted = {c.clip_id: c for of_source in clips.values() for c in of_source}
        reused = sum(clip_id in known for clip_id in wanted)
        failures = pipeline.embed_clips(pieces, self.config.curation.embedding, self.config.engine)
        for folder in sorted({p.path.parent for p in pieces}):
            known |= {e.clip_id: e for e in _read_pieces(folder)}
        rows = [known[clip_id] for clip_id in wanted if clip_id in known]
        self._building.write(EMBEDDINGS, self._building.tables.table("embeddings"), rows)
        return self._finish(
            "embeddings",
            "clip",
            started,
            received=len(wanted),
            kept=len(rows),
            rejects=[_failed(f, "embeddings", wanted[f.record_id].uri) for f in failures],
            reused=reused,
        )

    def windows(self) -> StageCount:
        """Compare consecutive clips."""
        started = time.monotonic()
        cfg = self.config.curation.windows
        vectors: dict[str, npt.NDArray[np.floating]] = {
            e.clip_id: np.asarray(e.vector, np.float32)
            for e in self._building.read(EMBEDDINGS, "embeddings")
        }
        windows, rejects, received = [], [], 0
        for clips in _by_source(self._building.read(CLIPS, "clips")).values():
            made, refused = make_windows(clips, vectors, cfg)
            windows += made
            rejects += refused
            described = sum(c.clip_id in vectors for c in clips)
            received += max(0, described - cfg.scenes_per_sample + 1)
        self._building.write(WINDOWS, self._building.tables.table("windows"), windows)
        return self._finish(
            "windows", "window", started, received=received, kept=len(windows), rejects=rejects
        )

    def manifests(self) -> tuple[StageCount, StageCount]:
        """Write the sft and the pretrain manifest; returns the count of each, in this order.

        Raises:
            ManifestError: Too few sources for pre-training samples.
        """
        started = time.monotonic()
        cfg = self.config.curation.manifests
        clips = self._building.read(CLIPS, "clips")
        windows = self._building.read(WINDOWS, "windows")
        sft, rejects = sft_samples(windows, clips, cfg)
        self._building.write(SAMPLES, self._building.tables.manifest("sft"), sft)
        sft_count = self._finish(
            SFT_STAGE, "window", started, received=len(windows), kept=len(sft), rejects=rejects
        )
        started = time.monotonic()
        pretrain, rejects = pretrain_samples(
            clips, self.config.curation.windows.scenes_per_sample, cfg
        )
        self._building.write(SAMPLES, self._building.tables.manifest("pretrain"), pretrain)
        pretrain_count = self._finish(
            PRETRAIN_STAGE,
            "clip use",
            started,
            received=len(clips) * cfg.uses_per_clip,
            kept=_num_scenes(pretrain),
            rejects=rejects,
            produced=len(pretrain),
        )
        return sft_count, pretrain_count

    def publish(self) -> Snapshot:
        """Make the finished tables a snapshot and let ``LATEST`` name it (``Building.publish``)."""
        return self._building.publish(STAGES, self.config)

    @property
    def _building(self) -> Building:
        assert self.snapshot_id, "sources() must run first"
        return Building(
            self.workspace.dataset(self.config.curation.dataset),
            self.snapshot_id,
            {
                "config_hash": fingerprint(self._relevant_config()),
                "code_version": version("triptych"),
            },
        )

    def _finish(self, stage: str, unit: str, started: float, **numbers: Any) -> StageCount:
        count = self._building.finish(stage, unit, started, **numbers)
        return count.check_failures(self.config.curation.max_error_ratio)

    def _probe_piece(self, path: Path) -> Piece:
        """Keyed by path and stat: ctime changes with the content even where mtime was set back."""
        key = fingerprint(STAGE_VERSION["sources"], str(path), _stat(path))
        return Piece(
            str(path), self.workspace.cache("sources") / f"{key}.json", {"path": str(path)}
        )

    def _shots_path(self, source_id: str) -> Path:
        key = fingerprint(STAGE_VERSION["shots"], self.config.curation.shots.hash())
        return self.workspace.cache("shots") / f"{source_id}-{key}.json"

    def _detection(self, source: Source) -> ShotDetection | Reject:
        record = read_json(self._shots_path(source.source_id))
        if "reject" in record:
            # The piece is keyed by content: the same bytes may since have moved to another path.
            return dataclasses.replace(Reject(**record["reject"]), uri=source.uri)
        values = record["detection"]
        return ShotDetection(**(values | {"shots": [Shot(**s) for s in values["shots"]]}))

    def _embeddings_cache(self) -> Path:
        cfg = self.config.curation.embedding
        model = load_embedder(cfg.model, cfg.height_px)
        key = fingerprint(
            STAGE_VERSION["embeddings"], model.model_id, model.weights_sha256, cfg.hash()
        )
        return self.workspace.cache("embeddings") / key

    def _captions(self) -> dict[str, list[CaptionSpan]]:
        csv_path = self.config.curation.sources.captions_csv
        return read_captions(Path(csv_path)) if csv_path else {}

    def _relevant_config(self) -> dict[str, Any]:
        """What the tables depend on besides the sources and captions themselves."""
        curation = self.config.curation.model_dump(mode="json")
        used = ("shots", "clips", "embedding", "windows", "manifests")
        model = self.config.training.model
        return {k: curation[k] for k in used} | {
            "frames": model.frames,
            "max_stride": model.max_stride,
            "stages": STAGE_VERSION,
        }

    def _snapshot_id(self, found: Sequence[Source], rejects: Sequence[Reject]) -> str:
        uris = {s.uri for s in found}
        captions = {
            uri: [dataclasses.astuple(span) for span in spans]
            for uri, spans in self._captions().items()
            if uri in uris
        }
        if not captions and self.config.curation.sources.captions_csv:
            log.warning("stage=sources captions=0 no caption of the CSV belongs to a source")
        inputs = sorted([s.uri, s.source_id] for s in found)
        left_out = sorted([r.uri, r.reason] for r in rejects)
        return fingerprint(inputs, left_out, captions, self._relevant_config())


def _stat(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _failed(failure: Failure, stage: str, uri: str) -> Reject:
    return Reject(failure.record_id, stage, failure.reason, failure.detail, uri, failed=True)


def _by_source(rows: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        groups[row.source_id].append(row)
    return dict(groups)


def _read_pieces(folder: Path) -> list[Embedding]:
    """Embeddings of finished pieces. Unfinished ones have a hidden temporary name."""
    paths = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))
    return [row for path in paths for row in read_table(path, EMBEDDINGS)]


def _num_scenes(samples: Iterable[Sample]) -> int:
    return sum(len(s.scenes) for s in samples)
