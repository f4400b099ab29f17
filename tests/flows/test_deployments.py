"""prefect.yaml against a real Prefect server and a real process worker."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from schemas.layout import Snapshot
from schemas.storage import latest, read_done

ROOT = Path(__file__).parents[2]
PREFECT = Path(sys.executable).with_name("prefect")

# Prefect ignores unknown keys of a deployment silently, so a typing mistake would go unseen.
DEPLOYMENT_KEYS = {
    "name", "description", "tags", "entrypoint", "parameters", "schedules", "concurrency_limit",
    "work_pool",
}  # fmt: skip


def deployments() -> list[dict]:
    return yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def test_every_flow_is_deployed_with_a_written_schedule():
    entrypoints = {d["entrypoint"] for d in deployments()}
    assert entrypoints == {
        "flows/refresh.py:refresh_dataset",
        "flows/ablate.py:ablate_thresholds",
        "flows/train.py:train",
        "flows/generate.py:generate_batch",
        "flows/evaluate.py:evaluate_batch",
        "flows/end_to_end.py:end_to_end",
    }
    for deployment in deployments():
        assert set(deployment) <= DEPLOYMENT_KEYS, deployment["name"]
        assert deployment["description"]
        assert deployment["tags"]
        assert [s["active"] for s in deployment["schedules"]] == [False]
        if "gpu" in deployment["tags"]:
            assert deployment["concurrency_limit"]["limit"] == 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """A real Prefect server on loopback; gives the environment that points at it."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    env = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "COLUMNS": "200",  # Prefect cuts its tables to the width of the terminal
    }
    log = (home / "server.log").open("w")
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(env["PREFECT_API_URL"] + "/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (home / "server.log").read_text()
                assert time.monotonic() < deadline, "the Prefect server did not start"
                time.sleep(0.5)
        yield env
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def prefect(env: dict[str, str], *args: str) -> str:
    done = subprocess.run(
        [PREFECT, "--no-prompt", *args],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"prefect {' '.join(args)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deploy_all_and_run_refresh_dataset(server, tmp_path):
    prefect(server, "work-pool", "create", "--type", "process", "triptych-pool")
    prefect(server, "deploy", "--all")
    listed = prefect(server, "deployment", "ls")
    assert "refresh-dataset/nightly" in listed
    samples = ROOT / "assets/samples"
    films = ("big_buck_bunny.mp4", "chaplin.mp4", "sintel_trailer.mp4", "broken")
    config = {
        "workspace": str(tmp_path),
        "curation": {"sources": {"inputs": [str(samples / name) for name in films]}},
    }
    prefect(
        server,
        "deployment",
        "run",
        "refresh-dataset/nightly",
        "--param",
        f"config={json.dumps(config)}",
    )
    prefect(server, "worker", "start", "--pool", "triptych-pool", "--run-once")
    runs = prefect(server, "flow-run", "ls", "--state-type", "COMPLETED")
    assert "refresh-dataset" in runs, prefect(server, "flow-run", "ls")
    folder = latest(tmp_path / "datasets" / "demo")
    assert folder is not None
    assert read_done(folder) is not None
    assert Snapshot(folder).manifest("sft").is_file()
