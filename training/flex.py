"""FlexAttention, with a block mask derived from the same predicate as every other form of a mask.

It always runs compiled: uncompiled, FlexAttention holds the scores of all pairs of tokens.

Legend: B batch, N heads, L tokens, E width of a head, K blocks of tokens.
"""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from training.masks import group_of_token, group_table

BLOCK = 128  # FlexAttention's own default block of queries and of keys


def why_no_flex(device: torch.device, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """What keeps FlexAttention from running such tensors, or None."""
    if device.type == "cpu":
        if needs_grad:
            return "FlexAttention has no backward pass on CPU"
        if dtype == torch.float64:
            return "FlexAttention on CPU knows no float64"
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "FlexAttention on CPU needs a C++ compiler (g++, or the one named by CXX)"
        return None
    if device.type != "cuda":
        return f"FlexAttention is not tried on {device.type}"
    return None if find_spec("triton") else "FlexAttention on CUDA needs the triton package"


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: str,
    text_lengths: tuple[int, ...],
    video_lengths: tuple[int, ...],
) -> Tensor:
    """Masked attention of (B, N, L, E) tensors of one type and device.

    Compiles once per shape on CPU. More shapes than torch's recompile limit (8) are an error of
    torch's, never a quiet return to uncompiled code.
    """
    blocks = block_mask(mask, text_lengths, video_lengths, query.device)
    if torch.compiler.is_compiling():
        return _output(flex_attention(query, key, value, block_mask=blocks))
    return _output(_compiled(query.device.type)(query, key, value, block_mask=blocks))


@lru_cache(maxsize=2)
def _compiled(device_type: str) -> Any:
    # inductor's C++ for lengths left open does not compile (torch 2.15), so CPU fixes them
    return torch.compile(
        flex_attention, fullgraph=True, dynamic=False if device_type == "cpu" else None
    )


def _output(result: Any) -> Tensor:
    assert isinstance(result, Tensor)  # a tuple only where more than the output is asked for
    return result


@lru_cache(maxsize=8)
def block_mask(
    name: str,
    text_lengths: tuple[int, ...],
    video_lengths: tuple[int, ...],
    device: torch.device,
) -> BlockMask:
    """The mask for FlexAttention; takes memory for K x K blocks, never for L x L tokens.

    Raises:
        ConfigError: No mask is called so.
    """
    lengths = (*text_lengths, *video_lengths)
    tokens = sum(lengths)
    table = torch.tensor(group_table(name, len(text_lengths)), device=device)
    group = group_of_token(text_lengths, video_lengths, device)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[group[query], group[key]]

    # The last block may be filled up with tokens of one more group, which see and are seen by none.
    blocks = -(-tokens // BLOCK)
    padded = torch.cat([group, group.new_full((blocks * BLOCK - tokens,), len(table))])
    holds = torch.zeros(blocks, len(table) + 1, device=device)
    holds.scatter_(1, padded.view(blocks, BLOCK), 1.0)
    allowed = torch.zeros(len(table) + 1, len(table) + 1, device=device)
    allowed[:-1, :-1] = table
    some = holds @ allowed @ holds.T > 0
    every = holds @ (1 - allowed) @ holds.T == 0
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are chosen in each row, and their numbers first; with B = N = 1 in front."""
    count = chosen.sum(1, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return count[None, None], order[None, None]
