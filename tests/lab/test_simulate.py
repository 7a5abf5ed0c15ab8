"""The simulator counts what the engine's own schedule lists, for every rank; and the command line around it."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import schatten
from schatten.lab import zoo
from schatten.lab.commands import app
from schatten.lab.errors import InputError
from schatten.lab.mesh import Mesh
from schatten.lab.shares import buckets_of
from schatten.lab.simulate import simulate, travellers_of
from schatten.placements.machine import CPU, H100
from schatten.placements.schedule import Move, schedule


class Layer(nn.Module):
    """Names as tensor parallelism knows them, sizes that do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 10, bias=False)
        self.o_proj = nn.Linear(10, 24, bias=False)
        self.other = nn.Linear(17, 13, bias=False)
        self.conv = nn.Conv2d(4, 6, 3)
        self.experts = Bank()


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, 12, 8))


MESHES = [
    Mesh(),
    Mesh(shard=2),
    Mesh(shard=3),
    Mesh(shard=8),
    Mesh(replicate=3),
    Mesh(replicate=2, shard=2),
    Mesh(shard=2, tp=2),
    Mesh(replicate=2, shard=2, tp=2),
    Mesh(shard=4, ep=2),
]


def entries() -> list[Any]:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(32, 24), *(Layer() for _ in range(4)), nn.Linear(24, 32))
    rules = [("*.experts.gate_up_proj", "spectral", schatten.Layout("experts", split=2))]
    return [e for e in schatten.plan(model, rules) if e.route == "spectral"]


def rule_of(preset: str) -> schatten.Rule:
    opt = getattr(schatten, preset)([nn.Parameter(torch.zeros(2, 2))])
    return opt.rule(opt.param_groups[0])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("preset", ["Muon", "NorMuon", "SOAPMuon"])
def test_every_rank_gives_takes_returns_and_keeps_what_the_schedule_lists(mesh, preset):
    travellers = travellers_of(entries(), mesh, rule_of(preset), "float32")
    bound = 1 << 10
    of_rank = [schedule(travellers, rank, mesh.ranks, bound) for rank in range(mesh.ranks)]
    found = buckets_of(travellers, mesh.ranks, bound, "float32")
    assert len(found) == len(of_rank[0]) > 1
    for number, (bucket, listed) in enumerate(zip(found, of_rank[0], strict=True)):
        for rank in range(mesh.ranks):
            own = of_rank[rank][number]
            for name in ("given", "taken", "returned", "kept"):
                assert float(getattr(bucket, name)[rank]) == sum(map(total, getattr(own, name)))
            assert [float(home[rank]) for home in bucket.home] == [total(own.given[rank]), total(own.returned[rank])]
        assert (bool(bucket.there), bool(bucket.back)) == (listed.travels_in, listed.travels_out)
        assert bucket.shared == listed.shared


def total(moves: list[Move]) -> int:
    return sum(move.cut.entries for move in moves)


def equal(count: int, fan_out: int, fan_in: int) -> schatten.Plan:
    with torch.device("meta"):
        return schatten.plan(nn.Sequential(*(nn.Linear(fan_in, fan_out) for _ in range(count))))


@pytest.mark.parametrize("mesh", [Mesh(replicate=4), Mesh(replicate=2, shard=3)], ids=str)
def test_owners_together_do_the_arithmetic_of_one_rank(mesh):
    alone, shared = (simulate(equal(8, 1024, 2048), on, schatten.Rule(), H100) for on in (Mesh(), mesh))
    assert shared.mean_flops * mesh.ranks == pytest.approx(alone.flops)
    assert shared.flops < alone.flops
    assert shared.buckets > 0


def test_ranks_that_add_up_products_all_do_the_same_and_less_than_one_alone():
    alone, shared = (simulate(equal(1, 65536, 1024), on, schatten.Rule(), H100) for on in (Mesh(), Mesh(shard=4)))
    assert shared.buckets == 0
    assert shared.imbalance == 1
    assert alone.flops / 4 < shared.flops < alone.flops


def test_replicas_of_small_matrices_compute_all_of_them():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    alone, replicas = (simulate(schatten.plan(model), mesh, schatten.Rule(), H100) for mesh in (Mesh(), Mesh(replicate=4)))
    assert replicas.flops == alone.flops
    assert (replicas.sent, replicas.collectives) == (0, 1)
    shared = simulate(schatten.plan(model), Mesh(replicate=4), schatten.Rule(), H100, owners=True)
    assert shared.flops < alone.flops and shared.sent > 0


def test_what_is_hidden_is_no_more_than_what_travels():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(40)))
    routes = schatten.plan(model)
    machine = replace(H100, host=0.0)
    one, many = (simulate(routes, Mesh(shard=4), schatten.Rule(), machine, max_bytes=n) for n in (1 << 30, 1 << 22))
    assert one.buckets == 1 and one.hidden == pytest.approx(0)
    assert many.buckets > 3
    assert 0 < many.hidden < many.seconds["bytes sent"] + many.seconds["latency of collectives"]


def test_one_rank_sends_nothing():
    alone = simulate(schatten.plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), Mesh(), schatten.Rule(), H100)
    assert (alone.collectives, alone.sent, alone.seconds["bytes sent"], alone.seconds["latency of collectives"]) == (0, 0, 0, 0)


def test_ranks_beyond_the_matrices_are_idle_and_save_nothing():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    few, many = (simulate(schatten.plan(model), Mesh(shard=n), schatten.Rule(), H100) for n in (4, 16))
    assert (few.idle_ranks, many.idle_ranks) == (0, 12)
    assert few.seconds["directions"] == many.seconds["directions"]


def test_whole_experts_do_not_travel_and_slices_of_them_do():
    with torch.device("meta"):
        model = nn.Sequential(Bank())
    routes = schatten.plan(model, [("*", "spectral", "experts")])
    assert len(routes) == 1
    found = [simulate(routes, mesh, schatten.Rule(), H100) for mesh in (Mesh(shard=4), Mesh(shard=8, ep=4))]
    assert [step.matrices for step in found] == [4, 4]
    assert found[0].sent == 0 < found[1].sent


@pytest.mark.parametrize(
    ("field", "name"),
    [("bandwidth", "bytes sent"), ("latency", "latency of collectives"), ("memory_bandwidth", "AdamW of the rest")],
)
def test_a_machine_twice_as_good_halves_its_share(field, name):
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(5000, 512), *(nn.Linear(512, 512) for _ in range(4)), nn.Linear(512, 5000))
    machine = replace(CPU, launch=0.0, message=0.0)
    factor = 0.5 if field == "latency" else 2.0
    better = replace(machine, **{field: factor * getattr(machine, field)})
    before, after = (simulate(schatten.plan(model), Mesh(shard=4), schatten.Rule(), m) for m in (machine, better))
    assert after.seconds[name] == pytest.approx(before.seconds[name] / 2)


def test_devices_go_on_while_python_prepares_and_cores_do_not():
    routes = equal(8, 1024, 1024)
    for machine, bottleneck in ((H100, "Python"), (replace(H100, host=1e-9), "directions")):
        step, on_cores = (
            simulate(routes, Mesh(shard=4), schatten.Rule(), machine, device=device) for device in ("cuda", "cpu")
        )
        alone = {name: seconds for name, seconds in step.seconds.items() if name != "Python"}
        assert step.bottleneck == bottleneck
        assert step.total == pytest.approx(max(step.seconds["Python"], sum(alone.values())), rel=0.01)
        assert on_cores.total > step.total


def test_state_is_counted_as_an_optimizer_makes_it():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))
    opt = schatten.NorMuon(model)
    kept = sum(t.nbytes for state in opt.state.values() for key, t in state.items() if key not in ("step", "skipped"))
    assert simulate(schatten.plan(model), Mesh(), rule_of("NorMuon"), H100).state == kept


# -- models and meshes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As their model cards and papers state them, to the digits given there.
        ("llama-8b", 8.03e9),
        ("llama-70b", 70.6e9),
        ("qwen-moe-30b", 30.5e9),
        ("gpt2-small", 124.4e6),
        ("resnet-50", 25.6e6),
    ],
)
def test_a_model_of_the_zoo_has_the_parameters_it_is_known_for(name, parameters):
    pytest.importorskip("transformers")
    model = zoo.build(name)
    found = sum(p.numel() for p in model.parameters())
    assert found == pytest.approx(parameters, rel=2e-3)
    assert all(p.is_meta for p in model.parameters())


def test_an_expert_bank_is_one_tensor_of_all_experts():
    pytest.importorskip("transformers")
    shapes = {tuple(p.shape) for name, p in zoo.build("qwen-moe-30b").named_parameters() if "experts." in name}
    assert shapes == {(128, 1536, 2048), (128, 2048, 768)}


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("dp=64,tp=8", Mesh(shard=64, tp=8)),
        ("replicate=8, shard=4", Mesh(replicate=8, shard=4)),
        ("dp=8,ep=4", Mesh(shard=8, ep=4)),
    ],
)
def test_a_mesh_is_read_from_its_sizes(text, mesh):
    assert Mesh.parse(text) == mesh


@pytest.mark.parametrize(
    "text", ["", "dp", "dp=0", "dp=-2", "dp=2.5", "pp=2", "dp=2,dp=2", "dp=2,shard=2", "dp=8,ep=3", "dp=²"]
)
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(InputError):
        Mesh.parse(text)


def test_column_and_row_parallel_weights_are_cut_along_the_side_that_tensor_parallelism_divides():
    mesh = Mesh(tp=2)
    cut = {e.name.split(".")[1]: mesh.of(e).held(e.shape, 0) for e in entries() if e.name.startswith("1.")}
    assert cut["q_proj"] == (range(0, 5), range(0, 24))
    assert cut["o_proj"] == (range(0, 24), range(0, 5))
    assert cut["other"] == (range(0, 13), range(0, 17))


def test_a_weight_stored_with_inputs_first_is_cut_along_its_other_dimension():
    pytest.importorskip("transformers")
    routes = {e.name.split("h.0.")[-1]: e for e in schatten.plan(zoo.build("gpt2-small")) if "h.0." in e.name}
    cut = {name: Mesh(tp=2).of(routes[name]).held(routes[name].shape, 0) for name in ("mlp.c_fc.weight", "mlp.c_proj.weight")}
    assert cut == {"mlp.c_fc.weight": (range(768), range(1536)), "mlp.c_proj.weight": (range(1536), range(768))}


def test_ranks_that_divide_experts_hold_whole_ones_or_slices_of_them():
    bank = next(e for e in entries() if "experts" in e.name)
    sizes = {n: [math.prod(map(len, Mesh(shard=n, ep=n).of(bank).held(bank.shape, r))) for r in range(n)] for n in (2, 4)}
    assert sizes == {2: [192, 192], 4: [96] * 4}
    # Eight ranks for four experts: the rest of the ranks divide rows.
    on = Mesh(shard=8, ep=4).of(bank)
    assert {tuple(map(len, on.held(bank.shape, r))) for r in range(8)} == {(1, 6, 8)}


# -- the command -------------------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 32))


@pytest.fixture
def own_model(monkeypatch):
    import sys
    import types

    module = types.ModuleType("own_models")
    module.tiny, module.nothing = tiny, lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_models", module)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_plan_prints_the_routes_of_a_model(own_model):
    result = CliRunner().invoke(app, ["plan", "--model", "own_models:tiny"])
    assert result.exit_code == 0, result.output
    assert "hidden Linear" in result.output and "spectral: 2 tensors" in result.output


def test_a_simulation_is_a_table_and_the_same_numbers_as_json(own_model, tmp_path):
    out = tmp_path / "new" / "plan.json"
    result = CliRunner().invoke(app, ["plan", "--model", "own_models:tiny", "--simulate", "--mesh", "dp=2", "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["mesh"] == {"replicate": 1, "shard": 2, "tp": 1, "ep": 1}
    assert found["total"] == pytest.approx(sum(found["seconds"].values()) - found["hidden"])
    assert f"{1e3 * found['total']:.2f} ms" in result.output
    assert found["bottleneck"] in result.output


def test_rates_of_the_command_line_replace_the_machines(own_model, tmp_path):
    found = []
    for latency in ("1e-3", "2e-3"):
        out = tmp_path / f"{latency}.json"
        arguments = ["plan", "--model", "own_models:tiny", "--simulate", "--machine", "h100-nvlink"]
        CliRunner().invoke(app, [*arguments, "--latency", latency, "--json", str(out)])
        found.append(json.loads(out.read_text())["seconds"]["latency of collectives"])
    assert found[1] / found[0] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nope"], "--model has no 'nope'"),
        (["--model", "own_models:gone"], "cannot be imported"),
        (["--model", "no_such_module:f"], "cannot be imported"),
        (["--model", "own_models:nothing"], "must return a torch.nn.Module"),
        (["--mesh", "dp=0"], "--mesh takes sizes"),
        (["--mesh", "tp=2"], "tp=2 divides no matrix"),
        (["--machine", "abacus"], "--machine must be one of"),
        (["--flops", "0"], "--flops must be positive"),
        (["--bandwidth", "-1"], "--bandwidth must be"),
        (["--memory-bandwidth", "nan"], "--memory-bandwidth must be"),
        (["--max-bytes", "0"], "--max-bytes must be positive"),
        (["--optimizer", "adamw"], "--optimizer adamw"),
        (["--optimizer", "nope"], "--optimizer must be one of"),
        (["--json", "."], "is a folder"),
    ],
)
def test_wrong_input_is_refused_in_one_line(own_model, arguments, said):
    given = arguments if "--model" in arguments else ["--model", "own_models:tiny", *arguments]
    result = CliRunner().invoke(app, ["plan", *given, "--simulate"])
    # The entry point turns this error into one line and exit code 2, see `schatten.cli`.
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception) and "\n" not in str(result.exception)


@pytest.mark.parametrize("optimizer", ["muon", "soapmuon", "dion", "lion", "neon", "scion", "signum"])
def test_any_optimizer_can_be_simulated(own_model, optimizer):
    result = CliRunner().invoke(
        app, ["plan", "--model", "own_models:tiny", "--simulate", "--mesh", "replicate=2,dp=2", "--optimizer", optimizer]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert "bottleneck" in result.output
