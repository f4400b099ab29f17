"""Exact masked attention from mask-free flash kernels: no copy of keys or values, linear memory.

The mask is cut into blocks without holes (:func:`training.masks.pieces`). Each block is one call of
a flash kernel on views of the queries, keys and values. A query that has several blocks gets their
results merged by the log-sum-exp that every flash kernel returns beside its output:

    O = O_1 + sigmoid(L_2 - L_1) (O_2 - O_1),   L = log(exp L_1 + exp L_2)

The backward pass needs nothing but the merged O and L: a flash backward recomputes its block's
probabilities as exp(score - L) and subtracts rowsum(dO * O), so with the merged values each block
yields exactly its share of the gradients, and the shares add up.

Large blocks go a few heads at a time, so that a block's own result, which lives until it is merged,
takes an eighth of the output and not the whole again.

Legend: B batch, N heads, L tokens, E width of a head.

Source: the merge is that of blockwise and ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from training.masks import pieces

Kernel = Literal["cpu", "flash", "cudnn"]

_ATEN = torch.ops.aten
_SMALL_BYTES = 1 << 20  # below this a piece's result is not worth more calls
_LARGEST_SHARE = 8  # a block's result takes at most this part of the output
_HALF = (torch.bfloat16, torch.float16)
# torch's own rule for preferring cuDNN: before 9.15.1 it is wrong or slow on lengths that are not a
# multiple of 128 (pytorch issue 169849), and only these generations (Hopper, Blackwell) gain by it
_CUDNN_VERSION = 91501
_CUDNN_GENERATIONS = (9, 10)


def choose_kernel(
    device: torch.device, dtype: torch.dtype, width: int
) -> tuple[Kernel | None, str]:
    """The flash kernel for such tensors, or None, and why.

    Args:
        device: Where the tensors are.
        dtype: Their type.
        width: Width of a head.
    """
    if device.type == "cpu":
        if dtype in (*_HALF, torch.float32, torch.float64):
            return "cpu", "torch's CPU flash kernel"
        return None, f"the CPU flash kernel does not know {dtype}"
    if device.type != "cuda":
        return None, f"no flash kernel with a log-sum-exp is known for {device.type}"
    if dtype not in _HALF:
        return None, f"CUDA flash kernels take bfloat16 or float16, not {dtype}"
    if width % 8:
        return None, f"CUDA flash kernels take heads of a multiple of 8, not {width}"
    generation = torch.cuda.get_device_capability(device)[0]
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if generation in _CUDNN_GENERATIONS and width <= 128 and (cudnn or 0) >= _CUDNN_VERSION:
        return "cudnn", f"cuDNN {cudnn} on compute capability {generation}.x"
    if generation >= 8 and width <= 256:
        return "flash", f"flash attention 2, compute capability {generation}.x, cuDNN {cudnn}"
    return None, f"no flash kernel for heads of {width} on compute capability {generation}.x"


@torch.library.custom_op(
    "triptych::lse_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, str mask, int[] text_lengths, "
    "int[] video_lengths, str kernel) -> (Tensor, Tensor)",
)
def lse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: str,
    text_lengths: list[int],
    video_lengths: list[int],
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Masked attention of (B, N, L, E) tensors of one type and device.

    One opaque operator, so torch.compile keeps its memory as it is. Differentiable once.

    Args:
        query: (B, N, L, E).
        key: (B, N, L, E).
        value: (B, N, L, E).
        mask: Name of the mask, see :mod:`training.masks`.
        text_lengths: Text tokens of each scene.
        video_lengths: Video tokens of each scene.
        kernel: What :func:`choose_kernel` said.

    Returns:
        The output, (B, N, L, E) with memory in the order (B, L, N, E), which the layer after it
        flattens without a copy; and the log-sum-exp, (B, N, L), float64 for float64 and float32
        otherwise, which carries no gradient.
    """
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    out, lse = _empty_result(query)
    out.zero_()
    lse.fill_(-torch.inf)
    for piece in pieces(mask, tuple(text_lengths), tuple(video_lengths)):
        rows, columns = slice(*piece.rows), slice(*piece.columns)
        for heads in _head_chunks(query, rows.stop - rows.start):
            q, k, v = query[:, heads, rows], key[:, heads, columns], value[:, heads, columns]
            so_far = (out[:, heads, rows], lse[:, heads, rows])
            _merge(*so_far, *_forward(kernel, q, k, v), first=piece.first)
    return out, lse


@torch.library.custom_op(
    "triptych::lse_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "str mask, int[] text_lengths, int[] video_lengths, str kernel) -> (Tensor, Tensor, Tensor)",
)
def lse_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: str,
    text_lengths: list[int],
    video_lengths: list[int],
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; shares of the blocks are added in the tensors' own type.

    Args:
        grad_out: (B, N, L, E), gradient of the output.
        query: As given to :func:`lse_attention`, like all arguments that follow.
        key: (B, N, L, E).
        value: (B, N, L, E).
        out: The merged output.
        lse: The merged log-sum-exp.
        mask: Name of the mask.
        text_lengths: Text tokens of each scene.
        video_lengths: Video tokens of each scene.
        kernel: The kernel that ran forward.
    """
    grad_out, query, key, value = (_rows_contiguous(x) for x in (grad_out, query, key, value))
    grads = (torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))
    for piece in pieces(mask, tuple(text_lengths), tuple(video_lengths)):
        rows, columns = slice(*piece.rows), slice(*piece.columns)
        longest = max(rows.stop - rows.start, columns.stop - columns.start)
        for heads in _head_chunks(query, longest):
            where = ((heads, rows), (heads, columns), (heads, columns))
            q, k, v = (x[:, *w] for x, w in zip((query, key, value), where, strict=True))
            result = (grad_out[:, heads, rows], out[:, heads, rows], lse[:, heads, rows])
            _add(
                [x[:, *w] for x, w in zip(grads, where, strict=True)],
                _backward(kernel, q, k, v, *result),
            )
    return grads


def _head_chunks(query: Tensor, tokens: int) -> Iterator[slice]:
    """Heads to compute together, so that ``tokens`` rows of them stay a small part of the whole."""
    batch, heads, length, _ = query.shape
    whole = query.numel() * query.element_size()
    per_head = max(1, tokens * whole // (heads * length))
    step = max(1, max(_SMALL_BYTES, whole // _LARGEST_SHARE) // per_head)
    if query.device.type == "cpu":
        # the CPU backward has no more threads at work than (sample, head) pairs
        step = max(step, -(-torch.get_num_threads() // batch))
    return (slice(start, min(start + step, heads)) for start in range(0, heads, step))


# these two are functions so that a piece's result is freed before the next piece is computed
def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, first: bool) -> None:
    """Merge a piece's result into what its queries have so far, in place."""
    if first:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    share = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    out += part.to(lse.dtype).sub_(out).mul_(share)
    lse.copy_(torch.logaddexp(lse, part_lse))


def _add(grads: list[Tensor], shares: tuple[Tensor, ...]) -> None:
    for grad, share in zip(grads, shares, strict=True):
        grad += share


def _forward(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One mask-free call: output (B, N, rows, E) and log-sum-exp (B, N, rows)."""
    if kernel == "cpu":
        return _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if kernel == "flash":
        return _ATEN._scaled_dot_product_flash_attention(q, k, v)[:2]
    out, lse = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out, lse.reshape(q.shape[:3])


def _backward(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's own backward, given the merged output and log-sum-exp."""
    if kernel == "cpu":
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False
        )
    # the CUDA kernels read the log-sum-exp as one block of memory
    lse = lse.contiguous()
    unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # random state of dropout
    lengths = (q.shape[2], k.shape[2])
    if kernel == "flash":
        return _ATEN._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, *lengths, 0.0, False, unused, unused
        )
    # torch keeps a cuDNN graph by the layout of q, k and v alone, and that graph expects O and dO
    # laid out as the forward call returns O: in the order of q, without gaps
    out, grad = (torch.empty_like(q).copy_(x) for x in (out, grad))
    if _cudnn_lse_dims(q.device) == 4:
        lse = lse.unsqueeze(-1)
    return _ATEN._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, unused[:1], unused[:1], None, None, None, *lengths, 0.0, False
    )


@lru_cache(maxsize=8)
def _cudnn_lse_dims(device: torch.device) -> int:
    """Whether this torch's cuDNN log-sum-exp is (B, N, L) or (B, N, L, 1); releases differ."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return _ATEN._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


def _rows_contiguous(x: Tensor) -> Tensor:
    """The tensor itself if the E values of a row lie side by side, as all kernels assume."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_result(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = query.shape
    out = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty(batch, heads, tokens, dtype=dtype)


@lse_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_result(query)


@lse_attention_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(_rows_contiguous(x)) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.rest = inputs[3:]


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    return *lse_attention_backward(grad_out, *ctx.saved_tensors, *ctx.rest), *(None,) * 4


lse_attention.register_autograd(_differentiate, setup_context=_save)
