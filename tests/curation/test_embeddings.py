from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.embeddings import ColorLayout, load_embedder, spread_frames
from curation.video import read_frames
from schemas.errors import ConfigError

SHOTS = {  # verified single shots of the samples: first frame, frames
    "sintel_trailer.mp4": [(372, 98), (523, 50), (573, 37), (610, 14)],
    "big_buck_bunny.mp4": [(44, 93)],
    "chaplin.mp4": [(0, 60)],
}


def plain(*rgb: int, num_frames: int = 4) -> np.ndarray:
    return np.full((1, num_frames, 8, 8, 3), rgb, np.uint8)


def test_vectors_have_length_one_for_any_picture() -> None:
    model = ColorLayout()
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 20, 31, 3), np.uint8)
    for frames in (noise, plain(0, 0, 0), plain(94, 94, 94), plain(255, 255, 255, num_frames=1)):
        vectors = model.embed_clips(frames)
        assert vectors.shape == (len(frames), model.dim)
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_batch_equals_one_by_one() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (4, 6, 16, 16, 3), np.uint8)
    model = ColorLayout()
    each = np.concatenate([model.embed_clips(f[None]) for f in frames])
    assert np.array_equal(model.embed_clips(frames), each)


def test_colour_place_and_time_all_matter() -> None:
    model = ColorLayout()
    half = plain(200, 30, 30).copy()
    half[:, :, :, 4:] = (30, 30, 200)
    mirrored, reversed_in_time = half[:, :, :, ::-1], half.copy()
    half_late = half.copy()
    half_late[:, 2:] = 255
    reversed_in_time = half_late[:, ::-1]
    [a], [b], [c], [d] = map(model.embed_clips, (half, mirrored, half_late, reversed_in_time))
    assert a @ b < 0.9
    assert c @ d < 0.9
    [red], [green] = map(model.embed_clips, (plain(200, 30, 30), plain(30, 160, 60)))
    assert red @ green < 0


def test_texts_are_compared_by_the_colours_they_name() -> None:
    model = ColorLayout()
    red, nothing, night = model.embed_texts(
        ["A red ball.", "Two friends talk.", "A dark blue NIGHT sky"]
    )
    assert nothing is None
    assert red is not None
    assert night is not None
    [red_clip], [dark_clip] = map(model.embed_clips, (plain(220, 20, 20), plain(10, 10, 60)))
    assert red @ red_clip > 0.9
    assert red @ dark_clip < night @ dark_clip
    assert np.linalg.norm(red) == pytest.approx(1)


def test_shots_of_one_film_are_closer_than_shots_of_two(samples: Path) -> None:
    model = load_embedder("color-layout")
    vectors: dict[tuple[str, int], np.ndarray] = {}
    for name, shots in SHOTS.items():
        numbers = [n for start, count in shots for n in spread_frames(start + 2, count - 4, 2)]
        frames = read_frames(samples / name, numbers, height_px=32, width_px=32)
        for i, clip in enumerate(frames.reshape(len(shots), 2, 32, 32, 3)):
            vectors[name, i] = model.embed_clips(clip[None])[0]
    pairs = [(a[0] == b[0], vectors[a] @ vectors[b]) for a, b in combinations(vectors, 2)]
    same = [s for related, s in pairs if related]
    other = [s for related, s in pairs if not related]
    assert np.mean(same) > np.mean(other) + 0.2
    assert max(same) - min(same) > 0.1


@given(st.integers(0, 1000), st.integers(1, 500), st.integers(1, 64))
def test_spread_frames_lie_in_order_inside_the_span(start: int, length: int, count: int) -> None:
    numbers = spread_frames(start, length, count)
    assert len(numbers) == count
    assert numbers == sorted(numbers)
    assert start <= numbers[0] <= numbers[-1] < start + length
    assert len(set(numbers)) == min(length, count)


def test_unknown_model() -> None:
    with pytest.raises(ConfigError, match="unknown similarity model"):
        load_embedder("colour-layout")
