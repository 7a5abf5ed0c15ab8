"""The experiment on Muon against gradient descent: literal twins of its parts, verdicts on doctored rows, a small run."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from schatten.diagnostics.block_hessian import block_hessian
from schatten.diagnostics.hessian import Hessian
from schatten.lab import experiments, images
from schatten.lab.errors import InputError
from schatten.lab.experiment import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED
from schatten.lab.experiments import muon_vs_gd
from schatten.lab.experiments.muon_vs_gd import curvature, quadratic, star_convex, training
from schatten.lab.ledger import Ledger
from schatten.lab.models import MLP


def msign(G):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def quintics(G):
    X = G / G.norm()
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def verdicts(part, rows):
    return {v.quantity: v.verdict for v in part.check(rows)}


# -- training


@pytest.mark.parametrize(("momentum", "exact"), [(0.9, False), (0.9, True), (0.0, False)])
def test_muon_is_algorithm_1_with_its_first_momentum_the_gradient(momentum, exact):
    torch.manual_seed(0)
    model = MLP((6, 5, 4))
    optimizer = training.muon(model, 0.1, momentum, exact)
    weights = [p.detach().clone() for p in model.parameters()]
    averages: list = [None, None]
    for _ in range(3):
        gradients = [torch.randn_like(W) for W in weights]
        for i, (p, G) in enumerate(zip(model.parameters(), gradients, strict=True)):
            p.grad = G.clone()
            M = averages[i]
            averages[i] = G if M is None else momentum * M + (1 - momentum) * G
            weights[i] = weights[i] - 0.1 * (msign if exact else quintics)(averages[i])
        optimizer.step()
    for p, W in zip(model.parameters(), weights, strict=True):
        # fp32 products; five quintics amplify rounding by up to 3.4445^5 = 485 in small singular values.
        torch.testing.assert_close(p.detach(), W, atol=1e-4, rtol=0)


def test_the_hundred_images_are_the_same_for_all_seeds_and_tested_on():
    data = training.fixed(images.load(), 100)
    assert len(data.train) == len(data.test) == 100 and torch.equal(data.train, data.test)
    assert torch.equal(data.train, training.fixed(images.load(), 100).train)


def trained(kind="deterministic", pixels=3072, **losses):
    """Three seeds of each optimizer; the published curve with small spread unless `losses` says otherwise."""
    rows = []
    for name, published in training.PUBLISHED[kind].items():
        at = training.AT[kind]
        for seed in range(3):
            curve = [2.3] * at[-1]
            for i, loss in zip(at, losses.get(name.replace(", ", "_").replace(" ", "_"), published), strict=True):
                curve[i - 1] = loss * (1 + 0.01 * seed)
            case = {
                "part": kind,
                "data": "cifar",
                "pixels": pixels,
                "phase": "final",
                "optimizer": name,
                "lr": 0.01,
                "seed": seed,
            }
            rows.append({**case, "losses": curve, "steps": 15})
    return rows


@pytest.mark.parametrize("kind", training.GRIDS)
def test_the_published_curves_are_reproduced_with_cifar_only(kind):
    found = [v for v in training.check_numbers(trained(kind), kind)]
    assert [v.verdict for v in found] == [REPRODUCED] * 5
    assert {v.verdict for v in training.check_numbers(trained(kind, pixels=64), kind)} == {OUT_OF_REACH}


def test_a_curve_that_is_off_and_an_ordering_that_fails_are_not_reproduced():
    name, order = (
        "Fig 1, deterministic: loss of Adam at step 1, 5, 8, 10, 15",
        "deterministic, step 8: loss of Muon below that of Adam",
    )
    assert verdicts(training, trained())[order] == REPRODUCED
    doctored = verdicts(training, trained(Adam=(2.3, 1.0, 0.05, 0.01, 0)))
    assert doctored[name] == doctored[order] == NOT_REPRODUCED


def test_orderings_are_paired_by_seed_whatever_rows_are_missing():
    rows = trained()
    order = "deterministic, step 8: loss of Muon below that of Adam"
    assert verdicts(training, rows[1:] + rows[:1])[order] == REPRODUCED
    adam = [row for row in rows if row["optimizer"] == "Adam"]
    assert order in verdicts(training, [row for row in rows if row is not adam[0]])
    assert order not in verdicts(training, [row for row in rows if row not in adam])


def test_all_have_as_many_trials():
    for kind, grid in training.GRIDS.items():
        assert {len(c.space["lr"]) for c in training.contenders(kind, 0.95)} == {len(grid)}


# -- curvature


def test_j_and_l_are_those_of_the_whole_block_hessian(monkeypatch):
    monkeypatch.setattr(curvature, "HIDDEN", (6, 4))
    monkeypatch.setattr(curvature, "PUBLISHED", {"Muon": {"step": [1, 2]}})
    data = images.load()
    found = curvature.trajectory(data, "Muon", 1)
    torch.manual_seed(1)
    chosen = torch.randperm(len(data.train_labels))[:60]
    x, y = data.train[chosen].double(), data.train_labels[chosen]
    model = MLP((64, 6, 4, 10)).double()
    for i in range(2):
        W = list(model.parameters())
        H = Hessian(lambda: F.cross_entropy(model(x), y), [W[1]], model=model)
        whole = block_hessian(lambda V, H=H: H.within(0, V), W[1].detach())
        G = H.gradient[0]
        d = msign(G).flatten()
        assert found["J"][i] == pytest.approx(float(d @ whole @ d), rel=1e-9, abs=1e-12)
        # Twenty steps of Lanczos on 24 unknowns.
        assert found["L"][i] == pytest.approx(float(torch.linalg.eigvalsh(whole).abs().max()), rel=1e-6)
        assert found["nuc^2"][i] == pytest.approx(float(torch.linalg.svdvals(G).sum() ** 2))
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in W:
                p -= 0.1 * msign(p.grad)


def curves(pixels=784, data="mnist", **changed):
    rows = []
    for optimizer, published in curvature.PUBLISHED.items():
        for seed in range(3):
            found = {name: [v * (1 + 0.02 * seed) for v in {**published, **changed}[name]] for name in curvature.COLUMNS}
            rows.append({"part": "curvature", "optimizer": optimizer, "seed": seed, "data": data, "pixels": pixels, **found})
    return rows


def test_published_curvature_is_reproduced_on_mnist_only_and_doctored_curvature_is_not():
    assert set(verdicts(curvature, curves()).values()) == {REPRODUCED}
    numbers = [v for q, v in verdicts(curvature, curves(64, "digits")).items() if "readings" in q]
    assert set(numbers) == {OUT_OF_REACH} and len(numbers) == 10
    doctored = verdicts(curvature, curves(L=[0.01] * 10))
    for optimizer in ("GD", "Muon"):
        assert doctored[f"Fig 2, {optimizer}: ten readings of L"] == NOT_REPRODUCED
        assert doctored[f"Fig 2, {optimizer}: condition (4), J/L <= nuc^2/fro^2"] == NOT_REPRODUCED
    assert curvature.distance(curves()[0]) == 0


# -- quadratic


def test_the_quadratic_has_the_published_ends_and_muons_first_steps_are_literal():
    problem = quadratic.fitted(0)
    g, far = quadratic.descent(problem)
    assert (float(g[0]), float(g[-1])) == pytest.approx((370, 21), rel=1e-6)
    assert (float(far[0]), float(far[-1])) == pytest.approx((180, 53), rel=1e-6)
    assert problem.nuclear / problem.L == pytest.approx(1.31)
    ((f, _),) = quadratic.muon([problem], 5)
    W, Q = torch.zeros(15, 20, dtype=torch.float64), torch.diag(problem.q)
    for value in f:
        D = W - problem.optimum
        assert float(value) == pytest.approx(float(torch.trace(D.T @ Q @ D) / 2), rel=1e-9)
        W = W - 0.048 * msign(Q @ D)


def test_the_shares_are_those_of_a_literal_count():
    values = quadratic.ratios(50)
    generator = torch.Generator().manual_seed(0)
    W = 100 * torch.rand(50, 15, 20, generator=generator, dtype=torch.float64) - 50
    s = torch.linalg.svdvals(W)
    torch.testing.assert_close(values, s.square().sum(-1) / s[:, 0].square() / 1.31)
    literal = [sum(low <= v < high for v in values.tolist()) / 50 for low, high in pairwise(quadratic.EDGES)]
    assert quadratic.shares(values) == pytest.approx(literal)


def test_shares_and_crossings_that_are_off_are_not_reproduced():
    total = sum(quadratic.COUNTS)
    histogram = {"part": "histogram", "samples": 100_000, "shares": [c / total for c in quadratic.COUNTS], "above 2": 1.0}
    assert set(verdicts(quadratic, [histogram]).values()) == {REPRODUCED}
    doctored = {**histogram, "shares": histogram["shares"][::-1], "above 2": 0.2}
    assert NOT_REPRODUCED in verdicts(quadratic, [doctored]).values()
    assert verdicts(quadratic, [doctored])["Fig 3c: samples above 2"] == NOT_REPRODUCED
    found = {"f crossing": [950, 1040], "norm crossing": [1380, 1400], "arrival": [3720, 3730], "floor": [0.15, 0.15]}
    row = {"part": "quadratic", "steps": 4000, **found}
    assert set(verdicts(quadratic, [row]).values()) == {REPRODUCED}
    crossing = "Fig 3a: step at which Muon's f crosses GD's"
    assert verdicts(quadratic, [{**row, "f crossing": [30, 31]}])[crossing] == NOT_REPRODUCED
    assert not verdicts(quadratic, [{**row, "steps": 100}])


def test_crossing_and_arrival():
    muon, descent = torch.tensor([5.0, 4, 2, 0.01]), torch.tensor([5.0, 3, 2.5, 2])
    assert quadratic.crossing(muon, descent) == 2 and quadratic.crossing(descent * 0, descent) == 0
    assert quadratic.arrival(muon) == 3 and quadratic.arrival(descent) == 3


# -- star-convex


def test_the_adaptive_run_is_the_literal_one_within_the_bound():
    q, optimum = star_convex.problem([2])
    L = float(q.sum())
    errors, farthest = star_convex.descend(q, optimum, 1 / L, True, 20)
    W, D = torch.zeros(15, 20, dtype=torch.float64), 0.0
    for t, error in enumerate(errors[:, 0].tolist()):
        E = W - optimum[0]
        D = max(D, float(torch.linalg.matrix_norm(E, ord=2)))
        assert error == pytest.approx(float(torch.trace(E.T @ torch.diag(q) @ E) / 2), rel=1e-9)
        G = torch.diag(q) @ E
        if t < 20:
            W = W - float(torch.linalg.svdvals(G).sum()) / L * msign(G)
    assert float(farthest[0]) == pytest.approx(D)
    delta, t = float(errors[0, 0]), 20
    bound = star_convex.adaptive_bound(torch.tensor(t), errors[0], farthest, L)
    assert float(bound[0]) == pytest.approx(2 * L * delta * D * D / (2 * L * D * D + t * delta))
    assert star_convex.adaptive([2], 20)["worst"][0] <= 1


def test_an_error_above_the_bound_and_a_slow_rate_are_not_reproduced():
    case = {"part": "star-convex", "step": "adaptive", "steps": 100}
    row = {**case, "worst": [0.2, 0.3], "slopes": [-1.2, -1.1], "slope errors": [0.01, 0.01]}
    bound, rate = "Thm 4.11, adaptive step: largest (f - f*) / bound", "Thm 4.11, adaptive step: exponent of t in f - f*"
    assert [verdicts(star_convex, [row])[name] for name in (bound, rate)] == [REPRODUCED] * 2
    assert verdicts(star_convex, [{**row, "worst": [0.2, 1.1]}])[bound] == NOT_REPRODUCED
    assert verdicts(star_convex, [{**row, "slopes": [-0.7, -0.72]}])[rate] == NOT_REPRODUCED
    assert verdicts(star_convex, [{**row, "slopes": [-1.2]}])[rate] == OUT_OF_REACH


# -- the whole


def test_a_small_run_has_verdicts_of_every_part_and_both_pictures():
    experiment = experiments.load("muon-vs-gd")
    ledger = Ledger(None, {})
    experiment.run(muon_vs_gd.Config(seeds=1, hidden=(8,), stochastic_seeds=0, samples=500, steps=30, star_steps=100), ledger)
    parts = [v.quantity[:5] for v in experiment.check(ledger.rows)]
    assert {"Fig 1", "Fig 2", "Fig 3", "Thm 4"} <= set(parts)
    assert set(experiment.pictures(ledger.rows)) == set(experiment.captions)
    # A loss before the first step is that of ten classes guessed.
    losses = next(row["losses"] for row in ledger.rows if row.get("phase") == "final" and row["optimizer"] == "Adam")
    assert len(losses) == 15 and losses[0] == pytest.approx(math.log(10), abs=0.1)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        images.load(str(tmp_path / "nowhere"))
