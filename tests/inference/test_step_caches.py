"""Step caches approximate; here with nothing left out they are exact, and otherwise they skip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference.pipeline import Mask2DiTPipeline
from inference.step_caches import enable_step_cache, step_cache
from schemas.errors import GenerationError
from tests.inference.test_pipeline import LATENT, OTHER, STORY
from training.block import Mask2DiTBlock

STEPS = 10
SETTINGS = {**LATENT, "num_inference_steps": STEPS, "frames": [5, 1, 5]}
NOTHING = (1000, 1001)  # no timestep is in this range

EXACT = {
    "first_block": {"threshold": 0.0},
    "pyramid": {"spatial_attention_timestep_skip_range": NOTHING},
    "faster": {
        "spatial_attention_timestep_skip_range": NOTHING,
        "unconditional_batch_timestep_skip_range": NOTHING,
    },
}
SKIPPING = {"first_block": {"threshold": 1e9}, "pyramid": {}, "faster": {}}
LAYERS = 4


@pytest.fixture
def own(tiny_base) -> Mask2DiTPipeline:
    """A pipeline that may be changed."""
    pipeline = Mask2DiTPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, prompts=STORY, **settings) -> torch.Tensor:
    return torch.cat(pipeline(prompts, **{**SETTINGS, **settings}).latents, 1)


@pytest.mark.parametrize("name", EXACT)
def test_without_skipping_the_result_is_exact(own, name):
    given = {"conditions": {1: torch.ones(1, 1, 16, 4, 4)}}
    expected = latents(own), latents(own, **given)
    enable_step_cache(own.transformer, replace(step_cache(name, own), **EXACT[name]))
    assert torch.equal(latents(own), expected[0])
    assert torch.equal(latents(own, **given), expected[1])


@pytest.mark.parametrize("name", SKIPPING)
def test_skipping_skips_and_leaves_nothing_for_the_next_call(own, monkeypatch, name):
    attended: list[int] = []
    real = Mask2DiTBlock.attend

    def counting(self, tokens, *arguments):
        attended.append(len(tokens))
        return real(self, tokens, *arguments)

    monkeypatch.setattr(Mask2DiTBlock, "attend", counting)
    exact = latents(own)
    assert sum(attended) == 2 * LAYERS * STEPS  # both passes of guidance
    enable_step_cache(own.transformer, replace(step_cache(name, own), **SKIPPING[name]))
    attended.clear()
    first = latents(own)
    if name == "first_block":  # all blocks once, then the first alone
        assert attended == [2] * (LAYERS + STEPS - 1)
    else:
        assert sum(attended) <= 1.5 * LAYERS * STEPS
    assert not torch.equal(first, exact)
    assert torch.isfinite(first).all()

    other = latents(own, OTHER, seed=3)
    assert not torch.equal(other, first)
    assert torch.equal(latents(own), first)  # whatever came in between
    own.transformer.disable_cache()
    assert torch.equal(latents(own), exact)


@pytest.mark.parametrize("name", SKIPPING)
def test_a_call_that_failed_leaves_nothing_for_the_next_one(own, name):
    enable_step_cache(own.transformer, replace(step_cache(name, own), **SKIPPING[name]))
    expected = latents(own)

    def fail(pipeline, step, timestep, tensors):
        if step == 6:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        latents(own, OTHER, seed=3, callback_on_step_end=fail)
    assert torch.equal(latents(own), expected)


@pytest.mark.parametrize("name", SKIPPING)
def test_batches_of_two_with_given_scenes(own, name):
    enable_step_cache(own.transformer, replace(step_cache(name, own), **SKIPPING[name]))
    clean = torch.ones(2, 1, 16, 4, 4)
    made = latents(own, [STORY, OTHER], conditions={1: clean}, seed=[1, 2])
    assert torch.equal(made[:, 2:3], clean)
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("name", EXACT)
def test_scene_guidance_and_step_caches_are_one_or_the_other(own, name):
    enable_step_cache(own.transformer, step_cache(name, own))
    with pytest.raises(GenerationError, match="scene guidance makes two"):
        own(STORY, scene_guidance=True, **SETTINGS)


def test_faster_cache_needs_the_negative_pass(own):
    enable_step_cache(own.transformer, step_cache("faster", own))
    with pytest.raises(GenerationError, match="needs guidance"):
        latents(own, guidance_scale=1.0)
