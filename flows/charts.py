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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Placeholder colours. None may be black: matplotlib leaves black out of the SVG.
INK = "#010101"
RULE = "#020202"
ACCENT = "#030303"
WARM = "#040404"
BAND = "#050505"
_CSS = {INK: "--ink", RULE: "--rule", ACCENT: "--accent", WARM: "--warm", BAND: "--band"}

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


def ablation_chart(low: Sequence[float], kept: Sequence[int]) -> Markup:
    """Windows kept over the low threshold.

    Args:
        low: Thresholds tried, ascending.
        kept: Windows kept at each.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(_HEIGHT)
        axes.plot(low, kept, color=ACCENT, linewidth=1.6, marker="o", markersize=5)
        axes.set_xlabel("low threshold")
        axes.set_ylabel("windows kept")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        pairs = ", ".join(f"{n} at {t:g}" for t, n in zip(low, kept, strict=True))
        return _svg(figure, "ablation", f"Windows kept over the low threshold: {pairs}.")


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
