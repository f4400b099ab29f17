from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from inference.guidance import dynamic_guidance, guide

NEGATIVE, POSITIVE = torch.randn(2, 3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def test_guidance_goes_beyond_the_prompt():
    torch.testing.assert_close(guide(NEGATIVE, POSITIVE, 1.0), POSITIVE)
    torch.testing.assert_close(guide(NEGATIVE, POSITIVE, 0.0), NEGATIVE)
    torch.testing.assert_close(guide(NEGATIVE, POSITIVE, 6.0), 6 * POSITIVE - 5 * NEGATIVE)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(rescale):
    guided = guide(NEGATIVE, POSITIVE, 6.0)
    expected = rescale_noise_cfg(guided, POSITIVE, rescale)
    torch.testing.assert_close(guide(NEGATIVE, POSITIVE, 6.0, rescale), expected)


def test_rescaling_fully_keeps_the_standard_deviation():
    rescaled = guide(NEGATIVE, POSITIVE, 6.0, 1.0)
    torch.testing.assert_close(rescaled.flatten(1).std(1), POSITIVE.flatten(1).std(1))


def test_dynamic_guidance_is_a_wave_that_ends_by_growing():
    scales = [dynamic_guidance(6.0, t, 50) for t in range(999, -1, -20)]
    assert all(1 <= scale <= 7 for scale in scales)
    changes = [b - a for a, b in pairwise(scales)]
    assert min(changes) < -3 < 3 < max(changes)
    assert dynamic_guidance(6.0, 50, 50) == 1
    assert dynamic_guidance(6.0, 0, 50) == 7
