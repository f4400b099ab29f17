"""Attention of one layer over the whole sequence ``[T_1 .. T_S | V_1 .. V_S]``.

There is one backend so far, ``dense``: torch's scaled-dot-product attention with the mask as a bool
matrix. It is exact for every mask and is the oracle for faster backends, which get a function each,
with the signature of :func:`attend`, and are chosen in :func:`attend` by an explicit rule.

Legend: B batch, N heads, L tokens, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from training.masks import dense_mask


@dataclass(frozen=True)
class Plan:
    """What attention needs to know about a sequence; the same for every layer of a model.

    Attributes:
        mask: Name of the mask, see :mod:`training.masks`.
        text_lengths: Text tokens of each scene.
        video_lengths: Video tokens of each scene.
    """

    mask: str
    text_lengths: tuple[int, ...]
    video_lengths: tuple[int, ...]


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
    """Masked attention.

    Args:
        query: (B, N, L, E), already normalised and rotated.
        key: (B, N, L, E).
        value: (B, N, L, E).
        plan: The mask and the lengths of the scenes.

    Returns:
        (B, N, L, E).
    """
    return dense(query, key, value, plan)


def dense(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
    """One call of torch's attention; the bool mask is left out where nothing is masked."""
    mask = dense_mask(plan.mask, plan.text_lengths, plan.video_lengths, query.device)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
