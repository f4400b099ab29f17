import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from flows import cli
from schemas.config import PRESETS
from schemas.layout import Workspace

runner = CliRunner()
COMMANDS = [
    "config", "refresh", "diff", "ablate", "train", "generate", "evaluate", "report", "demo",
    "doctor",
]  # fmt: skip


def triptych(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *args], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    shown = runner.invoke(cli.app, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output
    assert len(shown.output.splitlines()) > 5


def test_help_lists_every_command():
    shown = runner.invoke(cli.app, ["--help"]).output
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("name", PRESETS)
def test_config_prints_commented_yaml(name):
    shown = runner.invoke(cli.app, ["config", name])
    assert shown.exit_code == 0
    assert yaml.safe_load(shown.output)["workspace"] == "workspace"
    assert "# Optimizer steps" in shown.output


def test_a_wrong_key_is_one_clear_message():
    done = triptych("train", "--set", "training.sft.stepz=3")
    assert done.returncode == 2
    assert "did you mean training.sft.steps?" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_starts_without_heavy_imports():
    code = (
        "import sys, flows.cli;"
        " print([m for m in ('torch','ray','prefect','deepspeed','av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_asked_stop_leaves_nothing_running(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "refresh", "--workspace", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not list(Workspace(tmp_path).cache("sources").glob("[!.]*")):  # Ray is at work
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("uvicorn" in " ".join(child.cmdline()) for child in family)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "interrupted; finished work is kept" in said
    _, left = psutil.wait_procs(family, timeout=60)
    assert [child for child in left if child.is_running()] == []
