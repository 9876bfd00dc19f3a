"""What figures of competing units show of rows that are not all there."""

import numpy as np
import pytest

from figures import competition as competition_figures
from figures.competition import plot_convergence


@pytest.fixture
def saved(monkeypatch) -> list:
    """The figures, in the place of their files."""
    figures = []
    monkeypatch.setattr(
        competition_figures, "save_figure", lambda figure, _: figures.append(figure)
    )
    return figures


def test_layers_that_never_learned_have_neither_a_line_nor_a_name(saved):
    metrics = {
        "epoch": np.array([0.5, 1.0]),
        "convergence/1": np.array([3.0, 2.0]),
        "convergence/2": np.full(2, np.nan),
    }
    plot_convergence(metrics, "convergence.png")
    (axes,) = saved[0].axes
    assert len(axes.lines) == 1 and axes.get_legend_handles_labels()[1] == ["layer 1"]
