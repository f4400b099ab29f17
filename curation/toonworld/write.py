"""Writing ToonWorld as a dataset: videos, captions in Panda-70M form, and the truth about them."""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from curation.mp4 import write_mp4
from curation.toonworld.captions import caption
from curation.toonworld.render import render_video
from curation.toonworld.timeline import Timeline, timeline
from curation.toonworld.world import Video, draw_compilation, draw_episode
from schemas.errors import InputError
from schemas.storage import atomic_path, fingerprint, write_json

log = logging.getLogger(__name__)

LOOK = 1
"""Version of how ToonWorld looks: raised with every change that changes a picture."""

CAPTIONS = "captions.csv"
STORIES = "stories.csv"
TRUTH = "truth.json"
_TAG = "triptych.toonworld"
_LOG_EVERY = 20


def write_dataset(
    folder: Path,
    seed: int,
    episodes: int,
    compilations: int,
    height_px: int,
    width_px: int,
    fps: int = 8,
    tell: Callable[[int], None] | None = None,
) -> int:
    """Write the first ``episodes`` and ``compilations`` of a seed, and what there is to know.

    The folder then holds an mp4 per video and three tables: ``captions.csv`` in the form of
    Panda-70M (``matching_score`` is None, as nothing has scored them), ``stories.csv`` for
    ``curation.ablation.truth``, and ``truth.json``: per file ``nframes``, ``cuts``, ``soft`` and
    ``ambiguous`` as the shot benchmark reads them, and everything else by name.

    A video that is there already, whole and of the same seed, size, rate and look, is kept. Videos
    beyond these counts from an earlier call stay, but are in none of the tables.

    Args:
        folder: Created if missing.
        seed: Decides everything together with a video's number.
        episodes: How many, >= 0.
        compilations: How many, >= 0.
        height_px: Even, 32 or more.
        width_px: Even, 32 or more.
        fps: Frames per second, 4 or more, as motion needs.
        tell: Called after each video with how many are done.

    Returns:
        Videos rendered now, less those kept.

    Raises:
        InputError: An impossible size, rate or count.
    """
    if fps < 4 or min(episodes, compilations) < 0:
        raise InputError(
            "such a ToonWorld cannot be written",
            where=folder,
            found=f"fps={fps} episodes={episodes} compilations={compilations}",
            expected="fps >= 4 and no negative counts",
        )
    folder.mkdir(parents=True, exist_ok=True)
    videos = [
        *(draw_episode(seed, index) for index in range(episodes)),
        *(draw_compilation(seed, index) for index in range(compilations)),
    ]
    log.info("toonworld start folder=%s videos=%d seed=%d", folder, len(videos), seed)
    rendered = 0
    for done, video in enumerate(videos, 1):
        rendered += write_video(folder, video, seed, height_px, width_px, fps)
        if tell is not None:
            tell(done)
        if done % _LOG_EVERY == 0:
            log.info("toonworld videos=%d of=%d rendered=%d", done, len(videos), rendered)
    write_tables(folder, videos, fps)
    log.info("toonworld end videos=%d rendered=%d", len(videos), rendered)
    return rendered


def write_video(
    folder: Path, video: Video, seed: int, height_px: int, width_px: int, fps: int
) -> bool:
    """Render one video unless it is there; whether it was rendered."""
    path = _path(folder, video)
    tag = fingerprint("toonworld", LOOK, seed, video.name, height_px, width_px, fps)
    if _tag_of(path) == tag:
        return False
    frames = render_video(video, fps, height_px, width_px)
    write_mp4(path, frames, fps, {_TAG: tag, "title": video.name})
    return True


def write_tables(folder: Path, videos: Sequence[Video], fps: int) -> None:
    """Write the three tables about videos of ``folder``."""
    lines = [(video, timeline(video, fps)) for video in videos]
    header = ["videoID", "url", "timestamp", "caption", "matching_score"]
    _write_csv(folder / CAPTIONS, header, (_caption_row(v, line, fps) for v, line in lines))
    header = ["uri", "start_s", "end_s", "story"]
    _write_csv(
        folder / STORIES, header, (row for v, line in lines for row in _stories(v, line, fps))
    )
    truth = {f"{video.name}.mp4": truth_of(video, line, fps) for video, line in lines}
    write_json(folder / TRUTH, truth)


def truth_of(video: Video, line: Timeline, fps: int) -> dict[str, Any]:
    """All that is known of one video, as JSON.

    ``cuts`` are first frames of new shots; ``soft`` and ``ambiguous`` hold [first, last] frames;
    spans named ``frames`` are half-open.
    """
    soft = [t for t in line.transitions if t.kind != "cut"]
    return {
        "kind": video.kind,
        "fps": fps,
        "nframes": line.num_frames,
        "cuts": [t.start for t in line.transitions if t.kind == "cut"],
        "soft": [[t.start, t.end - 1] for t in soft],
        "ambiguous": [],
        "transitions": [
            {"kind": t.kind, "frames": [t.start, t.end], "boundary": t.middle}
            for t in line.transitions
        ],
        "shots": [
            {
                **dataclasses.asdict(shot),
                "caption": caption(shot),
                "story": story,
                "frames": [span.start, span.end],
                "pure_frames": [span.pure_start, span.pure_end],
            }
            for shot, span, story in zip(video.shots, line.shots, video.stories, strict=True)
        ],
    }


def _caption_row(video: Video, line: Timeline, fps: int) -> list[str]:
    times = [[_clock(span.start, fps), _clock(span.end, fps)] for span in line.shots]
    told = [caption(shot) for shot in video.shots]
    return [video.name, f"{video.name}.mp4", repr(times), repr(told), repr([None] * len(told))]


def _stories(video: Video, line: Timeline, fps: int) -> Iterable[list[object]]:
    for span, story in zip(line.shots, video.stories, strict=True):
        yield [f"{video.name}.mp4", span.start / fps, span.end / fps, story]


def _clock(frame: int, fps: int) -> str:
    """``H:MM:SS.mmm``, the nearest millisecond."""
    total = round(frame * 1000 / fps)
    whole = timedelta(seconds=total // 1000)
    return f"{whole}.{total % 1000:03d}"


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with atomic_path(path) as tmp, tmp.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _path(folder: Path, video: Video) -> Path:
    return folder / f"{video.name}.mp4"


def _tag_of(path: Path) -> str | None:
    """The tag of a file of ours; videos are renamed when whole, so a tag says the file is whole."""
    if not path.is_file():
        return None
    try:
        with av.open(str(path)) as container:
            return container.metadata.get(_TAG)
    except FFmpegError:
        return None
