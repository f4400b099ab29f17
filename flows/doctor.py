"""``triptych doctor``: try every part on this machine and say plainly what works."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
import av.error
import numpy as np
import psutil
from rich.table import Table

from flows.console import err, out

CODECS = {
    "H.264": ("libx264", "yuv420p"),
    "HEVC": ("libx265", "yuv420p"),
    "HEVC 10-bit": ("libx265", "yuv420p10le"),
    "AV1": ("libsvtav1", "yuv420p"),
    "VP9": ("libvpx-vp9", "yuv420p"),
    "VP8": ("libvpx", "yuv420p"),
    "MPEG-4": ("mpeg4", "yuv420p"),
}
"""Codec -> (encoder, pixel format). The sample is made and decoded on the spot."""

FREE_DISK_GB = 5
FREE_MEMORY_GB = 4


@dataclass(frozen=True)
class Finding:
    """One thing examined: ``ok`` True works, False does not, None is absent but not needed."""

    name: str
    ok: bool | None
    detail: str


def examine() -> list[Finding]:
    """Examine everything, telling on the way what is being tried."""
    findings = [_packages()]
    findings += [_codec(name) for name in CODECS]
    parts: list[tuple[str, Callable[[], Finding]]] = [
        ("decord", _decord),
        ("GPU", _gpu),
        ("Ray", _ray),
        ("DeepSpeed", _deepspeed),
        ("Prefect", _prefect),
        ("browser", _browser),
        ("memory", _memory),
        ("disk", _disk),
    ]
    for name, part in parts:
        err.print(f"trying {name} ...", style="dim")
        findings.append(_guard(name, part))
    return findings


def show(findings: list[Finding]) -> None:
    """Print the findings as a table."""
    table = Table(header_style="bold")
    for column in ("part", "works", "detail"):
        table.add_column(column, overflow="fold")
    marks = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "[yellow]absent[/yellow]"}
    for f in findings:
        table.add_row(f.name, marks[f.ok], f.detail)
    out.print(table)


def _guard(name: str, part: Callable[[], Finding]) -> Finding:
    try:
        return part()
    except Exception as error:  # a doctor reports whatever goes wrong, of whatever kind
        return Finding(name, False, f"{type(error).__name__}: {error}")


def _packages() -> Finding:
    names = ("torch", "diffusers", "deepspeed", "ray", "prefect", "av", "scenedetect-headless")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    return Finding("packages", True, f"Python {sys.version.split()[0]}, {versions}")


def _codec(name: str) -> Finding:
    encoder, pix_fmt = CODECS[name]
    what = f"decoder {name}"

    def part() -> Finding:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sample.mkv"
            try:
                with _same_priority():
                    _encode(path, encoder, pix_fmt)
            except (av.error.FFmpegError, ValueError) as error:
                return Finding(what, None, f"no encoder {encoder} here to make a sample: {error}")
            with av.open(path) as container:
                frames = list(container.decode(video=0))
        ok = len(frames) == 8 and frames[0].width == 64
        return Finding(what, ok, f"decoded {len(frames)} of 8 frames with PyAV")

    return _guard(what, part)


@contextmanager
def _same_priority() -> Generator[None]:
    """Undo what SVT-AV1 does for root: it makes its caller, and so all children, real-time.

    The highest real-time priority starves everything else on the machine.
    """
    if not hasattr(os, "sched_setscheduler"):  # not on macOS
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def _encode(path: Path, encoder: str, pix_fmt: str) -> None:
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 and HEVC encoders talk on standard error
    quiet = {"x265-params": "log-level=error"} if encoder == "libx265" else {}
    with av.open(path, "w") as container:
        stream = cast("av.VideoStream", container.add_stream(encoder, rate=8, options=quiet))
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        for i in range(8):
            image = np.full((64, 64, 3), 30 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _decord() -> Finding:
    # In a child process: decord can end the process it runs in.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.mp4"
        _encode(path, *CODECS["H.264"])
        code = (
            "import sys, decord; r = decord.VideoReader(sys.argv[1]);"
            " print(len(r), r.get_batch([0, 7]).shape[0])"
        )
        found = _child([sys.executable, "-c", code, str(path)], 60)
    return Finding("decord", found == "8 2", f"frames in the file and read: {found}")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", None, "none: training and generation run on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", True, ", ".join(names))


def _ray() -> Finding:
    code = (
        "import ray; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False,"
        " logging_level='ERROR', object_store_memory=80 * 2**20);"
        " f = ray.remote(lambda x: x + 1); print(ray.get(f.remote(41)))"
    )
    found = _child([sys.executable, "-c", code], 180)
    return Finding("Ray", found == "42", "started, ran one task" if found == "42" else found)


_ONE_STEP = """
import torch
from schemas.config import TrainingConfig, TrainStageConfig
from training.deepspeed_config import deepspeed_config
from training.engine import Ranks, start_deepspeed
with Ranks.joined() as ranks:
    stage = TrainStageConfig(batch_size=1, micro_batch_size=1)
    engine = start_deepspeed(torch.nn.Linear(2, 2), deepspeed_config(TrainingConfig(), stage))
    engine.backward(engine(torch.ones(1, 2, device=ranks.device)).sum())
    engine.step()
    print(engine.global_steps, "step on", ranks.device)
"""


def _deepspeed() -> Finding:
    from training.launchers import free_port  # here: it loads torch

    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    found = _child([sys.executable, "-c", _ONE_STEP], 180, env)
    return Finding("DeepSpeed", found.startswith("1 step"), f"ZeRO-2 optimizer: {found}")


def _prefect() -> Finding:
    url = os.environ.get("PREFECT_API_URL")
    code = (
        "import flows\n"
        "from prefect import get_client\n"
        "with get_client(sync_client=True) as client:\n"
        "    print(client.hello().status_code)\n"
    )
    found = _child([sys.executable, "-c", code], 240)
    where = url or "temporary server"
    return Finding("Prefect", found == "200", f"{where} answered" if found == "200" else found)


def _browser() -> Finding:
    path = shutil.which("chromium")
    if path is None:
        return Finding("browser", None, "no chromium: only the report's browser tests need it")
    return Finding("browser", True, _child([path, "--version"], 60))


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    free = memory.available / 1e9
    text = f"{free:.1f} GB available of {memory.total / 1e9:.1f}, {os.cpu_count()} CPUs"
    return Finding("memory", free >= FREE_MEMORY_GB, text)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding("disk", free >= FREE_DISK_GB, f"{free:.1f} GB free here")


def _child(command: list[str], timeout_s: float, env: Mapping[str, str] | None = None) -> str:
    """Last line a command prints, or the last line of its error."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, **(env or {})},
    )
    text = done.stdout if done.returncode == 0 else done.stderr or f"exit code {done.returncode}"
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
