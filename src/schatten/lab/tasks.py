"""What a training run needs to know of its problem: a model, batches that are a function of seed and step, and a score."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schatten.lab.data import Corpus, batch, load, validation_windows
from schatten.lab.errors import named
from schatten.lab.images import Images
from schatten.lab.models import GPT, GPTConfig

# Examples or windows evaluated at once.
EVAL_BATCH = 256


class Task(Protocol):
    """`model()` draws fresh weights from torch's generator, `batch(size, seed=, step=)` is the same whoever asks."""

    def model(self) -> nn.Module: ...

    def batch(self, size: int, *, seed: int, step: int) -> tuple[Tensor, ...]: ...

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor: ...

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]: ...


@dataclass(frozen=True)
class Classification:
    """Images with labels and a model of `build()` that maps (batch, channels, height, width) to scores."""

    data: Images
    build: Callable[[], nn.Module]

    def model(self) -> nn.Module:
        return self.build()

    def batch(self, size: int, *, seed: int, step: int) -> tuple[Tensor, ...]:
        """Without replacement within an epoch: each epoch is a permutation of its own."""
        count = len(self.data.train_labels)
        first, last = step * size, (step + 1) * size
        epochs = range(first // count, (last - 1) // count + 1)
        orders = np.concatenate([np.random.default_rng((seed, epoch)).permutation(count) for epoch in epochs])
        index = torch.from_numpy(orders[first - epochs[0] * count : last - epochs[0] * count])
        return self.data.train[index], self.data.train_labels[index]

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean cross-entropy and accuracy on the test images."""
        total, right = torch.zeros((), device=device), torch.zeros((), device=device)
        for images, labels in zip(self.data.test.split(EVAL_BATCH), self.data.test_labels.split(EVAL_BATCH), strict=True):
            images, labels = images.to(device), labels.to(device)
            scores = model(images)
            total += F.cross_entropy(scores, labels, reduction="sum")
            right += (scores.argmax(-1) == labels).sum()
        count = len(self.data.test_labels)
        return {"loss": float(total) / count, "accuracy": float(right) / count}


@dataclass(frozen=True)
class NextToken:
    """A text and a model of `build()` whose forward(ids, targets) is the mean cross-entropy in nats."""

    corpus: Corpus
    context: int
    build: Callable[[], nn.Module]
    eval_windows: int = 256

    def model(self) -> nn.Module:
        return self.build()

    def batch(self, size: int, *, seed: int, step: int) -> tuple[Tensor, ...]:
        return batch(self.corpus.train, self.context, size, seed=seed, step=step)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        return model(*batch)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean loss over `eval_windows` fixed windows of the validation part."""
        ids, targets = validation_windows(self.corpus.validation, self.context, self.eval_windows)
        total = torch.zeros((), device=device)
        for x, y in zip(ids.split(EVAL_BATCH), targets.split(EVAL_BATCH), strict=True):
            total += model(x.to(device), y.to(device)) * len(x)
        return {"loss": float(total) / len(ids)}


def text_task(source: str, tokens: str, width: int, layers: int, context: int) -> NextToken:
    """A GPT with heads of width 16, of 64 from width 512 on, on the text of --text."""
    with named("--text"):
        corpus = load(source, tokens, context)
    heads = max(1, width // (64 if width >= 512 else 16))
    config = GPTConfig(vocabulary=corpus.vocabulary, context=context, layers=layers, heads=heads, width=width)
    return NextToken(corpus, context, lambda: GPT(config), eval_windows=64)
