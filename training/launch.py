"""Start a training stage as a child process of the DeepSpeed launcher, and see it through.

The child outlives nothing: it stops after its step, with a checkpoint, when this process is told to
end or dies. Calling :func:`run_stage` again goes on from there.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch

from schemas.config.files import dump_yaml
from schemas.config.root import TriptychConfig
from schemas.errors import ConfigError, TrainingFailed
from schemas.layout import Workspace
from schemas.storage import (
    fingerprint_file,
    mark_done,
    read_done,
    read_json,
    write_json,
    write_text,
)
from training.cache import LatentCache
from training.checkpoints import model_sha256, newest_complete, set_aside_damaged
from training.data import LatentDataset
from training.deepspeed_config import deepspeed_config
from training.job import EXIT_INTERRUPTED, LOG, METRICS, MODEL, Job, StageName
from training.metrics import MetricsTail

log = logging.getLogger(__name__)

POLL_S = 0.3
STOP_WAIT_S = 120.0
"""How long a rank may take to end its step and write a checkpoint before it is killed."""
LOG_LINES = 25
PACKAGES = ("triptych", "torch", "diffusers", "transformers", "deepspeed", "safetensors")

OnMetrics = Callable[[dict[str, Any]], None]


def run_stage(
    config: TriptychConfig,
    stage: StageName,
    manifest: Path,
    init_model: Path,
    run_dir: Path,
    on_metrics: OnMetrics | None = None,
) -> Path:
    """Train one stage and return its run folder; the trained model is ``run_dir / "model"``.

    A finished run is returned at once, an interrupted one goes on from its newest whole checkpoint.
    The manifest must have been encoded (:func:`training.latents.encode_manifest`).

    Args:
        config: Settings; ``config.workspace`` holds the latent cache.
        stage: ``pretrain`` or ``sft``.
        manifest: SAMPLES table.
        init_model: Model folder to start from (for sft: the pre-training run's ``model``).
        run_dir: Folder of this run, not shared with another one.
        on_metrics: Called with every line of ``metrics.jsonl`` of this session.

    Raises:
        TrainingFailed: The child process failed (with its last log lines) or was interrupted.
        CheckpointError: There are checkpoints, and all are damaged.
        ManifestError: Nothing to train on, or samples that are not encoded.
        ConfigError: ``run_dir`` belongs to a run with other settings or inputs.
    """
    if read_done(run_dir) is not None:
        log.info("train stage=%s run=%s reused=true", stage, run_dir.name)
        return run_dir
    started = time.monotonic()
    job = _prepare(config, stage, manifest, init_model, run_dir)
    log.info("train stage=%s run=%s steps=%d", stage, run_dir.name, job.settings.steps)
    _run_child(job, on_metrics)
    lines = (run_dir / METRICS).read_text(encoding="utf-8").splitlines()
    mark_done(
        run_dir,
        {
            "stage": stage,
            "steps": job.settings.steps,
            "last_loss": json.loads(lines[-1])["loss"] if lines else None,
            "samples": job.samples,
            "model_sha256": model_sha256(run_dir / MODEL),
            "seconds_last_session": round(time.monotonic() - started, 3),
        },
    )
    return run_dir


def _prepare(
    config: TriptychConfig, stage: StageName, manifest: Path, init_model: Path, run_dir: Path
) -> Job:
    """Check the inputs and write the run's records; a run folder keeps what it was started with."""
    workspace = Path(config.workspace)
    cache = LatentCache(
        Workspace(workspace), init_model, config.training.model, config.training.dtype
    )
    data = LatentDataset.open(manifest, cache)
    job = Job(
        stage=stage,
        training=config.training,
        workspace=workspace.absolute(),
        manifest=manifest.absolute(),
        init_model=init_model.absolute(),
        run_dir=run_dir.absolute(),
        samples=data.fingerprint,
    )
    deepspeed_config(job.training, job.settings, job.training.num_processes)
    inputs = {
        "stage": stage,
        "model": job.training.model.hash(),
        "settings": job.settings.hash(),
        "dtype": job.training.dtype,
        "manifest": fingerprint_file(manifest),
        "init_model": model_sha256(init_model),
        "samples": job.samples,
    }
    known = run_dir / "inputs.json"
    if known.is_file() and read_json(known) != inputs:
        before = read_json(known)
        raise ConfigError(
            "this run folder belongs to a run with other settings or inputs",
            where=run_dir,
            found=f"changed: {', '.join(k for k in inputs if inputs[k] != before.get(k))}",
            expected="the settings and inputs the run was started with",
            do="use another run folder",
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in PACKAGES}
    write_text(run_dir / "config.yaml", dump_yaml(config))
    write_json(run_dir / "versions.json", {"python": platform.python_version(), **versions})
    write_text(run_dir / "job.json", job.model_dump_json(indent=2) + "\n")
    write_json(known, inputs)
    return job


def _run_child(job: Job, on_metrics: OnMetrics | None) -> None:
    set_aside_damaged(job.checkpoints)
    newest = newest_complete(job.checkpoints)
    tail = MetricsTail(job.run_dir / METRICS, newest[0] if newest else 0)
    ranks = job.training.num_processes
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", os.devnull),  # this machine only, whatever /job/hostfile says
        *("--num_gpus", str(ranks), "--master_port", str(free_port()), "--quiet"),
        *("--module", "training.loop"),
        *("--job", str(job.run_dir / "job.json"), "--parent-pid", str(os.getpid())),
    ]
    with (job.run_dir / LOG).open("ab") as output:
        log_start = output.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(ranks),
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the ranks
        )
    with _stopped_on_leaving(child), _noting_sigterm() as stop:
        while child.poll() is None:
            time.sleep(POLL_S)
            if stop:  # again and again, as the ranks may not have started yet
                _terminate_ranks(child)
            for line in tail.new_lines() if on_metrics else ():
                on_metrics(line)  # pyright: ignore[reportOptionalCall]  (checked in the line above)
    for line in tail.new_lines() if on_metrics else ():
        on_metrics(line)  # pyright: ignore[reportOptionalCall]  (likewise)
    if stop or child.returncode == EXIT_INTERRUPTED:
        _raise_interrupted(job)
    # DeepSpeed's runner exits with 0 when its own child was killed by a signal: 0 alone says little
    if child.returncode != 0 or not (job.run_dir / MODEL).is_dir():
        _raise_failed(job, child.returncode, log_start)


def _environment(ranks: int) -> dict[str, str]:
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    # On a busy CPU, threads that spin while they wait made a tiny step up to 10 times slower.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env["HF_HUB_OFFLINE"] = "1"  # models are folders on disk
    # DeepSpeed asks for unrestricted pickle; with this, only tensors and listed classes load
    env["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    return env


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_processes(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        below = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    ranks: list[psutil.Process] = []
    for process in below:
        try:
            if "training.loop" in process.cmdline() and "deepspeed.launcher.launch" not in (
                process.cmdline()
            ):
                ranks.append(process)
        except psutil.Error:  # gone, or a zombie
            continue
    return ranks


def _terminate_ranks(child: subprocess.Popen[bytes]) -> None:
    # Not to the launcher: it kills the ranks after 30 s, maybe in the middle of a checkpoint.
    for process in _rank_processes(child):
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue


@contextmanager
def _stopped_on_leaving(child: subprocess.Popen[bytes]) -> Generator[None]:
    """Leave no process behind, whatever ended the block."""
    try:
        yield
    finally:
        deadline = time.monotonic() + STOP_WAIT_S
        while child.poll() is None and _rank_processes(child) and time.monotonic() < deadline:
            _terminate_ranks(child)
            time.sleep(POLL_S)
        # What is left: a launcher that has started no rank yet, or ranks whose launcher was killed.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextmanager
def _noting_sigterm() -> Generator[list[int]]:
    """A list that SIGTERM fills; off the main thread, which has no handlers, it stays empty."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # the ranks stop when they see this process gone
        return

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
        if received and callable(before):
            before(received[0], None)  # an outer handler (Prefect's) hears of it too


def _raise_interrupted(job: Job) -> NoReturn:
    newest = newest_complete(job.checkpoints)
    raise TrainingFailed(
        "training was interrupted; what a checkpoint holds is kept",
        where=job.run_dir,
        found=f"step {newest[0] if newest else 0} of {job.settings.steps}",
        do="run the same command again to go on from there",
    )


def _raise_failed(job: Job, code: int, log_start: int) -> NoReturn:
    with (job.run_dir / LOG).open("rb") as f:
        f.seek(log_start)
        lines = f.read().decode(errors="replace").splitlines()
    raise TrainingFailed(
        f"the {job.stage} training process ended early (exit code {code}); its last log lines:\n"
        + "\n".join(f"    {line}" for line in lines[-LOG_LINES:]),
        where=job.run_dir / LOG,
        expected="exit code 0 and a trained model",
        do="mend the cause and run again; it goes on from the newest checkpoint",
    )
