"""Shared by all tests: the project's folder, and a Prefect that keeps to a folder of its own."""

import os
import tempfile
from pathlib import Path

# Before Prefect is imported anywhere: tests must not touch, or depend on, the user's own Prefect.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="triptych-prefect-")
os.environ.pop("PREFECT_API_URL", None)

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch):
    """Default configs name ``assets/samples`` relative to the project."""
    monkeypatch.chdir(ROOT)
