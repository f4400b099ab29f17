"""Train a stage: start its ranks as child processes, see them through, and say how they ended.

On this machine the ranks outlive nothing: they stop after their step, with a checkpoint, when this
process is told to end or dies. On other machines they stop when a file appears in the run folder,
which all share. Calling :func:`run_stage` again goes on from there.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

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
from training.base_model import model_sha256
from training.checkpoints import newest_complete, set_aside_damaged
from training.datasets import check_dataset, open_dataset
from training.deepspeed_config import deepspeed_config
from training.job import (
    CHECKPOINTS,
    EXIT_GAVE_UP,
    EXIT_INTERRUPTED,
    LOG,
    METRICS,
    MODEL,
    STOP,
    Job,
    StageName,
    maths,
    stage_settings,
)
from training.launchers import LOOP, plan_start
from training.metrics import MetricsTail

log = logging.getLogger(__name__)

POLL_S = 0.3
STOP_WAIT_S = 120.0
"""How long ranks may take to end their step and write a checkpoint before they are killed."""
LAUNCHER_WAIT_S = 40.0
"""How long a launcher may take to end ranks on other machines that did not stop."""
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

    A finished run is returned at once, an interrupted one goes on from its newest whole checkpoint,
    also with another number of ranks, ZeRO stage or launcher (:func:`training.job.maths` says what
    must stay). A finished run that is asked for more steps goes on to them. The manifest must have
    been encoded (:func:`training.latents_job.encode_manifest`) unless training is from pixels.

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
        ConfigError: ``run_dir`` belongs to a run with other settings or inputs, or to one that is
            past ``steps``; or what the launcher needs is missing.
    """
    done = read_done(run_dir)
    steps = stage_settings(config.training, stage).steps
    if done is not None and done["steps"] == steps:
        log.info("train stage=%s run=%s reused=true", stage, run_dir.name)
        return run_dir
    started = time.monotonic()
    job = _prepare(config, stage, manifest, init_model, run_dir)
    log.info("train stage=%s run=%s steps=%d", stage, run_dir.name, steps)
    _run_child(job, on_metrics)
    lines = (run_dir / METRICS).read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    mark_done(
        run_dir,
        {
            "stage": stage,
            "steps": steps,
            "last_loss": losses[-1] if losses else None,
            "samples": job.samples,
            "model_sha256": model_sha256(run_dir / MODEL),
            "seconds_last_session": round(time.monotonic() - started, 3),
        },
    )
    return run_dir


def resume_step(run_dir: Path, steps: int) -> int:
    """The step a run goes on from; 0 where it starts.

    Args:
        run_dir: Folder of the run; need not be there yet.
        steps: Steps that are wanted now.

    Raises:
        ConfigError: The run is past them.
    """
    newest = newest_complete(run_dir / CHECKPOINTS)
    step = newest[0] if newest else 0
    reached = max(step, int((read_done(run_dir) or {}).get("steps", 0)))
    if reached > steps:
        raise ConfigError(
            "the run has gone further than it is asked to",
            where=run_dir,
            found=f"step {reached}, steps={steps}",
            expected=f"steps of at least {reached}: a run can be lengthened, not shortened",
            do=f"set steps={reached} or more, or another seed or workspace for a run of its own",
        )
    return step


def _prepare(
    config: TriptychConfig, stage: StageName, manifest: Path, init_model: Path, run_dir: Path
) -> Job:
    """Check the inputs and write the run's records; a run folder keeps what it was started with."""
    workspace = Path(config.workspace)
    data = open_dataset(
        config.training, manifest, init_model, Workspace(workspace), sources=config.curation.sources
    )
    check_dataset(data)
    job = Job(
        stage=stage,
        training=config.training,
        workspace=workspace.absolute(),
        manifest=manifest.absolute(),
        init_model=init_model.absolute(),
        run_dir=run_dir.absolute(),
        samples=data.fingerprint,
        manifest_sha256=fingerprint_file(manifest),
        init_sha256=model_sha256(init_model),
        sources=config.curation.sources,
    )
    deepspeed_config(job.training, job.settings)
    inputs = {
        **maths(job.training, stage),
        "manifest": job.manifest_sha256,
        "init_model": job.init_sha256,
        "samples": job.samples,
    }
    known = run_dir / "inputs.json"
    if known.is_file() and (changed := _differences(read_json(known), inputs)):
        raise ConfigError(
            "this run folder belongs to a run with other settings or inputs",
            where=run_dir,
            found=f"changed: {', '.join(changed)}",
            expected="the settings and inputs the run was started with",
            do="use another run folder",
        )
    resume_step(run_dir, job.settings.steps)
    plan_start(job, os.environ, os.getpid())  # what is missing is said before anything is written
    run_dir.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in PACKAGES}
    write_text(run_dir / "config.yaml", dump_yaml(config))
    write_json(run_dir / "versions.json", {"python": platform.python_version(), **versions})
    write_text(run_dir / "job.json", job.model_dump_json(indent=2) + "\n")
    write_json(known, inputs)
    return job


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of values that differ; within a group of settings ``group.name``."""
    found: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{key}.{name}" for name in _differences(old, new)]
        elif old != new:
            found.append(key)
    return found


def _run_child(job: Job, on_metrics: OnMetrics | None) -> None:
    set_aside_damaged(job.checkpoints)
    newest = newest_complete(job.checkpoints)
    tail = MetricsTail(job.run_dir / METRICS, newest[0] if newest else 0)
    (job.run_dir / STOP).unlink(missing_ok=True)
    model_before = _inode(job.run_dir / MODEL)
    start = plan_start(job, os.environ, os.getpid())
    for path, text in start.files.items():
        write_text(path, text)
    with (job.run_dir / LOG).open("ab") as output:
        log_start = output.tell()
        child = subprocess.Popen(
            start.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=start.env,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the ranks
        )
    with _stopped_on_leaving(job, child), _noting_sigterm() as stop:
        while child.poll() is None:
            time.sleep(POLL_S)
            if stop:  # again and again, as the ranks may not have started yet
                _ask_to_stop(job, child)
            for line in tail.new_lines() if on_metrics else ():
                on_metrics(line)  # pyright: ignore[reportOptionalCall]  (checked in the line above)
    for line in tail.new_lines() if on_metrics else ():
        on_metrics(line)  # pyright: ignore[reportOptionalCall]  (likewise)
    if stop or child.returncode == EXIT_INTERRUPTED:
        _raise_interrupted(job)
    # 0 alone says little: DeepSpeed's runner also gives it when what it started died of a signal
    if child.returncode != 0 or _inode(job.run_dir / MODEL) in (None, model_before):
        _raise_failed(job, child.returncode, log_start)


def _inode(folder: Path) -> int | None:
    """Tells a folder from one that takes its place; None where there is none."""
    return folder.stat().st_ino if folder.is_dir() else None


def _rank_processes(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        below = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    ranks: list[psutil.Process] = []
    for process in below:
        with suppress(psutil.Error):  # gone, or a zombie
            if LOOP in process.cmdline():
                ranks.append(process)
    return ranks


def _ask_to_stop(job: Job, child: subprocess.Popen[bytes]) -> None:
    """Have the ranks save a checkpoint after their step and end."""
    if job.training.launch.launcher != "local":
        (job.run_dir / STOP).touch()
        return
    # Not to the launcher: it kills the ranks after 30 s, maybe in the middle of a checkpoint.
    for process in _rank_processes(child):
        with suppress(psutil.NoSuchProcess):
            process.terminate()


@contextmanager
def _stopped_on_leaving(job: Job, child: subprocess.Popen[bytes]) -> Generator[None]:
    """Leave no process behind, whatever ended the block."""
    here = job.training.launch.launcher == "local"
    try:
        yield
    finally:
        deadline = time.monotonic() + STOP_WAIT_S
        while child.poll() is None and time.monotonic() < deadline:
            if here and not _rank_processes(child):
                break
            _ask_to_stop(job, child)
            time.sleep(POLL_S)
        if not here and child.poll() is None:
            child.terminate()  # pdsh, mpirun and srun end what they started elsewhere
            with suppress(subprocess.TimeoutExpired):
                child.wait(LAUNCHER_WAIT_S)
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
        retryable=code not in (0, EXIT_GAVE_UP),
        where=job.run_dir / LOG,
        expected="exit code 0 and a trained model",
        do="mend the cause and run again; it goes on from the newest checkpoint",
    )
