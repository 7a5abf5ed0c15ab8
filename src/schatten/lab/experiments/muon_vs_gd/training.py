"""Figure 1: the MLP 3072-512-256-64-10 without biases on CIFAR-10, GD and Adam against three kinds of Muon.

    deterministic   100 fixed images, 15 steps, 5 seeds; lr grid 1e-4, 5e-4, ... 1e-1 for all
    stochastic      batches of 120, 5 epochs; lr grid 1e-3, 5e-3, ... 1e-1; the loss on the whole training set after each epoch

Muon is five quintics of Newton-Schulz on M_t = beta M_{t-1} + (1 - beta) G_t with M_0 = G_0, "no momentum" the same on G_t,
"SVD" the exact polar factor of M_t; no decay, no shape factor, all matrices alike. beta is not published: 0.95 here. Adam's
betas are torch's. Adam's published stochastic grid has four points, 1e-4 ... 5e-3; here a fifth, 1e-2, so that all have five.
The best lr is that of the lowest last loss on a seed of its own. On digits GD's and Muon's best lr lie at the top of the
published grids; "wide grid" has as many trials, up to 50 times that for GD and 10 times for Muon.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import schatten
from schatten.lab.contest import Contender, contest
from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.fit import Fit, Loop
from schatten.lab.images import Images
from schatten.lab.ledger import Ledger, Row
from schatten.lab.models import MLP
from schatten.lab.statistics import compared, mean, p_value, spread, summary
from schatten.lab.tasks import Classification
from schatten.lab.tuning import Params
from schatten.solvers import newton_schulz, svd

HIDDEN = (512, 256, 64)
CIFAR_PIXELS = 3072
SAMPLES, STEPS = 100, 15
BATCH, EPOCHS = 120, 5
READING = 0.05

WIDE_GD, WIDE_MUON = "GD, wide grid", "Muon, wide grid"

GRIDS = {
    "deterministic": (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1),
    "stochastic": (1e-3, 5e-3, 1e-2, 5e-2, 1e-1),
}
ADAM = {"deterministic": GRIDS["deterministic"], "stochastic": (1e-4, 5e-4, 1e-3, 5e-3, 1e-2)}
WIDE = {
    WIDE_GD: {"deterministic": (1e-2, 5e-2, 1e-1, 5e-1, 1.0, 2.0, 5.0), "stochastic": (1e-2, 5e-2, 1e-1, 5e-1, 1.0)},
    WIDE_MUON: {"deterministic": (1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0), "stochastic": (2e-2, 5e-2, 0.1, 0.2, 0.5)},
}

# Curve readings: losses at steps 1, 5, 8, 10, 15, and after epochs 1 to 5.
AT = {"deterministic": (1, 5, 8, 10, 15), "stochastic": (1, 2, 3, 4, 5)}
PUBLISHED = {
    "deterministic": {
        "GD": (2.30, 2.27, 2.22, 2.16, 1.82),
        "Adam": (2.30, 1.71, 0.62, 0.28, 0.01),
        "Muon": (2.30, 1.26, 0.10, 0.005, 0),
        "Muon, no momentum": (2.30, 1.28, 0.15, 0.01, 0),
        "Muon, SVD": (2.30, 1.08, 0.04, 0.00, 0),
    },
    "stochastic": {
        "GD": (1.83, 1.51, 1.39, 1.30, 1.22),
        "Adam": (1.66, 1.44, 1.32, 1.23, 1.15),
        "Muon": (1.66, 1.14, 0.77, 0.48, 0.30),
        "Muon, no momentum": (1.55, 1.28, 1.17, 1.09, 1.03),
        "Muon, SVD": (1.66, 1.13, 0.77, 0.50, 0.33),
    },
}
MUONS = ("Muon", "Muon, no momentum", "Muon, SVD")


def muon(model: nn.Module, lr: float, momentum: float, exact: bool) -> torch.optim.Optimizer:
    """Muon of every matrix, with M_0 = G_0: the first step has no momentum."""
    solver = svd() if exact else newton_schulz("keller", dtype="float32")
    options: dict[str, Any] = {"weight_decay": 0.0, "nesterov": False, "scale": "none", "solver": solver}
    optimizer = schatten.Muon(list(model.parameters()), lr=lr, momentum=0.0, **options)

    def remember(*_: Any) -> None:
        optimizer.param_groups[0]["momentum"] = momentum

    optimizer.register_step_post_hook(remember)
    return optimizer


def contenders(kind: str, momentum: float) -> list[Contender]:
    def gd(model: nn.Module, params: Params) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=params["lr"])

    def adam(model: nn.Module, params: Params) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=params["lr"])

    def of(beta: float, exact: bool = False) -> Any:
        return lambda model, params: muon(model, params["lr"], beta, exact)

    return [
        Contender("GD", gd, {"lr": GRIDS[kind]}),
        Contender(WIDE_GD, gd, {"lr": WIDE[WIDE_GD][kind]}),
        Contender("Adam", adam, {"lr": ADAM[kind]}),
        *(
            Contender(name, build, {"lr": GRIDS[kind]})
            for name, build in zip(MUONS, (of(momentum), of(0.0), of(momentum, exact=True)), strict=True)
        ),
        Contender(WIDE_MUON, of(momentum), {"lr": WIDE[WIDE_MUON][kind]}),
    ]


def fixed(images: Images, samples: int) -> Images:
    """The same `samples` images for every seed, for training and test alike."""
    chosen = torch.randperm(len(images.train_labels), generator=torch.Generator().manual_seed(0))[:samples]
    x, y = images.train[chosen], images.train_labels[chosen]
    return replace(images, train=x, train_labels=y, test=x, test_labels=y)


def whole(images: Images) -> Images:
    """Tested on all training images."""
    return replace(images, test=images.train, test_labels=images.train_labels)


def run(images: Images, momentum: float, hidden: tuple[int, ...], seeds: Mapping[str, int], ledger: Ledger) -> None:
    data = fixed(images, SAMPLES), whole(images)
    batches = len(data[0].train_labels), min(BATCH, len(data[1].train_labels))
    epoch = math.ceil(len(images.train_labels) / batches[1])
    loops = (
        Loop(STEPS, batches[0], schedule="constant"),
        Loop(EPOCHS * epoch, batches[1], schedule="constant", eval_every=epoch),
    )
    for kind, of, loop in zip(GRIDS, data, loops, strict=True):
        if not seeds[kind]:
            continue
        task = Classification(of, lambda: MLP((images.train[0].numel(), *hidden, images.classes)))
        contest(
            ledger,
            task,
            contenders(kind, momentum),
            loop,
            trials=len(GRIDS[kind]),
            seeds=seeds[kind],
            label={"part": kind, "data": images.source, "pixels": images.train[0].numel()},
            sampler="grid",
            score=lambda found, kind=kind: readings(found, kind)[-1],
            extra=lambda found, kind=kind: {"losses": readings(found, kind)},
        )


def readings(found: Fit, kind: str) -> list[float]:
    """The loss before each step, or after each epoch; inf from where a run diverged."""
    curve = found.train if kind == "deterministic" else found.curve
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in curve]
    return losses + [math.inf] * ((STEPS if kind == "deterministic" else EPOCHS) - len(losses))


def finals(rows: Sequence[Row], kind: str) -> dict[str, list[Row]]:
    of = [row for row in rows if row["part"] == kind and row["phase"] == "final"]
    return {name: [row for row in of if row["optimizer"] == name] for name in dict.fromkeys(row["optimizer"] for row in of)}


def check(rows: Sequence[Row]) -> list[Verdict]:
    return [v for kind in GRIDS for v in (*check_numbers(rows, kind), *check_orderings(rows, kind))]


def check_numbers(rows: Sequence[Row], kind: str) -> list[Verdict]:
    """One line for each curve of five readings."""
    found, unit = [], "step" if kind == "deterministic" else "epoch"
    for name, of in finals(rows, kind).items():
        if name not in PUBLISHED[kind]:
            continue
        published = PUBLISHED[kind][name]
        values = [[row["losses"][at - 1] for row in of] for at in AT[kind]]
        quantity = f"Fig 1, {kind}: loss of {name} at {unit} {', '.join(map(str, AT[kind]))}"
        text = f"{', '.join(f'{p:g}' for p in published)} (curve)"
        ours = f"{', '.join(f'{mean(v):.3g}' for v in values)}; the last {summary(values[-1], 3)}"
        if of[0]["pixels"] != CIFAR_PIXELS:
            why = f"needs --data with CIFAR-10; found on {of[0]['data']} ({of[0]['pixels']} inputs), lr {of[0]['lr']:g}"
            found.append(Verdict(quantity, text, ours, OUT_OF_REACH, why))
            continue
        allowed = [READING + 2 * (spread(v) if len(v) > 1 else 0) for v in values]
        within = [abs(mean(v) - p) <= a for v, p, a in zip(values, published, allowed, strict=True)]
        why = f"{sum(within)} of {len(within)} within two deviations over seeds and the reading of {READING}; one may miss"
        found.append(verdict(quantity, text, ours, sum(within) >= len(within) - 1, f"{why}; lr {of[0]['lr']:g}"))
    return found


def check_orderings(rows: Sequence[Row], kind: str) -> list[Verdict]:
    """Each Muon below Adam, Adam below GD, and what is left of it when no best lr lies at the edge of its grid."""
    of = finals(rows, kind)
    moments = (8, 15) if kind == "deterministic" else (5,)
    pairs = [*((name, "Adam") for name in MUONS), ("Adam", "GD"), ("Muon", "Muon, no momentum"), (WIDE_MUON, "Adam")]
    cases = [*itertools.product(pairs, moments), (("Adam", WIDE_GD), moments[-1]), ((WIDE_MUON, WIDE_GD), moments[-1])]
    found, unit = [], "step" if kind == "deterministic" else "epoch"
    for (lower, higher), at in cases:
        losses = [{row["seed"]: row["losses"][at - 1] for row in of.get(name, ())} for name in (lower, higher)]
        shared = sorted(set(losses[0]) & set(losses[1]))
        if not shared:
            continue
        a, b = ([column[seed] for seed in shared] for column in losses)
        holds = mean(a) < mean(b) and p_value(a, b, paired=True) < 0.05
        numbers = [published_at(kind, name, at) for name in (lower, higher)]
        text = "below (paper, on narrower grids)" if None in numbers else f"{numbers[0]:g} < {numbers[1]:g} (curve)"
        ends = "".join(edges(kind, name, of[name][0]) for name in (lower, higher))
        lrs = f"lr {of[lower][0]['lr']:g} and {of[higher][0]['lr']:g}{ends}"
        scale = f"{of[lower][0]['data']}, {of[lower][0]['steps']} steps"
        why = f"{compared(a, b)}; on {scale}, {len(GRIDS[kind])} trials each; {lrs}"
        quantity = f"{kind}, {unit} {at}: loss of {lower} below that of {higher}"
        found.append(verdict(quantity, text, f"{mean(a):.3g} against {mean(b):.3g}", holds, why))
    return found


def published_at(kind: str, name: str, at: int) -> float | None:
    values = PUBLISHED[kind].get(name)
    return None if values is None else values[AT[kind].index(at)]


def edges(kind: str, name: str, row: Row) -> str:
    grid = {"Adam": ADAM, **WIDE}.get(name, GRIDS)[kind]
    return f" ({name}'s at the edge of its grid)" if row["lr"] in (grid[0], grid[-1]) else ""
