"""The command ``triptych reproduce``: the paper's three ablation tables on a laptop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.console import err, out, show_logs
from flows.options import Verbose
from flows.reproduce_cells import TABLES, Budget, jobs, rows_of


def reproduce(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One seed, and the rows that the paper's trends are about."),
    ] = False,
    tables: Annotated[
        str, typer.Option("--tables", help="Which ones, with commas between.")
    ] = ",".join(TABLES),
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Models per cell; default 3, with --quick 1."),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option("--hours", min=0, help="Begin no further cell after so many hours."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Cells side by side; default: one per core."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Also write the page of results here.")
    ] = None,
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Where everything is kept.")
    ] = Path("workspace"),
    verbose: Verbose = False,
) -> None:
    """Train a small model for every row of the paper's ablation tables, and compare the trends.

    The tables are of attention masks, of similarity thresholds of the SFT data,
    and of training stages. Data is rendered (ToonWorld) and goes through the real
    pipeline, as do training, generation and scoring. Figures come with 95 %
    intervals over stories and seeds.

    On two cores --quick takes less than half an hour and everything an hour and
    three quarters. Stop it at any time: what is finished is kept, the same
    command goes on, and what --quick has done counts for the whole. To stop by
    itself:

    [bold]triptych reproduce --hours 1[/bold]
    """
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    show_logs(verbose)
    rows = rows_of([name.strip() for name in tables.split(",")], quick)
    budget = Budget()
    count = seeds or (1 if quick else 3)
    cells = jobs(rows, count)

    from flows.reproduce import core_hours, place_of, prepare, records_of, run_cells
    from flows.reproduce_page import page as page_of
    from flows.reproduce_page import show
    from schemas.storage import write_json, write_text

    place = place_of(workspace, budget)
    err.print(f"{len(cells)} cells in {place.root}", soft_wrap=True, highlight=False)
    data = prepare(place)
    run_cells(place, cells, hours, processes or os.cpu_count() or 1)
    records = records_of(place, cells)
    show(records, rows)
    text = page_of(records, rows, budget, data, core_hours(place))
    write_json(place.root / "results.json", records)
    for path in (place.root / "reproduction.md", *([page] if page else [])):
        write_text(path, text)
        out.print(f"page: {path}", soft_wrap=True, highlight=False)
    left = [cell.key for cell in cells if cell.key not in records]
    if left:
        text = f"{len(left)} cells left for want of time: {', '.join(left)}. Run again to go on."
        out.print(text, soft_wrap=True, highlight=False)
