"""What a file is: one row of ``sources`` from its header, its packets and its first frames.

Every packet is read (not decoded), so the row tells a file that is shorter than its header says,
and a remuxed copy of another.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import cast

import av
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from curation.packets import PacketHash
from curation.video import decode, open_video, pixel_aspect, quarter_turns
from schemas.errors import VideoDecodeError
from schemas.rows import Source
from schemas.storage import fingerprint_file

_FIRST_FRAMES = 8
"""Frames decoded to see whether a video is interlaced: two groups of pictures of old broadcasts
begin with up to three progressive frames."""

_SHORT_S = 1.0
"""A file may end this much before its header says: some containers keep whole seconds."""

_MAX_PIXEL_ASPECT = 8.0
"""Pixels longer than this are a broken header; the most anamorphic real formats stay below 3."""


def probe(path: Path) -> Source:
    """Fingerprint a file, read its header and all its packets, and decode its first frames.

    ``width_px`` and ``height_px`` are the coded size, before rotation. ``is_vfr``, ``duration_s``
    and ``num_frames`` stay None: headers lie, so they are known only after a full decode
    (``shots.py``). ``is_interlaced`` is what the first frames' flags say. ``has_edit_list`` is
    true where an mp4's edit list moves or cuts the video's frames; it is obeyed by every reader.

    Raises:
        VideoDecodeError: as :func:`curation.video.decode`; ``no_frames`` for a file that opens but
            holds no picture; ``truncated`` for one that ends before its header says;
            ``bad_pixel_aspect``.
    """
    with open_video(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        sar = stream.sample_aspect_ratio or Fraction(1)
        codec = stream.codec_context.codec.canonical_name
        time_base = stream.time_base
        has_audio = bool(container.streams.audio)
        container_name = container.format.name
    packet_sha256 = _read_packets(path)
    first_frames = list(islice(decode(path), _FIRST_FRAMES))
    if not first_frames or time_base is None:
        raise VideoDecodeError(
            "the file opens but holds no decodable picture", reason="no_frames", where=path
        )
    first = first_frames[0]
    return Source(
        source_id=fingerprint_file(path),
        uri=str(path),
        size_bytes=path.stat().st_size,
        packet_sha256=packet_sha256,
        container=container_name,
        codec=codec,
        pix_fmt=first.format.name,
        bit_depth=max(component.bits for component in first.format.components),
        width_px=first.width,
        height_px=first.height,
        rotation_deg=quarter_turns(first) * 90,
        sar_num=sar.numerator,
        sar_den=sar.denominator,
        time_base_num=time_base.numerator,
        time_base_den=time_base.denominator,
        start_pts=first.pts,
        avg_fps=float(rate) if rate else 0.0,
        is_vfr=None,
        is_interlaced=any(frame.interlaced_frame for frame in first_frames),
        has_edit_list=_has_edit_list(path),
        duration_s=None,
        num_frames=None,
        has_audio=has_audio,
    )


def display_size(source: Source) -> tuple[int, int]:
    """Width and height in pixels of the upright picture with square pixels.

    As players do it: the coded height stays, the width is stretched, then the picture is turned.
    """
    width_px = max(1, round(source.width_px * source.sar_num / source.sar_den))
    if source.rotation_deg % 180:
        return source.height_px, width_px
    return width_px, source.height_px


def _read_packets(path: Path) -> str:
    """Read all packets, and give the SHA-256 of those of the video stream, in file order.

    Raises:
        VideoDecodeError: ``decode_error`` where the container is damaged, ``truncated``,
            ``bad_pixel_aspect``.
    """
    count = 0
    end_s: float | None = None
    with open_video(path) as (container, stream):
        aspect = pixel_aspect(stream)
        if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
            raise VideoDecodeError(
                "the header gives pixels an impossible shape",
                reason="bad_pixel_aspect",
                where=path,
                found=f"{stream.sample_aspect_ratio}",
                expected=f"at most {_MAX_PIXEL_ASPECT:g} to 1",
                do="correct the sample aspect ratio by remuxing the file",
            )
        digest = PacketHash(stream)
        is_mov = "mov" in container.format.name.split(",")
        indexed = len(stream.index_entries) if is_mov else 0
        try:
            for packet in container.demux():
                if not packet.size:
                    continue
                if packet.stream.index == stream.index:
                    count += 1
                    digest.add(cast("Packet[VideoStream]", packet))
                if packet.pts is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    end_s = end if end_s is None else max(end_s, end)
        except MemoryError:  # as in decode()
            raise
        except (FFmpegError, OSError) as error:
            raise VideoDecodeError(
                "the container is damaged",
                reason="decode_error",
                where=path,
                found=f"{getattr(error, 'strerror', None) or error}, after {count} packets",
                do="get an undamaged copy of the file",
            ) from error
        said_s = None
        if container.duration and not is_mov:
            said_s = ((container.start_time or 0) + container.duration) / av.time_base
    # An mp4 lists its frames; elsewhere the header's duration, which is that of the longest
    # stream, is all there is to compare with.
    if count < indexed:
        raise _truncated(path, f"{count} frames", f"{indexed} frames")
    if said_s is not None and end_s is not None and end_s < said_s - _SHORT_S:
        raise _truncated(path, f"end at {end_s:.2f} s", f"end at {said_s:.2f} s")
    return digest.hexdigest()


def _truncated(path: Path, found: str, expected: str) -> VideoDecodeError:
    return VideoDecodeError(
        "the file ends before its header says",
        reason="truncated",
        where=path,
        found=f"{found}, header: {expected}",
        do="get a complete copy of the file",
    )


def _has_edit_list(path: Path) -> bool:
    """Whether the video's frames or their times change if an mp4's edit lists are ignored."""
    seen: set[tuple[int | None, int | None, int]] = set()
    for options in ({}, {"ignore_editlist": "1"}):
        with open_video(path, options) as (container, stream):
            if "mov" not in container.format.name.split(","):
                return False
            seen.add((stream.start_time, stream.duration, len(stream.index_entries)))
    return len(seen) > 1
