"""One story as the sampler needs it: a prompt row with every default filled in.

Legend: S scenes generated together, E scenes added one by one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from schemas.config import SamplingConfig, TriptychConfig
from schemas.rows import Prompt


@dataclass(frozen=True)
class Story:
    """A story to generate; the lists have one entry for each of its S + E scenes.

    Attributes:
        prompt_id: Its name in the manifest.
        prompts: What each scene shows.
        negative_prompts: What guidance leads away from.
        seeds: Seed of each scene's noise. Noise depends on (seed, scene index) alone.
        frames: Frames of each scene, 1 + a multiple of 4.
        given: Video file of scenes that are not generated, "" for the others.
        together: Scenes generated in one pass, S; the others are added one by one.
        sampling: How.
    """

    prompt_id: str
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    frames: tuple[int, ...]
    given: tuple[str, ...]
    together: int
    sampling: SamplingConfig

    @classmethod
    def of(cls, prompt: Prompt, config: TriptychConfig) -> Story:
        """A checked prompt row under a config.

        Raises:
            pydantic.ValidationError: ``settings`` names an unknown setting or a value out of range.
        """
        prompts = (*prompt.prompts, *prompt.extend_prompts)
        scenes, added = len(prompts), len(prompt.extend_prompts)
        return cls(
            prompt_id=prompt.prompt_id,
            prompts=prompts,
            negative_prompts=tuple(prompt.negative_prompts) or (prompt.negative_prompt,) * scenes,
            seeds=tuple(prompt.seeds) or (prompt.seed,) * scenes,
            frames=tuple(prompt.frames) or (config.training.model.frames,) * scenes,
            given=(*prompt.given, *[""] * added) if prompt.given else ("",) * scenes,
            together=len(prompt.prompts),
            sampling=sampling_of(config, json.loads(prompt.settings or "{}")),
        )

    @property
    def texts(self) -> list[str]:
        """Every text the sampler needs encoded, once each, in order of first use."""
        negative = self.negative_prompts if self.sampling.guidance > 1 else ()
        return list(dict.fromkeys((*self.prompts, *negative)))

    @property
    def shape(self) -> tuple[Any, ...]:
        """What stories of one micro-batch have in common."""
        given = tuple(bool(uri) for uri in self.given)
        return (self.frames, given, self.together, *self.sampling.model_dump().values())


def sampling_of(config: TriptychConfig, overrides: dict[str, Any]) -> SamplingConfig:
    """The configured sampling settings with a row's own over them.

    Raises:
        pydantic.ValidationError: An unknown setting or a value out of range.
    """
    names = set(SamplingConfig.model_fields)
    return SamplingConfig.model_validate(config.generation.model_dump(include=names) | overrides)
