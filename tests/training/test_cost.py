"""FLOPs and memory against published figures, torch's own counters and plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from schemas.config.training import LoraConfig, TrainingConfig, TrainStageConfig
from schemas.errors import CheckpointError
from tests.training.models import SHAPES
from training.cost import (
    Tokens,
    flops_per_step,
    layer_flops,
    measure_rate,
    outside_flops,
    read_model,
    recomputed_layers,
    step_flops,
)
from training.footprint import activation_bytes, memory_per_rank
from training.masks import dense_mask
from training.transformer import Mask2DiTTransformer3DModel

# CogVideoX-5B on three scenes of 49 frames at 480 x 720
FIVE_B = {
    **{"num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42, "patch_size": 2},
    **{"patch_size_t": None, "time_embed_dim": 512, "text_embed_dim": 4096, "in_channels": 16},
    **{"out_channels": 16, "mask": "v2"},
}
SCENES = ([13, 13, 13], 60, 90, 226)
FIVE_B_TOKENS = Tokens.of(FIVE_B, *SCENES)


def small(**changes: object) -> Mask2DiTTransformer3DModel:
    values = {
        **SHAPES["5b"],
        **{"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3},
        **{"text_embed_dim": 64, "time_embed_dim": 128, "attention_backend": "lse", **changes},
    }
    torch.manual_seed(0)
    return Mask2DiTTransformer3DModel(**values).train()


def inputs(model: Mask2DiTTransformer3DModel, batch: int = 1):
    """Three scenes of 5, 7 and 3 latent frames of 12 x 16, 20 tokens of text each."""
    video = torch.randn(batch, 15, 4, 12, 16)
    text = torch.randn(batch, 3, 20, model.config.text_embed_dim)
    return video, text, torch.zeros(batch, dtype=torch.long), [5, 7, 3]


def test_a_layer_of_the_5b_model():
    assert FIVE_B_TOKENS.video == (17_550,) * 3
    layer = layer_flops(FIVE_B, FIVE_B_TOKENS)
    assert layer.linear == pytest.approx(12.1e12, rel=5e-3)
    assert layer.attention == 4 * 52_650**2 * 3072 == pytest.approx(34.1e12, rel=2e-3)
    own_text = 4 * 3072 * 52_650 * 226  # video to its own text
    text_rows = 4 * 3072 * 3 * 226 * (226 + 17_550)  # text to its own scene
    assert layer.text == own_text + text_rows
    assert (own_text, text_rows) == (
        pytest.approx(0.15e12, rel=3e-2),
        pytest.approx(0.15e12, rel=3e-2),
    )


def test_a_step_of_the_5b_model():
    forward = layer_flops(FIVE_B, FIVE_B_TOKENS) * 42 + outside_flops(FIVE_B, FIVE_B_TOKENS)
    assert forward.total == pytest.approx(1.95e15, rel=3e-3)
    assert (forward.attention + forward.text) / forward.total == pytest.approx(0.74, abs=5e-3)
    again = flops_per_step(FIVE_B, *SCENES, 1, 1, recompute=True)
    assert again == pytest.approx(8.5e15, rel=3e-3)
    assert flops_per_step(FIVE_B, *SCENES, 8, 1) == pytest.approx(8 * 3 * forward.total)
    assert recomputed_layers(42, 0) == 0
    assert recomputed_layers(42, 1) == 42
    assert recomputed_layers(5, 2) == 3
    layer = layer_flops(FIVE_B, FIVE_B_TOKENS).total
    none = step_flops(FIVE_B, FIVE_B_TOKENS, 2, 0, recompute=True).total
    some = step_flops(FIVE_B, FIVE_B_TOKENS, 2, 4, recompute=True).total
    assert some - none == pytest.approx(2 * 11 * layer)


@pytest.mark.parametrize("shape", ["2b", "5b", "1.5"])
def test_linear_layers_as_torch_counts_them(shape):
    model = small(**SHAPES[shape], attention_backend="lse")
    video, text, timestep, _ = inputs(model)
    frames = [4, 6, 4]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(video[:, :14], text, timestep, frames)
    tokens = Tokens.of(model.config, frames, 12, 16, 20)
    ours = layer_flops(model.config, tokens) * model.config.num_layers
    ours = ours + outside_flops(model.config, tokens)
    assert counter.get_total_flops() == ours.linear  # the merged attention is not in torch's list


@pytest.mark.parametrize("mask", ["v1", "v2", "v3", "v4", "v5", "scene_causal"])
def test_attention_counts_what_the_mask_lets_through(mask):
    tokens = Tokens(text=(3, 3), video=(5, 7))
    config = {**SHAPES["5b"], "mask": mask}
    dense = dense_mask(mask, tokens.text, tokens.video)
    pairs = tokens.total**2 if dense is None else int(dense.sum())
    of_video = 12**2 if dense is None else int(dense[6:, 6:].sum())
    layer = layer_flops(config, tokens)
    assert (layer.attention, layer.text) == (4 * 32 * of_video, 4 * 32 * (pairs - of_video))


def saved_bytes(model: Mask2DiTTransformer3DModel, batch: int) -> int:
    """Bytes of all that autograd keeps after a forward pass, weights and inputs left out."""
    given = inputs(model, batch)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *given[:3])}
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # or another would take its address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(*given)
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(("shape", "batch"), [("5b", 2), ("2b", 1)])
def test_activations_as_autograd_keeps_them(shape, batch):
    model = small(use_rotary_positional_embeddings=shape == "5b")
    tokens = Tokens.of(model.config, [5, 7, 3], 12, 16, 20)
    predicted = activation_bytes(model.config, tokens, batch, 4, 0)
    assert saved_bytes(model, batch) == pytest.approx(predicted, rel=0.15)


def test_activations_with_layers_computed_again():
    tokens = Tokens(text=(0,), video=(100,))
    config = {**SHAPES["5b"], "num_layers": 6}
    whole, second, every = (activation_bytes(config, tokens, 1, 4, k) for k in (0, 2, 1))
    model = small(num_layers=6)
    given = Tokens.of(model.config, [5, 7, 3], 12, 16, 20)
    model.checkpoint_every = 1
    width = 4 * 128 * given.total  # a float32 value of width D for every token
    kept = activation_bytes(model.config, given, 1, 4, 1)
    one_block = activation_bytes({**model.config, "num_layers": 1}, given, 1, 4, 0)
    assert kept == pytest.approx(one_block + 5 * width)
    # the block whose turn it is comes and goes in the backward pass
    assert saved_bytes(model, 1) == pytest.approx(kept - 21 * width, rel=0.15)
    assert whole > second > every


def test_memory_of_a_rank_by_zero_stage():
    parameters = 1_000_000_000
    stage = TrainStageConfig(batch_size=8, micro_batch_size=1, ema_decay=0.99)

    def memory(**changes: object):
        values = {"dtype": "bfloat16", "num_processes": 8, **changes}
        training = TrainingConfig(**values)  # type: ignore[arg-type]
        return memory_per_rank(training, stage, FIVE_B, FIVE_B_TOKENS, parameters, parameters)

    giga = {k: memory(zero_stage=k) for k in (1, 2, 3)}
    found = {
        k: tuple(x / 1e9 for x in (m.weights, m.gradients, m.optimizer, m.average))
        for k, m in giga.items()
    }
    assert found == {
        1: (2.0, 2.0, 1.5, 0.5),
        2: (2.0, 0.25, 1.5, 0.5),
        3: (2.25, 0.25, 1.5, 0.5),  # its part, and what is gathered at once
    }
    assert giga[2].buffers == 2 * 100_000_000  # bfloat16
    offloaded = memory(zero_stage=2, offload="optimizer")
    assert (offloaded.optimizer, offloaded.gradients, offloaded.average) == (0, 0, 0)
    assert offloaded.host == pytest.approx(1.5e9 + 0.5e9 + 0.5e9)
    everything = memory(zero_stage=3, offload="all")
    assert everything.host == pytest.approx(offloaded.host + 0.25e9)
    halves = memory(sequence_parallel=2)
    assert halves.activations == pytest.approx(memory().activations / 2)
    plain = memory(zero_stage=0, dtype="float32")
    assert (plain.weights, plain.gradients, plain.optimizer) == (4e9, 4e9, 8e9)
    assert (plain.average, plain.buffers) == (4e9, 0)
    parts = (m := giga[3]).weights + m.gradients + m.optimizer + m.average
    assert m.device == parts + m.activations + m.buffers


def test_parameters_of_the_5b_model_and_what_is_trained(tmp_path):
    with torch.device("meta"):
        Mask2DiTTransformer3DModel(
            **{k: v for k, v in FIVE_B.items() if k != "mask"},
            use_rotary_positional_embeddings=True,
        ).save_config(tmp_path / "transformer")
    model = read_model(tmp_path, TrainingConfig())
    d, m, text, patch = 3072, 512, 4096, 64
    norms = 2 * ((m + 1) * 6 * d + 2 * d)
    attention = 4 * (d + 1) * d + 2 * 2 * 64
    forward = (d + 1) * 4 * d + (4 * d + 1) * d
    outside = (patch + 1) * d + (text + 1) * d + (d + 1) * m + (m + 1) * m
    outside += 2 * d + (m + 1) * 2 * d + 2 * d + (d + 1) * patch
    assert model.parameters == 42 * (norms + attention + forward) + outside
    assert model.trainable == model.parameters
    assert model.config["mask"] == "v2"
    only = read_model(tmp_path, TrainingConfig(trainable=(r"attn1\.to_q\.weight$",)))
    assert (only.parameters, only.trainable) == (model.parameters, 42 * d * d)
    lora = read_model(tmp_path, TrainingConfig(lora=LoraConfig(rank=8)))
    assert lora.trainable == 42 * 4 * 2 * 8 * d
    assert lora.parameters == model.parameters + lora.trainable
    with pytest.raises(CheckpointError, match="config cannot be read"):
        read_model(tmp_path / "nowhere", TrainingConfig())


def test_rate_of_this_machine():
    config = small().config
    rate = measure_rate(config, [5, 7, 3], 12, 16, 20, torch.float32, torch.device("cpu"))
    assert rate.tokens == 15 * 48 + 60  # small enough to be measured whole
    work = flops_per_step({**config, "num_layers": 1}, [5, 7, 3], 12, 16, 20, 1, 0, recompute=True)
    assert rate.flops_per_s * rate.seconds == pytest.approx(work)
    assert 1e8 < rate.flops_per_s < 1e15
    short = measure_rate(config, [5, 7, 3], 12, 16, 20, torch.float32, torch.device("cpu"), 1e-9)
    assert short.tokens == 3 * 4 + 3 * 16
