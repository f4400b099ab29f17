"""What a flow run leaves in Prefect: a table of counts, a summary with links, a progress bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from schemas.counts import StageCount

log = logging.getLogger("flows")

UPDATE_EVERY_S = 2.0
"""A progress artifact is updated at most this often: every update is a call to Prefect's API."""


def leave_counts(key: str, counts: Sequence[StageCount]) -> None:
    """Leave a table artifact with one row per stage. ``key`` is lower-case words with dashes."""
    rows = [
        {
            "stage": c.stage,
            "unit": c.unit,
            "input": c.input,
            "kept": c.kept,
            "rejected": c.rejected,
            "failed": c.failed,
            "reused": c.reused,
            "seconds": round(c.seconds, 1),
            "reasons": ", ".join(f"{n} x {r}" for r, n in c.reasons.items()),
        }
        for c in counts
    ]
    create_table_artifact(key=key, table=rows, description="Counts per stage; they reconcile.")


def leave_summary(key: str, title: str, facts: Mapping[str, object]) -> None:
    """Leave a markdown artifact: a title and one line per fact."""
    lines = [f"# {title}", "", *(f"- **{name}**: {value}" for name, value in facts.items())]
    create_markdown_artifact(key=key, markdown="\n".join(lines))


class _Remaining(TimeRemainingColumn):
    """The time that is told, or rich's own estimate, which takes all pieces as equal."""

    def render(self, task: Task) -> Text:
        left_s = task.fields["left_s"]
        if left_s is None:
            return super().render(task)
        return Text(str(timedelta(seconds=round(left_s))), style="progress.remaining")


@contextmanager
def progress(key: str, what: str) -> Generator[Callable[..., None], None, None]:
    """Show progress of pieces of work: a bar in a terminal, and a progress artifact in Prefect.

    Gives a function ``tell(done, total, note="", left_s=None)``.
    """
    artifact = create_progress_artifact(progress=0.0, key=key, description=what)
    told = 0.0

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Remaining(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        row = bar.add_task(what, total=None, note="", left_s=None)

        def tell(done: int, total: int, note: str = "", left_s: float | None = None) -> None:
            nonlocal told
            bar.update(row, completed=done, total=total, note=note, left_s=left_s)
            if time.monotonic() - told >= UPDATE_EVERY_S:
                told = time.monotonic()
                _update(artifact, 100.0 * done / max(total, 1))

        yield tell
    _update(artifact, 100.0)


def _update(artifact: object, percent: float) -> None:
    if isinstance(artifact, UUID):
        update_progress_artifact(artifact_id=artifact, progress=min(percent, 100.0))
