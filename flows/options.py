"""The options that commands share, and the settings they make together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from schemas.config import PRESETS, TriptychConfig, load_config, preset

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file; it may hold only the keys you change."),
]
Preset = Annotated[
    str, typer.Option("--preset", "-p", help=f"Where settings start: {', '.join(PRESETS)}.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override one key, e.g. -s curation.manifests.low=0.3"),
]
InWorkspace = Annotated[
    str | None, typer.Option("--workspace", "-w", help="Workspace folder (key: workspace).")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show debug lines too.")]


def settings_of(
    config: Path | None, start: str, overrides: list[str] | None, workspace: str | None
) -> TriptychConfig:
    """The settings that a command runs with: a preset, a file over it, and options over both."""
    changes = list(overrides or [])
    if workspace is not None:
        changes.append(f"workspace={workspace}")
    return load_config(config, changes, base=preset(start))
