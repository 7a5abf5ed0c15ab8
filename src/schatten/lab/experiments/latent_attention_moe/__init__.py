"""Does Muon halve AdamW's training of a decoder with latent attention and a mixture of experts?

The paper, of decoders of 30 to 200 million parameters: Muon reaches AdamW's loss with 48-52 % of its training; latent
attention, a mixture of experts and Muon together have 68 % less memory, 3.2 times the inference speed and 8-12 % less
perplexity than what they replace (all from its abstract: one small study, which does not say there which memory, nor at
which context). Its rule is Muon's: msign of the momentum for hidden matrices and for every expert on its own, AdamW for
the rest, the router among it.

The models are `lab.models.LatentMoE` and, as what is replaced, a `GPT` with as many parameters in all. Each is trained by
both optimizers, each tuned by the same number of trials: lr, decay, and for Muon the lr of the AdamW
beside it. Since nothing was published, these are ours:

- The target is the loss that AdamW ends with, seed by seed. Muon is trained anew on shorter schedules, each of which comes
  down to zero; where the line through their losses meets the target is its share of AdamW's steps. The first step of one
  long run below the target would come later, since there the lr is still high.
- Compute is the products of a step, forward, backward and optimizer, as torch counts them; seconds are shown besides.
- Memory is the bytes of weights and optimizer state, and those of the cache for a token.
- Inference is the next token of `batch` texts, each after `decode` tokens. Latent attention forms no key or value then.

The share hangs on how long AdamW is trained, and quick trains it briefly: on the sparse model it then is just leaving the
loss of single letters, and Muon needs about a third of its steps. In one run each on seed 0, with quick's sizes but 1200
steps, AdamW ended at 1.618 and Muon on 600 steps at 1.630, so at about one half. A start with weights three times nanoGPT's
0.02, which is meant for a width of 768, lowers AdamW's loss after 240 steps by 0.12 and Muon's by 0.03.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from schatten.lab import data, optimizers
from schatten.lab.contest import Contender, contest
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.latent_attention_moe.comparison import check
from schatten.lab.experiments.latent_attention_moe.measures import BETAS, cost, next_token
from schatten.lab.experiments.latent_attention_moe.pictures import CAPTIONS, pictures
from schatten.lab.experiments.latent_attention_moe.spaces import SPACES
from schatten.lab.fit import Loop, fit
from schatten.lab.ledger import Ledger, Row
from schatten.lab.models import GPT, GPTConfig, LatentMoE, LatentMoEConfig
from schatten.lab.tasks import NextToken
from schatten.lab.tuning import Params

EVAL_WINDOWS = 128

# Evaluations of a run, and steps between checkpoints.
EVALUATIONS = 5
SAVE_EVERY = 1000

# Timings of the next token, of which each is the fastest of a few.
ROUNDS = 8


@dataclass(frozen=True)
class Config:
    """Sizes of the two models and of their training."""

    seeds: int = 3
    trials: int = option(6, "Settings tried for each optimizer and model.")
    steps: int = option(176, "Optimizer steps.")
    horizons: tuple[float, ...] = option((0.2, 0.4, 0.7), "Shares of the steps that Muon is also trained for.")
    batch: int = option(16, "Windows in a step.")
    accumulate: int = option(1, "Pieces that a step's windows are computed in.")
    data: str = option("pydoc", "Text: a file, a folder of nanoGPT's .bin files, hf:NAME or pydoc.")
    tokens: str = option("byte", "byte, char or bpe:N.")
    context: int = option(32, "Tokens in a window.")
    decode: int = option(4096, "Tokens in the cache when inference is timed.")
    layers: int = option(2, "Blocks.")
    heads: int = option(4, "Heads of attention.")
    width: int = option(64, "Width of both models.")
    latent: int = option(24, "Numbers of the latent that keys and values are made of.")
    rotary: int = option(8, "Dimensions of a key that carry its position.")
    experts: int = option(8, "Experts of a block, beside the shared one.")
    active: int = option(2, "Experts that see a token.")
    hidden: int = option(20, "Units of an expert.")
    precision: str = option("no", "accelerate's mixed precision: no, bf16 or fp16.")


FULL = Config(
    trials=12,
    steps=10_000,
    batch=480,
    accumulate=20,
    data="data/openwebtext",
    context=1024,
    decode=8192,
    layers=12,
    heads=12,
    width=768,
    latent=192,
    rotary=32,
    hidden=248,
    precision="bf16",
)


def models(config: Config, vocabulary: int) -> dict[str, Callable[[int], GPT | LatentMoE]]:
    """The two models of a size, at a context."""
    sparse = LatentMoEConfig(
        vocabulary,
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        latent=config.latent,
        rotary=config.rotary,
        experts=config.experts,
        active=config.active,
        hidden=config.hidden,
    )
    dense = GPTConfig(vocabulary, layers=config.layers, heads=config.heads, width=config.width)
    return {"latent-moe": lambda context: LatentMoE(sparse), "gpt": lambda context: GPT(replace(dense, context=context))}


def build(optimizer: str, model: nn.Module, params: Params) -> torch.optim.Optimizer:
    """An optimizer of SPACES with params of its space."""
    aux = {"lr": params["aux_lr"]} if "aux_lr" in params else None
    return optimizers.build(optimizer, model, lr=params["lr"], weight_decay=params["weight_decay"], betas=BETAS, aux=aux)


def run(config: Config, ledger: Ledger) -> None:
    """Both models by both optimizers, Muon's shorter schedules, and what a step, its memory and a next token cost."""
    corpus = data.load(config.data, config.tokens, config.context)
    contenders = [Contender(name, partial(build, name), space) for name, space in SPACES.items()]
    for name, model in models(config, corpus.vocabulary).items():
        task = NextToken(corpus, config.context, partial(model, config.context), eval_windows=EVAL_WINDOWS)
        label = {"model": name}
        found = contest(
            ledger,
            task,
            contenders,
            loop(config, config.steps),
            trials=config.trials,
            seeds=config.seeds,
            label=label,
            extra=lambda found: {"curve": found.curve},
        )
        if name == "latent-moe":
            best = {key: found["muon"][0][key] for key in SPACES["muon"]}
            for horizon in config.horizons:
                for seed in range(config.seeds):
                    case = {**label, "phase": "horizon", "optimizer": "muon", **best, "horizon": horizon, "seed": seed}
                    ledger.measure(case, lambda c=case, t=task: shorter(config, ledger, t, c))
        for optimizer in SPACES:
            case = {**label, "phase": "cost", "optimizer": optimizer}
            ledger.measure(case, lambda m=model, o=optimizer: cost(m(config.context), o, config.batch, config.context))
    # In turns, so that what else the machine does slows down both.
    for i in range(ROUNDS):
        for name, model in models(config, corpus.vocabulary).items():
            case = {"model": name, "phase": "decode", "round": i}
            ledger.measure(case, lambda m=model: {"seconds": next_token(m(config.decode), config.batch, config.decode)})


def loop(config: Config, steps: int) -> Loop:
    """A training of `steps`, with a warm-up and an evaluation at equal shares of it."""
    return Loop(
        steps,
        config.batch,
        warmup=steps // 20,
        clip=1.0,
        accumulate=config.accumulate,
        mixed_precision=config.precision,
        eval_every=max(1, steps // EVALUATIONS),
        save_every=SAVE_EVERY,
    )


def shorter(config: Config, ledger: Ledger, task: NextToken, case: Row) -> Row:
    """The loss of Muon on a schedule of a share of the steps, at the params of `case`."""
    own = loop(config, max(1, round(case["horizon"] * config.steps)))
    found = fit(task, lambda m: build("muon", m, case), own, seed=case["seed"], folder=ledger.checkpoints(case))
    return {"loss": found.loss, "steps": found.steps, "seconds": found.seconds}


EXPERIMENT = Experiment(
    "arXiv 2509.24406",
    Config(),
    FULL,
    run,
    check,
    pictures,
    CAPTIONS,
    lacks="Activations are in no memory shown here, and batches of the size at which the paper finds Muon's lead growing.",
)
