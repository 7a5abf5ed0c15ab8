"""Does decay hold the weights of Muon in the ball ||W||_op <= 1/lambda, and from when on?

Claim: Muon with decoupled decay lambda solves min F subject to ||W||_op <= 1/lambda. Outside, V_B = max(||W||_op - 1/lambda, 0)
shrinks by 1 - lr lambda at each step whatever the gradients are; inside, V_K = F - F* + C (||M||_nuc + <lambda W, M>) falls,
though the loss may not. (M averages the gradient here, minus the gradient in the paper.)

Source: Chen, Li and Liu, "Muon Optimizes Under Spectral Norm Constraints", figures 1 to 6. All its numbers are read off curves
or second-hand; of the toy only lambda (1.25 inside, 4 outside) and of the networks only lambda (2 and 4) and the iterations of
figure 4 (0, 400, 2000) are known. Ours, because nothing was published:

    toy        the diagonal d of a 2 x 2 matrix, F = (d - d*)^T A (d - d*) / 2, A = [[1, 0.6], [0.6, 1]], betas (0.9, 0.99),
               lr 0.002, implicit decay, starts drawn by the seed
    networks   lr, batch, warm-up of a twentieth, a constant lr and a cool-down; momentum 0.95, explicit decay, no shape factor
               (so that the radius is 1/lambda), AdamW with lr 3e-3 and no decay for heads, embeddings and vectors
    GPT        starts with the spectral norms of width 768: nanoGPT's standard deviation 0.02 times sqrt(768 / width)

The 400 iterations of figure 4 are a statement about lambda times the sum of lr. Directions are exact (SVD), or of the default
polynomial, whose singular values end within 1.16 and which so holds weights within 1.16/lambda; on the MLP Keller Jordan's five
quintics too, within 1.203/lambda.
Figure 6 compares with AdamW, whose settings are not published: four lr, decay 0.1, and the claim is tried against each.
A run that was interrupted goes on with the next case; a training that was cut off starts anew, as what it had measured is lost.
"""

from dataclasses import dataclass

from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.spectral_ball import networks, toy
from schatten.lab.experiments.spectral_ball.comparison import check
from schatten.lab.experiments.spectral_ball.figures import CAPTIONS, pictures
from schatten.lab.ledger import Ledger


@dataclass(frozen=True)
class Config:
    """Networks small enough for a laptop; the published ones are ResNet-18 on CIFAR-10 and GPTs of 100M parameters and more."""

    seeds: int = 3
    toy_steps: int = option(1500, "Steps of the two-singular-value toy.")
    networks: tuple[str, ...] = option(("mlp", "resnet", "gpt"), "Of mlp, resnet and gpt.")
    decays: tuple[float, ...] = option((2.0, 4.0), "Decays lambda of Muon.")
    solvers: tuple[str, ...] = option(("exact", "polynomial", "keller"), "Of exact, polynomial and keller (MLP only).")
    steps: int = option(200, "Steps of a training.")
    lr: float = option(0.02, "Peak lr of Muon: the spectral norm of an update.")
    adamw_lrs: tuple[float, ...] = option((3e-4, 1e-3, 3e-3, 1e-2), "Peak lrs of AdamW against Muon on the GPT.")
    every: int = option(8, "Steps between two measurements.")
    data: str = option("digits", "Images: digits, or a folder of MNIST or CIFAR-10 files.")
    text: str = option("pydoc", "Text of the GPT, as of `schatten train`.")
    batch: int = option(32, "Images of a step.")
    windows: int = option(16, "Windows of text of a step.")
    hidden: tuple[int, ...] = option((64, 64), "Widths of the MLP's hidden layers.")
    widths: tuple[int, ...] = option((16, 16), "Channels of the ResNet's stages.")
    blocks: tuple[int, ...] = option((1, 1), "Blocks of the ResNet's stages.")
    layers: int = option(2, "Blocks of the GPT.")
    heads: int = option(4, "Heads of the GPT.")
    width: int = option(64, "Width of the GPT.")
    context: int = option(32, "Context of the GPT.")
    precision: str = option("no", "Mixed precision: no, bf16 or fp16.")


FULL = Config(
    steps=2000,
    every=20,
    batch=128,
    windows=256,
    data="cifar10",
    text="openwebtext",
    hidden=(512, 256),
    widths=(64, 128, 256, 512),
    blocks=(2, 2, 2, 2),
    layers=12,
    heads=12,
    width=768,
    context=1024,
    precision="bf16",
)


def run(config: Config, ledger: Ledger) -> None:
    """The toy, every network under Muon, and the GPT under AdamW; data that are missing are named first."""
    tasks = networks.tasks(config)
    for case in toy.CASES:
        for seed in range(config.seeds):
            ledger.measure(
                {"part": "toy", "case": case.name, "steps": config.toy_steps, "seed": seed},
                lambda case=case, seed=seed: toy.measured(case, seed, config.toy_steps),
            )
    for name, solver, decay in networks.trainings(config):
        for seed in range(config.seeds):
            ledger.measure(
                {"part": "network", "network": name, "solver": solver, "decay": decay, "lr": config.lr, "seed": seed},
                lambda name=name, solver=solver, decay=decay, seed=seed: networks.muon(
                    config, tasks[name], solver, decay, seed
                ),
            )
    for lr in config.adamw_lrs if "gpt" in tasks else ():
        for seed in range(config.seeds):
            ledger.measure(
                {"part": "adamw", "network": "gpt", "lr": lr, "seed": seed},
                lambda lr=lr, seed=seed: networks.adamw(config, tasks["gpt"], lr, seed),
            )


EXPERIMENT = Experiment(
    "arXiv 2506.15054",
    Config(),
    FULL,
    run,
    check,
    pictures,
    CAPTIONS,
    lacks="ViT-B/16 and ResNet-50 on ImageNet and the Qwen and LLaMA models of figures 5 and 6.",
)
