"""What a training step costs, worked out before anything starts: FLOPs and time.

A product of an (n, k) and a (k, m) matrix counts 2nkm FLOPs; norms, gates and rotations count
nothing. All numbers are for every weight being trained; with adapters a step takes fewer.

Legend: S scenes, F latent frames of a scene, H W latent height width, L video tokens, T text tokens
of a scene, D width, M width of the time embedding, N heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from schemas.config.training import TrainingConfig
from schemas.errors import CheckpointError
from training.adapters import choose_trainable
from training.masks import group_table, groups
from training.transformer import Mask2DiTTransformer3DModel

FLASH_BACKWARD = 2.5
"""Backward over forward FLOPs of flash attention: five products for two, as it forms the scores
again. Source: FlashAttention-2 (arXiv 2307.08691) section 4.1."""


@dataclass(frozen=True)
class Tokens:
    """Length of each scene's text and video in the sequence of one sample."""

    text: tuple[int, ...]
    video: tuple[int, ...]

    @classmethod
    def of(
        cls,
        transformer_config: Mapping[str, Any],
        scene_frames: Sequence[int],
        height: int,
        width: int,
        text_tokens: int,
    ) -> Tokens:
        """The tokens of scenes of F latent frames of H x W each (a model of pairs halves F)."""
        patch = transformer_config["patch_size"]
        grid = (height // patch) * (width // patch)
        together = transformer_config["patch_size_t"] or 1
        video = tuple(frames // together * grid for frames in scene_frames)
        return cls((text_tokens,) * len(video), video)

    @property
    def total(self) -> int:
        """Length of the sequence."""
        return sum(self.text) + sum(self.video)


@dataclass(frozen=True)
class Flops:
    """FLOPs by what they are spent on.

    Attributes:
        linear: Layers with weights.
        attention: Attention of video to video.
        text: All other attention that the mask lets through.
    """

    linear: float
    attention: float
    text: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.text

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.linear * factor, self.attention * factor, self.text * factor)

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linear + other.linear, self.attention + other.attention, self.text + other.text
        )


def layer_flops(transformer_config: Mapping[str, Any], tokens: Tokens) -> Flops:
    """Forward FLOPs of one layer on one sample; attention as the mask lets through, exactly."""
    width = width_of(transformer_config)
    lengths = (*tokens.text, *tokens.video)
    kinds = groups(len(tokens.text))
    table = group_table(transformer_config["mask"], len(tokens.text))
    video_pairs = text_pairs = 0
    for query, row, rows in zip(kinds, table, lengths, strict=True):
        for key, allowed, columns in zip(kinds, row, lengths, strict=True):
            if allowed and query.video and key.video:
                video_pairs += rows * columns
            elif allowed:
                text_pairs += rows * columns
    # projections around attention: 8 D^2; feed-forward: 16 D^2; two modulations: 12 D M each
    per_sample = 24 * width * transformer_config["time_embed_dim"]
    return Flops(
        24.0 * width**2 * tokens.total + per_sample,
        4.0 * width * video_pairs,
        4.0 * width * text_pairs,
    )


def outside_flops(transformer_config: Mapping[str, Any], tokens: Tokens) -> Flops:
    """Forward FLOPs of all that is not a layer: embeddings, the last modulation and projection."""
    c, width = transformer_config, width_of(transformer_config)
    patch = (c["patch_size_t"] or 1) * c["patch_size"] ** 2
    embedded = 2 * width * patch * (c["in_channels"] + c["out_channels"]) * sum(tokens.video)
    embedded += 2 * width * c["text_embed_dim"] * sum(tokens.text)
    times = 2 * 2 * (width * c["time_embed_dim"] + c["time_embed_dim"] ** 2)  # of t, and of t = 0
    return Flops(float(embedded + times + 4 * width * c["time_embed_dim"]), 0.0, 0.0)


def step_flops(
    transformer_config: Mapping[str, Any],
    tokens: Tokens,
    batch_size: int,
    activation_checkpointing: int,
    *,
    recompute: bool,
) -> Flops:
    """FLOPs of an optimizer step over all ranks.

    Args:
        transformer_config: The transformer's config, with the mask.
        tokens: Of one sample; all are taken as equal.
        batch_size: Samples of the step.
        activation_checkpointing: Every how many layers one is computed again; 0 = none.
        recompute: Count what is computed a second time: layers, and the scores in the backward
            pass of flash attention. For predicting time. Without it the count is that of model
            FLOPs utilisation, where backward is twice forward.

    Source: PaLM (arXiv 2204.02311) appendix B for what utilisation counts.
    """
    layers = int(transformer_config["num_layers"])
    layer = layer_flops(transformer_config, tokens)
    outside = outside_flops(transformer_config, tokens)
    if not recompute:
        return (layer * layers + outside) * (3 * batch_size)
    backward = Flops(
        2 * layer.linear, FLASH_BACKWARD * layer.attention, FLASH_BACKWARD * layer.text
    )
    again = recomputed_layers(layers, activation_checkpointing)
    done = (layer + backward) * layers + layer * again + outside * 3
    return done * batch_size


def flops_per_step(
    transformer_config: Mapping[str, Any],
    scene_frames: Sequence[int],
    height: int,
    width: int,
    text_tokens: int,
    batch_size: int,
    activation_checkpointing: int,
    *,
    recompute: bool = False,
) -> float:
    """Total of :func:`step_flops` for scenes of ``scene_frames`` latent frames of H x W."""
    tokens = Tokens.of(transformer_config, scene_frames, height, width, text_tokens)
    return step_flops(
        transformer_config, tokens, batch_size, activation_checkpointing, recompute=recompute
    ).total


@dataclass(frozen=True)
class Model:
    """A transformer without its weights.

    Attributes:
        config: Its whole config, with the configured mask.
        parameters: Number of its weights.
        trainable: Number of those that are trained.
    """

    config: dict[str, Any]
    parameters: int
    trainable: int


def read_skeleton(
    folder: Path, settings: Mapping[str, Any] | None = None
) -> Mask2DiTTransformer3DModel:
    """The transformer of a model folder without its weights, which stay on the meta device.

    Args:
        folder: Model folder.
        settings: What replaces its own config.

    Raises:
        CheckpointError: The config cannot be read.
        ConfigError: The config is of a variant that is not supported.
    """
    cls = cast("Any", Mask2DiTTransformer3DModel)
    try:
        config = cls.load_config(folder / "transformer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the transformer's config cannot be read",
            where=folder / "transformer",
            found=error,
            do="give a whole model folder in diffusers' CogVideoX layout",
        ) from error
    with torch.device("meta"):
        return cls.from_config({**config, **(settings or {})})


def read_model(folder: Path, training: TrainingConfig) -> Model:
    """Read the transformer's config of a model folder, and count its weights; loads none.

    Raises:
        CheckpointError: The config cannot be read.
        ConfigError: The config is of a variant that is not supported, or ``trainable`` or ``lora``
            name nothing.
    """
    model = read_skeleton(folder, training.model.scene_settings)
    with torch.device("meta"):  # adapters are made here
        trainable = choose_trainable(model, training)
    parameters = sum(p.numel() for p in model.parameters())
    return Model(dict(model.config), parameters, trainable)


@dataclass(frozen=True)
class Rate:
    """What one device did in a measurement."""

    flops_per_s: float
    tokens: int
    seconds: float


def measure_rate(
    transformer_config: Mapping[str, Any],
    scene_frames: Sequence[int],
    height: int,
    width: int,
    text_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    enough_s: float = 0.25,
) -> Rate:
    """FLOP/s of a device on a model of these widths with one layer, forward and backward.

    The scenes grow, from a few tokens, until a pass takes ``enough_s`` or they are whole; so it
    takes seconds at most, and attention has its share as far as that allows.
    """
    config = {**transformer_config, "num_layers": 1}
    known: dict[str, Any] = {k: v for k, v in config.items() if not k.startswith("_")}
    # not the model's own to(), which warns of weights that are to stay float32 though it has none
    model = torch.nn.Module.to(Mask2DiTTransformer3DModel(**known), device, dtype)
    patch, together = int(config["patch_size"]), int(config["patch_size_t"] or 1)
    share = 1
    while True:
        scenes = [min(share * together, whole) for whole in scene_frames]
        h, w = min(2 * share * patch, height), min(2 * share * patch, width)
        words = min(16 * share, text_tokens)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        video = torch.randn(1, sum(scenes), config["in_channels"], h, w, **made)
        text = torch.randn(1, len(scenes), words, config["text_embed_dim"], **made)
        seconds = min(_timed_pass(model, video, text, scenes) for _ in range(2))
        whole = (scenes, h, w, words) == (list(scene_frames), height, width, text_tokens)
        if seconds >= enough_s or whole:
            break
        share *= 2
    flops = flops_per_step(config, scenes, h, w, words, 1, 0, recompute=True)
    return Rate(flops / seconds, Tokens.of(config, scenes, h, w, words).total, seconds)


def _timed_pass(model: Any, video: torch.Tensor, text: torch.Tensor, scenes: list[int]) -> float:
    timestep = torch.zeros(1, dtype=torch.long, device=video.device)
    started = time.perf_counter()
    model(video, text, timestep, scenes).float().square().mean().backward()
    if video.device.type == "cuda":
        torch.cuda.synchronize(video.device)
    return time.perf_counter() - started


def recomputed_layers(layers: int, every: int) -> int:
    """Layers that are computed again in the backward pass."""
    return math.ceil(layers / every) if every else 0


def width_of(transformer_config: Mapping[str, Any]) -> int:
    """D."""
    return transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
