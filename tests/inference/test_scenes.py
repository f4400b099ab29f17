from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.sampler import make_scheduler
from inference.scenes import NoisyScenes
from training.base_model import SCHEDULER

SEEDS = st.lists(
    st.lists(st.integers(0, 2**63 - 1), min_size=3, max_size=3), min_size=1, max_size=4
)
FRAMES = st.lists(st.integers(1, 4), min_size=3, max_size=3)


def noisy(seeds, frames, first: int, given_scenes=(), noise: bool = True) -> NoisyScenes:
    shapes = [(n, 4, 3, 3) for n in frames]
    clean = {i: torch.ones(len(seeds), *shapes[i]) for i in given_scenes}
    return NoisyScenes(
        make_scheduler("ddim", SCHEDULER),
        shapes,
        seeds,
        first,
        clean,
        condition_noise=noise,
        device=torch.device("cpu"),
    )


@settings(max_examples=25, deadline=None)
@given(SEEDS, FRAMES, st.integers(0, 12), st.sets(st.integers(0, 2), max_size=2))
def test_a_scene_has_its_noise_in_any_batch_and_window(seeds, frames, first, given_scenes):
    together = noisy(seeds, frames, first, given_scenes).latents
    for b, row in enumerate(seeds):
        for s in range(3):
            here = [0] if s in given_scenes else []
            alone = noisy([[row[s]]], [frames[s]], first + s, here).latents[0]
            assert torch.equal(together[s][b], alone[0])


def test_given_scenes_are_kept_and_marked():
    scenes = noisy([[1, 2, 3]], [1, 2, 3], 0, [1])
    assert scenes.generated.tolist() == [[True, False, True]]
    assert noisy([[1, 2, 3]], [1, 2, 3], 0).generated is None
    assert [x.shape[1] for x in scenes.split(scenes.joined)] == [1, 2, 3]
    assert not torch.equal(scenes.latents[1], torch.ones(1, 2, 4, 3, 3))
    assert torch.equal(scenes.finished()[1], torch.ones(1, 2, 4, 3, 3))
    clean = noisy([[1, 2, 3]], [1, 2, 3], 0, [1], noise=False)
    assert torch.equal(clean.latents[1], torch.ones(1, 2, 4, 3, 3))
