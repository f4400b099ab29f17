"""Which token may attend to which: the masks of Mask2DiT and their neighbours, named by meaning.

A sequence is ``[T_1 .. T_S | V_1 .. V_S]``: the text tokens of every scene, then the video tokens
of every scene. A mask is one predicate on the (scene, kind) of a query and of a key; everything
else (the dense matrix here, other execution plans later) is derived from it, for any number of
scenes of any length.

Legend: B batch, S scenes, T text tokens of a scene, L tokens of the whole sequence.

Source: Mask2DiT (arXiv 2503.19881) section 3.2 and table 4. The paper publishes v2 and v5; v1, v3
and v4 are **inferred** from its descriptions and scores, and ``scene_causal`` is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from schemas.errors import ConfigError


@dataclass(frozen=True)
class Tokens:
    """What the predicates look at: scene number and kind of some tokens.

    Attributes:
        scene: Scene index, an int or an integer tensor.
        video: True for video tokens, False for text tokens; a bool or a bool tensor of the same
            shape.
    """

    scene: Any
    video: Any


Predicate = Callable[[Tokens, Tokens], Any]
"""(query, key) -> may the query see the key; on plain values or on broadcasting tensors."""


def isolated(q: Tokens, k: Tokens) -> Any:
    """v1 (inferred): every scene sees only its own text and its own video."""
    return q.scene == k.scene


def shared_video(q: Tokens, k: Tokens) -> Any:
    """v2 (the paper's choice): text sees its own scene; video sees its own text and all video."""
    return (q.scene == k.scene) | (q.video & k.video)


def shared_within_kind(q: Tokens, k: Tokens) -> Any:
    """v3 (inferred, after ShotAdapter): text sees all text, video all video, both their scene."""
    return (q.scene == k.scene) | (q.video == k.video)


def global_text(q: Tokens, k: Tokens) -> Any:
    """v4 (inferred): text sees everything; video sees its own text and all video."""
    return (q.scene == k.scene) | k.video | (q.video ^ True)  # `not` would fail on tensors


def full(q: Tokens, k: Tokens) -> Any:
    """v5: everything sees everything."""
    return (q.scene == k.scene) | (q.scene != k.scene)


def scene_causal(q: Tokens, k: Tokens) -> Any:
    """Ours: like v2, but video sees only the video of its own and earlier scenes."""
    return (q.scene == k.scene) | (q.video & k.video & (k.scene <= q.scene))


MASKS: dict[str, Predicate] = {
    f.__name__: f
    for f in (isolated, shared_video, shared_within_kind, global_text, full, scene_causal)
}
ALIASES = {
    "v1": "isolated",
    "v2": "shared_video",
    "v3": "shared_within_kind",
    "v4": "global_text",
    "v5": "full",
}


def predicate(name: str) -> Predicate:
    """The predicate of a mask, by name or by its version number in the paper's ablation.

    Raises:
        ConfigError: No mask is called so.
    """
    found = MASKS.get(ALIASES.get(name, name))
    if found is None:
        raise ConfigError(
            "unknown attention mask",
            found=name,
            expected=f"one of {', '.join([*ALIASES, *MASKS])}",
        )
    return found


def describe_tokens(text_lengths: Sequence[int], video_lengths: Sequence[int]) -> Tokens:
    """Scene and kind of every token of a sequence, in its order.

    Args:
        text_lengths: Text tokens of each scene.
        video_lengths: Video tokens of each scene; as many entries as ``text_lengths``.

    Returns:
        Tokens of two (L,) tensors.
    """
    assert len(text_lengths) == len(video_lengths), "one text and one video length per scene"
    scenes = torch.arange(len(text_lengths))
    lengths = torch.tensor([*text_lengths, *video_lengths])
    return Tokens(
        scene=scenes.repeat(2).repeat_interleave(lengths),
        video=torch.tensor([False, True]).repeat_interleave(len(scenes)).repeat_interleave(lengths),
    )


@lru_cache(maxsize=8)
def dense_mask(
    name: str,
    text_lengths: tuple[int, ...],
    video_lengths: tuple[int, ...],
    device: torch.device | None = None,
) -> Tensor | None:
    """The mask as an (L, L) bool matrix (rows are queries), or None where nothing is masked.

    None lets the caller use the kernels that take no mask. The result is cached: do not write to
    it.

    Raises:
        ConfigError: No mask is called so.
    """
    tokens = describe_tokens(text_lengths, video_lengths)
    rows = Tokens(tokens.scene[:, None], tokens.video[:, None])
    columns = Tokens(tokens.scene[None, :], tokens.video[None, :])
    allowed = predicate(name)(rows, columns)
    return None if bool(allowed.all()) else allowed.to(device)
