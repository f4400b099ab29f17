"""Opening, probing and reading video files.

Frames are addressed by number: 0-based, in presentation order, as decoded without skipping. PyAV
decodes everything; decord gives random access where it was seen to return the very same frames.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from schemas.errors import VideoDecodeError
from schemas.rows import Source
from schemas.storage import fingerprint_file

log = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]
"""(T, H, W, 3) RGB, or one frame (H, W, 3)."""

ResizeMode = Literal["stretch", "cover"]
Backend = Literal["auto", "pyav", "decord"]

# decord 0.6 on 53 real files: exact on these; wrong frames after seeks in HEVC and in MPEG-PS/TS,
# other colours for 10-bit and for odd sizes, no AV1 at all.
_DECORD_CODECS = {"h264", "vp8", "vp9"}
_DECORD_PIXELS = {"yuv420p", "yuvj420p"}
_DECORD_CONTAINERS = {"mov", "mp4", "matroska", "webm", "flv"}

_DECORD_MIN_WIDTH_PX = 128
"""decord 0.6 gives four channels of garbage at widths of 16, 24, 48 and 72; exact at all others
tried (even widths from 18 to 130, and common ones above)."""

_SEEKABLE_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
"""Containers that store every frame's time; elsewhere frames after a seek carry guessed PTS."""

_SEEK_BACK_S = 5.0
"""How far before the wanted frame a second seek goes, should the first land behind it."""


@dataclass(frozen=True)
class SmallFrame:
    """One decoded frame scaled for analysis: (H, W, 3) uint8 BGR; times in ticks."""

    pts: int
    duration: int
    bgr: Frames


@contextmanager
def open_video(path: Path) -> Generator[tuple[InputContainer, VideoStream]]:
    """Open a file and give its container and best video stream (attached pictures do not count).

    Raises:
        VideoDecodeError: reason ``not_found``, ``empty_file``, ``cannot_open`` or
            ``no_video_stream``.
    """
    if not path.is_file():
        raise VideoDecodeError("video file not found", reason="not_found", where=path)
    if path.stat().st_size == 0:
        raise VideoDecodeError(
            "the file is empty", reason="empty_file", where=path, found="0 bytes"
        )
    try:
        container = av.open(str(path), mode="r")
    except (FFmpegError, OSError) as error:
        raise VideoDecodeError(
            "the file cannot be opened as video",
            reason="cannot_open",
            where=path,
            found=getattr(error, "strerror", None) or error,
            do="check that it is a complete, unencrypted video file",
        ) from error
    with container:
        stream = container.streams.best("video")
        if stream is None or Disposition.attached_pic in stream.disposition:
            raise VideoDecodeError(
                "the file has no video stream",
                reason="no_video_stream",
                where=path,
                found=f"streams: {', '.join(s.type for s in container.streams) or 'none'}",
            )
        assert isinstance(stream, VideoStream)
        # One thread: workers run side by side, one per CPU, and a decoder's own threads only
        # compete with them.
        stream.codec_context.thread_count = 1
        yield container, stream


def decode(path: Path, start_pts: int | None = None) -> Iterator[av.VideoFrame]:
    """Decode in presentation order, from the start or the key frame at or before ``start_pts``.

    Raises:
        VideoDecodeError: as :func:`open_video`; ``decode_error`` for a broken packet;
            ``bad_timestamps`` where frames carry no PTS or go back in time, so that no span of the
            file could be named.
    """
    with open_video(path) as (container, stream):
        previous: int | None = None
        try:
            if start_pts is not None:
                container.seek(start_pts, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None or (previous is not None and frame.pts <= previous):
                    raise VideoDecodeError(
                        "frames have no usable timestamps",
                        reason="bad_timestamps",
                        where=path,
                        found=f"PTS {frame.pts} after {previous}",
                        expected="strictly increasing PTS",
                        do="remux or re-encode the file",
                    )
                previous = frame.pts
                yield frame
        except (FFmpegError, OSError) as error:
            raise VideoDecodeError(
                "the video is damaged",
                reason="decode_error",
                where=path,
                found=f"{getattr(error, 'strerror', None) or error}, after PTS {previous}",
                do="get an undamaged copy of the file",
            ) from error


def probe(path: Path) -> Source:
    """Fingerprint a file, read its header and decode its first frame.

    ``width_px`` and ``height_px`` are the coded size, before rotation. ``is_vfr``, ``duration_s``
    and ``num_frames`` stay None: headers lie, so they are known only after a full decode
    (``shots.py``).

    Raises:
        VideoDecodeError: as :func:`decode`, and ``no_frames`` for a file that opens but holds no
            picture.
    """
    with open_video(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        sar = stream.sample_aspect_ratio
        codec = stream.codec_context.codec.canonical_name
        time_base = stream.time_base
        has_audio = bool(container.streams.audio)
        container_name = container.format.name
    first = next(decode(path), None)
    if first is None or time_base is None:
        raise VideoDecodeError(
            "the file opens but holds no decodable picture", reason="no_frames", where=path
        )
    return Source(
        source_id=fingerprint_file(path),
        uri=str(path),
        size_bytes=path.stat().st_size,
        container=container_name,
        codec=codec,
        pix_fmt=first.format.name,
        width_px=first.width,
        height_px=first.height,
        rotation_deg=_quarter_turns(first) * 90,
        sar_num=sar.numerator if sar else 1,
        sar_den=sar.denominator if sar else 1,
        time_base_num=time_base.numerator,
        time_base_den=time_base.denominator,
        avg_fps=float(rate) if rate else 0.0,
        is_vfr=None,
        duration_s=None,
        num_frames=None,
        has_audio=has_audio,
    )


def iter_frames(path: Path, height_px: int) -> Iterator[SmallFrame]:
    """Decode once from start to end, each frame scaled to ``height_px`` (aspect kept) for analysis.

    Raises:
        VideoDecodeError: as :func:`decode`.
    """
    width_px = 0
    for frame in decode(path):
        if not width_px:
            width_px = max(2, round(frame.width * height_px / frame.height))
        small = frame.reformat(
            width=width_px, height=height_px, format="bgr24", interpolation="AREA"
        )
        assert frame.pts is not None
        yield SmallFrame(frame.pts, frame.duration or 0, _pixels(small, "bgr24"))


def read_frames(
    path: Path,
    frame_numbers: Sequence[int],
    *,
    height_px: int,
    width_px: int,
    mode: ResizeMode = "stretch",
    backend: Backend = "auto",
    start: tuple[int, int] | None = None,
) -> Frames:
    """Read single frames, upright and scaled. Every backend returns the same pixels.

    Args:
        path: Video file.
        frame_numbers: 0-based frame numbers, in any order, repeats allowed.
        height_px: Height of the result.
        width_px: Width of the result.
        mode: ``stretch`` ignores the aspect ratio; ``cover`` fills the size and crops the middle.
        backend: ``auto`` takes decord where it is known to be exact, PyAV everywhere else.
        start: ``(frame number, PTS)`` of a frame at or before all wanted ones, such as a clip's
            start; with it PyAV seeks instead of decoding from the beginning of the file.

    Returns:
        (T, H, W, 3) uint8 RGB, in the order of ``frame_numbers``.

    Raises:
        VideoDecodeError: as :func:`decode`, and ``missing_frames`` where the file ends before a
            wanted frame.
    """
    wanted = sorted(set(frame_numbers))
    if not wanted or wanted[0] < (start[0] if start else 0):
        raise VideoDecodeError(
            "no such frames",
            reason="missing_frames",
            where=path,
            found=f"frame numbers {list(frame_numbers)[:8]}",
            expected=f"at least one, none below {start[0] if start else 0}",
        )
    found: dict[int, Frames] | None = None
    if backend == "decord" or (backend == "auto" and _decord_is_exact(path)):
        found = _read_decord(path, wanted, start, height_px, width_px, mode, backend == "decord")
    if found is None:
        found = _read_pyav(path, wanted, start, height_px, width_px, mode)
    return np.stack([found[i] for i in frame_numbers])


def _read_pyav(
    path: Path,
    wanted: list[int],
    start: tuple[int, int] | None,
    height_px: int,
    width_px: int,
    mode: ResizeMode,
) -> dict[int, Frames]:
    missing = set(wanted)
    found: dict[int, Frames] = {}
    for number, frame in _numbered(path, start):
        if number in missing:
            upright = np.rot90(_pixels(frame, "rgb24"), _quarter_turns(frame))
            found[number] = fit(upright, height_px, width_px, mode)
            missing.discard(number)
            if not missing:
                return found
    raise VideoDecodeError(
        "the file ends before the wanted frame",
        reason="missing_frames",
        where=path,
        found=f"last frame read {max(found, default=None)}",
        expected=f"frame {wanted[-1]}",
        do="the file has changed since it was curated: refresh the dataset",
    )


def _numbered(path: Path, start: tuple[int, int] | None) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decoded frames with their numbers, beginning at ``start`` or at 0.

    A seek may land behind the wanted PTS (key frames are indexed by decoding time); then an earlier
    seek is tried, then the whole file, where numbers are certain.
    """
    with open_video(path) as (container, stream):
        back = int(_SEEK_BACK_S / stream.time_base) if stream.time_base else 0
        exact = bool(_SEEKABLE_CONTAINERS & set(container.format.name.split(",")))
    if start is not None and exact:
        first, pts = start
        for seek_pts in (pts, pts - back):
            frames = decode(path, seek_pts)
            for frame in frames:
                assert frame.pts is not None
                if frame.pts == pts:
                    yield first, frame
                    yield from enumerate(frames, first + 1)
                    return
                if frame.pts > pts:
                    break
    yield from enumerate(decode(path))


def _decord_is_exact(path: Path) -> bool:
    with open_video(path) as (container, stream):
        context = stream.codec_context
        return (
            context.codec.canonical_name in _DECORD_CODECS
            and context.pix_fmt in _DECORD_PIXELS
            and bool(_DECORD_CONTAINERS & set(container.format.name.split(",")))
            and len(container.streams.video) == 1
            and context.width >= _DECORD_MIN_WIDTH_PX
            and context.width % 2 == 0
            and context.height % 2 == 0
        )


def _read_decord(
    path: Path,
    wanted: list[int],
    start: tuple[int, int] | None,
    height_px: int,
    width_px: int,
    mode: ResizeMode,
    must: bool,
) -> dict[int, Frames] | None:
    """Frames by decord; None (unless ``must``) where it fails or numbers frames differently."""
    import decord  # here: loading it costs time and reads its environment variables

    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if start is not None and not _same_numbering(path, reader, start):
            raise decord.DECORDError(f"frame {start[0]} is not at PTS {start[1]}")
        # One by one: get_batch would hold every full-size frame at once. decord turns frames
        # upright itself.
        found = {i: fit(_rgb(reader[i]), height_px, width_px, mode) for i in wanted}
        del reader  # decord keeps decoding ahead as long as the reader lives
        return found
    except (decord.DECORDError, IndexError, RuntimeError) as error:
        if must:
            raise VideoDecodeError(
                "decord cannot read the frames", where=path, found=error, do="use backend='auto'"
            ) from error
        log.info("decoder=pyav instead_of=decord path=%s error=%s", path, str(error)[:200])
        return None


def _rgb(frame: Any) -> Frames:
    """A decord frame as (H, W, 3)."""
    pixels: Frames = frame.asnumpy()
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise RuntimeError(f"decord gives frames of shape {pixels.shape}")
    return pixels


def _same_numbering(path: Path, reader: object, start: tuple[int, int]) -> bool:
    """Whether decord's frame ``start[0]`` has PTS ``start[1]`` (edit lists can shift numbers)."""
    with open_video(path) as (_, stream):
        assert stream.time_base is not None
        expected_s = float(start[1] * stream.time_base)
    begin_s = float(reader.get_frame_timestamp(start[0])[0])  # pyright: ignore[reportAttributeAccessIssue]
    return abs(begin_s - expected_s) < 0.004  # a quarter of a frame at 60 fps


def _pixels(frame: av.VideoFrame, pixel_format: str) -> Frames:
    return np.asarray(frame.to_ndarray(format=pixel_format), np.uint8)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns (0-3) that make the frame upright; 0 for a bad matrix."""
    return frame.rotation // 90 % 4 if frame.rotation % 90 == 0 else 0


def fit(frame: Frames, height_px: int, width_px: int, mode: ResizeMode) -> Frames:
    """Scale one frame (H, W, 3); ``cover`` scales until both sides fit and crops the middle."""
    height, width = frame.shape[:2]
    new_height, new_width = height_px, width_px
    if mode == "cover":
        scale = max(height_px / height, width_px / width)
        new_height = max(height_px, round(height * scale))
        new_width = max(width_px, round(width * scale))
    if (new_height, new_width) != (height, width):
        shrinks = new_height * new_width < height * width
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        frame = cv2.resize(frame, (new_width, new_height), interpolation=method)  # pyright: ignore[reportAssignmentType]
    top, left = (new_height - height_px) // 2, (new_width - width_px) // 2
    return np.ascontiguousarray(frame[top : top + height_px, left : left + width_px])
