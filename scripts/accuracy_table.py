"""Measure every solver on the test zoo of spectra and write docs/accuracy.md.

python scripts/accuracy_table.py
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from schatten import maps, solvers  # noqa: E402
from schatten.solvers.core import working_dtype  # noqa: E402
from schatten.solvers.power_function import PowerFunction  # noqa: E402
from tests.contracts.matrices import ZOO, with_spectrum  # noqa: E402

MATRICES = {
    **ZOO,
    "log-uniform 1 to 1e-3, 256x1024": with_spectrum(256, 1024, torch.logspace(0, -3, 256)),
    "log-uniform 1 to 1e-2, 256x256": with_spectrum(256, 256, torch.logspace(0, -2, 256)),
}
DTYPES = ("float32", "float16", "bfloat16")


def error(G: Tensor, D: Tensor, h: Callable[[Tensor], Tensor], floor: float, of: str) -> float:
    """The worst relative error of a gain against h(sigma), for sigma >= floor times the norm `of`."""
    G = G.float().double()
    unit = G.abs().max()
    U, s, Vh = torch.linalg.svd(G / unit, full_matrices=False)
    norm = s.norm() if of == "frobenius" else s[0]
    kept = s >= floor * norm * (1 - 1e-6)
    gain = (U.mT @ (D.double() / h(unit)) @ Vh.mT).diagonal()
    return float((gain / h(s) - 1).abs()[kept].max())


def table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(r)} |" for r in rows), ""]


def percent(x: float) -> str:
    return f"{100 * x:.2g} %" if x < 10 else f"{x:.1e}"


def polar() -> list[str]:
    lines: list[str] = []
    builders = {
        "polynomial()": lambda dtype: solvers.polynomial(dtype=dtype),
        "polynomial(tol=1e-2)": lambda dtype: solvers.polynomial(tol=1e-2, dtype=dtype),
        "gram()": lambda dtype: solvers.gram(dtype=dtype),
        "newton_schulz()": lambda dtype: solvers.newton_schulz(dtype=dtype),
        'newton_schulz("polar-express")': lambda dtype: solvers.newton_schulz("polar-express", dtype=dtype),
        "tower()": lambda dtype: solvers.tower(dtype=dtype),
    }
    for floor in (1e-2, 1e-3):
        rows = []
        for name, G in MATRICES.items():
            row = [name]
            for build in builders.values():
                found = [error(G, build(dtype)(G.float()), torch.ones_like, floor, "frobenius") for dtype in DTYPES]
                row.append(" / ".join(percent(e) for e in found))
            rows.append(row)
        title = f"Polar factor: largest distance of a gain from 1, sigma >= {floor:g} of the Frobenius norm, fp32 / fp16 / bf16"
        lines += table(title, ["spectrum", *(f"`{name}`" for name in builders)], rows)
    return lines


def powers() -> list[str]:
    columns: dict[str, Callable[[Tensor, PowerFunction], Tensor]] = {
        **{dtype: (lambda G, f, dtype=dtype: solvers.tower(dtype=dtype).apply(G, f)) for dtype in DTYPES},
        "`coupled_newton`": lambda G, f: solvers.coupled_newton().apply(G, f),
        "`coupled_minimax`": lambda G, f: solvers.coupled_minimax().apply(G, f),
    }
    lines: list[str] = []
    for p in (0.5, 0.25, 0.1, -0.25, -0.5, -0.9):
        rows = []
        for name, G in MATRICES.items():
            G = G / G.abs().max()
            row = [name]
            for column, apply in columns.items():
                try:
                    found = error(G, apply(G.float(), PowerFunction(p)), lambda s, p=p: s**p, 1e-3, "spectral")
                    row.append(percent(found))
                except ValueError:
                    row.append("-")
                if column in DTYPES and p < 0 and column != "float32":
                    try:
                        solvers.tower(dtype=column).check(PowerFunction(p))
                    except ValueError:
                        row[-1] = "refused"
            rows.append(row)
        title = f"Power p = {p}: worst relative error, sigma >= 1e-3 of the largest; tower in three precisions, coupled in fp32"
        lines += table(title, ["spectrum", *columns], rows)
    return lines


def fits() -> list[str]:
    tower = importlib.import_module("schatten.solvers.tower")
    rows = []
    for p in (0.75, 0.5, 0.25, 0.1, 0.05, 0.0, -0.1, -0.25, -0.5, -0.9):
        fit = tower.constant(PowerFunction(p))
        rows.append([f"p = {p}", str(len(fit.weights) - 1), percent(fit.error), f"{fit.amplification:.3g}"])
    for cls in (maps.PseudoHuber, maps.LogCosh, maps.LogSmoothed, maps.Huber, maps.Clip, maps.SoftThreshold):
        found = tower.table(cls(1.0).family)
        kind = " of the largest" if cls is maps.SoftThreshold else ""
        rows.append([f"{cls.__name__}, any a", "7", percent(found.error) + kind, f"{found.amplification:.3g}"])
    title = "What the fits leave, in exact arithmetic, on sigma in [1e-3, 1] of the largest"
    return table(title, ["function", "quintics", "worst relative error", "sum of absolute weights"], rows)


def curves() -> list[str]:
    places = (1e-3, 1e-2, 0.03, 0.1, 0.3, 0.6, 1.0)
    rows = []
    for p in ("1/2", "1/3", "1/5", "1/7", "1/15", "3/5", "13/15"):
        numerator, denominator = map(int, p.split("/"))
        row = [p]
        for place in places:
            G = torch.diag(torch.tensor([place, (1 - place**2) ** 0.5]).double())
            row.append(f"{float(solvers.muon_p(p, dtype='float64')(G)[0, 0]) / place ** (numerator / denominator):.3f}")
        rows.append(row)
    return table("Muon^p as released: output over sigma^p", ["p", *(f"{place:g}" for place in places)], rows)


def main() -> None:
    auto = str(working_dtype(torch.zeros(1), "auto")).removeprefix("torch.")
    lines = [
        "# Accuracy of the solvers",
        "",
        "Written by `python scripts/accuracy_table.py`; do not edit. Measured along the singular vectors of each matrix of the",
        "test zoo (`tests/contracts/matrices.py`), in fp32 input: a gain is the diagonal entry of U^T P V, so a turned sign",
        f'counts as an error of 200 %. `dtype="auto"` is {auto} on the machine this was written on. A dash: nothing to',
        "compute, refused: the weights amplify rounding beyond what the precision holds.",
        "",
        *fits(),
        *polar(),
        *powers(),
        *curves(),
    ]
    path = ROOT / "docs/accuracy.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
