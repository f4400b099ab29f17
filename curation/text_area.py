"""How much of a picture is text, by a detection network of the DB kind, such as PP-OCR's.

The network gives every pixel the probability of lying in the inner part of a line of text (DB
trains on shrunk lines). Each connected region of likely pixels is one line; its rotated box, grown
back, counts as text. OpenCV runs the ONNX file. Its own ``TextDetectionModel_DB`` is not used:
OpenCV 5.0.0 refuses PP-OCR's four-dimensional output there. On 16 frames of a real film the maps of
``ch_PP-OCRv4_det_infer.onnx`` differed by at most 0.0001 from ONNX Runtime's, and the shares by at
most 0.001 from those of the boxes that RapidOCR 1.x makes of the same maps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from curation.video import Frames, ResizeMode
from schemas.errors import CheckpointError

Map = npt.NDArray[np.float32]
"""(H, W) probabilities, 0 to 1."""

# All from PaddleOCR, configs/det/ch_PP-OCRv3/ch_PP-OCRv3_det_student.yml (PP-OCRv4 has the same).
# The means and deviations are ImageNet's, for red, green, blue; PaddleOCR reads pictures as BGR and
# applies them in this order all the same, so that is what its networks know.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_PIXEL = 0.3
"""Pixels above this probability belong to a region."""
_REGION = 0.6
"""Regions whose box has a lower mean probability are no text."""
_UNCLIP = 1.5
"""How far a box grows: this times its area, divided by its perimeter."""
_MIN_SIDE_PX = 3
"""Smaller boxes are noise. Source: PaddleOCR, ppocr/postprocess/db_postprocess.py."""

_MULTIPLE = 32
"""The network halves the picture five times."""


class TextArea:
    """The share of the picture that is text, 0 to 1; the median over a clip's frames.

    The median, since a detector alone also takes pictures for text, seldom in every frame.
    Measured with ``ch_PP-OCRv4_det_infer.onnx`` on 34 shots of assets/samples (20 frames or more),
    3 frames each, 320 pixels high: the two shots with a title score 0.014, 31 of the 32 others 0,
    but a dark one without text 0.19. At 480 pixels eight shots without text score above 0, up to
    0.18. So look at the ``scores`` table before you set a threshold. A frame took 0.07 s of one CPU
    at 320 and 0.17 s at 480 pixels, 4:3 pictures for the most part.

    Args:
        detector: ONNX file.
        height_px: Height of the frames, made a multiple of 32.

    Raises:
        CheckpointError: OpenCV cannot read the file.
    """

    mode: ResizeMode = "stretch"

    def __init__(self, detector: Path, height_px: int) -> None:
        self.detector = detector
        self.height_px = _rounded(height_px)
        # Workers run side by side, one per CPU; OpenCV's own threads only compete with them.
        cv2.setNumThreads(1)
        try:
            self._net: Any = cv2.dnn.readNetFromONNX(str(detector))
        except cv2.error as error:
            raise CheckpointError(
                "the text detector cannot be read as ONNX",
                where=detector,
                found=" ".join(str(error).split())[:300],
                do="give the ONNX file of a DB text detection network (PP-OCR det) as "
                "curation.scorers.text_detector",
            ) from error

    def frame_px(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Height and width that frames of an upright picture of this size are read with."""
        return self.height_px, _rounded(self.height_px * width_px / height_px)

    def score(self, frames: Frames) -> float:
        """(T, H, W, 3) uint8 RGB to the median share; H and W are multiples of 32.

        Raises:
            CheckpointError: The network gives something else than one map of the picture.
        """
        return float(np.median([text_share(self._map(frame)) for frame in frames]))

    def _map(self, frame: Frames) -> Map:
        height, width = frame.shape[:2]
        bgr = frame[..., ::-1].astype(np.float32) / 255
        self._net.setInput(np.ascontiguousarray(((bgr - _MEAN) / _STD).transpose(2, 0, 1)[None]))
        try:
            found = np.asarray(self._net.forward())
        except cv2.error as error:
            raise self._no_detector(" ".join(str(error).split())[:300], height, width) from error
        if found.shape != (1, 1, height, width):
            raise self._no_detector(f"output {found.shape}", height, width)
        return found[0, 0]

    def _no_detector(self, found: str, height: int, width: int) -> CheckpointError:
        return CheckpointError(
            "the network is no text detector of the DB kind",
            where=self.detector,
            found=found,
            expected=f"(1, 3, {height}, {width}) in, (1, 1, {height}, {width}) out",
            do="give a detection network, not one that recognises or classifies text",
        )


def text_share(probability: Map) -> float:
    """The share of the picture that lies in boxes around text."""
    likely = (probability > _PIXEL).astype(np.uint8)
    covered = np.zeros_like(likely)
    contours, _ = cv2.findContours(likely, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        centre, (width, height), angle = cv2.minAreaRect(contour)
        if min(width, height) < _MIN_SIDE_PX:
            continue
        inside = np.zeros_like(likely)
        _fill(inside, (centre, (width, height), angle))
        if cv2.mean(probability, inside)[0] < _REGION:
            continue
        grow = width * height * _UNCLIP / (2 * (width + height))
        _fill(covered, (centre, (width + 2 * grow, height + 2 * grow), angle))
    return float(covered.mean())


def _fill(mask: npt.NDArray[np.uint8], box: Any) -> None:
    cv2.fillPoly(mask, [np.rint(cv2.boxPoints(box)).astype(np.int32)], (1,))


def _rounded(side_px: float) -> int:
    return max(_MULTIPLE, round(side_px / _MULTIPLE) * _MULTIPLE)
