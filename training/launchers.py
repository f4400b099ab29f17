"""How the ranks of a job are started: on this machine, over several, or by Slurm.

Everything here is worked out beforehand and starts nothing but ``scontrol``, which only answers, so
that a dry run shows the very command and what is missing is said before a run begins.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.errors import ConfigError, ExternalToolError
from training.job import STOP, Job

HOSTFILE = "hostfile"
RANK_ENV = "launch.env"
LOOP = "training.loop"

_PROGRAMS = {
    "pdsh": ("pdsh", "ssh"),
    "openmpi": ("mpirun", "ompi_info"),  # DeepSpeed looks for the second
    "slurm": ("srun", "scontrol"),
}
_FOR_RANKS = (
    *("DS_ACCELERATOR", "HF_HUB_OFFLINE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("OMP_WAIT_POLICY", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"),
)
"""Variables that DeepSpeed's runner would not hand to other machines by itself."""


@dataclass(frozen=True)
class Start:
    """All it takes to start the ranks of a job.

    Attributes:
        command: The launcher and its arguments.
        env: Its whole environment.
        files: Text files to write first, in the run folder.
    """

    command: list[str]
    env: dict[str, str]
    files: dict[Path, str]


def plan_start(job: Job, env: Mapping[str, str], parent_pid: int) -> Start:
    """Check what the launcher needs and work out how it is started; writes nothing.

    Args:
        job: What to train, and with which launcher.
        env: Environment of this process.
        parent_pid: Whose end the ranks on this machine watch for.

    Raises:
        ConfigError: Fewer GPUs than ranks; a program, the hostfile or the Slurm allocation is
            missing or too small; or the hostfile cannot be read.
        ExternalToolError: Slurm does not say which machines the allocation has.
    """
    launch, ranks = job.training.launch, job.training.num_processes
    if launch.launcher == "local":
        port = launch.master_port or free_port()
        command = launch_command(job, port, parent_pid, _devices(ranks, env))
        return Start(command, _environment(env, ranks, here=True), {})
    _require_programs(launch.launcher, env)
    port = launch.master_port or derived_port(env.get("SLURM_JOB_ID", ""), str(job.run_dir))
    own = _environment(env, ranks, here=False)
    if launch.launcher == "slurm":
        first = _first_of_allocation(env, launch.num_nodes)
        own["MASTER_ADDR"] = launch.master_addr or first
        own["MASTER_PORT"] = str(port)
        if "SLURM_CPUS_PER_TASK" in env:  # srun itself no longer takes it over from sbatch
            own["SRUN_CPUS_PER_TASK"] = env["SLURM_CPUS_PER_TASK"]
        return Start(launch_command(job, port, parent_pid), own, {})
    hosts = _chosen_hosts(Path(launch.hostfile), launch.num_nodes, ranks)
    first = launch.master_addr
    if launch.launcher == "openmpi":  # its ranks are told by nobody else
        first = first or hosts[0]
        own |= {"MASTER_ADDR": first, "MASTER_PORT": str(port)}
    # a file in place of --num_nodes and --num_gpus, which DeepSpeed refuses with openmpi
    files = {
        job.run_dir / HOSTFILE: "".join(f"{host} slots={ranks}\n" for host in hosts),
        job.run_dir / RANK_ENV: _users_variables(env)
        + "".join(f"{name}={own[name]}\n" for name in _FOR_RANKS if name in own),
    }
    own["DS_ENV_FILE"] = str(job.run_dir / RANK_ENV)
    return Start(launch_command(job, port, parent_pid, first_host=first), own, files)


def launch_command(
    job: Job,
    port: int,
    parent_pid: int,
    devices: Sequence[str] = ("0",),
    first_host: str = "",
) -> list[str]:
    """The command that starts all ranks of a job and ends when they have ended.

    Args:
        job: What to train, and with which launcher.
        port: TCP port of the first rank.
        parent_pid: Whose end ranks on this machine watch for; others watch for a file.
        devices: Ids of this machine's GPUs, one for each rank (local only).
        first_host: Address of the first machine; '' = found by the launcher, over ssh (pdsh).
    """
    training, launch = job.training, job.training.launch
    loop = [LOOP, "--job", str(job.run_dir / "job.json")]
    python = [sys.executable, "-u", "-m"]
    if launch.launcher == "local":
        # not DeepSpeed's runner: it would only start this, and hide that a rank died of a signal
        world = json.dumps({"localhost": list(devices)}).encode()
        return [
            *(*python, "deepspeed.launcher.launch"),
            f"--world_info={base64.urlsafe_b64encode(world).decode()}",
            *("--node_rank=0", f"--master_addr={launch.master_addr or '127.0.0.1'}"),
            *(f"--master_port={port}", "--quiet", "--module"),
            *(*loop, "--parent-pid", str(parent_pid)),
        ]
    loop += ["--stop-file", str(job.run_dir / STOP)]
    if launch.launcher == "slurm":
        return [
            *("srun", f"--nodes={launch.num_nodes}", f"--ntasks={training.world_size}"),
            *(f"--ntasks-per-node={training.num_processes}", "--distribution=block"),
            *("--kill-on-bad-exit=1", "--export=ALL"),
            *(*python, *loop),
        ]
    # mpirun needs no ssh where a batch system starts its processes
    ssh = ["--no_ssh_check"] if launch.launcher == "openmpi" else []
    return [
        *(*python, "deepspeed.launcher.runner", "--launcher", launch.launcher, "--force_multi"),
        *("--hostfile", str(job.run_dir / HOSTFILE), *ssh),
        *(("--master_addr", first_host) if first_host else ()),
        *("--master_port", str(port), "--module", *loop),
    ]


def read_hostfile(path: Path) -> dict[str, int]:
    """Machines of a host file and the ranks each may have, in order.

    Raises:
        ConfigError: There is no such file, it names no machine, or a line is not of the form
            ``name slots=8``.
    """
    wanted = "a line 'name slots=8' per machine; # starts a comment line"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the host file cannot be read",
            where=f"training.launch.hostfile = {path}",
            found=error,
            expected=wanted,
        ) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or match[1] in hosts:
            twice = match is not None
            raise ConfigError(
                "a machine is listed twice" if twice else "a line of the host file is not readable",
                where=f"{path}, line {number}",
                found=repr(text),
                expected="each machine once" if twice else wanted,
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError("the host file names no machine", where=path, expected=wanted)
    return hosts


def free_port() -> int:
    """A TCP port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def derived_port(*name: str) -> int:
    """A port that depends only on the name: nobody can ask another machine for a free one.

    20000 to 31999 lies below what Linux hands out by itself (32768 and above).
    """
    digest = hashlib.sha256("\x1f".join(name).encode()).digest()
    return 20_000 + int.from_bytes(digest[:4]) % 12_000


def _devices(ranks: int, env: Mapping[str, str]) -> list[str]:
    """Ids of the GPUs to use: those the user left visible, else the first ones."""
    if env.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return [str(i) for i in range(ranks)]
    visible = env.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    ids = [str(i) for i in range(count)] if visible is None else visible.split(",")[:count]
    if len(ids) < ranks:
        raise ConfigError(
            "there are fewer GPUs than ranks",
            where="training.num_processes",
            found=f"{ranks} ranks, GPUs {', '.join(ids)}"
            + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"),
            expected="a GPU for each rank",
            do=f"set training.num_processes={len(ids)}",
        )
    return ids[:ranks]


def _environment(env: Mapping[str, str], ranks: int, here: bool) -> dict[str, str]:
    """Environment of the launcher, which the ranks have from it."""
    own = dict(env)
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    if here:
        own.setdefault("OMP_NUM_THREADS", threads)  # several trainings may share a machine
        if not torch.cuda.is_available():
            own["DS_ACCELERATOR"] = "cpu"
    else:  # the other machines may have more cores, and GPUs where this one has none
        own.setdefault("OMP_NUM_THREADS", env.get("SLURM_CPUS_PER_TASK", threads))
    # On a busy CPU, threads that spin while they wait made a tiny step up to 10 times slower.
    own.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    own["HF_HUB_OFFLINE"] = "1"  # models are folders on disk
    # DeepSpeed asks for unrestricted pickle; with this, only tensors and plain values load
    own["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    return own


def _require_programs(launcher: str, env: Mapping[str, str]) -> None:
    missing = [p for p in _PROGRAMS[launcher] if shutil.which(p, path=env.get("PATH")) is None]
    if missing:
        raise ConfigError(
            f"launcher {launcher} needs programs that are not there",
            where=f"training.launch.launcher = {launcher}",
            found=f"not on PATH: {', '.join(missing)}",
            do="install them, start from a machine of the cluster, or set "
            "training.launch.launcher=local",
        )


def _chosen_hosts(hostfile: Path, num_nodes: int, ranks: int) -> list[str]:
    """The first machines of a host file, as many as wanted."""
    known = read_hostfile(hostfile)
    chosen = list(known)[:num_nodes]
    small = [f"{host} slots={known[host]}" for host in chosen if known[host] < ranks]
    if len(chosen) < num_nodes or small:
        raise ConfigError(
            "the host file has too few machines or slots",
            where=f"training.launch.hostfile = {hostfile}",
            found=", ".join(small) if small else f"{len(known)} machines",
            expected=f"{num_nodes} machines (launch.num_nodes) with {ranks} slots (num_processes)",
            do="lower training.launch.num_nodes or training.num_processes, or mend the file",
        )
    return chosen


def _first_of_allocation(env: Mapping[str, str], num_nodes: int) -> str:
    """Name of the first machine of the Slurm allocation this process runs in."""
    if "SLURM_JOB_ID" not in env or "SLURM_JOB_NODELIST" not in env:
        raise ConfigError(
            "there is no Slurm allocation to train in",
            where="training.launch.launcher = slurm",
            found="SLURM_JOB_ID or SLURM_JOB_NODELIST is not set",
            do=f"run it inside `sbatch --nodes={num_nodes} …` or `salloc --nodes={num_nodes} …`",
        )
    asked = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        env=dict(env),
        check=False,
    )
    names = asked.stdout.split()
    if asked.returncode or not names:
        raise ExternalToolError(
            "Slurm does not say which machines the allocation has",
            where=f"scontrol show hostnames {env['SLURM_JOB_NODELIST']}",
            found=asked.stderr.strip() or f"exit code {asked.returncode}, no names",
            do="see that scontrol works in this shell",
        )
    if len(names) < num_nodes:
        raise ConfigError(
            "the Slurm allocation is too small",
            where="training.launch.num_nodes",
            found=f"{len(names)} machines: {', '.join(names)}",
            expected=f"{num_nodes}",
            do=f"set training.launch.num_nodes={len(names)}, or allocate more",
        )
    return names[0]


def _users_variables(env: Mapping[str, str]) -> str:
    """What DeepSpeed would hand to the ranks if we named no file of our own."""
    name = env.get("DS_ENV_FILE", ".deepspeed_env")
    files = dict.fromkeys((Path.home() / name, Path(name).absolute()))
    texts = [f.read_text(encoding="utf-8").rstrip("\n") for f in files if f.is_file()]
    return "".join(f"{text}\n" for text in texts if text)
