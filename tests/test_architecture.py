"""The import rule of docs/architecture.md: imports only point back along the line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = ["schemas", "curation", "training", "inference", "flows"]
ONLY_IN = {
    "prefect": {"flows"},
    "ray": {
        "curation/pipeline.py",
        "training/latents_job.py",
        "inference/pool.py",
        "flows/doctor.py",
    },
    "deepspeed": {"training/engine.py", "flows/doctor.py"},
}
FILES = sorted(p for room in LINE for p in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of all modules a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_back(path: Path):
    room = path.relative_to(ROOT).parts[0]
    allowed = LINE[: LINE.index(room) + 1]
    for name in imported(path):
        top = name.split(".")[0]
        if top in LINE:
            assert top in allowed, f"{room} must not import {name}"
        assert top not in {"tests", "benchmarks"}


@pytest.mark.parametrize("package", ONLY_IN)
def test_frameworks_stay_in_their_files(package: str):
    for path in FILES:
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ONLY_IN[package] or relative.as_posix() in ONLY_IN[package]:
            continue
        used = {n for n in imported(path) if n.split(".")[0] == package}
        assert not used, f"{relative} imports {used}; only {sorted(ONLY_IN[package])} may"


def test_every_package_is_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'packages = ["schemas", "curation", "training", "inference", "flows"]' in text
    assert {p.name for p in ROOT.iterdir() if (p / "__init__.py").is_file()} == set(LINE)


def test_no_rooms_without_a_meaning():
    vague = {"utils.py", "common.py", "helpers.py", "misc.py", "core.py"}
    assert not [p for p in FILES if p.name in vague]
