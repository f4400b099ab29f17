"""What the HTML pages share: the templates' environment and the ways numbers are written."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def environment() -> Environment:
    """Templates of this folder. Everything is escaped, and a missing value is an error."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["basename"] = _basename
    made.filters["clock"] = _clock
    return made


def _basename(uri: str) -> str:
    return Path(uri).name


def _clock(seconds: float) -> str:
    """Seconds as m:ss.s, the way a player shows a position."""
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}"
