"""Results of benchmarks: their JSON files, and docs/benchmarks.md, which is made from them.

Usage: python -m benchmarks.tables

A benchmark ends with ``write_report``, which leaves ``build/bench/NAME.json``: ``title``, ``about``
(a paragraph of Markdown), ``measured`` (the day), ``machine``, ``rows`` and ``targets``. A row has
``case``, ``ours``, ``peer``, ``ratio``, ``unit`` and any further columns; rows that share a
``group`` make a table of their own. A missed target stays in the file.

Each NAME has a section of the page between two markers. A section whose JSON is not in
``build/bench`` stays as it is, so that a machine can measure some of them alone.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("build/bench")
PAGE = Path("docs/benchmarks.md")

_HEAD = """\
# Benchmarks

Each section is made by its `make bench-NAME` from `build/bench/NAME.json` (`benchmarks/tables.py`),
so do not edit between the markers; a section that was not measured again stays as it was. The peer
runs in the same run, in turns, as its own program. Machines are shared, so ratios are what counts.
"""

Row = Mapping[str, Any]


def target(name: str, value: float, limit: float, *, at_most: bool = False) -> dict[str, Any]:
    """One entry of ``targets``: met from ``limit`` up, or with ``at_most`` from there down."""
    met = value <= limit if at_most else value >= limit
    return {
        "name": name, "value": round(value, 3), "target": limit, "at_most": at_most, "met": met,
    }  # fmt: skip


def write_report(
    path: Path,
    title: str,
    about: str,
    rows: Sequence[Row],
    targets: Sequence[Row],
    machine: Mapping[str, Any] | None = None,
) -> None:
    """Write the JSON of one benchmark and print its tables.

    Args:
        path: ``build/bench/NAME.json``; a plot of the same name with ``.svg`` beside it is shown in
            the section.
        title: Heading of the section.
        about: A paragraph of Markdown.
        rows: One per case.
        targets: As :func:`target` makes them.
        machine: What matters of the machine beside its CPUs.
    """
    report = {
        "title": title,
        "about": " ".join(about.split()),
        "measured": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), **(machine or {})},
        "rows": rows,
        "targets": targets,
        "plot": path.with_suffix(".svg").is_file(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(section(path.stem, report))


def section(name: str, report: Row) -> str:
    """One benchmark's part of the page, without its markers."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    measured = ", ".join(text for text in (report.get("measured"), machine) if text)
    parts = [f"## {report.get('title', name)}: `make bench-{name}`", f"({measured})"]
    if report.get("about"):
        parts.append(textwrap.fill(report["about"], 100, break_on_hyphens=False))
    groups: dict[str, list[Row]] = {}
    for row in report["rows"]:
        groups.setdefault(row.get("group", ""), []).append(row)
    for group, rows in groups.items():
        parts += [f"**{group}**"] * bool(group)
        parts.append(_table([{k: v for k, v in row.items() if k != "group"} for row in rows]))
    if report.get("plot"):
        parts.append(f"![{report['title']}](bench_{name}.svg)")
    if report["targets"]:
        parts.append(_table([_target_row(entry) for entry in report["targets"]]))
    return "\n\n".join(parts)


def update(page: str, reports: Mapping[str, Row]) -> str:
    """The page with the sections of ``reports`` in place of their old ones, or added at the end."""
    sections = {
        name: text.strip("\n")
        for name, text in re.findall(r"<!-- bench (\S+) -->\n(.*?)<!-- end \1 -->", page, re.DOTALL)
    }
    sections |= {name: section(name, reports[name]) for name in sorted(reports)}
    marked = (f"<!-- bench {n} -->\n{text}\n<!-- end {n} -->\n" for n, text in sections.items())
    return "\n".join([_HEAD, *marked])


def main() -> None:
    """Bring the page up to date with the results there are."""
    reports = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(RESULTS.glob("*.json"))}
    page = PAGE.read_text("utf-8") if PAGE.is_file() else ""
    PAGE.write_text(update(page, reports), encoding="utf-8")
    for name in (name for name, report in reports.items() if report.get("plot")):
        shutil.copyfile(RESULTS / f"{name}.svg", PAGE.with_name(f"bench_{name}.svg"))
    print(f"{PAGE}: {', '.join(reports) or 'no results, nothing changed'}")


def _table(rows: Iterable[Row]) -> str:
    """A Markdown table; columns in the order they first appear, without those empty everywhere."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [n for n in names if any(row.get(n) is not None for row in rows)]
    lines = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def _target_row(entry: Row) -> Row:
    sign = {True: "≤ ", False: "≥ ", None: ""}[entry.get("at_most")]
    return {
        "target": entry["name"],
        "value": entry["value"],
        "wanted": sign + _cell(entry["target"]),
        "met": entry["met"],
    }


if __name__ == "__main__":
    main()
