from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import av
import pytest

from curation.probe import display_size, probe
from schemas.errors import VideoDecodeError


def reason_of(path: Path) -> str:
    with pytest.raises(VideoDecodeError) as caught:
        probe(path)
    return caught.value.reason


def test_probe_reports_the_coded_picture(samples: Path) -> None:
    source = probe(samples / "big_buck_bunny.mp4")
    assert (source.width_px, source.height_px, source.codec) == (480, 360, "h264")
    assert (source.time_base_num, source.time_base_den, source.avg_fps) == (1, 30, 24.0)
    assert source.has_audio
    assert (source.bit_depth, source.is_interlaced) == (8, False)
    assert (source.start_pts, source.rotation_deg) == (0, 0)
    assert source.num_frames is None  # unknown until every frame was decoded


@pytest.mark.parametrize(
    ("name", "reason"), [("empty.mp4", "empty_file"), ("audio_only.mp4", "no_video_stream")]
)
def test_unusable_files_are_refused_with_their_reason(
    samples: Path, name: str, reason: str
) -> None:
    assert reason_of(samples / "broken" / name) == reason


def test_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video " * 50)
    assert reason_of(tmp_path / "text.mp4") == "cannot_open"
    assert reason_of(tmp_path / "gone.mp4") == "not_found"


def remuxed(path: Path, target: Path) -> Path:
    """The same packets in another container."""
    with av.open(str(path)) as given, av.open(str(target), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    return target


def test_a_remuxed_copy_has_other_bytes_and_the_same_packets(samples: Path, tmp_path: Path) -> None:
    given = probe(samples / "chaplin.mp4")
    copy = probe(remuxed(samples / "chaplin.mp4", tmp_path / "copy.mkv"))
    other = probe(samples / "big_buck_bunny.mp4")
    assert copy.source_id != given.source_id
    assert copy.packet_sha256 == given.packet_sha256 != other.packet_sha256
    assert (copy.container, copy.has_audio) == ("matroska,webm", False)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("hevc_10bit.mp4", {"codec": "hevc", "bit_depth": 10, "pix_fmt": "yuv420p10le"}),
        ("av1.mkv", {"codec": "av1", "bit_depth": 8, "has_edit_list": False}),
        ("rotated_phone.mov", {"rotation_deg": 270, "width_px": 568, "height_px": 320}),
        ("h264.ts", {"start_pts": 132_000, "time_base_den": 90_000}),
        ("yuv444_fragmented.mp4", {"pix_fmt": "yuv444p", "start_pts": 0, "has_edit_list": True}),
    ],
)
def test_odd_files_are_described(samples: Path, name: str, found: dict[str, object]) -> None:
    row = dataclasses.asdict(probe(samples.parent / "odd" / name))
    assert {key: row[key] for key in found} == found


def test_a_short_file_is_told_from_its_header(samples: Path) -> None:
    assert reason_of(samples / "broken" / "corrupt.mp4") == "truncated"


@pytest.mark.parametrize(
    ("sar", "rotation", "size"),
    [
        (Fraction(1), 0, (720, 576)),
        (Fraction(16, 15), 0, (768, 576)),
        (Fraction(16, 15), 90, (576, 768)),
        (Fraction(1, 1000), 180, (1, 576)),
    ],
)
def test_display_size(samples: Path, sar: Fraction, rotation: int, size: tuple[int, int]) -> None:
    source = dataclasses.replace(
        probe(samples / "chaplin.mp4"),
        width_px=720,
        height_px=576,
        sar_num=sar.numerator,
        sar_den=sar.denominator,
        rotation_deg=rotation,
    )
    assert display_size(source) == size
