"""The reproduction as tables on the terminal and as a page of Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.console import narrow_table, out
from flows.reproduce_cells import Budget, Row
from flows.reproduce_tables import DRAWS, MEASURES, Records, Seen, estimates, seeds_of, trends

_MISSING = "missing"
_TITLES = {
    "masks": "Attention masks",
    "thresholds": "Similarity threshold of the SFT data",
    "stages": "Training stages",
}
_NOTES = {
    "masks": "v1, v3 and v4 are inferred from their descriptions; the authors published v2 and v5.",
    "thresholds": "*no SFT*, the model before it ever saw related scenes, stands beside "
    "the paper's CogVideoX; *none* lets every window in, also those of unrelated shots.",
    "stages": "*SFT only* leaves pre-training out, as the paper's recipe is read; "
    "*SFT only, longer* has as many steps as both stages, and so has *pre-training only*.",
}
Rows = Mapping[str, Sequence[Row]]


def show(records: Records, rows: Rows) -> None:
    """Print each table, the paper's figures and ours one under the other, then the trends."""
    for table_name, members in rows.items():
        table = narrow_table(_TITLES[table_name], "", "", *MEASURES.values())
        for row in members:
            name = row.name
            if any(row.paper):
                table.add_row(name, "paper", *map(_number, row.paper), "", "")
                name = ""
            ours = estimates(records, row)
            texts = [e.short for e in ours.values()] if ours else [_MISSING]
            table.add_row(name, "ours", *texts)
        out.print(table)
    out.print("All x 100; ± is half of the 95 % interval.\n", highlight=False)
    for seen in trends(records, rows):
        out.print(f"{seen.trend.table}: {_said(seen)}", soft_wrap=True, highlight=False)


def _said(seen: Seen) -> str:
    by = dict(zip(seen.trend.measures, (seen.truth, seen.score), strict=True))
    said = (f"{MEASURES.get(name, 'mean of both')} {by[name].text}" for name in by)
    return f"{seen.trend.said}: {seen.verdict}; difference {', '.join(said)}"


def page(
    records: Records, rows: Rows, budget: Budget, data: Mapping[str, Any], core_hours: float
) -> str:
    """All of it as Markdown."""
    parts = [
        "# The paper's ablation tables, reproduced on a CPU",
        _how(budget, core_hours),
        *(_table(records, name, members, data) for name, members in rows.items()),
        _trends(trends(records, rows)),
    ]
    return "\n\n".join(parts) + "\n"


def _how(budget: Budget, core_hours: float) -> str:
    total = budget.pretrain_steps + budget.sft_steps
    frames = f"{budget.frames} frames" if budget.frames > 1 else "a still"
    return f"""Made by `triptych reproduce` on {datetime.now(UTC):%Y-%m-%d}; {_processor()},
one core per cell, {core_hours:.1f} core-hours so far.

The paper fine-tunes CogVideoX; here every cell fine-tunes the embedded transformer that draws
single pictures of ToonWorld, so figures cannot be compared with the paper's, only what they do from
row to row. A scene is {frames}. Where nothing else is said, a
cell takes {total:,} steps of {budget.batch_size} stories: {budget.pretrain_steps:,} of pre-training
and {budget.sft_steps:,} of SFT. All are scored on the same {budget.prompts} held-out stories.

- *visual*, *semantic* and *sequence* are the paper's scores, with the embedded ViCLIP.
- *same style* is the share of pairs of scenes and hidden style variables that agree; *as told* the
  share of what captions tell that is seen (stills: but for the action). Both are read by the
  embedded probe.
- In brackets are 95 % intervals of a bootstrap over stories and seeds ({DRAWS:,} draws, the same
  stories in all seeds)."""


def _table(records: Records, name: str, rows: Sequence[Row], data: Mapping[str, Any]) -> str:
    header = ["", "paper: visual", "semantic", "sequence", *(f"ours: {m}" if k == 0 else m
              for k, m in enumerate(MEASURES.values())), "seeds"]  # fmt: skip
    chosen: Mapping[str, Any] = data.get("thresholds", {}) if name == "thresholds" else {}
    if chosen:
        header += ["windows", "of one story"]
    lines = [f"## {_TITLES[name]}", "", _NOTES[name], "", _line(header)]
    lines.append(_line(["---"] * len(header)))
    for row in rows:
        ours = estimates(records, row)
        texts = [e.text for e in ours.values()] if ours else [_MISSING] * len(MEASURES)
        cells = [row.name, *map(_number, row.paper), *texts, str(len(seeds_of(records, row.cell)))]
        if chosen:
            kept = chosen.get(f"{row.cell.low:g}") if row.cell.stages != "pretrain" else None
            cells += [str(kept["windows"]), f"{kept['related']:.0%}"] if kept else ["", ""]
        lines.append(_line(cells))
    return "\n".join(lines)


def _trends(found: Sequence[Seen]) -> str:
    header = ["trend", "difference, ground truth", "difference, ViCLIP", "verdict"]
    lines = [
        "## Trends",
        "",
        "The verdict is by the ground truth: a trend holds where the interval of the difference is",
        "above 0; where it reaches below, the two are not separated.",
        "",
        _line(header),
        _line(["---"] * len(header)),
    ]
    lines += [
        _line([f"{s.trend.table}: {s.trend.said}", s.truth.text, s.score.text, s.verdict])
        for s in found
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _processor() -> str:
    """Name and cores of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores"
