"""A checkpoint holds everything: state from the first moment, and a resumed run that no bit tells from an uninterrupted one."""

import copy
import io

import pytest
import torch
from torch import nn

import schatten
from tests.contracts.driving import step

SAVED_AT, END = 3, 10


def parameters(dtype):
    """Two matrices of one shape, another matrix, and two vectors for AdamW, with seeded values."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (6, 4), (3, 5), (5,), (4,)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def optimizer(params, preset=schatten.Muon, **options):
    rest = {"layout": "flat"} if preset.needs_closure else {"algorithm": "adamw"}
    return preset([{"params": params[:3]}, {"params": params[3:], **rest}], **options)


def train(opt, params, steps):
    for number in steps:
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + i)).to(p.dtype)
        step(opt)


def through_a_file(state_dict):
    """What torch.save and a safe torch.load leave of it."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flat(state):
    """Every tensor and plain value of a state_dict with its path, for comparison."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(state)
    return {str(path): value for path, value in leaves}


def assert_same_state(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[path].dtype and torch.equal(value, b[path]), path
        else:
            assert value == b[path], path


def test_state_exists_for_every_parameter_before_the_first_step(any_preset, dtype):
    params = parameters(dtype)
    opt = optimizer(params, any_preset)
    assert set(opt.state) == set(params)
    saved = opt.state_dict()["state"]
    assert sorted(saved) == list(range(len(params)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for i, p in enumerate(params):
        tensors = {k: v for k, v in saved[i].items() if k not in ("step", "skipped")}
        assert all(v.dtype == wide and v.device == p.device and v.isfinite().all() for v in tensors.values())
        assert saved[i]["step"] == saved[i]["skipped"] == 0


def test_the_keys_of_state_do_not_depend_on_who_had_a_gradient(any_preset):
    params = parameters(torch.float32)
    opt = optimizer(params, any_preset)
    before = {i: set(s) for i, s in opt.state_dict()["state"].items()}
    params[0].grad = torch.randn(6, 4)
    step(opt)
    assert {i: set(s) for i, s in opt.state_dict()["state"].items()} == before


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(any_preset, dtype):
    params = parameters(dtype)
    opt = optimizer(params, any_preset, lr=0.05)
    for group in opt.param_groups:
        group["weight_decay"] = 0.2
    train(opt, params, range(SAVED_AT))
    saved = through_a_file({"model": [p.detach() for p in params], "optimizer": opt.state_dict()})
    train(opt, params, range(SAVED_AT, END))

    resumed = [nn.Parameter(w.clone()) for w in saved["model"]]
    other = optimizer(resumed, any_preset, lr=0.9)
    for group in other.param_groups:
        group["weight_decay"] = 0.0
        for key in {"momentum", "beta1", "beta2"} & set(group):
            group[key] = 0.3
    train(other, resumed, range(2))  # a state to forget
    with torch.no_grad():
        for p, w in zip(resumed, saved["model"], strict=True):
            p.copy_(w)
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["lr"] == 0.05 and other.param_groups[1]["weight_decay"] == 0.2
    assert_same_state(other.state_dict(), saved["optimizer"])
    train(other, resumed, range(SAVED_AT, END))

    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))
    assert_same_state(other.state_dict(), opt.state_dict())


KEPT = {
    "bf16 averages": (schatten.Muon, {}, {"state_dtype": "bfloat16"}),
    "int8 averages": (schatten.Muon, {}, {"state_dtype": "int8"}),
    "Kahan's compensation": (schatten.Muon, {"rounding": "kahan"}, {}),
    "rows of unequal parts": (schatten.NorMuon, {}, {"layout": schatten.Layout(split=(4, 2))}),
    "int8 of heads of columns": (schatten.Muon, {}, {"state_dtype": "int8", "layout": schatten.Layout(heads=2, axis="fan_in")}),
    "a transposed matrix": (schatten.NorMuon, {}, {"layout": schatten.Layout(transpose=True)}),
}


@pytest.mark.parametrize(("preset", "options", "group"), KEPT.values(), ids=KEPT)
def test_every_form_of_state_comes_back_bit_for_bit(preset, options, group):
    def build():
        p = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16())
        return p, preset([{"params": [p], **group}], lr=0.05, **options)

    p, opt = build()
    train(opt, [p], range(SAVED_AT))
    saved = through_a_file(opt.state_dict())
    q, other = build()
    train(other, [q], range(5, 7))  # a state to forget
    other.load_state_dict(saved)
    assert_same_state(other.state_dict(), saved)
    assert {k: v.dtype for k, v in other.state[q].items()} == {k: v.dtype for k, v in opt.state[p].items()}
    with torch.no_grad():
        q.copy_(p)
    for o, w in ((opt, p), (other, q)):
        train(o, [w], range(SAVED_AT, END))
    assert torch.equal(p, q)


def test_auto_and_the_layout_it_stands_for_are_the_same_to_a_checkpoint():
    def build(layout, shape=(6, 4)):
        return schatten.Muon([{"params": [nn.Parameter(torch.zeros(shape))], "layout": layout}])

    same = [
        ("auto", "matrix", (6, 4)),
        ("auto", schatten.Layout("matrix"), (6, 4)),
        ("auto", "conv", (6, 4, 3, 3)),
        (schatten.Layout(split=2), schatten.Layout("matrix", split=2), (6, 4)),
    ]
    for a, b, shape in same:
        for theirs, ours in ((a, b), (b, a)):
            build(ours, shape).load_state_dict(build(theirs, shape).state_dict())


def test_a_scheduler_s_own_numbers_come_back_and_stay():
    params = parameters(torch.float32)
    opt = optimizer(params, lr=0.5)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    saved = through_a_file(opt.state_dict())
    other = optimizer(parameters(torch.float32), lr=0.25)
    other.load_state_dict(saved)
    assert other.param_groups[0]["max_lr"] == 0.1
    # A scheduler reads what it wrote into the groups, also after a checkpoint from before it was there.
    scheduled = optimizer(parameters(torch.float32), lr=0.25)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(scheduled, max_lr=0.3, total_steps=10)
    scheduled.load_state_dict(optimizer(parameters(torch.float32)).state_dict())
    assert scheduled.param_groups[0]["max_lr"] == 0.3
    scheduled.step()
    scheduler.step()


def test_loading_copies_and_leaves_the_given_dictionary_alone():
    params = parameters(torch.float32)
    opt = optimizer(params)
    train(opt, params, range(2))
    given = opt.state_dict()
    kept = copy.deepcopy(given)
    other_params = parameters(torch.float32)
    other = optimizer(other_params)
    other.load_state_dict(given)
    train(other, other_params, range(3))
    assert_same_state(given, kept)


def test_a_state_dict_holds_plain_values_and_the_text_of_its_rule():
    params = parameters(torch.float32)
    opt = optimizer(params, scale="mup", solver=schatten.solvers.svd(), nesterov=False)
    spectral, adamw = opt.state_dict()["param_groups"]
    assert spectral["rule"] == repr(opt.rule(opt.param_groups[0]))
    assert "Scale(name='mup')" in spectral["rule"] and "svd()" in spectral["rule"] and "nesterov=False" in spectral["rule"]
    assert spectral["schema"] == adamw["schema"] == 1
    assert {"lr", "weight_decay", "momentum", "nesterov", "scale", "form", "decay", "rounding"} <= set(spectral)
    plain = (bool, int, float, str, torch.Tensor, type(None))
    assert all(isinstance(v, plain) for v in flat([spectral, adamw]).values())


@pytest.mark.parametrize("kind", ["float", "int", "tensor", "numpy.float64", "numpy.float32"])
def test_a_learning_rate_of_any_kind_comes_back_from_a_safe_checkpoint(kind):
    numpy = pytest.importorskip("numpy") if "numpy" in kind else None
    lr = {
        "float": lambda: 0.25,
        "int": lambda: 1,
        "tensor": lambda: torch.tensor(0.25),
        "numpy.float64": lambda: numpy.float64(0.25),
        "numpy.float32": lambda: numpy.float32(0.25),
    }[kind]()
    opt = schatten.Muon([parameters(torch.float32)[0]], lr=lr)
    other = schatten.Muon([parameters(torch.float32)[0]], lr=0.5)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert float(other.param_groups[0]["lr"]) == float(lr)


def test_a_loaded_optimizer_keeps_its_own_solver_object_and_steps_with_it():
    p, q = parameters(torch.float32)[:2]
    opt = schatten.Muon([p], solver=schatten.solvers.svd())
    other = schatten.Muon([q], solver=(solver := schatten.solvers.svd()))
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.param_groups[0]["solver"] == solver and not isinstance(other.param_groups[0]["solver"], str)
    train(other, [q], range(1))


def test_names_are_saved_and_a_renamed_model_keeps_its_own():
    def build(*names):
        return schatten.Muon(list(zip(names, parameters(torch.float32), strict=False)))

    saved = through_a_file(build("a", "b").state_dict())
    assert saved["param_groups"][0]["param_names"] == ["a", "b"]
    # A wrapper (DDP, torch.compile) renames every parameter and keeps their order.
    for names in (["a", "b"], ["module.a", "module.b"]):
        other = build(*names)
        other.load_state_dict(saved)
        assert other.param_groups[0]["param_names"] == names


def test_a_model_resumes_through_a_file(dtype):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
        return model, schatten.Muon(model, lr=0.05)

    model, opt = build()
    train(opt, list(model.parameters()), range(SAVED_AT))
    saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
    train(opt, list(model.parameters()), range(SAVED_AT, END))
    other, other_opt = build()
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["optimizer"])
    train(other_opt, list(other.parameters()), range(SAVED_AT, END))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
