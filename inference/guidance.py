"""Classifier-free guidance: how far a prediction is led from the negative prompt to the prompt.

Shapes: B stories, F latent frames of a scene, C channels, H W latent height and width.
"""

from __future__ import annotations

import math

from torch import Tensor


def dynamic_guidance(scale: float, t: int, num_steps: int) -> float:
    """CogVideoX's dynamic guidance at timestep ``t``: a wave between 1 and 1 + ``scale``.

    Source: diffusers' CogVideoXPipeline and CogVideoX's own sampler. Both measure ``t`` (0 to 999)
    in units of the number of steps, so the scale swings from step to step in place of growing; the
    authors found that by accident and kept it (zai-org/CogVideo issue 267). Only from t =
    ``num_steps`` on does it grow, from 1.
    """
    progress = (num_steps - t) / num_steps
    return 1 + scale * (1 - math.cos(math.pi * progress**5.0)) / 2


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """The guided prediction of one scene.

    Args:
        negative: Prediction for the negative prompt, (B, F, C, H, W).
        positive: Prediction for the prompt.
        scale: Guidance; 1 gives ``positive``.
        rescale: Share of the result that is scaled to the standard deviation of ``positive``, story
            by story. Source: arXiv 2305.08891, section 3.4.
    """
    guided = negative + scale * (positive - negative)
    if rescale == 0:
        return guided
    wanted, found = (x.flatten(1).std(1)[:, None, None, None, None] for x in (positive, guided))
    return rescale * (guided * (wanted / found)) + (1 - rescale) * guided
