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
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import pipeline
from curation.cache_keys import CacheKeys
from curation.caption_scores import caption_scores
from curation.captions import CaptionSpan, join_spans
from curation.clip_cache import (
    Scored,
    by_source,
    caption_pieces,
    score_clips,
    vector_pieces,
)
from curation.clips import make_clips
from curation.dedup import earlier_vectors, find_duplicates, reject_remuxed
from curation.drift_guard import check_drift
from curation.embeddings import load_embedder
from curation.filters import SCORES_STAGE, filter_clips, filter_scored
from curation.inputs import uris
from curation.inputs.downloads import Downloads
from curation.inputs.listing import captions_by_source, list_videos
from curation.manifests import (
    CLIP_COLUMNS,
    PRETRAIN_STAGE,
    SFT_STAGE,
    Manifest,
    pretrain_manifest,
    sft_manifest,
)
from curation.pipeline import Failure, Piece
from curation.scorers import NamedScorer, load_scorer, named_scorers
from curation.selection import WINDOW_COLUMNS
from curation.shots import ShotDetection
from curation.snapshot_diff import diff_snapshots
from curation.snapshots import Building
from curation.sources import reject_duplicates
from curation.vector_cache import CLIP_ID, TEXT_ID, PieceCache, text_id
from curation.windows import described_clips, num_runs, score_windows
from curation.workers import Limits
from schemas.config.curation import DriftConfig
from schemas.config.root import TriptychConfig
from schemas.counts import StageCount
from schemas.layout import Snapshot, Workspace
from schemas.rows import Clip, Export, Reject, Shot, Source
from schemas.storage import fingerprint, latest, read_done, read_json
from schemas.tables import (
    CAPTION_SCORES,
    CLIP_SCORES,
    CLIPS,
    EMBEDDINGS,
    EXPORTS,
    REJECTS,
    SAMPLES,
    SHOTS,
    SOURCES,
    WINDOWS,
    build_row,
    iter_tables,
    read_arrow,
    vectors_of,
)

log = logging.getLogger(__name__)

STAGES = (
    "sources", "shots", "clips", "filters", SCORES_STAGE, "embeddings", "dedup", "windows",
    SFT_STAGE, PRETRAIN_STAGE, "export",
)  # fmt: skip
"""In the order they run; ``scores`` and ``export`` only where they are configured."""


class Refresh:
    """A refresh. Call the stages in order; each returns its reconciled count.

    ``sources()`` comes first and fixes ``snapshot_id``, a fingerprint of all inputs. If
    ``published()`` then gives a snapshot, nothing has changed and only ``publish()`` is left to
    call, which makes ``LATEST`` name it.

    Raises:
        ConfigError: A threshold is set for a score without its weights, or weights are missing.
    """

    def __init__(self, config: TriptychConfig, workspace: Workspace | None = None) -> None:
        self.config = config
        self.workspace = workspace or Workspace(Path(config.workspace).absolute())
        self.downloads = Downloads(self.workspace.cache("downloads"), config.curation.sources)
        self.limits = Limits.of(config.curation.shots)
        self.scorers = named_scorers(config.curation.scorers, config.curation.filters)
        self._keys = CacheKeys(config, self.workspace, self.scorers)
        self.snapshot_id = ""
        self._captions: dict[str, tuple[CaptionSpan, ...]] = {}

    def sources(self) -> StageCount:
        """Find and probe the videos.

        Raises:
            InputError: A configured input matches nothing, or the captions file is malformed.
            TooManyFailures: A larger share than ``max_error_ratio`` met an unexpected error.
        """
        started = time.monotonic()
        cfg = self.config.curation
        listing = list_videos(cfg.sources, self.downloads)
        pieces = [
            Piece(video.uri, self._keys.probe(video.uri), {"uri": video.uri})
            for video in listing.videos
        ]
        # A remote file may have changed behind its name; asking costs no second download.
        missing = [p for p in pieces if uris.path_of(p.record_id) is None or not p.path.is_file()]
        failures = pipeline.probe_sources(missing, self.downloads, self.limits, self.config.engine)
        rejects = [*listing.rejects, *(_failed(f, "sources", f.record_id) for f in failures)]
        found: list[Source] = []
        done = [p for p in pieces if p.record_id not in {f.record_id for f in failures}]
        for record in (read_json(p.path) for p in done):
            if "source" in record:
                found.append(Source(**record["source"]))
            else:
                rejects.append(Reject(**record["reject"]))
        self._captions = captions_by_source(listing.videos, found)
        kept, duplicates = reject_duplicates(found)
        rejects += duplicates
        if cfg.dedup.exact:
            self._captions = _shared_captions(self._captions, kept)
            kept, duplicates = reject_remuxed(kept)
            rejects += duplicates
        self.snapshot_id = self._snapshot_id(found, rejects)
        self._building.write(SOURCES, self._building.tables.table("sources"), kept)
        return self._finish(
            "sources",
            "source",
            started,
            received=len(listing.videos) + len(listing.rejects),
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
        pieces = [
            Piece(s.source_id, self._keys.shots(s.source_id), {"source": dataclasses.asdict(s)})
            for s in sources
        ]
        missing = [p for p in pieces if not p.path.is_file()]
        cfg = self.config.curation
        found = pipeline.find_shots(
            missing, self.downloads, cfg.shots, cfg.embedding, self.config.engine
        )
        failures = {f.record_id: f for f in found}
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
        """Trim shots to spans of usable length, the clips, and give them their captions."""
        started = time.monotonic()
        shots = by_source(self._building.read(SHOTS, "shots"))
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
                self._captions.get(source.source_id, ()),
                self.config.curation.clips,
                frames=model.lengths[-1],
                max_stride=model.max_stride,
            )
            clips += made
            rejects += refused
        self._building.write(CLIPS, self._building.tables.table("clips"), clips)
        received = len(clips) + len(rejects)
        return self._finish(
            "clips", "span", started, received=received, kept=len(clips), rejects=rejects
        )

    def filters(self) -> StageCount:
        """Leave out the clips whose measured scores pass a threshold."""
        started = time.monotonic()
        clips = self._building.read(CLIPS, "clips")
        kept, rejects = filter_clips(
            clips,
            self._building.read(SHOTS, "shots"),
            self._building.read(SOURCES, "sources"),
            self.config.curation.filters,
        )
        self._building.write(CLIPS, self._building.tables.table("clips"), kept)
        return self._finish(
            "filters", "clip", started, received=len(clips), kept=len(kept), rejects=rejects
        )

    def scores(self) -> StageCount:
        """Score clips by the configured networks (``scorers``; call it only if there are any).

        Clips whose scores pass a threshold are left out; the table keeps the scores of all.

        Raises:
            CheckpointError: Weights cannot be used.
            TooManyFailures: A larger share than ``max_error_ratio`` met an unexpected error.
        """
        assert self.scorers, "no scorer is configured"
        started = time.monotonic()
        clips = {c.clip_id: c for c in self._building.read(CLIPS, "clips")}
        made = [self._scored(clips.values(), scorer) for scorer in self.scorers]
        failed = {f.record_id: f for m in reversed(made) for f in m.failures}
        scores = [score for m in made for score in m.rows.values()]
        self._building.write(CLIP_SCORES, self._building.tables.table("scores"), scores)
        kept, rejects = filter_scored(
            [c for c in clips.values() if c.clip_id not in failed],
            scores,
            self.config.curation.filters,
        )
        self._building.write(CLIPS, self._building.tables.table("clips"), kept)
        rejects += [_failed(f, SCORES_STAGE, clips[f.record_id].uri) for f in failed.values()]
        return self._finish(
            SCORES_STAGE,
            "clip",
            started,
            received=len(clips),
            kept=len(kept),
            rejects=rejects,
            reused=len(set(clips).intersection(*(m.reused for m in made))),
        )

    def _scored(self, clips: Iterable[Clip], scorer: NamedScorer) -> Scored:
        cfg = self.config.curation.scorers

        def score(pieces: list[Piece]) -> list[Failure]:
            if pieces:
                # Weights that cannot be used are found here, where the message is not Ray's.
                load_scorer(scorer.scorer_id, cfg)
            return pipeline.score_clips(
                pieces, self.downloads, cfg, scorer, self.limits, self.config.engine
            )

        return score_clips(clips, self._keys.scores(scorer), score)

    def embeddings(self) -> StageCount:
        """Describe every clip by a vector, and compare it with its caption.

        Raises:
            CheckpointError: The similarity model's weights cannot be used.
            TooManyFailures: A larger share than ``max_error_ratio`` met an unexpected error.
        """
        started = time.monotonic()
        cfg = self.config.curation.embedding
        clips = {c.clip_id: c for c in sorted(self._building.read(CLIPS, "clips"), key=_in_time)}
        cache = PieceCache(self._keys.embeddings(), CLIP_ID)
        missing = [c for clip_id, c in clips.items() if clip_id not in cache]
        if missing:
            # Weights that cannot be used are found here, where the message is not Ray's.
            load_embedder(cfg, "cpu")
        failures = pipeline.embed_clips(
            vector_pieces(missing, cache.folder, cfg.batch_clips),
            self.downloads, cfg, self.limits, self.config.engine,
        )  # fmt: skip
        cache.look()
        described = [c for clip_id, c in clips.items() if clip_id in cache]
        self._building.write_batches(
            EMBEDDINGS,
            self._building.tables.table("embeddings"),
            cache.batches([c.clip_id for c in described]),
        )
        self._score_captions(described, cache)
        return self._finish(
            "embeddings",
            "clip",
            started,
            received=len(clips),
            kept=len(described),
            rejects=[_failed(f, "embeddings", clips[f.record_id].uri) for f in failures],
            reused=len(clips) - len(missing),
        )

    def _score_captions(self, clips: Sequence[Clip], vectors: PieceCache) -> None:
        cfg = self.config.curation.embedding
        texts = PieceCache(self._keys.captions(), TEXT_ID)
        captions = dict.fromkeys(c.caption for c in clips if c.caption)
        missing = [caption for caption in captions if text_id(caption) not in texts]
        pipeline.embed_captions(caption_pieces(missing, texts.folder), cfg, self.config.engine)
        texts.look()
        self._building.write_batches(
            CAPTION_SCORES,
            self._building.tables.table("caption_scores"),
            [caption_scores(clips, vectors, texts, self._keys.embedder, cfg.long_text)],
        )

    def dedup(self) -> StageCount:
        """Leave out clips that look almost like another one, of this or an earlier refresh."""
        started = time.monotonic()
        cfg = self.config.curation.dedup
        clips = {c.clip_id: c for c in self._building.read(CLIPS, "clips")}
        vectors = self._vectors()
        model = self._keys.embedder
        earlier = [Snapshot(self._dataset / name) for name in self._earlier()]
        described = [c for clip_id, c in clips.items() if clip_id in vectors]
        kept, rejects = find_duplicates(
            described,
            vectors,
            earlier_vectors(earlier, model.model_id, model.weights_sha256),
            cfg,
        )
        rows = [clips[clip_id] for clip_id in kept]
        self._building.write(CLIPS, self._building.tables.table("clips"), rows)
        return self._finish(
            "dedup", "clip", started, received=len(described), kept=len(rows), rejects=rejects
        )

    def windows(self) -> StageCount:
        """Compare consecutive clips."""
        started = time.monotonic()
        cfg = self.config.curation.windows
        tables = self._building.tables
        rejects: list[pa.Table] = []
        received = 0

        def scored() -> Iterator[pa.Table]:
            for clips, vectors in described_clips(
                tables.table("clips"), tables.table("embeddings")
            ):
                nonlocal received
                received += num_runs(clips, cfg.scenes_per_sample)
                windows, refused = score_windows(clips, vectors, cfg)
                rejects.append(refused)
                yield windows

        kept = self._building.write_batches(WINDOWS, tables.table("windows"), scored())
        refused = pa.concat_tables([REJECTS.schema.empty_table(), *rejects])
        return self._finish(
            "windows", "window", started, received=received, kept=kept, rejects=refused
        )

    def manifests(self) -> tuple[StageCount, StageCount]:
        """Write the sft and the pretrain manifest; returns the count of each, in this order.

        Raises:
            ManifestError: Too few sources for pre-training samples.
        """
        started = time.monotonic()
        cfg = self.config.curation.manifests
        tables = self._building.tables
        clips = read_arrow(tables.table("clips"), CLIPS, CLIP_COLUMNS)
        windows = read_arrow(tables.table("windows"), WINDOWS, WINDOW_COLUMNS)
        sft = sft_manifest(windows, clips, cfg)
        kept = self._write_manifest(sft)
        sft_count = self._finish(
            SFT_STAGE,
            "window",
            started,
            received=windows.num_rows,
            kept=kept,
            rejects=sft.rejects,
        )
        started = time.monotonic()
        scenes = self.config.curation.windows.scenes_per_sample
        pretrain = pretrain_manifest(clips, scenes, cfg)
        made = self._write_manifest(pretrain)
        pretrain_count = self._finish(
            PRETRAIN_STAGE,
            "clip use",
            started,
            received=clips.num_rows * cfg.uses_per_clip,
            kept=made * scenes,
            rejects=pretrain.rejects,
            produced=made,
        )
        return sft_count, pretrain_count

    def _write_manifest(self, manifest: Manifest) -> int:
        """Write a manifest; its metadata lead back to the model behind it. Returns its samples."""
        model = self._keys.embedder
        building = dataclasses.replace(
            self._building,
            metadata={
                **self._building.metadata,
                **manifest.limits,
                "model_id": model.model_id,
                "weights_sha256": model.weights_sha256,
            },
        )
        path = building.tables.manifest(manifest.kind)
        return building.write_batches(SAMPLES, path, manifest.samples())

    def export(self) -> StageCount:
        """Write every clip as a file of its own (``curation.export.mode``).

        Raises:
            TooManyFailures: A larger share than ``max_error_ratio`` met an unexpected error.
        """
        started = time.monotonic()
        cfg = self.config.curation.export
        folder = self.workspace.cache("exports")
        clips = {c.clip_id: c for c in self._building.read(CLIPS, "clips")}
        pieces = [
            Piece(
                clip_id,
                self._keys.export(clip_id),
                {"clip": dataclasses.asdict(clip), "folder": str(folder)},
            )
            for clip_id, clip in clips.items()
        ]
        # Every piece is done again, for a file may be gone; an undamaged one is only checked.
        failures = pipeline.export_clips(
            pieces, self.downloads, cfg, self.limits, self.config.engine
        )
        failed = {f.record_id for f in failures}
        records = [read_json(p.path) for p in pieces if p.record_id not in failed]
        exports = [Export(**r["export"]) for r in records if "export" in r]
        rejects = [Reject(**r["reject"]) for r in records if "reject" in r]
        rejects += [_failed(f, "export", clips[f.record_id].uri) for f in failures]
        self._building.write(EXPORTS, self._building.tables.table("exports"), exports)
        return self._finish(
            "export", "clip", started, received=len(clips), kept=len(exports), rejects=rejects
        )

    def latest(self) -> Snapshot | None:
        """The snapshot that ``LATEST`` names, if it is there."""
        folder = latest(self._dataset)
        return Snapshot(folder) if folder is not None and read_done(folder) else None

    def publish(self) -> Snapshot:
        """Make the finished tables a snapshot and let ``LATEST`` name it.

        Raises:
            DriftTooLarge: It differs more from the one that ``LATEST`` names than
                ``curation.drift`` allows. It is finished all the same: run again with another
                limit to publish it.
        """
        left_out = {
            SCORES_STAGE: not self.scorers,
            "export": self.config.curation.export.mode == "none",
        }
        stages = [stage for stage in STAGES if not left_out.get(stage)]
        snapshot = self._building.complete(stages, self.config)
        before, limits = self.latest(), self.config.curation.drift
        if before is not None and before != snapshot and limits != DriftConfig():
            check_drift(diff_snapshots(before, snapshot), snapshot, limits)
        self._building.publish(snapshot)
        return snapshot

    @property
    def _dataset(self) -> Path:
        return self.workspace.dataset(self.config.curation.dataset)

    @property
    def _building(self) -> Building:
        assert self.snapshot_id, "sources() must run first"
        return Building(
            self._dataset,
            self.snapshot_id,
            {
                "config_hash": fingerprint(self._keys.snapshot()),
                "code_version": version("triptych"),
            },
        )

    def _finish(self, stage: str, unit: str, started: float, **numbers: Any) -> StageCount:
        count = self._building.finish(stage, unit, started, **numbers)
        return count.check_failures(self.config.curation.max_error_ratio)

    def _detection(self, source: Source) -> ShotDetection | Reject:
        record = read_json(self._keys.shots(source.source_id))
        if "reject" in record:
            # The piece is keyed by content: the same bytes may since have moved to another path.
            return dataclasses.replace(Reject(**record["reject"]), uri=source.uri)
        values = record["detection"]
        return ShotDetection(**(values | {"shots": [build_row(Shot, s) for s in values["shots"]]}))

    def _vectors(self) -> dict[str, npt.NDArray[np.floating]]:
        found: dict[str, npt.NDArray[np.floating]] = {}
        path = self._building.tables.table("embeddings")
        for batch in iter_tables(path, EMBEDDINGS, ("clip_id", "vector")):
            found.update(zip(batch["clip_id"].to_pylist(), vectors_of(batch), strict=True))
        return found

    def _earlier(self) -> list[str]:
        """Names of the snapshots that near-duplicates are looked for in: all that were published.

        They are not part of ``snapshot_id``: with unchanged inputs the snapshot there is holds.
        """
        cfg = self.config.curation.dedup
        if not cfg.earlier or cfg.near_threshold is None:
            return []
        done = {d.name: read_done(d) or {} for d in self._dataset.glob("[!.]*")}
        return sorted(name for name, record in done.items() if "previous" in record)

    def _snapshot_id(self, found: Sequence[Source], rejects: Sequence[Reject]) -> str:
        captions = {
            source_id: [dataclasses.astuple(span) for span in spans]
            for source_id, spans in self._captions.items()
        }
        inputs = sorted([s.uri, s.source_id] for s in found)
        left_out = sorted([r.uri, r.reason] for r in rejects)
        return fingerprint(inputs, left_out, captions, self._keys.snapshot())


def _shared_captions(
    captions: dict[str, tuple[CaptionSpan, ...]], sources: Sequence[Source]
) -> dict[str, tuple[CaptionSpan, ...]]:
    """What was given for one of several copies of a video holds for whichever is kept."""
    spans: dict[str, list[CaptionSpan]] = defaultdict(list)
    for source in sources:
        spans[source.packet_sha256] += captions.get(source.source_id, ())
    joined = {key: join_spans(found) for key, found in spans.items()}
    return {s.source_id: joined[s.packet_sha256] for s in sources if joined[s.packet_sha256]}


def _failed(failure: Failure, stage: str, uri: str) -> Reject:
    return Reject(failure.record_id, stage, failure.reason, failure.detail, uri, failed=True)


def _in_time(clip: Clip) -> tuple[str, int, str]:
    """The order of the table ``embeddings``."""
    return clip.source_id, clip.start_pts, clip.clip_id
