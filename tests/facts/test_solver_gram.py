"""The Gram form is the product form evaluated differently, and its restarts are what keeps half precision from diverging."""

import pytest
import torch

from schatten.solvers import gram, polynomial
from schatten.solvers.composed import LOWER, ROOMY
from schatten.solvers.core import normalised
from schatten.solvers.iteration import cheaper_form, gram_cost, gram_form, product_cost, product_form, restarts_for
from schatten.solvers.minimax import composition
from tests.contracts.matrices import ZOO, gaussian, read, spectral_norm, with_spectrum

QUINTICS = polynomial().quintics


@pytest.mark.parametrize("options", [{}, {"tol": 1e-2}, {"steps": 8}], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_it_equals_the_product_form_to_1e_12_in_fp64(name, options):
    solver = gram(**options, dtype="float64")
    X = normalised(ZOO[name][None], torch.float64)
    X = X if X.shape[-2] <= X.shape[-1] else X.mT
    form, quintics = solver.form(*X.shape[1:], X.dtype)
    assert (form(X, quintics) - product_form(X, quintics)).abs().max() < 1e-12


@pytest.mark.parametrize("weights", [[0.1] * 6, [torch.full((2, 1, 1), 0.1)] * 6], ids=["numbers", "tensors"])
def test_sums_of_iterates_agree_too(weights):
    X = normalised(gaussian(2, 12, 40), torch.float64)
    product = product_form(X, QUINTICS, weights)
    for restarts in ((), (2,), (1, 3)):
        assert (gram_form(X, QUINTICS, weights, restarts=restarts) - product).abs().max() < 1e-12
    assert (cheaper_form(12, 40, QUINTICS, X.dtype, True)(X, QUINTICS, weights) - product).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("options", [{}, {"tol": 1e-2}, {"steps": 8}], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_no_spectrum_makes_it_diverge_in_any_precision(name, options, dtype):
    G = ZOO[name].float()
    P = gram(**options, dtype=dtype)(G)
    assert P.isfinite().all() and spectral_norm(P.double()) < 1.3


@pytest.mark.parametrize(("dtype", "widening"), [("bfloat16", 0.06), ("float16", 0.004)])
@pytest.mark.parametrize("name", ZOO)
def test_half_precision_widens_its_band_by_what_is_documented(name, dtype, widening):
    # Twice what was measured over the zoo and twenty more matrices: 0.028 and 0.0002.
    G = ZOO[name].float()
    # fp16's default has more room in its fit.
    default = 0.1545 if dtype == "float16" and G.shape[-2] != G.shape[-1] else 0.135
    for options, fit in (({}, default), ({"tol": 1e-2}, 0.0018)):
        above = read(G, gram(**options, dtype=dtype)(G)).above(1e-2)
        assert (above.gain - 1).abs().max() <= fit + widening


def test_without_restarts_half_precision_diverges():
    X = normalised(with_spectrum(64, 256, torch.logspace(0, -3, 64))[None].float(), torch.bfloat16)
    assert gram_form(X, QUINTICS, restarts=()).double().abs().max() > 1e2
    assert gram_form(X, QUINTICS, restarts=restarts_for(QUINTICS, torch.bfloat16)).double().abs().max() < 1.3


def test_it_is_taken_where_it_multiplies_less():
    # GPT-2's 1:4 matrices: 35 units of m^3 against 45; a square matrix would take 23 against 15.
    assert gram_cost(768, 3072, 5, 2, False) == 35 * 768**3 and product_cost(768, 3072, 5) == 45 * 768**3
    assert gram_cost(768, 768, 5, 2, False) > product_cost(768, 768, 5)


def test_room_in_the_fit_lets_fp16_take_it_with_two_restarts():
    form, quintics = polynomial(dtype="float16").form(768, 3072, torch.float16, True)
    assert form.keywords["restarts"] == (2, 4) and quintics == composition(LOWER, 5, margin=ROOMY)[0]
    # With one percent of room every step needs one; and bf16 does in any case.
    assert restarts_for(QUINTICS, torch.float16) == restarts_for(quintics, torch.bfloat16) == (1, 2, 3, 4)
    # 23.5 units of m^3 against 32.5 where symmetric products cost half; a square matrix would take 10 against 10.
    assert gram_cost(768, 3072, 5, 2, False, True) == 23.5 * 768**3 and product_cost(768, 3072, 5, True) == 32.5 * 768**3
    assert polynomial(dtype="float16").form(768, 768, torch.float16, True) == (product_form, QUINTICS)
    # A tolerance that the wider fit would miss is kept, and so is a number of steps.
    for solver in (polynomial(tol=0.15), polynomial(steps=5)):
        assert solver.form(768, 3072, torch.float16, True)[1] == QUINTICS


@pytest.mark.parametrize(("shape", "above_1e_3"), [((2, 5), 0.74), ((3, 9), 0.80), ((4, 16), 0.82), ((24, 96), 0.8455 - 0.005)])
def test_matrices_of_a_few_rows_lose_more_at_the_floor(shape, above_1e_3):
    m, n = shape
    generator = torch.Generator().manual_seed(m)
    U, _, Vh = torch.linalg.svd(torch.randn(4000 if m < 24 else 300, m, n, generator=generator).double(), full_matrices=False)
    spectrum = 10 ** (-6 * torch.rand(len(U), m, generator=generator).double())
    D = polynomial(dtype="float16")(((U * spectrum.unsqueeze(-2)) @ Vh).float()).double()
    gain, relative = (U.mT @ D @ Vh.mT).diagonal(dim1=-2, dim2=-1), spectrum / spectrum.norm(dim=-1, keepdim=True)
    assert gain.max() < 1.157 and gain[relative > 1e-2].min() > 0.8455 - (0.006 if m < 24 else 0.003)
    assert gain[relative > 1e-3].min() > above_1e_3


def test_a_tall_matrix_keeps_its_layout():
    tall = normalised(gaussian(2, 60, 20).float(), torch.float32)
    form = cheaper_form(20, 60, QUINTICS, torch.float32)
    assert form is not product_form and cheaper_form(20, 20, QUINTICS, torch.float32) is product_form
    for f in (form, product_form):
        assert f(tall.mT, QUINTICS).mT.is_contiguous()
        assert torch.allclose(f(tall.mT, QUINTICS), f(tall.mT.contiguous(), QUINTICS), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(2, 4), (3, 7), (4, 8), (8, 16)], ids=str)
def test_no_small_matrix_leaves_the_band_in_any_precision(shape, dtype):
    """Of Gaussian 2 x 4 matrices one in a thousand came out of the bf16 Gram form at up to 1e14, with too few restarts."""
    m, n = shape
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(20000 if m < 8 else 4000, m, n, generator=generator)
    U, s, Vh = torch.linalg.svd(gaussian, full_matrices=False)
    log_uniform = 10 ** (-3 * torch.rand(s.shape, generator=generator))
    log_uniform[:, 0] = 1
    for X in (gaussian, (U * log_uniform.unsqueeze(-2)) @ Vh):
        D = polynomial(dtype=dtype)(X)
        # The band of the default tolerance 0.16, and what its docstring says bf16 adds above 1e-3 of the norm.
        assert torch.linalg.matrix_norm(D.double(), ord=2).max() <= 1.16 + 0.08


def test_a_diagonal_of_small_blocks_stays_in_the_band_too():
    blocks = [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(256)]
    D = polynomial(dtype="bfloat16")(torch.block_diag(*blocks))
    assert torch.linalg.matrix_norm(D.double(), ord=2) <= 1.16 + 0.08
