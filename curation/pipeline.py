"""The wiring of curation to Ray: which pieces of work are missing, and doing them side by side.

The only file of curation that imports Ray. A piece is one row of a Ray Data graph; it holds paths
and small records, never frames, and its worker writes the result itself, atomically, under a
content key. So whatever is killed, finished pieces stay, and a re-run does only the others. What a
worker cannot do comes back as failures in the row's own column, for Ray would drop or repeat whole
blocks.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"
)  # read at import: do not ship the folder

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning

from curation.embeddings import with_absolute_weights
from curation.inputs.downloads import Downloads
from curation.scorers import NamedScorer
from curation.workers import (
    EmbedCaptions,
    EmbedClips,
    ExportClip,
    FindShots,
    Limits,
    Probe,
    ScoreClips,
    Videos,
)
from schemas.config.curation import EmbeddingConfig, ExportConfig, ScorersConfig, ShotsConfig
from schemas.config.root import EngineConfig
from schemas.errors import ConfigError, ExternalToolError

log = logging.getLogger(__name__)

_MAX_BLOCKS = 1000
"""Rows are spread over at most this many Ray tasks; one per row as long as there are fewer."""

_MAX_RESTARTS = 3
"""Of one Ray worker that died. Ray's own default has no end, so a piece that takes its worker along
every time would be tried for ever; to be restarted on another node after one is lost takes one."""

START_TRIES = 3
"""Ray gives a local node 30 s to start, a fixed number; a busy machine may take longer once."""


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
    before = signal.getsignal(signal.SIGTERM)
    failed: Exception | None = None
    for tries in range(1, START_TRIES + 1):
        try:
            ray.init(
                address=engine.ray_address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
            break
        except Exception as error:  # a node too slow to start is told with a plain Exception
            log.warning("engine=ray state=not_started tries=%d error=%r", tries, str(error)[:300])
            failed = error
            ray.shutdown()
    if not ray.is_initialized():
        raise ExternalToolError(
            "Ray does not start"
            if engine.ray_address is None
            else "the Ray cluster does not answer",
            where=f"engine.ray_address {engine.ray_address!r}",
            found=failed,
            do="look at Ray's log files, or check the address",
        ) from failed
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Ray's own handler aborts the process: the command could not stop what else it has started,
    # and training, later in the same process, could not save a checkpoint.
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def stop_ray() -> None:
    """Stop the local Ray, or leave the cluster."""
    ray.shutdown()


def probe_sources(
    pieces: Sequence[Piece], downloads: Downloads, limits: Limits, engine: EngineConfig
) -> list[Failure]:
    """Probe files. Payload: ``uri``. Writes JSON ``{"source": ...}`` or ``{"reject": ...}``."""
    return _run(pieces, Probe, engine, {"videos": Videos(downloads, limits)})


def find_shots(
    pieces: Sequence[Piece],
    downloads: Downloads,
    cfg: ShotsConfig,
    embedding: EmbeddingConfig,
    engine: EngineConfig,
) -> list[Failure]:
    """Detect shots. Payload: ``source``. JSON ``{"detection"|"reject": ...}``."""
    if cfg.detector == "panda70m":
        log.warning("detector=panda70m model=%s distances_meant_for=imagebind", embedding.model)
    if cfg.transnetv2_weights is not None:  # a worker may run in another folder
        weights = str(Path(cfg.transnetv2_weights).absolute())
        cfg = cfg.model_copy(update={"transnetv2_weights": weights})
    settings = {
        "videos": Videos(downloads, Limits.of(cfg)),
        "cfg": cfg,
        "embedding": with_absolute_weights(embedding),
    }
    return _run(pieces, FindShots, engine, settings)


def embed_clips(
    pieces: Sequence[Piece],
    downloads: Downloads,
    cfg: EmbeddingConfig,
    limits: Limits,
    engine: EngineConfig,
) -> list[Failure]:
    """Embed clips. Payload: ``clips``, of any sources. Writes an ``embeddings`` table per piece.

    Raises:
        ConfigError: ``num_gpus`` is set, and no node has as many.
    """
    if not pieces:
        return []
    start_ray(engine)
    settings = {
        "videos": Videos(downloads, limits),
        "cfg": with_absolute_weights(cfg),
        "readers": _workers(cfg.num_gpus)[1],
    }
    return _run(pieces, EmbedClips, engine, settings, cfg.num_gpus)


def embed_captions(
    pieces: Sequence[Piece], cfg: EmbeddingConfig, engine: EngineConfig
) -> list[Failure]:
    """Embed captions. Payload: ``texts``. Writes their vectors by ``vector_cache``.

    Workers do it, too: a caption takes a large text encoder 50 ms on a CPU, so a driver without a
    GPU would need half a day for a million.

    Raises:
        ConfigError: ``num_gpus`` is set, and no node has as many.
        ExternalToolError: The model fails on a caption, which is no clip's fault.
    """
    if cfg.weights is None:  # a look-up of words, done sooner than a worker is started
        work = EmbedCaptions(cfg)
        for piece in pieces:
            work(_row(piece))
        return []
    return _run(pieces, EmbedCaptions, engine, {"cfg": with_absolute_weights(cfg)}, cfg.num_gpus)


def score_clips(
    pieces: Sequence[Piece],
    downloads: Downloads,
    cfg: ScorersConfig,
    scorer: NamedScorer,
    limits: Limits,
    engine: EngineConfig,
) -> list[Failure]:
    """Score batches of clips. Payload: ``clips``. Writes a ``clip_scores`` table per batch."""
    weights = {key: getattr(cfg, key) for key in ("clip", "aesthetic_head", "text_detector")}
    absolute = {k: str(Path(path).absolute()) for k, path in weights.items() if path is not None}
    cfg = cfg.model_copy(update=absolute)  # a worker may run in another folder
    settings = {"videos": Videos(downloads, limits), "cfg": cfg, "named": scorer}
    return _run(pieces, ScoreClips, engine, settings)


def export_clips(
    pieces: Sequence[Piece],
    downloads: Downloads,
    cfg: ExportConfig,
    limits: Limits,
    engine: EngineConfig,
) -> list[Failure]:
    """Write clips as files. Payload: ``clip``, ``folder``. JSON ``{"export"|"reject": ...}``."""
    settings = {"videos": Videos(downloads, limits), "cfg": cfg}
    return _run(pieces, ExportClip, engine, settings)


def _run(
    pieces: Sequence[Piece],
    work: type[Any],
    engine: EngineConfig,
    settings: Mapping[str, Any],
    num_gpus: float = 0.0,
) -> list[Failure]:
    """Do the pieces in a Ray Data graph. Ray is not started for nothing.

    ``work`` is a class that is made once per actor with ``settings``, and then called with rows.
    Actors are as many as CPUs, or as there is room for on the GPUs, sharing the CPUs evenly.
    """
    if not pieces:
        return []
    start_ray(engine)
    rows = [_row(piece) for piece in pieces]
    workers, cpus = _workers(num_gpus)
    size = max(1, min(workers, len(rows)))
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS))
    with warnings.catch_warnings():
        # Ray Data 2.60 takes the last two under no other name, and warns that it will (by 2.64).
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = dataset.map(
            work,
            fn_constructor_kwargs=dict(settings),
            compute=ActorPoolStrategy(min_size=size, max_size=size),
            num_cpus=cpus,
            num_gpus=num_gpus or None,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=-1,  # calls to a lost node spend many; restarts are the limit
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


def _row(piece: Piece) -> dict[str, str]:
    payload = json.dumps(piece.payload)
    return {"record_id": piece.record_id, "path": str(piece.path), "payload": payload}


def _workers(num_gpus: float) -> tuple[int, int]:
    """How many workers of ``num_gpus`` each there is room for, and the CPUs each can have.

    Raises:
        ConfigError: For none.
    """
    if not num_gpus:
        return int(ray.cluster_resources().get("CPU", 1)), 1
    nodes: list[Mapping[str, float]] = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    room = [(int(node.get("GPU", 0) / num_gpus), node.get("CPU", 1)) for node in nodes]
    workers = sum(count for count, _ in room)
    if not workers:
        raise ConfigError(
            "no node of the Ray cluster has the GPUs a worker is to have",
            where="curation.embedding.num_gpus",
            found=f"{num_gpus:g}, and nodes with {[node.get('GPU', 0) for node in nodes]}",
            do="set it to 0 for the CPU, or start Ray on machines with GPUs",
        )
    return workers, max(1, min(int(cpus / count) for count, cpus in room if count))
