from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from curation.clips import trim
from curation.isolation import run_isolated
from curation.probe import probe
from curation.shots import ShotDetection, detect_shots, models_behind, read_shots
from curation.transnetv2 import TransNetV2
from curation.video import decode
from schemas.config.curation import EmbeddingConfig, ShotsConfig
from schemas.errors import ConfigError
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
    assert shots[0].transition_in == "start" or shots[0].transition_in_frames
    assert shots[-1].transition_out == "end" or shots[-1].transition_out_frames
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


@pytest.fixture
def cut_weights(tmp_path: Path) -> Path:
    """A network of TransNetV2's layout that sees colours alone, set by hand.

    One hidden unit tells how far a frame's colour histogram is from the next one's; both heads
    follow it.
    """
    network = TransNetV2()
    state = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    state["color_hist_layer.fc.weight"][0, 50:52] = torch.tensor([1.0, -1.0])
    state["fc1.weight"][0, 0] = 1  # the histograms' part comes first
    for head in ("cls_layer1", "cls_layer2"):
        state[f"{head}.weight"][0, 0] = 20
        state[f"{head}.bias"][0] = -10
    path = tmp_path / "transnetv2.pth"
    torch.save(state, path)
    return path


def test_transnetv2_cuts_where_its_network_says(film: Film, cut_weights: Path) -> None:
    path = film("cuts.mp4", [(RED, 20), (GREEN, 45), (BLUE, 60)], fps=10)
    found = detect(path, detector="transnetv2", transnetv2_weights=str(cut_weights))
    assert cuts(found) == [20, 65]
    assert {s.detector for s in found.shots} == {"transnetv2"}
    assert [s.transition_in for s in found.shots] == ["start", "cut", "cut"]
    assert all(s.confidence is not None and 1.9 < s.confidence < 2 for s in found.shots[1:])
    assert_partition(found)
    others = detect(path, detector="content").shots
    named = [dataclasses.replace(s, detector="transnetv2", confidence=None) for s in others]
    assert [dataclasses.replace(s, confidence=None) for s in found.shots] == named


def test_panda70m_stitches_what_looks_alike(film: Film) -> None:
    path = film("cuts.mp4", [(RED, 40), ((110, 16, 16), 30), (BLUE, 100)], fps=10)
    found = detect(path, detector="panda70m")
    assert cuts(found) == [70]
    assert {s.detector for s in found.shots} == {"panda70m:color-layout-1"}
    assert_partition(found)
    all_cuts = detect(path, detector="panda70m", stitch_distance=1e-9)
    assert cuts(all_cuts) == [40, 70, 120]
    kinds = [s.transition_in for s in all_cuts.shots]
    assert kinds == ["start", "cut", "cut", "forced"]
    before, after = all_cuts.shots[-2:]
    assert trim(before, 2)[1] == trim(after, 2)[0] == 120  # one take: nothing is dropped there
    assert_partition(all_cuts)
    blind = detect(path, detector="panda70m", threshold=250.0)
    assert [(s.start_frame, s.transition_in) for s in blind.shots[1:]] == [(75, "dissolve")]
    # Forced pieces meet in like pictures.
    assert not cuts(detect(path, detector="panda70m", threshold=250.0, drop_distance=2.0))


def test_panda70m_leaves_a_piece_that_changes_out_of_every_clip(film: Film) -> None:
    fading = [((20, 20 + 9 * i, 230 - 9 * i), 1) for i in range(24)]
    path = film("change.mp4", [(RED, 30), *fading, (RED, 30)], fps=10)
    found = detect(path, detector="panda70m")
    assert [(s.start_frame, s.end_frame) for s in found.shots] == [(0, 42), (42, 84)]
    assert [s.transition_out for s in found.shots] == ["dissolve", "end"]
    assert [trim(s, 0) for s in found.shots] == [(0, 30), (54, 84)]
    assert_partition(found)
    whole = detect(film("whole.mp4", fading, fps=10), detector="panda70m")
    (only,) = whole.shots
    assert (only.transition_in, only.transition_in_frames) == ("dissolve", 24)
    assert trim(only, 0) == (0, 0)
    assert_partition(whole)


def test_transnetv2_needs_its_weights(cut_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="set transnetv2_weights"):
        ShotsConfig(detector="transnetv2")
    with pytest.raises(ValidationError, match="must be below 1"):
        ShotsConfig(detector="transnetv2", transnetv2_weights=str(cut_weights), threshold=27)
    missing = ShotsConfig(detector="transnetv2", transnetv2_weights=str(tmp_path / "no.pth"))
    with pytest.raises(ConfigError, match="transnetv2_weights"):
        models_behind(missing, EmbeddingConfig())


def test_results_hang_on_the_models_that_a_detector_uses(cut_weights: Path) -> None:
    small, large = EmbeddingConfig(), EmbeddingConfig(height_px=64)
    for detector in ("fast", "content"):
        assert models_behind(ShotsConfig(detector=detector), small) == []
    panda70m = ShotsConfig(detector="panda70m")
    assert models_behind(panda70m, small) != models_behind(panda70m, large)
    cfg = ShotsConfig(detector="transnetv2", transnetv2_weights=str(cut_weights))
    before = models_behind(cfg, small)
    assert before == models_behind(cfg, large)
    torch.save({}, cut_weights)
    assert models_behind(cfg, small) != before


@pytest.mark.slow  # starts a child process
def test_both_models_run_in_an_isolated_child(film: Film, cut_weights: Path) -> None:
    path = film("cuts.mp4", [(RED, 20), (BLUE, 20)], fps=10)
    job = {"path": str(path), "source": dataclasses.asdict(probe(path))}
    for config in (
        ShotsConfig(detector="transnetv2", transnetv2_weights=str(cut_weights), memory_mb=1024),
        ShotsConfig(detector="panda70m"),
    ):
        settings = {"config": config.model_dump(mode="json"), "embedding": {"height_px": 48}}
        limits = {"timeout_s": config.timeout_s, "memory_mb": config.memory_mb}
        found = run_isolated("curation.jobs:find_shots", job | settings, **limits)
        assert [s["start_frame"] for s in found["detection"]["shots"]] == [0, 20]


@pytest.mark.parametrize("detector", ["fast", "adaptive", "panda70m"])
def test_a_damaged_source_becomes_a_reject(samples: Path, tmp_path: Path, detector: str) -> None:
    whole = (samples / "big_buck_bunny.mp4").read_bytes()
    path = tmp_path / "damaged.mp4"
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(range(256)) * 200 + whole[middle + 51_200 :])
    reject = read_shots(path, probe(path), ShotsConfig(detector=detector))
    assert isinstance(reject, Reject)
    assert reject.reason in ("decode_error", "damaged_frame")
    assert (reject.stage, reject.failed) == ("shots", False)
