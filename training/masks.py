"""Which token may attend to which: the masks of Mask2DiT and their neighbours, named by meaning.

A sequence is ``[T_1 .. T_S | V_1 .. V_S]``: the text tokens of every scene, then the video tokens
of every scene, any number of scenes of any length. The tokens of one scene and kind are a *group*.
A mask is one predicate on the groups of a query and of a key. Everything else derives from it: the
dense matrix (:func:`dense_mask`), FlexAttention's block mask (:mod:`training.flex`), and the
mask-free pieces that flash kernels can run (:func:`pieces`).

Legend: S scenes, L tokens of the whole sequence.

Source: Mask2DiT (arXiv 2503.19881) section 3.2 and table 4. The paper publishes v2 and v5; v1, v3
and v4 are **inferred** from its descriptions and scores, and ``scene_causal`` is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from schemas.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """The text tokens or the video tokens of one scene.

    Attributes:
        scene: Scene number, from 0.
        video: True for video tokens, False for text tokens.
    """

    scene: int
    video: bool


Predicate = Callable[[Group, Group], bool]
"""(group of the query, group of the key) -> may the query see the key."""


def isolated(q: Group, k: Group) -> bool:
    """v1 (inferred): every scene sees only its own text and its own video."""
    return q.scene == k.scene


def shared_video(q: Group, k: Group) -> bool:
    """v2 (the paper's choice): text sees its own scene; video sees its own text and all video."""
    return q.scene == k.scene or (q.video and k.video)


def shared_within_kind(q: Group, k: Group) -> bool:
    """v3 (inferred, after ShotAdapter): text sees all text, video all video, both their scene."""
    return q.scene == k.scene or q.video == k.video


def global_text(q: Group, k: Group) -> bool:
    """v4 (inferred): text sees everything; video sees its own text and all video."""
    return q.scene == k.scene or k.video or not q.video


def full(q: Group, k: Group) -> bool:
    """v5: everything sees everything."""
    return True


def scene_causal(q: Group, k: Group) -> bool:
    """Ours: like v2, but video sees only the video of its own and earlier scenes."""
    return q.scene == k.scene or (q.video and k.video and k.scene <= q.scene)


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


def groups(scenes: int) -> list[Group]:
    """All groups of a sequence, in its order: the texts, then the videos."""
    return [Group(scene, video) for video in (False, True) for scene in range(scenes)]


def group_table(name: str, scenes: int) -> list[list[bool]]:
    """The mask on whole groups: row i says what a query of group i sees; (2S, 2S).

    Raises:
        ConfigError: No mask is called so.
    """
    allowed = predicate(name)
    return [[allowed(q, k) for k in groups(scenes)] for q in groups(scenes)]


def masks_nothing(name: str, text_lengths: tuple[int, ...], video_lengths: tuple[int, ...]) -> bool:
    """Whether every token of such a sequence sees every token.

    Raises:
        ConfigError: No mask is called so.
    """
    present = [length > 0 for length in (*text_lengths, *video_lengths)]
    table = group_table(name, len(text_lengths))
    return all(
        see
        for row, here in zip(table, present, strict=True)
        if here
        for see, there in zip(row, present, strict=True)
        if there
    )


def group_of_token(
    text_lengths: tuple[int, ...],
    video_lengths: tuple[int, ...],
    device: torch.device | None = None,
) -> Tensor:
    """The group number of every token, in the order of :func:`groups`; (L,) int64."""
    assert len(text_lengths) == len(video_lengths), "one text and one video length per scene"
    lengths = (*text_lengths, *video_lengths)
    return torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(lengths)])


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
    if masks_nothing(name, text_lengths, video_lengths):
        return None
    table = torch.tensor(group_table(name, len(text_lengths)), device=device)
    group = group_of_token(text_lengths, video_lengths, device)
    return table[group][:, group]


@dataclass(frozen=True)
class Piece:
    """A block of the mask in which every query sees every key: one mask-free attention call.

    Attributes:
        rows: The queries, ``[start, stop)`` in the sequence.
        columns: The keys, ``[start, stop)`` in the sequence.
        first: No earlier piece has any of these rows, so its result stands; otherwise it is merged
            with what is there.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    first: bool


@lru_cache(maxsize=64)
def pieces(
    name: str, text_lengths: tuple[int, ...], video_lengths: tuple[int, ...]
) -> tuple[Piece, ...]:
    """The mask as disjoint blocks of contiguous queries and contiguous keys, largest first.

    Runs of keys stop at the border between text and video, so that neighbouring queries share
    them: under v2 all video queries have the run of all video keys, and that is one call.

    Raises:
        ConfigError: No mask is called so.
    """
    lengths = (*text_lengths, *video_lengths)
    ends = list(accumulate(lengths, initial=0))
    if masks_nothing(name, text_lengths, video_lengths):
        return (Piece((0, ends[-1]), (0, ends[-1]), first=True),)
    scenes = len(text_lengths)
    table = group_table(name, scenes)
    present = [i for i, length in enumerate(lengths) if length]

    def spans(chosen: Callable[[int], bool], *, stop_at_video: bool) -> list[tuple[int, int]]:
        """Tokens of the chosen groups, as few spans as possible."""
        keys = groupby(present, lambda i: (chosen(i), stop_at_video and i >= scenes))
        chains = [list(chain) for (is_chosen, _), chain in keys if is_chosen]
        return [(ends[chain[0]], ends[chain[-1] + 1]) for chain in chains]

    runs = {row: spans(lambda k, row=row: table[row][k], stop_at_video=True) for row in present}
    blocks = [
        (rows, columns)
        for columns in sorted({run for found in runs.values() for run in found})
        for rows in spans(lambda q, columns=columns: columns in runs[q], stop_at_video=False)
    ]
    # where two pieces share their queries, the one with more keys comes first and needs no merge
    blocks.sort(key=lambda block: (_length(block[0]), _length(block[1])), reverse=True)
    done: set[int] = set()
    found: list[Piece] = []
    for rows, columns in blocks:
        covered = {i for i in present if rows[0] <= ends[i] < rows[1]}
        found.append(Piece(rows, columns, first=not covered & done))
        done |= covered
    return tuple(found)


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
