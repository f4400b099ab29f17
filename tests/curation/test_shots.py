from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from curation.probe import probe
from curation.shots import ShotDetection, detect_shots, read_shots
from curation.video import decode
from schemas.config.curation import ShotsConfig
from schemas.rows import Reject, stable_id

Film = Callable[..., Path]

RED, GREEN, BLUE = (200, 30, 30), (30, 160, 60), (30, 40, 190)


def detect(path: Path, **settings: object) -> ShotDetection:
    return detect_shots(path, probe(path), ShotsConfig.model_validate(settings))


def cuts(found: ShotDetection) -> list[int]:
    return [s.start_frame for s in found.shots[1:]]


def assert_partition(found: ShotDetection) -> None:
    shots = found.shots
    assert shots[0].start_frame == 0
    assert shots[-1].end_frame == found.num_frames
    for a, b in pairwise(shots):
        assert (a.end_frame, a.end_pts, a.end_s) == (b.start_frame, b.start_pts, b.start_s)
    for i, shot in enumerate(shots):
        assert shot.index == i
        assert shot.end_frame > shot.start_frame
        assert found.frame_pts[shot.start_frame] == shot.start_pts
        assert found.frame_pts[shot.end_frame] == shot.end_pts
        assert shot.shot_id == stable_id(shot.source_id, shot.start_pts, shot.end_pts)
        assert 0 <= shot.transition_in_frames <= shot.end_frame - shot.start_frame
        assert 0 <= shot.transition_out_frames <= shot.end_frame - shot.start_frame
    assert shots[0].transition_in in ("start", "fade")
    assert shots[-1].transition_out in ("end", "fade")
    assert all(a.transition_out == b.transition_in for a, b in pairwise(shots))


def test_cuts_of_a_film_with_uneven_timestamps_are_exact(samples: Path) -> None:
    path = samples / "big_buck_bunny.mp4"
    found = detect(path)
    truth = json.loads((samples / "truth.json").read_text())[path.name]
    assert cuts(found) == truth["cuts"]
    assert found.num_frames == truth["nframes"]
    pts = [f.pts for f in decode(path)]
    assert found.frame_pts[:-1] == pts
    starts = [round(s.start_s, 3) for s in found.shots[1:]]
    assert starts == pytest.approx(truth["cut_pts"], abs=0.001)
    assert_partition(found)


def test_cuts_of_a_trailer_full_of_dissolves(samples: Path) -> None:
    path = samples / "sintel_trailer.mp4"
    truth = json.loads((samples / "truth.json").read_text())[path.name]
    found = detect(path)
    hits = set(cuts(found)) & set(truth["cuts"])
    assert len(hits) >= 8  # of 9; one lies five frames after another, in fast motion
    elsewhere = [a for a in cuts(found) if a not in hits]
    inside = [
        c
        for c in elsewhere
        if any(a - 3 <= c <= b + 3 for a, b in truth["soft"] + truth["ambiguous"])
    ]
    assert elsewhere == inside
    assert_partition(found)


@pytest.mark.slow  # starts nothing, but decodes a minute of film
def test_cuts_of_a_long_cartoon(samples: Path) -> None:
    path = samples / "popeye_1.mkv"
    truth = json.loads((samples / "truth.json").read_text())[path.name]
    found = detect(path)
    hits = set(cuts(found)) & set(truth["cuts"])
    assert len(hits) == len(truth["cuts"])
    false = [
        c
        for c in cuts(found)
        if c not in hits and not any(a - 1 <= c <= b + 1 for a, b in truth["ambiguous"])
    ]
    assert not false
    assert not found.is_vfr
    assert found.avg_fps == pytest.approx(24, abs=0.01)
    assert_partition(found)


def test_a_single_shot_has_no_cut(samples: Path) -> None:
    found = detect(samples / "chaplin.mp4")
    assert len(found.shots) == 1
    assert_partition(found)


@pytest.mark.parametrize("detector", ["adaptive", "content", "histogram", "hash"])
def test_every_detector_cuts_between_different_pictures(
    film: Film, samples: Path, detector: str
) -> None:
    if detector != "hash":  # which sees shapes only, and all shots here have the same square
        path = film("cuts.mp4", [(RED, 20), (GREEN, 15), (BLUE, 25)], fps=10)
        found = detect(path, detector=detector)
        assert cuts(found) == [20, 35]
        assert found.duration_s == pytest.approx(6.0)
        assert_partition(found)
    real = detect(samples / "big_buck_bunny.mp4", detector=detector, detect_height_px=90)
    assert cuts(real) == [44, 137]
    assert {s.detector for s in real.shots} == {detector}


def test_a_higher_threshold_finds_no_more(samples: Path) -> None:
    path = samples / "big_buck_bunny.mp4"
    assert cuts(detect(path, detector="content", threshold=250.0)) == []


def test_shots_shorter_than_the_minimum_are_not_cut(film: Film) -> None:
    path = film("short.mp4", [(RED, 20), (GREEN, 8), (BLUE, 20)], fps=10)
    assert cuts(detect(path, detector="adaptive", min_shot_s=0.5)) == [20, 28]
    assert cuts(detect(path, detector="adaptive", min_shot_s=1.5)) == [20]


def test_measurements_tell_dark_from_bright_and_still_from_moving(film: Film) -> None:
    dark, bright = detect(film("m.mp4", [((10, 10, 10), 20), ((180, 180, 180), 20)])).shots
    assert dark.luminance < 0.2 < 0.6 < bright.luminance
    assert dark.motion > bright.motion > 0  # the white square moves less visibly on bright ground
    assert dark.sharpness > bright.sharpness > 0


def test_seconds_count_from_the_first_frame(film: Film) -> None:
    path = film("t.mp4", [(RED, 12), (GREEN, 12)], fps=12)
    source = probe(path)
    found = detect(path, detector="adaptive")
    tick_s = Fraction(source.time_base_num, source.time_base_den)
    assert [s.start_s for s in found.shots] == [0.0, 1.0]
    assert found.shots[1].start_pts * tick_s - found.shots[0].start_pts * tick_s == 1


@pytest.mark.parametrize("detector", ["fast", "adaptive"])
def test_a_damaged_source_becomes_a_reject(samples: Path, tmp_path: Path, detector: str) -> None:
    whole = (samples / "big_buck_bunny.mp4").read_bytes()
    path = tmp_path / "damaged.mp4"
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(range(256)) * 200 + whole[middle + 51_200 :])
    reject = read_shots(path, probe(path), ShotsConfig(detector=detector))
    assert isinstance(reject, Reject)
    assert reject.reason in ("decode_error", "damaged_frame")
    assert (reject.stage, reject.failed) == ("shots", False)
