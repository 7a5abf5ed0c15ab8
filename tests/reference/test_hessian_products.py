"""Products with Hessians against the explicit Hessian, in fp64, of models with everything that makes one hard."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schatten.diagnostics.hessian import Hessian
from tests.reference.hessian_models import flat, functional, hard, loss_of, tokens

# Some hundred operations, each rounded to 1e-16 of numbers of order 1.
CLOSE = 1e-12


def all_products(H, params):
    """H times every unit vector: the matrix, column by column."""
    size = sum(p.numel() for p in params)
    columns = []
    for e in torch.eye(size, dtype=torch.float64):
        parts = e.split([p.numel() for p in params])
        columns.append(flat(H([part.view(p.shape) for part, p in zip(parts, params, strict=True)])))
    return torch.stack(columns, 1)


def test_products_are_those_of_the_explicit_hessian_of_a_model_with_all_that_is_hard():
    model, batch = hard(), tokens(0)
    params = list(model.parameters())
    torch.manual_seed(5)
    H = Hessian(lambda: loss_of(model, batch), params, model=model)
    # Attention by hand, as fused kernels have no second derivative. Buffers of the reference do change.
    twin = hard(fused=False)
    torch.manual_seed(5)
    expected = functional(twin, batch)
    assert expected.abs().max() > 0.1
    assert (all_products(H, params) - expected).abs().max() < CLOSE
    torch.manual_seed(5)
    gradient = torch.autograd.grad(loss_of(twin, batch), list(twin.parameters()), materialize_grads=True)
    assert (flat(H.gradient) - flat(gradient)).abs().max() < CLOSE
    assert H.products == expected.shape[0]


def test_what_is_unused_and_what_is_linear_have_no_curvature():
    model = hard()
    params = dict(model.named_parameters())
    H = Hessian(lambda: loss_of(model, tokens(0)), list(params.values()), model=model)
    for name in ("unused", "linear"):
        i = list(params).index(name)
        assert not H.within(i, torch.ones_like(params[name])).any()
        assert torch.equal(H.gradient[i], torch.full_like(params[name], float(name == "linear")))


def test_a_loss_that_is_linear_in_all_has_a_zero_hessian():
    w = torch.ones(3, requires_grad=True)
    H = Hessian(lambda: (2 * w).sum(), [w])
    assert torch.equal(H([torch.ones(3)])[0], torch.zeros(3)) and torch.equal(H.gradient[0], torch.full((3,), 2.0))


def test_a_block_is_the_diagonal_block_of_the_whole():
    model, batch = hard(dropout=0.0), tokens(1)
    params = list(model.parameters())
    H = Hessian(lambda: loss_of(model, batch), params, model=model)
    expected = functional(hard(fused=False, dropout=0.0), batch)
    at = 0
    for i, p in enumerate(params):
        block = expected[at : at + p.numel(), at : at + p.numel()]
        v = torch.randn_like(p)
        assert (H.within(i, v).reshape(-1) - block @ v.detach().reshape(-1)).abs().max() < CLOSE * max(1, p.numel())
        at += p.numel()


@pytest.mark.parametrize("parts", [2, 3])
def test_several_micro_batches_give_the_mean_of_their_hessians(parts):
    model = hard(dropout=0.0)
    params = list(model.parameters())
    batches = [tokens(seed) for seed in range(parts)]
    H = Hessian([lambda b=b: loss_of(model, b) for b in batches], params, model=model)
    v = [torch.randn_like(p) for p in params]
    each = [Hessian(lambda b=b: loss_of(model, b), params, model=model) for b in batches]
    for own, of_each in ((flat(H(v)), [flat(h(v)) for h in each]), (flat(H.gradient), [flat(h.gradient) for h in each])):
        assert (own - torch.stack(of_each).mean(0)).abs().max() < CLOSE
    assert float(H.loss) == pytest.approx(float(torch.stack([h.loss for h in each]).mean()), rel=1e-14)


def test_without_batch_norm_micro_batches_are_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    params = list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    losses = [lambda i=i: (model(x[i : i + 2]) - y[i : i + 2]).square().mean() for i in range(0, 8, 2)]
    together = Hessian(lambda: (model(x) - y).square().mean(), params)
    assert (flat(Hessian(losses, params)(v)) - flat(together(v))).abs().max() < CLOSE


@pytest.mark.parametrize("several", [False, True])
def test_dropout_is_one_function_whatever_is_drawn_between_products(several):
    model, batch = hard(dropout=0.5), tokens(2)
    params = list(model.parameters())
    losses = [lambda: loss_of(model, batch)] * (2 if several else 1)
    H = Hessian(losses if several else losses[0], params, model=model)
    v = [torch.randn_like(p) for p in params]
    first = H(v)
    torch.randn(100)
    assert all(torch.equal(a, b) for a, b in zip(first, H(v), strict=True))


def test_products_under_bf16_autocast_are_near_those_of_fp32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    params = list(model.parameters())

    def loss(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return nn.functional.cross_entropy(model(x), y)

    v = [torch.randn_like(p) for p in params]
    half, full = (Hessian(lambda e=e: loss(e), params) for e in (True, False))
    error = flat(half(v)) - flat(full(v))
    # bf16 rounds to 4e-3; seen 6e-3. That it is not 0 says that autocast was on.
    assert 1e-4 < error.norm() / flat(full(v)).norm() < 0.02
    assert all(t.dtype == torch.float32 for t in half(v))
    assert full.mistake() < 0.02


def test_parameters_in_half_precision_take_vectors_of_any_and_give_their_own():
    w = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    H = Hessian(lambda: w.float().pow(4).sum(), [w])
    found = H.within(0, torch.ones(4, 3, dtype=torch.float64))
    assert found.dtype == torch.bfloat16
    # Two roundings to bf16.
    assert ((found.float() - 12 * w.detach().float() ** 2).abs() <= 2**-7 * 12 * w.detach().float() ** 2).all()


def test_checkpointed_activations_give_the_same_products_and_the_old_kind_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    params = list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    torch.manual_seed(1)
    plain = Hessian(lambda: model(x).square().mean(), params, model=model)
    torch.manual_seed(1)
    recomputed = Hessian(lambda: checkpoint(model, x, use_reentrant=False).square().mean(), params, model=model)
    for _ in range(2):
        assert (flat(recomputed(v)) - flat(plain(v))).abs().max() < CLOSE
    # With a first layer outside and without: torch raises or takes the gradients inside for zero.
    first = nn.Linear(4, 4).double()
    for begin, own in ((first, list(first.parameters())), (first, []), (lambda x: x.clone().requires_grad_(), [])):
        with pytest.raises(ValueError, match="use_reentrant=True"):
            Hessian(lambda f=begin: checkpoint(model, f(x), use_reentrant=True).square().mean(), [*own, *params])


class Unrecorded(torch.autograd.Function):
    """x^3 as a kernel of one's own: what its backward does is not recorded, in part (0) or at all (1)."""

    @staticmethod
    def forward(ctx, x, kind):
        ctx.save_for_backward(x)
        ctx.kind = kind
        return x**3

    @staticmethod
    def backward(ctx, *grads):
        x, g = ctx.saved_tensors[0].detach(), grads[0].detach() if ctx.kind else grads[0]
        return 3 * x**2 * g, None


@pytest.mark.parametrize("kind", [0, 1])
def test_a_kernel_without_a_second_derivative_is_found_and_weights_are_as_before(kind):
    w, a = torch.randn(6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    before, places, versions = [w.clone(), a.clone()], [w.data_ptr(), a.data_ptr()], [w._version, a._version]
    wrong = Hessian(lambda: Unrecorded.apply(a @ w, kind).square().mean(), [w, a])
    right = Hessian(lambda: ((a @ w) ** 3).square().mean(), [w, a])
    assert right.mistake() < 1e-2 < 0.1 < wrong.mistake()
    assert torch.equal(w, before[0]) and torch.equal(a, before[1])
    assert [w.data_ptr(), a.data_ptr()] == places and [w._version, a._version] == versions


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda w: Hessian([], [w]), TypeError, "function without arguments"),
        (lambda w: Hessian(w.sum(), [w]), TypeError, "function without arguments"),
        (lambda w: Hessian(lambda: w, [w]), TypeError, "one element"),
        (lambda w: Hessian(lambda: w.detach().sum(), [w]), ValueError, "does not depend"),
        (lambda w: Hessian(lambda: w.sum(), [w.detach()]), ValueError, "requires_grad=False"),
    ],
)
def test_refusals_say_what_was_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make(torch.ones(2, requires_grad=True))
