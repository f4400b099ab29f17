from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from inference.pipeline import Mask2DiTPipeline
from inference.sampler import denoising_timesteps
from schemas.errors import CheckpointError, GenerationError
from training.noise import initial_noise, scene_generator

STORY = ["Actor1 walks.", "Actor2 arrives.", "Both eat."]
OTHER = ["A red ball.", "A blue ball.", "Two balls."]
SMALL = {"frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}


@pytest.mark.parametrize("num_scenes", [1, 2, 3])
def test_shapes(pipeline: Mask2DiTPipeline, num_scenes: int):
    out = pipeline(STORY[:num_scenes], **SMALL)
    assert out.latents.shape == (1, num_scenes, 2, 16, 4, 4)
    assert out.frames is not None
    assert out.frames.shape == (1, num_scenes, 5, 32, 32, 3)
    assert out.frames.dtype == np.uint8


@pytest.mark.parametrize(("num_latent", "frames"), [(1, 1), (2, 5), (3, 9), (4, 13)])
def test_decoding_gives_the_frames_the_latents_stand_for(pipeline, num_latent: int, frames: int):
    latents = initial_noise([0], [0, 1], (num_latent, 16, 4, 4))
    decoded = pipeline.decode(latents)
    assert decoded.shape == (1, 2, frames, 32, 32, 3)
    # scenes are decoded on their own
    assert np.array_equal(decoded[:, 1:], pipeline.decode(latents[:, 1:]))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_one_scene_is_what_stock_cogvideox_makes(tiny_base, pipeline, scheduler, guidance: float):
    """With S = 1 nothing of ours is left, so diffusers' own pipeline must give the same latents."""
    stock = CogVideoXPipeline.from_pretrained(tiny_base)
    pipeline.set_scheduler(scheduler)
    stock.scheduler = pipeline.scheduler
    sampling = {"num_inference_steps": 3, "guidance_scale": guidance}
    size = {"height": 32, "width": 32}
    theirs = stock(
        STORY[0],
        negative_prompt="blurred",
        num_frames=5,
        latents=initial_noise([4], [0], (2, 16, 4, 4))[0],
        generator=scene_generator(4, 0, "sampler"),
        max_sequence_length=pipeline.text_tokens,
        output_type="latent",
        **size,
        **sampling,
    ).frames
    ours = pipeline(
        STORY[:1],
        negative_prompt="blurred",
        frames=5,
        seed=4,
        output_type="latent",
        **size,
        **sampling,
    ).latents
    torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_same_call_same_result_and_seed_matters(pipeline, scheduler):
    pipeline.set_scheduler(scheduler)
    first, again, other = (
        pipeline(STORY, seed=s, output_type="latent", **SMALL).latents for s in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_a_batch_is_what_its_stories_are_one_by_one(pipeline, scheduler, guidance: float):
    pipeline.set_scheduler(scheduler)
    settings = {**SMALL, "num_inference_steps": 3, "guidance_scale": guidance}
    settings["output_type"] = "latent"
    clean = initial_noise([9, 10], [0], (2, 16, 4, 4))[:, 0]
    batch = pipeline([STORY, OTHER], seed=[7, 8], conditions={0: clean}, **settings).latents
    for i, (story, seed) in enumerate([(STORY, 7), (OTHER, 8)]):
        conditions = {0: clean[i : i + 1]}
        alone = pipeline(story, seed=seed, conditions=conditions, **settings).latents
        torch.testing.assert_close(batch[i], alone[0], atol=1e-5, rtol=0)


def test_guidance_of_one_or_less_is_a_single_pass(pipeline, monkeypatch):
    sizes: list[int] = []
    forward = pipeline.transformer.forward

    def counting(*args, **kwargs):
        sizes.append(len(kwargs["hidden_states"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", counting)
    for guidance in (0.0, 1.0, 1.5):
        pipeline(STORY, guidance_scale=guidance, output_type="latent", **SMALL)
    assert sizes == [1, 1, 1, 1, 2, 2]


def test_given_scenes_come_back_untouched_and_matter(pipeline):
    clean, other = initial_noise([1, 2], [0], (2, 16, 4, 4)).unbind(0)
    free, given, changed = (
        pipeline(STORY, conditions=c, output_type="latent", **SMALL).latents
        for c in (None, {1: clean}, {1: other})
    )
    assert torch.equal(given[:, 1], clean)
    assert not torch.equal(given[:, 0], free[:, 0])
    assert not torch.equal(given[:, 2], changed[:, 2])


def test_progress_and_odd_step_counts(pipeline):
    """diffusers' trailing spacing makes 62 steps, the last at t = -1, of 61."""
    seen: list[tuple[int, int]] = []
    assert len(denoising_timesteps(pipeline.scheduler, 61, torch.device("cpu"))) == 61
    pipeline(STORY, on_step=lambda *s: seen.append(s), output_type="latent", **SMALL)
    assert seen == [(1, 2), (2, 2)]


def test_save_and_load_again(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    copy = Mask2DiTPipeline.from_pretrained(tmp_path / "copy")
    settings = {**SMALL, "output_type": "latent"}
    assert torch.equal(copy(STORY, **settings).latents, pipeline(STORY, **settings).latents)


def test_long_prompts_are_cut_with_a_warning(pipeline, caplog):
    long = "x" * 200
    assert pipeline.truncated_prompts([long, "short"]) == [long]
    with caplog.at_level("WARNING", logger="inference.pipeline"):
        assert pipeline.encode_text([[long, "short"]]).shape == (1, 2, 48, 64)
    assert "prompt cut max_tokens=48" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ("one text", {}, "prompts is one text"),
        ([], {}, "at least one"),
        ([STORY, OTHER[:2]], {}, "same number of scenes"),
        ([STORY, OTHER], {"seed": [1]}, "one seed per story"),
        (STORY, {"frames": 6}, "6 frames"),
        (STORY, {"width": 40}, "40 x 32"),
        (STORY, {"conditions": {3: torch.zeros(1, 2, 16, 4, 4)}}, "scene 3 of 3"),
        (STORY, {"conditions": {0: torch.zeros(1, 2, 16, 4, 5)}}, "does not fit the story"),
        (STORY[:1], {"conditions": {0: torch.zeros(1, 2, 16, 4, 4)}}, "every scene is given"),
    ],
)
def test_arguments_that_do_not_fit(pipeline, prompts, change, message):
    with pytest.raises(GenerationError, match=message):
        pipeline(prompts, **{**SMALL, **change})


def test_results_that_are_not_numbers_are_errors(tiny_base):
    broken = Mask2DiTPipeline.from_pretrained(tiny_base)
    with torch.no_grad():
        broken.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(GenerationError, match="not finite"):
        broken(STORY, **SMALL)


def test_a_missing_folder_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="transformer"):
        Mask2DiTPipeline.from_pretrained(tmp_path)
