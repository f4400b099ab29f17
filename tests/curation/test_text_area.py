"""The share of a picture that is text: geometry exactly, and a tiny network through OpenCV."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from curation.text_area import TextArea, text_share
from schemas.errors import CheckpointError
from tests.curation.tiny_weights import write_detector

BRIGHT = (4.0, 4.0, 4.0)
"""White gives a probability of nearly one, black of nearly zero."""


def picture(*boxes: tuple[int, int, int, int], colour: tuple[int, int, int] = (255, 255, 255)):
    """Black, 96 x 128, with boxes (top, left, height, width)."""
    frame = np.zeros((96, 128, 3), np.uint8)
    for top, left, height, width in boxes:
        frame[top : top + height, left : left + width] = colour
    return frame


def grown(shape: tuple[int, int], top: int, left: int, height: int, width: int) -> int:
    """Points of a box after growing: its corners are the middles of its outermost points."""
    h, w = height - 1, width - 1
    d = h * w * 1.5 / (2 * (h + w))
    rows = [y for y in range(shape[0]) if round(top - d) <= y <= round(top + h + d)]
    columns = [x for x in range(shape[1]) if round(left - d) <= x <= round(left + w + d)]
    return len(rows) * len(columns)


@given(
    top=st.integers(0, 90),
    left=st.integers(0, 120),
    height=st.integers(1, 60),
    width=st.integers(1, 80),
)
def test_a_region_counts_with_its_box_grown_back(
    top: int, left: int, height: int, width: int
) -> None:
    probability = np.zeros((96, 128), np.float32)
    probability[top : top + height, left : left + width] = 0.9
    height, width = min(height, 96 - top), min(width, 128 - left)
    assume(min(height, width) != 4)  # OpenCV's boxes of 3 points are sometimes 2.9999 wide
    found = text_share(probability)
    if min(height, width) < 4:
        assert found == 0
    else:
        # A corner half-way between two points may be rounded either way.
        expected = grown((96, 128), top, left, height, width)
        assert abs(found * 96 * 128 - expected) <= 96 + 128
        if (height - 1) * (width - 1) * 1.5 / (2 * (height + width - 2)) % 1 != 0.5:
            assert round(found * 96 * 128) == expected


def test_lines_that_touch_after_growing_count_once() -> None:
    probability = np.zeros((96, 128), np.float32)
    probability[20:30, 10:100] = probability[34:44, 10:100] = 1
    # each is 9 x 89 between its outermost points and grows by 6.13
    assert round(text_share(probability) * 96 * 128) == (49 - 14 + 1) * (105 - 4 + 1)


@pytest.mark.parametrize(
    ("value", "counts"), [(0.29, False), (0.31, False), (0.59, False), (0.61, True)]
)
def test_pixels_and_regions_have_thresholds(value: float, counts: bool) -> None:
    probability = np.zeros((96, 128), np.float32)
    probability[20:30, 10:100] = value
    assert (text_share(probability) > 0) == counts


def test_a_slanted_line_counts_with_a_slanted_box() -> None:
    # drawn with whole points it is a point or two wider; an upright box would be 8300 points
    probability = np.zeros((200, 200), np.float32)
    box = ((100.0, 100.0), (120.0, 16.0), 30.0)
    cv2.fillPoly(probability, [np.rint(cv2.boxPoints(box)).astype(np.int32)], (1.0,))
    grow = 120 * 16 * 1.5 / (2 * 136)
    assert text_share(probability) * 200**2 == pytest.approx(
        (120 + 2 * grow) * (16 + 2 * grow), rel=0.15
    )


def test_the_network_sees_blue_first_with_imagenet_means(tmp_path: Path) -> None:
    blue = TextArea(write_detector(tmp_path / "blue.onnx", (200.0, 0, 0)), 96)
    red = TextArea(write_detector(tmp_path / "red.onnx", (0, 0, 200.0)), 96)
    box = (20, 20, 30, 60)
    for scorer, channel, mean in ((blue, 2, 0.485), (red, 0, 0.406)):
        for level, counts in ((mean * 255 + 3, True), (mean * 255 - 3, False)):
            colour = [0, 0, 0]
            colour[channel] = round(level)
            frame = picture(box, colour=(colour[0], colour[1], colour[2]))
            expected = grown((96, 128), *box) / (96 * 128) if counts else 0
            assert scorer.score(frame[None]) == pytest.approx(expected)


def test_the_score_is_the_median_over_frames(tmp_path: Path) -> None:
    scorer = TextArea(write_detector(tmp_path / "t.onnx", BRIGHT), 96)
    empty, small, large = picture(), picture((10, 10, 8, 40)), picture((10, 10, 40, 90))
    one, other = (scorer.score(f[None]) for f in (small, large))
    assert 0 < one < other
    assert scorer.score(np.stack([large, empty, small])) == pytest.approx(one)
    assert scorer.score(np.stack([empty, large, empty])) == 0
    assert scorer.score(np.stack([empty, large])) == pytest.approx(other / 2)


def test_frames_keep_their_shape_in_multiples_of_32(tmp_path: Path) -> None:
    path = write_detector(tmp_path / "t.onnx", BRIGHT)
    assert TextArea(path, 320).frame_px(1280, 720) == (320, 576)
    assert TextArea(path, 330).frame_px(720, 1280) == (320, 192)
    assert TextArea(path, 33).frame_px(10, 1000) == (32, 32)
    # the network takes one size after the other
    scorer = TextArea(path, 96)
    shares = [scorer.score(np.zeros((1, h, w, 3), np.uint8)) for h, w in ((96, 128), (64, 32))]
    assert shares == [0, 0]


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(CheckpointError, match="cannot be read as ONNX"):
        TextArea(tmp_path / "text.onnx", 96)
    two = TextArea(write_detector(tmp_path / "two.onnx", BRIGHT, maps=2), 96)
    with pytest.raises(CheckpointError, match=r"(?s)no text detector.*output \(1, 2, 96, 128\)"):
        two.score(picture()[None])
