"""The wiring of curation to Ray: which pieces of work are missing, and doing them side by side.

The only file of curation that imports Ray. A piece is one row of a Ray Data graph; it holds paths
and small records, never frames, and its worker writes the result itself, atomically, under a
content key. So whatever is killed, finished pieces stay, and a re-run does only the others. What a
worker cannot do comes back as failures in the row's own column, for Ray would drop or repeat whole
blocks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"
)  # read at import: do not ship the folder

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from curation.embeddings import load_embedder, spread_frames
from curation.shots import ShotDetection, read_shots
from curation.sources import read_source
from curation.video import read_frames
from schemas.config.curation import EmbeddingConfig, ShotsConfig
from schemas.config.root import EngineConfig
from schemas.errors import ExternalToolError
from schemas.rows import Clip, Embedding, Reject, Source
from schemas.storage import write_json
from schemas.tables import EMBEDDINGS, write_table

log = logging.getLogger(__name__)

_MAX_BLOCKS = 1000
"""Rows are spread over at most this many Ray tasks; one per row as long as there are fewer."""


_before_ray: list[Any] = []
"""The SIGTERM handler there was before Ray started."""


@dataclass(frozen=True)
class Piece:
    """One piece of work: what to do, and the file its result goes to."""

    record_id: str
    path: Path
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """A record that met an unexpected error."""

    record_id: str
    reason: str
    detail: str


def start_ray(engine: EngineConfig) -> None:
    """Connect to the configured Ray cluster, or start a local one; nothing happens if Ray runs.

    Local Ray processes die with the thread that started them (Linux parent-death signal): call this
    from a thread that outlives the work, such as the main thread.

    Raises:
        ExternalToolError: Ray does not start or cannot be reached.
    """
    if ray.is_initialized():
        return
    local: dict[str, Any] = {}
    if engine.ray_address is None:
        local = {
            "num_cpus": engine.num_cpus,
            "object_store_memory": engine.object_store_mb * 1024 * 1024,
            "include_dashboard": False,
        }
    log.info("engine=ray state=starting address=%s", engine.ray_address or "local")
    _before_ray.append(signal.getsignal(signal.SIGTERM))
    try:
        ray.init(
            address=engine.ray_address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **local,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ExternalToolError(
            "Ray does not start"
            if engine.ray_address is None
            else "the Ray cluster does not answer",
            where=f"engine.ray_address {engine.ray_address!r}",
            found=error,
            do="look at Ray's log files, or check the address",
        ) from error
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def stop_ray() -> None:
    """Stop the local Ray, or leave the cluster, and give SIGTERM back to whom it belonged."""
    ray.shutdown()
    # Ray leaves a handler behind that ends the process; training, later in the same process, saves
    # a checkpoint first.
    if _before_ray and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _before_ray[0])
    _before_ray.clear()


def probe_sources(pieces: Sequence[Piece], engine: EngineConfig) -> list[Failure]:
    """Probe files. Payload: ``path``. Writes JSON ``{"source": ...}`` or ``{"reject": ...}``."""
    return _run(pieces, _probe, engine)


def find_shots(pieces: Sequence[Piece], engine: EngineConfig) -> list[Failure]:
    """Detect shots. Payload: ``source``, ``config``. JSON ``{"detection"|"reject": ...}``."""
    return _run(pieces, _find_shots, engine)


def embed_clips(
    pieces: Sequence[Piece], cfg: EmbeddingConfig, engine: EngineConfig
) -> list[Failure]:
    """Embed batches of clips. Payload: ``clips``. Writes an ``embeddings`` table per batch."""
    return _run(pieces, _EmbedClips, engine, {"config": cfg.model_dump(mode="json")})


def _run(
    pieces: Sequence[Piece],
    work: Callable[..., Any],
    engine: EngineConfig,
    constructor: Mapping[str, Any] | None = None,
) -> list[Failure]:
    """Do the pieces in a Ray Data graph. Ray is not started for nothing.

    ``work`` is a function of one row, run as tasks, or a class with ``constructor`` arguments that
    loads a model once and is then called with rows, run as a pool of actors.
    """
    if not pieces:
        return []
    start_ray(engine)
    rows = [
        {"record_id": p.record_id, "path": str(p.path), "payload": json.dumps(p.payload)}
        for p in pieces
    ]
    size = max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(rows)))
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS))
    if constructor is None:
        results = dataset.map(work, compute=TaskPoolStrategy(size=size))
    else:
        results = dataset.map(
            work,
            fn_constructor_kwargs=dict(constructor),
            compute=ActorPoolStrategy(min_size=1, max_size=size),
        )
    try:
        found = [json.loads(row["failures"]) for row in results.iter_rows()]
    except ray.exceptions.RayError as error:
        raise ExternalToolError(
            "Ray could not finish the work; what is finished is kept",
            where=f"{len(rows)} pieces of {Path(rows[0]['path']).parent.name}",
            found=str(error)[:2000],
            do="run again; if it repeats, look at Ray's log files",
        ) from error
    return sorted(
        (Failure(*failure) for failures in found for failure in failures),
        key=lambda f: f.record_id,
    )


def _attempt(record_id: str, work: Callable[[], None]) -> list[tuple[str, str, str]]:
    """Run ``work``; an error becomes a failure of that record. Row errors are caught only here."""
    try:
        work()
    except Exception as error:  # any error of one record must leave the others alone
        log.exception("record_id=%s state=failed", record_id)
        reason = str(getattr(error, "reason", "")) or _snake_case(type(error).__name__)
        return [(record_id, reason, " ".join(str(error).split())[:500])]
    return []


def _snake_case(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _probe(row: dict[str, str]) -> dict[str, str]:
    def work() -> None:
        found = read_source(Path(json.loads(row["payload"])["path"]))
        kind = "reject" if isinstance(found, Reject) else "source"
        write_json(Path(row["path"]), {kind: dataclasses.asdict(found)})

    return {"failures": json.dumps(_attempt(row["record_id"], work))}


def _find_shots(row: dict[str, str]) -> dict[str, str]:
    def work() -> None:
        payload = json.loads(row["payload"])
        source = Source(**payload["source"])
        found = read_shots(Path(source.uri), source, ShotsConfig(**payload["config"]))
        kind = "detection" if isinstance(found, ShotDetection) else "reject"
        write_json(Path(row["path"]), {kind: dataclasses.asdict(found)})

    return {"failures": json.dumps(_attempt(row["record_id"], work))}


class _EmbedClips:
    """One similarity model, loaded once per actor."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.cfg = EmbeddingConfig(**config)
        self.embedder = load_embedder(self.cfg.model, self.cfg.height_px)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        rows: list[Embedding] = []
        failures: list[tuple[str, str, str]] = []
        for values in json.loads(row["payload"])["clips"]:
            clip = Clip(**values)
            failures += _attempt(clip.clip_id, lambda clip=clip: rows.append(self._embed(clip)))
        # Clips that failed are missing in the table, so the next run tries them again. A table that
        # cannot be written (a full disk) is no record's fault and stops the run.
        if rows:
            write_table(Path(row["path"]), EMBEDDINGS, rows)
        return {"failures": json.dumps(failures)}

    def _embed(self, clip: Clip) -> Embedding:
        size = self.embedder.image_px
        frames = read_frames(
            Path(clip.uri),
            spread_frames(clip.start_frame, clip.num_frames, self.cfg.frames_per_clip),
            height_px=size,
            width_px=size,
            start=(clip.start_frame, clip.start_pts),
        )
        vector = self.embedder.embed_clips(frames[None])[0]
        return Embedding(
            clip_id=clip.clip_id,
            model_id=self.embedder.model_id,
            weights_sha256=self.embedder.weights_sha256,
            vector=[float(v) for v in vector],
        )
