"""ViCLIP once more, slowly: one clip or caption at a time, one head at a time, in float64.

Written from the description of the model (InternVid, section on ViCLIP, and the names of the
official weights); it shares nothing with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)

State = Mapping[str, Tensor]


def clip_vector(state: State, frames: Tensor) -> Tensor:
    """(8, H, W, 3) uint8 to the unit vector (D,)."""
    w = {k.removeprefix("vision_encoder."): v.double() for k, v in state.items()}
    kernel = w["conv1.weight"][:, :, 0]  # (width, 3, patch, patch)
    patch = kernel.shape[-1]
    sequence = [w["class_embedding"] + w["positional_embedding"][0]]
    for t, frame in enumerate(frames):
        pixels = (frame.double() / 255 - MEAN) / STD
        place = 1
        for top in range(0, frame.shape[0], patch):
            for left in range(0, frame.shape[1], patch):
                square = pixels[top : top + patch, left : left + patch].permute(2, 0, 1)
                token = (kernel * square).sum((1, 2, 3))
                token = token + w["positional_embedding"][place]
                sequence.append(token + w["temporal_positional_embedding"][0, t])
                place += 1
    x = norm(torch.stack(sequence), w, "ln_pre")
    x = blocks(x, w, causal=False)
    return unit(norm(x[0], w, "ln_post") @ w["proj"])


def text_vector(state: State, tokens: list[int]) -> Tensor:
    """32 token ids, zeros after the end of the text, to the unit vector (D,)."""
    w = {k.removeprefix("text_encoder."): v.double() for k, v in state.items()}
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    x = norm(blocks(x, w, causal=True), w, "ln_final")
    end = tokens.index(max(tokens))
    return unit(x[end] @ w["text_projection"])


def blocks(x: Tensor, w: State, *, causal: bool) -> Tensor:
    number = 0
    while f"transformer.resblocks.{number}.ln_1.weight" in w:
        block = f"transformer.resblocks.{number}"
        x = x + attention(norm(x, w, f"{block}.ln_1"), w, f"{block}.attn", causal)
        hidden = affine(norm(x, w, f"{block}.ln_2"), w, f"{block}.mlp.c_fc")
        hidden = hidden * (1 / (1 + torch.exp(-1.702 * hidden)))
        x = x + affine(hidden, w, f"{block}.mlp.c_proj")
        number += 1
    return x


def attention(x: Tensor, w: State, name: str, causal: bool) -> Tensor:
    width = x.shape[1]
    mixed = x @ w[f"{name}.in_proj_weight"].T + w[f"{name}.in_proj_bias"]
    heads = []
    for start in range(0, width, 64):
        q, k, v = (mixed[:, i * width + start : i * width + start + 64] for i in range(3))
        logits = q @ k.T / math.sqrt(64)
        if causal:
            later = torch.ones_like(logits, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(later, -math.inf)
        weights = torch.exp(logits - logits.amax(1, keepdim=True))
        heads.append(weights / weights.sum(1, keepdim=True) @ v)
    return affine(torch.cat(heads, 1), w, f"{name}.out_proj")


def norm(x: Tensor, w: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def affine(x: Tensor, w: State, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).sum())


def names_and_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """All names and shapes of an official checkpoint: ``"B/16"``, ``"L/14"`` or ``"tiny"``."""
    patch, grid, width, layers, text, text_layers, dim = {
        "B/16": (16, 14, 768, 12, 512, 12, 512),
        "L/14": (14, 16, 1024, 24, 768, 12, 768),
        "tiny": (8, 3, 128, 2, 64, 2, 32),
    }[size]
    found: dict[str, tuple[int, ...]] = {
        "temp": (),
        "vision_encoder.conv1.weight": (width, 3, 1, patch, patch),
        "vision_encoder.class_embedding": (width,),
        "vision_encoder.positional_embedding": (grid * grid + 1, width),
        "vision_encoder.temporal_positional_embedding": (1, 8, width),
        "vision_encoder.ln_pre.weight": (width,),
        "vision_encoder.ln_pre.bias": (width,),
        "vision_encoder.ln_post.weight": (width,),
        "vision_encoder.ln_post.bias": (width,),
        "vision_encoder.proj": (width, dim),
        "text_encoder.token_embedding.weight": (49408, text),
        "text_encoder.positional_embedding": (32, text),
        "text_encoder.ln_final.weight": (text,),
        "text_encoder.ln_final.bias": (text,),
        "text_encoder.text_projection": (text, dim),
    }
    for encoder, count, w in (("vision", layers, width), ("text", text_layers, text)):
        for i in range(count):
            block = f"{encoder}_encoder.transformer.resblocks.{i}"
            found |= {
                f"{block}.attn.in_proj_weight": (3 * w, w),
                f"{block}.attn.in_proj_bias": (3 * w,),
                f"{block}.attn.out_proj.weight": (w, w),
                f"{block}.attn.out_proj.bias": (w,),
                f"{block}.ln_1.weight": (w,),
                f"{block}.ln_1.bias": (w,),
                f"{block}.mlp.c_fc.weight": (4 * w, w),
                f"{block}.mlp.c_fc.bias": (4 * w,),
                f"{block}.mlp.c_proj.weight": (w, 4 * w),
                f"{block}.mlp.c_proj.bias": (w,),
                f"{block}.ln_2.weight": (w,),
                f"{block}.ln_2.bias": (w,),
            }
    return found


def drawn(size: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in names_and_shapes(size).items():
        values = torch.randn(shape, generator=generator)
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        if name.endswith(("conv1.weight", "embedding")):
            scale = 0.3
        state[name] = values * scale + (1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    return state
