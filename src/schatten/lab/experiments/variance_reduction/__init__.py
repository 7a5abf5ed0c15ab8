"""Does variance-reduced momentum beat Muon's at equal evaluations of the gradient?

    C = G + gamma beta / (1 - beta) (G - G'),   M <- beta M + (1 - beta) C,   W <- (1 - lr lambda) W - lr c msign(M)

MVR1 and MVR2 (arXiv 2509.15816): G' is the stored gradient of the last step, or a second gradient of this sample at the
last weights. Claimed: the mean gradient norm falls like O~(T^-1/4) with 1 - beta = t^-1/2, lr = t^-3/4 and the stored
gradient, like O~(T^-1/3) with 1 - beta = lr = t^-2/3 and the exact one (with gamma = 1 STORM, and the rate of arXiv
2512.16598). MARS-M (arXiv 2510.21800), MVR1 without the clip: below Moonlight's Muon run at the same hyper-parameters, on GPT-2
and OpenWebText, figures only.

Measured in evaluations of the gradient, so that a step with two of them counts twice:
rates     the theorems' schedules on a smooth problem that is not convex, with noise that samples share and noise that they do
          not; the exponent of the mean gradient norm over the second half of T steps, at lr = t^-step.
images    a perceptron at batch 8: Muon, MVR1, MVR2, STORM and MARS-M with the same number of trials each, over lr, the lr of
          the AdamW beside, and gamma.
text      a small GPT: MARS-M at the hyper-parameters that were best for Muon.

The problem of the rates, batch sizes, models and ranges of the search are ours; decay 0.1, momentum 0.95 and gamma = 0.025
are published.
"""

import math
from dataclasses import dataclass

from schatten.lab.contest import TUNING_SEED, contest
from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.variance_reduction.networks import RULES, contender, image_task
from schatten.lab.experiments.variance_reduction.pictures import pictures
from schatten.lab.experiments.variance_reduction.rates import ESTIMATORS, descend
from schatten.lab.experiments.variance_reduction.verdicts import check
from schatten.lab.fit import Loop
from schatten.lab.ledger import Ledger, Row
from schatten.lab.tasks import Task, text_task


@dataclass(frozen=True)
class Config:
    """Seconds on a laptop; `full` is GPT-2 small on nanoGPT's memory maps and a CIFAR-10 perceptron."""

    seeds: int = 3
    evaluations: int = option(1536, "Evaluations of the gradient in a run of the rates.")
    copies: int = option(16, "Independent runs that are averaged for a seed of the rates.")
    lrs: tuple[float, ...] = option((0.125, 0.25, 0.5, 1.0), "First learning rates of the rates, of which the best is taken.")
    trials: int = option(6, "Trials of the search for every optimizer.")
    images: str = option("digits", "Images: digits or a folder of image files.")
    image_width: int = option(64, "Width of the perceptron.")
    image_batch: int = option(8, "Images in a batch.")
    image_evaluations: int = option(300, "Evaluations of the gradient on images.")
    text: str = option("pydoc", "Text: pydoc, a file, or a folder with train.bin and val.bin.")
    tokens: str = option("byte", "Tokens of a text: byte, char or bpe:N.")
    width: int = option(64, "Width of the GPT.")
    layers: int = option(2, "Layers of the GPT.")
    context: int = option(32, "Tokens in a window.")
    batch: int = option(8, "Windows in a batch.")
    steps: int = option(150, "Steps on text.")
    precision: str = option("no", "Mixed precision: no, bf16 or fp16.")

    def __post_init__(self) -> None:
        if min(self.trials, self.copies, self.evaluations, len(self.lrs), *map(math.ceil, self.lrs)) < 1:
            raise InputError(
                f"--trials, --copies, --evaluations and --lrs must be positive and --lrs name one at least, got {self.trials}, "
                f"{self.copies}, {self.evaluations} and {self.lrs}."
            )


FULL = Config(
    seeds=3,
    evaluations=65536,
    images="data/cifar-10",
    image_width=512,
    image_evaluations=20_000,
    text="data/openwebtext",
    width=768,
    layers=12,
    context=1024,
    batch=480,
    steps=100_000,
    precision="bf16",
)


def run(config: Config, ledger: Ledger) -> None:
    """Rates, images, text; data that are missing are named before anything is measured."""
    images = image_task(config.images, config.image_width) if config.image_evaluations else None
    text = text_task(config.text, config.tokens, config.width, config.layers, config.context) if config.steps else None
    _rates(config, ledger)
    if images is not None:
        loop = Loop(config.image_evaluations, config.image_batch, schedule="cosine", save_every=1000)
        contenders = [contender(name) for name in RULES]
        contest(ledger, images, contenders, loop, trials=config.trials, seeds=config.seeds, label={"part": "images"})
    if text is not None:
        _text(config, ledger, text)


def _rates(config: Config, ledger: Ledger) -> None:
    for estimator in ESTIMATORS:
        steps = config.evaluations // estimator.gradients

        def measured(lr: float, seed: int, phase: str, estimator=estimator, steps: int = steps) -> Row:
            case = {"part": "rates", "phase": phase, "optimizer": estimator.name, "lr": lr, "seed": seed}
            return ledger.measure(case, lambda: descend(estimator, lr, steps, config.copies, seed))

        tried = {lr: measured(lr, TUNING_SEED, "tune")["norms"][-1] for lr in config.lrs}
        best = min(tried, key=lambda lr: tried[lr])
        for seed in range(config.seeds):
            measured(best, seed, "final")
            measured(1.0, seed, "rate")


def _text(config: Config, ledger: Ledger, task: Task) -> None:
    loop = Loop(
        config.steps,
        config.batch,
        warmup=config.steps // 20,
        schedule="cosine",
        mixed_precision=config.precision,
        save_every=1000,
    )
    muon = contest(
        ledger, task, [contender("Muon")], loop, trials=config.trials, seeds=config.seeds, label={"part": "text"}
    )["Muon"][0]  # fmt: skip
    same = {key: [muon[key]] for key in ("lr", "aux_lr")}
    contest(
        ledger, task, [contender("MARS-M", same)], loop, trials=1, seeds=config.seeds, label={"part": "text"}, sampler="grid"
    )


CAPTIONS = {
    "rates": "Mean gradient norm over the second half of T steps against evaluations of the gradient, with the theorems' "
    "schedules at lr = t^-step: mean over seeds and their range; dashed the slopes that the theorems bound.",
    "images": "Final validation loss at equal evaluations of the gradient, every seed a dot, the bar their mean.",
}

EXPERIMENT = Experiment(
    "arXiv 2509.15816, 2512.16598, 2510.21800",
    Config(),
    FULL,
    run,
    check,
    pictures,
    CAPTIONS,
    lacks="Gluon-MVR's variants 1 and 3, whose rules were not at hand, and the L0, L1 smooth setting of its theorem.",
)
