"""Pictures of instruments draw what they are given, at the edges too: one step, no ball, never inside, NaN, J below zero."""

import io
import math

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from schatten.lab.instrument_plots import (
    CurvatureCurve,
    Trajectory,
    ball_trajectories,
    curvature_curves,
    lyapunov_curves,
    spectrum_history,
)


def drawn(figure):
    """The figure after everything was laid out and drawn, in which warnings would be errors."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")
    return figure


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_trajectories_show_the_ball_the_runs_and_the_minimum():
    run = Trajectory([(1.0, 0.2), (0.5, 0.4)], radius=0.5, optimum=(0.3, 0.3))
    figure = drawn(ball_trajectories({"inside": {"Muon": run, "Lion-K": run}, "without a ball": {"SGD": Trajectory([(1, 2)])}}))
    first, second = figure.axes
    assert labels(first) == ["ball, c/λ = 0.5", "Muon", "Lion-K", "start", "end", "minimum of F"]
    assert labels(second) == ["SGD", "start", "end"]
    (ball,) = [p for p in first.patches if p.get_label().startswith("ball")]
    assert (ball.get_width(), ball.get_height()) == (0.5, 0.5)
    assert not second.patches


def test_v_k_is_drawn_from_the_first_step_inside_for_good():
    excess = [1.0, 0.0, 0.5, 0.0, 0.0]
    loss, V_B, V_K = drawn(lyapunov_curves(range(5), [5, 4, 6, 2, 1], excess, [9, 8, 7, 3, math.nan])).axes
    assert V_K.lines[0].get_xdata().tolist() == [3, 4]
    assert labels(V_B) == ["inside from step 3"]
    assert loss.lines[0].get_ydata().tolist() == [5, 4, 6, 2, 1]


@pytest.mark.parametrize("excess", [[0.0, 0.0], [2.0, 1.0]], ids=["always inside", "never inside"])
def test_runs_that_do_not_enter_have_no_line_where_they_would(excess):
    _, V_B, V_K = drawn(lyapunov_curves([0, 1], [1.0, 2.0], excess, [3.0, 2.0])).axes
    assert V_B.get_legend() is None
    assert len(V_K.lines[0].get_xdata()) == (2 if not any(excess) else 0)
    assert any("outside" in text.get_text() for text in V_K.texts) == any(excess)


def test_steps_that_violate_the_condition_are_marked():
    run = CurvatureCurve(
        [1, 2, 3], J=[1.0, 9.0, -1.0], L=[2.0, 3.0, 1.0], bound=[4.0, 2.0, 3.0], loss=[2, 1, 1], L_error=[0, 1, 0]
    )
    loss, top, bottom = drawn(curvature_curves({"a": run})).axes
    assert loss.lines[0].get_ydata().tolist() == [2, 1, 1]
    (marks,) = [line for line in bottom.lines if line.get_label() == "condition violated"]
    assert marks.get_xdata().tolist() == [2]
    assert top.get_yscale() == bottom.get_yscale() == "linear"


def test_a_reference_is_drawn_beside_the_run_of_its_title():
    run = CurvatureCurve([1, 2], J=[0.1, 9.0], L=[2.0, 3.0], bound=[4.0, 20.0])
    figure = drawn(curvature_curves({"a": run, "b": run}, {"b": run}, reference="a paper's"))
    grid = np.array(figure.axes).reshape(2, 2)
    assert "a paper's" not in labels(grid[0, 0])
    assert "a paper's" in labels(grid[0, 1])
    assert "a paper's" in labels(grid[1, 1])


def test_a_history_has_a_column_of_shares_for_each_step_and_lines_for_the_largest_and_the_bound():
    spectra = [[2.0, 1.0, 0.5], [1.5, 1.0], [1.0]]
    axes = drawn(spectrum_history([0, 10, 30], spectra, bound=1.2)).axes[0]
    shares = axes.collections[0].get_array().reshape(-1, 3)
    assert shares.sum(0).tolist() == pytest.approx([1, 1, 1])
    assert axes.lines[0].get_ydata().tolist() == [2.0, 1.5, 1.0]
    assert labels(axes) == ["largest", "c/λ = 1.2"]


@pytest.mark.parametrize("spectrum", [[0.0, 0.0], [1.0], [1.0, 1e-9], [3.0] + [1e-3] * 9], ids=repr)
def test_a_history_of_one_step_and_any_spectrum_is_drawn(spectrum):
    axes = drawn(spectrum_history([0], [spectrum])).axes[0]
    assert (axes.get_yscale() == "log") == (len(spectrum) == 10)


def test_singular_values_that_are_not_finite_are_left_out():
    axes = drawn(spectrum_history([0, 1, 2], [[1.0, 2.0], [math.inf, 1.0], [math.nan]])).axes[0]
    assert axes.lines[0].get_ydata().tolist()[:2] == [2.0, 1.0]
    with pytest.raises(ValueError, match="spectra must have finite singular values"):
        spectrum_history([0], [[math.nan]])
