"""Writing H.264 mp4 files that every player and browser opens."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.container import OutputContainer
from av.video.frame import PictureType
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from curation.video import Frames
from schemas.errors import InputError
from schemas.storage import atomic_path

if TYPE_CHECKING:
    from av.container.core import Chapter

H264 = {"preset": "medium", "flags": "+bitexact", "mbtree": "0"}
"""Options of libx264 with which equal pictures give equal bytes.

Its macroblock tree (on by default) makes the bytes depend on what the heap held before, at any size
of picture, with one thread too: x264 core 165, seen with glibc's MALLOC_PERTURB_.
"""

MAX_TITLE_BYTES = 255
"""Longest name of a chapter: what its oldest form in mp4 (Nero's) can hold."""


def write_mp4(
    path: Path,
    frames: Frames,
    fps: int | float | Fraction,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write frames as H.264 (yuv420p, constant frame rate, index in front), atomically.

    The same frames, rate and metadata give the same bytes on every machine with the same libraries:
    one encoder thread, no time stamps and no encoder name in the file (:data:`H264`).

    Args:
        path: Target, ending in ``.mp4``.
        frames: (T, H, W, 3) uint8 RGB; H and W even, as yuv420p needs.
        fps: Frames per second, > 0.
        metadata: Text tags kept in the container; any keys.

    Raises:
        InputError: Wrong shape or type, odd size, no frames, or a rate that is not positive.
    """
    with open_mp4(path, fps, metadata) as out:
        out.add(frames)


@contextmanager
def open_mp4(
    path: Path, fps: int | float | Fraction, metadata: Mapping[str, str] | None = None
) -> Generator[Mp4Writer]:
    """:func:`write_mp4` piece by piece: the file takes its name when the block ends without error.

    Raises:
        InputError: A rate that is not positive, or pieces that cannot be written.
    """
    if fps <= 0:
        raise InputError("the frame rate must be positive", where=path, found=fps)
    # Custom keys need use_metadata_tags; bitexact leaves the library versions out of the file.
    options = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
    with atomic_path(path) as tmp, av.open(str(tmp), "w", format="mp4", options=options) as out:
        out.metadata.update(metadata or {})
        writer = Mp4Writer(path, out, Fraction(fps).limit_denominator(100_000))
        yield writer
        writer.close()


class Mp4Writer:
    """A video that is being written; :func:`open_mp4` makes it."""

    def __init__(self, path: Path, out: OutputContainer, rate: Fraction) -> None:
        self._path = path
        self._out = out
        self._rate = rate
        self._stream: VideoStream | None = None
        self._count = 0
        self._chapters: list[Chapter] = []

    def add(self, frames: Frames, title: str | None = None) -> None:
        """Encode frames behind those there are.

        Args:
            frames: (T, H, W, 3) uint8 RGB, of the size of the first.
            title: Name of the chapter that these frames are; players jump to its first frame, which
                is a key frame. Empty = a chapter without a name; None = no chapter.

        Raises:
            InputError: Wrong shape or type, odd or another size, or no frames.
        """
        stream = self._stream_for(frames)
        if title is not None:
            chapter: Chapter = {
                "id": len(self._chapters),
                "start": self._count,
                "end": self._count + len(frames),
                "time_base": 1 / self._rate,
                "metadata": {"title": _shortened(title)},
            }
            self._chapters.append(chapter)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = self._count + i
            frame.time_base = 1 / self._rate
            if title is not None and i == 0:
                frame.pict_type = PictureType.I
            self._out.mux(stream.encode(frame))
        self._count += len(frames)

    def close(self) -> None:
        """Flush the encoder and name the chapters.

        Raises:
            InputError: There are no frames.
        """
        if self._stream is None:
            raise InputError("a video needs frames", where=self._path)
        self._out.mux(self._stream.encode())
        # Lengths are only known now; the muxer writes chapters with the index, at the very end.
        self._out.set_chapters(self._chapters)

    def _stream_for(self, frames: Frames) -> VideoStream:
        """The stream, made for the first frames; checks the shape of all."""
        if frames.dtype != "uint8" or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise InputError(
                "cannot write these frames as video",
                where=self._path,
                found=f"{frames.dtype} of shape {frames.shape}",
                expected="uint8 of shape (T >= 1, H, W, 3)",
            )
        _, height, width, _ = frames.shape
        if self._stream is not None:
            if (self._stream.height, self._stream.width) != (height, width):
                raise InputError(
                    "all frames of a video have one size",
                    where=self._path,
                    found=f"{width} x {height}",
                    expected=f"{self._stream.width} x {self._stream.height}",
                )
            return self._stream
        if height % 2 or width % 2:
            raise InputError(
                "H.264 video (yuv420p) needs even sizes",
                where=self._path,
                found=f"{width} x {height}",
                do="crop or pad by one pixel",
            )
        stream = self._out.add_stream("libx264", rate=self._rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = 1 / self._rate
        context = stream.codec_context
        context.thread_count = 1
        context.options = {**H264, "crf": "18"}
        # RGB is turned into BT.601 (the converter's default); say so, or players guess by picture
        # size.
        context.colorspace = Colorspace.ITU601.value
        self._stream = stream
        return stream


def _shortened(title: str) -> str:
    """At most ``MAX_TITLE_BYTES``, cut between characters."""
    data = title.encode()
    if len(data) <= MAX_TITLE_BYTES:
        return title
    end = "…".encode()
    return data[: MAX_TITLE_BYTES - len(end)].decode(errors="ignore").rstrip() + end.decode()
