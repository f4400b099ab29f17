"""How ranks are started. Where nothing is said, the programs are real and the module is trivial."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.config.training import (
    LaunchConfig,
    LoraConfig,
    ModelConfig,
    TrainingConfig,
    TrainStageConfig,
)
from schemas.errors import ConfigError, ExternalToolError, TrainingFailed
from schemas.storage import mark_done
from training.job import HOW_NOT_WHAT, STOP, Job, maths, ranks_environment
from training.launch import resume_step
from training.launchers import derived_port, launch_command, plan_start, read_hostfile

STAND_IN = """
import json, os, sys
from pathlib import Path
from training.job import ranks_environment

seen = ranks_environment(os.environ)
job = Path(sys.argv[sys.argv.index("--job") + 1])
place = job.parent / f"rank_{seen['RANK']}.json"
place.write_text(json.dumps({**seen, "threads": os.environ["OMP_NUM_THREADS"]}))
if "exit" in os.environ.get("STAND_IN", ""):
    sys.exit(int(os.environ["STAND_IN"].split()[1]))
if "kill" in os.environ.get("STAND_IN", ""):
    os.kill(os.getpid(), 9)
"""
SRUN = """#!/bin/bash
# starts --ntasks processes with the variables that srun gives its tasks
for argument in "$@"; do
  case $argument in
    --ntasks=*) tasks=${argument#*=} ;;
    --ntasks-per-node=*) each=${argument#*=} ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
export SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_TASKS_PER_NODE="$each(x$((tasks / each)))"
for ((i = 0; i < tasks; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$((i % each)) "$@" &
  pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do wait $pid || { code=$?; ((code > worst)) && worst=$code; }; done
exit $worst
"""
SCONTROL = '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && printf "node-%s\\n" 3 4\n'
PDSH = """#!/bin/bash
# runs the command for every host of -w on this machine, with %n as the host's number
while [[ $1 == -* ]]; do
  case $1 in -w) hosts=$2; shift ;; -f) shift ;; esac
  shift
done
command="$*"
n=0
for host in ${hosts//,/ }; do
  bash -c "${command//%n/$n}" &
  pids+=($!)
  n=$((n + 1))
done
worst=0
for pid in "${pids[@]}"; do wait $pid || { code=$?; ((code > worst)) && worst=$code; }; done
exit $worst
"""
SSH = "#!/bin/bash\necho 127.0.0.1\n"


def job(run_dir: Path, **training: object) -> Job:
    return Job(
        stage="sft",
        training=TrainingConfig(**training),  # type: ignore[arg-type]
        workspace=run_dir.parent,
        manifest=run_dir.parent / "sft.parquet",
        init_model=run_dir.parent / "base",
        run_dir=run_dir,
        samples="",
        manifest_sha256="",
        init_sha256="",
    )


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment whose PATH begins with these programs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    root = Path(__file__).parents[2]
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join((str(folder), str(root))),
    }


def run_stand_in(tmp_path: Path, start, **env: str) -> tuple[int, list[dict[str, str]]]:
    """Start the ranks with a trivial module in place of the loop: exit code, what each rank saw."""
    (tmp_path / "bin" / "stand_in.py").write_text(STAND_IN)
    run_dir = Path(start.command[start.command.index("--job") + 1]).parent
    run_dir.mkdir(parents=True, exist_ok=True)
    for path, text in start.files.items():
        path.write_text(text)
    command = ["stand_in" if word == "training.loop" else word for word in start.command]
    done = subprocess.run(command, env={**start.env, **env}, check=False, cwd=tmp_path)
    files = sorted(run_dir.glob("rank_*.json"))
    return done.returncode, [json.loads(f.read_text()) for f in files]


def test_local_command(tmp_path):
    command = launch_command(job(tmp_path, num_processes=2), 2345, 77, ("4", "6"))
    world = base64.urlsafe_b64encode(b'{"localhost": ["4", "6"]}').decode()
    assert command == [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
        *(f"--world_info={world}", "--node_rank=0", "--master_addr=127.0.0.1"),
        *("--master_port=2345", "--quiet", "--module", "training.loop"),
        *("--job", str(tmp_path / "job.json"), "--parent-pid", "77"),
    ]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_command_over_several_machines(tmp_path, launcher):
    launch = LaunchConfig(launcher=launcher, hostfile="hosts", num_nodes=2)
    command = launch_command(job(tmp_path, launch=launch), 2345, 77, first_host="node-3")
    assert command == [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--launcher", launcher),
        *("--force_multi", "--hostfile", str(tmp_path / "hostfile")),
        *(["--no_ssh_check"] if launcher == "openmpi" else []),
        *("--master_addr", "node-3", "--master_port", "2345", "--module", "training.loop"),
        *("--job", str(tmp_path / "job.json"), "--stop-file", str(tmp_path / STOP)),
    ]


def test_slurm_command(tmp_path):
    launch = LaunchConfig(launcher="slurm", num_nodes=2)
    command = launch_command(job(tmp_path, num_processes=4, launch=launch), 2345, 77)
    assert command == [
        *("srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--distribution=block"),
        *("--kill-on-bad-exit=1", "--export=ALL", sys.executable, "-u", "-m", "training.loop"),
        *("--job", str(tmp_path / "job.json"), "--stop-file", str(tmp_path / STOP)),
    ]


def test_what_other_machines_are_given(tmp_path):
    (tmp_path / "hosts").write_text(
        "# the cluster\nnode-3 slots=8\n\nnode-4   slots=4\nnode-5 slots=1\n"
    )
    env = programs(tmp_path / "bin", mpirun="", ompi_info="")
    (tmp_path / "mine").write_text("NCCL_DEBUG=INFO")
    launch = LaunchConfig(launcher="openmpi", hostfile=str(tmp_path / "hosts"), num_nodes=2)
    start = plan_start(
        job(tmp_path / "run", num_processes=4, launch=launch),
        {**env, "DS_ENV_FILE": str(tmp_path / "mine"), "OMP_NUM_THREADS": "3"},
        77,
    )
    assert not (tmp_path / "run").exists()
    assert start.files[tmp_path / "run" / "hostfile"] == "node-3 slots=4\nnode-4 slots=4\n"
    lines = start.files[tmp_path / "run" / "launch.env"].splitlines()
    assert lines[0] == "NCCL_DEBUG=INFO"
    port = derived_port("", str(tmp_path / "run"))
    assert {"MASTER_ADDR=node-3", f"MASTER_PORT={port}", "OMP_NUM_THREADS=3"} < set(lines)
    assert start.env["DS_ENV_FILE"] == str(tmp_path / "run" / "launch.env")
    assert 20_000 <= port < 32_000
    assert derived_port("", "another") != port


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("a slots=2\nb slot=2\n", "line 2", "b slot=2"),
        ("# none\na\n", "line 2", "'a'"),
        ("a slots=2\n\na slots=3\n", "line 3", "a slots=3"),
        ("a slots=2 b\n", "line 1", "a slots=2 b"),
    ],
)
def test_a_bad_line_of_a_hostfile_is_named(tmp_path, text, where, found):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(tmp_path / "hosts")
    assert where in str(caught.value.where)
    assert found in str(caught.value.found)


def test_what_is_missing_is_said_before_anything_starts(tmp_path):
    missing = LaunchConfig(launcher="pdsh", hostfile=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="not on PATH: pdsh, ssh"):
        plan_start(job(tmp_path / "run", launch=missing), {"PATH": str(tmp_path)}, 77)
    env = programs(tmp_path / "bin", pdsh="", ssh="", srun="", scontrol=SCONTROL)
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        env.pop(name, None)
    with pytest.raises(ConfigError, match="host file cannot be read"):
        plan_start(job(tmp_path / "run", launch=missing), env, 77)
    (tmp_path / "none").write_text("a slots=2\nb slots=1\n")
    two = missing.model_copy(update={"num_nodes": 2})
    with pytest.raises(ConfigError, match="b slots=1"):
        plan_start(job(tmp_path / "run", num_processes=2, launch=two), env, 77)
    three = missing.model_copy(update={"num_nodes": 3})
    with pytest.raises(ConfigError, match="2 machines"):
        plan_start(job(tmp_path / "run", launch=three), env, 77)
    slurm = LaunchConfig(launcher="slurm", num_nodes=3)
    with pytest.raises(ConfigError, match="no Slurm allocation"):
        plan_start(job(tmp_path / "run", launch=slurm), env, 77)
    env |= {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node-[3-4]"}
    with pytest.raises(ConfigError, match="2 machines: node-3, node-4"):
        plan_start(job(tmp_path / "run", launch=slurm), env, 77)
    env = programs(tmp_path / "bin", scontrol="#!/bin/sh\necho no daemon >&2; exit 1\n") | env
    with pytest.raises(ExternalToolError, match="no daemon"):
        plan_start(job(tmp_path / "run", launch=slurm), env, 77)
    assert not (tmp_path / "run").exists()


def test_a_rank_finds_its_place():
    meet = {"MASTER_ADDR": "node-3", "MASTER_PORT": "29999"}
    slurm = {
        **{"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"},
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    place = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", **meet}
    assert ranks_environment({**slurm, **meet}) == place
    mpi = {
        f"OMPI_COMM_WORLD_{name}": value
        for name, value in (("RANK", "2"), ("LOCAL_RANK", "0"), ("SIZE", "3"), ("LOCAL_SIZE", "1"))
    }
    of_mpi = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_SIZE": "1", **meet}
    assert ranks_environment({**slurm, **mpi, **meet}) == of_mpi
    assert ranks_environment({**slurm, **mpi, **place}) == place
    with pytest.raises(ConfigError, match="without MASTER_ADDR"):
        ranks_environment({**slurm, "MASTER_PORT": "1"})
    with pytest.raises(ConfigError, match="no launcher's variables"):
        ranks_environment(meet)


LAYOUT: list[dict[str, object]] = [
    {"num_processes": 4, "sequence_parallel": 2},
    {"zero_stage": 3, "offload": "all"},
    {"activation_checkpointing": 1, "compile_blocks": True},
    {"launch": LaunchConfig(launcher="slurm", num_nodes=2)},
    {"monitors": (), "retries": 7},
    {"latents": {"workers": 3, "shard_scenes": 5}},
    {"model": ModelConfig(base="elsewhere", seed=3, attention_backend="dense")},
    {"sft": TrainStageConfig(steps=9, micro_batch_size=1, checkpoint_every=3, keep_checkpoints=1)},
    {"sft": TrainStageConfig(keep_every=9, validate_every=3, max_bad_samples=1, sample_every=20)},
    {"pretrain": TrainStageConfig(lr=1.0)},
]
MATHS: list[dict[str, object]] = [
    {"dtype": "bfloat16"},
    {"lora": LoraConfig()},
    {"trainable": ("attn",)},
    {"latents": {"source": "pixels"}},
    {"latents": {"sample_posterior": True}},
    {"model": ModelConfig(mask="v3")},
    {"model": ModelConfig(shorter_frames=(5,))},
]


def test_a_run_is_named_by_what_it_computes():
    plain = TrainStageConfig()
    first = maths(TrainingConfig(sft=plain), "sft")
    for changes in LAYOUT:
        changed = TrainingConfig(**{"sft": plain, **changes})  # type: ignore[arg-type]
        assert maths(changed, "sft") == first, changes
    for changes in MATHS:
        changed = TrainingConfig(**{"sft": plain, **changes})  # type: ignore[arg-type]
        assert maths(changed, "sft") != first, changes
    assert maths(TrainingConfig(sft=plain), "pretrain") != first
    json.dumps(first)
    assert set(TrainStageConfig.model_fields) > HOW_NOT_WHAT
    assert set(first["settings"]) == set(TrainStageConfig.model_fields) - HOW_NOT_WHAT


def test_a_run_may_be_lengthened_and_not_shortened(tmp_path):
    assert resume_step(tmp_path, 10) == 0
    for step in (20, 40):
        mark_done(tmp_path / "checkpoints" / f"step_{step:08d}", {"step": step, "files": {}})
    assert resume_step(tmp_path, 40) == 40
    assert resume_step(tmp_path, 100) == 40
    with pytest.raises(ConfigError, match="step 40, steps=39"):
        resume_step(tmp_path, 39)
    mark_done(tmp_path, {"steps": 45})  # its last checkpoint may have been removed since
    with pytest.raises(ConfigError, match="at least 45"):
        resume_step(tmp_path, 40)


def test_an_error_keeps_whether_a_retry_may_help():
    for retryable in (True, False):
        error = TrainingFailed("died", retryable=retryable, where="here")
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.retryable) == (str(error), retryable)
    assert not TrainingFailed("gave up").retryable


@pytest.mark.slow
def test_slurm_starts_the_ranks(tmp_path):
    env = programs(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL)
    env |= {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node-[3-4]", "SLURM_CPUS_PER_TASK": "6"}
    env.pop("OMP_NUM_THREADS", None)
    launch = LaunchConfig(launcher="slurm", num_nodes=2)
    start = plan_start(job(tmp_path / "run", num_processes=2, launch=launch), env, 77)
    assert start.env["SRUN_CPUS_PER_TASK"] == "6"
    code, ranks = run_stand_in(tmp_path, start)
    assert code == 0
    port = str(derived_port("5", str(tmp_path / "run")))
    meet = {"MASTER_ADDR": "node-3", "MASTER_PORT": port, "threads": "6"}
    assert ranks == [
        {"RANK": r, "LOCAL_RANK": local, "WORLD_SIZE": "4", "LOCAL_SIZE": "2", **meet}
        for r, local in (("0", "0"), ("1", "1"), ("2", "0"), ("3", "1"))
    ]
    assert run_stand_in(tmp_path, start, STAND_IN="exit 75")[0] == 75


@pytest.mark.slow
def test_deepspeed_starts_the_ranks_of_this_machine(tmp_path):
    start = plan_start(job(tmp_path / "run", num_processes=2), programs(tmp_path / "bin"), 77)
    code, ranks = run_stand_in(tmp_path, start)
    assert code == 0
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert run_stand_in(tmp_path, start, STAND_IN="exit 75")[0] == 75
    assert run_stand_in(tmp_path, start, STAND_IN="kill")[0] != 0


@pytest.mark.slow
def test_deepspeed_starts_the_ranks_of_two_machines(tmp_path):
    """DeepSpeed's own runner and launchers; pdsh and ssh are scripts that stay on this machine."""
    (tmp_path / "hosts").write_text("node-3 slots=1\nnode-4 slots=2\n")
    launch = LaunchConfig(launcher="pdsh", hostfile=str(tmp_path / "hosts"), num_nodes=2)
    env = programs(tmp_path / "bin", pdsh=PDSH, ssh=SSH) | {"DS_ACCELERATOR": "cpu"}
    env["OMP_NUM_THREADS"] = "5"
    start = plan_start(job(tmp_path / "run", launch=launch), env, 77)
    code, ranks = run_stand_in(tmp_path, start, STAND_IN="exit 75")
    assert code == 75
    port = str(derived_port("", str(tmp_path / "run")))
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "threads": "5"}
    assert ranks == [
        {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", **meet}
        for rank in ("0", "1")
    ]
