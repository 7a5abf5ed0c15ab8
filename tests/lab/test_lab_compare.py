"""The comparison end to end on a tiny model: its files, its resumption after a kill, its honesty about divergence."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from schatten import cli
from schatten.lab import optimizers
from schatten.lab.compare import compare
from schatten.lab.config import CompareConfig
from schatten.lab.errors import InputError
from schatten.lab.report import write_report
from schatten.lab.store import Store

TINY = {"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 4, "steps": 20, "eval_windows": 8}
OPTIONS = [f"--{key.replace('_', '-')}={value}" for key, value in {**TINY, "final_eval_windows": 8, "lrs": "4e-3"}.items()]


def config(**options):
    lrs = {name: (4e-3,) for name in options.get("optimizers", ("adamw", "muon"))}
    return CompareConfig(**{**TINY, "lrs": lrs, "eval_every": 10, "final_eval_windows": 8, "save_every": 5, **options})


def run(out, resume=False, **options):
    return compare(config(**options), out, resume=resume, console=Console(quiet=True))


def without_times(store):
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in store.records()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, run(out, seeds=2)


def test_a_run_folder_holds_everything_the_documentation_names(finished):
    out, settings = finished
    pictures = ("loss_steps", "loss_seconds", "lr_sensitivity", "step_time", "spectra")
    for name in ("config.json", "log.jsonl", "report.html", *(f"{p}.png" for p in pictures)):
        assert (out / name).stat().st_size > 0, name
    for run_id in ("adamw-lr0.004-seed0", "muon-lr0.004-seed1"):
        assert (out / "checkpoints" / run_id / "model.safetensors").exists()
        assert list((out / "tensorboard" / run_id).rglob("events.out.tfevents.*"))
    assert [(s.optimizer, len(s.losses)) for s in settings] == [("adamw", 2), ("muon", 2)]
    assert all(s.spread > 0 for s in settings)


def test_the_report_is_one_file_that_opens_offline(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not any(marker in page for marker in ("http://", "https://", "<script", "<link"))
    assert "4 layers" not in page and "1 layers" in page


def test_all_optimizers_of_a_seed_start_from_the_same_loss(finished):
    out, _ = finished
    first = {r["run"]: r["loss"] for r in Store(out).records() if r["event"] == "train" and r["step"] == 10}
    assert first["adamw-lr0.004-seed0"] != first["adamw-lr0.004-seed1"]
    import torch

    from schatten.lab import data
    from schatten.lab.train import Trainer

    corpus = data.load("pydoc", "byte", 16)
    trainers = [Trainer(config(trackers=()), corpus, r, Store(out)) for r in config(seeds=1).runs()]
    weights = [[p.detach().clone() for p in trainer.model.parameters()] for trainer in trainers]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_finished_comparison_is_not_run_again_and_not_overwritten(finished):
    out, settings = finished
    before = (out / "log.jsonl").read_bytes()
    assert [s.losses for s in run(out, resume=True, seeds=2)] == [s.losses for s in settings]
    assert (out / "log.jsonl").read_bytes() == before


def test_gradient_accumulation_equals_the_large_batch(tmp_path):
    whole = run(tmp_path / "whole", batch=8, trackers=(), optimizers=("adamw",))
    pieces = run(tmp_path / "pieces", batch=4, accumulate=2, trackers=(), optimizers=("adamw",))
    # The same windows and the same mean in another order of summation: fp32 rounding, grown over 20 steps.
    assert whole[0].mean == pytest.approx(pieces[0].mean, abs=1e-4)


def test_a_diverged_run_is_recorded_as_infinite_and_shown(tmp_path):
    settings = run(tmp_path / "diverged", optimizers=("adamw",), lrs={"adamw": (1e-3, 1e30)}, clip=0.0)
    assert [s.diverged for s in settings] == [0, 1]
    assert settings[1].mean == float("inf")
    results = [r for r in Store(tmp_path / "diverged").records() if r["event"] == "done"]
    assert results[1]["loss"] == float("inf")
    assert "1 diverged" in (tmp_path / "diverged" / "report.html").read_text()


def test_a_killed_comparison_resumes_bit_identically(tmp_path):
    options = [*OPTIONS, "--eval-every=10", "--save-every=5", "--dropout=0.1", "--steps=60", "--optimizers=muon"]
    command = [sys.executable, "-m", "schatten", "compare", *options]
    subprocess.run([*command, f"--out={tmp_path / 'whole'}"], check=True, capture_output=True)
    killed = Store(tmp_path / "killed")
    process = subprocess.Popen([*command, f"--out={killed.root}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(r["step"] >= 30 for r in killed.records()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "done" not in {r["event"] for r in killed.records()}, "the run was over before it could be killed"
    subprocess.run([*command, f"--out={killed.root}", "--resume"], check=True, capture_output=True)
    assert without_times(killed) == without_times(Store(tmp_path / "whole"))
    weights = [
        (root / "checkpoints/muon-lr0.004-seed0/model.safetensors").read_bytes() for root in (tmp_path / "whole", killed.root)
    ]
    assert weights[0] == weights[1]


def test_two_processes_train_as_one(tmp_path):
    options = [*OPTIONS, "--eval-every=10", "--save-every=15", "--optimizers=muon"]
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    }
    losses = []
    for name, launcher in launchers.items():
        command = [*launcher, "-m", "schatten", "compare", *options, f"--out={tmp_path / name}"]
        subprocess.run(command, check=True, capture_output=True)
        losses.append([r["loss"] for r in Store(tmp_path / name).records()])
    assert len(losses[0]) == len(losses[1]) == 5
    # The same windows averaged in another order: fp32 rounding, grown over 20 steps.
    assert losses[0] == pytest.approx(losses[1], abs=5e-4)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    from accelerate import PartialState

    PartialState(cpu=True)  # one state for all instances
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 3)
    with pytest.raises(InputError, match="--batch must be a multiple of the 3 processes, got 4"):
        run(tmp_path / "out")


def test_a_checkpoint_half_replaced_is_found(tmp_path, finished):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    target = Store(out).checkpoint("muon-lr0.004-seed0")
    target.rename(target.with_name(target.name + ".old"))
    log = [r for r in Store(out).records() if not (r["run"] == "muon-lr0.004-seed0" and r["event"] == "done")]
    (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    resumed = {s.optimizer: s.losses for s in run(out, resume=True, seeds=2)}
    assert resumed == {s.optimizer: s.losses for s in finished[1]}


# -- the command line --------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["schatten", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=missing.txt"], "--data missing.txt does not exist"),
        (["--optimizers=adamw,sparrow"], "no 'sparrow'"),
        (["--lrs=0"], "positive and finite"),
        (["--lrs=fast"], "takes numbers"),
        (["--tokens=bpe:999999"], "does not fit this text"),
        (["--context=100000"], "window needs context"),
        (["--steps=-3"], "--steps must be at least 1"),
        (["--steps=many"], "steps"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(tmp_path, monkeypatch, capsys, arguments, message):
    out = tmp_path / "never"
    code, printed = command(monkeypatch, capsys, "compare", f"--out={out}", *arguments)
    assert code == 2
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not out.exists()


def test_a_folder_of_another_configuration_is_left_alone(finished, monkeypatch, capsys):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    base = [*OPTIONS, "--eval-every=10", "--save-every=5", "--seeds=2", f"--out={out}"]
    assert command(monkeypatch, capsys, "compare", *base)[0] == 2
    code, printed = command(monkeypatch, capsys, "compare", *base, "--steps=21", "--resume")
    assert code == 2
    assert "steps: 20 there, 21 now" in printed.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    code, printed = command(monkeypatch, capsys, "compare", *OPTIONS, f"--out={tmp_path}")
    assert code == 2 and "holds files of something else" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, printed = command(monkeypatch, capsys, "compare", *OPTIONS, f"--out={tmp_path / 'out'}")
    assert code == 2 and "1 MiB free" in printed.err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_during_a_run_ends_it_in_one_line(tmp_path, monkeypatch, capsys):
    def full(store, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.log))

    monkeypatch.setattr(Store, "append", full)
    code, printed = command(monkeypatch, capsys, "compare", *OPTIONS, "--trackers=", f"--out={tmp_path / 'out'}")
    assert code == 2
    assert printed.err.splitlines()[-1].endswith("cannot be written: No space left on device.")


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupted(store, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "append", interrupted)
    code, printed = command(monkeypatch, capsys, "compare", *OPTIONS, "--trackers=", f"--out={tmp_path / 'out'}")
    assert code == 130 and "--resume" in printed.err


def test_the_report_command_redraws_and_refuses_other_folders(finished, tmp_path, monkeypatch, capsys):
    out, _ = finished
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert command(monkeypatch, capsys, "report", out)[0] == 0
    assert (out / "report.html").read_text() == page == write_report(out).read_text()
    code, printed = command(monkeypatch, capsys, "report", tmp_path)
    assert code == 2 and "no run folder" in printed.err


def test_the_optimizers_command_lists_every_preset(monkeypatch, capsys):
    import schatten

    code, printed = command(monkeypatch, capsys, "optimizers")
    assert code == 0
    listed = [line.split(maxsplit=1) for line in printed.out.splitlines()]
    names = {name for name, _ in listed}
    assert names >= {"adamw", *(n.lower() for n in schatten.presets.__all__)}
    assert names == set(optimizers.known()) and all(len(summary) > 20 for _, summary in listed)
    assert command(monkeypatch, capsys, "compare", "--list")[1].out == printed.out


def test_optimizers_that_evaluate_the_loss_themselves_are_compared_too(tmp_path):
    names = ("jaguarmuon", "muonmvr2")
    settings = run(tmp_path / "out", optimizers=names, lrs={name: (1e-3,) for name in names}, steps=10)
    assert [s.optimizer for s in settings] == list(names) and all(s.mean < 6 for s in settings)
    with pytest.raises(InputError, match="--accumulate 1"):
        config(optimizers=names, lrs={name: (1e-3,) for name in names}, accumulate=2)


def test_pictures_hold_more_optimizers_than_there_are_colours(tmp_path):
    names = tuple(list(optimizers.known())[:10])
    # Warnings are errors, and matplotlib warns where a legend leaves no room for the axes.
    settings = run(tmp_path / "out", optimizers=names, lrs={name: (1e-3,) for name in names}, steps=2, eval_every=1)
    assert len(settings) == 10 and (tmp_path / "out" / "report.html").exists()
