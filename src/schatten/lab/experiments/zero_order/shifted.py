"""A pretrained model, the task that it is fine-tuned on, and the count of what is spent on it."""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schatten.lab import data, images
from schatten.lab.errors import InputError
from schatten.lab.experiments.zero_order.contenders import Contender, trained
from schatten.lab.fit import Loop, fit
from schatten.lab.models import GPT, MLP, GPTConfig
from schatten.lab.optimizers import build
from schatten.lab.tasks import Classification, NextToken, Task
from schatten.lab.tuning import Params

# What a backward costs, in forwards.
BACKWARD = 2

Weights = Mapping[str, Tensor]


def tasks(
    target: str, source: str, tokens: str, hidden: tuple[int, ...], gpt: tuple[int, int, int, int]
) -> tuple[NextToken | Classification, NextToken | Classification]:
    """Before and after: digits and the same digits one pixel to the right, or the texts `source` and `target`.

    Raises InputError for texts of different vocabularies.
    """
    if target == images.EMBEDDED:
        upright = images.load()
        moved = {part: torch.roll(getattr(upright, part), 1, -1) for part in ("train", "test")}
        first = Classification(upright, lambda: MLP((64, *hidden, 10)))
        return first, dataclasses.replace(first, data=dataclasses.replace(upright, **moved))
    context, layers, heads, width = gpt
    before, after = (data.load(name, tokens, context) for name in (source, target))
    if before.vocabulary != after.vocabulary:
        raise InputError(
            f"--data and --source must have one vocabulary, {target} has {after.vocabulary} tokens and {source} "
            f"{before.vocabulary}: give --tokens byte, or two folders made by one tokeniser."
        )
    first = NextToken(before, context, lambda: GPT(GPTConfig(before.vocabulary, context, layers, heads, width)))
    return first, dataclasses.replace(first, corpus=after)


def pretrained(task: Task, loop: Loop, seed: int, folder: Path | None) -> Weights:
    """The weights after Muon's training of `task`; kept in `folder`, if there is one, for runs that go on."""
    file = None if folder is None else folder / "weights.pt"
    if file is not None and file.exists():
        return torch.load(file, map_location="cpu", weights_only=True)
    kept: list[nn.Module] = []
    fit(
        task,
        lambda model: build("muon", model, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), aux={"lr": 3e-3}),
        loop,
        seed=seed,
        start=kept.append,
        folder=None if folder is None else folder / "training",
    )
    weights = {name: value.detach().cpu().clone() for name, value in kept[0].state_dict().items()}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, file)
    return weights


def adapted(task: Classification | NextToken, weights: Weights, rank: int) -> Classification | NextToken:
    """`task` begun at `weights`; with a `rank`, low-rank factors beside every linear layer are trained and nothing else."""

    def model() -> nn.Module:
        plain = task.build()
        plain.load_state_dict(dict(weights))
        return plain if rank == 0 else low_rank(plain, rank)

    return dataclasses.replace(task, build=model)


def low_rank(model: nn.Module, rank: int) -> nn.Module:
    """LoRA of `rank` on every linear layer whose weight is not tied to an embedding."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--weights lora needs peft: pip install peft.") from None
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m.weight) not in tables]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))  # type: ignore[arg-type]


@dataclass
class Counted:
    """A task that counts: `passes` are forwards, a backward being BACKWARD of them; evaluations are not counted."""

    task: Task
    passes: int = 0

    def model(self) -> nn.Module:
        return self.task.model()

    def batch(self, size: int, *, seed: int, step: int) -> tuple[Tensor, ...]:
        return self.task.batch(size, seed=seed, step=step)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        self.passes += 1 + (BACKWARD if torch.is_grad_enabled() else 0)
        return self.task.loss(model, *batch)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return self.task.evaluate(model, device)


@dataclass(frozen=True)
class Budget:
    """`passes` at most, in batches of `batch`, with an evaluation every `every` passes, until the loss `target`."""

    passes: int
    batch: int
    every: int
    target: float


def tuned(
    task: Task, contender: Contender, params: Params, budget: Budget, seed: int, folder: Path | None = None
) -> dict[str, Any]:
    """Fine-tune with a constant lr: `passes` to the target (inf: not within the budget), `spent`, `steps`, `curve`."""
    counted, curve = Counted(task), []
    each = 2 if contender.zero_order else 1 + BACKWARD

    def report(_: int, loss: float) -> bool:
        curve.append((counted.passes, loss))
        return loss <= budget.target

    loop = Loop(budget.passes // each, budget.batch, schedule="constant", eval_every=max(1, budget.every // each))
    build: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: contender.build(model, params)  # noqa: E731
    found = fit(counted, build, loop, seed=seed, closure=contender.zero_order, report=report, folder=folder)
    arrived = bool(curve) and found.loss <= budget.target
    return {
        "passes": float(counted.passes) if arrived else float("inf"),
        "spent": counted.passes,
        "steps": found.steps,
        "loss": found.loss,
        # Beyond the budget by how far the last loss is from the target, so that tuning has a slope to follow.
        "score": float(counted.passes) if arrived else budget.passes * found.loss / budget.target,
        "curve": curve,
    }


def memory(task: Task, contender: Contender, params: Params, batch: int) -> dict[str, float]:
    """Numbers of fp32 in units of the d that are trained: `held` between steps, weights among them, and the most that a
    step allocates besides (`extra`), activations of `batch` examples and gradients among it. On the CPU.
    """
    torch.manual_seed(0)
    model = task.model()
    optimizer = contender.build(model, params)
    examples = task.batch(batch, seed=0, step=0)

    def closure() -> Tensor:
        loss = task.loss(model, *examples)
        if torch.is_grad_enabled():
            loss.backward()
        return loss.detach()

    def step() -> None:
        if contender.zero_order:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
        optimizer.zero_grad()

    step()
    d = sum(p.numel() for p in trained(model))
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*trained(model), *state)}
    return {"d": d, "held": sum(held.values()) / 4 / d, "extra": _most_allocated(step) / 4 / d}


class _Live(TorchDispatchMode):
    """Sums the bytes of storages made while it is on, as long as they are held; `most` is their largest sum.

    What an operation of torch allocates and frees inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most, self._live = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage().data_ptr()) not in given | self._live.keys():
                self._live[key] = t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self._live.pop, key, None)
        self.most = max(self.most, sum(self._live.values()))
        return out


def _most_allocated(call: Callable[[], None]) -> int:
    """Bytes of tensors that `call` makes and holds at a time."""
    with _Live() as live:
        call()
    return live.most
