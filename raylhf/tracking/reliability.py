"""A picture of how far a reward model's probabilities can be trusted."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def reliability_plot(reliability: Mapping[str, Any], path: str | Path, title: str) -> None:
    """Write a PNG: predicted against observed probability by bin, and below it how many predictions a bin holds.

    `reliability` has `edges` [bins + 1], `predicted`, `observed` and `counts` [bins] (NaN in an empty bin), and `ece`.
    """
    # Without pyplot: no global state, no display, and safe in a thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = ("edges", "predicted", "observed", "counts")
    edges, predicted, observed, counts = ([float(value) for value in reliability[key]] for key in series)
    filled = [i for i, count in enumerate(counts) if count > 0 and math.isfinite(predicted[i])]
    figure = Figure(figsize=(4.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    curve, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot((edges[0], edges[-1]), (edges[0], edges[-1]), color="0.7", linestyle="--", label="calibrated")
    curve.plot([predicted[i] for i in filled], [observed[i] for i in filled], marker="o", color="C0", label="model")
    curve.set_ylabel("share of pairs where raters agree")
    curve.set_ylim(-0.02, 1.02)
    curve.set_title(f"{title}\ncalibration error {reliability['ece']:.3f}, {sum(counts):.0f} pairs")
    curve.legend(loc="lower right")
    widths = [high - low for low, high in itertools.pairwise(edges)]
    histogram.bar(edges[:-1], counts, width=widths, align="edge", color="C0", edgecolor="white")
    histogram.set_ylabel("pairs")
    histogram.set_xlabel("probability that the model gives")
    figure.savefig(path, format="png", dpi=120)
