from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import CogVideoXDPMScheduler
from diffusers.hooks.group_offloading import ModuleGroup

from inference.pipeline import Mask2DiTPipeline
from inference.prepare import prepare
from schemas.config import GenerationConfig
from schemas.errors import ConfigError
from tests.inference.test_pipeline import LATENT, OTHER, SMALL, STORY

CPU = torch.device("cpu")


@pytest.fixture
def own(tiny_base) -> Mask2DiTPipeline:
    """A pipeline that may be changed."""
    pipeline = Mask2DiTPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ready(pipeline: Mask2DiTPipeline, **settings: Any) -> Mask2DiTPipeline:
    prepare(pipeline, GenerationConfig(**settings), CPU)
    return pipeline


def latents(pipeline, prompts=STORY, **settings) -> torch.Tensor:
    return torch.cat(pipeline(prompts, **{**LATENT, **settings}).latents, 1)


def test_the_scheduler_is_set_and_nothing_is_printed(own, capfd):
    assert isinstance(ready(own, scheduler="dpm").scheduler, CogVideoXDPMScheduler)
    latents(own)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "model"}, "a GPU"),
        ({"offload": "sequential"}, "a GPU"),
        ({"offload": "group"}, "a GPU"),
        ({"compile": True, "step_cache": "pyramid"}, "cannot be left out"),
    ],
)
def test_settings_that_cannot_work_here_are_refused(own, settings, message):
    with pytest.raises(ConfigError, match=message):
        ready(own, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "group", "compile": True}, "cannot be compiled"),
        ({"offload": "sequential", "compile": True}, "cannot be compiled"),
    ],
)
def test_settings_that_cannot_work_on_a_gpu_are_refused(own, settings, message):
    with pytest.raises(ConfigError, match=message):
        prepare(own, GenerationConfig(**settings), torch.device("cuda"))


def test_slicing_decodes_the_same(own):
    expected = own([STORY, OTHER], **SMALL).frames
    calls: list[int] = []
    decode = own.vae._decode
    own.vae._decode = lambda z, **more: calls.append(len(z)) or decode(z, **more)
    made = ready(own, vae_slicing=True)([STORY, OTHER], **SMALL).frames
    assert calls == [1] * 6
    for ours, theirs in zip(made, expected, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("size", [(6, 5), (8, 8), (13, 11)])
def test_tiling_decodes_in_tiles_of_any_size_and_nearly_the_same(own, size):
    large = torch.randn(1, 2, 16, *size, generator=torch.Generator().manual_seed(0)) / 3
    expected = own.decode_scene(large).astype(int)
    tiles: list[tuple[int, ...]] = []
    hook = own.vae.decoder.register_forward_pre_hook(lambda _, z: tiles.append(z[0].shape[-2:]))
    made = ready(own, vae_tiling=True).decode_scene(large)
    hook.remove()
    assert made.shape == expected.shape == (1, 5, size[0] * 8, size[1] * 8, 3)
    assert max(tiles) == (6, 5)
    assert (len(tiles) == 1) == (size == (6, 5))
    assert np.abs(made - expected).mean() < 0.5 * np.abs(expected - expected.mean()).mean()


@pytest.mark.parametrize("size", [(480, 720), (256, 256), (768, 1360), (32, 32)])
def test_tiles_fit_together_at_every_size(own, size):
    """diffusers' rounding must not drop or add a pixel where tiles meet."""
    vae = own.vae
    vae.tile_sample_min_height, vae.tile_sample_min_width = (n // 2 for n in size)
    ready(own, vae_tiling=True)
    for pixels, cells, factor in (
        (vae.tile_sample_min_height, vae.tile_latent_min_height, vae.tile_overlap_factor_height),
        (vae.tile_sample_min_width, vae.tile_latent_min_width, vae.tile_overlap_factor_width),
    ):
        assert pixels - int(pixels * factor) == int(cells * (1 - factor)) * 8


def test_blocks_are_compiled(own):
    """That compiled blocks compute the same is tests/training/test_transformer.py's."""
    assert ready(own, compile=True).transformer.compiled


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights as they are stored, tensors inside tensors included."""

    def size(tensor: torch.Tensor) -> int:
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.numel() * tensor.element_size()
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    return sum(size(parameter.data) for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_in_8_bits_take_a_quarter_of_float32_and_sample_nearly_the_same(own, kind):
    expected, before = latents(own), stored_bytes(own.transformer)
    made = latents(ready(own, quantize=kind))
    assert stored_bytes(own.transformer) < 0.3 * before
    error = float((made - expected).square().mean().sqrt() / expected.std())
    assert 0 < error < 0.05


def test_offload_model_by_model(own):
    """diffusers' mechanism with the CPU in the place of the GPU: every model has its turn."""
    expected = own(STORY, **SMALL)
    own.enable_model_cpu_offload(device="cpu")
    made = own(STORY, **SMALL)
    assert np.array_equal(np.concatenate(made.frames, 1), np.concatenate(expected.frames, 1))
    frames = made.frames[0][0]
    assert own.encode_video(frames).shape == (2, 16, 4, 4)


def test_offload_layer_by_layer(own):
    """What enable_sequential_cpu_offload does, which itself would ask for the device cpu:0."""
    expected = own(STORY, **SMALL)
    for model in (own.text_encoder, own.transformer, own.vae):
        cpu_offload(model, CPU)
        assert {p.device.type for p in model.parameters()} == {"meta"}
    made = own(STORY, **SMALL)
    assert np.array_equal(np.concatenate(made.frames, 1), np.concatenate(expected.frames, 1))
    assert own.encode_video(made.frames[0][0]).shape == (2, 16, 4, 4)


def test_offload_in_groups_brings_every_weight(own, monkeypatch):
    """A weight that no hook brings would stay behind in CPU memory."""
    expected = own(STORY, **SMALL)
    brought: set[int] = set()
    onload = ModuleGroup.onload_

    def watched(group):
        weights = [p for module in group.modules for p in module.parameters()]
        brought.update(id(p) for p in [*weights, *group.parameters])
        return onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", watched)
    own.enable_group_offload(CPU, offload_type="leaf_level")
    made = own(STORY, **SMALL)
    own.encode_video(made.frames[0][0])
    assert np.array_equal(np.concatenate(made.frames, 1), np.concatenate(expected.frames, 1))
    models = {"transformer": own.transformer, "vae": own.vae, "text_encoder": own.text_encoder}
    left = [
        f"{name}.{key}"
        for name, model in models.items()
        for key, p in model.named_parameters()
        if id(p) not in brought
    ]
    assert left == []
