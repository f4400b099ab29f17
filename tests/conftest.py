"""Shared by all tests: the project's folder, and a Prefect that keeps to a folder of its own."""

import os
import tempfile
from pathlib import Path

# Before Prefect is imported anywhere: tests must not touch, or depend on, the user's own Prefect.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="triptych-prefect-")
os.environ.pop("PREFECT_API_URL", None)

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# A slow machine is no reason to fail.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch):
    """Default configs name ``assets/samples`` relative to the project."""
    monkeypatch.chdir(ROOT)
