"""Single pictures for the embedded DiT: what a step sees, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from schemas.config.presets import toonworld
from training.tiny import pictures
from training.tiny.base import make_toon_base, write_model
from training.tiny.pictures import BATCH, Pictures, train
from training.weights import load_transformer

EMBEDDED = Path(__file__).parents[2] / "assets/tiny/model"


@pytest.fixture(scope="module")
def told() -> Pictures:
    """Seven samples of three scenes of two frames; each frame and text holds its scene's number."""
    scene = torch.arange(7 * 3).view(7, 3)
    latents = scene.repeat_interleave(2, 1)[:, :, None, None, None].expand(7, 6, 16, 16, 16)
    texts = scene[:, :, None, None].expand(7, 3, 40, 64)
    return Pictures(latents.half(), texts.half(), torch.full((40, 64), -1.0).half())


def test_a_picture_comes_with_the_text_of_its_scene_or_with_none(told: Pictures):
    seen, empty = set(), 0
    for step in range(20):
        latents, texts = told.batch(step)
        assert latents.shape == (BATCH, 1, 16, 16, 16)
        shown, said = latents[:, 0, 0, 0, 0].tolist(), texts[:, 0, 0, 0].tolist()
        assert all(text in (picture, -1) for picture, text in zip(shown, said, strict=True))
        empty += said.count(-1)
        seen |= {*shown}
    assert seen == {*range(21)}
    assert 0.05 < empty / (20 * BATCH) < 0.15


def test_an_interrupted_training_ends_with_the_same_weights(
    told: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pictures, "_EVERY", 1)
    base = make_toon_base(tmp_path / "base", toonworld().training.model, 1, 2, EMBEDDED)
    whole = load_transformer(base)
    curve = train(whole, told, base, 3, tmp_path / "whole.ckpt")
    assert [line["step"] for line in curve] == [1, 2, 3]

    def stop(self: Pictures, step: int):
        if step == 2:
            raise KeyboardInterrupt
        return batch(self, step)

    batch = Pictures.batch
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Pictures, "batch", stop)
        train(load_transformer(base), told, base, 3, tmp_path / "part.ckpt")
    resumed = load_transformer(base)
    assert len(train(resumed, told, base, 3, tmp_path / "part.ckpt")) == 3
    for name, weight in resumed.named_parameters():
        assert torch.equal(weight, dict(whole.named_parameters())[name]), name

    write_model(tmp_path / "model", resumed, EMBEDDED)
    written = dict(load_transformer(tmp_path / "model").named_parameters())
    assert all(torch.equal(written[n], p) for n, p in resumed.named_parameters())
