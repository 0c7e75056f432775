"""Figures as JSON and Markdown, and two plots.

The plots answer two questions at a glance: how far apart are pairs that people tell apart, and is a probability of
0.8 right four times in five?
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppod_trainer.reward_training.evaluate import Calibration, Evaluation

FIGURES_FILE = "figures.json"
REPORT_FILE = "report.md"
MARGINS_PLOT = "margins.png"
RELIABILITY_PLOT = "reliability.png"

BLUE = "#2b6cb0"
ORANGE = "#dd6b20"
GREY = "#718096"


def write_report(name: str, evaluation: Evaluation, directory: Path) -> None:
    """Write figures, a short report and the plots into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FIGURES_FILE).write_text(figures_json(evaluation) + "\n", encoding="utf-8")
    (directory / REPORT_FILE).write_text(markdown(name, evaluation), encoding="utf-8")
    plot_margins(name, evaluation, directory / MARGINS_PLOT)
    plot_reliability(name, evaluation.calibration, directory / RELIABILITY_PLOT)


def figures_json(evaluation: Evaluation) -> str:
    """The figures as JSON; an empty calibration bin reads null."""
    calibration = evaluation.calibration
    bins = [
        {"predicted": _rounded(p), "observed": _rounded(o), "entries": int(n)}
        for p, o, n in zip(calibration.predicted, calibration.observed, calibration.counts, strict=True)
    ]
    figures = {
        "held_out_reviews": evaluation.reviews,
        "all_pairs": {"pairs": evaluation.every.pairs, "accuracy": _rounded(evaluation.every.accuracy)},
        "clear_pairs": {"pairs": evaluation.clear.pairs, "accuracy": _rounded(evaluation.clear.accuracy)},
        "expected_calibration_error": _rounded(calibration.error),
        "correlation_with_mean_rating": _rounded(evaluation.correlation),
        "calibration_bins": bins,
    }
    return json.dumps(figures, indent=2)


def markdown(name: str, evaluation: Evaluation) -> str:
    """A short report in Markdown."""
    every, clear = evaluation.every, evaluation.clear
    return f"""# {name}: held-out figures

Measured on {evaluation.reviews:,} reviews that trained neither this head nor its judge.

| held-out pairs | pairs | ordered as people do |
|---|---:|---:|
| all with different mean ratings | {every.pairs:,} | {every.accuracy:.1%} |
| mean ratings differ by more than 1 | {clear.pairs:,} | {clear.accuracy:.1%} |

Expected calibration error of P(a preferred over b): {evaluation.calibration.error:.3f}.
Correlation of score and mean rating: {evaluation.correlation:.3f}.

![Score margins]({MARGINS_PLOT})

![Reliability]({RELIABILITY_PLOT})
"""


def plot_margins(name: str, evaluation: Evaluation, file: Path) -> None:
    """Histogram of score margins: all pairs and clear pairs; left of zero is a pair ordered the wrong way."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    limit = float(np.quantile(np.abs(evaluation.margins), 0.999))
    edges = np.linspace(-limit, limit, 61).tolist()
    every, clear = evaluation.every, evaluation.clear
    axes.hist(
        evaluation.margins, bins=edges, color=GREY, alpha=0.45, label=f"all pairs: {every.accuracy:.1%} right of zero"
    )
    axes.hist(
        evaluation.clear_margins,
        bins=edges,
        histtype="step",
        color=BLUE,
        linewidth=1.8,
        label=f"ratings differ by > 1: {clear.accuracy:.1%}",
    )
    axes.axvline(0, color=ORANGE, linewidth=1.2)
    axes.set_xlabel("score of the preferred review less score of the other")
    axes.set_ylabel("pairs (thousands)")
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value / 1000:g}")
    axes.set_title(f"{name}: margins on held-out pairs")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.22)
    _finish(figure, axes, file)


def plot_reliability(name: str, calibration: Calibration, file: Path) -> None:
    """Predicted against observed share of preferences; on the diagonal a probability means what it says."""
    figure, axes = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    filled = calibration.counts > 0
    shares = calibration.counts[filled] / calibration.counts.sum()
    axes.plot(calibration.predicted[filled], calibration.observed[filled], color=BLUE, linewidth=1.2)
    axes.scatter(
        calibration.predicted[filled],
        calibration.observed[filled],
        s=20 + 400 * shares,
        color=BLUE,
        label=f"held-out pairs (area: share), ECE {calibration.error:.3f}",
        zorder=3,
        clip_on=False,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("predicted P(a preferred over b)")
    axes.set_ylabel("observed share")
    axes.set_title(f"{name}: reliability")
    axes.legend(loc="upper left", frameon=False, fontsize=8, markerscale=0.6)
    _finish(figure, axes, file)


def _finish(figure: Figure, axes: Axes, file: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    # Without the software's name and version in the file, the same figures give the same bytes.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
