"""The report's charts: matplotlib figures as inline SVG that follows the page's colours and fonts.

Figures are drawn in placeholder colours, which become CSS variables in the SVG: one drawing serves
light and dark pages. Text stays text, so it can be read aloud, searched and scaled.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curation.drift import Drift

# Placeholder colours. None may be black: matplotlib leaves black out of the SVG.
INK = "#010101"
RULE = "#020202"
ACCENT = "#030303"
WARM = "#040404"
BAND = "#050505"
GOOD = "#060606"
_CSS = {
    INK: "--ink", RULE: "--rule", ACCENT: "--accent", WARM: "--warm", BAND: "--band",
    GOOD: "--good",
}  # fmt: skip

Line = tuple[Sequence[float], Sequence[float]]
"""Horizontal and vertical places of the marks of a line."""

# Four lines are told apart by mark and dash as well as by colour.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": ACCENT, "marker": "o"},
    {"color": WARM, "marker": "s", "linestyle": (0, (5, 2))},
    {"color": GOOD, "marker": "^", "linestyle": (0, (2, 2))},
    {"color": INK, "marker": "D", "linestyle": (0, (6, 2, 1, 2))},
)

# Inches (times 72 points). A phone shows the drawing at about 0.85, so 11 points stay readable.
_WIDTH, _HEIGHT = 5.4, 2.9

# A run of 10,000 steps would otherwise be a megabyte of dots; every n-th step is drawn.
_MAX_DOTS = 500

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "triptych",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def similarity_histogram(
    values: Sequence[float], statistic: str, low: float, high: float
) -> Markup:
    """How many windows have which similarity, with the band ``[low, high]`` kept for SFT marked.

    Args:
        values: One similarity per window, -1 to 1. At least one.
        statistic: Name of the statistic, for the axis.
        low: Lowest similarity kept.
        high: Highest similarity kept.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(_HEIGHT)
        left, right = min(*values, low, 0.0), max(*values, 1.0)
        # Bins begin at the threshold, so that no bar holds windows of both sides.
        width = (right - left) / 30
        edges = low + width * np.arange(-np.ceil((low - left) / width), (right - low) / width + 1)
        axes.axvspan(low, high, color=BAND, linewidth=0)
        axes.hist(values, bins=edges.tolist(), color=ACCENT, rwidth=0.88)
        for edge in (low, high):
            axes.axvline(edge, color=WARM, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.set_xlabel(f"{statistic.replace('_', ' ')} similarity")
        axes.set_ylabel("windows")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        kept = sum(low <= v <= high for v in values)
        return _svg(
            figure,
            "similarity",
            f"Histogram of {statistic} over {len(values)} windows, {min(values):.2f} to "
            f"{max(values):.2f}; {kept} lie in the band from {low:g} to {high:g}.",
        )


def drift_chart(drift: Drift) -> Markup:
    """Two snapshots' distributions over each other: after as bars, before as a line.

    Args:
        drift: With at least one value; each side is drawn as shares of its own values.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(_HEIGHT)
        before, after = (
            np.asarray(side.counts) / max(side.n, 1) for side in (drift.old, drift.new)
        )
        axes.stairs(after, drift.edges, fill=True, color=ACCENT, alpha=0.55, label="after")
        axes.stairs(before, drift.edges, color=WARM, linewidth=1.6, label="before")
        axes.set_xlabel(drift.name)
        axes.set_ylabel(f"share of {drift.unit}s")
        axes.set_ylim(bottom=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        ends = f"{drift.edges[0]:.3g} to {drift.edges[-1]:.3g}"
        return _svg(
            figure,
            f"drift-{drift.name}",
            f"Histograms of {drift.name} from {ends}: {drift.old.n} {drift.unit}s before, "
            f"{drift.new.n} after; Kolmogorov-Smirnov distance {drift.distance:.3f}.",
        )


def loss_chart(
    stage: str, steps: Sequence[int], losses: Sequence[float], conditional: Sequence[bool]
) -> Markup:
    """Loss per optimizer step with its moving mean; conditional steps have their own mark.

    Args:
        stage: Stage name, for ids and the description.
        steps: Optimizer steps.
        losses: Loss of each step.
        conditional: Whether the step trained the segment-level conditional mask.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(_HEIGHT)
        drawn = range(0, len(steps), -(-len(steps) // _MAX_DOTS))
        for wanted, color, marker, label in (
            (False, ACCENT, "o", "all scenes generated"),
            (True, WARM, "D", "conditional step"),
        ):
            picked = [i for i in drawn if bool(conditional[i]) is wanted]
            if picked:
                x, y = [steps[i] for i in picked], [losses[i] for i in picked]
                axes.scatter(x, y, s=13, c=color, marker=marker, alpha=0.55, label=label, lw=0)
        mean = moving_mean(losses)
        x, y = [steps[i] for i in drawn], [mean[i] for i in drawn]
        axes.plot(x, y, color=INK, linewidth=1.6, label="moving mean")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return _svg(
            figure,
            f"loss-{stage}",
            f"Loss of {stage} over {len(steps)} steps: moving mean from {mean[0]:.3f} to "
            f"{mean[-1]:.3f}; {sum(conditional)} conditional steps.",
        )


def training_panels(
    stage: str, steps: Sequence[int], series: Mapping[str, Sequence[float]]
) -> Markup:
    """Small charts below each other, one per series (learning rate, gradient norm, speed).

    Args:
        stage: Stage name, for ids and the description.
        steps: Optimizer steps, shared by all series.
        series: Values per step under the label of their panel.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        drawn = range(0, len(steps), -(-len(steps) // _MAX_DOTS))
        panels = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, values) in zip(panels, series.items(), strict=True):
            x, y = [steps[i] for i in drawn], [values[i] for i in drawn]
            axes.plot(x, y, color=ACCENT, linewidth=1.4)
            axes.set_title(label, loc="left", fontsize=10, pad=3)
            # Two ticks are enough for a small panel: nothing, and the most there was.
            top = max(values) or 1.0
            axes.set_ylim(0, top * 1.08)
            axes.set_yticks([0, top], labels=["0", f"{top:.3g}"])
        panels[-1].set_xlabel("optimizer step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        ends = "; ".join(f"{label} ends at {values[-1]:.3g}" for label, values in series.items())
        return _svg(figure, f"panels-{stage}", f"{stage} over {len(steps)} steps: {ends}.")


def threshold_chart(name: str, label: str, lines: Mapping[str, Line], top: float | None) -> Markup:
    """Something that depends on the low threshold, one line per statistic.

    Args:
        name: Prefix of the ids.
        label: Of the vertical axis.
        lines: Low thresholds, ascending, and values, under the name of the statistic.
        top: Where the vertical axis ends, if it begins at zero.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(_HEIGHT)
        for (statistic, (lows, values)), style in zip(lines.items(), _LINES, strict=False):
            axes.plot(lows, values, label=statistic, linewidth=1.6, markersize=5, **style)
        axes.set_xlabel("low threshold")
        axes.set_ylabel(label)
        if top is not None:
            axes.set_ylim(0, 1.04 * top)
        _name_lines(figure, axes, len(lines))
        return _svg(figure, name, f"{label} over the low threshold. {_said(lines)}.")


def precision_recall_chart(
    lines: Mapping[str, Line], lows: Mapping[str, Sequence[float]]
) -> Markup:
    """Precision over recall, one line per statistic and one mark per threshold.

    Args:
        lines: Recall and precision, 0 to 1, under the name of the statistic.
        lows: The threshold of each mark, named at the marks where there is one statistic.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(_HEIGHT)
        for (statistic, (recall, precision)), style in zip(lines.items(), _LINES, strict=False):
            axes.plot(recall, precision, label=statistic, linewidth=1.6, markersize=5, **style)
            # Of marks that lie on one another the lowest threshold is named.
            names: dict[tuple[float, float], float] = {}
            for place in zip(recall, precision, lows[statistic], strict=True):
                names.setdefault(place[:2], place[2])
            for place, low in names.items() if len(lines) == 1 else ():
                axes.annotate(f"{low:g}", place, (4, 6), textcoords="offset points", fontsize=9)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        axes.set_xlim(-0.03, 1.06)
        axes.set_ylim(0, 1.08)
        _name_lines(figure, axes, len(lines))
        return _svg(figure, "truth", f"Precision over recall. {_said(lines)}.")


def threshold_histogram(
    values: NDArray[np.float64], statistic: str, marks: Mapping[float, str]
) -> Markup:
    """How many windows have which similarity, with thresholds marked.

    Args:
        values: (W,) one similarity per window; W >= 1.
        statistic: Name of the statistic, for the axis and the ids.
        marks: Thresholds, as similarities, and how each is called.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(_HEIGHT)
        pad = max(0.02, 0.04 * float(np.ptp(values)))
        left, right = float(values.min()) - pad, float(values.max()) + pad
        counts, edges = np.histogram(values, bins=40, range=(left, right))
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.88, align="edge", color=ACCENT)
        named = right
        for mark in sorted((m for m in marks if left <= m <= right), reverse=True):
            axes.axvline(mark, color=WARM, linewidth=1.4, linestyle=(0, (4, 3)))
            if named - mark >= 0.05 * (right - left) or named == right:
                at = axes.get_xaxis_transform()
                axes.text(mark, 1.02, marks[mark], transform=at, ha="center", fontsize=9)
                named = mark
        axes.set_xlim(left, right)
        axes.set_xlabel(f"{statistic.replace('_', ' ')} similarity")
        axes.set_ylabel("windows")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        return _svg(
            figure,
            f"similarity-{statistic}",
            f"Histogram of {statistic} over {len(values)} windows, {values.min():.2f} to "
            f"{values.max():.2f}; thresholds at {', '.join(f'{m:.2f}' for m in sorted(marks))}.",
        )


def _name_lines(figure: Figure, axes: Axes, count: int) -> None:
    if count > 1:
        columns = 2 if count > 2 else count
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def _said(lines: Mapping[str, Line]) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{y:.2f} at {x:.2f}" for x, y in zip(*line, strict=True))
        for name, line in lines.items()
    )


def moving_mean(values: Sequence[float]) -> list[float]:
    """Mean of the last k values at each step, k a tenth of the series and at least 5.

    The first k - 1 entries average what there is so far.
    """
    k = max(5, len(values) // 10)
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - k)
    return ((total[ends] - total[starts]) / (ends - starts)).tolist()


def _new(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an ``<svg>`` element that can stand in a page beside others.

    Args:
        figure: What to draw.
        name: Prefix of every id inside, so that two charts on one page do not share ids.
        description: What the chart says, for those who do not see it.
    """
    buffer = io.StringIO()
    # No metadata: it would hold the time and matplotlib's web address.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # matplotlib's own style rule is global and would reach the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for placeholder, variable in _CSS.items():
        svg = svg.replace(placeholder, f"var({variable})")
    label = str(escape(description))
    svg = svg.replace("<svg", f'<svg class="chart" role="img" aria-label="{label}"', 1)
    return Markup(svg)  # ours alone: numbers, and words from the config's fixed choices
