"""Writing H.264 mp4 files that every player and browser opens."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
from av.video.reformatter import Colorspace

from curation.video import Frames
from schemas.errors import InputError
from schemas.storage import atomic_path


def write_mp4(
    path: Path,
    frames: Frames,
    fps: int | float | Fraction,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write frames as H.264 (yuv420p, constant frame rate, index in front), atomically.

    The same frames, rate and metadata give the same bytes on every machine with the same libraries:
    one encoder thread, no time stamps and no encoder name in the file.

    Args:
        path: Target, ending in ``.mp4``.
        frames: (T, H, W, 3) uint8 RGB; H and W even, as yuv420p needs.
        fps: Frames per second, > 0.
        metadata: Text tags kept in the container; any keys.

    Raises:
        InputError: Wrong shape or type, odd size, no frames, or a rate that is not positive.
    """
    if frames.dtype != "uint8" or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise InputError(
            "cannot write these frames as video",
            where=path,
            found=f"{frames.dtype} of shape {frames.shape}",
            expected="uint8 of shape (T >= 1, H, W, 3)",
        )
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise InputError(
            "H.264 video (yuv420p) needs even sizes",
            where=path,
            found=f"{width} x {height}",
            do="crop or pad by one pixel",
        )
    if fps <= 0:
        raise InputError("the frame rate must be positive", where=path, found=fps)
    rate = Fraction(fps).limit_denominator(100_000)
    # Custom keys need use_metadata_tags; bitexact leaves the library versions out of the file.
    options = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
    with atomic_path(path) as tmp, av.open(str(tmp), "w", format="mp4", options=options) as out:
        out.metadata.update(metadata or {})
        stream = out.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = 1 / rate
        context = stream.codec_context
        context.thread_count = 1
        context.options = {"preset": "medium", "crf": "18", "flags": "+bitexact"}
        # RGB is turned into BT.601 (the converter's default); say so, or players guess by picture
        # size.
        context.colorspace = Colorspace.ITU601.value
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i
            frame.time_base = 1 / rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
