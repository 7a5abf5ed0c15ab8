"""What `schatten advise` reads: a model with weights, and losses of batches, from names that a user types."""

import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schatten.diagnostics.hessian import Loss
from schatten.lab import data, zoo
from schatten.lab.errors import InputError
from schatten.lab.models import GPT, GPTConfig

# The comparison's own model, for a first look.
DEMO = "gpt"

Evaluate = Callable[[nn.Module, Any], Tensor]


def build(name: str, vocabulary: int, context: int) -> nn.Module:
    """The model of MODEL with weights: `gpt`, one of `zoo.MODELS` of a size to train here, or one's own function's."""
    if name == DEMO:
        return GPT(GPTConfig(vocabulary, context))
    if name in zoo.MODELS:
        with torch.device("meta"):
            size = sum(p.numel() for p in zoo.MODELS[name]().parameters())
        if size > 2e9:
            raise InputError(f"MODEL {name} has {size / 1e9:.0f} billion parameters, too many to differentiate twice here.")
        return zoo.MODELS[name]()
    model = imported(name, "MODEL", f"{DEMO}, {', '.join(zoo.MODELS)}")()
    if not isinstance(model, nn.Module):
        raise InputError(f"MODEL {name} must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def imported(name: str, option: str, known: str = "") -> Callable[..., Any]:
    """What `package.module:function` names, looked for in the present folder, too."""
    module, separator, function = name.partition(":")
    if not separator or not module or not function:
        others = f"; known are {known}" if known else ""
        raise InputError(f"{option} has no {name!r}{others}; for your own write package.module:function.")
    sys.path.insert(0, "")  # as `python -m` has it
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{option} {name} cannot be imported: {error}.") from None
    if not callable(found):
        raise InputError(f"{option} {name} must be a function, got {type(found).__name__}.")
    return found


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a checkpoint's weights: safetensors, or torch.save's, of which nothing but tensors is unpickled."""
    if not file.is_file():
        raise InputError(f"--checkpoint {file} does not exist.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            saved: Any = load_file(file)
        else:
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged or foreign file each reader has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--checkpoint {file} holds no weights that can be read: {reason}") from None
    for key in ("model", "state_dict", "model_state_dict"):
        saved = saved[key] if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping) else saved
    if not isinstance(saved, Mapping) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise InputError(f"--checkpoint {file} must hold tensors by name, got {type(saved).__name__}.")
    try:
        missing, unexpected = model.load_state_dict(dict(saved), strict=False)
    except RuntimeError as error:
        raise InputError(f"--checkpoint {file} is of another model: {str(error).splitlines()[-1].strip()}") from None
    # Tied weights are stored once.
    own = model.state_dict(keep_vars=True)
    told = {id(own[name]) for name in saved if name in own}
    absent = [name for name in missing if id(own[name]) not in told]
    if absent or unexpected:
        word, names = ("lacks", absent) if absent else ("has the unknown", unexpected)
        raise InputError(
            f"--checkpoint {file} is of another model: it {word} {', '.join(names[:3])}{', ...' * (len(names) > 3)}."
        )


def is_own_data(name: str) -> bool:
    """Whether DATA is package.module:function, not a text."""
    return ":" in name and not name.startswith("hf:") and not Path(name).exists()


def text_losses(model: nn.Module, corpus: data.Corpus, context: int, size: int, count: int, device: torch.device) -> list[Loss]:
    """Losses on windows of a text: model(ids, targets), or a Hugging Face model's with labels."""
    hugging_face = hasattr(model, "get_input_embeddings")
    losses: list[Loss] = []
    for step in range(count):
        ids, targets = (part.to(device) for part in data.batch(corpus.train, context, size, seed=0, step=step))
        batch: Any = {"input_ids": ids, "labels": ids} if hugging_face else (ids, targets)
        losses.append(_closure(loss_of, model, batch))
    return losses


def own_losses(model: nn.Module, name: str, count: int, evaluate: Evaluate | None, device: torch.device) -> list[Loss]:
    """Losses of the first `count` batches, or functions of the model that return a loss, that DATA's function gives."""
    made = imported(name, "DATA")()
    if not isinstance(made, Iterable):
        raise InputError(f"DATA {name} must return an iterable of batches or of functions, got {type(made).__name__}.")
    batches = list(itertools.islice(made, count))
    if len(batches) < count:
        raise InputError(f"DATA {name} gave {len(batches)} batches, --batches asks for {count}.")
    return [
        _closure(_call, model, batch) if callable(batch) else _closure(evaluate or loss_of, model, moved(batch, device))
        for batch in batches
    ]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The model called with a batch (a mapping by keywords, a list or tuple by position) is a loss, or has one as `.loss`."""
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(out).__name__
        raise InputError(f"The model called with a batch must return a loss or have it as .loss, got {got}: give --loss.")
    return loss


def moved(batch: Any, device: torch.device) -> Any:
    """Every tensor of a batch on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(*map(_to(device), batch)) if hasattr(batch, "_fields") else type(batch)(map(_to(device), batch))
    return batch


def _to(device: torch.device) -> Callable[[Any], Any]:
    return lambda value: moved(value, device)


def _call(model: nn.Module, function: Callable[[nn.Module], Tensor]) -> Tensor:
    return function(model)


def _closure(evaluate: Evaluate, model: nn.Module, batch: Any) -> Loss:
    return lambda: evaluate(model, batch)
