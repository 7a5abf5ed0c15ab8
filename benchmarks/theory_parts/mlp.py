"""The page's part on curvature: J and L of an MLP along gradient descent and Muon (arXiv 2505.23737, figure 2)."""

from collections.abc import Mapping, Sequence

from scipy.sparse.linalg import eigsh
from theory_parts.words import SEEDS, Found, save, spread

from schatten.diagnostics.block_hessian import block_hessian
from schatten.lab.instrument_plots import CurvatureCurve, curvature_curves
from tests.facts import theory_mlp
from tests.facts.theory_mlp import COLUMNS, FITTED, PREPROCESSING, PUBLISHED, Problem, condition, trajectory

Run = Mapping[str, list[float]]


MLP = """\
## Curvature along the orthogonalised gradient: an MLP on 60 images

Figure 2 of 2505.23737: MLP 784-128-64-10 without biases, ReLU, cross-entropy, 60 fixed MNIST images, gradient descent and
simplified Muon (no momentum, exact polar factor) with lr 0.1 on all three matrices. J and L are of the block W2, 64 x 128:
J the curvature along U V^T of its gradient, L the largest |eigenvalue| of its Hessian. Condition (4) is
J/L <= nuc^2/fro^2, the norms of the gradient squared.

Here: {data}, {seeds} seeds, each of which draws 60 images and torch's default initialisation of `nn.Linear`; mean +- standard
deviation over seeds. Published is one run, read off curves to about 0.05, so that where fro^2 is below 0.1 the published ratio
nuc^2/fro^2 says little. L is by 20 steps of Lanczos; the largest eigenvalue of the whole 8192 x 8192 block, written out,
differs from it by {exact:.0e} of L at most, before steps 1 and 7 of Muon.

Neither initialisation nor preprocessing is published. The first step tells them apart:

| pixels, at step 1 | loss | J | L | nuc^2 | fro^2 | nuc^2/J | distance of Muon's curves | of GD's | condition held |
|---|---|---|---|---|---|---|---|---|---|
| published | 2.32 | 0.28 | 0.5 | 0.6 | 0.05 | 2.1 | | | throughout |
{choices}

"Distance" is the root mean square of log(found / published) over loss, J and L of the ten printed steps: 0.2 is about 20 %.
Pixels in [-1, 1] (torchvision's `Normalize(0.5, 0.5)`) fit at once, with nothing tuned; what follows has them. While logits are
small, another size of W1 or W3 at the start does not change nuc^2/J, so it does not make the other two fit.
{missed}

![J, L and both sides of the condition, found and published](images/theory-curvature.png)

The lines are seed {shown}, whose curves are nearest; hollow marks are the published run.
"""


def mlp() -> Found:
    data = theory_mlp.images()
    runs = {
        choice: {
            "Muon": [trajectory(Problem(data, seed, choice), "Muon", 10) for seed in range(SEEDS)],
            "GD": [trajectory(Problem(data, seed, choice), "GD", 46, 1 if choice == FITTED else 5) for seed in range(SEEDS)],
        }
        for choice in PREPROCESSING
    }
    choices = []
    for choice, of in runs.items():
        first = [{name: run[name][0] for name in COLUMNS} for run in of["GD"]]
        cells = [spread([row[name] for row in first]) for name in COLUMNS]
        cells.append(spread([row["nuc^2"] / row["J"] for row in first]))
        cells += [spread([theory_mlp.distance(run, PUBLISHED[name]) for run in of[name]]) for name in ("Muon", "GD")]
        held = [ok for name in of for run in of[name] for ok in condition(run)]
        choices.append(f"| {choice} | {' | '.join(cells)} | {sum(held)} of {len(held)} steps |")
    missed = [
        f"{name}'s step {run['step'][i]} of seed {seed} with pixels {choice}, at a loss of {run['loss'][i]:.1g} "
        f"(J/L {run['J'][i] / run['L'][i]:.3f}, nuc^2/fro^2 {run['nuc^2'][i] / run['fro^2'][i]:.3f})"
        for choice, of in runs.items()
        for name in of
        for seed, run in enumerate(of[name])
        for i, held in enumerate(condition(run))
        if not held
    ]
    of = runs[FITTED]
    shown = min(range(SEEDS), key=lambda seed: sum(theory_mlp.distance(of[name][seed], PUBLISHED[name]) for name in of))
    titles = {"GD": "gradient descent, lr 0.1", "Muon": "Muon, lr 0.1"}
    near = {"GD": every_fifth(of["GD"][shown]), "Muon": of["Muon"][shown]}
    figure = curvature_curves(
        {titles[name]: curve(near[name], near[name]["loss"]) for name in titles},
        {titles[name]: curve(PUBLISHED[name]) for name in titles},
    )
    save(figure, "curvature")
    head = MLP.format(
        data=data.name,
        seeds=SEEDS,
        exact=against_the_whole_hessian(data),
        choices="\n".join(choices),
        missed=f"The condition failed at {'; '.join(missed)}." if missed else "",
        shown=shown,
    )
    lines = [head]
    for name in ("Muon", "GD"):
        lines += [*steps_table(name, of[name]), ""]
    return [*lines, *claims(of)], {"seeds": SEEDS, "data": data.name, "runs": of}


def steps_table(name: str, runs: Sequence[Run]) -> list[str]:
    """Published and found numbers of each printed step."""
    published = PUBLISHED[name]
    header = " | ".join(f"{column} | found" for column in COLUMNS)
    lines = [
        f"{'Muon' if name == 'Muon' else 'Gradient descent'}:",
        "",
        f"| step | {header} | J/L | found | nuc^2/fro^2 | found |",
        "|---" * (2 * len(COLUMNS) + 5) + "|",
    ]
    for i, step in enumerate(published["step"]):
        at = [run["step"].index(step) for run in runs]
        cells = []
        for column in COLUMNS:
            cells += [f"{published[column][i]:g}", spread([run[column][k] for run, k in zip(runs, at, strict=True)])]
        for above, below in (("J", "L"), ("nuc^2", "fro^2")):
            cells.append(f"{published[above][i] / published[below][i]:.2g}")
            cells.append(spread([run[above][k] / run[below][k] for run, k in zip(runs, at, strict=True)]))
        lines.append(f"| {int(step)} | {' | '.join(cells)} |")
    return lines


def claims(of: Mapping[str, Sequence[Run]]) -> list[str]:
    muon, gd = of["Muon"], of["GD"]

    def share(runs: Sequence[Run], steps: Sequence[int]) -> str:
        above = [run["J"][t - 1] > run["L"][t - 1] for run in runs for t in steps]
        return f"{sum(above)} of {len(above)}"

    def largest(runs: Sequence[Run]) -> str:
        return spread([max(J / L for J, L in zip(run["J"], run["L"], strict=True)) for run in runs])

    held = {name: [ok for run in of[name] for ok in condition(run)] for name in of}
    return [
        "| claim | published | found |",
        "|---|---|---|",
        f"| J < L early | Muon's steps 1-4, GD's 1-26 (printed steps) | J > L in {share(muon, range(1, 4))} of Muon's steps "
        f"1-3 and {share(gd, range(1, 12))} of GD's 1-11 |",
        f"| J > L late | Muon's steps 5-10; GD mostly, from 31 | J > L in {share(muon, range(6, 11))} of Muon's steps 6-10 and "
        f"{share(gd, range(31, 47))} of GD's 31-46 |",
        f"| largest J/L | Muon 2.3 to 2.5, GD 1.4 | Muon {largest(muon)}, GD {largest(gd)} (of all 46 steps) |",
        f"| condition (4) | throughout | {sum(held['Muon'])} of {len(held['Muon'])} steps of Muon, {sum(held['GD'])} of "
        f"{len(held['GD'])} of GD |",
    ]


def against_the_whole_hessian(data: theory_mlp.Images) -> float:
    """How far L of Lanczos is from the block Hessian's largest |eigenvalue|, relative to it, before steps 1 and 7 of Muon."""
    problem = Problem(data, seed=0)
    opt = problem.optimizer("Muon")
    off = []
    for step in range(1, 8):
        if step in (1, 7):
            H = problem.hessian()
            whole = block_hessian(lambda V, H=H: H.within(0, V), problem.block.detach())
            L = abs(float(eigsh(whole.numpy(), k=1, which="LM", return_eigenvectors=False)[0]))
            off.append(abs(theory_mlp.measured(H)["L"] - L) / L)
        opt.zero_grad()
        problem.loss().backward()
        opt.step()
    return max(off)


def every_fifth(run: Run) -> dict[str, list[float]]:
    return {name: column[::5] for name, column in run.items()}


def curve(run: Run, loss: list[float] | None = None) -> CurvatureCurve:
    bound = [nuclear / frobenius for nuclear, frobenius in zip(run["nuc^2"], run["fro^2"], strict=True)]
    return CurvatureCurve(run["step"], run["J"], run["L"], bound, loss)
