"""The scenes of a batch while they are denoised: latents, noise, and which of them are given.

Shapes: B stories, S scenes, F latent frames of a scene, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from inference.sampler import Scheduler, denoise_step
from training.noise import scene_generator


class NoisyScenes:
    """All scenes of a batch at one noise level, given ones aside.

    All noise is drawn scene by scene from generators keyed by (seed, index in the story, purpose),
    so it depends neither on the batch nor on the other scenes.

    Args:
        scheduler: With its schedule.
        shapes: (F, C, H, W) of each scene.
        seeds: B lists of S.
        first_scene: Index of the first scene in its story.
        given: Clean latents (B, F, C, H, W) of given scenes, by index here.
        condition_noise: Show given scenes with the noise of the schedule's first level. Source: the
            official inference.
        device: Where to compute.

    Attributes:
        lengths: F of each scene.
        new: Indexes of the scenes that are not given.
        latents: S tensors (B, F, C, H, W), float32, as the transformer sees them.
        generated: (B, S) bool, False for given scenes; None where none is given.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        shapes: Sequence[tuple[int, int, int, int]],
        seeds: Sequence[Sequence[int]],
        first_scene: int,
        given: Mapping[int, Tensor],
        *,
        condition_noise: bool,
        device: torch.device,
    ) -> None:
        def generators(scene: int, purpose: str) -> list[torch.Generator]:
            return [scene_generator(s[scene], first_scene + scene, purpose) for s in seeds]

        def draw(scene: int, purpose: str) -> Tensor:
            drawn = [torch.randn(shapes[scene], generator=g) for g in generators(scene, purpose)]
            return torch.stack(drawn).to(device)

        self._scheduler = scheduler
        self.lengths = [shape[0] for shape in shapes]
        self._given = {i: clean.to(device, torch.float32) for i, clean in given.items()}
        self.new = [i for i in range(len(shapes)) if i not in given]
        self._noise = {i: generators(i, "sampler") for i in self.new}
        self._clean: dict[int, Tensor | None] = dict.fromkeys(self.new)
        shown = dict(self._given)
        if condition_noise:
            level = cast("Any", torch.zeros(len(seeds), dtype=torch.int64))
            for i, clean in self._given.items():
                shown[i] = scheduler.add_noise(clean, draw(i, "condition"), level)
        self.latents = [shown[i] if i in shown else draw(i, "initial") for i in range(len(shapes))]
        self.generated: Tensor | None = None
        if given:
            self.generated = torch.zeros(len(seeds), len(shapes), dtype=torch.bool, device=device)
            self.generated[:, self.new] = True

    @property
    def joined(self) -> Tensor:
        """The latents one after the other, (B, frames of all scenes, C, H, W)."""
        return torch.cat(self.latents, 1)

    @joined.setter
    def joined(self, latents: Tensor) -> None:
        self.latents = self.split(latents)

    def split(self, joined: Tensor) -> list[Tensor]:
        """(B, frames of all scenes, ...) into S tensors."""
        return list(joined.split(self.lengths, 1))

    def step(self, velocity: Sequence[Tensor], t: Tensor, before: Tensor | None) -> None:
        """Denoise the scenes that are not given by one step (:func:`denoise_step`)."""
        for i in self.new:
            self.latents[i], self._clean[i] = denoise_step(
                self._scheduler,
                velocity[i],
                self._clean[i],
                t,
                before,
                self.latents[i],
                self._noise[i],
            )

    def finished(self) -> list[Tensor]:
        """The latents with the given scenes as they were given."""
        return [self._given.get(i, latents) for i, latents in enumerate(self.latents)]
