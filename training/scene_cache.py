"""Exact keys and values of clean first scenes, kept over the steps that generate the next ones.

Under the mask ``scene_causal`` a scene's tokens see nothing of later scenes, and a clean condition
is modulated with t = 0 whatever the step. So the keys and values of the video tokens of conditions
that come first are the same at every step, in every layer. They are computed once, and a step runs
the tokens of the other scenes alone. Their video attends to the kept video, to what else comes
before it and to itself; the text of a condition is seen by that condition only, so nothing of it is
kept. No other mask that shows scenes to each other has such a cache: there, clean scenes see those
being generated.

What is kept is used only where it is equal, value by value, to what is asked for, so no result
depends on what was computed before. While a story's window of scenes grows, its first scenes stay
what they were and only the newest is added (but for sinusoidal positions: they are stretched over
the window, so all change). Once the window slides, its scenes have other positions and no longer
see the one that left, so all are computed anew: once in a pass of some fifty steps.

Memory: two tensors (B, L, D) per layer, L the video tokens of the conditions, and B doubled by
guidance. The weights must not change meanwhile.

Legend: B batch, S scenes, F latent frames of all scenes, C channels, H W latent height width, T
text tokens of a scene, N heads, L tokens, E width of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise, takewhile

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from schemas.errors import ConfigError
from training.attention import Plan
from training.block import Mix
from training.positions import Timeline
from training.transformer import Mask2DiTTransformer3DModel


def why_no_cache(transformer: Mask2DiTTransformer3DModel) -> str | None:
    """What keeps a transformer from being used with :class:`CachedDenoiser`, or None."""
    if transformer.config.mask != "scene_causal":
        return (
            f"only the mask scene_causal has an exact cache, this one is {transformer.config.mask}"
        )
    if transformer.sequence_group is not None:
        return "ranks share the sequence"
    if transformer.is_cache_enabled:
        return "a step cache is on, which would take computing what is kept for a step"
    return None


class CachedDenoiser:
    """A transformer's forward pass that computes clean first scenes once.

    Called as the transformer is.

    Args:
        transformer: A model with the mask ``scene_causal``.

    Raises:
        ConfigError: :func:`why_no_cache` has a reason.
    """

    def __init__(self, transformer: Mask2DiTTransformer3DModel) -> None:
        if reason := why_no_cache(transformer):
            raise ConfigError(
                "keys and values of clean scenes cannot be kept",
                found=reason,
                expected="the mask scene_causal, no sequence that ranks share, no step cache",
                do="set generation.kv_cache=false",
            )
        self.transformer = transformer
        self._layers = [_Layer() for _ in transformer.transformer_blocks]
        self._kept: list[_Scene] = []

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        scene_frames: Sequence[int],
        generated: Tensor | None = None,
    ) -> Tensor:
        """Predict v, as :meth:`Mask2DiTTransformer3DModel.forward` does with these arguments.

        Clean scenes that come after a generated one see it, so they are computed at every step.

        Returns:
            (B, F, C, H, W), zeros for the frames of the scenes that were kept.
        """
        scenes = self._scenes(hidden_states, encoder_hidden_states, scene_frames)
        clean = _clean_first(generated)
        self._keep(scenes[:clean], timestep)
        rest = None if generated is None else generated[:, clean:]
        predicted = self._run(scenes[clean:], timestep, rest, [x.attend for x in self._layers])
        kept_frames = hidden_states.shape[1] - predicted.shape[1]
        return torch.cat([torch.zeros_like(hidden_states[:, :kept_frames]), predicted], 1)

    def _scenes(self, latents: Tensor, texts: Tensor, scene_frames: Sequence[int]) -> list[_Scene]:
        """(B, F, C, H, W) latents and (B, S, T, text width) texts, scene by scene."""
        steps = self.transformer.patched_frames(scene_frames)
        whole = self.transformer.timeline(scene_frames)
        if self.transformer.config.use_rotary_positional_embeddings:
            # rotations know no length, so a scene stays where it is when others come behind it
            whole = Timeline(whole.positions, 0, 0)
        ends = list(accumulate(steps, initial=0))
        places = [replace(whole, positions=whole.positions[a:b]) for a, b in pairwise(ends)]
        parts = (latents.split(list(scene_frames), 1), texts.unbind(1), places)
        return [_Scene(*scene) for scene in zip(*parts, strict=True)]

    def _keep(self, scenes: Sequence[_Scene], timestep: Tensor) -> None:
        """Have keys and values of exactly these scenes, computing what is not there."""
        pairs = zip(self._kept, scenes, strict=False)
        same = len(list(takewhile(lambda pair: pair[0].equals(pair[1]), pairs)))
        del self._kept[same:]
        for layer in self._layers:
            layer.forget(same)
        if new := scenes[same:]:
            self._run(new, torch.zeros_like(timestep), None, [x.keep for x in self._layers])
            self._kept += [scene.copy() for scene in new]

    def _run(
        self,
        scenes: Sequence[_Scene],
        timestep: Tensor,
        generated: Tensor | None,
        mixes: Sequence[Mix],
    ) -> Tensor:
        """The transformer on consecutive scenes, behind those that are kept."""
        return self.transformer(
            torch.cat([scene.latents for scene in scenes], 1),
            torch.stack([scene.text for scene in scenes], 1),
            timestep,
            [scene.latents.shape[1] for scene in scenes],
            generated,
            replace(scenes[0].place, positions=sum((s.place.positions for s in scenes), ())),
            mixes,
        )


@dataclass(frozen=True)
class _Scene:
    """All that the keys and values of a clean scene depend on, besides the scenes before it."""

    latents: Tensor
    text: Tensor
    place: Timeline

    def equals(self, other: _Scene) -> bool:
        return self.place == other.place and all(
            (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)
            for a, b in ((self.latents, other.latents), (self.text, other.text))
        )

    def copy(self) -> _Scene:
        """One that stays as it is when the caller writes to its tensors."""
        return _Scene(self.latents.clone(), self.text.clone(), self.place)


@dataclass
class _Layer:
    """Keys and values of the kept scenes' video in one layer, (B, N, L, E) for each scene."""

    keys: list[Tensor] = field(default_factory=list[Tensor])
    values: list[Tensor] = field(default_factory=list[Tensor])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
        """Attention of the scenes behind those kept; arguments as for ``attend``."""
        return self._mix(query, key, value, plan)[0]

    def keep(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
        """The same for clean scenes, whose keys and values are then kept as well."""
        mixed, self.keys, self.values = self._mix(query, key, value, plan)
        return mixed

    def forget(self, start: int) -> None:
        """Drop the scenes from this one on."""
        del self.keys[start:], self.values[start:]

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Scene by scene, where nothing is masked: text to its scene, video to what came as well.

        Returns:
            The mixed tokens (B, N, L, E), and keys and values of all video so far.
        """
        lengths = [*plan.text_lengths, *plan.video_lengths]
        groups = list(zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True))
        keys, values = list(self.keys), list(self.values)
        scenes = len(plan.text_lengths)
        texts: list[Tensor] = []
        videos: list[Tensor] = []
        for (q, k, v), (video_q, video_k, video_v) in zip(
            groups[:scenes], groups[scenes:], strict=True
        ):
            texts.append(_attend(q, [k, video_k], [v, video_v]))
            keys.append(video_k)
            values.append(video_v)
            videos.append(_attend(video_q, [k, *keys], [v, *values]))
        return torch.cat([*texts, *videos], 2), keys, values


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    return scaled_dot_product_attention(query, torch.cat(keys, 2), torch.cat(values, 2))


def _clean_first(generated: Tensor | None) -> int:
    """How many scenes before the last are clean in all samples and come before all others."""
    if generated is None:
        return 0
    clean = (~generated[:, :-1].bool()).all(0).tolist()
    return len(list(takewhile(bool, clean)))
