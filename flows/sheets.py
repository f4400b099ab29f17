"""Contact sheets and media of the report: small JPEG strips and videos as ``data:`` URIs."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from curation.video import read_frames
from schemas.errors import TriptychError
from schemas.rows import Clip, Reject, Shot, Source, Window

LOG = logging.getLogger(__name__)

MAX_SOURCES = 12
MAX_SHOTS_PER_SOURCE = 12
WINDOWS_PER_GROUP = 3
FRAMES_PER_SHOT = 4
FRAME_HEIGHT_PX = 84
_GAP_PX = 2


@dataclass(frozen=True)
class Strip:
    """A few frames side by side.

    ``uri`` is a ``data:`` URI of a JPEG, empty when the frames could not be read; ``problem`` then
    says why.
    """

    uri: str
    width_px: int
    height_px: int
    problem: str = ""


@dataclass(frozen=True)
class ShotRow:
    """One line of a source's contact sheet: a shot, and the clip or the reject it became."""

    shot: Shot
    clip: Clip | None
    reject: str
    strip: Strip


@dataclass(frozen=True)
class SourceSheet:
    """A source with the contact sheet of (some of) its shots."""

    source: Source
    rows: list[ShotRow]
    num_shots: int


@dataclass(frozen=True)
class WindowRow:
    """One window of consecutive clips: its similarity, its verdict, one strip per clip."""

    window: Window
    value: float
    verdict: str
    clips: list[Clip]
    strips: list[Strip]


@dataclass(frozen=True)
class WindowGroup:
    """Windows worth looking at for one reason, e.g. those just below the threshold."""

    title: str
    rows: list[WindowRow]


def evenly(count: int, cap: int) -> list[int]:
    """At most ``cap`` of ``count`` positions, evenly spread, first and last among them."""
    if count <= cap:
        return list(range(count))
    return np.linspace(0, count - 1, cap).round().astype(int).tolist()


def source_sheets(
    sources: Sequence[Source],
    shots: Sequence[Shot],
    clips: Sequence[Clip],
    rejects: Sequence[Reject],
) -> list[SourceSheet]:
    """Contact sheets of at most ``MAX_SOURCES`` sources, evenly chosen in order of their names."""
    by_name = sorted(sources, key=lambda s: (Path(s.uri).name, s.uri))
    clip_of = {c.shot_id: c for c in clips}
    reason_of = {r.record_id: r.reason for r in rejects}
    sheets: list[SourceSheet] = []
    for source in (by_name[i] for i in evenly(len(by_name), MAX_SOURCES)):
        mine = sorted((s for s in shots if s.source_id == source.source_id), key=lambda s: s.index)
        shown = [mine[i] for i in evenly(len(mine), MAX_SHOTS_PER_SOURCE)]
        spans = [_span(clip_of.get(shot.shot_id) or shot) for shot in shown]
        strips = read_strips(source, spans, FRAMES_PER_SHOT)
        rows = [
            ShotRow(shot, clip_of.get(shot.shot_id), reason_of.get(shot.shot_id, ""), strip)
            for shot, strip in zip(shown, strips, strict=True)
        ]
        sheets.append(SourceSheet(source, rows, len(mine)))
    return sheets


def window_groups(
    windows: Sequence[Window],
    clips: Sequence[Clip],
    sources: Sequence[Source],
    verdicts: Mapping[str, str],
    statistic: str,
    low: float,
    high: float,
) -> list[WindowGroup]:
    """Windows just below ``low``, just above it, and the most similar ones, with their frames.

    Args:
        windows: All windows of the snapshot.
        clips: Their clips.
        sources: Their sources.
        verdicts: What became of each window, by sample id.
        statistic: Which similarity decides.
        low: Lowest similarity kept.
        high: Highest similarity kept; the titles name it.
    """
    ranked = sorted(windows, key=lambda w: (float(getattr(w, statistic)), w.sample_id))
    below = [w for w in ranked if getattr(w, statistic) < low]
    above = [w for w in ranked if getattr(w, statistic) >= low]
    clip_by_id = {c.clip_id: c for c in clips}
    source_by_id = {s.source_id: s for s in sources}

    def row(window: Window) -> WindowRow:
        members = [clip_by_id[i] for i in window.clip_ids]
        source = source_by_id[window.source_id]
        strips = read_strips(source, [_span(c) for c in members], 1)
        verdict = verdicts.get(window.sample_id, "no verdict")
        return WindowRow(window, float(getattr(window, statistic)), verdict, members, strips)

    chosen = (
        (f"Just below the threshold of {low:g}", below[-WINDOWS_PER_GROUP:]),
        (f"Just above the threshold of {low:g}", above[:WINDOWS_PER_GROUP]),
        (
            f"Most similar (above {high:g} a window is a near-duplicate)",
            ranked[-WINDOWS_PER_GROUP:],
        ),
    )
    return [WindowGroup(title, [row(w) for w in group]) for title, group in chosen]


def read_strips(source: Source, spans: Sequence[tuple[int, int]], frames: int) -> list[Strip]:
    """One strip per span of frame numbers, all read in one pass over the file.

    A file that has moved or no longer decodes leaves strips that say so: the report is about what
    was made, and must not fail because a source is gone.

    Args:
        source: The video.
        spans: Half-open spans of frame numbers.
        frames: Frames per strip, taken from the middles of as many equal parts of the span.
    """
    if not spans:
        return []
    picks = [_middles(start, end, frames) for start, end in spans]
    wanted = sorted({i for pick in picks for i in pick})
    aspect = source.width_px * source.sar_num / (source.height_px * source.sar_den)
    if source.rotation_deg % 180:
        aspect = 1 / aspect
    # Bounded, so that a panorama or a phone's portrait video still fits in the row.
    width_px = min(max(round(FRAME_HEIGHT_PX * aspect), 32), 240)
    try:
        read = read_frames(Path(source.uri), wanted, FRAME_HEIGHT_PX, width_px, mode="stretch")
    except (TriptychError, OSError) as error:
        LOG.warning("report frames unavailable uri=%s error=%s", source.uri, error)
        problem = str(error).splitlines()[0]
        return [Strip("", width_px, FRAME_HEIGHT_PX, problem) for _ in spans]
    position = {index: i for i, index in enumerate(wanted)}
    return [_strip([read[position[i]] for i in pick]) for pick in picks]


def data_uri(path: Path, media_type: str) -> str:
    """A file's bytes as a ``data:`` URI."""
    return _encode(path.read_bytes(), media_type)


def _span(item: Shot | Clip) -> tuple[int, int]:
    return item.start_frame, item.end_frame


def _middles(start: int, end: int, count: int) -> list[int]:
    edges = np.linspace(start, end, count + 1)
    return [int((a + b) / 2) for a, b in pairwise(edges.tolist())]


def _strip(frames: Sequence[np.ndarray]) -> Strip:
    """Frames (H, W, 3) uint8 side by side as one JPEG: one image per row keeps the page small."""
    height, width = frames[0].shape[:2]
    total = len(frames) * width + (len(frames) - 1) * _GAP_PX
    sheet = Image.new("RGB", (total, height), (128, 128, 128))
    for i, frame in enumerate(frames):
        sheet.paste(Image.fromarray(frame), (i * (width + _GAP_PX), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=72, optimize=True)
    return Strip(_encode(buffer.getvalue(), "image/jpeg"), total, height)


def _encode(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
