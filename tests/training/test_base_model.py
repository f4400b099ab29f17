import shutil

import pytest
import torch
from diffusers import CogVideoXPipeline

from schemas.errors import CheckpointError, ConfigError
from tests.training.conftest import SHAPE
from training.base_model import load_components, make_tiny_base, model_sha256


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, ground):
    again = make_tiny_base(tmp_path / "a", SHAPE)
    other = make_tiny_base(tmp_path / "b", SHAPE.model_copy(update={"seed": 1}))
    assert model_sha256(again) == model_sha256(ground.base)
    assert model_sha256(other) != model_sha256(ground.base)


def test_another_position_policy_is_another_model_with_the_same_weights(tmp_path, ground):
    made = make_tiny_base(tmp_path / "a", SHAPE.model_copy(update={"position_policy": "reset"}))
    transformer = load_components(made).transformer
    assert transformer.config.position_policy == "reset"
    before = load_components(ground.base).transformer.state_dict()
    assert all(torch.equal(before[k], v) for k, v in transformer.state_dict().items())


def test_finished_folder_is_reused_and_a_strange_one_kept(tmp_path, ground):
    marker = ground.base / "_DONE.json"
    before = marker.stat().st_mtime_ns
    assert make_tiny_base(ground.base, SHAPE) == ground.base
    assert marker.stat().st_mtime_ns == before
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        make_tiny_base(strange, SHAPE)
    assert (strange / "thesis.txt").read_text() == "mine"


def test_random_seed_of_the_caller_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_tiny_base(tmp_path / "m", SHAPE)
    assert torch.equal(torch.rand(1), expected)


def test_pieces_have_the_real_compression_and_unit_latents(ground):
    parts = load_components(ground.base)
    assert 1e6 < sum(p.numel() for p in parts.transformer.parameters()) < 3e6
    frames = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = parts.vae.encode(frames).latent_dist.mode() * parts.vae.config.scaling_factor
        video = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample
    assert latents.shape == (1, 16, 3, 4, 6)
    assert 0.5 < latents.square().mean().sqrt() < 2
    assert video.shape == frames.shape
    assert parts.scheduler.alphas_cumprod[-1] == 0  # zero terminal SNR


def test_stock_diffusers_pipeline_opens_the_folder(ground):
    pipeline = CogVideoXPipeline.from_pretrained(ground.base)
    ours = load_components(ground.base).transformer.state_dict()
    theirs = pipeline.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_incomplete_folder_is_refused(ground, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(ground.base, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="AutoencoderKLCogVideoX"):
        load_components(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="no vae"):
        load_components(folder)
