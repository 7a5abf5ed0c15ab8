"""How much does the norm behind the step matter: msign, Frobenius, sign, rank one, and their mixtures?

Fanions (arXiv 2512.09678): D_k = sum over i <= k of u_i v_i^T of the Nesterov momentum S; k = 1 is Neon, k = r Muon. F-Muon is
half of Muon's direction and half of S / ||S||_F, S-Muon half of Muon's and half of eta_s sign(S).

table     the first table: iterations to F <= 1e-3 on a 500 x 500 convex problem, at the published lr and momentum of each
          method (`least_squares`), where both mixtures win.
images    published on CIFAR-10 (airbench, 200 runs): Muon 94.01, F-Muon 94.01, S-Muon 94.03, NSGD 91.6, SignSGD 91.54,
          Neon 69.8 per cent.
text      published on the NanoGPT speedrun: Muon 3.279, F-Muon 3.281, S-Muon 3.287.

On networks every member has the same number of trials over its lr, the lr of the AdamW beside it and, of S-Muon, eta_s;
momentum 0.95, no decay, Keller's shape factor but for sign steps. Without the files of CIFAR-10 the images are digits and the
text is small, so the numbers are out of reach and the orderings are what is compared. Models, ranges and steps of quick runs
are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schatten.lab.contest import contest
from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, Verdict, option
from schatten.lab.experiments.fanions import least_squares, networks
from schatten.lab.experiments.fanions.least_squares import SIZE, TARGET, Problem, iterations, methods
from schatten.lab.fit import Fit, Loop
from schatten.lab.ledger import Ledger, Row
from schatten.lab.plots import COLOURS
from schatten.lab.tasks import text_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    """The table at its published size, networks for a laptop."""

    seeds: int = 3
    problems: int = option(3, "Problems of the table, drawn by seeds 0 .. N-1.")
    size: int = option(SIZE, "Rows and columns of the table's X.")
    target: float = option(TARGET, "The value of F to reach.")
    trials: int = option(4, "Trials of the search for every optimizer of a network.")
    images: str = option("digits", "Images: digits or a folder of image files.")
    model: str = option("mlp", "Model of images: mlp or resnet.")
    image_width: int = option(64, "Its width.")
    image_batch: int = option(64, "Images in a batch.")
    image_steps: int = option(100, "Steps on images, 0 for none.")
    text: str = option("pydoc", "Text: pydoc, a file, or a folder with train.bin and val.bin.")
    tokens: str = option("byte", "Tokens of a text: byte, char or bpe:N.")
    width: int = option(64, "Width of the GPT.")
    layers: int = option(2, "Layers of the GPT.")
    context: int = option(32, "Tokens in a window.")
    batch: int = option(16, "Windows in a batch.")
    steps: int = option(80, "Steps on text, 0 for none.")
    precision: str = option("no", "Mixed precision: no, bf16 or fp16.")

    def __post_init__(self) -> None:
        if self.model not in networks.MODELS:
            raise InputError(f"--model must be one of {', '.join(networks.MODELS)}, got {self.model}.")
        if min(self.trials, self.problems, self.size) < 1:
            raise InputError(
                f"--trials, --problems and --size must be at least 1, got {self.trials}, {self.problems} and {self.size}."
            )


FULL = Config(
    seeds=10,
    problems=10,
    trials=20,
    images="data/cifar-10",
    model="resnet",
    image_width=64,
    image_batch=2000,
    image_steps=200,
    text="data/fineweb",
    width=768,
    layers=12,
    context=1024,
    batch=512,
    steps=1750,
    precision="bf16",
)


def run(config: Config, ledger: Ledger) -> None:
    """The table, images, text; data that are missing are named before anything is measured."""
    images = networks.image_task(config.images, config.model, config.image_width) if config.image_steps else None
    text = text_task(config.text, config.tokens, config.width, config.layers, config.context) if config.steps else None
    for method in methods():
        for seed in range(config.problems):
            case = {"method": method.name, "lr": method.lr, "momentum": method.momentum, "seed": seed}

            def compute(method=method, seed: int = seed) -> Row:
                return {"iterations": iterations(method, Problem.draw(config.size, seed), config.target)}

            ledger.measure(case, compute)
    trials, seeds = config.trials, config.seeds
    if images is not None:
        loop = Loop(config.image_steps, config.image_batch, schedule="linear", mixed_precision=config.precision, save_every=500)
        label = {"part": "images"}
        contest(ledger, images, networks.CONTENDERS, loop, trials=trials, seeds=seeds, label=label, extra=_accuracy)
    if text is not None:
        loop = Loop(config.steps, config.batch, schedule="linear", mixed_precision=config.precision, save_every=500)
        contest(ledger, text, networks.CONTENDERS[:4], loop, trials=trials, seeds=seeds, label={"part": "text"})


def _accuracy(found: Fit) -> Mapping[str, float]:
    return {"accuracy": found.scores.get("accuracy", 0.0)}


def check(rows: Sequence[Row]) -> list[Verdict]:
    """Numbers of the table, orderings on networks."""
    return [*least_squares.check(rows), *networks.check(rows)]


def pictures(rows: Sequence[Row]) -> "Mapping[str, Figure]":
    """`networks`: every seed a dot."""
    from matplotlib.figure import Figure

    panels = {"images": "final accuracy", "text": "final validation loss, nats"}
    found = {
        part: {c.name: seen for c in networks.CONTENDERS if (seen := networks.values(rows, part, c.name))} for part in panels
    }
    found = {part: shown for part, shown in found.items() if shown}
    if not found:
        return {}
    figure = Figure(figsize=(4.4 * len(found), 3.4), layout="constrained")
    for axes, (part, shown) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for i, (name, seen) in enumerate(shown.items()):
            axes.plot([i] * len(seen), seen, "o", color=COLOURS[i], alpha=0.7, label=name)
            axes.plot([i - 0.25, i + 0.25], [sum(seen) / len(seen)] * 2, color=COLOURS[i], linewidth=2)
        axes.set_xticks(range(len(shown)), list(shown), fontsize=8)
        axes.set_title(part, fontsize=10)
        axes.set_ylabel(panels[part])
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    return {"networks": figure}


EXPERIMENT = Experiment(
    "arXiv 2512.09678",
    Config(),
    FULL,
    run,
    check,
    pictures,
    {"networks": "Each member at its best params after equal trials: every seed a dot, the bar their mean."},
    lacks="the runs on GPT-2 medium and its fine-tuning, airbench's own network and the rescaling of its filters in each step.",
)
