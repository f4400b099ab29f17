"""Stages of the embedded DiT: what a step sees, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from curation.toonworld.world import draw_episode
from schemas.config.presets import toonworld
from training.base_model import load_vae
from training.latents import encode_frames
from training.tiny import dit
from training.tiny.base import make_toon_base, write_model
from training.tiny.dit import train
from training.tiny.dit_data import Batch, Rows, Scenes, encoded_scenes
from training.tiny.stories import TRAIN_SEED, film_scene
from training.weights import load_transformer

EMBEDDED = Path(__file__).parents[2] / "assets/tiny/model"


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Four stories, scenes of two frames; latents are 100 times the scene, and the frame."""
    number = torch.arange(12)
    frames = (100 * number[:, None] + torch.arange(2))[:, :, None, None, None]
    texts = number[:, None, None].expand(12, 40, 64)
    empty = torch.full((40, 64), -1.0)
    return Scenes(frames.expand(12, 2, 16, 16, 16).half(), texts.half(), empty.half())


def numbers(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Of each row: its frames and its texts."""
    return batch.latents[:, :, 0, 0, 0].int().tolist(), batch.texts[:, :, 0, 0].int().tolist()


def test_a_lone_frame_comes_with_the_text_of_its_scene_or_with_none(scenes: Scenes):
    seen, empty, places = set(), 0, set()
    for step in range(30):
        batch = Rows(scenes).batch(step)
        assert batch.latents.shape == (32, 1, 16, 16, 16)
        assert batch.generated is None
        for (frame,), (text,) in zip(*numbers(batch), strict=True):
            assert text in (frame // 100, -1)
            seen.add(frame)
            empty += text == -1
        places |= {*batch.positions}
    assert seen == {100 * scene + frame for scene in range(12) for frame in range(2)}
    assert 0.05 < empty / (30 * 32) < 0.15
    assert places == {*range(6)}  # anywhere in a story of three scenes of two frames


@pytest.mark.parametrize("frames", [1, 2])
def test_scenes_of_a_story_are_of_one_episode_each_with_its_text(scenes: Scenes, frames: int):
    orders, conditional, count = set(), 0, 0
    for step in range(40):
        batch = Rows(scenes, 3, frames).batch(step)
        assert batch.generated is not None
        assert [p // 2 for p in batch.positions] == [s for s in range(3) for _ in range(frames)]
        for seen, texts, made in zip(*numbers(batch), batch.generated.tolist(), strict=True):
            shown = [seen[k * frames] // 100 for k in range(3)]
            assert len({scene // 3 for scene in shown}) == 1
            assert len({*shown}) == 3
            if frames == 2:
                assert seen == [100 * scene + f for scene in shown for f in range(2)]
            assert texts in (shown, [-1, -1, -1])
            assert made in ([True] * 3, [False, False, True])
            orders.add(tuple(shown))
            conditional += made[0] is False
            count += 1
    assert len(orders) == 4 * 6  # every order is a story
    assert 0.35 < conditional / count < 0.65


def test_steps_do_not_change(scenes: Scenes):
    told = Rows(scenes, 3)
    assert torch.equal(told.batch(5).latents, told.batch(5).latents)
    assert not torch.equal(told.batch(5).latents, told.batch(6).latents)


@torch.no_grad()
def test_scenes_are_drawn_and_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_toon_base(tmp_path / "base", toonworld().training.model, 1, 2, EMBEDDED)
    found = encoded_scenes(tmp_path, base, 2, 1)
    assert found.latents.shape == (6, 5, 16, 16, 16)
    assert found.texts.shape == (6, 40, 64)
    shot = draw_episode(TRAIN_SEED, 1).shots[2]  # the last of six
    film = film_scene(shot, TRAIN_SEED, 1, 2)[::2]
    assert np.array_equal(film, film_scene(shot, TRAIN_SEED, 1, 2, every=2))
    vae = load_vae(base)
    wanted = encode_frames(vae, film)[0] * vae.config.scaling_factor
    torch.testing.assert_close(found.latents[5].float(), wanted, atol=5e-3, rtol=5e-3)
    monkeypatch.setattr("training.tiny.dit_data._encode_episodes", None)
    again = encoded_scenes(tmp_path, base, 2, 1)
    assert torch.equal(again.latents, found.latents)
    assert not torch.equal(found.texts[5], found.empty)


def test_an_interrupted_training_ends_with_the_same_weights(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dit, "_EVERY", 1)
    told = Rows(scenes, 3)
    base = make_toon_base(tmp_path / "base", toonworld().training.model, 1, 2, EMBEDDED)
    whole = load_transformer(base)
    curve = train(whole, told, base, 3, tmp_path / "whole.ckpt")
    assert [line["step"] for line in curve] == [1, 2, 3]

    def stop(self: Rows, step: int):
        if step == 2:
            raise KeyboardInterrupt
        return batch(self, step)

    batch = Rows.batch
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Rows, "batch", stop)
        train(load_transformer(base), told, base, 3, tmp_path / "part.ckpt")
    resumed = load_transformer(base)
    assert len(train(resumed, told, base, 3, tmp_path / "part.ckpt")) == 3
    for name, weight in resumed.named_parameters():
        assert torch.equal(weight, dict(whole.named_parameters())[name]), name

    write_model(tmp_path / "model", resumed, EMBEDDED)
    written = dict(load_transformer(tmp_path / "model").named_parameters())
    assert all(torch.equal(written[n], p) for n, p in resumed.named_parameters())


def test_bfloat16_comes_near_float32_and_leaves_the_model_in_float32(
    scenes: Scenes, tmp_path: Path
):
    told = Rows(scenes, 3)
    base = make_toon_base(tmp_path / "base", toonworld().training.model, 1, 2, EMBEDDED)
    exact, rough = load_transformer(base), load_transformer(base)
    (wanted,) = train(exact, told, base, 2, tmp_path / "exact.ckpt")
    (found,) = train(rough, told, base, 2, tmp_path / "rough.ckpt", is_bf16=True)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    pairs = [*zip(exact.parameters(), rough.parameters(), strict=True)]
    assert not all(torch.equal(a, b) for a, b in pairs)  # it was used
    assert {b.dtype for _, b in pairs} == {torch.float32}
