"""The trust_region experiment: optima are optimal, steps those of literal loops, and verdicts follow from the rows."""

import dataclasses
import math

import pytest
import torch

from schatten.lab.errors import InputError
from schatten.lab.experiments import trust_region
from schatten.lab.experiments.trust_region import methods, problems, rates, verdicts
from schatten.lab.ledger import Ledger
from schatten.lab.schedule import lr_factor

SMALL = trust_region.Config(seeds=2, steps=4, lrs=(0.03, 0.1), horizons=(4, 8), copies=2)
KINDS = problems.KINDS


@pytest.fixture(scope="module")
def rows():
    ledger = Ledger(None, {})
    trust_region.run(SMALL, ledger)
    return ledger.rows


def test_a_run_measures_every_method_and_both_theorems_and_all_is_said_from_the_rows(rows):
    finals = {(row["part"], row["method"], row["seed"]) for row in rows if row.get("phase") == "final"}
    assert finals == {(kind, m.name, seed) for kind, ms in methods.METHODS.items() for m in ms for seed in range(2)}
    for row in rows:
        if row.get("phase") == "tune":
            assert row["seed"] >= 1000
    assert len(trust_region.check(rows)) == 6
    assert set(trust_region.pictures(rows)) == {"gaps", "rates"} == set(trust_region.EXPERIMENT.captions)
    assert trust_region.check([]) == [] and trust_region.pictures([]) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_point_nearby_is_better_than_the_optimum(kind, seed):
    problem = problems.Problem.draw(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            W = problem.optimum + size * torch.randn(problem.C.shape, generator=generator, dtype=torch.float64)
            if kind == "ball":
                # Only points of the ball count; the nearest one by clamping singular values.
                U, s, V = torch.linalg.svd(W, full_matrices=False)
                W = (U * s.clamp(max=problems.RADIUS)) @ V
            # Convex, so a minimum nearby is the minimum; 1e-12 is rounding of fp64 values of size 10.
            assert problem.gap(W) > -1e-12
    assert problem.gap(problem.optimum) == 0 and problem.outside(problem.optimum) < 1e-12
    # A proximal gradient step leaves it where it is, which by convexity is optimality itself; fp64 rounding.
    fixed = literal_proximal(kind, problem.optimum - problem.gradient(problem.optimum), 1.0)
    torch.testing.assert_close(fixed, problem.optimum, atol=1e-10, rtol=0)
    assert problem.gap(torch.zeros_like(problem.C)) > 0.5


def test_the_nuclear_optimum_has_half_the_rank_and_the_balls_touches_it():
    low = torch.linalg.svdvals(problems.Problem.draw("nuclear", 0).optimum)
    assert int((low > 1e-10).sum()) == problems.FAN_IN // 2
    touching = torch.linalg.svdvals(problems.Problem.draw("ball", 0).optimum)
    assert int((touching > problems.RADIUS - 1e-10).sum()) == problems.FAN_IN // 2


def onto_simplex(s, size):
    """The nearest point with non-negative entries of sum at most `size`, by bisection on the threshold."""
    if s.sum() <= size:
        return s
    low, high = 0.0, float(s.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (s - middle).clamp(min=0).sum() > size else (low, middle)
    return (s - high).clamp(min=0)


def literal_projection(kind, W, size):
    if kind == "l2":
        return W * min(1.0, size / float(W.norm()))
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    return (U * (onto_simplex(s, size) if kind == "nuclear" else s.clamp(max=size))) @ V


def literal_proximal(kind, W, lr):
    if kind == "l2":
        return W / (1 + lr * problems.DECAY)
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    return (U * ((s - lr * problems.PENALTY).clamp(min=0) if kind == "nuclear" else s.clamp(max=problems.RADIUS))) @ V


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.7, 3.0, 100.0])
def test_projections_and_proximal_maps_are_the_literal_ones(kind, size):
    W = torch.randn(12, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # fp64; the thresholds come from sorting here and from bisection there.
    torch.testing.assert_close(problems.projected(kind, W, size), literal_projection(kind, W, size), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(problems.proximal(kind, W, 0.3), literal_proximal(kind, W, 0.3), atol=1e-9, rtol=1e-9)


def literal_gaps(name, problem, lr, steps, seed):
    generator = torch.Generator().manual_seed(problems.NOISE_SEEDS + seed)
    W, M, gaps = torch.zeros_like(problem.C), None, []
    for t in range(steps):
        G = (W - problem.C) * problem.h + problems.NOISE * torch.randn(W.shape, generator=generator, dtype=W.dtype)
        M = G if M is None else (1 - methods.ALPHA) * M + methods.ALPHA * G
        eta = lr * lr_factor("cosine", t, steps)
        if name == "composite Muon":
            W = W + literal_projection("ball", -M / problems.DECAY - W, eta)
        elif name == "Muon, decoupled decay":
            U, _, V = torch.linalg.svd(M, full_matrices=False)
            W = (1 - eta / problems.RADIUS) * W - eta * U @ V
        else:
            W = W - eta * M
            W = (
                literal_proximal(problem.kind, W, eta)
                if name == "proximal"
                else literal_projection(problem.kind, W, problem.size)
            )
        gaps.append(problem.gap(W))
    return gaps


@pytest.mark.parametrize(
    ("kind", "name"),
    [("l2", "composite Muon"), ("l2", "projected"), ("nuclear", "proximal"), ("nuclear", "projected"), ("ball", "projected"),
     ("ball", "Muon, decoupled decay")],
)  # fmt: skip
def test_gaps_are_those_of_the_literal_loop(kind, name):
    problem, steps = problems.Problem.draw(kind, 2), 12
    method = next(m for m in methods.METHODS[kind] if m.name == name)
    found = methods.descend(method, problem, 0.1, steps, seed=2)
    literal = literal_gaps(name, problem, 0.1, steps, seed=2)
    # Both in fp64; a dozen bounded steps amplify its rounding by far less than 1e5.
    assert found["gaps"][1:] == pytest.approx([literal[int(t) - 1] for t in found["steps"][1:]], rel=1e-8, abs=1e-10)


def test_the_residual_of_the_rates_is_the_nuclear_norm_of_the_whole_gradient():
    problem = problems.Problem.draw("l2", 0)
    W = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    literal = [float(torch.linalg.svdvals((w - problem.C) * problem.h + problems.DECAY * w).sum()) for w in W]
    assert float(rates.residual(problem, W)) == pytest.approx(sum(literal) / 3)
    assert float(rates.residual(problem, problem.optimum)) < 1e-10


def rated(theorem, exponent, seeds=3):
    return [
        {"part": "rates", "theorem": theorem.name, "steps": T, "seed": seed, theorem.quantity: (1 + seed / 9) * T**exponent}
        for seed in range(seeds)
        for T in (16, 64, 256)
    ]


@pytest.mark.parametrize("theorem", rates.THEOREMS, ids=lambda t: t.name)
def test_a_rate_is_reproduced_if_the_slope_is_at_most_the_bounds(theorem):
    for exponent, word in ((-theorem.bound, "reproduced"), (-0.9, "reproduced"), (-theorem.bound / 2, "not reproduced")):
        (verdict,) = trust_region.check(rated(theorem, exponent))
        assert verdict.verdict == word
    assert verdicts.exponents(rated(theorem, -0.4), theorem) == pytest.approx([-0.4] * 3)


def final(part, method, seed, share, outside=0.0):
    return {
        "part": part, "phase": "final", "method": method, "lr": 0.1, "seed": seed,
        "steps": [0.0, 1.0], "gaps": [2.0, 2 * share],
        "outside": [0.0, outside], "gap": 2 * share, "distance": 0.1, "rank": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shares", "word"),
    [((0.001, 0.019), "reproduced"), ((0.001, 0.021), "not reproduced"), ((math.inf, 0.001), "not reproduced")],
)
def test_an_optimum_counts_as_reached_if_every_seed_is_there(shares, word):
    (verdict,) = trust_region.check([final("nuclear", "composite Muon", seed, share) for seed, share in enumerate(shares)])
    assert verdict.verdict == word and "rank 4/4" in verdict.ours


@pytest.mark.parametrize(("share", "outside", "word"), [(0.01, 0.0, "reproduced"), (0.01, 0.1, "not"), (-0.5, 0.0, "not")])
def test_a_constraint_counts_as_solved_if_the_gap_is_closed_inside_the_ball(share, outside, word):
    (verdict,) = trust_region.check([final("ball", "Muon, decoupled decay", seed, share, outside) for seed in range(2)])
    assert verdict.verdict.startswith(word)


def test_a_difference_without_a_small_p_is_not_claimed():
    def of(*muon):
        ours = [final("l2", "composite Muon", seed, 0.01 + seed / 1e4) for seed in range(3)]
        found = ours + [final("l2", "Muon, decoupled decay", seed, share) for seed, share in enumerate(muon)]
        return next(v for v in trust_region.check(found) if v.quantity.startswith("decoupled")).verdict

    assert of(0.2, 0.21, 0.22) == "reproduced" and of(0.02, 0.3, 0.1) == of(0.001, 0.002, 0.001) == "not reproduced"


@pytest.mark.parametrize("wrong", [{"lrs": ()}, {"lrs": (0.1, 0.0)}, {"steps": 0}, {"horizons": (8, -1)}, {"copies": 0}])
def test_settings_that_measure_nothing_are_refused(wrong):
    with pytest.raises(InputError, match="--lrs and --horizons must be positive"):
        dataclasses.replace(SMALL, **wrong)
