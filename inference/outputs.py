"""The files of one generated video: mp4, contact sheet, and the sidecar that makes them count.

The sidecar is written last, so a video without one is unfinished. A finished one is believed only
after its mp4 has been decoded to the frame count and size the sidecar names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.mp4 import write_mp4
from schemas.layout import Workspace
from schemas.storage import atomic_path, read_json, write_json

_SHEET_COLUMNS = 4
_SHEET_TILE_WIDTH_PX = 192
_SHEET_GAP_PX = 4


@dataclass(frozen=True)
class VideoFiles:
    """Where the files of one generated video lie."""

    video: Path
    sidecar: Path
    sheet: Path

    @classmethod
    def of(cls, workspace: Workspace, generation_id: str) -> VideoFiles:
        """The paths of ``generation_id``."""
        folder = workspace.videos
        video, sidecar, sheet = (folder / f"{generation_id}{s}" for s in (".mp4", ".json", ".jpg"))
        return cls(video, sidecar, sheet)


def write_video(
    files: VideoFiles,
    scenes: NDArray[np.uint8],
    fps: int,
    provenance: Mapping[str, Any],
    seconds: float,
) -> None:
    """Write contact sheet, mp4 (scenes in order) and, last, the sidecar.

    Args:
        files: Where to.
        scenes: (S, T, height, width, 3) uint8.
        fps: Frames per second.
        provenance: How the video was made, JSON-able; it goes into the sidecar and into the mp4's
            comment.
        seconds: How long it took; only in the sidecar, so that equal videos have equal bytes.
    """
    files.sidecar.unlink(missing_ok=True)
    with atomic_path(files.sheet) as tmp:
        contact_sheet(scenes).save(tmp, quality=85)
    metadata = {
        "title": str(provenance["prompt_id"]),
        "comment": json.dumps(provenance, sort_keys=True),
    }
    write_mp4(files.video, scenes.reshape(-1, *scenes.shape[2:]), fps, metadata)
    write_json(files.sidecar, {**provenance, "seconds": round(seconds, 3)})


def is_finished(files: VideoFiles) -> bool:
    """True if the sidecar is there and the mp4 decodes to the frames and size it names."""
    if not (files.sidecar.is_file() and files.video.is_file() and files.sheet.is_file()):
        return False
    try:
        expected = read_json(files.sidecar)
        found = decoded_shape(files.video)
        return found == tuple(expected[k] for k in ("num_frames", "height_px", "width_px"))
    except (av.error.FFmpegError, ValueError, KeyError, TypeError):
        return False


def decoded_shape(path: Path) -> tuple[int, int, int]:
    """(frames, height, width) of a video, found by decoding all of it.

    Raises:
        av.error.FFmpegError: It cannot be decoded.
    """
    count = height = width = 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            count, height, width = count + 1, frame.height, frame.width
    return count, height, width


def contact_sheet(scenes: NDArray[np.uint8]) -> Image.Image:
    """One row per scene with a few frames spread over it.

    Args:
        scenes: (S, T, height, width, 3) uint8.
    """
    num_scenes, num_frames, height, width = scenes.shape[:4]
    tile_w = min(width, _SHEET_TILE_WIDTH_PX)
    tile_h = max(1, round(height * tile_w / width))
    picks = np.linspace(0, num_frames - 1, min(_SHEET_COLUMNS, num_frames)).round().astype(int)
    step_w, step_h = tile_w + _SHEET_GAP_PX, tile_h + _SHEET_GAP_PX
    size = (len(picks) * step_w - _SHEET_GAP_PX, num_scenes * step_h - _SHEET_GAP_PX)
    sheet = Image.new("RGB", size, "white")
    for row, scene in enumerate(scenes):
        for column, index in enumerate(picks):
            tile = Image.fromarray(scene[index]).resize((tile_w, tile_h))
            sheet.paste(tile, (column * step_w, row * step_h))
    return sheet
