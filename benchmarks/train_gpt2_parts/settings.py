"""What a run is: its model, data, loop and learning rates, from the command line, checked before anything is built."""

import math
from argparse import Namespace
from dataclasses import dataclass, replace

import torch

from schatten.lab.data import Corpus
from schatten.lab.errors import InputError
from schatten.lab.models import GPTConfig
from schatten.lab.schedule import SCHEDULES

SCHATTEN, TORCH, ADAMW = "schatten.Muon", "torch.optim.Muon+AdamW", "AdamW"

OPTIMIZERS = (SCHATTEN, TORCH, ADAMW)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Quartiles of the second half of the steps need two of them.
FEWEST = 4


@dataclass(frozen=True)
class Size:
    """A GPT and the loop that suits it; `vocabulary` 0 is the data's own, `batch` is a GPU's, `cpu_batch` a CPU's."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int
    batch: int
    cpu_batch: int
    steps: int
    lr: float
    eval_windows: int


# GPT-2's table of 50,257 rows is padded to a multiple of 128, whose products are faster. 6e-4 is nanoGPT's lr for it;
# over 48 steps of the tiny one AdamW's loss was 3.69, 3.29, 3.24, 3.19 at lr 1e-3, 3e-3, 1e-2, 3e-2.
SIZES = {
    "gpt2": Size(12, 12, 768, 1024, 50304, batch=64, cpu_batch=1, steps=400, lr=6e-4, eval_windows=128),
    "tiny": Size(2, 4, 64, 64, 0, batch=8, cpu_batch=8, steps=48, lr=1e-2, eval_windows=32),
}

# Bytes of memory for 64 windows of 1024 tokens of GPT-2, compiled and in bf16: an estimate with a reserve, as a batch that
# does not fit is halved. Without the compiler logits, their softmax and their gradient are kept in fp32 as well.
FULL_MEMORY = 70 * 2**30


@dataclass(frozen=True)
class Settings:
    """`batch` windows of a micro-batch, `accumulate` of which make a step; `lrs` has the peak of each optimizer's lr.

    `warmup` and `eval_every` None follow from the steps; `chosen` says that the batch was not asked for and may be halved.
    """

    device: str
    size: str
    steps: int
    batch: int
    context: int
    accumulate: int
    lrs: dict[str, float]
    compiled: bool
    backend: str
    dtype: str
    weight_decay: float
    schedule: str
    warmup: int | None
    clip: float
    eval_every: int | None
    eval_windows: int
    minutes: float | None
    seed: int
    chosen: bool

    @property
    def windows(self) -> int:
        return self.batch * self.accumulate

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.windows * self.context

    def warmup_of(self, steps: int) -> int:
        return steps // 10 if self.warmup is None else self.warmup

    def evaluations(self, steps: int) -> list[int]:
        """Numbers of steps after which the validation loss is taken; the last is `steps`."""
        every = max(1, steps // 8) if self.eval_every is None else self.eval_every
        return sorted({*range(every, steps + 1, every), steps})

    def halved(self) -> "Settings":
        """Half the micro-batch and twice as many; raises InputError where that is not ours to choose."""
        if self.chosen and self.batch > 1:
            return replace(self, batch=self.batch // 2, accumulate=2 * self.accumulate)
        raise InputError(
            f"--batch {self.batch} of --context {self.context} does not fit into the memory of {device_name(self.device)}: "
            f"take a smaller --batch and a larger --accumulate."
        )


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def settings(args: Namespace) -> Settings:
    """The run that `args` ask for, on this machine; raises InputError, naming the flag, for what cannot be."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU that torch can use, and there is none: take --device cpu.")
    name = args.size or ("gpt2" if device == "cuda" else "tiny")
    size = SIZES[name]
    dtype = args.dtype or ("bf16" if device == "cuda" else "fp32")
    if device == "cuda" and dtype == "bf16" and not torch.cuda.is_bf16_supported():
        raise InputError(f"--dtype bf16 is not supported by {device_name(device)}: take --dtype fp32.")
    compiled = device == "cuda" if args.compile is None else args.compile
    backends = [*torch.compiler.list_backends(), "eager"] if compiled else [args.compile_backend]
    if args.compile_backend not in backends:
        raise InputError(f"--compile-backend must be one of {', '.join(backends)}, got {args.compile_backend!r}.")
    context = _default(args.context, size.context)
    found = Settings(
        device=device,
        size=name,
        steps=_default(args.steps, size.steps),
        batch=_default(args.batch, _fitting(size, device, context, compiled and dtype == "bf16")),
        context=context,
        accumulate=_default(args.accumulate, 1),
        lrs=_lrs(args, size),
        compiled=compiled,
        backend=args.compile_backend,
        dtype=dtype,
        weight_decay=args.weight_decay,
        schedule=args.schedule,
        warmup=args.warmup,
        clip=args.clip,
        eval_every=args.eval_every,
        eval_windows=_default(args.eval_windows, size.eval_windows),
        minutes=args.minutes,
        seed=args.seed,
        chosen=args.batch is None and args.accumulate is None,
    )
    _check(found)
    return found


def _default(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def _fitting(size: Size, device: str, context: int, lean: bool) -> int:
    """The size's batch, halved until the GPU's memory should hold it: `lean` is compiled and in bf16."""
    if device != "cuda":
        return size.cpu_batch
    need = FULL_MEMORY * max(1.0, context / size.context) * (1 if lean else 2)
    halvings = math.ceil(math.log2(max(1.0, need / torch.cuda.get_device_properties(0).total_memory)))
    return max(1, size.batch >> halvings)


def _lrs(args: Namespace, size: Size) -> dict[str, float]:
    names = list(dict.fromkeys(filter(None, (name.strip() for name in args.optimizers.split(",")))))
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown or not names:
        raise InputError(f"--optimizers takes some of {','.join(OPTIMIZERS)}, got {','.join(unknown) or 'none'}.")
    if TORCH in names and getattr(torch.optim, "Muon", None) is None:
        raise InputError(f"--optimizers {TORCH} needs torch 2.9 or later, this is {torch.__version__}: leave it out.")
    flags = {
        SCHATTEN: ("--lr-schatten", args.lr_schatten),
        TORCH: ("--lr-torch", args.lr_torch),
        ADAMW: ("--lr-adamw", args.lr_adamw),
    }
    found = {}
    for name in names:
        flag, own = flags[name]
        flag, lr = (flag, own) if own is not None else ("--lr", args.lr if args.lr is not None else size.lr)
        if not (0 < lr < math.inf):
            raise InputError(f"{flag} must be a positive number, got {lr:g}.")
        found[name] = lr
    return found


def _check(s: Settings) -> None:
    least = {
        "--steps": (s.steps, FEWEST),
        "--batch": (s.batch, 1),
        "--context": (s.context, 1),
        "--accumulate": (s.accumulate, 1),
        "--eval-windows": (s.eval_windows, 1),
        "--eval-every": (1 if s.eval_every is None else s.eval_every, 1),
        "--warmup": (s.warmup or 0, 0),
        "--seed": (s.seed, 0),
        "--weight-decay": (s.weight_decay, 0),
        "--clip": (s.clip, 0),
    }
    for flag, (value, bound) in least.items():
        if not (bound <= value < math.inf):
            raise InputError(f"{flag} must be at least {bound}, got {value:g}.")
    if s.minutes is not None and not (0 < s.minutes < math.inf):
        raise InputError(f"--minutes must be a positive number, got {s.minutes:g}.")
    if s.warmup is not None and s.warmup >= s.steps:
        raise InputError(f"--warmup must end before the last of --steps {s.steps}, got {s.warmup}.")
    if s.schedule not in SCHEDULES:
        raise InputError(f"--schedule must be one of {', '.join(SCHEDULES)}, got {s.schedule!r}.")


def gpt_config(s: Settings, corpus: Corpus) -> GPTConfig:
    """The model's sizes; raises InputError for tokens that its table has no row for."""
    size = SIZES[s.size]
    if 0 < size.vocabulary < corpus.vocabulary:
        raise InputError(
            f"--data {corpus.source} has tokens up to {corpus.vocabulary - 1:,}, --size {s.size} has {size.vocabulary:,}: give "
            f"tokens of GPT-2's vocabulary, or --size tiny."
        )
    return GPTConfig(size.vocabulary or corpus.vocabulary, s.context, size.layers, size.heads, size.width)
