from __future__ import annotations

import torch

from training.noise import scene_generator, scene_noise


def test_seed_scene_and_purpose_all_matter():
    keys = [(0, 0, "initial"), (1, 0, "initial"), (0, 1, "initial"), (0, 0, "sampler")]
    draws = [torch.randn(8, generator=scene_generator(*k)) for k in keys]
    assert len({tuple(d.tolist()) for d in draws}) == len(keys)


def test_noise_of_a_scene_depends_on_seed_and_place_alone():
    one = scene_noise(7, [3, 2, 4], (4, 6, 8)).split([3, 2, 4])
    other = scene_noise(7, [3, 5, 4], (4, 6, 8)).split([3, 5, 4])
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[2], other[2])
    assert not torch.equal(one[0], scene_noise(8, [3], (4, 6, 8)))
    assert not torch.equal(one[0][:2], one[1])
    many = scene_noise(0, [50, 50], (4, 6, 8))
    first, second = many.split(50)
    assert abs((first * second).mean()) < 0.02
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
