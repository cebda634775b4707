"""The reliability plot."""

import math

from raylhf.tracking.reliability import reliability_plot

RELIABILITY = {
    "edges": [0.5, 0.75, 1.0],
    "predicted": [math.nan, 0.9],
    "observed": [math.nan, 0.7],
    "counts": [0, 40],
    "ece": 0.2,
}


def test_the_plot_is_a_png_and_shows_the_numbers_it_is_given(tmp_path):
    from matplotlib.image import imread

    reliability_plot(RELIABILITY, tmp_path / "first.png", "a model")
    reliability_plot({**RELIABILITY, "observed": [math.nan, 0.9]}, tmp_path / "second.png", "a model")
    first, second = imread(tmp_path / "first.png"), imread(tmp_path / "second.png")
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    assert first.shape == second.shape
    assert (first != second).any()


def test_a_plot_without_predictions_is_empty_and_no_error(tmp_path):
    nothing = {"edges": [0.5, 1.0], "predicted": [math.nan], "observed": [math.nan], "counts": [0], "ece": math.nan}
    reliability_plot(nothing, tmp_path / "empty.png", "no pairs")
    assert (tmp_path / "empty.png").stat().st_size > 1000
