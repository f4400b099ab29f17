"""A step with kept keys and values equals the whole forward pass, and does only its own part."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from schemas.errors import ConfigError
from tests.training.models import SHAPES, inputs, model
from training.cost import Tokens, layer_flops, outside_flops
from training.scene_cache import CachedDenoiser, why_no_cache
from training.transformer import Mask2DiTTransformer3DModel

torch.set_num_threads(1)

CASES: dict[str, tuple[list[int], list[int]]] = {
    "two_conditions": ([2, 2, 2], [0, 0, 1]),
    "unequal_lengths": ([2, 6, 4], [0, 0, 1]),
    "two_new_scenes": ([4, 2, 2, 4], [0, 0, 1, 1]),
    "a_condition_between": ([2, 4, 2, 2], [0, 1, 0, 1]),
    "a_condition_after": ([2, 2, 2], [0, 1, 0]),
    "no_condition_first": ([2, 4], [1, 0]),
    "no_condition": ([2, 2], [1, 1]),
}


def tensors(scene_frames: list[int], batch: int = 2, dtype: torch.dtype = torch.float32):
    video, text, timestep = inputs(batch, sum(scene_frames), len(scene_frames))
    return video.to(dtype), text.to(dtype), timestep


def frame_flags(scene_frames: list[int], flags: list[int]) -> Tensor:
    """Which latent frames are generated."""
    return torch.tensor(flags, dtype=torch.bool).repeat_interleave(torch.tensor(scene_frames))


def seen_tokens(transformer: Mask2DiTTransformer3DModel) -> list[int]:
    """A list that grows by the number of video tokens of every pass through the first block."""
    seen: list[int] = []
    transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].shape[1])
    )
    return seen


@torch.no_grad()
def steps_are_equal(
    transformer: Mask2DiTTransformer3DModel,
    cached: CachedDenoiser,
    given: tuple[Tensor, Tensor, Tensor],
    scene_frames: list[int],
    flags: list[int],
    tolerance: float,
    steps: int = 2,
) -> None:
    """Denoise a few steps both ways, each on what the whole forward pass made of the last one."""
    video, text, timestep = given
    generated = torch.tensor([flags] * len(video), dtype=torch.bool)
    new = frame_flags(scene_frames, flags)
    for _ in range(steps):
        expected = transformer(video, text, timestep, scene_frames, generated)
        found = cached(
            hidden_states=video,
            encoder_hidden_states=text,
            timestep=timestep,
            scene_frames=scene_frames,
            generated=generated,
        )
        assert found.shape == expected.shape
        error = (found - expected)[:, new].abs().max()
        assert error <= tolerance * expected.abs().max()
        video = video.clone()
        video[:, new] -= 0.1 * expected[:, new]
        timestep = timestep // 2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_step_is_that_of_the_whole_forward_pass(shape, case, dtype, tolerance):
    scene_frames, flags = CASES[case]
    transformer = model(shape, mask="scene_causal").to(dtype)
    given = tensors(scene_frames, dtype=dtype)
    cached = CachedDenoiser(transformer)
    steps_are_equal(transformer, cached, given, scene_frames, flags, tolerance)


@pytest.mark.parametrize("shape", ["2b", "5b"])
@pytest.mark.parametrize(
    "policy", [{"position_policy": "reset"}, {"position_policy": "gap", "position_gap": 3}], ids=str
)
def test_other_position_policies(shape, policy):
    scene_frames, flags = CASES["unequal_lengths"]
    transformer = model(shape, mask="scene_causal", **policy).double()
    given = tensors(scene_frames, dtype=torch.float64)
    cached = CachedDenoiser(transformer)
    steps_are_equal(transformer, cached, given, scene_frames, flags, 1e-10)


def test_bfloat16():
    scene_frames, flags = CASES["unequal_lengths"]
    transformer = model("5b", mask="scene_causal").to(torch.bfloat16)
    given = tensors(scene_frames, dtype=torch.bfloat16)
    steps_are_equal(transformer, CachedDenoiser(transformer), given, scene_frames, flags, 3e-2)


def test_samples_with_other_conditions_share_what_all_have():
    transformer = model("5b", mask="scene_causal")
    video, text, timestep = tensors([2, 2, 2])
    generated = torch.tensor([[0, 0, 1], [0, 1, 1]], dtype=torch.bool)
    seen = seen_tokens(transformer)
    found = CachedDenoiser(transformer)(video, text, timestep, [2, 2, 2], generated)
    assert seen == [24, 48]  # the first scene is clean in both
    with torch.no_grad():
        expected = transformer(video, text, timestep, [2, 2, 2], generated)
    torch.testing.assert_close(found[0, 4:], expected[0, 4:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, 2:], expected[1, 2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "policy", "added"),
    # sinusoids are stretched over the timeline, so they change when it grows
    [("5b", "continuous", 24), ("2b", "continuous", 24 + 24), ("2b", "reset", 24)],
)
def test_a_growing_window_computes_only_the_newest_scene(shape, policy, added):
    transformer = model(shape, mask="scene_causal", position_policy=policy)
    cached = CachedDenoiser(transformer)
    video, text, timestep = tensors([2, 2, 2])
    seen = seen_tokens(transformer)
    for scenes in (2, 3):
        for _ in range(2):
            generated = torch.tensor([[False] * (scenes - 1) + [True]] * 2)
            cached(video[:, : 2 * scenes], text[:, :scenes], timestep, [2] * scenes, generated)
    # prefill, step, step; prefill of the second scene, step, step
    assert seen == [24, 24, 24, added, 24, 24]
    steps_are_equal(transformer, cached, (video, text, timestep), [2, 2, 2], [0, 0, 1], 1e-5)


def test_a_sliding_window_is_computed_anew():
    transformer = model("5b", mask="scene_causal")
    cached = CachedDenoiser(transformer)
    video, text, timestep = tensors([2, 2, 2, 2])
    generated = torch.tensor([[False, False, True]] * 2)
    seen = seen_tokens(transformer)
    for start in (0, 1):
        frames = slice(2 * start, 2 * start + 6)
        scenes = slice(start, start + 3)
        cached(video[:, frames], text[:, scenes], timestep, [2, 2, 2], generated)
    assert seen == [48, 24, 48, 24]
    window = (video[:, 2:], text[:, 1:], timestep)
    steps_are_equal(transformer, cached, window, [2, 2, 2], [0, 0, 1], 1e-5)


@pytest.mark.parametrize("change", ["latents", "text", "batch", "size", "lengths", "dtype"])
def test_whatever_changes_is_noticed(change):
    transformer = model("5b", mask="scene_causal")
    cached = CachedDenoiser(transformer)
    scene_frames, flags = [2, 4, 2], [0, 0, 1]
    video, text, timestep = tensors(scene_frames)
    steps_are_equal(transformer, cached, (video, text, timestep), scene_frames, flags, 1e-5)
    if change == "latents":
        video[1, 3] += 1  # in place: what is kept must not be the caller's tensor
    elif change == "text":
        text[0, 1] += 1
    elif change == "batch":
        video, text, timestep = tensors(scene_frames, batch=1)
    elif change == "size":
        video = video[..., :6]
    elif change == "lengths":
        scene_frames = [4, 2, 2]
    else:
        transformer, video, text = transformer.double(), video.double(), text.double()
    steps_are_equal(transformer, cached, (video, text, timestep), scene_frames, flags, 1e-5)


@pytest.mark.parametrize("shape", ["2b", "5b"])
def test_a_step_costs_what_the_last_scene_adds(shape):
    scene_frames = [2, 6, 4]
    transformer = model(shape, mask="scene_causal")
    video, text, timestep = tensors(scene_frames, batch=1)
    generated = torch.tensor([[False, False, True]])
    cached = CachedDenoiser(transformer)
    cached(video, text, timestep, scene_frames, generated)
    with FlopCounterMode(display=False) as counter:
        cached(video, text, timestep, scene_frames, generated)

    def layer(frames: list[int]) -> float:
        tokens = Tokens.of(transformer.config, frames, *video.shape[-2:], text.shape[2])
        return layer_flops(transformer.config, tokens).total

    config, alone = transformer.config, [scene_frames[2]]
    modulation = layer([]) * config.num_layers
    scene = (layer(scene_frames) - layer(scene_frames[:2])) * config.num_layers
    outside = outside_flops(config, Tokens.of(config, alone, *video.shape[-2:], text.shape[2]))
    assert counter.get_total_flops() == scene + modulation + outside.total


@pytest.mark.slow  # runs the C++ compiler
@pytest.mark.usefixtures("without_lazy_modules")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_compiled_blocks():
    """One piece of code computes what is kept, one a step, in all layers."""
    torch.compiler.reset()
    counters.clear()
    plain, compiled = (model("5b", mask="scene_causal") for _ in range(2))
    compiled.compile_blocks()
    given = (*tensors([2, 4, 2]), [2, 4, 2], torch.tensor([[False, False, True]] * 2))
    cached = CachedDenoiser(compiled)
    found = [cached(*given)[:, 6:] for _ in range(2)]
    assert counters["stats"]["unique_graphs"] == 2
    with torch.no_grad():
        expected = plain(*given)[:, 6:]
    for one in found:
        assert (one - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("mask", ["isolated", "v2", "v5"])
def test_other_masks_are_refused(mask):
    with pytest.raises(ConfigError, match=f"only the mask scene_causal .* this one is {mask}"):
        CachedDenoiser(model("5b", mask=mask))


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("sequence_group", "ranks share"), ("_cache_config", "a step cache is on")],
)
def test_what_does_not_go_with_it_is_refused(attribute, message):
    transformer = model("5b", mask="scene_causal")
    assert why_no_cache(transformer) is None
    setattr(transformer, attribute, object())
    with pytest.raises(ConfigError, match=message):
        CachedDenoiser(transformer)
