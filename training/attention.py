"""Attention of one layer over the whole sequence ``[T_1 .. T_S | V_1 .. V_S]``.

Three backends compute the same thing, :func:`attend` picks one by :func:`choose_backend`:

- ``dense``: torch's scaled-dot-product attention with the mask as an (L, L) bool matrix, or with no
  mask where nothing is masked. Exact for every mask, and the oracle of the others.
- ``lse``: mask-free flash kernels, merged (:mod:`training.lse_attention`). Linear memory.
- ``flex``: FlexAttention (:mod:`training.flex`). Linear memory, compiled code.

Legend: B batch, N heads, L tokens, E width of a head, O own tokens of a rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from schemas.errors import ConfigError
from training.flex import attend_flex, why_no_flex
from training.lse_attention import Kernel, choose_kernel, lse_attention
from training.masks import dense_mask, masks_nothing
from training.ulysses import Sharing, to_heads, to_tokens

log = logging.getLogger(__name__)

Backend = Literal["dense", "lse", "flex"]
Lengths = tuple[int, ...]

# Up to here one call with a small mask beats several without one: on a CPU core the two draw level
# near 650 tokens (torch 2.15, four heads, processor time).
DENSE_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """What attention needs to know about a sequence; the same for every layer of a model.

    Attributes:
        mask: Name of the mask, see :mod:`training.masks`.
        text_lengths: Text tokens of each scene.
        video_lengths: Video tokens of each scene.
        backend: A backend by name, or ``auto`` for the rule of :func:`choose_backend`.
        sharing: How ranks share the sequence; None where each has it whole.
    """

    mask: str
    text_lengths: Lengths
    video_lengths: Lengths
    backend: Literal["auto", "dense", "lse", "flex"] = "auto"
    sharing: Sharing | None = None

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return sum(self.text_lengths) + sum(self.video_lengths)

    @property
    def own_lengths(self) -> tuple[Lengths, Lengths]:
        """Text and video tokens of each scene that this rank has; some may be 0."""
        if self.sharing is None:
            return self.text_lengths, self.video_lengths
        own = self.sharing.own_lengths((*self.text_lengths, *self.video_lengths))
        scenes = len(self.text_lengths)
        return own[:scenes], own[scenes:]


class Choice(NamedTuple):
    """A backend, and why it.

    Attributes:
        backend: Its name.
        reason: One phrase for the log.
        kernel: The flash kernel that ``lse`` runs on; None for the others.
    """

    backend: Backend
    reason: str
    kernel: Kernel | None = None


def choose_backend(
    plan: Plan, device: torch.device, dtype: torch.dtype, needs_grad: bool, width: int
) -> Choice:
    """The backend for such tensors; a plain function of its arguments and the machine.

    ``auto``: ``dense`` where nothing is masked (it is one mask-free flash call) and for short
    sequences; else ``lse`` where a flash kernel exists; else ``dense``, whose memory then grows
    with the square of the sequence.

    Args:
        plan: The mask, the lengths, and the wish.
        device: Where the tensors are.
        dtype: Their type.
        needs_grad: Whether a backward pass will follow.
        width: Width of a head.

    Raises:
        ConfigError: The plan names a backend that cannot run such tensors, or no known backend.
    """
    kernel, kernel_reason = choose_kernel(device, dtype, width)
    tensors = f"{dtype} on {device}, heads of {width}" + (", with gradients" * needs_grad)
    if plan.backend == "dense":
        return Choice("dense", "asked for")
    if plan.backend == "lse":
        if kernel is None:
            raise _refused("lse", tensors, kernel_reason)
        return Choice("lse", f"asked for; {kernel_reason}", kernel)
    if plan.backend == "flex":
        if missing := why_no_flex(device, dtype, needs_grad):
            raise _refused("flex", tensors, missing)
        return Choice("flex", "asked for")
    if plan.backend != "auto":
        raise ConfigError(
            "unknown attention backend",
            found=plan.backend,
            expected="auto, dense, lse or flex",
        )
    if masks_nothing(plan.mask, plan.text_lengths, plan.video_lengths):
        return Choice("dense", "nothing is masked")
    if plan.tokens <= DENSE_TOKENS:
        return Choice("dense", f"no more than {DENSE_TOKENS} tokens")
    if kernel is None:
        return Choice("dense", kernel_reason)
    return Choice("lse", kernel_reason, kernel)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
    """Masked attention, without dropout.

    Under autocast the inputs are cast as torch's own attention casts them; without it they have one
    type. Works in torch.compile and activation checkpoints.

    Where ranks share the sequence, each gives and gets all heads of its own tokens and computes
    some heads of all tokens.

    Args:
        query: (B, N, L, E), or (B, N, O, E) of a shared sequence; already normalised and rotated.
        key: As query.
        value: As query.
        plan: The mask, the lengths of the scenes, and who shares the sequence.

    Returns:
        As query.

    Raises:
        ConfigError: The plan names a backend that cannot run such tensors.
    """
    query, key, value = (_autocast(x) for x in (query, key, value))
    assert query.dtype == key.dtype == value.dtype, "query, key and value of one type"
    if plan.sharing is None:
        return _attend_all(query, key, value, plan)
    heads = to_heads(query, key, value, plan.sharing)
    return to_tokens(_attend_all(*heads, plan), plan.sharing)


def _attend_all(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
    """Masked attention of all tokens, (B, any heads, L, E)."""
    assert query.shape[2] == plan.tokens, f"{query.shape[2]} tokens, planned {plan.tokens}"
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    lengths = (plan.text_lengths, plan.video_lengths)
    tensors = (query.device, query.dtype, needs_grad, query.shape[3])
    backend, kernel = _choice(plan.mask, *lengths, plan.backend, *tensors)
    if backend == "lse":
        return lse_attention(query, key, value, plan.mask, *lengths, kernel)[0]
    if backend == "flex":
        return attend_flex(query, key, value, plan.mask, *lengths)
    mask = _dense_mask(plan.mask, *lengths, query.device)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


# torch.compile runs these two while tracing and keeps what they return: the mask is made once, and
# logging breaks no graph. It hands plain values over; torch 2.11 cannot hand over a Plan.
@torch.compiler.assume_constant_result
def _dense_mask(
    mask: str, text_lengths: Lengths, video_lengths: Lengths, device: torch.device
) -> Tensor | None:
    return dense_mask(mask, text_lengths, video_lengths, device)


@torch.compiler.assume_constant_result
def _choice(
    mask: str, text_lengths: Lengths, video_lengths: Lengths, backend: Any, *tensors: Any
) -> tuple[Backend, Kernel | None]:
    plan = Plan(mask, text_lengths, video_lengths, backend)
    choice = _announced_choice(plan, *tensors)
    return choice.backend, choice.kernel


@lru_cache(maxsize=256)
def _announced_choice(
    plan: Plan, device: torch.device, dtype: torch.dtype, needs_grad: bool, width: int
) -> Choice:
    """The choice, logged the first time it is made."""
    choice = choose_backend(plan, device, dtype, needs_grad, width)
    log.info(
        "attention backend=%s kernel=%s mask=%s scenes=%d tokens=%d device=%s dtype=%s reason=%r",
        choice.backend,
        choice.kernel,
        plan.mask,
        len(plan.text_lengths),
        plan.tokens,
        device,
        dtype,
        choice.reason,
    )
    return choice


def _autocast(x: Tensor) -> Tensor:
    """Cast to autocast's type where that is on; float64 stays, as in torch's own rule."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _refused(backend: str, tensors: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the {backend} attention backend cannot run here",
        found=tensors,
        expected=reason,
        do="choose auto or dense",
    )
