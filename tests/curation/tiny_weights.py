"""Small random or hand-made weights in the official layouts of the optional scorers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

DIM = 24
CLIP: dict[str, Any] = {
    "embed_dim": DIM,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


def write_clip(folder: Path) -> open_clip.CLIP:
    """A random CLIP model, written as model hubs have OpenCLIP's."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**CLIP)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model.eval()


def linear_head(dim: int = DIM, seed: int = 1) -> dict[str, Tensor]:
    """The layout of ``sa_0_4_vit_l_14_linear.pth``."""
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(1, dim, generator=generator), "bias": torch.tensor([5.0])}


def write_detector(path: Path, weights: tuple[float, float, float], *, maps: int = 1) -> Path:
    """A "text detector" that looks at one pixel at a time: sigmoid of a weighted sum of channels.

    ``maps`` other than 1 makes it a network of another kind. Written byte by byte from the field
    numbers of onnx.proto3 (ONNX 1.x, opset 11), for the package ``onnx`` is no dependency.
    """
    weight = np.tile(np.array(weights, "<f4").reshape(1, 3, 1, 1), (maps, 1, 1, 1))
    tensor = b"".join(_number(1, n) for n in weight.shape)
    tensor += _number(2, 1) + _text(8, "w") + _bytes(9, weight.tobytes())
    graph = _bytes(1, _node("Conv", ["x", "w"], "y")) + _bytes(1, _node("Sigmoid", ["y"], "p"))
    graph += _text(2, "tiny") + _bytes(5, tensor)
    graph += _bytes(11, _value("x", 3)) + _bytes(12, _value("p", maps))
    path.write_bytes(_number(1, 7) + _bytes(7, graph) + _bytes(8, _number(2, 11)))
    return path


def _node(kind: str, inputs: list[str], output: str) -> bytes:
    return b"".join(_text(1, i) for i in inputs) + _text(2, output) + _text(4, kind)


def _value(name: str, channels: int) -> bytes:
    sizes = [_number(1, 1), _number(1, channels), _text(2, "height"), _text(2, "width")]
    shape = b"".join(_bytes(1, size) for size in sizes)
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, 1) + _bytes(2, shape)))


def _varint(value: int) -> bytes:
    head = [0x80 | value >> shift & 0x7F for shift in range(0, value.bit_length() - 7, 7)]
    return bytes([*head, value >> 7 * len(head)])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())
