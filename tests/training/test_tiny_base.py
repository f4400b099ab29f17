from __future__ import annotations

from pathlib import Path

import pytest
import torch

from schemas.config.presets import toonworld
from training.tiny.base import PATCH, make_picture_base, make_toon_base, principal_directions
from training.transformer import Mask2DiTTransformer3DModel, unpatchify
from training.weights import load_transformer

EMBEDDED = Path(__file__).parents[2] / "assets/tiny/model"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = toonworld().training.model
    return make_toon_base(tmp_path_factory.mktemp("base") / "m", shape, 1, 3, EMBEDDED)


def through(transformer: Mask2DiTTransformer3DModel, latents: torch.Tensor) -> torch.Tensor:
    """Latents (F, C, H, W) made tokens and latents again, with nothing in between."""
    tokens = transformer.patch_embed.proj(latents).flatten(2).transpose(1, 2)
    patches = transformer.proj_out(tokens).flatten(0, 1)[None]
    return unpatchify(patches, (16 // PATCH, 16 // PATCH), 1, PATCH)[0]


def test_tokens_hold_all_that_latents_do(base: Path):
    latents = torch.randn(5, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = through(load_transformer(base), latents)
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)


def test_directions_are_orthonormal_and_their_signs_fixed():
    directions = principal_directions(EMBEDDED)
    torch.testing.assert_close(directions @ directions.T, torch.eye(64), atol=1e-4, rtol=0)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_same_folder_is_used_again_and_its_vae_compresses_no_time(base: Path):
    shape = toonworld().training.model
    before = (base / "model_index.json").stat().st_mtime_ns
    assert make_toon_base(base, shape, 1, 3, EMBEDDED) == base
    assert (base / "model_index.json").stat().st_mtime_ns == before
    config = load_transformer(base).config
    assert (config.temporal_compression_ratio, config.sample_frames) == (1, 5)


def test_a_model_of_pictures_becomes_a_base(base: Path, tmp_path: Path):
    made = make_picture_base(tmp_path / "made", base / "transformer", EMBEDDED)
    wanted = dict(load_transformer(base).named_parameters())
    for name, weight in load_transformer(made, mask="v5").named_parameters():
        assert torch.equal(weight, wanted[name]), name
    before = (made / "model_index.json").stat().st_mtime_ns
    assert make_picture_base(made, base / "transformer", EMBEDDED) == made
    assert (made / "model_index.json").stat().st_mtime_ns == before
