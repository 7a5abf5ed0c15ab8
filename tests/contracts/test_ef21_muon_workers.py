"""EF21-Muon's protocol for several workers in one process: who delivers what, when a step is refused, what it may touch."""

import copy
import io

import pytest
import torch
from torch import nn

import schatten
from schatten.compressors import Identity, Natural, RankK, Sign, TopK
from schatten.presets.ef21_muon import EF21Muon, ErrorFeedback, ServerCompression
from schatten.rule import Rule

N = 3

LOSSY = {"compressor": TopK(0.3), "server_compressor": Natural()}


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 4), (6, 4), (3, 5), (7,))]


def build(params, workers=N, **options):
    groups = [{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}]
    return EF21Muon(groups, **{"lr": 0.1, "workers": workers, **LOSSY, **options})


def drawn(params, workers=N):
    return [[torch.randn(p.shape).to(p.dtype) for p in params] for _ in range(workers)]


def deliver(opt, params, gradients, workers=None):
    for j in range(opt.workers) if workers is None else workers:
        with opt.worker(j):
            for p, G in zip(params, gradients[j], strict=True):
                p.grad = None if G is None else G.clone()


def step(opt, params, gradients):
    deliver(opt, params, gradients)
    opt.step()


def snapshot(opt, params):
    return copy.deepcopy([[p.detach() for p in params], [opt.state[p] for p in params], [g["step"] for g in opt.param_groups]])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize(("workers", "missing"), [((), r"\[0, 1, 2\]"), ((2, 0), r"\[1\]")])
def test_a_step_without_every_workers_gradients_is_refused_and_changes_nothing(workers, missing):
    params = parameters()
    opt = build(params)
    step(opt, params, drawn(params))
    before = snapshot(opt, params)
    deliver(opt, params, drawn(params), workers)
    with pytest.raises(RuntimeError, match=f"all 3 workers, those of {missing} are missing: .*No weight was changed"):
        opt.step()
    assert same(snapshot(opt, params), before)


def test_what_was_delivered_before_a_refused_step_counts_in_the_next():
    params = parameters()
    opt, gradients = build(params), drawn(params)
    other = copy.deepcopy(params)
    deliver(opt, params, gradients, [1])
    with pytest.raises(RuntimeError, match="missing"):
        opt.step()
    deliver(opt, params, gradients, [0, 2])
    opt.step()
    step(build(other), other, gradients)
    assert same([p.detach() for p in params], [p.detach() for p in other])


def test_a_step_uses_up_what_was_delivered():
    params = parameters()
    opt = build(params)
    step(opt, params, drawn(params))
    with pytest.raises(RuntimeError, match="missing"):
        opt.step()


def test_gradients_from_before_come_back_and_the_step_replaces_them_by_the_mean():
    params = parameters()
    opt, gradients = build(params), drawn(params)
    own = [torch.randn_like(p) for p in params]
    kept = [G.clone() for G in own]
    for p, G in zip(params, own, strict=True):
        p.grad = G
    for j in range(N):
        with opt.worker(j):
            assert all(p.grad is None for p in params)
            sum((p * G).sum() for p, G in zip(params, gradients[j], strict=True)).backward()
        assert all(p.grad is G for p, G in zip(params, own, strict=True))
    opt.step()
    assert same(own, kept), "a gradient was written to"
    for i, p in enumerate(params):
        # Three sums in another order.
        assert (p.grad - torch.stack([G[i] for G in gradients]).mean(0)).abs().max() < 1e-6


def test_a_worker_that_fails_delivers_nothing_and_leaves_gradients_as_they_were():
    params = parameters()
    opt, gradients = build(params), drawn(params)
    deliver(opt, params, gradients, [0, 1])
    params[0].grad = own = torch.randn_like(params[0])
    with pytest.raises(ZeroDivisionError), opt.worker(2):
        params[0].grad = torch.zeros_like(params[0])
        raise ZeroDivisionError
    assert params[0].grad is own and params[1].grad is None
    with pytest.raises(RuntimeError, match=r"those of \[2\]"):
        opt.step()


def test_a_second_delivery_of_a_worker_replaces_its_first():
    params = parameters()
    opt, gradients = build(params), drawn(params)
    other = copy.deepcopy(params)
    deliver(opt, params, drawn(params), [1])
    step(opt, params, gradients)
    step(build(other), other, gradients)
    assert same([p.detach() for p in params], [p.detach() for p in other])


def test_no_gradient_of_one_worker_counts_as_zero_and_of_all_as_none():
    params, gradients = parameters(), drawn(parameters())
    other = copy.deepcopy(params)
    opt, reference = build(params), build(other)
    first = drawn(params)
    step(opt, params, first)
    step(reference, other, first)
    before = snapshot(opt, params)
    for own in gradients:
        own[1] = None
    zeros = [list(own) for own in gradients]
    for i in (0, 3):
        gradients[2][i], zeros[2][i] = None, torch.zeros_like(params[i])
    step(opt, params, gradients)
    step(reference, other, zeros)
    after = snapshot(opt, params)
    assert same(after, snapshot(reference, other))
    assert params[1].grad is None and torch.equal(params[1], before[0][1]) and same(after[1][1], before[1][1])
    assert not any(torch.equal(p, w) for p, w in zip(params, before[0], strict=True) if p is not params[1])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_non_finite_gradient_of_one_worker_stops_its_parameter_only_and_is_counted(bad):
    params = parameters()
    opt = build(params)
    step(opt, params, drawn(params))
    before, gradients = snapshot(opt, params), drawn(params)
    gradients[1][0][2, 3] = bad
    gradients[0][0][2, 3] = -bad
    step(opt, params, gradients)
    for i, p in enumerate(params):
        assert torch.equal(p, before[0][i]) == (i == 0) and p.isfinite().all()
    for key, value in before[1][0].items():
        # The last is where this step's gradients came in.
        assert torch.equal(opt.state[params[0]][key], value + (key == "skipped")) or key == "worker_gradients"
    assert opt.metrics()["skipped"] == {"0.0": 1}
    step(opt, params, drawn(params))
    assert all(value.isfinite().all() for p in params for value in opt.state[p].values())
    assert not torch.equal(params[0], before[0][0])


def test_a_closure_is_refused_with_several_workers_and_called_with_one():
    params = parameters()
    with pytest.raises(RuntimeError, match="there are 3 workers with one each: take each"):
        build(params).step(lambda: 1.0)
    opt = build(params, workers=1)

    def closure():
        opt.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    assert opt.step(closure).item() > opt.step(closure).item()


def test_only_workers_that_exist_can_deliver():
    params = parameters()
    for workers, index in ((3, 3), (3, -1), (1, 1)):
        with pytest.raises(ValueError, match=rf"are {list(range(workers))}".replace("[", r"\[") + f".*got {index}"):
            with build(params, workers=workers).worker(index):
                pass


def test_a_loop_over_workers_also_serves_one():
    params, gradients = parameters(), drawn(parameters(), 4)
    other = copy.deepcopy(params)
    opt, plain = build(params, workers=1), build(other, workers=1)
    for own in gradients:
        deliver(opt, params, [own])  # each begins without gradients, where those of a plain step would add up
        opt.step()
        for p, G in zip(other, own, strict=True):
            p.grad = G.clone()
        plain.step()
    assert same(snapshot(opt, params), snapshot(plain, other))


def test_adamw_is_given_the_mean():
    params = parameters()
    opt, p = build(params), copy.deepcopy(params[-1])
    reference = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(4):
        gradients = drawn(params)
        p.grad = torch.stack([G[-1] for G in gradients]).mean(0)
        step(opt, params, gradients)
        reference.step()
    # Means in another order, divided by an Adam denominator of about their size.
    assert (p - params[-1]).abs().max() < 1e-5


def test_equal_workers_are_one():
    params, gradients = parameters(torch.float64), drawn(parameters(torch.float64), 6)
    other = copy.deepcopy(params)
    opt, one = (build(p, workers=n, compressor=TopK(0.3), server_compressor=Identity()) for p, n in ((params, 3), (other, 1)))
    for own in gradients:
        step(opt, params, [own] * 3)
        step(one, other, [own])
    # The polynomial amplifies the rounding of a mean by the condition of few entries.
    assert all((a - b).norm() < 1e-9 * b.norm() for a, b in zip(params, other, strict=True))


def test_maximize_is_minimising_the_negative():
    params, gradients = parameters(), [drawn(parameters()) for _ in range(3)]
    other = copy.deepcopy(params)
    opt, reference = build(params, maximize=True), build(other)
    for own in gradients:
        step(opt, params, own)
        step(reference, other, [[-G for G in worker] for worker in own])
    assert same([p.detach() for p in params], [p.detach() for p in other])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("compressor", [Identity(), TopK(0.3), Natural(), RankK(2)], ids=repr)
def test_a_checkpoint_continues_bit_for_bit(compressor, workers, dtype):
    params = parameters(dtype)
    options = {"workers": workers, "compressor": compressor, "server_compressor": Sign()}
    opt = build(params, **options)
    gradients = [drawn(params, workers) for _ in range(6)]
    for own in gradients[:3]:
        step(opt, params, own)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = build(resumed, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for own in gradients[3:]:
        step(opt, params, own)
        step(other, resumed, own)
    assert same(snapshot(opt, params), snapshot(other, resumed))


def test_a_checkpoint_of_another_number_of_workers_or_another_compressor_is_refused():
    params = parameters()
    saved = build(params).state_dict()
    for other in ({"workers": 2}, {"compressor": TopK(0.2)}, {"server_compressor": TopK(0.3)}):
        with pytest.raises(ValueError, match="another rule"):
            build(parameters(), **other).load_state_dict(saved)


def test_a_copy_of_the_optimizer_has_its_own_deliveries():
    params = parameters()
    opt = build(params)
    step(opt, params, drawn(params))
    gradients = drawn(params)
    deliver(opt, params, gradients, [0, 1])
    twin, twins = copy.deepcopy((opt, params))
    for one, own in ((opt, params), (twin, twins)):
        deliver(one, own, gradients, [2])
        one.step()
    assert same(snapshot(opt, params), snapshot(twin, twins))
    assert all(a is not b for a, b in zip(params, twins, strict=True))


def test_banks_and_convolutions_are_their_matrices():
    bank, conv = nn.Parameter(torch.randn(2, 5, 4)), nn.Parameter(torch.randn(4, 3, 2, 2))
    singles = [nn.Parameter(W.detach().clone()) for W in (*bank, conv.flatten(1))]
    opt = EF21Muon([{"params": [bank], "layout": "experts"}, {"params": [conv]}], lr=0.1, workers=N, **LOSSY)
    reference = EF21Muon(singles, lr=0.1, workers=N, **LOSSY)
    for _ in range(4):
        gradients = drawn([bank, conv])
        deliver(opt, [bank, conv], gradients)
        deliver(reference, singles, [[*G[0], G[1].flatten(1)] for G in gradients])
        opt.step()
        reference.step()
    # Batched products may add in another order; entries of size 1 after four steps of 0.1.
    for mine, theirs in zip((*bank, conv.flatten(1)), singles, strict=True):
        assert (mine - theirs).abs().max() < 1e-5


def test_a_batch_equals_its_matrices_one_by_one():
    params, gradients = parameters(), [drawn(parameters()) for _ in range(3)]
    other = copy.deepcopy(params)
    opt, single = build(params), build(other, max_batch_bytes=1)
    for own in gradients:
        step(opt, params, own)
        step(single, other, own)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(params, other, strict=True))


def test_weights_loaded_after_construction_are_where_the_server_starts():
    params = parameters()
    opt = build(params)
    with torch.no_grad():
        for p in params:
            p.copy_(torch.randn_like(p) * 10)
    other = copy.deepcopy(params)
    gradients = drawn(params)
    step(opt, params, gradients)
    step(build(other), other, gradients)
    assert same([p.detach() for p in params], [p.detach() for p in other])


def test_the_server_keeps_what_it_has_not_sent():
    params = parameters(torch.float64)
    opt = build(params, compressor=Identity(), server_compressor=TopK(0.2))
    other = copy.deepcopy(params)
    exact = build(other, compressor=Identity(), server_compressor=None)
    for _ in range(3):
        gradients = drawn(params)
        step(opt, params, gradients)
        step(exact, other, gradients)
    # These gradients do not depend on the weights, so X is the weight without compression.
    for p, q in zip(params[:-1], other[:-1], strict=True):
        assert not torch.equal(p, q)
        assert (p + opt.state[p]["server_error"] - q).abs().max() < 1e-12


def test_zero_gradients_without_decay_leave_weights_bit_equal():
    for compressor in (Identity(), TopK(0.3), Natural(), RankK(2), Sign()):
        params = parameters()
        before = [p.detach().clone() for p in params]
        opt = build(params, compressor=compressor, server_compressor=compressor, weight_decay=0.0)
        for _ in range(3):
            step(opt, params, [[torch.zeros_like(p) for p in params]] * N)
        assert same([p.detach() for p in params], before)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("compressor", [TopK(0.1), Natural(), RankK(2), Sign()], ids=repr)
def test_weights_and_state_stay_finite_at_any_scale(compressor, scale):
    params = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (1, 1), (1, 7), (7, 1))]
    opt = EF21Muon(params, lr=0.1, workers=2, compressor=compressor, server_compressor=compressor)
    for k in range(4):
        gradients = drawn(params, 2)
        for own in gradients:
            own[0] = torch.outer(own[0][:, 0], own[0][0]) if k % 2 else own[0]
        before = [p.detach().clone() for p in params]
        step(opt, params, [[scale * G for G in own] for own in gradients])
        assert not any(torch.equal(p, w) for p, w in zip(params, before, strict=True))
        assert all(value.isfinite().all() for p in params for value in (p, *opt.state[p].values()))


def test_a_group_may_have_a_compressor_of_its_own():
    a, b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
    own = Rule(ErrorFeedback(RankK(1)))
    opt = EF21Muon([{"params": [a]}, {"params": [b], "rule": own}], compressor=TopK(0.5), workers=2)
    step(opt, [a, b], drawn([a, b], 2))
    # 32 values of 4 and positions of 2 bytes, and two vectors of 8.
    assert opt.metrics()["bytes_to_server"] == 2 * (32 * 6 + 16 * 4)
    assert torch.linalg.matrix_rank(opt.state[b]["estimate"][0]) == 1
    assert opt.rule(opt.param_groups[1]).signal == ErrorFeedback(RankK(1), workers=2)


def test_a_group_may_have_a_rule_without_feedback():
    params, gradients = parameters()[:2], drawn(parameters()[:2])
    opt = EF21Muon([{"params": params[:1]}, {"params": params[1:], "rule": schatten.Rule()}], workers=N, lr=0.1)
    other = nn.Parameter(params[1].detach().clone())
    muon = schatten.Muon([other], lr=0.1)
    step(opt, params, gradients)
    other.grad = params[1].grad.clone()
    muon.step()
    assert torch.equal(params[1], other)


def test_sparse_gradients_are_refused_where_they_are_made():
    table = nn.Embedding(5, 4, sparse=True)
    opt = EF21Muon([table.weight], workers=2)
    with pytest.raises(RuntimeError, match="must be dense"), opt.worker(0):
        table(torch.tensor([1])).sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers must be a whole number >= 1, got 0"),
        ({"workers": True}, ValueError, "workers must be"),
        ({"workers": 2.0}, ValueError, "workers must be"),
        ({"compressor": TopK}, TypeError, "compressor must be a compressor of schatten.compressors"),
        ({"compressor": 0.1}, TypeError, r"such as TopK\(0.1\), got 0.1"),
        ({"server_compressor": Sign}, TypeError, "server_compressor must be"),
        ({"momentum": 1.0}, ValueError, "momentum must lie"),
        ({"decay": "none"}, ValueError, "decay must be"),
        ({"nesterov": True}, TypeError, "This rule reads momentum"),
    ],
)
def test_impossible_choices_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        EF21Muon(parameters()[:2], **options)


def test_the_slots_are_values():
    rule = build(parameters()).rule(build(parameters()).param_groups[0])
    names = {"ErrorFeedback": ErrorFeedback, "ServerCompression": ServerCompression, "TopK": TopK, "Natural": Natural}
    for slot in (rule.signal, rule.retraction):
        assert eval(repr(slot), {**names, "DecoupledDecay": schatten.retractions.DecoupledDecay}) == slot
        assert hash(copy.deepcopy(slot)) == hash(slot)


@pytest.mark.parametrize("compressor", [Identity(), TopK(1.0)], ids=repr)
def test_the_signal_is_the_mean_of_what_workers_send(compressor):
    signal = ErrorFeedback(compressor, workers=N)
    G = torch.randn(2, 1, N, 4, 3)
    state = {key: value.expand(2, *value.shape).clone() for key, value in signal.init(torch.empty(1, 4, 3)).items()}
    S, _ = signal(torch.empty(2, 1, 4, 3), {**state, "worker_gradients": G}, {"momentum": 0.0, "step": 1})
    assert (S - G.mean(2)).abs().max() < 1e-6


def test_the_server_reads_the_numbers_of_its_step():
    class Faded(schatten.retractions.DecoupledDecay):
        hyperparameters = ("fade",)

    rule = Rule(retraction=ServerCompression(Faded(), TopK(0.5)))
    assert rule.hyperparameters == ("momentum", "fade")
    assert ServerCompression().hyperparameters == ()
