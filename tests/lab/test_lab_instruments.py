"""`compare --instruments`: what is measured, that training does not notice, and that a resumed run has the same records."""

import json
import sys
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from schatten import cli
from schatten.diagnostics.curvature import curvature
from schatten.diagnostics.hessian import Hessian
from schatten.lab import data, instrument_panels, instruments, report
from schatten.lab.compare import compare
from schatten.lab.config import CompareConfig
from schatten.lab.errors import InputError
from schatten.lab.store import Store
from schatten.lab.train import Trainer

TINY = {"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 4, "steps": 20, "eval_windows": 8, "dropout": 0.1}
MEASURED = ("curvature", "constraint", "spectrum")
MATRICES = [f"blocks.0.{name}.weight" for name in ("attention.query", "attention.key", "attention.value", "attention.output")]
MATRICES += ["blocks.0.up.weight", "blocks.0.down.weight"]


def config(**options):
    lrs = {name: (4e-3,) for name in options.get("optimizers", ("adamw", "muon"))}
    plain = {**TINY, "lrs": lrs, "eval_every": 10, "final_eval_windows": 8, "save_every": 5, "trackers": ()}
    return CompareConfig(**{**plain, **options})


def run(out, resume=False, **options):
    """A comparison without its pictures, which take longer than the training."""
    with patch("schatten.lab.report.write_report", lambda folder: folder / "report.html"):
        compare(config(**options), out, resume=resume, console=Console(quiet=True))


def without_times(store):
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in store.records()]


def measured(store, run_id=None):
    return [r for r in without_times(store) if r["event"] == "instruments" and r["run"] in (run_id, run_id or r["run"])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(out, seeds=2, instruments=MEASURED, instruments_every=4)
    return out


def test_both_optimizers_are_measured_at_every_nth_step_of_the_first_seed(finished):
    for name in ("adamw", "muon"):
        records = measured(Store(finished), f"{name}-lr0.004-seed0")
        assert [(r["step"], r["matrix"]) for r in records] == [(step, m) for step in (4, 8, 12, 16, 20) for m in MATRICES]
        for r in records:
            assert {"curvature/J", "curvature/L", "constraint/ratio", "constraint/excess", "spectrum/weight_histogram"} <= set(
                r
            )
            assert sum(r["spectrum/weight_histogram"]) == 16
    assert not measured(Store(finished), "muon-lr0.004-seed1")


def test_training_is_bit_for_bit_what_it_is_without_instruments(finished, tmp_path):
    run(tmp_path / "plain", seeds=2)
    kept = [r for r in without_times(Store(finished)) if r["event"] != "instruments"]
    assert kept == without_times(Store(tmp_path / "plain"))
    for name in ("adamw-lr0.004-seed0", "muon-lr0.004-seed0"):
        file = f"checkpoints/{name}/model.safetensors"
        assert (finished / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_resumed_between_measurements_has_the_same_records(name, finished, tmp_path, monkeypatch):
    options = {"optimizers": (name,), "seeds": 2, "instruments": MEASURED, "instruments_every": 4}
    step = Trainer._step

    def broken(self):
        # After the save at step 10 and the records of step 12.
        if self.progress.step == 13:
            raise Broken
        return step(self)

    monkeypatch.setattr(Trainer, "_step", broken)
    with pytest.raises(Broken):
        run(tmp_path / "run", **options)
    store = Store(tmp_path / "run")
    assert [r["step"] for r in measured(store)][-1] == 12
    monkeypatch.setattr(Trainer, "_step", step)
    run(tmp_path / "run", resume=True, **options)
    run_id = f"{name}-lr0.004-seed0"
    # As text, in which nan is nan.
    assert str(measured(store, run_id)) == str(measured(Store(finished), run_id))


def test_a_folder_from_before_there_were_instruments_resumes(tmp_path):
    run(tmp_path / "run", optimizers=("adamw",))
    file = tmp_path / "run" / "config.json"
    saved = json.loads(file.read_text())
    del saved["instruments"], saved["instruments_every"]
    file.write_text(json.dumps(saved))
    run(tmp_path / "run", resume=True, optimizers=("adamw",))
    with pytest.raises(InputError, match="instruments: False there, \\['constraint'\\] now"):
        run(tmp_path / "run", resume=True, optimizers=("adamw",), instruments=("constraint",))


def test_numbers_are_those_of_the_functions_on_the_weights_of_the_step(tmp_path):
    """AdamW's first measured step, anew: its weights, its clipped gradient, and the Hessian on the batch that no step sees."""
    tiny = config(optimizers=("adamw",), instruments=("curvature", "constraint", "update"), instruments_every=1, dropout=0.0)
    store = Store(tmp_path)
    trainer = Trainer(tiny, data.load("pydoc", "byte", 16), tiny.runs()[0], store)
    model = trainer.accelerator.unwrap_model(trainer.model)
    W = model.blocks[0].up.weight
    before = W.detach().clone()
    trainer.store.root.mkdir(exist_ok=True)
    found = []

    def before_the_step(*_):
        H = Hessian(trainer._fixed_loss(tiny.steps), [W], model=model)
        found.append(curvature(lambda D: H.within(0, D), W.grad))

    trainer.own.register_step_pre_hook(before_the_step)
    trainer._step()
    (r,) = [r for r in store.records() if r["matrix"] == "blocks.0.up.weight"]
    # One graph evaluated twice, in fp32.
    assert r["curvature/J"] == pytest.approx(float(found[0].J), rel=1e-4)
    assert r["curvature/L"] == pytest.approx(float(found[0].L.value), rel=1e-4)
    norm = float(torch.linalg.matrix_norm(before, 2))
    # Power iteration comes from below.
    assert r["constraint/ratio"] == pytest.approx(norm * 0.1 / (0.2 * 64**0.5), rel=2e-2)
    lr = trainer.own.param_groups[0]["lr"]
    change = W.detach() - before + lr * 0.1 * before
    assert r["update/rms"] == pytest.approx(float(change.square().mean().sqrt()), rel=1e-4)


def test_the_report_has_a_panel_for_what_was_measured(finished, monkeypatch):
    monkeypatch.setattr(instrument_panels, "SHOWN", 1)
    report.write_report(finished)
    names = {path.stem for path in finished.glob("instruments_*.png")}
    kinds = ("attention_query", "attention_key", "attention_value", "attention_output", "up", "down")
    spectra = {f"instruments_spectrum_adamw_blocks_{kind}" for kind in kinds}
    assert names == {"instruments_constraint", "instruments_curvature", "instruments_condition"} | spectra
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 + len(names)
    assert "Curvature of the loss on a batch that no step sees" in page


def test_measuring_is_not_counted_as_the_optimizers_time(tmp_path, monkeypatch):
    monkeypatch.setattr(instruments, "_now", iter(range(10**6)).__next__)
    run(tmp_path / "run", optimizers=("muon",), instruments=("constraint",), instruments_every=1, steps=10)
    (done,) = Store(tmp_path / "run").results().values()
    # Twice a "second" for each of ten steps is taken off, of a run that lasts less than one.
    assert -20 < done["seconds"] < -18 and -20 < done["optimizer_seconds"] < -18


@pytest.mark.parametrize("name", sorted(instruments.known()))
def test_every_quantity_can_be_asked_for_by_its_name(name, tmp_path):
    options = {"optimizers": ("adamw", "muon"), "instruments": (name,), "instruments_every": 2, "steps": 2, "warmup": 0}
    run(tmp_path / "run", **options)
    records = measured(Store(tmp_path / "run"))
    found = {r["run"].partition("-")[0] for r in records}
    assert found == {"muon"} if name in instruments.OF_THE_RULE else found == {"adamw", "muon"}
    names = [panel.name for panel in instrument_panels.panels({"muon": [r for r in records if r["run"].startswith("muon")]})]
    assert names and all(panel.startswith("instruments_") for panel in names) and len(set(names)) == len(names)


@pytest.mark.parametrize("optimizer", ["jaguarmuon", "muonmvr2", "lion"])
def test_rules_that_evaluate_the_loss_themselves_are_measured_too(optimizer, tmp_path):
    run(tmp_path / "run", optimizers=(optimizer,), instruments=MEASURED, instruments_every=2, steps=4, lrs={optimizer: (1e-4,)})
    assert {r["step"] for r in measured(Store(tmp_path / "run"))} == {2, 4}


def test_alarms_are_told_in_the_report(finished):
    store = Store(finished)
    record = {**measured(store)[-1], "constraint/alarm": "V_B grows"}
    told = instrument_panels.alarms({"muon": [record, record]})
    assert told == [f"muon, {record['matrix']}, step 20: V_B grows"]
    assert "V_B grows" in report._page(json.loads((finished / "config.json").read_text()), [], [], told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--instruments=curvatur",), "--instruments has no 'curvatur': known are "),
        (("--instruments=constraint,constraint",), "--instruments must name each once"),
        (("--instruments=constraint,curvature", "--fsdp"), "--instruments curvature differentiates twice"),
        (("--instruments=constraint", "--instruments-every=0"), "--instruments-every must be at least 1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["schatten", "compare", f"--out={tmp_path / 'run'}", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and message in told
    assert not (tmp_path / "run").exists()
