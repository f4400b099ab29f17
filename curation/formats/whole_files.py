"""Video files that are clips as they are: what a list written elsewhere does not say, measured."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curation.defects import defect
from curation.inputs import uris
from curation.isolation import ChildFailed, run_isolated
from curation.probe import display_size
from curation.sources import read_source
from curation.video import decode
from schemas.config.curation import ShotsConfig
from schemas.errors import VideoDecodeError
from schemas.rows import Export, Reject, Scene, stable_id

STAGE = "import"
MODE = "given"
"""``Export.mode`` of a file that was not written by Triptych."""


@dataclass(frozen=True)
class WholeFile:
    """A file as a scene without a caption, and as a clip's file."""

    scene: Scene
    export: Export


def measure_files(names: Iterable[str], limits: ShotsConfig) -> dict[str, WholeFile | Reject]:
    """Decode files, as many at once as there are CPUs, each in a child process.

    Args:
        names: As in tables (``curation.inputs.uris``).
        limits: Time and memory one file may take.
    """
    distinct = sorted(set(names))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda name: _measure(name, limits), distinct)
        return dict(zip(distinct, found, strict=True))


def _measure(name: str, limits: ShotsConfig) -> WholeFile | Reject:
    path = uris.path_of(name)
    if path is None:
        detail = "only files on this machine can be measured: fetch it and give --root"
        return Reject(name, STAGE, "not_local", detail, name, False)
    try:
        found = run_isolated(
            "curation.formats.whole_files:measure_file",
            {"path": str(path), "uri": name},
            timeout_s=limits.timeout_s,
            memory_mb=limits.memory_mb,
        )
    except VideoDecodeError as error:
        return defect(error, name, STAGE, name)
    except ChildFailed as error:
        return Reject(name, STAGE, error.reason, str(error), name, True)
    if "reject" in found:
        return dataclasses.replace(Reject(**found["reject"]), stage=STAGE)
    return WholeFile(Scene(**found["scene"]), Export(**found["export"]))


def measure_file(job: dict[str, Any]) -> dict[str, Any]:
    """``{"path", "uri"}`` to ``{"scene": row, "export": row}`` or ``{"reject": row}``.

    All frames are decoded: headers lie about how many there are. The clip's id is that of a clip
    which is the whole of the only shot of its source.

    Raises:
        VideoDecodeError: The file is damaged.
    """
    path = Path(job["path"])
    source = read_source(path, job["uri"])
    if isinstance(source, Reject):
        return {"reject": dataclasses.asdict(source)}
    pts: list[int] = []
    last_ticks = 0
    for frame in decode(path):
        assert frame.pts is not None
        pts.append(frame.pts)
        last_ticks = frame.duration
    last_ticks = last_ticks or (round(float(np.median(np.diff(pts)))) if len(pts) > 1 else 1)
    start_pts, end_pts = pts[0], pts[-1] + last_ticks
    duration_s = (end_pts - start_pts) * source.time_base_num / source.time_base_den
    width_px, height_px = display_size(source)
    clip_id = stable_id(stable_id(source.source_id, start_pts, end_pts), start_pts, end_pts)
    shared = {
        "clip_id": clip_id,
        "uri": job["uri"],
        "start_pts": start_pts,
        "end_pts": end_pts,
        "num_frames": len(pts),
        "fps": len(pts) / duration_s,
        "width_px": width_px,
        "height_px": height_px,
    }
    with path.open("rb") as data:
        sha256 = hashlib.file_digest(data, "sha256").hexdigest()
    scene = shared | {
        "source_id": source.source_id,
        "start_frame": 0,
        "end_frame": len(pts),
        "start_s": 0.0,
        "end_s": duration_s,
        "caption": "",
    }
    export = shared | {"mode": MODE, "size_bytes": source.size_bytes, "sha256": sha256}
    return {"scene": scene, "export": export}
