"""Real DeepSpeed runs. A start takes 15 to 45 s, so a test covers several things."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from schemas.config.files import load_config
from schemas.errors import ConfigError, ManifestError, TrainingFailed
from schemas.storage import mark_done, read_done
from training.base_model import load_components
from training.checkpoints import newest_complete
from training.launch import run_stage

WEIGHTS = Path("model", "transformer", "diffusion_pytorch_model.safetensors")

PARENT = """
import sys
from importlib.metadata import version
from pathlib import Path
from schemas.config.files import load_config
from training.launch import run_stage

config, manifest, base, run_dir = map(Path, sys.argv[1:])
show = lambda line: sys.stdout.write(f"step {line['step']}\\n") and sys.stdout.flush()
run_stage(load_config(config), "sft", manifest, base, run_dir, show)
"""


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = {"seconds", "data_seconds", "samples_per_s", "tokens_per_s", "mfu", "memory_gb"}
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def rank_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end while we look
            if "--local_rank=0" in process.cmdline():
                found.append(process)
    return found


@pytest.fixture(scope="module")
def whole(ground, tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("runs") / "sft-whole"
    seen = []
    run_stage(ground.config, "sft", ground.manifest, ground.base, run_dir, seen.append)
    return run_dir, seen


@pytest.mark.slow
def test_a_run_trains_and_leaves_what_it_should(ground, whole):
    run_dir, seen = whole
    assert [line["step"] for line in seen] == list(range(1, 61))
    losses = [line["loss"] for line in seen]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert {line["conditional"] for line in seen} == {False, True}
    assert seen[0]["lr"] == pytest.approx(1e-3 / 6)
    assert all(line["grad_norm"] > 0 for line in seen)
    done = read_done(run_dir)
    assert done is not None
    assert done["last_loss"] == losses[-1]
    assert load_config(run_dir / "config.yaml") == ground.config
    assert json.loads((run_dir / "versions.json").read_text())["torch"] == version("torch")
    assert len(list((run_dir / "checkpoints").iterdir())) == 2

    trained = load_components(run_dir / "model").transformer.state_dict()
    untrained = load_components(ground.base).transformer.state_dict()
    assert all(torch.isfinite(v).all() for v in trained.values())
    assert not torch.equal(trained["proj_out.weight"], untrained["proj_out.weight"])

    before = (run_dir / "log.txt").read_bytes()
    assert run_stage(ground.config, "sft", ground.manifest, ground.base, run_dir) == run_dir
    assert (run_dir / "log.txt").read_bytes() == before  # a finished run is not started again


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_terminated_runs_end_with_the_same_weights(ground, whole, tmp_path):
    run_dir = tmp_path / "sft-interrupted"
    config = tmp_path / "config.yaml"
    config.write_text((whole[0] / "config.yaml").read_text())
    arguments = [str(p) for p in (config, ground.manifest, ground.base, run_dir)]

    # 1. SIGKILL of the parent: the rank notices, saves and ends
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "step 1\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    first = newest_complete(run_dir / "checkpoints")
    assert first is not None
    assert 1 <= first[0] < 60
    assert read_done(run_dir) is None

    # 2. SIGKILL of the rank in the middle: an error, and what the last checkpoint holds stays
    def kill_rank(line):
        for process in rank_processes():
            process.send_signal(signal.SIGKILL)

    with pytest.raises(TrainingFailed, match="ended early"):
        run_stage(ground.config, "sft", ground.manifest, ground.base, run_dir, kill_rank)
    assert read_done(run_dir) is None

    # 3. a newer checkpoint, damaged on disk; the run goes on from the one before, to the end
    _, intact = newest_complete(run_dir / "checkpoints")
    damaged = shutil.copytree(intact, intact.with_name("step_00000059"))
    mark_done(damaged, {**read_done(damaged), "step": 59})
    largest = max((p for p in damaged.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    run_stage(ground.config, "sft", ground.manifest, ground.base, run_dir)
    assert damaged.with_name("damaged_step_00000059").is_dir()
    assert metrics(run_dir) == metrics(whole[0])
    one, other = load_file(run_dir / WEIGHTS), load_file(whole[0] / WEIGHTS)
    assert all(torch.equal(one[k], other[k]) for k in other)


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_says_so(ground, tmp_path):
    run_dir = tmp_path / "sft-terminated"

    def terminate_once(line):
        if line["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingFailed, match="training was interrupted"):
        run_stage(ground.config, "sft", ground.manifest, ground.base, run_dir, terminate_once)
    assert signal.getsignal(signal.SIGTERM) == before
    newest = newest_complete(run_dir / "checkpoints")
    assert newest is not None
    assert len(metrics(run_dir)) >= newest[0] >= 1
    assert rank_processes() == []

    changed = load_config(run_dir / "config.yaml", ["training.sft.lr=0.5"])
    with pytest.raises(ConfigError, match="changed: settings"):
        run_stage(changed, "sft", ground.manifest, ground.base, run_dir)


def test_a_manifest_that_is_not_encoded_is_refused_before_anything_starts(ground, tmp_path):
    empty = ground.config.model_copy(update={"workspace": str(tmp_path / "empty")})
    with pytest.raises(ManifestError, match="not encoded yet"):
        run_stage(empty, "sft", ground.manifest, ground.base, tmp_path / "run")
    assert not (tmp_path / "run").exists()
