"""Frames by decord: random access, where it was seen to return the very pixels that PyAV does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream

from schemas.errors import VideoDecodeError

# decord 0.6 on 53 real files: exact on these; wrong frames after seeks in HEVC and in MPEG-PS/TS,
# other colours for 10-bit and for odd sizes, no AV1 at all.
_CODECS = {"h264", "vp8", "vp9"}
_PIXELS = {"yuv420p", "yuvj420p"}
_CONTAINERS = {"mov", "mp4", "matroska", "webm", "flv"}

_MIN_WIDTH_PX = 128
"""decord 0.6 gives four channels of garbage at widths of 16, 24, 48 and 72; exact at all others
tried (even widths from 18 to 130, and common ones above)."""

_EOF_RETRIES = "128"
"""decord asks a decoder that gives nothing 10,240 times by default, which takes minutes."""


def decord_is_exact(container: InputContainer, stream: VideoStream) -> bool:
    """Whether decord's frames of such a file are the ones PyAV decodes."""
    context = stream.codec_context
    return (
        context.codec.canonical_name in _CODECS
        and context.pix_fmt in _PIXELS
        and bool(_CONTAINERS & set(container.format.name.split(",")))
        and len(container.streams.video) == 1
        and context.width >= _MIN_WIDTH_PX
        and context.width % 2 == 0
        and context.height % 2 == 0
    )


def read_decord(
    path: Path,
    wanted: Sequence[int],
    start: tuple[int, float] | None,
    fit: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]],
) -> dict[int, npt.NDArray[np.uint8]]:
    """Read frames, which decord turns upright itself, and apply ``fit`` to each.

    Args:
        path: Video file.
        wanted: Frame numbers.
        start: Number and time in seconds of one frame, to check that decord counts alike (edit
            lists can shift numbers).
        fit: From (H, W, 3) RGB to the wanted picture.

    Raises:
        VideoDecodeError: decord cannot read them, or counts frames differently.
    """
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", _EOF_RETRIES)
    import decord  # here: loading it costs time and reads its environment variables

    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if start is not None:
            begin_s = float(reader.get_frame_timestamp(start[0])[0])
            if abs(begin_s - start[1]) > 0.004:  # a quarter of a frame at 60 fps
                raise decord.DECORDError(f"frame {start[0]} is at {begin_s} s, not {start[1]} s")
        # One by one: get_batch would hold every full-size frame at once.
        found = {i: fit(_rgb(reader[i])) for i in wanted}
        del reader  # decord keeps decoding ahead as long as the reader lives
    except (decord.DECORDError, IndexError, RuntimeError, UnicodeEncodeError) as error:
        raise VideoDecodeError(
            "decord cannot read the frames", where=path, found=error, do="use backend='auto'"
        ) from error
    return found


def _rgb(frame: Any) -> npt.NDArray[np.uint8]:
    """A decord frame as (H, W, 3)."""
    pixels: npt.NDArray[np.uint8] = frame.asnumpy()
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise RuntimeError(f"decord gives frames of shape {pixels.shape}")
    return pixels
