"""Does Muon beat gradient descent where the spectral-norm analysis says it should?

Shen, Huang, Huang, Shen and Zhang, "On the Convergence Analysis of Muon", section 3.5 of the reference. Four parts:

    training      figure 1: GD, Adam and three kinds of Muon on an MLP, 100 images for 15 steps, and batches for 5 epochs
    curvature     figure 2: J_t, L_t and condition (4) along GD and simplified Muon, one block of a small MLP
    quadratic     figure 3: a 15 x 20 quadratic, and the histogram of D_F^2 L / (D_op^2 L_sp)
    star-convex   theorem 4.11: the bounds at every step, and fitted rates of the constant and the adaptive step

Without --data and --mnist the images are scikit-learn's digits, 64 inputs instead of 3072 and 784: then orderings are judged
and numbers are out of reach. Not published, and ours: beta, initialisation (torch's), preprocessing (pixels in [-1, 1]), the
images that were drawn, Q, and the tuned lrs; each file says what it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from schatten.lab import images
from schatten.lab.errors import named
from schatten.lab.experiment import Experiment, Verdict, option
from schatten.lab.experiments.muon_vs_gd import curvature, quadratic, star_convex, training
from schatten.lab.experiments.muon_vs_gd.figures import pictures
from schatten.lab.ledger import Ledger, Row


@dataclass(frozen=True)
class Config:
    """`seeds` of the deterministic training, of W* and of the curvature; the full run has the published data and sizes."""

    seeds: int = 5
    data: str = option(images.EMBEDDED, "Images of the training: a folder with CIFAR-10's files, or 'digits'.")
    mnist: str = option(images.EMBEDDED, "Images of the curvature: a folder with MNIST's files, or 'digits'.")
    momentum: float = option(0.95, "beta of Muon, which is not published.")
    hidden: tuple[int, ...] = option(training.HIDDEN, "Widths of the trained MLP's hidden layers.")
    stochastic_seeds: int = option(3, "Seeds of the training by batches; 0 leaves it out.")
    samples: int = option(100_000, "W* of the histogram.")
    steps: int = option(quadratic.STEPS, "Steps on the quadratic.")
    star_steps: int = option(2_000, "Steps on the star-convex problem.")


def run(config: Config, ledger: Ledger) -> None:
    # First, as data that are missing are named before anything is measured.
    trained_on = images.load(config.data)
    with named("--mnist"):
        measured_on = images.load(config.mnist)
    seeds = range(config.seeds)
    quadratic.run(config.samples, config.steps, seeds, ledger)
    star_convex.run(config.star_steps, seeds, ledger)
    curvature.run(measured_on, seeds, ledger)
    counts = {"deterministic": config.seeds, "stochastic": config.stochastic_seeds}
    training.run(trained_on, config.momentum, config.hidden, counts, ledger)


def check(rows: Sequence[Row]) -> list[Verdict]:
    return [verdict for part in (training, curvature, quadratic, star_convex) for verdict in part.check(rows)]


CAPTIONS = {
    "training": "Training loss: lines are means over seeds at the best lr, bands their range, rings the published curves on "
    "CIFAR-10, whatever the data of the lines.",
    "theory": "J/L must lie below the dashed line of its colour (condition 4); Muon's linear fall crosses GD's; the ratio that "
    "favours Muon's bound; and f - f* against theorem 4.11.",
}

EXPERIMENT = Experiment(
    "arXiv 2505.23737",
    Config(),
    Config(data="cifar-10-batches-py", mnist="mnist", seeds=10, stochastic_seeds=5),
    run,
    check,
    pictures,
    CAPTIONS,
    "theorems 4.1 to 4.8 and C.1, whose constants the training does not know.",
)
