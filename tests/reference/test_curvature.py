"""Curvature along directions against the explicit Hessian, in fp64."""

import math

import pytest
import torch

from schatten import maps, spectral_power
from schatten.diagnostics.core import Block
from schatten.diagnostics.curvature import QUANTITY, along, curvature, largest_of_blocks
from schatten.diagnostics.lanczos import largest_eigenvalue
from schatten.rule import Rule
from tests.contracts import curvature_laws as laws


def test_j_l_steps_and_decreases_are_those_of_the_explicit_hessian():
    laws.agrees(curvature)


def test_l_over_all_parameters_together_is_the_norm_of_the_whole_hessian():
    H, params, whole = laws.problem()
    L = largest_eigenvalue(H, params, iterations=whole.shape[0])
    assert float(L.value) == pytest.approx(float(torch.linalg.eigvalsh(whole).abs().max()), rel=1e-12)
    blocks = [largest_eigenvalue(laws.block(i)[0], p, iterations=p.numel()).value for i, p in enumerate(params)]
    assert max(blocks) <= L.value


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_powers_rank_on_one_scale_with_a_known_l(p):
    product, G, H = laws.block(1)
    first = curvature(product, G, iterations=G.numel())
    D = spectral_power(G, p)
    C = curvature(product, G, D, largest=first.L)
    laws.compare(C, G, D, H)
    if p == 1:
        assert float(C.line_advantage) == pytest.approx(1)


@pytest.mark.parametrize("length", [1e-3, 7.0])
def test_decreases_do_not_depend_on_the_length_of_a_direction(length):
    product, G, _ = laws.block(0)
    D = maps.Huber(0.1).grad(G)
    one, other = (curvature(product, G, d) for d in (D, length * D))
    assert float(other.decrease) == pytest.approx(float(one.decrease), rel=1e-9)
    assert float(other.advantage.value) == pytest.approx(float(one.advantage.value), rel=1e-9)
    assert float(other.optimal_step) == pytest.approx(float(one.optimal_step) / length, rel=1e-9)


def test_a_step_of_the_best_length_lowers_the_loss_by_what_is_predicted():
    # One small enough share of it, where the quadratic model holds: -t <G, D> + t^2 J / 2.
    H, params, _ = laws.problem()
    product, G, _ = laws.block(1)
    C = curvature(product, G)
    D = torch.linalg.svd(G)[0] @ torch.linalg.svd(G)[2]
    loss, start = H._losses[0], params[1].detach().clone()
    changes = []
    for t in (1e-3, -1e-3):
        with torch.no_grad():
            params[1].copy_(start - t * D)
        changes.append(float(loss().detach() - H.loss))
    with torch.no_grad():
        params[1].copy_(start)
    # Odd and even part: slope and curvature; the next order is t^2 relative.
    assert (changes[1] - changes[0]) / 2e-3 == pytest.approx(float(C.inner), rel=1e-4)
    assert (changes[0] + changes[1]) / 1e-6 == pytest.approx(float(C.J), rel=1e-4)


def blocks_problem():
    """Three 2 x 3 blocks with one symmetric Hessian over all of them."""
    torch.manual_seed(4)
    A = torch.randn(18, 18, dtype=torch.float64)
    H = A + A.mT + 2 * torch.eye(18, dtype=torch.float64)
    return H, lambda V: (H @ V.reshape(-1)).view(3, 2, 3), torch.randn(3, 2, 3, dtype=torch.float64)


def test_blocks_are_measured_together_or_each_alone():
    H, product, G = blocks_problem()
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    D = U @ Vh
    joint, alone = curvature(product, G, iterations=18), curvature(product, G, separate=True, iterations=18)
    laws.compare(joint._replace(nuclear=torch.linalg.svdvals(G.view(6, 3)).sum()), G.view(6, 3), D.reshape(6, 3), H)
    assert float(joint.nuclear) == pytest.approx(float(torch.linalg.svdvals(G).sum()))
    assert alone.J.shape == alone.L.value.shape == alone.L.error.shape == alone.decrease.shape == (3,)
    for i in range(3):
        of_one = type(alone)(
            *(part[i] if isinstance(part, torch.Tensor) else type(part)(*(t[i] for t in part)) for part in alone)
        )
        laws.compare(of_one, G[i], D[i], H[6 * i : 6 * i + 6, 6 * i : 6 * i + 6])
    assert len(alone.verdict()) == 3 and len(joint.verdict()) == 1
    assert torch.equal(along(product, D, separate=True), alone.J)


def test_costs_are_those_stated():
    _, product, G = blocks_problem()
    calls = []

    def counted(V):
        calls.append(1)
        return product(V)

    first = curvature(counted, G, iterations=5)
    assert len(calls) == 7
    curvature(counted, G, separate=True, iterations=5)
    assert len(calls) == 7 + 21
    curvature(counted, G, 2 * G, largest=first.L)
    assert len(calls) == 28 + 2


def test_a_direction_of_negative_curvature_has_no_optimum_and_says_so():
    G = torch.eye(2, dtype=torch.float64)
    C = curvature(lambda V: -V, G)
    assert C.no_optimum and C.condition and math.isinf(C.optimal_step) and math.isinf(C.decrease)
    assert "J = -2 <= 0" in C.verdict()[0]


def test_a_direction_that_does_not_descend_says_so():
    G = torch.eye(2, dtype=torch.float64)
    C = curvature(lambda V: V, G, -G)
    assert C.decrease == 0 and C.optimal_step == 0 and "does not descend" in C.verdict()[0]


def test_a_gradient_of_zero_and_one_that_is_not_finite_raise_nothing():
    zero = curvature(lambda V: V, torch.zeros(2, 3))
    assert zero.decrease == 0 and "does not descend" in zero.verdict()[0]
    lost = curvature(lambda V: V * torch.nan, torch.full((2, 3), torch.nan), torch.ones(2, 3), largest=zero.L)
    assert lost.J.isnan()
    L = largest_of_blocks(lambda V: V * torch.nan, torch.ones(2, 3))
    assert L.value.isnan()


def test_the_verdict_names_what_is_better_and_by_which_factor():
    h = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    C = curvature(lambda V: h * V, torch.eye(2, dtype=torch.float64))
    # Both decreases by hand: 2^2 / (2 * 4) and 2 / (2 * 3); U V^T is along the gradient.
    best = "(1 times the gain of the best step along the gradient)"
    assert C.verdict() == [f"An orthogonalised step is locally better than a Euclidean one, by a factor of 1.5 {best}."]
    # Nearly all of the gradient lies in one direction of a Hessian that is the same in both.
    C = curvature(lambda V: 2 * V, torch.diag(torch.tensor([1.0, 0.01], dtype=torch.float64)))
    assert not C.condition
    best = "(0.51 times the gain of the best step along the gradient)"
    assert C.verdict() == [f"A Euclidean step is locally better here, by a factor of 1.96 {best}."]
    # A residual of L is told.
    C = C._replace(L=C.L._replace(error=0.1 * C.L.value))
    assert C.verdict() == [f"A Euclidean step is locally better here, by a factor of 1.96 +- 0.2 {best}."]
    h = torch.tensor([[-1.0], [3.0]], dtype=torch.float64)
    C = curvature(lambda V: h * V, torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)))
    assert C.line_advantage == 0 and C.verdict()[0].endswith("(J <= 0 along the gradient).")


@pytest.mark.parametrize("separate", [False, True])
def test_the_quantity_is_the_function(separate):
    _, product, G = blocks_problem()
    block = Block("w", Rule(), {}, torch.zeros_like(G), gradient=G, hessian=product)
    found, C = QUANTITY(separate=separate)(block), curvature(product, G, separate=separate)
    expected = {
        "J": C.J,
        "L": C.L.value,
        "L_error": C.L.error,
        "ratio": C.ratio,
        "bound": C.bound,
        "step": C.optimal_step,
        "advantage": C.advantage.value,
        "line_advantage": C.line_advantage,
        "J_gradient": C.along_gradient,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The polar factor of an iteration with tol 1e-3.
        assert torch.allclose(found[name], value, rtol=1e-2, atol=1e-12), name
        assert name in QUANTITY.columns


def test_the_quantity_measures_the_direction_of_the_rules_own_map():
    _, product, G = blocks_problem()
    block = Block("w", Rule(map=maps.Huber(0.1)), {}, torch.zeros_like(G), gradient=G, hessian=product)
    found = QUANTITY()(block)
    C = curvature(product, G, maps.Huber(0.1).grad(G))
    assert torch.allclose(found["J_rule"], C.J) and torch.allclose(found["step_rule"], C.optimal_step)
    assert torch.allclose(found["advantage_rule"], C.advantage.value)
    assert found.keys() == QUANTITY.columns.keys()


@pytest.mark.parametrize(
    ("gradient", "direction", "words"),
    [(torch.ones(3), None, "must be matrices"), (torch.ones(2, 3), torch.ones(3, 2), "shape")],
)
def test_shapes_that_do_not_fit_are_refused(gradient, direction, words):
    with pytest.raises(ValueError, match=words):
        curvature(lambda V: V, gradient, direction)
