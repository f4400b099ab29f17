"""Weights in 8 bits: half the memory of bfloat16, a quarter of float32, and slightly other videos.

Only the weights of linear layers are stored so, one scale per output channel; before a layer
computes, they are brought back to the type of its input. The text encoder and the VAE stay as they
are.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from torch import nn

from schemas.errors import ConfigError


def quantize(model: nn.Module, kind: Literal["int8", "fp8"]) -> None:
    """Store the weights of all linear layers of a model in 8 bits, in place.

    Raises:
        ConfigError: torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise ConfigError(
            "weights in 8 bits need torchao",
            where=f"generation.quantize: {kind}",
            do='pip install "triptych[quantize]", or set generation.quantize to none',
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
