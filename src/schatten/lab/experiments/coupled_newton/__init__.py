"""How accurate, how dear and how dependent on scale is the published iteration for U S^(1/2) V^T and U S^(1/4) V^T?

"Muon and beyond" (2602.04669) computes Psi_p(O) = U S^p V^T for p = 1/2 and 1/4 without an SVD:

    Psi_1/2(O) = O (O^T O)^(-1/4),   Psi_1/4 = Psi_1/2 of Psi_1/2,   each root by 15 steps of
    T = (3 I - Z Y)/2,  Y <- Y T,  Z <- T Z   from Y = A_r/||A_r||_F, Z = I,  A_r = A + (1e-6 + 1e-4 tr(A)/n) I

and p = 0 by Keller Jordan's quintic, 15 times. `schatten.solvers.coupled_newton()` is this iteration; `tower()`,
`coupled_minimax()` and `svd()` stand beside it. The paper prints no accuracy: the numbers compared here were derived from
the released code, one random draw each. They are relative Frobenius errors of fp32 results against an fp64 SVD, what is
left of small singular values, errors of scaled inputs, and square products (flops / 2 n^3 of an n x n input).

Where the singular values are prescribed, only rounding differs between draws, and a number is reproduced if ours is what
was printed, to half a unit of its last digit and 2 %. Where they are random a factor of 8.4/5.9 is allowed, the widest
range stated between draws. The damping is that of 256 singular values, read at the nearest of them: after 15 steps it
depends on their number (768 of them keep 0.43 instead of 0.48 at 1e-3). Times have no published counterpart but the ratio
of products; they are those of one run, in which the solvers take turns.
"""

from dataclasses import dataclass

from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.coupled_newton import measures
from schatten.lab.experiments.coupled_newton.comparison import check
from schatten.lab.experiments.coupled_newton.pictures import CAPTIONS, pictures
from schatten.lab.experiments.coupled_newton.published import ERRORS, POWERS, STEPS, scales
from schatten.lab.ledger import Ledger


@dataclass(frozen=True)
class Config:
    """`sizes` are square matrices whose time is taken; the inputs are small enough for a laptop."""

    seeds: int = 3
    inputs: tuple[str, ...] = option(tuple(ERRORS), "Inputs whose errors are measured.")
    sizes: tuple[int, ...] = option((256, 768), "Square matrices to time.")
    rounds: int = option(5, "How often each solver is timed.")
    dtype: str = option("float32", "Precision of the tower's and the quintic's products.")


def run(config: Config, ledger: Ledger) -> None:
    """Errors of every input and scale, gains, products, the quintic, times. Raises InputError for an unknown input."""
    for name in config.inputs:
        if name not in ERRORS:
            raise InputError(f"--inputs has no {name!r}: known are {', '.join(ERRORS)}.")
    device = ledger.state.device
    assert device is not None
    cases = [
        {"part": "error", "input": name, "scale": scale, "p": p, "seed": seed}
        for name in config.inputs
        for scale in scales(name)
        for p in POWERS
        for seed in range(config.seeds)
    ]
    for case in cases:
        ledger.measure(case, lambda case=case: measures.errors(case, config.dtype, device))
    for p in POWERS:
        ledger.measure({"part": "gain", "p": p}, lambda p=p: measures.gains(p, config.dtype))
    ledger.measure({"part": "products"}, lambda: {"count": measures.products()})
    for steps in STEPS:
        ledger.measure({"part": "quintic", "steps": steps}, lambda steps=steps: measures.quintic(steps))
    for size in config.sizes:

        def timed(size: int = size) -> dict[str, dict[str, list[float]]]:
            return {"milliseconds": measures.times(size, config.rounds, config.dtype, device)}

        ledger.measure({"part": "time", "size": size}, timed)


EXPERIMENT = Experiment(
    "arXiv 2602.04669",
    Config(),
    Config(seeds=20, sizes=(768, 1024, 4096), rounds=20, dtype="bfloat16"),
    run,
    check,
    pictures,
    CAPTIONS,
    "TF32 products, which the paper allows on GPU, and times of a training step with either solver.",
)
