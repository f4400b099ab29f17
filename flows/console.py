"""What the command line shows: stage lines, the table of counts, errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from schemas.counts import StageCount
from schemas.errors import ConfigError, TriptychError

out = Console()
err = Console(stderr=True)

LOGGERS = ("curation", "training", "inference", "flows")


def show_logs(verbose: bool) -> None:
    """Show the stages' ``key=value`` lines on the terminal; with ``verbose`` debug lines too."""
    handler = RichHandler(console=err, show_path=False, omit_repeated_times=False, markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


def show_counts(counts: Sequence[StageCount], title: str) -> None:
    """Print one row per stage: what came in, what went on, what did not and why, and the time."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("stage")
    table.add_column("records of")
    for name in ("input", "kept", "rejected", "failed", "produced", "reused", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("reasons", overflow="fold")
    for c in counts:
        failed = f"[red]{c.failed}[/red]" if c.failed else "0"
        produced = "" if c.produced is None else str(c.produced)
        reasons = ", ".join(f"{n} {r}" for r, n in c.reasons.items())
        numbers = (str(c.input), str(c.kept), str(c.rejected), failed, produced, str(c.reused))
        table.add_row(c.stage, c.unit, *numbers, f"{c.seconds:.1f}", reasons)
    out.print(table)


def show_error(error: TriptychError) -> int:
    """Print an error as its message alone, without a traceback. Returns the exit code."""
    err.print("[bold red]error:[/bold red]", end=" ")
    err.print(str(error), markup=False, highlight=False)
    return 2 if isinstance(error, ConfigError) else 1
