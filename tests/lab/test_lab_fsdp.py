"""`schatten compare` under torchrun with --fsdp: the same losses as one process, and runs that resume bit for bit."""

import subprocess
import sys

import pytest
from rich.console import Console
from safetensors.torch import load_file

from schatten.lab.compare import compare
from schatten.lab.config import CompareConfig
from schatten.lab.errors import InputError
from schatten.lab.store import Store
from tests.lab import fsdp_runs

# The last one evaluates the loss itself, twice in a step.
NAMES = ("adamw", "muon", "muonmvr2")

# 129 windows of two processes are two batches for one and one for the other.
OPTIONS = {
    **{"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 4, "steps": 20, "save_every": 15},
    **{"eval_every": 10, "eval_windows": 9, "final_eval_windows": 129},
}


def torchrun(*arguments):
    """Two processes of torchrun, ended with their children where they hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output = process.communicate(timeout=150)[0]
    except subprocess.TimeoutExpired:
        # Not killed: torchrun ends its processes, which are in sessions of their own.
        process.terminate()
        output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same comparison by one process and by two that share every model."""
    one, two = (tmp_path_factory.mktemp("runs") / name for name in ("one", "two"))
    lrs = {name: (2e-3,) for name in NAMES}
    compare(CompareConfig(**OPTIONS, optimizers=NAMES, lrs=lrs), one, console=Console(quiet=True))
    options = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
    torchrun("-m", "schatten", "compare", *options, f"--optimizers={','.join(NAMES)}", "--lrs=2e-3", f"--out={two}", "--fsdp")
    return one, two


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    torchrun(fsdp_runs.__file__, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_run_has_the_losses_of_one_process(folders, name):
    one, two = ([r for r in Store(out).records() if r["run"].startswith(f"{name}-")] for out in folders)
    assert [r["event"] for r in one] == [r["event"] for r in two] == ["train", "eval", "train", "eval", "done"]
    # The same windows averaged in another order: fp32 rounding, grown over 20 steps.
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=5e-4)
    assert two[-1]["parameters"] == one[-1]["parameters"] and two[-1]["bounds"] == one[-1]["bounds"]


@pytest.mark.parametrize("name", NAMES)
def test_its_checkpoint_has_whole_weights_under_the_names_of_one_process(folders, name):
    one, two = (load_file(out / "checkpoints" / f"{name}-lr0.002-seed0" / "model.safetensors") for out in folders)
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}
    for n, t in one.items():
        # As for the losses, and with bf16 products where the CPU multiplies it fast; 2e-3 was seen.
        assert (two[n] - t).abs().max() < 1e-2 * t.abs().max(), n


def test_its_report_is_written(folders):
    assert [path.name for path in sorted(folders[0].glob("*.png"))] == [path.name for path in sorted(folders[1].glob("*.png"))]
    assert (folders[1] / "report.html").stat().st_size > 0


def test_one_process_and_rules_of_whole_models_are_refused(tmp_path):
    options = {"lrs": {"muon": (2e-3,)}, "optimizers": ("muon",), "fsdp": True}
    with pytest.raises(InputError, match="--fsdp shards each model over processes, got one"):
        compare(CompareConfig(**OPTIONS, **options), tmp_path / "out", console=Console(quiet=True))
    with pytest.raises(InputError, match=r"--optimizers jaguarmuon evaluates .* leave --fsdp out"):
        CompareConfig(**OPTIONS, fsdp=True, optimizers=("jaguarmuon",), lrs={"jaguarmuon": (1e-3,)})
    assert not (tmp_path / "out").exists()


def test_a_folder_from_before_the_option_is_continued(tmp_path):
    config = CompareConfig(**OPTIONS, lrs={"adamw": (2e-3,)}, optimizers=("adamw",)).plain()
    store = Store(tmp_path / "out")
    store.open({key: value for key, value in config.items() if key != "fsdp"}, resume=False, checkpoint_bytes=0)
    store.open(config, resume=True, checkpoint_bytes=0)
    with pytest.raises(InputError, match="fsdp: False there, True now"):
        store.open({**config, "fsdp": True}, resume=True, checkpoint_bytes=0)


@pytest.mark.parametrize("placement", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", fsdp_runs.NAMES)
def test_a_run_of_two_processes_that_was_stopped_resumes_bit_identically(resumed, placement, name):
    whole, stopped = (Store(resumed / f"{placement}-{how}") for how in ("whole", "stopped"))
    records = [
        [{k: v for k, v in r.items() if "seconds" not in k} for r in store.records() if r["run"].startswith(f"{name}-")]
        for store in (whole, stopped)
    ]
    assert len(records[0]) == 5 and records[0] == records[1]
    weights = [(store.checkpoint(f"{name}-lr0.004-seed0") / "model.safetensors").read_bytes() for store in (whole, stopped)]
    assert weights[0] == weights[1]
