"""Stories of any length: some scenes in one pass, then one at a time behind the clean last ones.

Scenes are carried over as latents, bit for bit; nothing is decoded and encoded again. No more than
the last ``context_scenes`` are kept, so memory does not grow with the story.

Each pass sees a window of scenes whose positions in time start at 0, so the model never meets a
position beyond those it was trained at. Noise is drawn by a scene's place in the story, so it does
not depend on the window.

Source: the Mask2DiT paper (arXiv 2503.19881), section 3.4. The official code takes the first two
scenes as conditions and reads them from mp4 files; here they are the last ones, as latents.

Legend: B stories, S scenes, F latent frames of a scene, C channels, H W latent height and width, L
text tokens, D text width.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.pipeline import Mask2DiTPipeline
from inference.story import Story
from schemas.errors import GenerationError
from training.scene_cache import CachedDenoiser, why_no_cache

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all of the whole story)."""


def generate_scenes(
    pipeline: Mask2DiTPipeline,
    stories: Sequence[Story],
    *,
    height: int,
    width: int,
    texts: Mapping[str, Tensor] | None = None,
    given: Sequence[Mapping[int, Tensor]] = (),
    kv_cache: bool = True,
    on_step: OnStep | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Generate the scenes of stories of one shape, side by side.

    The first pass makes the ``together`` scenes but for those that are given. Any of them may be
    given: all but the last continues a story, all but a middle one fills a gap or makes that scene
    again. Every further scene is a pass of its own.

    Args:
        pipeline: The loaded pipeline; its scheduler becomes that of the stories.
        stories: B stories of equal :attr:`Story.shape`.
        height: Pixels.
        width: Pixels.
        texts: Encoded texts (L, D) by text, all of :attr:`Story.texts`; None has the pipeline
            encode the texts of each pass.
        given: Clean latents (F, C, H, W) of each story's given scenes, by scene. Empty: none is.
        kv_cache: Keep keys and values of clean scenes where that is exact
            (:mod:`training.scene_cache`).
        on_step: Progress callback.

    Yields:
        (scene, latents (B, F, C, H, W)) of every scene in order, given ones included, each as soon
        as its pass is done.

    Raises:
        GenerationError: Stories and given scenes do not fit together, or the pipeline was
            interrupted; or see the pipeline.
    """
    _check(stories, given)
    story, cached = stories[0], _cached(pipeline) if kv_cache else None
    passes = len(story.prompts) - story.together + (len(_given_scenes(given)) < story.together)
    progress = None if on_step is None else _Progress(on_step, passes * story.sampling.steps)
    window = _Window(pipeline, stories, height, width, texts, cached, progress)
    ready = window.together(given)
    context: deque[Tensor] = deque(maxlen=story.sampling.context_scenes)
    for index in range(len(story.prompts)):
        if not ready:
            first = index - len(context)
            ready.append(window.run(range(first, index + 1), dict(enumerate(context)))[-1])
        context.append(ready.popleft())
        yield index, context[-1]


@dataclass
class _Window:
    """One call of the pipeline after the other, with the arguments they share."""

    pipeline: Mask2DiTPipeline
    stories: Sequence[Story]
    height: int
    width: int
    texts: Mapping[str, Tensor] | None
    denoiser: CachedDenoiser | None
    progress: _Progress | None

    def together(self, given: Sequence[Mapping[int, Tensor]]) -> deque[Tensor]:
        """The scenes that are generated together, those that are given in their places."""
        conditions = {
            scene: torch.stack([latents[scene] for latents in given])
            for scene in _given_scenes(given)
        }
        scenes = range(self.stories[0].together)
        if len(conditions) == len(scenes):
            return deque(conditions.values())
        return deque(self.run(scenes, conditions))

    def run(self, scenes: range, conditions: Mapping[int, Tensor]) -> list[Tensor]:
        """Latents of consecutive scenes, some of them given by their place among these."""
        part, sampling = slice(scenes.start, scenes.stop), self.stories[0].sampling
        prompts = [story.prompts[part] for story in self.stories]
        negative = [story.negative_prompts[part] for story in self.stories]
        encoded: dict[str, Any] = {}
        if self.texts is not None:
            encoded["prompt_embeds"] = _stacked(self.texts, prompts)
            if sampling.guidance > 1:
                encoded["negative_prompt_embeds"] = _stacked(self.texts, negative)
        # set for every pass, because passes of other stories may come between
        self.pipeline.set_scheduler(sampling.scheduler)
        latents = self.pipeline(
            prompts,
            negative_prompt=negative,
            **encoded,
            frames=self.stories[0].frames[part],
            height=self.height,
            width=self.width,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            use_dynamic_cfg=sampling.dynamic_guidance,
            guidance_rescale=sampling.guidance_rescale,
            scene_guidance=sampling.scene_guidance,
            seed=[story.seeds[part] for story in self.stories],
            conditions=conditions,
            condition_noise=sampling.condition_noise,
            first_scene=scenes.start,
            denoiser=self.denoiser,
            output_type="latent",
            callback_on_step_end=self.progress,
        ).latents
        if self.pipeline.interrupt:
            raise GenerationError(
                "interrupted, so the scenes are not finished",
                where=f"scenes {scenes.start} to {scenes.stop - 1}",
            )
        # copies, because a view would keep the whole window in memory
        return [scene.clone() for scene in latents]


@dataclass
class _Progress:
    """The pipeline's callback, counting over all passes."""

    on_step: OnStep
    steps: int
    done: int = 0

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        self.done += 1
        self.on_step(self.done, self.steps)
        return arguments[-1]  # the tensors of the step, unchanged


def _cached(pipeline: Mask2DiTPipeline) -> CachedDenoiser | None:
    """The transformer with its cache, or None where that would not be exact."""
    reason = why_no_cache(pipeline.transformer)
    log.debug("scene cache=%s reason=%r", reason is None, reason)
    return None if reason else CachedDenoiser(pipeline.transformer)


def _stacked(texts: Mapping[str, Tensor], prompts: Sequence[Sequence[str]]) -> Tensor:
    """(B, S, L, D)."""
    return torch.stack([torch.stack([texts[text] for text in story]) for story in prompts])


def _given_scenes(given: Sequence[Mapping[int, Tensor]]) -> list[int]:
    return sorted(given[0]) if given else []


def _check(stories: Sequence[Story], given: Sequence[Mapping[int, Tensor]]) -> None:
    if len({story.shape for story in stories}) != 1:
        raise GenerationError(
            "stories generated side by side need one shape, and there must be one at least",
            where=", ".join(story.prompt_id for story in stories),
            found=[story.shape for story in stories],
            do="generate them in separate calls",
        )
    story, scenes = stories[0], _given_scenes(given)
    named = [scene for scene, uri in enumerate(story.given) if uri]
    fits = len(given) in (0, len(stories)) and all(sorted(one) == scenes for one in given)
    if not fits or set(named) - set(scenes) or not set(scenes) <= set(range(story.together)):
        raise GenerationError(
            "the given latents do not fit the stories",
            where=", ".join(story.prompt_id for story in stories),
            found=f"latents of scenes {[sorted(one) for one in given]}",
            expected=f"the same scenes for each of {len(stories)} stories, all below "
            f"{story.together}" + (f", {named} among them" if named else ""),
        )
    if len(scenes) == len(story.prompts):
        raise GenerationError(
            "every scene is given, so there is nothing to generate", where=story.prompt_id
        )
