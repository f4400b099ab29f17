import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from schemas.errors import CheckpointError, ConfigError
from training.base_model import load_transformer
from training.positions import rotary
from training.transformer import Mask2DiTTransformer3DModel

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": 5,
}
GRID = (3, 4)


def model(rope: bool, **changes) -> Mask2DiTTransformer3DModel:
    torch.manual_seed(0)
    made = Mask2DiTTransformer3DModel(
        **TINY, use_rotary_positional_embeddings=rope, **changes
    ).eval()
    for p in made.parameters():  # layer norms start as ones and zeros, which would hide mistakes
        torch.nn.init.normal_(p, std=0.2)
    return made


def inputs(batch: int = 2, frames: int = 9, scenes: int = 3):
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(batch, frames, 4, 6, 8, generator=generator)
    text = torch.randn(batch, scenes, 5, 8, generator=generator)
    return video, text, torch.tensor([37, 900][:batch])


@pytest.mark.parametrize("rope", [False, True], ids=["2b_sincos", "5b_rope"])
@pytest.mark.parametrize("frames", [3, 5], ids=["native_length", "other_length"])
def test_one_scene_equals_diffusers(rope, frames):
    ours = model(rope)
    theirs = CogVideoXTransformer3DModel(**TINY, use_rotary_positional_embeddings=rope).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    video, text, timestep = inputs(frames=frames, scenes=1)
    with torch.no_grad():
        expected = theirs(
            video,
            text[:, 0],
            timestep,
            image_rotary_emb=rotary(16, frames, GRID, GRID) if rope else None,
        ).sample
        found = ours(video, text, timestep, [frames])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rope", [False, True])
def test_full_mask_on_three_scenes_equals_diffusers_on_one_long_one(rope):
    # With v5 only the positions could differ; RoPE runs on, so S scenes are one long scene.
    ours = model(rope, mask="v5")
    video, text, timestep = inputs()
    one = text.flatten(1, 2)[:, None]
    with torch.no_grad():
        three = ours(video, text, timestep, [3, 3, 3])
        long = ours(video, one, timestep, [9])
    same = torch.allclose(three, long, atol=1e-5)
    assert same if rope else not same  # 2B-like positions are stretched over the scenes instead


def test_sincos_positions_of_three_scenes_are_one_scene_stretched():
    ours = model(rope=False)
    captured = []
    ours.transformer_blocks[0].register_forward_pre_hook(lambda m, args: captured.append(args[0]))
    video, text, timestep = inputs()
    ours(video * 0, text, timestep, [3, 3, 3])
    ours(video[:, :3] * 0, text[:, :1], timestep, [3])
    three, one = (x[0].unflatten(0, (-1, *GRID)) for x in captured)
    bias = ours.patch_embed.proj.bias
    # align_corners=False: output frame i lies at (i + 0.5) / 3 - 0.5 of the one-scene table
    torch.testing.assert_close(three[1::3] - bias, one - bias)
    torch.testing.assert_close(three[2] - bias, (one[0] - bias) * 2 / 3 + (one[1] - bias) / 3)


def test_batch_is_one_by_one_and_scenes_may_be_unequal():
    ours = model(rope=True)
    video, text, timestep = inputs()
    generated = torch.tensor([[False, True, True], [False, False, True]])
    with torch.no_grad():
        both = ours(video, text, timestep, [2, 3, 4], generated)
        single = [
            ours(video[i, None], text[i, None], timestep[i, None], [2, 3, 4], generated[i, None])
            for i in range(2)
        ]
    torch.testing.assert_close(both, torch.cat(single))


def test_all_generated_is_the_same_as_no_flags():
    ours = model(rope=True)
    video, text, timestep = inputs()
    with torch.no_grad():
        plain = ours(video, text, timestep, [3, 3, 3])
        flagged = ours(video, text, timestep, [3, 3, 3], torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(plain, flagged)


@pytest.mark.parametrize("mask", ["v1", "v2"])
def test_conditions_are_modulated_with_time_zero(mask):
    ours = model(rope=True, mask=mask)
    video, text, timestep = inputs()
    generated = torch.tensor([[False, False, True]]).expand(2, 3)
    with torch.no_grad():
        conditional = ours(video, text, timestep, [3, 3, 3], generated)
        at_zero = ours(video, text, torch.zeros_like(timestep), [3, 3, 3])
        at_t = ours(video, text, timestep, [3, 3, 3])
    if mask == "v1":  # scenes never meet: each is as if alone at its own time, text included
        torch.testing.assert_close(conditional[:, :6], at_zero[:, :6])
        torch.testing.assert_close(conditional[:, 6:], at_t[:, 6:])
    else:  # under v2 they do, through the video
        assert not torch.allclose(conditional[:, :6], at_zero[:, :6], atol=1e-3)
        assert not torch.allclose(conditional[:, 6:], at_t[:, 6:], atol=1e-3)


def test_isolated_model_keeps_scenes_apart_and_v2_does_not():
    video, text, timestep = inputs()
    for mask, apart in (("v1", True), ("v2", False)):
        video.requires_grad_()
        text.requires_grad_()
        out = model(rope=True, mask=mask)(video, text, timestep, [3, 3, 3])
        by_video, by_text = torch.autograd.grad(out[:, :3].sum(), (video, text))
        assert (by_video[:, 3:].abs().max() == 0) == apart
        assert (by_text[:, 1:].abs().max() == 0) == apart


def test_gradient_checkpointing_changes_nothing():
    video, text, timestep = inputs()
    generated = torch.tensor([[False, False, True]]).expand(2, 3)
    gradients = []
    for checkpointing in (False, True):
        ours = model(rope=True).train()
        if checkpointing:
            ours.enable_gradient_checkpointing()
        ours(video, text, timestep, [3, 3, 3], generated).square().mean().backward()
        gradients.append([p.grad for p in ours.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("rope", [False, True])
def test_weights_go_to_diffusers_and_back(tmp_path, rope):
    ours = model(rope)
    ours.save_pretrained(tmp_path / "transformer")
    theirs = CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "transformer", low_cpu_mem_usage=False
    )
    theirs.save_pretrained(tmp_path / "again" / "transformer")
    back = load_transformer(tmp_path / "again", mask="v5")
    assert back.config.mask == "v5"
    for key, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_missing_weights_are_refused(tmp_path):
    model(rope=True).save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.bias"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"proj_out\.bias"):
        load_transformer(tmp_path)


def test_image_to_video_variants_are_refused():
    with pytest.raises(ConfigError, match="ofs_embed_dim=512"):
        model(rope=True, ofs_embed_dim=512)
