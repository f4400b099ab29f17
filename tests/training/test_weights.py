import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from schemas.errors import CheckpointError, ConfigError
from tests.training.models import SHAPES, inputs, model
from training.weights import load_transformer

FILE = "diffusion_pytorch_model.safetensors"


def same(found, expected) -> bool:
    ours, theirs = found.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def official(folder: Path, made, files: str = "safetensors", version: int | None = 2) -> Path:
    """A folder as the official code writes and reads it: its class name, its config keys."""
    made.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("mask", "position_policy", "position_gap", "attention_backend"):
        del config[key]
    config["_class_name"] = "MultiPromptCogVideoXTransformer3DModel"
    config["add_noise_in_inpaint_model"] = False
    if version is not None:
        config["attn_msk_version"] = version
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / FILE)
    if files != "safetensors":
        (folder / FILE).unlink()
    if files == "bin":
        torch.save(weights, folder / "diffusion_pytorch_model.bin")
    if files == "pieces":  # without an index: the official code reads whatever is there
        keys = sorted(weights)
        save_file({k: weights[k] for k in keys[::2]}, folder / "part_a.safetensors")
        save_file({k: weights[k] for k in keys[1::2]}, folder / "part_b.safetensors")
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_folders_load_and_ours_load_back_with_equal_outputs(tmp_path, shape):
    torch.manual_seed(1)
    theirs = CogVideoXTransformer3DModel(**SHAPES[shape]).eval()
    theirs.save_pretrained(tmp_path / "theirs" / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs" / "transformer").glob("*.safetensors"))) > 1
    ours = load_transformer(tmp_path / "theirs", mask="v5")
    assert ours.config.mask == "v5"
    assert same(ours, theirs)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    back = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert same(back, theirs)
    if shape == "2b":
        video, text, timestep = inputs(frames=4, scenes=1)
        with torch.no_grad():
            expected = back(video, text[:, 0], timestep).sample
            torch.testing.assert_close(ours(video, text, timestep, [4]), expected)


def test_our_folder_keeps_its_settings_unless_told_otherwise(tmp_path):
    made = model("5b", mask="v1", position_policy="gap", position_gap=4, attention_backend="dense")
    made.save_pretrained(tmp_path)
    kept = load_transformer(tmp_path)
    assert same(kept, made)
    names = ("mask", "position_policy", "position_gap", "attention_backend")
    assert [kept.config[n] for n in names] == ["v1", "gap", 4, "dense"]
    changed = load_transformer(tmp_path, position_policy="reset", attention_backend="auto")
    assert [changed.config[n] for n in names] == ["v1", "reset", 0, "auto"]
    assert same(type(made).from_pretrained(tmp_path, low_cpu_mem_usage=False), made)
    assert all(p.requires_grad for p in kept.parameters())


@pytest.mark.parametrize("files", ["safetensors", "bin", "pieces"])
def test_the_official_release_layout_loads(tmp_path, files):
    made = model("5b")
    official(tmp_path / "Mask2DiT" / "transformer", made, files, version=5)
    found = load_transformer(tmp_path / "Mask2DiT")
    assert same(found, made)
    assert found.config.mask == "v5"
    assert "attn_msk_version" not in found.config
    assert load_transformer(tmp_path / "Mask2DiT", mask="v2").config.mask == "v2"


@pytest.mark.parametrize("ending", ["pt", "bin", "safetensors"])
def test_a_single_file_beside_a_config_loads(tmp_path, ending):
    made = model("2b")
    official(tmp_path, made, version=None)
    weights = load_file(tmp_path / FILE)
    file = tmp_path / f"step_1000.{ending}"
    if ending == "safetensors":
        save_file(weights, file)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if ending == "pt" else weights, file)
    (tmp_path / FILE).unlink()
    found = load_transformer(file)
    assert same(found, made)
    assert found.config.mask == "v2"


def test_weights_take_the_type_asked_for_and_leave_the_file_alone(tmp_path):
    model("5b").save_pretrained(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    found = load_transformer(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for p in load_transformer(tmp_path).parameters():
            p.zero_()
    assert (tmp_path / FILE).read_bytes() == before


def test_what_does_not_fit_is_listed_by_kind(tmp_path):
    made = model("5b")
    made.save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    del weights["proj_out.bias"]
    weights["time_embedding.linear_1.bias"] = torch.zeros(3)
    weights |= {f"ema.{i:02}": torch.zeros(1) for i in range(14)}
    save_file(weights, tmp_path / FILE)
    with pytest.raises(CheckpointError) as caught:
        load_transformer(tmp_path)
    message = str(caught.value)
    assert "1 missing: proj_out.bias" in message
    assert "14 unexpected: ema.00" in message
    assert "ema.09, and 4 more" in message
    assert "1 of another shape: time_embedding.linear_1.bias (3,) for (16,)" in message
    torch.manual_seed(3)
    partial = load_transformer(tmp_path, allow_partial=True)
    torch.manual_seed(3)
    assert same(load_transformer(tmp_path, allow_partial=True), partial)
    fresh = {"proj_out.bias", "time_embedding.linear_1.bias"}
    state = partial.state_dict()
    assert all(torch.equal(state[k], v) == (k not in fresh) for k, v in made.state_dict().items())


def test_broken_folders_are_refused(tmp_path):
    folder = tmp_path / "transformer"
    with pytest.raises(CheckpointError, match="no transformer"):
        load_transformer(tmp_path)
    model("5b").save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_transformer(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_transformer(tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_transformer(tmp_path)


def test_a_weight_in_two_files_is_refused(tmp_path):
    official(tmp_path, model("5b"), "pieces")
    shutil.copy(tmp_path / "part_a.safetensors", tmp_path / "part_c.safetensors")
    with pytest.raises(CheckpointError, match="in two files"):
        load_transformer(tmp_path)


def test_other_models_and_unsupported_variants_are_refused(tmp_path):
    model("5b").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, error in (
        ({"_class_name": "AutoencoderKLCogVideoX"}, CheckpointError),
        ({"ofs_embed_dim": 512}, ConfigError),
        ({"mask": "v9"}, ConfigError),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(error):
            load_transformer(tmp_path)


def test_pickled_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    official(tmp_path, model("5b"))
    torch.save({"state_dict": {"proj_out.bias": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="tensors only"):
        load_transformer(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
