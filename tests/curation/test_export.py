from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from curation.export import export_clip
from curation.probe import display_size, probe
from curation.video import decode, read_frames
from schemas.config.curation import ExportConfig
from schemas.errors import VideoDecodeError
from schemas.rows import Clip, Export

pytestmark = pytest.mark.slow

BITS = 7
REENCODE = ExportConfig(mode="reencode")
COPY = ExportConfig(mode="copy")


def write_numbered(
    path: Path,
    ticks: Sequence[int],
    time_base: Fraction = Fraction(1, 1200),
    codec: str = "libx264",
    size: tuple[int, int] = (112, 48),
    options: dict[str, str] | None = None,
    sar: Fraction | None = None,
) -> Path:
    """A film that shows in bars, as a binary number, how many frames came before."""
    width, height = size
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        stream.codec_context.options = options or {"g": "24", "bf": "3", "sc_threshold": "0"}
        if sar is not None:
            stream.codec_context.sample_aspect_ratio = sar
        for number, pts in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="gray")
            frame.pts, frame.time_base = pts, time_base
            out.mux(stream.encode(frame.reformat(format="yuv420p")))
        out.mux(stream.encode())
    return path


def picture(number: int, width: int, height: int) -> np.ndarray:
    bars = [255 * (number >> bit & 1) for bit in range(BITS)]
    columns = np.repeat(np.array(bars, np.uint8), -(-width // BITS))[:width]
    return np.repeat(columns[None], height, axis=0)


def numbers(path: Path) -> list[int]:
    """What the frames of a film show."""
    found: list[int] = []
    for frame in decode(path):
        bars = np.array_split(frame.to_ndarray(format="gray").mean(axis=0), BITS)
        found.append(sum((bar.mean() > 128) << bit for bit, bar in enumerate(bars)))
    return found


def times(path: Path) -> list[Fraction]:
    return [f.pts * f.time_base for f in decode(path) if f.pts is not None and f.time_base]


def clip_of(path: Path, start: int, end: int) -> Clip:
    source = probe(path)
    pts: list[int] = []
    for frame in decode(path):
        pts.append(frame.pts or 0)
    pts.append(2 * pts[-1] - pts[-2])
    tick = source.time_base_num / source.time_base_den
    width_px, height_px = display_size(source)
    return Clip(
        clip_id=f"clip-{path.stem}-{start}-{end}", shot_id="shot", source_id=source.source_id,
        uri=str(path), index=0, start_pts=pts[start], end_pts=pts[end], start_frame=start,
        end_frame=end, num_frames=end - start, start_s=(pts[start] - pts[0]) * tick,
        end_s=(pts[end] - pts[0]) * tick, fps=(len(pts) - 1) / ((pts[-1] - pts[0]) * tick),
        width_px=width_px, height_px=height_px, caption="", caption_source="none",
        matching_score=None, trainable_pretrain=False, trainable_sft=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 frames at 24 per second: key frames at 0, 24, 48, ..., and B-frames."""
    return write_numbered(tmp_path_factory.mktemp("films") / "even.mp4", range(0, 5000, 50))


def checked(export: Export, mode: str) -> Path:
    path = Path(export.uri)
    assert export.mode == mode
    assert export.size_bytes == path.stat().st_size
    assert export.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return path


@pytest.mark.parametrize("span", [(0, 100), (0, 1), (23, 25), (24, 48), (31, 77), (99, 100)])
def test_reencoding_gives_exactly_the_clip(
    film: Path, tmp_path: Path, span: tuple[int, int]
) -> None:
    clip = clip_of(film, *span)
    export = export_clip(clip, REENCODE, tmp_path)
    path = checked(export, "reencode")
    assert numbers(path) == list(range(*span))
    assert times(path) == [Fraction(50 * i, 1200) for i in range(clip.num_frames)]
    assert (export.start_pts, export.end_pts) == (clip.start_pts, clip.end_pts)
    assert export.num_frames == clip.num_frames
    assert (export.width_px, export.height_px, export.fps) == (112, 48, clip.fps)
    with av.open(export.uri) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_uneven_times_are_kept_or_made_even(tmp_path: Path) -> None:
    ticks = [0, 50, 100, 300, 310, 320, 700, 701, 900, 950, 1000, 1050]
    film = write_numbered(tmp_path / "uneven.mp4", ticks)
    clip = clip_of(film, 2, 11)
    kept = checked(export_clip(clip, REENCODE, tmp_path), "reencode")
    assert times(kept) == [Fraction(t - 100, 1200) for t in ticks[2:11]]
    assert numbers(kept) == list(range(2, 11))
    export = export_clip(clip, ExportConfig(mode="reencode", fps=10), tmp_path)
    # 950 ticks of 1/1200 s are 7.9 steps; the frame on display in the middle of each is shown.
    middles = [100 + 120 * (k + Fraction(1, 2)) for k in range(8)]
    shown = [max(i for i, t in enumerate(ticks) if t <= middle) for middle in middles]
    path = checked(export, "reencode")
    assert numbers(path) == shown
    assert times(path) == [Fraction(k, 10) for k in range(8)]
    assert (export.fps, export.num_frames) == (10, 8)


def test_the_own_rate_changes_nothing_despite_rounded_times(tmp_path: Path) -> None:
    ticks = [round(i * 1000 / 24) for i in range(60)]  # Matroska's milliseconds
    film = write_numbered(tmp_path / "film.mkv", ticks, Fraction(1, 1000))
    export = export_clip(clip_of(film, 7, 50), ExportConfig(mode="reencode", fps=24), tmp_path)
    assert numbers(Path(export.uri)) == list(range(7, 50))


def test_a_clip_shorter_than_a_step_still_gives_a_frame(film: Path, tmp_path: Path) -> None:
    export = export_clip(clip_of(film, 5, 6), ExportConfig(mode="reencode", fps=1), tmp_path)
    assert numbers(Path(export.uri)) == [5]


@pytest.mark.parametrize("span", [(0, 100), (24, 48), (30, 40), (47, 49), (50, 51), (90, 100)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_copying_begins_at_a_key_frame_and_says_what_it_shows(
    tmp_path: Path, span: tuple[int, int], suffix: str
) -> None:
    film = write_numbered(tmp_path / f"film{suffix}", range(0, 5000, 50))
    clip = clip_of(film, *span)
    export = export_clip(clip, COPY, tmp_path / "out")
    path = checked(export, "copy")
    pts = [f.pts or 0 for f in decode(film)]
    shown = [i for i, p in enumerate(pts) if export.start_pts <= p < export.end_pts]
    assert numbers(path) == shown
    assert len(shown) == export.num_frames
    assert shown[0] == span[0] // 24 * 24
    assert span[1] - 1 <= shown[-1] < span[1] + 4  # a B-frame may need the frames after it
    size = {"height_px": 48, "width_px": 112}
    before = read_frames(film, shown, backend="pyav", **size)
    after = read_frames(path, range(len(shown)), backend="pyav", **size)
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("codec", "suffix", "copied"),
    [("libvpx", ".webm", ".mkv"), ("libvpx-vp9", ".webm", ".mp4"), ("mpeg4", ".avi", ".mp4")],
)
def test_other_codecs_are_copied_too(tmp_path: Path, codec: str, suffix: str, copied: str) -> None:
    tick = Fraction(1, 24)
    film = write_numbered(tmp_path / f"f{suffix}", range(60), tick, codec, options={"g": "12"})
    path = checked(export_clip(clip_of(film, 15, 40), COPY, tmp_path / "out"), "copy")
    assert path.suffix == copied
    assert numbers(path) == list(range(12, 40))


def test_a_codec_that_no_container_takes_can_be_reencoded(tmp_path: Path) -> None:
    film = write_numbered(
        tmp_path / "film.avi", range(60), Fraction(1, 24), "h263", (176, 144), {"g": "12"}
    )
    clip = clip_of(film, 15, 40)
    with pytest.raises(VideoDecodeError, match="reencode") as caught:
        export_clip(clip, COPY, tmp_path / "out")
    assert caught.value.reason == "cannot_copy"
    assert not list((tmp_path / "out").glob("*"))
    assert numbers(Path(export_clip(clip, REENCODE, tmp_path).uri)) == list(range(15, 40))


def turn(path: Path) -> None:
    """Write a quarter turn into the header of an mp4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def test_reencoded_clips_are_upright_with_square_pixels(tmp_path: Path) -> None:
    film = write_numbered(
        tmp_path / "film.mp4", range(0, 1500, 50), size=(113 - 1, 50), sar=Fraction(3, 2)
    )
    turn(film)
    clip = clip_of(film, 4, 20)
    assert (clip.width_px, clip.height_px) == (50, 168)
    export = export_clip(clip, REENCODE, tmp_path)
    assert (export.width_px, export.height_px) == (50, 168)
    made = probe(Path(export.uri))
    assert (made.width_px, made.height_px, made.rotation_deg) == (50, 168, 0)
    size = {"height_px": 168, "width_px": 50}
    before = read_frames(film, range(4, 20), backend="pyav", **size).astype(int)
    after = read_frames(Path(export.uri), range(16), backend="pyav", **size).astype(int)
    assert np.abs(before - after).mean() < 6
    copied = export_clip(clip, COPY, tmp_path)
    assert display_size(probe(Path(copied.uri))) == (copied.width_px, copied.height_px) == (50, 168)


def test_colours_survive(samples: Path, tmp_path: Path) -> None:
    film = samples / "big_buck_bunny.mp4"
    export = export_clip(clip_of(film, 60, 70), REENCODE, tmp_path)
    size = {"height_px": 90, "width_px": 120}
    before = read_frames(film, range(60, 70), backend="pyav", **size).astype(int)
    after = read_frames(Path(export.uri), range(10), backend="pyav", **size).astype(int)
    assert np.abs(before - after).mean() < 1.5
    assert np.abs((before - after).mean((0, 1, 2))).max() < 0.5


@pytest.mark.parametrize("cfg", [REENCODE, COPY], ids=["reencode", "copy"])
def test_a_whole_export_is_reused_and_a_damaged_one_remade(
    film: Path, tmp_path: Path, cfg: ExportConfig
) -> None:
    clip = clip_of(film, 30, 40)
    first = export_clip(clip, cfg, tmp_path)
    path = Path(first.uri)
    written = path.stat().st_mtime_ns
    # The source is not even looked at.
    assert export_clip(dataclasses.replace(clip, uri="/gone"), cfg, tmp_path) == first
    assert path.stat().st_mtime_ns == written
    data = path.read_bytes()
    note = path.with_suffix(".json")
    for damage in (
        lambda: path.write_bytes(data[:-1]),
        lambda: path.write_bytes(data[:-1] + b"?"),
        path.unlink,
        note.unlink,
        lambda: note.write_text("{"),
        lambda: note.write_text('{"clip_id": 1}'),
    ):
        damage()
        again = export_clip(clip, cfg, tmp_path)
        checked(again, cfg.mode)
        assert set(numbers(path)) >= set(range(30, 40))
        # x264 pads a packet with a byte more or less from one run to the next.
        assert dataclasses.replace(again, sha256="", size_bytes=0) == dataclasses.replace(
            first, sha256="", size_bytes=0
        )
        if cfg is COPY:
            assert path.read_bytes() == data
    assert sorted(tmp_path.iterdir()) == sorted([path, note])


def test_a_moved_folder_keeps_its_exports(film: Path, tmp_path: Path) -> None:
    clip = clip_of(film, 30, 40)
    export_clip(clip, COPY, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = export_clip(dataclasses.replace(clip, uri="/gone"), COPY, tmp_path / "b")
    assert Path(moved.uri).parent == tmp_path / "b"


def test_other_settings_give_other_files(film: Path, tmp_path: Path) -> None:
    clip = clip_of(film, 30, 40)
    uris = {
        export_clip(clip, cfg, tmp_path).uri
        for cfg in (
            COPY,
            COPY.model_copy(update={"crf": 30}),  # means nothing to a copy
            REENCODE,
            ExportConfig(mode="reencode", crf=30),
            ExportConfig(mode="reencode", fps=24),
        )
    }
    assert len(uris) == 4


@pytest.mark.parametrize("cfg", [REENCODE, COPY], ids=["reencode", "copy"])
@pytest.mark.parametrize("change", ["shorter", "other"])
def test_a_source_that_has_changed_is_refused_and_leaves_nothing(
    film: Path, tmp_path: Path, cfg: ExportConfig, change: str
) -> None:
    clip = clip_of(film, 30, 80)
    ticks = range(0, 3000, 50) if change == "shorter" else range(0, 5000, 49)
    other = write_numbered(tmp_path / "changed.mp4", ticks)
    with pytest.raises(VideoDecodeError) as caught:
        export_clip(dataclasses.replace(clip, uri=str(other)), cfg, tmp_path / "out")
    assert caught.value.reason == "missing_frames"
    assert not list((tmp_path / "out").glob("*"))
