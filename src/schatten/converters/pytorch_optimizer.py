"""pytorch_optimizer's Muon, with its own AdamW."""

from collections.abc import Mapping, Sequence
from typing import Any

from schatten.converters.core import Entry, Target, choice, converted, library_of, numbers_of, state_of, values_of
from schatten.converters.state import Method, Source

NAME = "pytorch_optimizer's Muon"

NUMBERS = {key: key for key in ("lr", "weight_decay", "momentum")}

ADAMW = {key: key for key in ("lr", "weight_decay", "betas", "eps")}


def from_pytorch_optimizer(state_dict: Mapping[str, Any], opt: Target, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The state_dict of pytorch_optimizer's Muon as one for `opt`, matrices and AdamW parameters.

    The momentum is an average, as ours; lr means the same for `scale="keller"` (its `use_adjusted_lr=False`) or
    `"adamw-rms"`, which `opt` must have, with the same `nesterov`. More than two dimensions are read as `conv`. Its AdamW
    counts steps for a group, also for parameters that had no gradient in some.

    Args:
        state_dict: of pytorch_optimizer.Muon.
        opt: the optimizer that is to load it.
        names: the names of its parameters, in the order of its groups.

    Raises ValueError that lists what does not fit, such as decay that is not decoupled or a cautious update.

    Example:
        >>> import torch, schatten
        >>> group = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "nesterov": True, "use_adjusted_lr": False}
        >>> group |= {"use_muon": True, "weight_decouple": True, "params": [0]}
        >>> saved = {"state": {0: {"momentum_buffer": torch.ones(4, 4)}}, "param_groups": [group]}
        >>> opt = schatten.Muon([torch.nn.Parameter(torch.zeros(4, 4))], scale="keller")
        >>> opt.load_state_dict(schatten.converters.from_pytorch_optimizer(saved, opt))
        >>> opt.param_groups[0]["lr"]
        0.02
    """
    return converted(library_of(NAME, state_dict, names, _source), opt)


def _source(entry: Entry) -> Source:
    group = {"cautious": False, **entry.group}
    if values_of(NAME, group, {"weight_decay": "weight_decay"})["weight_decay"] != 0:
        choice(NAME, group, "weight_decouple", {True: None})
    if not choice(NAME, group, "use_muon", {True: True, False: False}):
        state = state_of(NAME, entry.state, {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"})
        steps = values_of(NAME, group, {"step": "step"}) if state else {}
        return Source(entry.name, {**state, **steps}, numbers_of(NAME, group, ADAMW))
    choice(NAME, group, "cautious", {False: None})
    scale = choice(NAME, group, "use_adjusted_lr", {False: "keller", True: "adamw-rms"})
    nesterov = choice(NAME, group, "nesterov", {True: True, False: False})
    state = state_of(NAME, entry.state, {"momentum_buffer": "momentum_buffer"})
    return Source(entry.name, state, numbers_of(NAME, group, NUMBERS), Method("ema", nesterov, scale, _layout))


def _layout(shape: tuple[int, ...]) -> str:
    return "matrix" if len(shape) == 2 else "conv"
