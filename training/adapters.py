"""Which weights are trained: all, those whose names match, or low-rank adapters (LoRA, by peft)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from schemas.config.training import LoraConfig, TrainingConfig
from schemas.errors import ConfigError

ADAPTER = "default"


def choose_trainable(model: nn.Module, training: TrainingConfig) -> int:
    """Freeze what is not trained, and put the adapters in; returns the number of trained values.

    Adapters start as nothing: the second factor is zero, the first is drawn from a fixed seed.

    Raises:
        ConfigError: No weight, or no layer, is named as the config says.
    """
    if training.lora is not None:
        add_lora(model, training.lora)
    elif training.trainable:
        patterns = [_compiled(text) for text in training.trainable]
        names = [name for name, _ in model.named_parameters()]
        for pattern in patterns:
            if not any(pattern.search(name) for name in names):
                raise ConfigError(
                    "a pattern names no weight of the model",
                    where="training.trainable",
                    found=pattern.pattern,
                    expected=f"a part of names such as {', '.join(names[:3])}",
                )
        for name, p in model.named_parameters():
            p.requires_grad_(any(pattern.search(name) for pattern in patterns))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(
            "not a regular expression", where="training.trainable", found=f"{text}: {error}"
        ) from error


def add_lora(model: nn.Module, lora: LoraConfig) -> None:
    """Give the layers named in the config a low-rank adapter, and freeze all else.

    Raises:
        ConfigError: A name fits no linear layer.
    """
    from peft import LoraConfig as PeftConfig  # takes seconds; most runs have no adapters
    from peft import inject_adapter_in_model

    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ConfigError(
                "an adapter is wanted for a layer that is not there",
                where="training.lora.targets",
                found=target,
                expected=f"the end of a linear layer's name, e.g. {', '.join(linear[-3:])}",
            )
    config = PeftConfig(
        r=lora.rank, lora_alpha=cast("Any", lora.alpha), target_modules=[*lora.targets]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, model, ADAPTER)


def merge_lora(model: nn.Module, lora: LoraConfig, adapters: Mapping[str, Tensor]) -> None:
    """Add trained adapters to a model's own weights; its layers stay as they were.

    Args:
        model: The model the training started from, without adapters.
        lora: The config they were trained with.
        adapters: The trained tensors, by their names in training.
    """
    scale = lora.alpha / lora.rank
    weights = dict(model.named_parameters())
    end = f".lora_A.{ADAPTER}.weight"
    for name, first in adapters.items():
        if name.endswith(end):
            layer = name.removesuffix(end)
            second = adapters[f"{layer}.lora_B.{ADAPTER}.weight"]
            weight = weights[f"{layer}.weight"]
            exact = weight.data.float() + scale * (second.float() @ first.float())
            weight.data.copy_(exact)
