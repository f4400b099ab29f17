"""What curation does with one video in an isolated child: JSON in, JSON or an array out.

Called by name through ``isolation.run_isolated``, so a child imports no more than this module. A
path is where a file's bytes are, a URI its name in tables.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from curation.export import export_clip
from curation.shots import ShotDetection, read_shots
from curation.sources import read_source
from curation.video import Frames, read_frames
from schemas.config.curation import EmbeddingConfig, ExportConfig, ShotsConfig
from schemas.rows import Clip, Reject, Source


def probe_source(job: dict[str, Any]) -> dict[str, Any]:
    """``{"path", "uri"}`` to ``{"source": row}`` or ``{"reject": row}``."""
    found = read_source(Path(job["path"]), job["uri"])
    kind = "reject" if isinstance(found, Reject) else "source"
    return {kind: dataclasses.asdict(found)}


def find_shots(job: dict[str, Any]) -> dict[str, Any]:
    """``{"path", "source", "config"}`` to ``{"detection": ...}`` or ``{"reject": row}``.

    ``embedding``, a config too, is needed where it differs from the default.
    """
    source = Source(**job["source"])
    embedding = EmbeddingConfig(**job.get("embedding", {}))
    found = read_shots(Path(job["path"]), source, ShotsConfig(**job["config"]), embedding)
    kind = "detection" if isinstance(found, ShotDetection) else "reject"
    return {kind: dataclasses.asdict(found)}


def export(job: dict[str, Any]) -> dict[str, Any]:
    """``{"path", "clip", "config", "folder"}`` to ``{"export": row}``."""
    clip = Clip(**job["clip"] | {"uri": job["path"]})
    made = export_clip(clip, ExportConfig(**job["config"]), Path(job["folder"]))
    return {"export": dataclasses.asdict(made)}


def read_clip(job: dict[str, Any]) -> Frames:
    """Frames by ``video.read_frames``: ``path``, ``frame_numbers``, ``start`` and the size."""
    keywords = {k: v for k, v in job.items() if k not in ("path", "frame_numbers")}
    return read_frames(Path(job["path"]), job["frame_numbers"], **keywords)
