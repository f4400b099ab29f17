"""Contact sheets and media of the report: small JPEG strips and videos as ``data:`` URIs."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from curation.embeddings import spread_frames
from curation.inputs import uris
from curation.probe import display_size
from curation.video import Frames, read_frames
from schemas.errors import InputError, TriptychError
from schemas.layout import Workspace
from schemas.rows import Clip, Generation, Reject, Shot, Source, Window
from schemas.storage import atomic_path

LOG = logging.getLogger(__name__)

MAX_SOURCES = 12
MAX_SHOTS_PER_SOURCE = 12
WINDOWS_PER_GROUP = 3
MAX_VIDEOS = 24
# Bytes of videos and their sheets put into the page; base64 makes them a third larger. With the
# contact sheets of sources the page stays under about 6 MB.
MAX_MEDIA_BYTES = 2_200_000
FRAMES_PER_SHOT = 4
FRAME_HEIGHT_PX = 84
_GAP_PX = 2


@dataclass(frozen=True)
class Strip:
    """A few frames side by side.

    ``uri`` is a ``data:`` URI of a JPEG, empty when the frames could not be read; ``problem`` then
    says why.
    """

    uri: str = ""
    width_px: int = 0
    height_px: int = 0
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
    """One window of consecutive clips: its similarity, its verdict, one picture per clip."""

    window: Window
    value: float
    verdict: str
    clips: list[Clip]
    stills: list[Strip]


@dataclass(frozen=True)
class WindowGroup:
    """Windows worth looking at for one reason, e.g. those just below the threshold."""

    title: str
    rows: list[WindowRow]


@dataclass(frozen=True)
class Video:
    """One generated video as ``data:`` URIs; empty where it failed or the page is full."""

    row: Generation
    video_uri: str
    sheet_uri: str
    note: str


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
    cache: Path,
) -> list[SourceSheet]:
    """Contact sheets of at most ``MAX_SOURCES`` sources, evenly chosen in order of their names.

    Strips once made are kept in the folder ``cache``.
    """
    by_name = sorted(sources, key=lambda s: (Path(s.uri).name, s.uri))
    clip_of = {c.shot_id: c for c in clips}
    reason_of = {r.record_id: r.reason for r in rejects}
    sheets: list[SourceSheet] = []
    for source in (by_name[i] for i in evenly(len(by_name), MAX_SOURCES)):
        mine = sorted((s for s in shots if s.source_id == source.source_id), key=lambda s: s.index)
        rows: list[ShotRow] = []
        for shot in (mine[i] for i in evenly(len(mine), MAX_SHOTS_PER_SOURCE)):
            clip = clip_of.get(shot.shot_id)
            strip = read_strip(source, clip or shot, cache)
            rows.append(ShotRow(shot, clip, reason_of.get(shot.shot_id, ""), strip))
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
    cache: Path,
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
        cache: Folder of strips already made.
    """
    ranked = sorted(windows, key=lambda w: (float(getattr(w, statistic)), w.sample_id))
    below = [w for w in ranked if getattr(w, statistic) < low]
    above = [w for w in ranked if getattr(w, statistic) >= low]
    clip_by_id = {c.clip_id: c for c in clips}
    source_by_id = {s.source_id: s for s in sources}

    def row(window: Window) -> WindowRow:
        verdict = verdicts.get(window.sample_id, "no verdict")
        return window_row(window, statistic, verdict, clip_by_id, source_by_id, cache)

    chosen = (
        (f"Just below the threshold of {low:g}", below[-WINDOWS_PER_GROUP:]),
        (f"Just above the threshold of {low:g}", above[:WINDOWS_PER_GROUP]),
        (
            f"Most similar (above {high:g} a window is a near-duplicate)",
            ranked[-WINDOWS_PER_GROUP:],
        ),
    )
    return [WindowGroup(title, [row(w) for w in group]) for title, group in chosen]


def window_row(
    window: Window,
    statistic: str,
    verdict: str,
    clips: Mapping[str, Clip],
    sources: Mapping[str, Source],
    cache: Path,
) -> WindowRow:
    """A window with one frame of each of its clips; ``clips`` and ``sources`` go by id."""
    members = [clips[clip_id] for clip_id in window.clip_ids]
    stills = [read_still(sources[window.source_id], clip, cache) for clip in members]
    return WindowRow(window, float(getattr(window, statistic)), verdict, members, stills)


def read_strip(source: Source, item: Shot | Clip, cache: Path) -> Strip:
    """The strip of a shot or clip, from the cache or from the video.

    Ids of shots and clips stand for their content, so a strip once made stays right. A file that
    has moved or no longer decodes leaves a strip that says so: the report is about what was made,
    and must not fail because a source is gone.
    """
    key = item.clip_id if isinstance(item, Clip) else item.shot_id
    path = cache / f"{key}-{FRAMES_PER_SHOT}x{FRAME_HEIGHT_PX}.jpg"
    if not path.is_file():
        try:
            frames = _read(source, item)
        except (TriptychError, OSError) as error:
            LOG.info("report frames unavailable uri=%s error=%r", source.uri, error)
            return Strip(problem=str(error).splitlines()[0])
        with atomic_path(path) as tmp:
            _side_by_side(frames).save(tmp, "JPEG", quality=70, optimize=True)
    with Image.open(path) as image:
        return Strip(_encode(path.read_bytes(), "image/jpeg"), *image.size)


def read_still(source: Source, clip: Clip, cache: Path) -> Strip:
    """One frame from the middle of a clip, cut from its strip."""
    strip = read_strip(source, clip, cache)
    if not strip.uri:
        return strip
    step = (strip.width_px + _GAP_PX) // FRAMES_PER_SHOT
    left = step * (FRAMES_PER_SHOT // 2)
    with Image.open(io.BytesIO(base64.b64decode(strip.uri.partition(",")[2]))) as image:
        still = image.crop((left, 0, left + step - _GAP_PX, strip.height_px))
    buffer = io.BytesIO()
    still.save(buffer, "JPEG", quality=80, optimize=True)
    return Strip(_encode(buffer.getvalue(), "image/jpeg"), *still.size)


def batch_videos(workspace: Workspace, rows: Sequence[Generation]) -> list[Video]:
    """At most ``MAX_VIDEOS`` of a batch, evenly chosen, as far as the page has room for them."""
    videos: list[Video] = []
    room = MAX_MEDIA_BYTES
    for row in (rows[i] for i in evenly(len(rows), MAX_VIDEOS)):
        mp4, jpg = (workspace.videos / f"{row.generation_id}{s}" for s in (".mp4", ".jpg"))
        media = [p for p in (mp4, jpg) if p.is_file()]
        size = sum(p.stat().st_size for p in media)
        if row.status != "done" or mp4 not in media:
            note = row.error.strip() or f"{mp4.name} is not in the workspace."
            videos.append(Video(row, "", "", note))
        elif size > room:
            videos.append(Video(row, "", "", f"Left out to keep this page small: {mp4.name}"))
        else:
            room -= size
            sheet = _encode(jpg.read_bytes(), "image/jpeg") if jpg in media else ""
            videos.append(Video(row, _encode(mp4.read_bytes(), "video/mp4"), sheet, ""))
    return videos


def _read(source: Source, item: Shot | Clip) -> Frames:
    path = uris.path_of(source.uri)
    if path is None:  # a page about a run is no reason to fetch gigabytes
        raise InputError("the source is not a file of this machine", where=source.uri)
    width_px, height_px = display_size(source)
    length = item.end_frame - item.start_frame
    return read_frames(
        path,
        spread_frames(item.start_frame, length, FRAMES_PER_SHOT),
        height_px=FRAME_HEIGHT_PX,
        # Bounded, so that a panorama or a phone's portrait video still fits in the row.
        width_px=min(max(round(FRAME_HEIGHT_PX * width_px / height_px), 32), 240),
        start=(item.start_frame, item.start_pts),
    )


def _side_by_side(frames: Frames) -> Image.Image:
    """Frames (T, H, W, 3) as one picture: one image per row keeps the page small."""
    count, height, width = frames.shape[:3]
    total = count * width + (count - 1) * _GAP_PX
    sheet = Image.new("RGB", (total, height), (128, 128, 128))
    for i, frame in enumerate(frames):
        sheet.paste(Image.fromarray(frame), (i * (width + _GAP_PX), 0))
    return sheet


def _encode(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
