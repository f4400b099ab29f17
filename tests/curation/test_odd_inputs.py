"""Every kind of odd input ends as expected: kept with its frames, or rejected with a reason.

Each goes through the whole way of a video (probe, shots, reading) in isolated children with limits.
``docs/odd_inputs.md`` is the table of these outcomes, and is checked here.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from curation.inputs.uris import uri_of
from curation.isolation import run_isolated
from curation.mp4 import write_mp4
from curation.probe import display_size, probe
from curation.video import decode, fit, open_video, pixel_aspect, quarter_turns, read_frames
from schemas.config.curation import ShotsConfig
from schemas.errors import VideoDecodeError
from schemas.rows import Source

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ODD = ROOT / "assets" / "odd"
BROKEN = ROOT / "assets" / "samples" / "broken"

Make = Callable[[Path], Path]


@dataclass(frozen=True)
class Kind:
    """One kind of input: how to make one in a folder, and what must come of it.

    ``frames`` are those of a kept one, ``size`` its display size; otherwise ``reason`` is given.
    """

    name: str
    make: Make
    frames: int | None = None
    size: tuple[int, int] | None = None
    reason: str | None = None
    timeout_s: float = 60.0
    memory_mb: int = 1024

    @property
    def outcome(self) -> str:
        """As it stands in the table."""
        if self.reason:
            return f"rejected: `{self.reason}`"
        assert self.size
        return f"kept: {self.frames} frames, {self.size[0]}×{self.size[1]}"


def picture(i: int, height: int = 96, width: int = 160) -> np.ndarray:
    """A gradient with a moving bar and fixed noise, so that a frame has some bytes to damage."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width))
    frame = np.stack([x * 150 // width + noise, y * 180 // height + noise, noise + 60], -1)
    frame[:, 3 * i % width : 3 * i % width + max(1, width // 16)] = 220
    return frame.astype(np.uint8)


def plain(path: Path, count: int = 48, height: int = 96, width: int = 160, fps: float = 24) -> Path:
    """An ordinary mp4 of our own writer."""
    write_mp4(path, np.stack([picture(i, height, width) for i in range(count)]), fps)
    return path


def encoded(
    path: Path,
    *,
    count: int = 48,
    size: tuple[int, int] = (96, 160),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 24,
    pts: Callable[[int], int] = lambda i: i,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    sar: Fraction | None = None,
    form: str | None = None,
) -> Path:
    """A film by PyAV with everything adjustable."""
    with av.open(str(path), "w", format=form, options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        stream.codec_context.thread_count = 1
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = pts(i), Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def copied(name: str) -> Make:
    return lambda folder: Path(shutil.copy(ODD / name, folder / name))


def rotated(degrees: int) -> Make:
    """A display matrix that turns the picture clockwise."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]

    def change(data: bytearray) -> None:
        at = data.index(b"tkhd") + 4 + 40
        one = 0x10000
        matrix = [cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 0x40000000]
        data[at : at + 36] = struct.pack(">9i", *matrix)

    return lambda folder: patched(plain(folder / "rotated.mp4"), change)


def truncated(folder: Path) -> Path:
    path = plain(folder / "truncated.mp4")
    os.truncate(path, path.stat().st_size * 6 // 10)  # the index is in front
    return path


def no_index(folder: Path) -> Path:
    path = encoded(folder / "no_index.mp4")  # the index is at the end
    os.truncate(path, path.stat().st_size * 6 // 10)
    return path


def cut_matroska(folder: Path) -> Path:
    path = encoded(folder / "cut.mkv", options={"g": "12"})
    os.truncate(path, path.stat().st_size // 2)
    return path


def broken_middle(folder: Path) -> Path:
    """The end of a packet in the middle is noise; where it begins and how long it is stays so."""
    path = plain(folder / "broken_middle.mp4")
    with av.open(str(path)) as container:
        packets = [(p.size, p.pos) for p in container.demux(video=0) if p.size]
    size, start = max(packets[len(packets) // 3 :])

    def change(data: bytearray) -> None:
        assert start is not None
        end = start + size
        data[end - size // 2 : end] = np.random.default_rng(1).bytes(size // 2)

    return patched(path, change)


def claims_8k(folder: Path) -> Path:
    """The container says 7680 x 4320, the H.264 stream in it 160 x 96."""

    def change(data: bytearray) -> None:
        at = data.index(b"tkhd") + 4 + 76
        data[at : at + 8] = struct.pack(">II", 7680 << 16, 4320 << 16)
        at = data.index(b"avc1", data.index(b"stsd")) + 4 + 24
        data[at : at + 4] = struct.pack(">HH", 7680, 4320)

    return patched(plain(folder / "claims_8k.mp4"), change)


def edit_list(folder: Path) -> Path:
    """The edit list of an mp4 moved on by 12 frames: the presentation begins there."""

    def change(data: bytearray) -> None:
        at = data.index(b"elst") + 4 + 4 + 4
        duration, begin = struct.unpack(">Ii", data[at : at + 8])
        ticks = 512 * 12
        data[at : at + 8] = struct.pack(">Ii", duration - 500, begin + ticks)

    return patched(plain(folder / "edit_list.mp4"), change)


def lying_duration(folder: Path) -> Path:
    """A Matroska header that says 1000 s."""

    def change(data: bytearray) -> None:
        at = data.index(b"\x44\x89\x88") + 3
        data[at : at + 8] = struct.pack(">d", 1_000_000.0)

    return patched(encoded(folder / "lying.mkv"), change)


def with_cover(folder: Path) -> Path:
    """A sound file whose only picture is its cover."""
    path = folder / "cover.mp3"
    with av.open(str(path), "w") as out:
        sound = out.add_stream("mp3", rate=44100)
        cover = out.add_stream("mjpeg")
        assert isinstance(cover, av.VideoStream)
        cover.width, cover.height, cover.pix_fmt = 160, 96, "yuvj420p"
        image = av.VideoFrame.from_ndarray(picture(0), format="rgb24").reformat(format="yuvj420p")
        image.pts, image.time_base = 0, Fraction(1, 25)
        out.mux(cover.encode(image))
        out.mux(cover.encode())
        tone = np.zeros((2, 44100), np.float32)
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="stereo")
        frame.rate = 44100
        out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return path


def text(folder: Path) -> Path:
    path = folder / "text.mp4"
    path.write_text("This is not a video. " * 100)
    return path


def folder_named_mp4(folder: Path) -> Path:
    (folder / "folder.mp4").mkdir()
    return folder / "folder.mp4"


def named_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


def symlink_loop(folder: Path) -> Path:
    (folder / "a.mp4").symlink_to(folder / "b.mp4")
    (folder / "b.mp4").symlink_to(folder / "a.mp4")
    return folder / "a.mp4"


def renamed(name: str | bytes) -> Make:
    def make(folder: Path) -> Path:
        path = folder / os.fsdecode(name)
        return plain(folder / "x.mp4").rename(path)

    return make


def still_image(folder: Path) -> Path:
    path = folder / "still.mp4"
    encoded(folder / "still.png", count=1, codec="png", pix_fmt="rgb24", form="image2")
    return (folder / "still.png").rename(path)


def vanished(folder: Path) -> Path:
    return folder / "vanished.mp4"


KINDS = [
    Kind("ordinary mp4", lambda f: plain(f / "a.mp4"), 48, (160, 96)),
    Kind("zero length", lambda f: Path(shutil.copy(BROKEN / "empty.mp4", f)), reason="empty_file"),
    Kind("text named .mp4", text, reason="cannot_open"),
    Kind(
        "audio only",
        lambda f: Path(shutil.copy(BROKEN / "audio_only.mp4", f)),
        reason="no_video_stream",
    ),
    Kind("audio with attached picture", with_cover, reason="no_video_stream"),
    Kind("truncated mp4, index in front", truncated, reason="truncated"),
    Kind("missing index (mp4 cut before it)", no_index, reason="cannot_open"),
    Kind("truncated Matroska", cut_matroska, reason="truncated"),
    Kind("lie about length (Matroska says 1000 s)", lying_duration, reason="truncated"),
    Kind("broken middle", broken_middle, reason="damaged_frame"),
    Kind("undecodable packet", copied("corrupt_packet.mp4"), reason="decode_error"),
    Kind("encrypted", copied("encrypted.webm"), reason="decode_error"),
    Kind("AV1", copied("av1.mkv"), 125, (640, 360)),
    Kind("HEVC 10-bit", copied("hevc_10bit.mp4"), 30, (200, 200)),
    Kind("VP9 with alpha", copied("vp9_alpha.webm"), 150, (200, 200)),
    Kind("VP9 of odd size", copied("vp9_161x121.webm"), 30, (161, 121)),
    Kind("H.263 in 3GP", copied("h263.3gp"), 15, (176, 144)),
    Kind("MPEG transport stream", copied("h264.ts"), 30, (854, 480)),
    Kind("4:4:4, fragmented mp4", copied("yuv444_fragmented.mp4"), 30, (640, 360)),
    Kind("brackets and quote in the name", copied("te[s]t_ video ' _ .flv"), 10, (320, 240)),
    Kind("variable frame rate", copied("vfr_slow_motion.mp4"), 7, (1280, 720)),
    Kind("size changes midstream", copied("size_change.mp4"), 118, (400, 300)),
    Kind("rotated by a phone", copied("rotated_phone.mov"), 3, (320, 568)),
    Kind("rotation 90°", rotated(90), 48, (96, 160)),
    Kind("rotation 180°", rotated(180), 48, (160, 96)),
    Kind("rotation 270°", rotated(270), 48, (96, 160)),
    Kind(
        "anamorphic (pixels 64:45)",
        lambda f: encoded(f / "a.mp4", sar=Fraction(64, 45)),
        48,
        (228, 96),
    ),
    Kind(
        "impossible pixels (20:1)",
        lambda f: encoded(f / "a.mp4", sar=Fraction(20, 1)),
        reason="bad_pixel_aspect",
    ),
    Kind(
        "interlaced",
        lambda f: encoded(f / "a.mp4", options={"x264-params": "tff=1"}),
        48,
        (160, 96),
    ),
    Kind("edit list that leaves out 12 frames", edit_list, 36, (160, 96)),
    Kind(
        "negative first PTS",
        lambda f: encoded(
            f / "a.ts",
            pts=lambda i: i - 60,
            container_options={"avoid_negative_ts": "disabled"},
        ),
        48,
        (160, 96),
    ),
    Kind(
        "timestamp jump of 1000 s",
        lambda f: encoded(f / "a.mkv", pts=lambda i: i + 24_000 * (i > 20)),
        48,
        (160, 96),
    ),
    Kind(
        "no timestamps (raw H.264)",
        lambda f: encoded(f / "raw.h264", form="h264"),
        reason="bad_timestamps",
    ),
    Kind(
        "times that go back (AVI with B-frames)",
        lambda f: encoded(f / "a.avi", pts=lambda i: i + 1, options={"bf": "2"}),
        reason="bad_timestamps",
    ),
    Kind("one frame", lambda f: plain(f / "a.mp4", 1), 1, (160, 96)),
    Kind("still image named .mp4", still_image, 1, (160, 96)),
    Kind("2×2 pixels", lambda f: plain(f / "a.mp4", 12, 2, 2), 12, (2, 2)),
    Kind(
        "odd size in H.264",
        lambda f: encoded(f / "a.mp4", size=(97, 161), pix_fmt="yuv444p"),
        48,
        (161, 97),
    ),
    Kind("8K claim in the header", claims_8k, 48, (160, 96)),
    Kind(
        "huge GOP (600 frames)",
        lambda f: encoded(f / "a.mp4", count=600, size=(48, 64), options={"g": "10000"}),
        600,
        (64, 48),
    ),
    Kind("monochrome", lambda f: encoded(f / "a.mp4", pix_fmt="gray"), 48, (160, 96)),
    Kind("60 fps", lambda f: plain(f / "a.mp4", 60, fps=60), 60, (160, 96)),
    Kind(
        "no duration (live Matroska)",
        lambda f: encoded(f / "a.mkv", container_options={"live": "1"}),
        48,
        (160, 96),
    ),
    Kind("wrong extension (mp4 named .avi)", renamed("mp4.avi"), 48, (160, 96)),
    Kind("non-UTF-8 name", renamed(b"caf\xe9.mp4"), 48, (160, 96)),
    Kind("folder named .mp4", folder_named_mp4, reason="not_a_file"),
    Kind("named pipe", named_pipe, reason="not_a_file"),
    Kind("symlink loop", symlink_loop, reason="symlink_loop"),
    Kind("vanished before the run", vanished, reason="not_found"),
    Kind(
        "longer than the time limit",
        lambda f: plain(f / "a.mp4", 60, 256, 384),
        reason="timeout",
        timeout_s=0.002,
    ),
    Kind(
        "picture larger than the memory limit",
        lambda f: encoded(
            f / "a.avi", count=1, size=(2048, 2048), codec="mjpeg", pix_fmt="yuvj420p"
        ),
        reason="out_of_memory",
        memory_mb=4,
    ),
]


def walk(path: Path, kind: Kind) -> tuple[str | None, dict[str, Any]]:
    """A video's whole way, isolated. Gives the reason of its reject, or what was found."""
    limits = {"timeout_s": kind.timeout_s, "memory_mb": kind.memory_mb}
    try:
        probed = run_isolated(
            "curation.jobs:probe_source", {"path": str(path), "uri": uri_of(path)}, **limits
        )
        if "reject" in probed:
            return probed["reject"]["reason"], probed
        config = ShotsConfig().model_dump(mode="json")
        job = {"path": str(path), "source": probed["source"], "config": config}
        found = run_isolated("curation.jobs:find_shots", job, **limits)
        if "reject" in found:
            return found["reject"]["reason"], found
        detection = found["detection"]
        job = {
            "path": str(path),
            "frame_numbers": [0, detection["num_frames"] - 1],
            "start": [0, detection["frame_pts"][0]],
            "height_px": 32,
            "width_px": 48,
            "mode": "cover",
        }
        frames = run_isolated("curation.jobs:read_clip", job, **limits)
    except VideoDecodeError as error:
        return error.reason, {}
    return None, {"source": Source(**probed["source"]), "detection": detection, "frames": frames}


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_outcome(kind: Kind, tmp_path: Path) -> None:
    path = kind.make(tmp_path)
    reason, found = walk(path, kind)
    assert reason == kind.reason, found
    if reason:
        return
    assert found["detection"]["num_frames"] == kind.frames
    assert display_size(found["source"]) == kind.size
    assert found["detection"]["shots"][0]["start_frame"] == 0
    assert found["detection"]["shots"][-1]["end_frame"] == kind.frames
    # decord scales a picture of another size by a rule of its own, a few levels off.
    off = 4 if kind.name == "size changes midstream" else 0
    assert np.abs(found["frames"].astype(int) - first_and_last(path)).max() <= off


def first_and_last(path: Path) -> np.ndarray:
    """The oracle: the first and the last picture of a plain decode, upright, square, 48 x 32."""
    frames = list(decode(path))
    with open_video(path) as (_, stream):
        aspect = pixel_aspect(stream)
    pictures: list[np.ndarray] = []
    for frame in (frames[0], frames[-1]):
        turns = quarter_turns(frame)
        same_size = frame.reformat(frames[0].width, frames[0].height)
        upright = np.rot90(same_size.to_ndarray(format="rgb24"), turns)
        pictures.append(fit(upright, 32, 48, "cover", 1 / aspect if turns % 2 else aspect))
    return np.stack(pictures)


def test_permission_denied(tmp_path: Path) -> None:
    path = plain(tmp_path / "secret.mp4", 2)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # whom no mode stops
        os.seteuid(65534)
    try:
        with pytest.raises(VideoDecodeError) as caught:
            probe(path)
    finally:
        if root:
            os.seteuid(0)
    assert caught.value.reason == "permission_denied"


def test_vanished_during_the_run(tmp_path: Path) -> None:
    path = plain(tmp_path / "brief.mp4", 4)
    limits = {"timeout_s": 60.0, "memory_mb": 1024}
    probed = run_isolated(
        "curation.jobs:probe_source", {"path": str(path), "uri": uri_of(path)}, **limits
    )
    path.unlink()
    config = ShotsConfig().model_dump(mode="json")
    job = {"path": str(path), "source": probed["source"], "config": config}
    found = run_isolated("curation.jobs:find_shots", job, **limits)
    assert found["reject"]["reason"] == "not_found"
    job = {"path": str(path), "frame_numbers": [0], "height_px": 8, "width_px": 8}
    with pytest.raises(VideoDecodeError) as caught:
        run_isolated("curation.jobs:read_clip", job, **limits)
    assert caught.value.reason == "not_found"


@pytest.mark.parametrize(
    ("kind", "start_pts", "first_shown", "has_edit_list"),
    [
        ("negative first PTS", -60 * 90_000 // 24, 0, False),
        ("edit list that leaves out 12 frames", 0, 12, True),
    ],
)
def test_where_a_film_begins(
    kind: str, start_pts: int, first_shown: int, has_edit_list: bool, tmp_path: Path
) -> None:
    path = next(k for k in KINDS if k.name == kind).make(tmp_path)
    source = probe(path)
    assert (source.start_pts, source.has_edit_list) == (start_pts, has_edit_list)
    shown = read_frames(path, [0], height_px=96, width_px=160)[0].astype(int)
    errors = [np.abs(shown - picture(i)).mean() for i in range(48)]
    assert int(np.argmin(errors)) == first_shown


def test_the_table_in_the_documentation_is_this_one() -> None:
    rows = [f"| {kind.name} | {kind.outcome} |" for kind in KINDS]
    rows += [
        "| permission denied | rejected: `permission_denied` |",
        "| vanished during the run | rejected: `not_found` |",
    ]
    written = (ROOT / "docs" / "odd_inputs.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in written if line.startswith("| ")]
    assert table[1:] == rows, "write these rows into the table:\n" + "\n".join(rows)
    assert len(rows) >= 30
