import re
import subprocess
import sys

import pytest
import yaml
from pydantic import BaseModel

from schemas.config import PRESETS, TriptychConfig, dump_yaml, load_config, preset
from schemas.config.files import all_keys
from schemas.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_reads_back_to_the_same_config(name, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(dump_yaml(preset(name)))
    assert load_config(path) == preset(name)


def test_yaml_explains_every_key():
    lines = dump_yaml(preset("tiny")).splitlines()
    for number, line in enumerate(lines):
        if ":" in line and not line.lstrip().startswith("#"):
            assert lines[number - 1].lstrip().startswith("# "), f"no comment above: {line}"


def fields(model: type[BaseModel]):
    for name, field in model.model_fields.items():
        yield f"{model.__name__}.{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation)


def test_numbers_have_a_range_or_say_why_not():
    for name, field in fields(TriptychConfig):
        assert field.description, name
        if field.annotation in (int, float):
            assert field.metadata, f"{name} has no range"


def test_a_file_may_hold_only_what_changes(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("training:\n  sft:\n    steps: 7\n")
    config = load_config(path, ["curation.manifests.low=0.3"])
    assert config.training.sft.steps == 7
    assert config.curation.manifests.low == 0.3
    assert config.training.sft.conditional_p == preset("tiny").training.sft.conditional_p


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training.sft.stepz=3",
            "training.sft.stepz: unknown key; did you mean training.sft.steps?",
        ),
        ("treshold=3", "did you mean curation.shots.threshold?"),
        (
            "curation.manifests.low=2",
            "curation.manifests.low: input should be less than or equal to 1",
        ),
        ("training.sft.steps=many", "training.sft.steps: input should be a valid integer"),
        ("curation.shots.detector=magic", "curation.shots.detector: input should be 'fast'"),
        ("training.model.frames=10", "frames must be 1 + a multiple of 4"),
        ("curation.manifests.high=-0.5", "low (0) must not be above high (-0.5)"),
        ("training.sft.steps", "--set needs KEY=VALUE"),
        ("training.sft.steps=[", "is not YAML"),
    ],
)
def test_mistakes_give_one_clear_line(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    lines = [line for line in str(caught.value).splitlines() if said in line]
    assert len(lines) == 1, str(caught.value)


def test_two_mistakes_are_both_told():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["training.sft.lr=0", "engine.num_cpus=0"])
    assert "training.sft.lr" in str(caught.value)
    assert "engine.num_cpus" in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_config(broken)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="cogvideox_5b"):
        preset("huge")


def test_the_hash_follows_the_values():
    config = preset("tiny")
    same = load_config(None, [])
    other = load_config(None, ["generation.steps=13"])
    assert config.hash() == same.hash() != other.hash()


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        preset("tiny").workspace = "elsewhere"  # type: ignore[misc]


def test_paper_values():
    """Mask2DiT: 10,000 steps, batch 8, 480 x 720, 49 frames, lr 1e-5, p = 0.5, ZeRO-2, bf16."""
    config = preset("cogvideox_5b")
    assert config.training.zero_stage == 2
    assert config.training.dtype == "bfloat16"
    model, sft, pretrain = config.training.model, config.training.sft, config.training.pretrain
    assert (model.frames, model.height_px, model.width_px, model.text_tokens) == (49, 480, 720, 226)
    assert (sft.steps, sft.batch_size, sft.lr, sft.conditional_p) == (10_000, 8, 1e-5, 0.5)
    assert (pretrain.conditional_p, pretrain.max_grad_norm) == (0.0, 0.05)
    assert preset("paper_pretrain").training.sft.steps == 0
    assert preset("paper_sft").training.pretrain.steps == 0


def test_all_keys_name_leaves_and_sections():
    keys = all_keys()
    assert {"training", "training.sft", "training.sft.steps", "curation.ablation"} <= set(keys)


def test_config_needs_no_heavy_import():
    code = (
        "import sys, schemas.config, schemas.tables;"
        " print([m for m in ('torch','ray','prefect') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_yaml_is_plain_yaml():
    assert yaml.safe_load(dump_yaml(preset("tiny")))["curation"]["dataset"] == "demo"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.sequence_parallel=2", "does not divide the 1 ranks"),
        ("training.offload=all", "needs zero_stage=3, found 2"),
        ("training.launch.launcher=pdsh", "needs hostfile"),
        ("training.launch.num_nodes=2", "takes neither hostfile nor num_nodes"),
        ("training.sft.sample_every=30", "a multiple of checkpoint_every=20"),
        ("training.model.shorter_frames=[9]", "below frames=9, found [9]"),
        ("training.model.shorter_frames=[4]", "1 + a multiple of 4"),
    ],
)
def test_training_settings_that_cannot_be_had_are_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.dtype=bfloat16", "training.zero_stage=0"], "keep float32 weights"),
        (["training.offload=optimizer", "training.zero_stage=0"], "needs zero_stage 1, 2 or 3"),
        (["training.lora={rank: 4}", "training.trainable=[norm]"], "exclude each other"),
        (["training.compile_blocks=true", "training.model.shorter_frames=[5]"], "of one length"),
        (
            [
                "training.compile_blocks=true",
                "training.num_processes=2",
                "training.sequence_parallel=2",
            ],
            "exclude each other",
        ),
    ],
)
def test_training_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, changes)
    load_config(None, changes[:1])  # each is fine alone
