"""How many forward passes does fine-tuning without gradients take, with JAGUAR Muon and with others?

    f+- = loss at W +- eps on a random block of rows and columns,   rho = (f+ - f-) / (2 eps),   eps = 1e-3
    M <- beta M + (1 - beta) rho on the block,   W <- W - lr msign(M)        (blocks of 10 % of rows and of columns)

Claimed: O(1) evaluations a step, 2 d + 1 numbers of memory for d parameters, and fine-tuning that matches or beats
first-order methods (the authors, on OPT, LLaMA and RoBERTa models, also with LoRA). Here Muon pretrains a small model, the
task changes, and the number of forward passes to a validation loss decides; a backward counts as two forwards. Passes are
counted where the loss is computed, not derived from the rule.

Contenders have the same number of trials on a seed of their own: `schatten.JaguarMuon`; the same with the sign on the block
for every parameter; one random direction with two losses (SPSA, as MeZO has it) and its sign; and with gradients Muon and
AdamW. lr is constant. Task, target and budget are ours: digits moved by one pixel with a perceptron, or a second text with a
GPT. The authors' models and prompts are not here.
"""

from dataclasses import dataclass
from typing import Any

from schatten.lab.contest import TUNING_SEED
from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.zero_order import shifted
from schatten.lab.experiments.zero_order.contenders import Contender, contenders
from schatten.lab.experiments.zero_order.verdicts import check, pictures
from schatten.lab.fit import Loop
from schatten.lab.ledger import Ledger, Row
from schatten.lab.tuning import Params, tune

WEIGHTS = ("all", "lora")


@dataclass(frozen=True)
class Config:
    """Quick is a perceptron on digits; full a GPT of 124M parameters, pretrained on one text and fine-tuned on another."""

    seeds: int = 5
    data: str = option("digits", "Fine-tuned on: 'digits', or a text, a folder of train.bin and val.bin, or hf:NAME.")
    source: str = option("pydoc", "Pretrained on, of texts; digits are pretrained on digits.")
    tokens: str = option("byte", "Tokens of texts: byte, char or bpe:N.")
    hidden: tuple[int, ...] = option((64,), "Widths of the perceptron's hidden layers.")
    gpt: tuple[int, ...] = option((32, 1, 2, 64), "Context, layers, heads and width of the GPT.")
    weights: tuple[str, ...] = option(("all",), "What is trained: all weights, lora, or both in turn.")
    rank: int = option(8, "Rank of LoRA.")
    batch: int = option(64, "Examples of a forward pass.")
    pretraining: int = option(150, "Steps of Muon's pretraining.")
    passes: int = option(2400, "Forward passes at most.")
    every: int = option(6, "Forward passes between evaluations.")
    target: float = option(1.2, "Validation loss to reach.")
    trials: int = option(6, "Settings tried for each contender.")


def run(config: Config, ledger: Ledger) -> None:
    """Pretrain once for every seed, then tune and run every contender."""
    if config.target <= 0:
        raise InputError(f"--target must be above 0, got {config.target:g}.")
    if len(config.gpt) != 4 or min(config.gpt) < 1:
        raise InputError(f"--gpt needs context, layers, heads and width, four numbers >= 1, got {config.gpt}.")
    if unknown := [w for w in config.weights if w not in WEIGHTS]:
        raise InputError(f"--weights has no {unknown[0]!r}: known are {', '.join(WEIGHTS)}.")
    if config.passes < 3:
        raise InputError(f"--passes must pay one step with gradients, 3, got {config.passes}.")
    context, layers, heads, width = config.gpt
    before, after = shifted.tasks(config.data, config.source, config.tokens, config.hidden, (context, layers, heads, width))
    first = Loop(config.pretraining, config.batch, save_every=1000)
    starts: dict[int, shifted.Weights] = {}

    def start(seed: int) -> shifted.Weights:
        if seed not in starts:
            starts[seed] = shifted.pretrained(before, first, seed, ledger.checkpoints({"pretrained": seed}))
        return starts[seed]

    for weights in config.weights:
        rank = config.rank if weights == "lora" else 0
        for contender in contenders(shifted.adapted(after, start(TUNING_SEED), rank).model()):
            _contend(config, ledger, contender, weights, lambda seed, rank=rank: shifted.adapted(after, start(seed), rank))


def _contend(config: Config, ledger: Ledger, contender: Contender, weights: str, task: Any) -> None:
    budget = shifted.Budget(config.passes, config.batch, config.every, config.target)
    label = {"weights": weights, "optimizer": contender.name}

    def measured(phase: str, params: Params, seed: int) -> Row:
        case = {**label, "phase": phase, **params, "seed": seed}

        def compute() -> Row:
            found = shifted.tuned(task(seed), contender, params, budget, seed, ledger.checkpoints(case))
            return {**found, "zero_order": contender.zero_order, "budget": config.passes, "target": config.target}

        return ledger.measure(case, compute)

    # Of Optuna's seed 0 the first six draws of a lone lr lie in one third of its range.
    best = tune(lambda params: measured("tune", params, TUNING_SEED)["score"], contender.space, config.trials, seed=TUNING_SEED)
    for seed in range(config.seeds):
        measured("final", best.params, seed)
    case = {**label, "phase": "memory", "seed": TUNING_SEED}
    ledger.measure(case, lambda: shifted.memory(task(TUNING_SEED), contender, best.params, config.batch))


EXPERIMENT = Experiment(
    "arXiv 2506.04430",
    Config(),
    Config(
        data="data/shakespeare",
        source="data/openwebtext",
        gpt=(1024, 12, 12, 768),
        weights=WEIGHTS,
        rank=16,
        batch=16,
        pretraining=20_000,
        passes=40_000,
        every=200,
        target=3.4,
        trials=8,
    ),
    run,
    check,
    pictures,
    {"passes": "Validation loss while fine-tuning against forward passes, a backward counting as two: means over seeds."},
    lacks="The published models (OPT, LLaMA, RoBERTa) and prompts; the gradient-free accuracy tables cannot be compared.",
)
