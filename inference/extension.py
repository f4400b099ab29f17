"""Auto-regressive extension: more scenes for a story, each conditioned on the clean last ones.

Source: the Mask2DiT paper (arXiv 2503.19881), section 3.4. The official code re-reads mp4 files of
the first two scenes and adds a little noise; here the last scenes' latents are carried over as they
are. Shapes: B stories, S scenes, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.pipeline import Mask2DiTPipeline, OnStep
from schemas.errors import GenerationError


def extend_stories(
    pipeline: Mask2DiTPipeline,
    latents: Tensor,
    prompts: Sequence[Sequence[str]],
    extend_prompts: Sequence[Sequence[str]],
    *,
    seeds: Sequence[int],
    context_scenes: int = 2,
    negative_prompt: str = "",
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate one more scene for every extend prompt, in order.

    Args:
        pipeline: The loaded pipeline.
        latents: Scenes so far, (B, S, F, C, H, W), as the pipeline returns them.
        prompts: Their prompts, S for each of B stories.
        extend_prompts: Prompts of the scenes to add, E for each story.
        seeds: One seed per story.
        context_scenes: How many of the last scenes condition the next one (fewer while there are
            fewer).
        negative_prompt: What guidance leads away from.
        num_inference_steps: Denoising steps per added scene.
        guidance_scale: Classifier-free guidance; 1 or less switches it off.
        on_step: Progress callback; it starts again with every added scene.

    Returns:
        All scenes, (B, S + E, F, C, H, W); the first S are the given ones, bit for bit.

    Raises:
        GenerationError: The lists do not fit the latents.
    """
    num_stories, num_scenes, num_latent = latents.shape[:3]
    fits = len(prompts) == len(extend_prompts) == num_stories
    fits = fits and all(len(p) == num_scenes for p in prompts)
    if not fits or len({len(e) for e in extend_prompts}) != 1:
        raise GenerationError(
            "prompts do not fit the scenes to extend",
            found=f"{[len(p) for p in prompts]} prompts, {[len(e) for e in extend_prompts]} to add",
            expected=f"{num_stories} stories of {num_scenes} prompts, equally many to add",
        )
    texts = [list(story) for story in prompts]
    frames = 1 + pipeline.time_compression * (num_latent - 1)
    height, width = (n * pipeline.space_compression for n in latents.shape[-2:])
    for added in zip(*extend_prompts, strict=True):
        context = min(context_scenes, latents.shape[1])
        first = latents.shape[1] - context
        for story, text in zip(texts, added, strict=True):
            story.append(text)
        window = pipeline(
            [story[first:] for story in texts],
            frames=frames,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seeds,
            conditions={i: latents[:, first + i] for i in range(context)},
            first_scene=first,
            output_type="latent",
            on_step=on_step,
        ).latents
        latents = torch.cat([latents, window[:, -1:]], dim=1)
    return latents
