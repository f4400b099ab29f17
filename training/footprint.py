"""How much memory a rank needs, worked out before anything starts.

Legend: L tokens of a sample, D width, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schemas.config.training import TrainingConfig, TrainStageConfig
from training.cost import Tokens, recomputed_layers, width_of
from training.deepspeed_config import deepspeed_config

SAVED_PER_TOKEN = 22
"""Values of width D that a block keeps per token for its backward pass: its input, the results of
its norms (2), the attention's input, Q and K before and after norm and rotation (4), V, what
attention gives before and after its projection (2), the sum with it, the feed-forward's input, its
hidden layer before and after the activation (2 x 4), and its result. Derived from block.py, and
measured in the tests."""

LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed 0.19's default of stage3_max_live_parameters."""


def activation_bytes(
    transformer_config: Mapping[str, Any],
    tokens: Tokens,
    micro_batch_size: int,
    value_bytes: int,
    activation_checkpointing: int,
) -> float:
    """Bytes kept from the forward for the backward pass, at their most; attention not dense.

    A layer that is computed again keeps its input alone, and all it needs while its turn lasts.
    What a kernel needs for itself comes on top.
    """
    width, heads = width_of(transformer_config), int(transformer_config["num_attention_heads"])
    layers = int(transformer_config["num_layers"])
    # mean and deviation of both norms and of those of Q and K, and attention's log-sum-exp, float32
    statistics = 4 * (4 + 5 * heads)
    whole = SAVED_PER_TOKEN * width * value_bytes + statistics
    again = recomputed_layers(layers, activation_checkpointing)
    kept = (layers - again) * whole + again * width * value_bytes
    if again:
        kept += whole - width * value_bytes
    # the last norms and projection keep four values of width D per video token
    last = 4 * width * value_bytes * sum(tokens.video)
    text = transformer_config["text_embed_dim"] * value_bytes * sum(tokens.text)
    return float(micro_batch_size * (kept * tokens.total + last + text))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: on its device, and ``host`` in the CPU's memory where there is offload.

    Attributes:
        weights: As the model computes with them; of ZeRO 3 also the most that is gathered at once.
        gradients: Of the trained weights.
        optimizer: AdamW's two moments, and float32 weights where DeepSpeed keeps them apart.
        average: The moving average of the weights.
        activations: What the backward pass needs (:func:`activation_bytes`).
        buffers: Where DeepSpeed gathers gradients before it sends them: reserved whole, of which a
            CPU gives only what is used.
        host: In the CPU's memory.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    buffers: float
    host: float

    @property
    def device(self) -> float:
        """All that lies on the device."""
        resident = self.weights + self.gradients + self.optimizer + self.average
        return resident + self.activations + self.buffers


def memory_per_rank(
    training: TrainingConfig,
    stage: TrainStageConfig,
    transformer_config: Mapping[str, Any],
    tokens: Tokens,
    parameters: int,
    trainable: int,
) -> Memory:
    """Memory of each of the configured ranks.

    Args:
        training: Ranks, ZeRO stage, offload, type, checkpointing.
        stage: Micro-batch and moving average.
        transformer_config: The transformer's config.
        tokens: Of the longest sample.
        parameters: P.
        trainable: Those of them that are trained.

    Raises:
        ConfigError: The batch does not divide over the ranks.
    """
    zero, value = training.zero_stage, 2 if training.dtype == "bfloat16" else 4
    over = training.world_size
    settings = deepspeed_config(training, stage)["zero_optimization"]
    bucket = settings["reduce_bucket_size"]
    live = settings.get("stage3_max_live_parameters", LIVE_ELEMENTS)
    weights = parameters * value / (over if zero == 3 else 1)
    gathered = min(parameters, live) * value if zero == 3 and over > 1 else 0
    gradients = trainable * value / (over if zero >= 2 else 1)
    own_copy = 4 if zero else 0  # ZeRO keeps float32 weights apart, also where all are float32
    optimizer = (8 + own_copy) * trainable / (over if zero else 1)
    average = 4 * trainable / (over if zero else 1) if stage.ema_decay else 0
    activations = activation_bytes(
        transformer_config,
        tokens,
        stage.micro_batch_size,
        value,
        training.activation_checkpointing,
    )
    host = 0.0
    if training.offload != "none":  # DeepSpeed adds up the gradients there too, in float32
        host += optimizer + average + 4 * trainable / over
        optimizer = average = gradients = 0
    if training.offload == "all":
        host += weights
        weights = 0
        gathered = min(parameters, live) * value
    return Memory(
        weights=weights + gathered,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        activations=activations / training.sequence_parallel,
        buffers=bucket * value if zero else 0,
        host=host,
    )
