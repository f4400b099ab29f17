from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.callbacks import PipelineCallback

from inference.pipeline import Mask2DiTPipeline
from schemas.errors import CheckpointError, ConfigError, GenerationError
from training.latents import encode_frames
from training.noise import scene_generator
from training.transformer import Mask2DiTTransformer3DModel
from training.weights import load_transformer

STORY = ["Actor1 walks.", "Actor2 arrives.", "Both eat."]
OTHER = ["A red ball.", "A blue ball.", "Two balls."]
SIZE = {"height": 32, "width": 32}
SMALL = {"frames": 5, "num_inference_steps": 2, **SIZE}
LATENT = {**SMALL, "output_type": "latent"}


def noise(seed: int, scene: int, frames: int = 2, purpose: str = "initial") -> torch.Tensor:
    return torch.randn(frames, 16, 4, 4, generator=scene_generator(seed, scene, purpose))


class Spy:
    """A denoiser that keeps what it is given and predicts nothing."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, **arguments):
        self.calls.append(arguments)
        return torch.zeros_like(arguments["hidden_states"])


@pytest.mark.parametrize("frames", [5, (1, 5, 9)])
def test_shapes(pipeline: Mask2DiTPipeline, frames):
    out = pipeline(STORY, **{**SMALL, "frames": frames})
    lengths = [5] * 3 if frames == 5 else frames
    assert [x.shape for x in out.latents] == [(1, (n + 3) // 4, 16, 4, 4) for n in lengths]
    assert [x.shape for x in out.frames] == [(1, n, 32, 32, 3) for n in lengths]
    assert all(x.dtype == np.uint8 for x in out.frames)


@pytest.mark.parametrize(("num_latent", "frames"), [(1, 1), (2, 5), (3, 9), (4, 13)])
def test_decoding_gives_the_frames_the_latents_stand_for(pipeline, num_latent: int, frames: int):
    latents = torch.stack([noise(seed, 0, num_latent) for seed in (0, 1)])
    decoded = pipeline.decode_scene(latents)
    assert decoded.shape == (2, frames, 32, 32, 3)
    alone = pipeline.decode_scene(latents[1:])
    assert np.abs(decoded[1:].astype(int) - alone).max() <= 1


def stock_latents(folder, scheduler, frames: int, transformer=None, **settings):
    """What diffusers' own pipeline makes of the same weights, noise and scheduler."""
    changed = {} if transformer is None else {"transformer": transformer}
    stock = CogVideoXPipeline.from_pretrained(folder, **changed)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = scheduler
    return stock(
        STORY[0],
        negative_prompt="blurred",
        num_frames=frames,
        latents=noise(4, 0, (frames + 3) // 4)[None],
        generator=scene_generator(4, 0, "sampler"),
        max_sequence_length=48,
        output_type="latent",
        **SIZE,
        **settings,
    ).frames


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 6.0},
        {"guidance_scale": 6.0, "use_dynamic_cfg": True},
        {"guidance_scale": 6.0, "num_inference_steps": 6},
    ],
    ids=str,
)
def test_one_scene_is_what_stock_cogvideox_makes(tiny_base, pipeline, scheduler, settings):
    """With S = 1 nothing of ours is left, so diffusers' own pipeline must give the same latents."""
    settings = {"num_inference_steps": 3, **settings}
    pipeline.set_scheduler(scheduler)
    theirs = stock_latents(tiny_base, pipeline.scheduler, 5, **settings)
    ours = pipeline(STORY[:1], negative_prompt="blurred", seed=4, **{**LATENT, **settings}).latents
    torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def cogvideox15(pipeline) -> Mask2DiTPipeline:
    """The tiny model with a transformer as of CogVideoX 1.5."""
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "patch_size_t": 2, "patch_bias": False}
    transformer = Mask2DiTTransformer3DModel.from_config(config).eval()
    return Mask2DiTPipeline(**{**pipeline.components, "transformer": transformer})


def test_one_scene_is_what_stock_cogvideox_15_makes(tiny_base, cogvideox15):
    ours = cogvideox15.transformer
    theirs = CogVideoXTransformer3DModel.from_config(dict(ours.config)).eval()
    theirs.load_state_dict(ours.state_dict())
    settings = {"num_inference_steps": 3, "guidance_scale": 6.0}
    expected = stock_latents(tiny_base, cogvideox15.scheduler, 5, theirs, **settings)
    made = cogvideox15(STORY[:1], negative_prompt="blurred", seed=4, **{**LATENT, **settings})
    torch.testing.assert_close(made.latents[0], expected, atol=1e-5, rtol=1e-5)


def test_cogvideox_15_takes_pairs_of_latent_frames(cogvideox15):
    assert cogvideox15(STORY, **{**LATENT, "frames": [5, 13, 5]}).latents[1].shape[1] == 4
    with pytest.raises(ConfigError, match="multiple of 2"):
        cogvideox15(STORY, **{**LATENT, "frames": [5, 9, 5]})


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_same_call_same_result_and_seed_matters(pipeline, scheduler):
    pipeline.set_scheduler(scheduler)
    first, again, other = (
        torch.cat(pipeline(STORY, seed=s, **LATENT).latents, 1) for s in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 6.0, "use_dynamic_cfg": True, "guidance_rescale": 0.7},
    ],
    ids=str,
)
def test_a_batch_of_four_is_what_its_stories_are_one_by_one(pipeline, scheduler, guidance):
    pipeline.set_scheduler(scheduler)
    stories = [STORY, OTHER, STORY[::-1], OTHER[::-1]]
    seeds = [[7, 8, 9], [8, 8, 1], [0, 0, 0], [2**40, 5, 6]]
    negatives = [["blurred", "dark", ""]] * 2 + [["", "a", "b"]] * 2
    settings = {**LATENT, "num_inference_steps": 3, "frames": [1, 9, 5], **guidance}
    clean = torch.stack([noise(seed, 0, 1) for seed in range(4)])
    batch = pipeline(
        stories, seed=seeds, negative_prompt=negatives, conditions={0: clean}, **settings
    ).latents
    for i, story in enumerate(stories):
        alone = pipeline(
            story,
            seed=[seeds[i]],
            negative_prompt=negatives[i],
            conditions={0: clean[i : i + 1]},
            **settings,
        ).latents
        for ours, theirs in zip(batch, alone, strict=True):
            torch.testing.assert_close(ours[i], theirs[0], atol=1e-5, rtol=0)


def test_guidance_of_one_or_less_is_a_single_pass(pipeline):
    spy = Spy()
    for guidance in (0.0, 1.0, 1.5):
        pipeline(STORY, guidance_scale=guidance, denoiser=spy, **LATENT)
    assert [len(call["hidden_states"]) for call in spy.calls] == [1, 1, 1, 1, 2, 2]


def test_every_scene_has_its_own_noise_text_and_negative(pipeline):
    spy = Spy()
    pipeline(
        [STORY, OTHER],
        seed=[[1, 2, 3], [4, 5, 6]],
        negative_prompt=["dark", "", "blurred"],
        first_scene=7,
        denoiser=spy,
        **{**LATENT, "frames": [5, 1, 9]},
    )
    first = spy.calls[0]
    assert first["scene_frames"] == [2, 1, 3]
    assert "generated" not in first
    expected = torch.cat([noise(4, 7, 2), noise(5, 8, 1), noise(6, 9, 3)])
    assert torch.equal(first["hidden_states"][1], expected)
    assert torch.equal(first["hidden_states"][3], expected)  # both passes see the same noise
    texts = first["encoder_hidden_states"]
    torch.testing.assert_close(texts[0], pipeline.encode_text(["dark", "", "blurred"]))
    torch.testing.assert_close(texts[3], pipeline.encode_text(OTHER))


def test_encoded_texts_are_used_in_place_of_texts(pipeline):
    embeds = pipeline.encode_text([*STORY, *OTHER]).unflatten(0, (2, 3))
    negative = pipeline.encode_text(["dark"]).expand(6, -1, -1).unflatten(0, (2, 3))
    expected = pipeline([STORY, OTHER], negative_prompt="dark", **LATENT).latents
    bare = Mask2DiTPipeline(**{**pipeline.components, "text_encoder": None})
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    made = bare([STORY, OTHER], **given, **LATENT).latents
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    with pytest.raises(GenerationError, match="no text encoder"):
        bare([STORY, OTHER], prompt_embeds=embeds, **LATENT)
    with pytest.raises(GenerationError, match="prompt_embeds do not fit"):
        bare(STORY, **given, **LATENT)


@pytest.mark.parametrize("given", [{}, {1: noise(1, 0)[None]}], ids=["none given", "one given"])
def test_scene_guidance_leads_away_from_scenes_that_see_no_other(tiny_base, pipeline, given):
    """By hand: the negative pass is that of a model with mask v1, over all scenes at once."""
    alone = load_transformer(tiny_base, mask="v1")
    scenes = {**LATENT, "frames": [5, 5, 9], "conditions": given, "guidance_scale": 3.0}
    negative = pipeline.encode_text([""] * 3)[None]

    def by_hand(encoder_hidden_states, **rest):
        away = alone(encoder_hidden_states=negative, **rest)
        towards = pipeline.transformer(encoder_hidden_states=encoder_hidden_states, **rest)
        return away + 3 * (towards - away)

    expected = pipeline(STORY, **{**scenes, "guidance_scale": 1.0}, denoiser=by_hand).latents
    found = pipeline(STORY, scene_guidance=True, **scenes).latents
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    plain = pipeline(STORY, **scenes).latents
    assert not torch.allclose(found[0], plain[0], atol=1e-2)


@pytest.mark.parametrize(("scenes", "guidance"), [(3, 1.0), (1, 6.0)])
def test_scene_guidance_without_guidance_or_other_scenes_is_nothing(pipeline, scenes, guidance):
    settings = {**LATENT, "guidance_scale": guidance}
    found = pipeline(STORY[:scenes], scene_guidance=True, **settings).latents
    plain = pipeline(STORY[:scenes], **settings).latents
    torch.testing.assert_close(found, plain, atol=0, rtol=0)


def test_loading_without_the_text_encoder(tiny_base, pipeline):
    bare = Mask2DiTPipeline.from_pretrained(tiny_base, text_encoder=False)
    assert bare.text_encoder is None
    embeds = pipeline.encode_text(STORY)[None]
    made = bare(STORY, prompt_embeds=embeds, guidance_scale=1, **LATENT)
    expected = pipeline(STORY, guidance_scale=1, **LATENT)
    torch.testing.assert_close(made.latents, expected.latents, atol=1e-5, rtol=0)


def test_given_scenes_come_back_untouched_and_matter(pipeline):
    clean, other = noise(1, 0)[None], noise(2, 0)[None]
    free, given, changed = (
        pipeline(STORY, conditions=c, **LATENT).latents for c in (None, {1: clean}, {1: other})
    )
    assert torch.equal(given[1], clean)
    assert not torch.equal(given[0], free[0])
    assert not torch.equal(given[2], changed[2])


def test_conditions_are_clean_or_get_the_first_level_of_noise(pipeline):
    clean, spy = torch.ones(1, 2, 16, 4, 4), Spy()
    for noisy in (False, True):
        settings = {"condition_noise": noisy, "conditions": {1: clean}, "seed": 3}
        out = pipeline(STORY, first_scene=4, denoiser=spy, **settings, **LATENT)
        assert torch.equal(out.latents[1], clean)
    shown = [call["hidden_states"][0, 2:4] for call in spy.calls]
    assert torch.equal(shown[0], clean[0])
    sigma = 0.00085**0.5  # 0.0292, the noise of CogVideoX-5B at t = 0
    expected = (1 - sigma**2) ** 0.5 + sigma * noise(3, 5, purpose="condition")
    torch.testing.assert_close(shown[2], expected)
    assert torch.equal(shown[2], shown[3])  # the same at every step
    assert spy.calls[2]["generated"].tolist() == [[True, False, True]] * 2


def test_callbacks_see_and_change_latents_and_can_stop(pipeline):
    seen: list[tuple] = []

    def zero(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors), tensors["latents"].shape))
        assert pipe.guidance_scale == 6
        assert int(pipe.current_timestep) == int(timestep)
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    settings = {**LATENT, "num_inference_steps": 4, "frames": [5, 1, 5]}
    inputs = ["latents", "prompt_embeds"]
    out = pipeline(
        STORY,
        callback_on_step_end=zero,
        callback_on_step_end_tensor_inputs=inputs,
        **settings,
    )
    assert seen == [
        (0, 999, sorted(inputs), (1, 5, 16, 4, 4)),
        (1, 749, sorted(inputs), seen[0][3]),
    ]
    assert all(not x.any() for x in out.latents)
    assert pipeline.num_timesteps == 4
    with pytest.raises(GenerationError, match="velocity"):
        pipeline(STORY, callback_on_step_end_tensor_inputs=["velocity"], **settings)


def test_a_callback_of_diffusers_can_switch_guidance_off(pipeline):
    class Cutoff(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == 0:
                pipeline._guidance_scale = 0.0
            return callback_kwargs

    spy = Spy()
    cutoff = Cutoff(cutoff_step_ratio=None, cutoff_step_index=0)
    pipeline(STORY, callback_on_step_end=cutoff, denoiser=spy, **LATENT)
    assert [len(call["hidden_states"]) for call in spy.calls] == [2, 1]


def test_progress_bar_is_that_of_diffusers(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False)
    pipeline(STORY, denoiser=Spy(), **LATENT)
    pipeline.set_progress_bar_config(disable=True)
    assert "2/2" in capsys.readouterr().err


def test_save_and_load_again(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    copy = Mask2DiTPipeline.from_pretrained(tmp_path / "copy")
    made, expected = copy(STORY, **LATENT).latents, pipeline(STORY, **LATENT).latents
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_long_prompts_are_cut_with_a_warning(pipeline, caplog):
    long = "x" * 200
    assert pipeline.truncated_prompts([long, "short"]) == [long]
    with caplog.at_level("WARNING", logger="inference.pipeline"):
        assert pipeline.encode_text([long, "short"]).shape == (2, 48, 64)
    assert "prompt cut max_tokens=48" in caplog.text


def test_videos_are_encoded_as_training_sees_them(pipeline):
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    latents = pipeline.encode_video(frames)
    mean, _ = encode_frames(pipeline.vae, frames)
    assert latents.shape == (3, 16, 4, 4)
    assert torch.equal(latents, mean * pipeline.vae.config.scaling_factor)


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ("one text", {}, "prompts is one text"),
        ([], {}, "at least one"),
        ([STORY, OTHER[:2]], {}, "same number of scenes"),
        ([STORY, OTHER], {"seed": [1]}, "number of seeds"),
        (STORY, {"seed": [[1, 2]]}, "number of seeds"),
        (STORY, {"negative_prompt": ["a", "b"]}, "number of negative prompts"),
        (STORY, {"frames": 6}, "6, 6, 6 frames"),
        (STORY, {"frames": [5, 5]}, "one number of frames per scene"),
        (STORY, {"frames": [5, 6, 5]}, "5, 6, 5 frames"),
        (STORY, {"width": 40}, "40 x 32"),
        (STORY, {"output_type": "gif"}, "unknown output_type"),
        (STORY, {"conditions": {3: torch.zeros(1, 2, 16, 4, 4)}}, "scene 3 of 3"),
        (STORY, {"conditions": {0: torch.zeros(1, 2, 16, 4, 5)}}, "does not fit the story"),
        (STORY[:1], {"conditions": {0: torch.zeros(1, 2, 16, 4, 4)}}, "every scene is given"),
    ],
)
def test_arguments_that_do_not_fit(pipeline, prompts, change, message):
    with pytest.raises(GenerationError, match=message):
        pipeline(prompts, **{**SMALL, **change})


def test_results_that_are_not_numbers_are_errors(pipeline):
    def broken(**arguments):
        return torch.full_like(arguments["hidden_states"], float("nan"))

    with pytest.raises(GenerationError, match="not finite"):
        pipeline(STORY, denoiser=broken, **SMALL)


def test_a_missing_folder_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="transformer"):
        Mask2DiTPipeline.from_pretrained(tmp_path)
