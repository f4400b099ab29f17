"""What the command line shows: stage lines, the table of counts, errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
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
    handler = RichHandler(
        console=err, show_path=False, show_level=False, log_time_format="%X", highlighter=None
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False
    # diffusers imports torchao where it is installed; the two then warn of what nobody here can
    # mend and nothing here uses
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


def show_counts(counts: Sequence[StageCount], title: str) -> None:
    """Print one row per stage (it fits 80 columns), then the reasons of what was left out."""
    numbers = ("input", "kept", "rejected", "failed", "made", "reused", "seconds")
    table = narrow_table(title, "stage", *numbers)
    for c in counts:
        failed = f"[red]{c.failed}[/red]" if c.failed else "0"
        made = "" if c.produced is None else str(c.produced)
        numbers = (str(c.kept), str(c.rejected), failed, made, str(c.reused))
        plural = c.unit if c.input == 1 else f"{c.unit}s"
        table.add_row(c.stage, f"{c.input} {plural}", *numbers, f"{c.seconds:.1f}")
    out.print(table)
    for c in counts:
        if c.reasons:
            reasons = ", ".join(f"{n} {reason}" for reason, n in c.reasons.items())
            out.print(f"left out in {c.stage}: {reasons}", highlight=False)


def narrow_table(title: str, *columns: str) -> Table:
    """An empty table that keeps to 80 columns; all columns but the first are set right."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def show_error(error: TriptychError) -> int:
    """Print an error as its message alone, without a traceback. Returns the exit code."""
    err.print("[bold red]error:[/bold red]", end=" ")
    err.print(str(error), markup=False, highlight=False)
    return 2 if isinstance(error, ConfigError) else 1
