"""Kernels compiled for a Hopper that is not here: what `benchmarks/compile_kernels.py` finds in the machine code.

In processes of their own, as Triton's interpreter, with which the other tests run, is chosen when kernels are defined.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PRODUCTS = ("gram, bf16", "sym into a sum, fp16", "sym, tf32", "affine of transposed onto fp32, bf16")
PASSES = ("momentum, bf16", "momentum transposed, fp32", "quotient, bf16", "retract onto fp32, bf16", "adamw by noise, bf16")


def run(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def found(out: Path, *options: str) -> list[dict[str, Any]]:
    run(str(BENCHMARKS / "compile_kernels.py"), "--targets", "90", "--out", str(out), *options)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["varieties"]
    return rows


@pytest.fixture(scope="module")
def varieties(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What PRODUCTS and PASSES launch where nothing is tuned."""
    rows = found(tmp_path_factory.mktemp("compiled") / "found.json", "--first", "--only", *PRODUCTS, *PASSES)
    assert {example for v in rows for example in v["examples"].split("; ")} == {*PRODUCTS, *PASSES}, "an example was renamed"
    return rows


def named(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{v['kernel']} {v['configuration']}" for v in rows]


def test_no_kernel_spills_registers(varieties: list[dict[str, Any]]) -> None:
    assert named([v for v in varieties if v["local"]]) == []


@pytest.mark.slow
def test_no_candidate_of_any_kernel_spills_registers(tmp_path: Path) -> None:
    assert named([v for v in found(tmp_path / "found.json") if v["local"]]) == []


def test_every_variety_has_room_on_a_multiprocessor(varieties: list[dict[str, Any]]) -> None:
    assert named([v for v in varieties if v["resident"] == 0]) == []


def test_products_are_multiplied_by_hoppers_own_instructions(varieties: list[dict[str, Any]]) -> None:
    products = [v for v in varieties if v["kernel"] == "product"]
    assert {example for v in products for example in v["examples"].split("; ")} == set(PRODUCTS)
    assert named([v for v in products if v["tensor_cores"] != "HGMMA"]) == []


def test_numbers_are_loaded_and_stored_sixteen_bytes_at_a_time(varieties: list[dict[str, Any]]) -> None:
    """AdamW apart: it has a masked tile at each tensor's end, which is read entry by entry."""
    for v in varieties:
        if v["kernel"] not in ("_norms", "_adamw"):
            for way in ("loads", "stores"):
                widths = {int(width): count for width, count in v[way].items()}
                # Flags, counters and a tensor's number are a few single accesses.
                narrow = sum(count for width, count in widths.items() if width <= 4)
                assert max(widths) == 16 and narrow <= 8, (named([v]), way, widths)


def test_adamw_reads_whole_tiles_sixteen_bytes_at_a_time(varieties: list[dict[str, Any]]) -> None:
    for v in varieties:
        if v["kernel"] == "_adamw":
            constants = dict(part.split("=") for part in v["configuration"].split() if "=" in part)
            bits = {name: int(constants[name].removeprefix("fp").removeprefix("bf")) for name in ("TYPE", "G_TYPE")}
            entries = int(constants["TILE"]) // (32 * v["warps"])
            averages = 2 * 4 * entries
            assert 16 * v["loads"]["16"] >= (bits["TYPE"] + bits["G_TYPE"]) // 8 * entries + averages, named([v])
            assert 16 * v["stores"]["16"] >= bits["TYPE"] // 8 * entries + averages, named([v])


SCHEDULE = """
import sys
sys.path.insert(0, sys.argv[1])
from compile_kernels import compiling
import torch
import schatten
from schatten.kernels import triton

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(50, 64), torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
solver = schatten.solvers.polynomial(dtype="bfloat16")
fixed = [0, 1, 16, 0.0, 1.0, 16.0]
with compiling(90, search=False) as launches:
    optimizer = schatten.Muon(model, lr=1e-3, solver=solver)
    counts = []
    for lr in fixed + [1e-3 * (1 + t) / 44 for t in range(44)]:
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=0.1 * (1 + lr), **({"momentum": 0.9 + lr / 200} if "momentum" in group else {}))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        launches.of("step", optimizer.step)
        counts.append(len(launches.made))
    assert {kernel.name for kernel in launches.made} >= {"product", "_momentum", "_adamw"}
    assert len(counts) == 50 and set(counts) == {counts[0]}, counts
    for matrices in (1, 2, 3, 16, 50):
        launches.of("gram", lambda: triton.gram(torch.empty(matrices, 64, 512, dtype=torch.bfloat16)))
        counts.append(len(launches.made))
    assert counts[-5:] == [counts[-1]] * 5, counts
"""


def test_neither_fifty_learning_rates_nor_more_matrices_compile_anything_again() -> None:
    run("-c", SCHEDULE, str(BENCHMARKS))
