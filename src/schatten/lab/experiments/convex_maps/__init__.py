"""Does a rule on another convex K, with decoupled decay, solve the problem that its conjugate K* says?

Claim: Lion-K with decay lambda minimises F(W) + (1/lambda) K*(lambda W): for the nuclear norm Muon's spectral ball, for the
Frobenius norm its ball, for sum of s^(1+p) a penalty on sigma^(1 + 1/p), and so on.

Source: Chen, Li and Liu, "Muon Optimizes Under Spectral Norm Constraints", 2506.15054, table 1 and figure 7 ("varying K"),
whose rows, settings and results are not known to us. The table here is derived: by Lewis' theorem the conjugate of a symmetric
function of the singular values is the conjugate of that function. So are all settings: an MLP on digits, gradients of all
training images, momentum 0.9 (Nesterov), lr 0.03, lambda 1, a constant lr and a cool-down, exact directions, AdamW for the
head.

Every map of `schatten.maps` is run as c K on the same network, batches, lr and lambda. The factor c makes the root mean square
of its updates Muon's, so that lr lambda, and with it how fast a start is forgotten, is the same for all; a factor on the lr
instead would make the ball of the Frobenius norm sqrt(r) times smaller than Muon's. Thresholds a are a tenth of the root mean
square of the singular values of Muon's momentum. (cK)*(lambda W) = c K*(lambda W / c).

Verified from the weights: the dual-ball value, the gauge of lambda W / c in the domain of K*, at most 1; and the residual of
the Fenchel-Young inequality, 0 where W solves the problem,

    [c K(G) + c K*(lambda W / c) + <lambda W, G>] / [c K(G) + c K*(lambda W / c) + |<lambda W, G>|],   G = grad F(W)

in [0, 1], the largest of the matrices; for comparison that of the same weights in the problems of the other maps. The numerator
alone is the paper's score, which also falls where gradients vanish inside the domain.
"""

from dataclasses import dataclass

from schatten.lab.contest import TUNING_SEED
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.convex_maps import training
from schatten.lab.experiments.convex_maps.comparison import check
from schatten.lab.experiments.convex_maps.figures import CAPTIONS, pictures
from schatten.lab.experiments.convex_maps.table import MUON, table
from schatten.lab.ledger import Ledger


@dataclass(frozen=True)
class Config:
    """An MLP on digits; a GPT at full size."""

    seeds: int = 3
    network: str = option("mlp", "mlp or gpt.")
    steps: int = option(250, "Steps of a training.")
    lr: float = option(0.03, "Peak lr: with Muon's map the spectral norm of an update.")
    decay: float = option(1.0, "Decoupled decay lambda.")
    batch: int = option(1438, "Images or windows of a step; digits have 1438 training images.")
    measured: int = option(1, "Batches of the gradient in the residual.")
    exact: bool = option(True, "Directions by SVD instead of each map's default solver.")
    passes: int = option(4, "Trainings, at most, that find the factor c of a map.")
    data: str = option("digits", "Images: digits, or a folder of MNIST or CIFAR-10 files.")
    text: str = option("pydoc", "Text of the GPT, as of `schatten train`.")
    hidden: tuple[int, ...] = option((32, 32), "Widths of the MLP's hidden layers.")
    layers: int = option(2, "Blocks of the GPT.")
    heads: int = option(4, "Heads of the GPT.")
    width: int = option(64, "Width of the GPT.")
    context: int = option(32, "Context of the GPT.")
    precision: str = option("no", "Mixed precision: no, bf16 or fp16.")


FULL = Config(
    network="gpt",
    steps=5000,
    lr=0.02,
    decay=0.5,
    batch=256,
    measured=16,
    exact=False,
    text="openwebtext",
    layers=12,
    heads=12,
    width=768,
    context=1024,
    precision="bf16",
)


def run(config: Config, ledger: Ledger) -> None:
    """Muon's run for thresholds and lengths, the factor of every map on the tuning seed, then all maps on all seeds."""
    task = training.task(config)
    pilot = ledger.measure({"phase": "pilot", "seed": TUNING_SEED}, lambda: training.pilot(config, task))
    maps = table(pilot["threshold"], pilot["rank"], exact=config.exact)
    factors = {}
    for name, K in maps.items():
        factor, tried = pilot["factors"][name], [(1.0, pilot["rms"])] if name == MUON else []
        for i in range(config.passes):
            if training.matched(tried, pilot["rms"]):
                break
            case = {"phase": "match", "map": name, "factor": factor, "pass": i, "seed": TUNING_SEED}
            row = ledger.measure(case, lambda K=K, factor=factor: training.trained(config, task, K, factor, TUNING_SEED))
            tried.append((factor, row["rms"]))
            factor = training.next_factor(pilot["factors"][name], tried, pilot["rms"])
        factors[name] = factor
    for name, K in maps.items():
        for seed in range(config.seeds):
            case = {"phase": "final", "map": name, "factor": factors[name], "seed": seed}
            ledger.measure(
                case,
                lambda K=K, name=name, seed=seed: training.verified(config, task, name, maps, factors, seed),
            )


EXPERIMENT = Experiment(
    "arXiv 2506.15054",
    Config(),
    FULL,
    run,
    check,
    pictures,
    CAPTIONS,
    lacks="Sums of maps; an lr tuned for each map; figure 7's own settings, which are not published.",
)
