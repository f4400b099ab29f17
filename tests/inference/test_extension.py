from __future__ import annotations

import pytest
import torch

from inference.extension import extend_stories
from schemas.errors import GenerationError

STORY = ["One.", "Two.", "Three."]
OTHER = ["Ein.", "Zwei.", "Drei."]
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture
def latents(pipeline):
    size = {"frames": 5, "height": 32, "width": 32}
    return pipeline([STORY, OTHER], seed=[1, 2], output_type="latent", **size, **SAMPLING).latents


def test_given_scenes_stay_and_one_scene_is_added_per_prompt(pipeline, latents):
    extra = [["Four.", "Five."], ["Vier.", "Funf."]]
    longer = extend_stories(pipeline, latents, [STORY, OTHER], extra, seeds=[1, 2], **SAMPLING)
    assert longer.shape == (2, 5, *latents.shape[2:])
    assert torch.equal(longer[:, :3], latents)
    # one scene at a time is the same as two at once
    four = extend_stories(
        pipeline, latents, [STORY, OTHER], [e[:1] for e in extra], seeds=[1, 2], **SAMPLING
    )
    assert torch.equal(longer[:, :4], four)
    # and one story alone is the same as in a batch
    alone = extend_stories(pipeline, latents[1:], [OTHER], extra[1:], seeds=[2], **SAMPLING)
    torch.testing.assert_close(longer[1:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("context", "first_seen"), [(1, 2), (2, 1), (15, 0)])
def test_only_the_last_scenes_condition(pipeline, latents, context: int, first_seen: int):
    def fourth(scenes):
        return extend_stories(
            pipeline, scenes, [STORY], [["Four."]], seeds=[1], context_scenes=context, **SAMPLING
        )[:, 3]

    one = latents[:1]
    for scene in range(3):
        changed = one.clone()
        changed[:, scene] += 1
        assert torch.equal(fourth(one), fourth(changed)) == (scene < first_seen)


def test_an_added_scene_has_the_noise_of_its_place_in_the_story(pipeline, latents):
    one = latents[:1]
    fourth = extend_stories(pipeline, one, [STORY], [["Four."]], seeds=[1], **SAMPLING)[:, 3]

    def by_hand(first_scene: int):
        return pipeline(
            [*STORY[1:], "Four."],
            seed=1,
            conditions={0: one[:, 1], 1: one[:, 2]},
            first_scene=first_scene,
            output_type="latent",
            frames=5,
            height=32,
            width=32,
            **SAMPLING,
        ).latents[:, 2]

    assert torch.equal(fourth, by_hand(1))
    assert not torch.allclose(fourth, by_hand(0), atol=1e-2)


def test_prompts_must_fit_the_scenes(pipeline, latents):
    with pytest.raises(GenerationError, match="do not fit the scenes"):
        extend_stories(pipeline, latents, [STORY], [["Four."]], seeds=[1], **SAMPLING)
    with pytest.raises(GenerationError, match="do not fit the scenes"):
        extend_stories(pipeline, latents, [STORY, OTHER], [["Four."], []], seeds=[1, 2], **SAMPLING)
