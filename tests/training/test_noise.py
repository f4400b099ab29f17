from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.noise import initial_noise, scene_generator, scene_noise

SHAPE = (2, 4, 3, 3)
SEEDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)


@settings(max_examples=25)
@given(SEEDS, st.integers(0, 12), st.integers(1, 4))
def test_a_scene_has_its_noise_in_any_batch_and_window(seeds, first, num_scenes):
    scenes = range(first, first + num_scenes)
    together = initial_noise(seeds, scenes, SHAPE)
    assert together.shape == (len(seeds), num_scenes, *SHAPE)
    for b, seed in enumerate(seeds):
        for s, scene in enumerate(scenes):
            assert torch.equal(together[b, s], initial_noise([seed], [scene], SHAPE)[0, 0])


def test_seed_scene_and_purpose_all_matter():
    keys = [(0, 0, "initial"), (1, 0, "initial"), (0, 1, "initial"), (0, 0, "sampler")]
    draws = [torch.randn(8, generator=scene_generator(*k)) for k in keys]
    assert len({tuple(d.tolist()) for d in draws}) == len(keys)


def test_noise_is_standard_normal_and_scenes_are_independent():
    noise = initial_noise([3], range(2), (16, 16, 8, 8)).flatten(2)[0]
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise[0] * noise[1]).mean())) < 0.02


def test_noise_of_a_scene_depends_on_seed_and_place_alone():
    one = scene_noise(7, [3, 2, 4], (4, 6, 8)).split([3, 2, 4])
    other = scene_noise(7, [3, 5, 4], (4, 6, 8)).split([3, 5, 4])
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[2], other[2])
    assert not torch.equal(one[0], scene_noise(8, [3], (4, 6, 8)))
    assert not torch.equal(one[0][:2], one[1])
    many = scene_noise(0, [50, 50], (4, 6, 8))
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
