"""The step-time table counts what a step must do, and its command writes a JSON that a page can be made from."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import schatten
from schatten.layout import pieces
from schatten.placements.cost import block_flops
from tests.facts import routing_models

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from gpu_parts import contenders, first_step, floor, models, report, timing, turns
from gpu_parts.models import Model, Parameters, Shape

CPU = torch.device("cpu")

TINY = Model("tiny", torch.float32, (Shape("weight", (4, 4), "matrix"), Shape("bias", (3,))))


@pytest.fixture
def on_cpu(monkeypatch):
    """No GPU, no subprocess, and models of a few entries."""
    monkeypatch.setattr(gpu, "device", lambda: CPU)
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "ceilings", lambda device, quick: CEILINGS)
    told = {"first_seconds": 1.0, "second_seconds": 0.1, "error": None}
    monkeypatch.setattr(
        gpu, "first_step", lambda here, quick: {"model": "gpt2", "kernels": "eager", "cold": told, "warm": told}
    )
    monkeypatch.setattr(gpu, "MODELS", dict.fromkeys(models.MODELS, lambda quick, free: TINY))


CEILINGS = {
    "dtype": "float32",
    "products": [{"side": 512, "teraflops": 0.5}],
    "peak_teraflops": 0.5,
    "copy_gigabytes_per_second": 10.0,
}


def run(tmp_path, *arguments):
    out = tmp_path / "gpu.json"
    status = gpu.main(["--rounds", "2", "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def keys_of(value):
    """Every key in nested dictionaries, but those of models, contenders and tasks, which are names."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    inner = set().union(*map(keys_of, value.values())) if value else set()
    names = {*models.MODELS, *floor.TASKS, *(c.name for c in contenders.contenders(CPU, torch.float32, True))}
    return (set(value) | inner) - names


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_every_key_its_docstring_names(on_cpu, tmp_path, capsys):
    status, result = run(tmp_path, "--models", "gpt2")
    assert status == 0
    assert (result["benchmark"], result["device"], result["quick"], result["targets"]) == ("gpu", "cpu", True, [])
    words = set(gpu.__doc__.replace("`", " ").replace(",", " ").replace("{", " ").replace("}", " ").replace(":", " ").split())
    assert {key for key in keys_of(result) if key not in words and f'"{key}"' not in gpu.__doc__} == set()
    model = result["models"]["gpt2"]
    assert list(model["rows"]) == [contenders.ADAMW, contenders.TORCH_MUON, contenders.EAGER, contenders.POWER]
    for row in model["rows"].values():
        times = row["milliseconds"]
        assert row["error"] is None
        assert len(times["all"]) == 2
        assert times["low"] <= times["median"] <= times["high"]
        assert row["extra_bytes"] >= 0
    assert model["rows"][contenders.EAGER]["over_reference"] == 1
    assert model["rows"][contenders.EAGER]["max_batch_bytes"] == 160 << 20
    assert contenders.EAGER in capsys.readouterr().out


def test_models_of_an_earlier_run_on_the_same_machine_stay_and_others_go(on_cpu, tmp_path):
    run(tmp_path, "--models", "experts")
    _, result = run(tmp_path, "--models", "gpt2")
    assert list(result["models"]) == ["gpt2", "experts"]
    (tmp_path / "gpu.json").write_text(json.dumps({**result, "machine": {**result["machine"], "name": "another"}}))
    _, result = run(tmp_path, "--models", "resnet18")
    assert list(result["models"]) == ["resnet18"]


def test_a_peer_that_fails_is_a_row_with_the_first_line_of_its_error(on_cpu, tmp_path, monkeypatch):
    def imported(name):
        raise RuntimeError(f"no {name}\nmore")

    monkeypatch.setattr(contenders, "_imported", imported)
    status, result = run(tmp_path, "--models", "resnet18", "--peers")
    peers = {name: row for name, row in result["models"]["resnet18"]["rows"].items() if row["peer"]}
    assert status == 0
    assert {row["error"].split()[2] for row in peers.values()} == {"gram_newton_schulz", "heavyball", "pytorch_optimizer"}
    assert all(row["error"].startswith("RuntimeError: no ") and "more" not in row["error"] for row in peers.values())
    assert all(row[key] is None for row in peers.values() for key in report.MEASURED)


def test_our_own_failure_is_a_row_too_and_the_exit_status(on_cpu, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise ValueError("broken")

    monkeypatch.setattr(schatten, "SpectralSGD", broken)
    status, result = run(tmp_path, "--models", "gpt2")
    assert status == 1
    assert result["models"]["gpt2"]["rows"][contenders.POWER]["error"] == "ValueError: broken"
    assert "broken" in capsys.readouterr().err


@pytest.mark.parametrize(("together", "turns_taken"), [(True, "abcabcde"), (False, "abccbade")])
def test_peers_come_last_and_contenders_that_do_not_fit_beside_each_other_step_alone_twice(monkeypatch, together, turns_taken):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)
    built = []

    def build(name):
        built.append(name)
        return contenders.Built(lambda: None)

    found = [contenders.Contender(name, "muon", lambda p, name=name: build(name), peer=name in "de") for name in "abcde"]
    records, stopped = turns.measured(found, Parameters(TINY, CPU), 8, CPU, together=together)
    assert "".join(built) == turns_taken and not stopped
    rounds = {name: len(record.times) for name, record in records.items()}
    assert rounds == dict.fromkeys("abc", 8) | dict.fromkeys("de", 4 if together else 8)


def test_a_contender_that_fails_in_a_round_is_left_out_from_then_on(monkeypatch):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)
    steps = []

    def failing():
        steps.append(1)
        if len(steps) > 9:
            raise RuntimeError("late")

    found = [
        contenders.Contender("late", "muon", lambda p: contenders.Built(failing), peer=True),
        contenders.Contender("fine", "muon", lambda p: contenders.Built(lambda: None)),
    ]
    records, stopped = turns.measured(found, Parameters(TINY, CPU), 20, CPU, together=True)
    assert records["late"].error == "RuntimeError: late"
    assert len(steps) == 10
    assert len(records["fine"].times) == 20 and not stopped


def test_an_interrupt_leaves_the_rows_there_are_and_ends_the_run(on_cpu, tmp_path, monkeypatch):
    ready = turns._ready

    def interrupted(contender, *rest):
        if contender.name == contenders.EAGER:
            raise KeyboardInterrupt
        return ready(contender, *rest)

    monkeypatch.setattr(turns, "_ready", interrupted)
    monkeypatch.setattr(turns, "fits", lambda model, found, device: False)
    status, result = run(tmp_path, "--models", "gpt2,experts")
    assert status == 1
    assert list(result["models"]) == ["gpt2"] and result["models"]["gpt2"]["stopped"]
    rows = result["models"]["gpt2"]["rows"]
    assert rows[contenders.ADAMW]["milliseconds"]["median"] > 0
    assert rows[contenders.EAGER]["error"] == rows[contenders.POWER]["error"] == turns.STOPPED


@pytest.mark.parametrize("name", ["pytorch_optimizer.Muon", "pytorch_optimizer.Muon, Gram"])
def test_peers_take_the_same_matrices(name):
    pytest.importorskip("pytorch_optimizer")
    parameters = Parameters(models.gpt2(True, 0), CPU)
    before = [p.detach().clone() for p in parameters.own]
    (contender,) = (c for c in contenders.contenders(CPU, torch.float32, True) if c.name == name)
    contender.build(parameters).step()
    assert all((p != b).any() for p, b in zip(parameters.own, before, strict=True))


def test_the_first_step_is_timed_from_the_construction_on():
    told = first_step.seconds("experts", True, CPU)
    assert 0 < told["second_seconds"] < told["first_seconds"]


@pytest.mark.slow
def test_the_first_step_runs_in_fresh_processes():
    told = first_step.first_step(CPU, True)
    assert told["cold"]["error"] is told["warm"]["error"] is None
    assert told["cold"]["first_seconds"] > 0


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "matrices"),
    [
        # torchvision's and Hugging Face's own counts of parameters.
        ("resnet18", 11_689_512, 20),
        ("gpt2", 124_439_808, 72),
        ("llama-1b", 24 * (12 * 2048**2 + 13 * 2048) + (50304 + 2048 + 2) * 2048, 144),
        # 6,979,321,856 of Llama 3 8B's 8,030,261,248 are in its layers, beside embedding, head and the last norm.
        ("llama-8b", 8_030_261_248 - 2 * 128_256 * 4096 - 4096, 7 * 32),
        ("experts", 2 * 64 * 1408 * 2048, 128),
    ],
)
def test_a_model_has_as_many_parameters_as_the_real_one(name, parameters, matrices):
    model = models.MODELS[name](False, 10**12)
    assert model.entries == parameters
    assert sum(model.matrices().values()) == matrices


def test_as_many_layers_of_the_large_model_are_taken_as_fit():
    each = sum(s.entries for s in models.llama_8b(False, 10**12).shapes) // 32
    for layers in (1, 5, 31):
        free = models.SPARE_BYTES + layers * 8 * each
        assert len(models.llama_8b(False, free).shapes) == 9 * layers
        assert len(models.llama_8b(False, free - 1).shapes) == 9 * max(1, layers - 1)


@pytest.mark.parametrize(
    ("name", "real", "prefix"),
    [("resnet18", routing_models.ResNet, ""), ("gpt2", routing_models.NanoGPT, "transformer.")],
)
def test_groups_are_those_that_plan_makes_of_the_model_itself(name, real, prefix):
    planned = {entry.name.removeprefix(prefix): entry for entry in schatten.plan(real())}
    shared = [(shape, planned[shape.name]) for shape in models.MODELS[name](True, 0).shapes if shape.name in planned]
    assert len(shared) > 10
    for shape, entry in shared:
        assert (entry.route == "spectral") == (shape.layout is not None), shape.name
        if shape.layout is not None:
            blocks = [piece.blocks[0] for piece in shape.pieces]
            assert [piece.blocks[0] for piece in pieces(entry.layout, entry.shape)] == blocks, shape.name


def test_matrices_for_other_optimizers_are_views_of_the_same_blocks():
    shapes = (Shape("qkv", (6, 2), schatten.Layout("matrix", split=3)), Shape("conv", (4, 2, 3, 3), "conv"))
    shapes += (Shape("bank", (5, 3, 2), "experts"), Shape("bias", (6,)))
    parameters = Parameters(Model("mixed", torch.float32, shapes), CPU)
    matrices = parameters.matrices()
    assert [tuple(p.shape) for p in matrices] == [(2, 2)] * 3 + [(4, 18)] + [(3, 2)] * 5
    with torch.no_grad():
        for p in matrices:
            p.grad.zero_()
            p.zero_()
    qkv, conv, bank, bias = parameters.own
    assert not any(t.any() for p in (qkv, conv, bank) for t in (p, p.grad))
    assert bias.all() and [p.shape for p in parameters.rest()] == [(6,)]


# -- the floor ---------------------------------------------------------------------------------------------------------


def test_bytes_and_operations_of_a_small_model_are_those_counted_by_hand():
    muon, adamw = (floor.floor(TINY, task, torch.float32) for task in ("muon", "adamw"))
    # fp32: weight, gradient and one or two averages read, all but the gradient written.
    assert muon.bytes == 16 * 5 * 4 + 3 * 7 * 4
    assert adamw.bytes == (16 + 3) * 7 * 4
    # Five steps of three 4 x 4 x 4 products, two of them symmetric.
    assert muon.flops_whole == 5 * 3 * 2 * 4**3
    assert muon.flops_symmetric == 5 * 2 * 2 * 4**3
    assert adamw.flops_whole == adamw.flops_symmetric == 0
    assert muon.milliseconds(bandwidth=404, peak=1280) == pytest.approx(2000)
    assert muon.milliseconds(bandwidth=404, peak=1920, symmetric=False) == pytest.approx(2000)


def test_averages_of_bf16_parameters_are_fp32_in_schatten_and_bf16_in_torch():
    half = Model("half", torch.bfloat16, TINY.shapes)
    assert floor.step_bytes(half, "muon") == 16 * (3 * 2 + 2 * 4) + 3 * (3 * 2 + 4 * 4)
    assert floor.step_bytes(half, "adamw") == 19 * 7 * 2


@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (1408, 2048), (512, 64)])
@pytest.mark.parametrize(("task", "K"), [("muon", schatten.maps.Nuclear()), ("power", schatten.maps.Power(0.5))])
def test_whole_products_are_those_that_a_step_without_data_multiplies(shape, task, K):
    counted = block_flops(schatten.Rule(map=K), *shape, dtype="bfloat16")
    assert floor.matrix_flops(*shape, task, torch.bfloat16, half=False) == counted


@pytest.mark.parametrize("shape", [(24, 24), (16, 40)])
def test_plain_operations_are_those_of_the_eager_newton_schulz(shape):
    model = Model("one", torch.float32, (Shape("weight", shape, "matrix"),))
    solver = schatten.solvers.newton_schulz(dtype="float32")
    with FlopCounterMode(display=False) as counter:
        solver(torch.randn(shape))
    assert floor.plain_flops(model) == counter.get_total_flops()


# -- targets -----------------------------------------------------------------------------------------------------------


def row(median, **more):
    found = {"ours": True, "error": None, "milliseconds": {"median": median}, "extra_bytes": 100, "max_batch_bytes": 160}
    return {**found, **more}


def test_targets_are_met_or_missed_by_the_numbers_of_the_rows():
    floors = {"floors": {"muon": {"milliseconds_symmetric": 0.8}, "power": {"milliseconds_symmetric": 0.9}}}
    rows = {
        contenders.ADAMW: row(0.5, ours=False),
        contenders.TORCH_MUON: row(4.4, ours=False),
        contenders.TRITON: row(1.0),
        contenders.GRAPH: row(1.2, extra_bytes=161),
        contenders.POWER: row(1.7),
        contenders.EAGER: row(0.0, error="ValueError: broken", milliseconds=None, extra_bytes=None),
    }
    told = {"model": "gpt2", "cold": {"first_seconds": 21.0}, "warm": {"first_seconds": 3.0}}
    large = {"rows": {contenders.TRITON: row(1.0)}, "plain_flops": 1.4e12, "peak_teraflops": 1000.0, **floors}
    found = report.targets({"gpt2": {"rows": rows, **floors}, "llama-1b": large}, told)
    keys = ("measured", "limit", "met", "at_floor")
    verdicts = {
        (t["model"], t["contender"], t["target"]): tuple(round(t[k], 3) if isinstance(t[k], float) else t[k] for k in keys)
        for t in found
    }
    assert len(verdicts) == len(found) == 12
    faster, over, rate, memory = (
        "times faster than torch.optim.Muon",
        "times fused AdamW",
        "effective rate",
        "extra memory over",
    )
    for (model, contender, target), verdict in {
        ("gpt2", contenders.TRITON, faster): (4.4, ">= 4", True, 5.5),
        ("gpt2", contenders.GRAPH, faster): (3.667, ">= 4", False, 5.5),
        ("gpt2", contenders.TRITON, over): (2.0, "<= 2.5", True, 1.6),
        ("llama-1b", contenders.TRITON, f"{rate} over measured peak"): (1.4, ">= 1.3", True, 1.75),
        ("gpt2", contenders.POWER, "smooth map over schatten.Muon, Triton"): (1.7, "<= 1.6", False, 0.9),
        ("gpt2", contenders.TRITON, f"{memory} max_batch_bytes"): (0.625, "<= 1", True, None),
        ("gpt2", contenders.GRAPH, f"{memory} max_batch_bytes"): (1.006, "<= 1", False, None),
        ("gpt2", contenders.TRITON, "seconds of the first step, caches cold"): (21.0, "<= 20", False, None),
    }.items():
        assert verdicts[model, contender, target] == verdict
    assert report.verdicts(found).count("missed") == 4 and "at the floor 5.5" in report.verdicts(found)
