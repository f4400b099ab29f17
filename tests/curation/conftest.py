"""Films for tests: the repository's real samples, and small ones written on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from curation.mp4 import write_mp4

REPOSITORY = Path(__file__).parents[2]

Film = Callable[..., Path]


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real sample films."""
    return REPOSITORY / "assets" / "samples"


@pytest.fixture
def film(tmp_path: Path) -> Film:
    """Write plain shots with a moving white square: ``film(name, [(rgb, frames), ...])``."""

    def make(
        name: str,
        shots: Sequence[tuple[tuple[int, int, int], int]],
        height_px: int = 48,
        width_px: int = 64,
        fps: float = 12,
    ) -> Path:
        frames: list[np.ndarray] = []
        for rgb, count in shots:
            for i in range(count):
                frame = np.full((height_px, width_px, 3), rgb, np.uint8)
                left = 2 * i % (width_px - 12)
                frame[16:28, left : left + 12] = 255
                frames.append(frame)
        path = tmp_path / name
        write_mp4(path, np.stack(frames), fps)
        return path

    return make
