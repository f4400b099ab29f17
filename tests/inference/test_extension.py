from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference.extension import generate_scenes
from inference.pipeline import Mask2DiTPipeline
from inference.story import Story
from schemas.config import SamplingConfig
from schemas.errors import GenerationError

SIZE = {"height": 32, "width": 32}
WORDS = ("One.", "Two.", "Three.", "Four.", "Five.")


def story(
    scenes: int, together: int, seed: int = 1, frames: tuple[int, ...] = (), **sampling: object
) -> Story:
    """A story of scenes of 5 frames, or of so many."""
    settings = {"steps": 2, "guidance": 2.0, "context_scenes": 2, **sampling}
    return Story(
        prompt_id=f"story-{seed}",
        prompts=tuple(f"{WORDS[i % 5]} {seed}" for i in range(scenes)),
        negative_prompts=tuple(f"not {i}" for i in range(scenes)),
        seeds=tuple(seed + i for i in range(scenes)),
        frames=frames or (5,) * scenes,
        given=("",) * scenes,
        together=together,
        sampling=SamplingConfig.model_validate(settings),
    )


def scenes_of(pipeline: Mask2DiTPipeline, *stories: Story, **options) -> list[Tensor]:
    made = list(generate_scenes(pipeline, stories, **SIZE, **options))
    assert [index for index, _ in made] == list(range(len(stories[0].prompts)))
    return [latents for _, latents in made]


def of_first(scenes: list[Tensor], *places: int) -> list[dict[int, Tensor]]:
    """Some scenes of the first story, to give them to another one."""
    return [{place: scenes[place][0] for place in places}]


@pytest.fixture
def causal(tiny_base) -> Mask2DiTPipeline:
    made = Mask2DiTPipeline.from_pretrained(tiny_base)
    made.transformer.register_to_config(mask="scene_causal")
    return made


def test_a_story_of_scenes_of_unequal_length_alone_and_in_a_batch(pipeline):
    stories = [story(5, 3, seed, frames=(5, 9, 1, 13, 5)) for seed in (1, 20)]
    both = scenes_of(pipeline, *stories)
    assert [latents.shape for latents in both] == [(2, n, 16, 4, 4) for n in (2, 3, 1, 4, 2)]
    for row, one in enumerate(stories):
        for found, alone in zip(both, scenes_of(pipeline, one), strict=True):
            torch.testing.assert_close(found[row], alone[0], atol=1e-5, rtol=0)


def test_extension_is_regeneration_of_the_last_scene_with_the_first_ones_given(pipeline):
    longer = scenes_of(pipeline, story(3, 2))
    again = scenes_of(pipeline, story(3, 3), given=of_first(longer, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(longer, again, strict=True))


@pytest.mark.parametrize("places", [(0, 1), (0, 2), (1, 2), (1,), (0,)], ids=str)
def test_any_scenes_may_be_given(pipeline, places):
    """The next scene, a middle one, the first one, or several: as the pipeline makes them."""
    other = scenes_of(pipeline, story(3, 3, 7))
    found = scenes_of(pipeline, story(3, 3), given=of_first(other, *places))
    one = story(3, 3)
    by_hand = pipeline(
        one.prompts,
        negative_prompt=one.negative_prompts,
        seed=[one.seeds],
        frames=5,
        num_inference_steps=2,
        guidance_scale=2.0,
        conditions={place: other[place] for place in places},
        output_type="latent",
        **SIZE,
    ).latents
    for place in range(3):
        assert torch.equal(found[place], by_hand[place])
        assert torch.equal(found[place], other[place]) == (place in places)


@pytest.mark.parametrize(("context", "first_seen"), [(1, 2), (2, 1), (15, 0)])
def test_only_the_last_scenes_condition(pipeline, context: int, first_seen: int):
    one = story(4, 3, context_scenes=context)
    first = scenes_of(pipeline, story(3, 3))
    fourth = scenes_of(pipeline, one, given=of_first(first, 0, 1, 2))[3]
    for place in range(3):
        changed = [latents.clone() for latents in first]
        changed[place] += 1
        found = scenes_of(pipeline, one, given=of_first(changed, 0, 1, 2))[3]
        assert torch.equal(found, fourth) == (place < first_seen)


def test_an_added_scene_has_the_noise_of_its_place_in_the_story(pipeline):
    one = story(4, 3, frames=(5, 5, 9, 1))
    made = scenes_of(pipeline, one)

    def by_hand(first_scene: int) -> Tensor:
        return pipeline(
            one.prompts[1:],
            negative_prompt=one.negative_prompts[1:],
            seed=[one.seeds[1:]],
            conditions={0: made[1], 1: made[2]},
            first_scene=first_scene,
            frames=one.frames[1:],
            num_inference_steps=2,
            guidance_scale=2.0,
            output_type="latent",
            **SIZE,
        ).latents[2]

    assert torch.equal(made[3], by_hand(1))
    assert not torch.allclose(made[3], by_hand(0), atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [{"scheduler": "dpm"}, {"dynamic_guidance": True}, {"guidance_rescale": 0.7}],
    ids=str,
)
def test_settings_of_the_story_reach_the_pipeline(pipeline, settings):
    plain, changed = (scenes_of(pipeline, story(2, 1, steps=3, **s)) for s in ({}, settings))
    assert not any(torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_noise_on_conditions_is_what_the_story_asks_for(pipeline):
    plain, noisy = (scenes_of(pipeline, story(2, 1, condition_noise=c)) for c in (False, True))
    assert torch.equal(plain[0], noisy[0])
    assert not torch.equal(plain[1], noisy[1])


def test_texts_that_are_encoded_before_are_the_same(pipeline, monkeypatch):
    one = story(4, 2)
    texts = dict(zip(one.texts, pipeline.encode_text(one.texts), strict=True))
    expected = scenes_of(pipeline, one)
    monkeypatch.setattr(pipeline, "encode_text", None)
    found = scenes_of(pipeline, one, texts=texts)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert scenes_of(pipeline, story(2, 2, guidance=1.0), texts=texts)


@pytest.mark.parametrize(("given", "passes"), [((), 3), ((0, 1), 2)])
def test_progress_counts_over_the_whole_story(pipeline, given, passes):
    first = scenes_of(pipeline, story(2, 2))
    seen: list[tuple[int, int]] = []
    known = of_first(first, *given) if given else ()
    scenes_of(pipeline, story(4, 2), given=known, on_step=lambda *step: seen.append(step))
    assert seen == [(i + 1, 2 * passes) for i in range(2 * passes)]


def test_memory_does_not_grow_with_the_story(pipeline):
    """Forty scenes are added; no more than the context is kept, and that without the window."""
    size, alive, most = 2 * 16 * 4 * 4 * 4, weakref.WeakSet[Tensor](), 0
    in_memory: list[int] = []

    def count(done: int, _: int) -> None:
        if done in (5, 41):
            gc.collect()
            tensors = (thing for thing in gc.get_objects() if type(thing) is Tensor)
            in_memory.append(sum(tensor.nbytes in (size, 3 * size) for tensor in tensors))

    one = story(43, 3, steps=1, guidance=1.0)
    for _, latents in generate_scenes(pipeline, [one], on_step=count, **SIZE):
        assert latents.untyped_storage().nbytes() == size
        alive.add(latents)
        most = max(most, len(alive))
    assert most == one.sampling.context_scenes
    assert in_memory[0] == in_memory[1]


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_with_and_without_kept_keys(causal, guidance, rotary, noisy):
    """A window that grows and slides, of unequal lengths, in a batch."""
    causal.transformer.register_to_config(use_rotary_positional_embeddings=rotary)
    stories = [
        story(5, 1, seed, (5, 9, 1, 5, 9), guidance=guidance, condition_noise=noisy)
        for seed in (1, 20)
    ]
    tokens: dict[bool, int] = {}
    found: dict[bool, list[Tensor]] = {}
    for kept in (False, True):
        seen: list[int] = []
        hook = causal.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda _, arguments, seen=seen: seen.append(arguments[0].shape[1])
        )
        found[kept] = scenes_of(causal, *stories, kv_cache=kept)
        hook.remove()
        tokens[kept] = sum(seen)
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert tokens[True] < tokens[False]


def test_given_scenes_with_kept_keys(causal):
    other = scenes_of(causal, story(4, 4, 7))
    for places in ((0,), (0, 1), (0, 2), (1, 3)):
        given = of_first(other, *places)
        found, plain = (
            scenes_of(causal, story(5, 4), given=given, kv_cache=kept) for kept in (True, False)
        )
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_other_masks_run_without_kept_keys(pipeline, caplog):
    with caplog.at_level("DEBUG", logger="inference.extension"):
        with_cache, without = (scenes_of(pipeline, story(2, 1), kv_cache=k) for k in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_cache, without, strict=True))
    assert "scene cache=False" in caplog.text


def test_an_interrupted_scene_is_not_handed_over(pipeline):
    def stop(done: int, _: int) -> None:
        pipeline._interrupt = done == 3

    made = generate_scenes(pipeline, [story(3, 1)], on_step=stop, **SIZE)
    assert next(made)[0] == 0
    with pytest.raises(GenerationError, match=r"scenes 0 to 1"):
        next(made)


def test_what_does_not_fit(pipeline):
    one, scene = story(3, 2), torch.zeros(2, 16, 4, 4)

    def refused(message: str, *stories: Story, given=()):
        with pytest.raises(GenerationError, match=message):
            next(generate_scenes(pipeline, stories, given=given, **SIZE))

    refused("one shape", one, story(3, 3))
    refused("one shape")
    refused("below 2", one, given=[{2: scene}])
    refused("for each of 1 stories", one, given=[{0: scene}] * 2)
    refused("the same scenes", one, story(3, 2, 5), given=[{0: scene}, {1: scene}])
    named = replace(one, given=("a.mp4", "", ""))
    refused(r"\[0\] among them", named)
    refused(r"\[0\] among them", named, given=[{1: scene}])
    refused("every scene is given", story(1, 1), given=[{0: scene}])
    refused("does not fit the story", one, given=[{0: scene[:1]}])
