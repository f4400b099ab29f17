"""Thumbnails of a video's frames for shot detection, read at a fraction of full decoding's cost.

Frames that no other frame refers to are not decoded, the loop filter stays off, and a few thousand
points are picked straight from the decoded planes. Skipped frames are known by their packets' PTS;
single spans can be filled in later by decoding exactly there.

Shape legend: N frames, H=18 and W=32 luma cells; chroma has half as many each way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.plane import VideoPlane
from av.video.stream import VideoStream

from curation.measure import LOOK_EVERY_S, Look, look_at
from curation.video import open_video
from schemas.errors import VideoDecodeError

log = logging.getLogger(__name__)

LUMA = (18, 32)
CHROMA = (9, 16)

# Codecs whose packets are frames one to one, so that a skipped frame still has its number. VP8 and
# VP9 also send packets that are never shown, and decoders of the others ignore skip_frame.
_SKIPPABLE = {"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"}
_SKIPPED_FROM_FPS = 16
"""In slower files a dissolve or fade of half a second has too few frames to leave any out."""
# Elsewhere PTS after a seek are guesses.
_SEEKABLE = {"mov", "mp4", "matroska", "webm"}
_CHUNK = 64  # frames pooled at once; only saves numpy calls


@dataclass(frozen=True)
class Thumbs:
    """Small pictures of some frames of one file, in presentation order.

    Attributes:
        frames: (N,) numbers of these frames among all frames of the file.
        pts: (N,) their PTS.
        luma: (N, 18, 32) uint8, each the mean of four points.
        chroma: (N, 2, 9, 16) uint8 likewise, Cb and Cr.
        all_pts: PTS of every frame of the file, decoded or not.
        keys: PTS of key frames.
        time_base: Seconds per tick.
        last_duration: Ticks of the last frame as its packet says, 0 if it does not.
        looks: Some of the frames at full size, measured, in order.
    """

    frames: npt.NDArray[np.int64]
    pts: npt.NDArray[np.int64]
    luma: npt.NDArray[np.uint8]
    chroma: npt.NDArray[np.uint8]
    all_pts: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    time_base: Fraction
    last_duration: int
    looks: tuple[Look, ...]

    def __len__(self) -> int:
        return len(self.frames)


def read_thumbs(path: Path, *, skip: bool = True) -> Thumbs:
    """Read a file once, leaving out frames that no other frame needs where that is safe.

    Args:
        path: Video file.
        skip: False decodes every frame (still without the loop filter).

    Raises:
        VideoDecodeError: as :func:`curation.video.open_video`; ``decode_error`` for a broken
            packet; ``bad_timestamps`` for frames without increasing PTS; ``no_frames``.
    """
    packets: dict[int, int] = {}  # PTS -> duration
    keys: list[int] = []
    exact = True
    with open_video(path) as (container, stream):
        time_base = stream.time_base or Fraction(1)
        sampler = Sampler(path, time_base)
        context = _cheapen(stream)
        skips = skip and context.codec.canonical_name in _SKIPPABLE
        skips &= (stream.average_rate or _SKIPPED_FROM_FPS) >= _SKIPPED_FROM_FPS
        context.skip_frame = "NONREF" if skips else "DEFAULT"
        for packet in _demux(container, stream, path):
            if packet.size:
                exact &= packet.pts is not None and packet.pts not in packets
                exact &= not packet.is_discard
                if packet.pts is not None:
                    packets[packet.pts] = packet.duration or 0
                    if packet.is_keyframe:
                        keys.append(packet.pts)
            sampler.add(_decode(context, packet, path))
    pts, luma, chroma = sampler.arrays()
    if not len(pts):
        raise VideoDecodeError("no frame could be decoded", reason="no_frames", where=path)
    all_pts = np.array(sorted(packets), dtype=np.int64)
    if skips and not (exact and np.isin(pts, all_pts).all()):
        log.info("thumbs=full path=%s reason=packets_do_not_number_frames", path)
        return read_thumbs(path, skip=False)
    if not skips:
        all_pts = pts
    return Thumbs(
        frames=np.searchsorted(all_pts, pts),
        pts=pts,
        luma=luma,
        chroma=chroma,
        all_pts=all_pts,
        keys=np.array(sorted(keys), dtype=np.int64),
        time_base=time_base,
        last_duration=packets.get(int(all_pts[-1]), 0),
        looks=tuple(sampler.looks),
    )


def fill_in(path: Path, thumbs: Thumbs, spans: Iterable[tuple[int, int]]) -> Thumbs:
    """Add the frames that were left out inside ``spans`` (frame numbers, half-open).

    Only packets inside a span are decoded in full; from the key frame before it the decoder still
    leaves out what no other frame needs. Frames that cannot be had stay absent.

    Raises:
        VideoDecodeError: as :func:`read_thumbs`.
    """
    wanted = np.zeros(len(thumbs.all_pts), dtype=bool)
    for start, end in spans:
        wanted[max(0, start) : end] = True
    wanted[thumbs.frames] = False
    if not wanted.any():
        return thumbs
    missing = thumbs.all_pts[wanted]
    sampler = Sampler(path)
    with open_video(path) as (container, stream):
        seekable = bool(_SEEKABLE & set(container.format.name.split(",")))
        keys = thumbs.keys if seekable else thumbs.keys[:0]
        context = _cheapen(stream)
        for group in _by_key(missing, keys):
            start = int(np.searchsorted(keys, group[0], side="right")) - 1
            # At the first key frame, or before it, decoding from the beginning is as good. Should a
            # seek land behind the wanted frames, they stay absent.
            if start > 0:
                container.seek(int(keys[start]), stream=stream, backward=True)
            sampler.add(_decode_only(container, stream, context, set(group.tolist()), path))
    return _merged(thumbs, *sampler.arrays())


def _by_key(pts: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Split wanted PTS where a seek pays: each group shares the key frame to start from."""
    if not len(keys):
        return [pts]
    key = np.searchsorted(keys, pts, side="right")
    return np.split(pts, np.flatnonzero(np.diff(key)) + 1)


def _decode_only(
    container: InputContainer,
    stream: VideoStream,
    context: VideoCodecContext,
    wanted: set[int],
    path: Path,
) -> Iterator[av.VideoFrame]:
    last = max(wanted)
    for packet in _demux(container, stream, path):
        context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in _decode(context, packet, path):
            assert frame.pts is not None
            if frame.pts in wanted:
                yield frame
            if frame.pts >= last:
                return


def _merged(
    thumbs: Thumbs,
    pts: npt.NDArray[np.int64],
    luma: npt.NDArray[np.uint8],
    chroma: npt.NDArray[np.uint8],
) -> Thumbs:
    both = np.concatenate([thumbs.pts, pts])
    order = np.argsort(both)
    return Thumbs(
        frames=np.searchsorted(thumbs.all_pts, both[order]),
        pts=both[order],
        luma=np.concatenate([thumbs.luma, luma])[order],
        chroma=np.concatenate([thumbs.chroma, chroma])[order],
        all_pts=thumbs.all_pts,
        keys=thumbs.keys,
        time_base=thumbs.time_base,
        last_duration=thumbs.last_duration,
        looks=thumbs.looks,
    )


def _cheapen(stream: VideoStream) -> VideoCodecContext:
    context = stream.codec_context
    context.options = {"skip_loop_filter": "all"}
    return context


def _demux(
    container: InputContainer, stream: VideoStream, path: Path
) -> Iterator[Packet[VideoStream]]:
    try:
        yield from container.demux(stream)
    except MemoryError:  # FFmpeg's is an FFmpegError as well; it is no damage
        raise
    except (FFmpegError, OSError) as error:
        raise _damaged(path, error) from error


def _decode(
    context: VideoCodecContext, packet: Packet[VideoStream], path: Path
) -> list[av.VideoFrame]:
    try:
        return context.decode(packet)
    except MemoryError:  # likewise
        raise
    except (FFmpegError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object, reason: str = "decode_error") -> VideoDecodeError:
    return VideoDecodeError(
        "the video is damaged",
        reason=reason,
        where=path,
        found=getattr(error, "strerror", None) or error,
        do="get an undamaged copy of the file",
    )


class Sampler:
    """Collects thumbnails, pooling a chunk of frames at a time, and now and then a look.

    Args:
        path: Named in errors.
        time_base: Seconds per tick of the frames' PTS; None takes no looks.
    """

    def __init__(self, path: Path, time_base: Fraction | None = None) -> None:
        self.looks: list[Look] = []
        self._look_every = None if time_base is None else int(LOOK_EVERY_S / time_base)
        self._path = path
        self._pts: list[int] = []
        self._luma: list[npt.NDArray[np.uint8]] = []
        self._chroma: list[npt.NDArray[np.uint8]] = []
        self._points = [np.empty((_CHUNK, 4, h * w), np.uint8) for h, w in (LUMA, CHROMA, CHROMA)]
        self._filled = 0
        self._layout: tuple[object, ...] | None = None
        self._index: list[npt.NDArray[np.int64]] = []

    def add(self, frames: Iterable[av.VideoFrame]) -> None:
        """Take decoded frames in presentation order.

        Raises:
            VideoDecodeError: ``bad_timestamps``: no PTS, or not after the one before.
        """
        for frame in frames:
            if frame.pts is None or (self._pts and frame.pts <= self._pts[-1]):
                raise self._bad_timestamps(frame.pts)
            if frame.is_corrupt and self._look_every is not None:
                # Where spans are filled in after a seek, frames before the key frame are guessed.
                found = f"the frame at PTS {frame.pts} is concealed"
                raise _damaged(self._path, found, "damaged_frame")
            self._pts.append(frame.pts)
            self._pick(frame)
            self._look(frame)
            self._filled += 1
            if self._filled == _CHUNK:
                self._pool()

    def arrays(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """PTS, luma and chroma of everything added."""
        self._pool()
        luma = np.concatenate([np.empty((0, *LUMA), np.uint8), *self._luma])
        chroma = np.concatenate([np.empty((0, 2, *CHROMA), np.uint8), *self._chroma])
        return np.array(self._pts, dtype=np.int64), luma, chroma

    def _pick(self, frame: av.VideoFrame) -> None:
        bits = _bits(frame)
        if bits is None:
            # Any other pixel format by swscale: the same cells, area-averaged; slower.
            frame = frame.reformat(2 * LUMA[1], 2 * LUMA[0], "yuv420p", interpolation="AREA")
            bits = 8
        planes = frame.planes[:3]
        kind = np.dtype(np.uint8 if bits == 8 else np.uint16)
        layout = (bits, frame.width, frame.height, planes[0].line_size)
        if layout != self._layout:
            shapes = zip(planes, (LUMA, CHROMA, CHROMA), strict=False)
            self._index = [_points(plane, kind.itemsize, *cells) for plane, cells in shapes]
            self._layout = layout
        for plane, index, rows in zip(planes, self._index, self._points, strict=False):
            samples = np.frombuffer(memoryview(plane), kind)
            if bits == 8:
                samples.take(index, out=rows[self._filled], mode="clip")
            else:
                rows[self._filled] = samples.take(index) >> (bits - 8)
        if len(planes) == 1:  # grey: no colour
            self._points[1][self._filled] = self._points[2][self._filled] = 128

    def _look(self, frame: av.VideoFrame) -> None:
        assert frame.pts is not None
        every = self._look_every
        if every is None or (self.looks and frame.pts < self.looks[-1].pts + every):
            return
        self.looks.append(look_at(frame.pts, _luma_plane(frame)))

    def _pool(self) -> None:
        if not self._filled:
            return
        luma, *chroma = (
            (rows[: self._filled].sum(1, dtype=np.uint16) >> 2).astype(np.uint8).reshape(-1, h, w)
            for rows, (h, w) in zip(self._points, (LUMA, CHROMA, CHROMA), strict=True)
        )
        self._luma.append(luma)
        self._chroma.append(np.stack(chroma, 1))
        self._filled = 0

    def _bad_timestamps(self, pts: int | None) -> VideoDecodeError:
        return VideoDecodeError(
            "frames have no usable timestamps",
            reason="bad_timestamps",
            where=self._path,
            found=f"PTS {pts}",
            expected="strictly increasing PTS",
            do="remux or re-encode the file",
        )


def _luma_plane(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    """(H, W) luma as coded, a view where the pixel format allows it."""
    if _bits(frame) != 8:
        frame = frame.reformat(format="yuv420p")
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width]


@lru_cache(maxsize=32)
def _bits_of(pixel_format: str) -> int | None:
    """Bits per sample of formats with luma alone in the first plane, else None."""
    format_ = av.VideoFormat(pixel_format, 16, 16)
    bits = {part.bits for part in format_.components}
    alone = format_.is_planar or pixel_format.startswith("gray")
    if format_.is_rgb or len(format_.components) == 2 or not alone or len(bits) != 1:
        return None
    (depth,) = bits
    return depth if depth == 8 or (8 < depth <= 16 and pixel_format.endswith("le")) else None


def _bits(frame: av.VideoFrame) -> int | None:
    bits = _bits_of(frame.format.name)
    # Semi-planar formats (nv12, p010) interleave their chroma.
    return None if len(frame.planes) == 2 else bits


def _points(plane: VideoPlane, sample_bytes: int, rows: int, columns: int) -> npt.NDArray[np.int64]:
    """(4, cells) flat positions of two by two points per cell, evenly spread over a plane."""
    y = (np.arange(2 * rows) + 0.5) * plane.height // (2 * rows)
    x = (np.arange(2 * columns) + 0.5) * plane.width // (2 * columns)
    stride = plane.line_size // sample_bytes
    flat = y.astype(np.int64)[:, None] * stride + x.astype(np.int64)
    return flat.reshape(rows, 2, columns, 2).transpose(1, 3, 0, 2).reshape(4, rows * columns)
