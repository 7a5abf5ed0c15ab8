"""Write docs/parity.md: how far every placement is from one process after ten steps, and what its steps send.

python benchmarks/parity.py
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.distributed import budget_runs, parity_runs, ranks  # noqa: E402
from tests.distributed.parity_runs import BOUNDS, STEPS, Run, difference, identical, on  # noqa: E402

PAGE = ROOT / "docs" / "parity.md"

SIZES = (1, 2, 3, 4)

INTRODUCTION = f"""\
# Parity: the same step on any number of ranks

{STEPS} steps of `schatten.Muon` on a GPT of two layers of width 32, with a fused query, key and value, a bank of three
experts, a convolution, a 1 x 32 and a 3 x 32 matrix, in every placement on 1 to 4 gloo ranks of a CPU (torch
{torch.__version__}). Where ranks share the data, each has its part of the batch, so gradients are sums in another order,
and an owner multiplies matrices in other batches than one process does. Numbers are
max |W - W of one process| / max |W of one process|, of the worst parameter. "Same bits" says whether every rank ends with
the same weights, bit for bit. "Together" says that matrices that are cut stay where they are, and ranks add up their
products; elsewhere they travel to an owner.

`python benchmarks/parity.py` writes this page; `tests/distributed/test_parity.py` holds the bounds.

"""

READING = f"""
Bounds: {BOUNDS["fp32"]:g} with fp32 products, {BOUNDS["bf16 products"]:g} with bf16 products (`dtype="bfloat16"` of the
solver), {BOUNDS["bf16 weights"]:g} with weights in bf16 too, which are rounded stochastically. "DDP, local" computes
everything on every rank, as one process does: its numbers are what the order of sums alone comes to.

Not every difference is that small. Where a gradient has a direction that is zero but for rounding, as for the logits of a
softmax, to all of which one may add the same, Muon makes of the rounding an update as large as any: with a softmax over
three logits in this model fp32 numbers are ten times as large. Presets that keep an eigenbasis (SOAPMuon, KLSOAP) do the
same in every direction that has had no gradient. Given the same gradients, every preset takes one process's steps to 1e-9 in
fp64 (`tests/distributed/test_preset_ranks.py`).
"""

SENT = """
## What a step sends

Collectives of one step on a stack of 16 x 16 matrices, all of which fit into one bucket: one for the ranks to agree on which
gradients there are, and two for each bucket at most.

| optimizer and placement | ranks | 4 matrices | 16 matrices |
|---|---|---|---|
"""


def cell(values: list[float]) -> str:
    return f"{max(values):.1e}"


def parity() -> list[str]:
    kinds = {
        "fp32": ("Muon", "float32", "float32"),
        "bf16 products": ("Muon", "bfloat16", "float32"),
        "bf16 weights": ("Muon", "bfloat16", "bfloat16"),
    }
    assert kinds.keys() == BOUNDS.keys()
    references = ranks.run(parity_runs.of_rank, 1, [("one process", *kind) for kind in kinds.values()])[0]
    rows = [f"| placement | ranks | {' | '.join(kinds)} | same bits |", "|---" * (len(kinds) + 3) + "|"]
    for size in SIZES:
        runs: list[Run] = [(placement, *kind) for placement in on(size) for kind in kinds.values()]
        found = list(zip(*ranks.run(parity_runs.of_rank, size, runs, timeout=600), strict=True))
        for placement in on(size):
            own = [found[runs.index((placement, *kind))] for kind in kinds.values()]
            numbers = [cell([difference(W, expected) for W in run]) for run, expected in zip(own, references, strict=True)]
            same = all(identical(run[0], W) for run in own for W in run)
            rows.append(f"| {placement} | {size} | {' | '.join(numbers)} | {'yes' if same else 'no'} |")
    return rows


def sent() -> list[str]:
    rows = []
    for size in (2, 4):
        wrappers = [name for name in budget_runs.WRAPPERS if size > 2 or name != "HSDP"]
        found = ranks.run(budget_runs.of_rank, size, wrappers)[0]
        names = {f"Muon, {name}": name for name in wrappers} | {"torch.optim.Muon, FSDP2": "torch.optim.Muon"}
        for text, name in names.items():
            few, many = (len(found[f"{name}, {matrices}"]) for matrices in (4, 16))
            rows.append(f"| {text} | {size} | {few} | {many} |")
    return rows


def main() -> None:
    PAGE.write_text(INTRODUCTION + "\n".join(parity()) + "\n" + READING + SENT + "\n".join(sent()) + "\n")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
