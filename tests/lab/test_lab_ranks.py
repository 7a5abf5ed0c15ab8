"""An experiment under torchrun: both processes train each case together, one of them writes its row."""

import json
import os
import subprocess
import sys

import pytest

from schatten.lab.ledger import rows_of

SETTINGS = "--size 12 --target 0.1 --problems 1 --seeds 1 --trials 1 --image-steps 6 --steps 6 --width 16 --layers 1"


def run(launcher, out):
    command = [sys.executable, *launcher, "-m", "schatten", "lab", "run", "fanions", *SETTINGS.split(), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.xdist_group("ranks")
def test_two_processes_find_what_one_finds_and_write_each_row_once(tmp_path):
    run([], tmp_path / "one")
    said = run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], tmp_path / "two")
    one, two = (rows_of(tmp_path / name / "fanions") for name in ("one", "two"))

    def case(row):
        return json.dumps({k: v for k, v in row.items() if k in ("part", "phase", "optimizer", "method", "seed")})

    assert [case(row) for row in two] == [case(row) for row in one]
    assert said.count("rows.jsonl") == 1
    losses = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if "loss" in a]
    assert len(losses) >= 4
    # Means of halves of a batch: fp32 sums in another order, over six steps.
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in losses)
