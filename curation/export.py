"""Clips as files of their own (optional: training reads spans of the sources).

``reencode`` gives exactly the frames of the clip, upright with square pixels, as H.264. ``copy``
takes the packets as they are, from the key frame at or before the clip to the first frame after it
at which the stream can be cut. Neither keeps sound. A file appears under its name only after it
was decoded and found whole, and a note beside it (same name, ``.json``) holds its checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Generator, Iterator
from fractions import Fraction
from itertools import chain, dropwhile, takewhile
from math import ceil
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import PictureType
from av.video.stream import VideoStream

from curation.mp4 import H264
from curation.video import decode, open_video, quarter_turns
from schemas.config.curation import ExportConfig
from schemas.errors import VideoDecodeError
from schemas.rows import Clip, Export
from schemas.storage import atomic_path, fingerprint, read_json, write_json

EXPORT_VERSION = 1
"""Raise it when the code gives other files: the names change, and all are made anew."""

_INDEXED = {"mov", "mp4", "matroska", "webm"}
"""Containers that store every frame's time; elsewhere times after a seek are guessed, so a file is
read from its start."""

_SEEK_BACK_S = 5.0
"""How far before the clip a second seek goes: key frames are indexed by decoding time, and the
first may land behind the clip's start."""

_LOOKAHEAD = 64
"""Packets read behind the last one of a clip to see where the stream can be cut. Codecs reorder at
most 16 frames (H.264, HEVC)."""

_MP4_CODECS = {"av1", "h264", "hevc", "mpeg4", "vp9"}
"""Copied into mp4, which keeps times exactly; others into Matroska, which keeps milliseconds."""

_MUXER_OPTIONS = {
    "mp4": {"movflags": "+faststart", "fflags": "+bitexact"},
    "matroska": {"fflags": "+bitexact"},
}
_MAX_DRIFT_S = Fraction(1, 1000)


def export_clip(clip: Clip, cfg: ExportConfig, folder: Path) -> Export:
    """Write one clip into ``folder``, or find it there, made earlier and undamaged.

    The file is named after what it shows and how it is written: the clip's id, which stands for
    the source's bytes and the span, and a fingerprint of the settings. ``mode="copy"`` shows more
    than the clip where it does not begin at a key frame or its last frames need later ones: the
    row holds the span shown, and with it maybe frames of the shots around.

    Args:
        clip: The clip; its source must be where ``clip.uri`` says.
        cfg: With ``mode`` ``reencode`` or ``copy``.
        folder: Where the file goes; made if missing.

    Raises:
        VideoDecodeError: as :func:`curation.video.decode`; ``missing_frames`` where the source does
            not hold the clip's frames (it has changed); ``cannot_copy`` where its packets cannot be
            cut out or put into a file; ``export_differs`` where the written file does not decode to
            the frames put in.
    """
    assert cfg.mode != "none", "nothing to export"
    settings = (str(cfg.fps), cfg.crf) if cfg.mode == "reencode" else ()
    name = f"{clip.clip_id}-{fingerprint(EXPORT_VERSION, cfg.mode, *settings)}"
    note = folder / f"{name}.json"
    existing = _verified(note)
    if existing is not None:
        return existing
    write = _reencode if cfg.mode == "reencode" else _copy
    export = write(clip, cfg, folder / name)
    write_json(note, dataclasses.asdict(export) | {"uri": Path(export.uri).name})
    return export


def _verified(note: Path) -> Export | None:
    """The export a note speaks of, if its file is there with the noted checksum."""
    try:
        export = Export(**read_json(note))
        path = note.parent / export.uri
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == export.sha256
    except (OSError, ValueError, TypeError):  # not there, or not as we write it: made anew
        return None
    return dataclasses.replace(export, uri=str(path)) if whole else None


def _finish(
    clip: Clip, mode: str, tmp: Path, path: Path, span: tuple[int, int], times: list[Fraction]
) -> Export:
    """Check a written file against the times its frames should have, and describe it.

    Raises:
        VideoDecodeError: reason ``export_differs``.
    """
    found: list[Fraction] = []
    width_px = height_px = 0
    for frame in decode(tmp):
        assert frame.pts is not None
        assert frame.time_base is not None
        found.append(frame.pts * frame.time_base)
        width_px, height_px = frame.width, frame.height
    drift = [abs(a - found[0] - b) for a, b in zip(found, times, strict=False)]
    if len(found) != len(times) or max(drift) > _MAX_DRIFT_S:
        raise VideoDecodeError(
            "the exported file does not hold the frames put in",
            reason="export_differs",
            where=f"clip {clip.clip_id} of {clip.uri}, mode {mode}",
            found=f"{len(found)} frames, off by up to {float(max(drift, default=0)):.4f} s",
            expected=f"{len(times)} frames, off by up to {float(_MAX_DRIFT_S):g} s",
            do="use export.mode 'reencode'" if mode == "copy" else "report this as a bug",
        )
    if mode == "copy":  # rotation and pixel shape stay in the header, as in the source
        width_px, height_px = clip.width_px, clip.height_px
    with tmp.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Export(
        clip_id=clip.clip_id,
        mode=mode,
        uri=str(path),
        start_pts=span[0],
        end_pts=span[1],
        num_frames=len(found),
        fps=clip.fps,
        width_px=width_px,
        height_px=height_px,
        size_bytes=tmp.stat().st_size,
        sha256=sha256,
    )


def _missing(clip: Clip, found: object) -> VideoDecodeError:
    return VideoDecodeError(
        "the source does not hold the clip's frames",
        reason="missing_frames",
        where=f"clip {clip.clip_id} of {clip.uri}",
        found=found,
        expected=f"{clip.num_frames} frames, PTS {clip.start_pts} to {clip.end_pts}",
        do="the file has changed since it was curated: refresh the dataset",
    )


def _reencode(clip: Clip, cfg: ExportConfig, stem: Path) -> Export:
    """Frames of the clip as H.264, at their own times or at ``cfg.fps``."""
    path = stem.with_name(f"{stem.name}.mp4")
    with open_video(Path(clip.uri)) as (_, source):
        assert source.time_base is not None
        tick = source.time_base
    if cfg.fps is None:
        rate, time_base = Fraction(clip.fps).limit_denominator(100_000), tick
        timed = ((f.pts - clip.start_pts, f) for f in _frames(clip) if f.pts is not None)
    else:
        rate = Fraction(cfg.fps).limit_denominator(100_000)
        time_base = 1 / rate
        timed = enumerate(_at_rate(clip, _frames(clip), tick * rate))
    with atomic_path(path) as tmp:
        with av.open(str(tmp), "w", format="mp4", options=_MUXER_OPTIONS["mp4"]) as out:
            stream = out.add_stream("libx264", rate=rate)
            ticks = _encode(out, stream, timed, clip, cfg.crf, time_base)
        times = [t * time_base for t in ticks]
        export = _finish(clip, cfg.mode, tmp, path, (clip.start_pts, clip.end_pts), times)
    return dataclasses.replace(export, fps=cfg.fps or clip.fps)


def _frames(clip: Clip) -> Iterator[av.VideoFrame]:
    """Exactly the clip's frames as decoded.

    Raises:
        VideoDecodeError: as :func:`export_clip`.
    """
    path = Path(clip.uri)
    with open_video(path) as (container, stream):
        indexed = bool(_INDEXED & set(container.format.name.split(",")))
        assert stream.time_base is not None
        back = int(_SEEK_BACK_S / stream.time_base)
    for seek_pts in (clip.start_pts, clip.start_pts - back, None) if indexed else (None,):
        frames = dropwhile(lambda f: (f.pts or 0) < clip.start_pts, decode(path, seek_pts))
        first = next(frames, None)
        if first is not None and first.pts == clip.start_pts:
            return _counted(
                clip, takewhile(lambda f: (f.pts or 0) < clip.end_pts, chain([first], frames))
            )
    raise _missing(clip, f"no frame at PTS {clip.start_pts}")


def _counted(clip: Clip, frames: Iterator[av.VideoFrame]) -> Generator[av.VideoFrame]:
    count = 0
    for frame in frames:
        count += 1
        yield frame
    if count != clip.num_frames:
        raise _missing(clip, f"{count} frames")


def _at_rate(
    clip: Clip, frames: Iterator[av.VideoFrame], steps_per_tick: Fraction
) -> Iterator[av.VideoFrame]:
    """Frames at a constant rate: in the middle of each step, the one on display then.

    In the middle, for times rounded to a coarse time base lie a little before or after the grid.
    A clip shorter than half a step still gives one frame.
    """
    shown: av.VideoFrame | None = None
    done = 0
    for frame in chain(frames, [None]):
        ends = clip.end_pts if frame is None else frame.pts or 0
        if shown is not None:
            until = ceil((ends - clip.start_pts) * steps_per_tick - Fraction(1, 2))
            if frame is None:
                until = max(until, 1)
            for _ in range(done, until):
                yield shown
            done = max(done, until)
        shown = frame


def _encode(
    out: OutputContainer,
    stream: VideoStream,
    timed: Iterator[tuple[int, av.VideoFrame]],
    clip: Clip,
    crf: int,
    time_base: Fraction,
) -> list[int]:
    """Encode frames with their times in ticks of ``time_base``; gives the times written."""
    context = stream.codec_context
    # yuv420p needs even sizes. One thread: workers run side by side, one per CPU.
    stream.width, stream.height = (max(2, n - n % 2) for n in (clip.width_px, clip.height_px))
    stream.pix_fmt = "yuv420p"
    stream.time_base = context.time_base = time_base
    context.thread_count = 1
    context.options = {**H264, "crf": str(crf)}
    ticks: list[int] = []
    for pts, decoded in timed:
        frame = _upright(decoded, stream.width, stream.height)
        if not ticks:
            context.color_range = frame.color_range
            context.colorspace = frame.colorspace
            context.color_primaries = frame.color_primaries
            context.color_trc = frame.color_trc
        frame.pts, frame.time_base = pts, time_base
        frame.pict_type = PictureType.NONE  # or the encoder repeats the source's key frames
        out.mux(stream.encode(frame))
        ticks.append(pts)
    out.mux(stream.encode())
    return ticks


def _upright(frame: av.VideoFrame, width_px: int, height_px: int) -> av.VideoFrame:
    """A frame turned upright and scaled, as yuv420p."""
    turns = quarter_turns(frame)
    if not turns:
        return frame.reformat(width_px, height_px, format="yuv420p", interpolation="BICUBIC")
    if turns % 2:
        width_px, height_px = height_px, width_px
    # Planes of one size, so that they turn as one array.
    full = frame.reformat(width_px, height_px, format="yuv444p", interpolation="BICUBIC")
    planes = np.rot90(np.asarray(full.to_ndarray(), np.uint8), turns, axes=(1, 2))
    turned = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv444p")
    turned.color_range, turned.colorspace = full.color_range, full.colorspace
    turned.color_primaries, turned.color_trc = full.color_primaries, full.color_trc
    return turned.reformat(format="yuv420p")


def _copy(clip: Clip, cfg: ExportConfig, stem: Path) -> Export:
    """Packets of the clip as they are, and those without which they cannot be decoded."""
    source = Path(clip.uri)
    with open_video(source) as (container, stream):
        packets, end_pts = _packets(clip, container, stream)
        codec = stream.codec_context.codec.canonical_name
        suffix, muxer = (".mp4", "mp4") if codec in _MP4_CODECS else (".mkv", "matroska")
        path = stem.with_name(stem.name + suffix)
        start_pts = _pts(packets[0])
        assert stream.time_base is not None
        times = [(pts - start_pts) * stream.time_base for pts in sorted(map(_pts, packets))]
        with atomic_path(path) as tmp:
            try:
                with av.open(str(tmp), "w", format=muxer, options=_MUXER_OPTIONS[muxer]) as out:
                    target = out.add_stream_from_template(stream, opaque=True)
                    for packet in packets:
                        packet.pts = _pts(packet) - start_pts
                        packet.dts = None if packet.dts is None else packet.dts - start_pts
                        packet.stream = target
                        out.mux_one(packet)
            except (FFmpegError, ValueError) as error:
                raise _cannot_copy(clip, f"{codec} into {muxer}: {error}") from error
            return _finish(clip, cfg.mode, tmp, path, (start_pts, end_pts), times)


def _packets(
    clip: Clip, container: InputContainer, stream: VideoStream
) -> tuple[list[Packet[VideoStream]], int]:
    """The packets to copy, in decoding order, and the end of what they show in ticks."""
    assert stream.time_base is not None
    back = int(_SEEK_BACK_S / stream.time_base)
    indexed = bool(_INDEXED & set(container.format.name.split(",")))
    for seek_pts in (clip.start_pts, clip.start_pts - back, None) if indexed else (None,):
        if seek_pts is not None:
            container.seek(seek_pts, stream=stream, backward=True)
        elif indexed:
            container.seek(0)
        packets = _from_key_frame(clip, container.demux(stream))
        if packets is not None:
            return _until_cut(clip, packets)
    raise _cannot_copy(clip, "no key frame at or before the clip's start")


def _from_key_frame(
    clip: Clip, packets: Iterator[Packet[VideoStream]]
) -> list[Packet[VideoStream]] | None:
    """Packets from the last key frame at or before the clip to a little behind it, if there is one.

    Frames that follow a key frame in the stream but come before it in time need the one before, so
    they are left out.
    """
    found: list[Packet[VideoStream]] = []
    behind = 0
    for packet in packets:
        if not packet.size:  # the demuxer's sign of the end
            continue
        if packet.is_keyframe and _pts(packet) <= clip.start_pts:
            found = [packet]
        elif found and _pts(packet) > _pts(found[0]):
            found.append(packet)
        behind = 0 if _pts(packet) < clip.end_pts else behind + 1
        if behind > _LOOKAHEAD:
            break
    return found or None


def _until_cut(
    clip: Clip, packets: list[Packet[VideoStream]]
) -> tuple[list[Packet[VideoStream]], int]:
    """Packets up to the first place behind the clip where no earlier frame is still to come."""
    times = [_pts(packet) for packet in packets]
    inside = [i for i, pts in enumerate(times) if clip.start_pts <= pts < clip.end_pts]
    if len(inside) != clip.num_frames:
        raise _missing(clip, f"packets of {len(inside)} frames")
    for cut in range(inside[-1] + 1, len(times)):
        following = min(times[cut:])
        if max(times[:cut]) < following:
            return packets[:cut], following
    last = max(packets, key=_pts)
    # Nothing follows: the clip's own end, or that of the frames taken along behind it.
    return packets, max(clip.end_pts, _pts(last) + (last.duration or 0))


def _pts(packet: Packet[VideoStream]) -> int:
    if packet.pts is None:
        raise VideoDecodeError(
            "packets without times cannot be cut",
            reason="cannot_copy",
            found=f"a packet without PTS at byte {packet.pos}",
            do="use export.mode 'reencode'",
        )
    return packet.pts


def _cannot_copy(clip: Clip, found: object) -> VideoDecodeError:
    return VideoDecodeError(
        "the clip's packets cannot be put into a file of their own",
        reason="cannot_copy",
        where=f"clip {clip.clip_id} of {clip.uri}",
        found=found,
        do="use export.mode 'reencode'",
    )
