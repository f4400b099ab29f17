import pytest
import torch
from safetensors.torch import load_file

from schemas.config.training import LoraConfig, TrainingConfig
from schemas.errors import CheckpointError, ConfigError
from tests.training.models import inputs, model
from tests.training.states import cut
from training.adapters import choose_trainable, merge_lora
from training.base_model import load_components
from training.checkpoints import Saver
from training.export import LORA_FILE, export_checkpoint
from training.job import Job
from training.weights import load_transformer
from training.zero_state import KINDS, MovingAverage, trained


def job_of(ground, **training) -> Job:
    config = ground.config.training.model_copy(update=training)
    return Job(
        stage="sft",
        training=config,
        workspace=ground.workspace.root,
        manifest=ground.manifest,
        init_model=ground.base,
        run_dir=ground.workspace.root / "runs" / "sft-test",
        samples="0",
        manifest_sha256="abc",
        init_sha256="def",
    )


def checkpoint(folder, weights, ranks, shift=None):
    """The weights, and with ``shift`` an average that is higher by that much."""
    values = {kind: dict(weights) for kind in KINDS}
    savers = [Saver(folder, rank, ranks, 2, 0) for rank in range(ranks)]
    for rank, saver in enumerate(savers):
        state = cut(values, rank, ranks)
        average = None
        if shift is not None:
            average = MovingAverage(state, 0.9)
            for tensor in average.tensors:
                tensor += shift
        saver.start(40, state, average, {"world_size": ranks, "zero_stage": 2})
    for saver in savers:
        saver.wait()
    return folder / "step_00000040"


@pytest.fixture(scope="module")
def changed(ground):
    """The base model's weights, each moved a little."""
    torch.manual_seed(3)
    transformer = load_transformer(ground.base)
    return {k: p.data + 0.1 * torch.randn(p.shape) for k, p in transformer.named_parameters()}


def test_a_checkpoint_of_three_ranks_becomes_a_whole_model_folder(ground, changed, tmp_path):
    step = checkpoint(tmp_path / "checkpoints", changed, ranks=3)
    target = export_checkpoint(job_of(ground), step, tmp_path / "model")
    loaded = load_components(target).transformer
    for name, p in loaded.named_parameters():
        assert torch.equal(p.data, changed[name]), name
    assert loaded.config.mask == ground.config.training.model.mask
    card = (target / "README.md").read_text()
    for wanted in ("step 40 of 60", "`abc`", "`def`", "`sft.parquet`", "conditional_p: 0.5"):
        assert wanted in card
    assert str(ground.workspace.root) not in card
    with pytest.raises(CheckpointError, match="no moving average"):
        export_checkpoint(job_of(ground), step, tmp_path / "model", average=True)


def test_the_average_is_exported_where_there_is_one(ground, changed, tmp_path):
    step = checkpoint(tmp_path / "checkpoints", changed, ranks=2, shift=1.0)
    target = export_checkpoint(job_of(ground), step, tmp_path / "model")
    loaded = load_transformer(target)
    name = "proj_out.weight"
    assert torch.equal(dict(loaded.named_parameters())[name].data, changed[name] + 1.0)
    export_checkpoint(job_of(ground), step, tmp_path / "model", average=False)
    assert torch.equal(dict(load_transformer(target).named_parameters())[name].data, changed[name])


def test_it_may_be_stored_in_half_precision_and_in_small_files(ground, changed, tmp_path):
    step = checkpoint(tmp_path / "checkpoints", changed, ranks=1)
    target = export_checkpoint(
        job_of(ground), step, tmp_path / "model", dtype="float16", max_shard_mb=1
    )
    files = [*(target / "transformer").glob("*.safetensors")]
    largest = max(p.numel() for p in changed.values()) * 2
    assert len(files) > 1
    assert all(f.stat().st_size <= max(1e6, largest) + 1e4 for f in files)
    for name, p in load_transformer(target).named_parameters():
        assert torch.equal(p.data, changed[name].half().float()), name


def test_weights_that_were_not_trained_come_from_the_base_model(ground, changed, tmp_path):
    part = {k: v for k, v in changed.items() if "norm_out" in k}
    step = checkpoint(tmp_path / "checkpoints", part, ranks=1)
    target = export_checkpoint(job_of(ground), step, tmp_path / "model")
    base = dict(load_transformer(ground.base).named_parameters())
    for name, p in load_transformer(target).named_parameters():
        assert torch.equal(p.data, part.get(name, base[name].data)), name

    odd = checkpoint(tmp_path / "other", {"nothing.weight": torch.ones(3)}, ranks=1)
    with pytest.raises(CheckpointError, match=r"nothing\.weight"):
        export_checkpoint(job_of(ground), odd, tmp_path / "model")


LORA = LoraConfig(rank=3, alpha=6.0, targets=("to_q", "to_out.0"))


def with_adapters(made, std):
    training = TrainingConfig(lora=LORA)
    choose_trainable(made, training)
    torch.manual_seed(5)
    for p in trained(made).values():
        torch.nn.init.normal_(p, std=std)
    return made


def test_merged_adapters_compute_what_they_did_apart():
    video, text, timestep = inputs(batch=1)
    adapted = with_adapters(model("5b"), std=0.3)
    assert all(".lora_" in name for name in trained(adapted))
    assert len(trained(adapted)) == 2 * 2 * 2  # two factors, two layers, two blocks
    merged = model("5b")
    before = merged(video, text, timestep, [3, 3, 3])
    merge_lora(merged, LORA, {k: p.data for k, p in trained(adapted).items()})
    with torch.no_grad():
        one, other = (m(video, text, timestep, [3, 3, 3]) for m in (adapted, merged))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (one - before).abs().max() > 0.01


def test_adapters_start_as_nothing_and_from_one_seed():
    video, text, timestep = inputs(batch=1)
    plain, adapted, again = model("5b"), model("5b"), model("5b")
    choose_trainable(adapted, TrainingConfig(lora=LORA))
    torch.manual_seed(99)
    choose_trainable(again, TrainingConfig(lora=LORA))
    with torch.no_grad():
        expected = plain(video, text, timestep, [3, 3, 3])
        assert torch.equal(adapted(video, text, timestep, [3, 3, 3]), expected)
    assert all(torch.equal(p, trained(again)[k]) for k, p in trained(adapted).items())


def test_a_lora_run_is_exported_merged_and_as_diffusers_reads_it(ground, tmp_path):
    adapted = with_adapters(load_transformer(ground.base), std=0.1)
    weights = {k: p.data for k, p in trained(adapted).items()}
    step = checkpoint(tmp_path / "checkpoints", weights, ranks=2)
    target = export_checkpoint(job_of(ground, lora=LORA), step, tmp_path / "model")
    layer = "transformer_blocks.0.attn1.to_q"
    first, second = (weights[f"{layer}.lora_{k}.default.weight"] for k in "AB")
    base = dict(load_transformer(ground.base).named_parameters())[f"{layer}.weight"]
    found = dict(load_transformer(target).named_parameters())[f"{layer}.weight"]
    torch.testing.assert_close(found.data, base.data + 2.0 * second @ first)
    stored = load_file(target / LORA_FILE)
    assert torch.equal(stored[f"transformer.{layer}.lora_A.weight"], first)


def test_what_trains_is_chosen_by_name():
    made = model("2b")
    count = choose_trainable(made, TrainingConfig(trainable=("norm_out", r"blocks\.1\.attn1")))
    names = set(trained(made))
    assert names == {n for n, _ in made.named_parameters() if "norm_out" in n or "s.1.attn1" in n}
    assert count == sum(p.numel() for p in trained(made).values())
    with pytest.raises(ConfigError, match="names no weight"):
        choose_trainable(model("2b"), TrainingConfig(trainable=("norm_out", "unet")))
    with pytest.raises(ConfigError, match="not a regular expression"):
        choose_trainable(model("2b"), TrainingConfig(trainable=("(",)))
    with pytest.raises(ConfigError, match="adapter is wanted for a layer that is not there"):
        choose_trainable(model("2b"), TrainingConfig(lora=LoraConfig(targets=("to_x",))))
