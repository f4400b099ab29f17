"""Opening and reading video files.

Frames are addressed by number: 0-based, in presentation order, as decoded without skipping. PyAV
decodes everything; decord gives random access where it was seen to return the very same frames.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from stat import S_ISREG
from typing import Literal

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from curation.decord_frames import decord_is_exact, read_decord
from schemas.errors import VideoDecodeError

log = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]
"""(T, H, W, 3) RGB, or one frame (H, W, 3)."""

ResizeMode = Literal["stretch", "cover"]
Backend = Literal["auto", "pyav", "decord"]

_SEEKABLE_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
"""Containers that store every frame's time; elsewhere frames after a seek carry guessed PTS."""

_OS_REASONS = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.ELOOP: "symlink_loop",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
}

_SEEK_BACK_S = 5.0
"""How far before the wanted frame a second seek goes, should the first land behind it."""


@contextmanager
def open_video(
    path: Path, options: Mapping[str, str] | None = None
) -> Generator[tuple[InputContainer, VideoStream]]:
    """Open a file and give its container and best video stream (attached pictures do not count).

    Args:
        path: Video file.
        options: Options of FFmpeg's demuxer.

    Raises:
        VideoDecodeError: reason ``not_found``, ``not_a_file``, ``symlink_loop``,
            ``permission_denied``, ``empty_file``, ``cannot_open`` or ``no_video_stream``.
    """
    _check_file(path)
    try:
        container = av.open(str(path), mode="r", options=dict(options or {}))
    except MemoryError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
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


def _check_file(path: Path) -> None:
    """Say in words what the operating system has against a file; FFmpeg's words are vaguer."""
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise VideoDecodeError(
                "not a video file",
                reason="not_a_file",
                where=path,
                found="a folder or a device",
                do="name a file",
            )
        if stat.st_size == 0:
            raise VideoDecodeError(
                "the file is empty", reason="empty_file", where=path, found="0 bytes"
            )
        with path.open("rb"):
            pass
    except OSError as error:
        raise VideoDecodeError(
            "the file cannot be read",
            reason=_OS_REASONS.get(error.errno or 0, "cannot_open"),
            where=path,
            found=error.strerror,
        ) from error


def decode(path: Path, start_pts: int | None = None) -> Iterator[av.VideoFrame]:
    """Decode in presentation order, from the start or the key frame at or before ``start_pts``.

    Raises:
        VideoDecodeError: as :func:`open_video`; ``decode_error`` for a broken packet;
            ``damaged_frame`` for a picture that the decoder could only guess in part;
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
                # After a seek, frames that refer to ones before the key frame are guessed too.
                if frame.is_corrupt and start_pts is None:
                    raise VideoDecodeError(
                        "a frame is damaged",
                        reason="damaged_frame",
                        where=path,
                        found=f"the frame at PTS {frame.pts} is concealed",
                        do="get an undamaged copy of the file",
                    )
                previous = frame.pts
                yield frame
        except MemoryError:  # FFmpeg's is an FFmpegError as well; it is no damage
            raise
        except (FFmpegError, OSError) as error:
            raise VideoDecodeError(
                "the video is damaged",
                reason="decode_error",
                where=path,
                found=f"{getattr(error, 'strerror', None) or error}, after PTS {previous}",
                do="get an undamaged copy of the file",
            ) from error


def scaled(frame: av.VideoFrame, height_px: int) -> Frames:
    """A decoded frame as (h, w, 3) BGR of this height, aspect kept, for analysis."""
    width_px = max(2, round(frame.width * height_px / frame.height))
    small = frame.reformat(width=width_px, height=height_px, format="bgr24", interpolation="AREA")
    return _pixels(small, "bgr24")


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
    """Read single frames, upright, with square pixels, scaled. Every backend gives the same.

    Where the size changes midstream every picture is first scaled to the size of the first one;
    there, and only there, the backends differ by a few of 255 levels.

    Args:
        path: Video file.
        frame_numbers: 0-based frame numbers, in any order, repeats allowed.
        height_px: Height of the result.
        width_px: Width of the result.
        mode: ``stretch`` ignores the aspect ratio; ``cover`` fills the size and crops the middle,
            with the proportions of ``probe.display_size``.
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
    header = _read_header(path)
    target = _Target(height_px, width_px, mode, header.pixel_aspect)
    found: dict[int, Frames] | None = None
    to_square = mode == "cover" and header.pixel_aspect != 1
    take_decord = backend == "decord"
    turns = 0
    if take_decord or (backend == "auto" and header.decord_is_exact and not to_square):
        first = next(decode(path), None)
        # decord mixes the colours of the two fields, where PyAV keeps them apart.
        take_decord = take_decord or (first is not None and not first.interlaced_frame)
        # It turns frames without saying how far, which matters where pixels become square.
        turns = quarter_turns(first) if first else 0
    if take_decord:
        start_s = (start[0], float(start[1] * header.time_base)) if start else None
        try:
            found = read_decord(path, wanted, start_s, lambda frame: target.fit(frame, turns))
        except VideoDecodeError as error:
            if backend == "decord":
                raise
            text = " ".join(str(error.found).split())[:200]
            log.info("decoder=pyav instead_of=decord path=%s error=%s", path, text)
    if found is None:
        found = _read_pyav(path, wanted, start, target, header)
    return np.stack([found[i] for i in frame_numbers])


@dataclass(frozen=True)
class _Header:
    """What decides how a file is read.

    ``width_px`` and ``height_px`` are those of the first coded picture, ``pixel_aspect`` is width
    to height of one of its pixels; ``seek_back`` how many ticks a second seek
    goes back, None where a file cannot be searched exactly.
    """

    width_px: int
    height_px: int
    pixel_aspect: float
    time_base: Fraction
    decord_is_exact: bool
    seek_back: int | None


@dataclass(frozen=True)
class _Target:
    """How a decoded picture is turned into the wanted one."""

    height_px: int
    width_px: int
    mode: ResizeMode
    pixel_aspect: float

    def fit(self, upright: Frames, quarter_turns: int) -> Frames:
        turned = quarter_turns % 2
        aspect = 1 / self.pixel_aspect if turned else self.pixel_aspect
        return fit(upright, self.height_px, self.width_px, self.mode, aspect)


def _read_header(path: Path) -> _Header:
    with open_video(path) as (container, stream):
        time_base = stream.time_base or Fraction(1)
        seekable = _SEEKABLE_CONTAINERS & set(container.format.name.split(","))
        return _Header(
            width_px=stream.codec_context.width,
            height_px=stream.codec_context.height,
            pixel_aspect=pixel_aspect(stream),
            time_base=time_base,
            decord_is_exact=decord_is_exact(container, stream),
            seek_back=int(_SEEK_BACK_S / time_base) if seekable else None,
        )


def pixel_aspect(stream: VideoStream) -> float:
    """Width to height of a coded pixel; 1 where a file says nothing."""
    return float(stream.sample_aspect_ratio or 1)


def _read_pyav(
    path: Path,
    wanted: list[int],
    start: tuple[int, int] | None,
    target: _Target,
    header: _Header,
) -> dict[int, Frames]:
    missing = set(wanted)
    found: dict[int, Frames] = {}
    for number, frame in _numbered(path, start, header.seek_back):
        if number in missing:
            turns = quarter_turns(frame)
            # Where the size changes midstream, every picture gets the first one's, as in decord.
            same_size = frame.reformat(width=header.width_px, height=header.height_px)
            found[number] = target.fit(np.rot90(_pixels(same_size, "rgb24"), turns), turns)
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


def _numbered(
    path: Path, start: tuple[int, int] | None, seek_back: int | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decoded frames with their numbers, beginning at ``start`` or at 0.

    A seek may land behind the wanted PTS (key frames are indexed by decoding time); then an earlier
    seek is tried, then the whole file, where numbers are certain.
    """
    if start is not None and seek_back is not None:
        first, pts = start
        for seek_pts in (pts, pts - seek_back):
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


def _pixels(frame: av.VideoFrame, pixel_format: str) -> Frames:
    return np.asarray(frame.to_ndarray(format=pixel_format), np.uint8)


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns (0-3) that make the frame upright; 0 for a bad matrix."""
    return frame.rotation // 90 % 4 if frame.rotation % 90 == 0 else 0


def fit(
    frame: Frames, height_px: int, width_px: int, mode: ResizeMode, pixel_aspect: float = 1.0
) -> Frames:
    """Scale one frame (H, W, 3); ``cover`` scales until both sides fit and crops the middle.

    ``pixel_aspect`` is width to height of the frame's pixels; ``cover`` makes them square.
    """
    height, width = frame.shape[:2]
    new_height, new_width = height_px, width_px
    if mode == "cover":
        scale = max(height_px / height, width_px / (width * pixel_aspect))
        new_height = max(height_px, round(height * scale))
        new_width = max(width_px, round(width * pixel_aspect * scale))
    if (new_height, new_width) != (height, width):
        shrinks = new_height * new_width < height * width
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        frame = cv2.resize(frame, (new_width, new_height), interpolation=method)  # pyright: ignore[reportAssignmentType]
    top, left = (new_height - height_px) // 2, (new_width - width_px) // 2
    return np.ascontiguousarray(frame[top : top + height_px, left : left + width_px])
