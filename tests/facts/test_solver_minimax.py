"""The quintic schedules: they are the published ones where there are published ones, minimax by Chebyshev's criterion and by
an independent linear programme, certified, and safe for every input they may meet."""

import numpy as np
import pytest
from scipy.optimize import linprog

from schatten.solvers import polynomial
from schatten.solvers.minimax import CUSHION, best_quintic, composition, evaluate, steps_for

MARGIN = 1.01  # what `polynomial` fits with

# Amsel et al., arXiv 2505.16932, official code: l = 1e-3.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

# Grishina et al., arXiv 2506.10935: the same interval, no cushion, printed to four decimals.
CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

INTERVALS = [(1e-3, 1.0), (0.02407, 1.01), (0.1, 1.0), (0.3, 1.7), (0.6, 1.4), (0.9, 1.1)]


def apply(quintics, x):
    for q in quintics:
        x = evaluate(q, x)
    return x


def grid(low, high=1.0):
    """Dense in both the logarithm and the value: optima crowd at both ends."""
    return np.union1d(np.geomspace(low, high, 40_001), np.linspace(low, high, 40_001))


def test_the_polar_express_table_is_regenerated():
    quintics, _ = composition(1e-3, 8, cushion=CUSHION)
    # Two fp64 Remez runs agree to some 1e-13 in steps 1 to 6; later the interval is so short that they lose digits.
    assert np.allclose(quintics[:6], POLAR_EXPRESS[:6], rtol=0, atol=1e-12)
    assert np.allclose(quintics[6:], POLAR_EXPRESS[6:], rtol=0, atol=1e-8)


def test_cans_is_the_same_fit_without_a_cushion():
    quintics, _ = composition(1e-3, 5, cushion=0.0)
    assert np.allclose(quintics, CANS, rtol=0, atol=5.1e-5)  # four printed decimals


def test_the_cushion_costs_a_hundredth_of_the_band_at_five_steps():
    assert composition(1e-3, 5)[1] == pytest.approx(0.124, abs=5e-4)
    assert composition(1e-3, 5, cushion=0.0)[1] == pytest.approx(0.113, abs=5e-4)


@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_the_best_quintic_touches_its_error_at_four_points_in_turn(low, high):
    a, b, c = q = best_quintic(low, high)
    interior = np.sqrt(sorted(np.roots([5 * c, 3 * b, a]).real))
    assert low < interior[0] < interior[1] < high
    touched = np.array([evaluate(q, x) - 1 for x in (low, *interior, high)])
    error = np.abs(evaluate(q, grid(low, high)) - 1).max()
    # fp64 rounding of coefficients up to 25.
    assert np.allclose(touched, error * np.array([-1, 1, -1, 1]), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_a_linear_programme_finds_no_better_quintic(low, high):
    x = np.union1d(np.geomspace(low, high, 800), np.linspace(low, high, 800))
    powers = np.stack([x, x**3, x**5], axis=1)
    ones = np.ones((len(x), 1))
    # Minimise E subject to -E <= q(x) - 1 <= E.
    programme = linprog(
        [0, 0, 0, 1],
        A_ub=np.block([[powers, -ones], [-powers, -ones]]),
        b_ub=np.concatenate([np.ones(len(x)), -np.ones(len(x))]),
        bounds=[(None, None)] * 3 + [(0, None)],
    )
    assert programme.status == 0
    error = np.abs(evaluate(best_quintic(low, high), x) - 1).max()
    # The solver's feasibility tolerance is 1e-7; the grid misses an extremum by the square of its spacing.
    assert error == pytest.approx(programme.x[3], abs=1e-6)


@pytest.mark.parametrize("width", [1e-2, 1e-4, 0.9e-5, 1e-7])
def test_a_short_interval_has_its_taylor_limit(width):
    # Where the Remez equations degenerate the code changes formula; on either side the error is O(width^3).
    low, high = 1 - width, 1 + width
    x = np.linspace(low, high, 1001)
    assert np.abs(evaluate(best_quintic(low, high), x) - 1).max() < 0.7 * width**3 + 1e-15


@pytest.mark.parametrize("margin", [1.0, MARGIN])
@pytest.mark.parametrize("steps", range(1, 13))
@pytest.mark.parametrize("low", [1e-4, 1e-3, 1e-2, 0.3])
def test_the_certified_error_is_the_largest_on_the_interval(low, steps, margin):
    quintics, error = composition(low, steps, margin=margin)
    assert len(quintics) == steps
    worst = np.abs(apply(quintics, grid(low)) - 1).max()
    # Attained at the lower end by construction; at the upper end the slopes, up to 25 each, amplify fp64 rounding to 6e-12.
    assert worst == pytest.approx(error, abs=1e-10)


@pytest.mark.parametrize("margin", [1.0, MARGIN])
@pytest.mark.parametrize("steps", range(1, 13))
def test_more_steps_are_never_worse(steps, margin):
    assert composition(1e-3, steps + 1, margin=margin)[1] <= composition(1e-3, steps, margin=margin)[1] + 1e-15


@pytest.mark.parametrize("low", [1e-6, 1e-3, 1e-2, 0.5, 0.99])
@pytest.mark.parametrize("steps", range(1, 13))
def test_no_schedule_flips_a_sign_or_overflows_up_to_the_margin(steps, low):
    quintics, _ = composition(low, steps, margin=MARGIN)
    x = grid(1e-9, MARGIN)
    for q in quintics:
        x = evaluate(q, x)
        assert x.min() > 0
        assert x.max() < 2.0  # an iterate: a first step fitted to low = 1e-6 reaches nearly 2
    if composition(low, steps, margin=MARGIN)[1] < 0.5:
        assert x.max() < 1.6


@pytest.mark.parametrize("tol", np.geomspace(1e-7, 0.9, 25).tolist())
def test_every_tolerance_gives_a_descending_schedule_that_keeps_it(tol):
    steps = steps_for(tol, 1e-3, margin=MARGIN)
    quintics, error = composition(1e-3, steps, margin=MARGIN)
    assert error <= tol
    assert steps == 1 or composition(1e-3, steps - 1, margin=MARGIN)[1] > tol, "a shorter schedule would do"
    outputs = apply(quintics, grid(1e-12, MARGIN))
    assert outputs.min() > 0 and outputs.max() < 2.0
    assert np.abs(apply(quintics, grid(1e-3)) - 1).max() <= tol


def test_without_a_margin_the_schedule_has_no_room_above_one():
    # Why `polynomial` fits with one: "PE 5 raw returns 3e60 at sigma = 1.005" (reference/coefficients.md, 2).
    raw, _ = composition(1e-3, 5)
    assert apply(raw, 1.005) > 1e50
    safe, _ = composition(1e-3, 5, margin=MARGIN)
    assert 0 < apply(safe, MARGIN) < 1.2


@pytest.mark.parametrize(("tol", "steps"), [(0.16, 5), (0.1, 6), (1e-2, 6), (2e-3, 7), (1e-3, 7)])
def test_a_tolerance_costs_these_steps(tol, steps):
    # Five quintics are Muon's usual cost; six leave 1.7e-3, too much for 2e-3, of which half is kept for rounding.
    assert polynomial(tol=tol).steps == steps


@pytest.mark.parametrize("tol", [1e-8, 1e-10, 1e-12])
def test_a_tight_tolerance_is_reachable_in_fp64(tol):
    assert steps_for(tol, 1e-3, margin=MARGIN) <= 9


def test_a_tolerance_below_fp64_rounding_is_refused():
    with pytest.raises(ValueError, match=r"tol must be reachable in double precision.* got tol=1e-17"):
        steps_for(1e-17, 1e-3)
