"""How two snapshots of a dataset differ, for the terminal, the log and Prefect."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml
from rich.markup import escape

from curation.drift import Distribution
from curation.snapshot_diff import Reason, SnapshotDiff, previous_of
from flows.console import narrow_table, out
from schemas.errors import InputError
from schemas.layout import Snapshot
from schemas.storage import latest, read_done


def find_pair(dataset: Path, old: str | None, new: str | None) -> tuple[Snapshot, Snapshot]:
    """The snapshots that are meant by two names.

    Args:
        dataset: Folder of all snapshots.
        old: Name of the older one; None: the one that the newer one took the place of.
        new: Name of the newer one; None: the one that ``LATEST`` names.

    Raises:
        InputError: There is no such snapshot.
    """
    newest = latest(dataset)
    if new is None and newest is None:
        raise InputError(
            "the dataset has no snapshot yet", where=dataset, do="run `triptych refresh` first"
        )
    after = _named(dataset, new or str(newest))
    if old is not None:
        return _named(dataset, old), after
    before = previous_of(after)
    if before is None:
        raise InputError(
            "the snapshot took the place of none that is still there",
            where=after.root,
            found=(read_done(after.root) or {}).get("previous"),
            expected="the name of another snapshot (key previous of _DONE.json)",
            do=f"name what to compare: `triptych diff OLD {after.root.name}`",
        )
    return before, after


def _named(dataset: Path, name: str) -> Snapshot:
    folder = dataset / name
    if read_done(folder) is None:
        there = sorted(d.name for d in dataset.glob("[!.]*") if read_done(d) is not None)
        raise InputError(
            "there is no finished snapshot of this name",
            where=dataset,
            found=name,
            expected=", ".join(there) or "none: the dataset is empty",
            do="give the name of a snapshot, and the same workspace and dataset as the refresh",
        )
    return Snapshot(folder)


def headline(diff: SnapshotDiff) -> dict[str, str]:
    """One line per kind of record: how many were kept, added and dropped, and mostly why."""
    lines: dict[str, str] = {}
    for kind, found in diff.records.items():
        line = f"{found.kept} kept"
        for count, word, why in (
            (found.added, "added", found.why_added),
            (found.dropped, "dropped", found.why_dropped),
        ):
            if count:
                line += f", {count} {word} ({reason_words(why[:3])})"
        lines[kind] = line
    return lines


def reason_words(reasons: Iterable[Reason]) -> str:
    """Reasons with their counts and stages, commonest first."""
    return ", ".join(f"{r.count} {r.stage}/{r.reason}" for r in reasons)


def reasons_by_title(diff: SnapshotDiff) -> dict[str, list[Reason]]:
    """Why records were dropped or added, and how kept ones changed, by kind; no empty lists."""
    titles: dict[str, list[Reason]] = {}
    for kind, found in diff.records.items():
        titles[f"{kind} dropped"] = found.why_dropped
        titles[f"{kind} added"] = found.why_added
        titles[f"{kind} kept, but changed"] = found.altered
    return {title: reasons for title, reasons in titles.items() if reasons}


def file_words(examples: Iterable[str]) -> str:
    """Names of files without their folders; of a renamed one both."""
    return ", ".join(" → ".join(Path(f).name for f in e.split(" → ")) for e in examples)


def value_words(value: object) -> str:
    """A setting's value the way a configuration file holds it."""
    if value is None:
        return "–"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def spread_words(values: Distribution) -> str:
    """Median, and in brackets the middle 90 %."""
    if not values.n:
        return "–"
    low, _, median, _, high = values.quantiles
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def show_diff(diff: SnapshotDiff) -> None:
    """Print what changed as tables of at most 80 columns."""
    columns = ("before", "dropped", "added", "after", "kept")
    table = narrow_table(f"{diff.old} → {diff.new}", "records", *columns)
    for kind, r in diff.records.items():
        table.add_row(kind, *map(str, (r.old, r.dropped, r.added, r.new, r.kept)))
    out.print(table)
    for title, reasons in reasons_by_title(diff).items():
        _show_reasons(title, reasons)
    for s in diff.settings:
        line = f"setting {s.key}: {value_words(s.old)} → {value_words(s.new)}"
        out.print(line, markup=False, highlight=False)
    _show_drift(diff)
    _show_shares(diff)


def _show_reasons(title: str, reasons: Iterable[Reason]) -> None:
    for r in reasons:
        files = f" [dim]{escape(file_words(r.examples))}[/dim]" if r.examples else ""
        out.print(f"{title}: {r.count} {r.stage}/{r.reason}{files}", highlight=False)


def _show_drift(diff: SnapshotDiff) -> None:
    title = "drift: median (5 % to 95 %), and Kolmogorov-Smirnov distance"
    table = narrow_table(title, "measured", "before", "after", "distance")
    for d in diff.drift:
        table.add_row(d.name, spread_words(d.old), spread_words(d.new), f"{d.distance:.3f}")
    out.print(table)


def _show_shares(diff: SnapshotDiff) -> None:
    title = "percent of its records that a stage left out; change in points"
    table = narrow_table(title, "stage", "reason", "before", "after", "change")
    for s in diff.shares:
        if s.old_count or s.new_count:
            percent = f"{100 * s.old_share:.1f}", f"{100 * s.new_share:.1f}"
            stage, change = s.stage if s.reason is None else "", f"{100 * s.change:+.1f}"
            table.add_row(stage, s.reason or "any", *percent, change)
    if table.row_count:
        out.print(table)
