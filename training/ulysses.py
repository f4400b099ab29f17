"""Sequence parallelism: the ranks of a group share one sequence, each with a part of its tokens.

Every rank embeds the whole input, which is cheap, and keeps a contiguous slice of the tokens
``[T_1 .. T_S | V_1 .. V_S]``. Whatever is done token by token is done on the slice. Around
attention, one exchange turns "all heads of my tokens" into "my heads of all tokens" and another one
turns it back; between them a rank attends over the whole sequence, with the mask and the kernel it
would use alone. In the end every rank gets all video tokens.

Gradients need no factor. Every rank computes the same loss of the whole output, so P ranks together
compute P * loss. Exchanges and gather are linear and go backward as their transposes over all
ranks; so a rank's gradient is that of P * loss by its own copy of the parameters, which is P times
the share of its own tokens. Its mean over the ranks is the gradient of the loss, and DeepSpeed
takes the mean over all ranks, those that share a sequence like those that do not. This covers what
comes before the slice, too: a slice hands back the gradient of its own tokens and zeros.

Legend: B batch, N heads, L tokens, E width of a head, P ranks, O own tokens of this rank, K text
tokens of all scenes, C channels.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), here with slices of unequal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from schemas.errors import ConfigError


@dataclass(frozen=True)
class Sharing:
    """How a sequence is shared out.

    Attributes:
        group: The ranks that share it.
        rank: This process, as numbered in the group.
        parts: Tokens of each rank, in the order of the sequence.
    """

    group: dist.ProcessGroup
    rank: int
    parts: tuple[int, ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup, tokens: int) -> Sharing:
        """Share a sequence of so many tokens out to the ranks of a group, this process included."""
        return cls(group, dist.get_rank(group), even_parts(tokens, dist.get_world_size(group)))

    @property
    def own(self) -> int:
        """Tokens of this rank, O."""
        return self.parts[self.rank]

    @property
    def span(self) -> tuple[int, int]:
        """This rank's tokens, ``[start, stop)`` in the sequence."""
        start = sum(self.parts[: self.rank])
        return start, start + self.own

    def own_lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """How much of each run of tokens this rank has, given the lengths of runs that add up."""
        return tuple(_overlap(run, self.span) for run in _runs(lengths))


def even_parts(tokens: int, ranks: int) -> tuple[int, ...]:
    """Split tokens into one part per rank; the first ones have one more where it does not divide.

    >>> even_parts(11, 4)
    (3, 3, 3, 2)
    """
    part, rest = divmod(tokens, ranks)
    return tuple(part + (rank < rest) for rank in range(ranks))


def check_shareable(heads: int, group: dist.ProcessGroup, *, compiled: bool) -> None:
    """Raise ConfigError unless the ranks of a group can share a model's sequences.

    Args:
        heads: Attention heads of the model; the ranks must divide them.
        group: The ranks.
        compiled: Whether the model's blocks are compiled, which excludes sharing.
    """
    if compiled:
        raise compiled_and_shared()
    ranks = dist.get_world_size(group)
    if heads % ranks:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            "the attention heads cannot be shared out to the ranks of a sequence",
            where="training.sequence_parallel",
            found=f"{heads} heads for {ranks} ranks",
            expected="a number of ranks that divides the heads",
            do=f"choose one of {', '.join(divisors)}",
        )


def compiled_and_shared() -> ConfigError:
    """The error of asking for both."""
    return ConfigError(
        "compiled blocks cannot share a sequence, torch.compile does not trace the exchange",
        where="training.compile_blocks, training.sequence_parallel",
        found="compiled blocks and ranks that share a sequence",
        expected="one of the two",
        do="set compile_blocks=false or sequence_parallel=1",
    )


def own_part(
    text: Tensor, video: Tensor, rotations: Tensor | None, sharing: Sharing
) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's tokens of (B, K, D) text and (B, L - K, D) video, and its rows of (L, E/2).

    Either may be empty.
    """
    start, stop = sharing.span
    border = text.shape[1]
    # copies, because a view would keep the whole sequence in memory for as long as a layer needs it
    text = text[:, start:stop].clone()
    video = video[:, max(start - border, 0) : max(stop - border, 0)].clone()
    return text, video, None if rotations is None else rotations[start:stop]


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, sharing: Sharing
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of the own tokens, (B, N, O, E), to own heads of all tokens, (B, N/P, L, E)."""
    ranks = len(sharing.parts)
    sent = torch.stack(
        [x.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4) for x in (query, key, value)], 2
    )  # (P, O, 3, B, N/P, E)
    rows = _exchange(sent.flatten(0, 1), (sharing.own,) * ranks, sharing.parts, sharing.group)
    query, key, value = rows.permute(1, 2, 3, 0, 4)
    return query, key, value


def to_tokens(attended: Tensor, sharing: Sharing) -> Tensor:
    """Own heads of all tokens, (B, N/P, L, E), back to all heads of the own tokens, (B, N, O, E).

    Memory is in the order (B, O, N, E), which the layer after it flattens without a copy.
    """
    ranks = len(sharing.parts)
    sent = attended.permute(2, 0, 1, 3)  # (L, B, N/P, E)
    rows = _exchange(sent, sharing.parts, (sharing.own,) * ranks, sharing.group)
    shared = rows.unflatten(0, (ranks, sharing.own))  # (P, O, B, N/P, E)
    return shared.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def gather_video(video: Tensor, text_tokens: int, sharing: Sharing) -> Tensor:
    """The video tokens of all ranks, (B, L - K, C), from those of each, (B, own, C)."""
    tokens = (text_tokens, sum(sharing.parts))
    received = tuple(_overlap(tokens, part) for part in _runs(sharing.parts))
    ranks = len(sharing.parts)
    # an exchange in which everybody is sent the same: unlike all_gather it takes unequal parts with
    # every backend, and its backward adds up what all ranks want of these tokens
    sent = video.transpose(0, 1).repeat(ranks, 1, 1)
    rows = _exchange(sent, (video.shape[1],) * ranks, received, sharing.group)
    return rows.transpose(0, 1)


class _Exchange(torch.autograd.Function):
    """Send rows to every rank and receive rows of every rank; backward the same in reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.reverse = (received, sent, group)
        found = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(found, rows.contiguous(), list(received), list(sent), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], *ctx.reverse), None, None, None


def _exchange(
    rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup
) -> Tensor:
    """Rows to and from each rank of the group, so many each."""
    return cast("Tensor", _Exchange.apply(rows, sent, received, group))


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """``[start, stop)`` of consecutive runs of such lengths."""
    return list(pairwise(accumulate(lengths, initial=0)))


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
