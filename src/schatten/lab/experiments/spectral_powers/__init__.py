"""Which power U S^p V^T of momentum, and of Adam's ratio, trains a GPT best, and over how wide a range of learning rates?

"Muon and beyond" (2602.04669) takes Psi_p(O) = U S^p V^T of the momentum sum (mSGD, mSGDS, mSGDQ, mSGDZ = Muon for p = 1,
1/2, 1/4, 0) or of Adam's ratio of moments (Adam, AdamS, AdamQ, AdamZ) and sweeps the matrix learning rate of each:

    buf <- 0.9 buf + g,  W <- W - lr Psi_p(buf)         m, v <- averages of g, g^2,  W <- W - lr Psi_p(m' / (sqrt(v') + eps))

on GPT-2 124M, 98.3 billion tokens of OpenWebText, one seed. Its bests are 2.870 to 2.879 in the Adam family and 2.887 to
3.092 on momentum; its findings: AdamS is best, Muon no better than Adam, ratios train more stably than momentum, and
orthogonalisation widens the range of usable lr on momentum. An independent run of 0.8M parameters found Muon ahead of Adam.

As released: all tensors of two or more dimensions are matrices, the tied embedding too, vectors get AdamW at 3e-4; no decay,
clip 1, linear warm-up (1 %) and cosine; betas (0.9, 0.95). `--full` has the published size, grids and iterations and needs
nanoGPT's OpenWebText bins (`--data`). Ours: the cosine ends at 0, not at 1e-6 or 3e-6; query, key and value are separate
weights, which the released code splits; each variant's lr is chosen on a seed of its own, and its loss is that of others.

The small size is ours throughout: a byte GPT of one block, 68,000 parameters, on the text of Python's documentation (two
blocks still predict letter frequencies when its Adam has moved on), one token per parameter where the paper has 790, warm-up
over a tenth of the steps, powers by the tower and the polar factor by `polynomial()`. Every variant has six lr's, a factor
2.5 apart, about a centre of its own, as best lr's change with size. Powers in between are not tuned: their lr interpolates
their neighbours' best. A run that ends above the loss of a uniform guess counts as diverged, inf. The width of a range is
the factor between the lr's whose loss is within 5 % of the variant's best (1 % at 124M); a variant that learns little in
these steps has a wide one, so that of a common level of loss is given beside it. A spike is the largest rise of the
training loss, averaged over five steps, above its lowest earlier value.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from schatten.lab import data
from schatten.lab.contest import Contender, contest
from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.spectral_powers import variants
from schatten.lab.experiments.spectral_powers.comparison import WIDTHS, check
from schatten.lab.experiments.spectral_powers.pictures import CAPTIONS, pictures
from schatten.lab.experiments.spectral_powers.published import ADAM, MSGD, POWERS, name
from schatten.lab.fit import Fit, Loop, fit
from schatten.lab.ledger import Ledger
from schatten.lab.models import GPT, GPTConfig
from schatten.lab.tasks import NextToken
from schatten.lab.tuning import Params


@dataclass(frozen=True)
class Config:
    """Model, data, schedule and grids."""

    seeds: int = 3
    between: tuple[float, ...] = option((0.125, 0.75), "Exponents p beside 0, 1/4, 1/2 and 1, not tuned.")
    data: str = option(data.EMBEDDED, "A text, or a folder with nanoGPT's train.bin and val.bin.")
    tokens: str = option("byte", "byte, char or bpe:N; bins bring their own.")
    vocabulary: int = option(0, "Rows of the embedding, padding included; 0 for that of the data.")
    layers: int = option(1, "Transformer blocks.")
    heads: int = option(2, "Attention heads.")
    width: int = option(64, "Model width.")
    context: int = option(32, "Tokens of a window.")
    batch: int = option(16, "Windows of a step, over all processes.")
    accumulate: int = option(1, "Pieces a step's windows are computed in.")
    steps: int = option(120, "Optimizer steps.")
    warmup: int = option(12, "Steps of linear warm-up.")
    eval_windows: int = option(256, "Validation windows.")
    eval_every: int = option(0, "Steps between evaluations; 0 for the end alone.")
    save_every: int = option(0, "Steps between checkpoints; 0 for none.")
    mixed_precision: str = option("no", "no, bf16 or fp16.")
    lrs: int = option(6, "Learning rates of every variant.")
    factor: float = option(2.5, "Between neighbouring lr's.")
    published: bool = option(False, "The published lr's and iterations.")


FULL = Config(
    between=(),
    data="openwebtext",
    vocabulary=50304,
    layers=12,
    heads=12,
    width=768,
    context=1024,
    batch=480,
    accumulate=2,
    steps=200_000,
    warmup=2000,
    eval_windows=6000,
    eval_every=1000,
    save_every=1000,
    mixed_precision="bf16",
    published=True,
)


def run(config: Config, ledger: Ledger) -> None:
    """Tune and run the eight, then powers in between, then the other lr's of mSGD and mSGDZ on more seeds.

    Raises InputError for data that is not there, a vocabulary that is too small for it, and powers beyond (0, 1).
    """
    wrong = [p for p in config.between if not 0 < p < 1]
    if wrong:
        raise InputError(f"--between must lie within (0, 1), got {wrong[0]:g}.")
    corpus = data.load(config.data, config.tokens, config.context)
    vocabulary = config.vocabulary or corpus.vocabulary
    if vocabulary < corpus.vocabulary:
        raise InputError(f"--vocabulary {vocabulary} is less than the {corpus.vocabulary} tokens of --data {config.data}.")
    sizes = GPTConfig(vocabulary, config.context, config.layers, config.heads, config.width)
    task = NextToken(corpus, config.context, lambda: GPT(sizes), config.eval_windows)
    loop = Loop(
        config.steps,
        config.batch,
        warmup=config.warmup,
        clip=1.0,
        accumulate=config.accumulate,
        mixed_precision=config.mixed_precision,
        eval_every=config.eval_every,
        save_every=config.save_every,
    )

    def score(found: Fit) -> float:
        return variants.score(found, vocabulary)

    def spike(found: Fit) -> dict[str, float]:
        return {"spike": variants.spike([loss for _, loss in found.train])}

    def measured(family: str, p: float, phase: str, lr: float, seed: int) -> None:
        case = {"family": family, "p": p, "phase": phase, "optimizer": name(family, p), "lr": lr, "seed": seed}

        def compute() -> dict[str, float]:
            built = partial(variants.build, family=family, p=p, lr=lr, released=config.published)
            found = fit(task, built, loop, seed=seed, folder=ledger.checkpoints(case))
            return {"score": score(found), **spike(found)}

        ledger.measure(case, compute)

    for family in (MSGD, ADAM):
        best = {}
        for p in POWERS:
            lrs = variants.grid(family, p, config.lrs, config.factor, config.published)

            def build(model: nn.Module, params: Params, family: str = family, p: float = p) -> torch.optim.Optimizer:
                return variants.build(model, family, p, params["lr"], config.published)

            contender = Contender(name(family, p), build, {"lr": lrs})
            settings: dict[str, Any] = {"trials": len(lrs), "seeds": config.seeds, "sampler": "grid"}
            label = {"family": family, "p": p}
            finals = contest(ledger, task, [contender], loop, label=label, score=score, extra=spike, **settings)
            best[p] = finals[contender.name][0]["lr"]
            if (family, p) in WIDTHS:
                # With the tuning seed as many grids as seeds; a grid's best lr is among the finals.
                for seed in range(config.seeds - 1):
                    for lr in lrs:
                        if lr != best[p]:
                            measured(family, p, "grid", lr, seed)
        for p in config.between:
            for seed in range(config.seeds):
                measured(family, p, "between", variants.between(p, best), seed)


EXPERIMENT = Experiment(
    "arXiv 2602.04669",
    Config(),
    FULL,
    run,
    check,
    pictures,
    CAPTIONS,
    "More than one seed of every lr of the other six, decay (0 in the paper), and tuned powers in between.",
)
