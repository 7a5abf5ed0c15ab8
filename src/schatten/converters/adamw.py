"""torch.optim.AdamW's state, as a start for a spectral optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from schatten.checkpoint import taken_apart
from schatten.converters.core import Entry, Library, Target, choice, converted, library_of, numbers_of, renamed, state_of
from schatten.converters.state import Source
from schatten.rule import Rule
from schatten.scales import RMS, Scale
from schatten.signals import AdamRatio, Momentum, TwoBeta
from schatten.state import wide

NAME = "torch.optim.AdamW"

NUMBERS = {key: key for key in ("lr", "weight_decay", "betas", "eps")}

STATE = {key: key for key in ("step", "exp_avg", "exp_avg_sq")}


def from_adamw(state_dict: Mapping[str, Any], opt: Target, names: Sequence[str] | None = None) -> dict[str, Any]:
    """AdamW's state_dict as one for `opt`: training goes on by the spectral rule, with a momentum that is warm.

        AdamW parameters:     exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay as they are
        spectral parameters:  momentum <- exp_avg, times 1 / (1 - momentum) if the rule keeps a sum

    The first continue as torch.optim.AdamW would. Of the second the number `momentum` stays the optimizer's, and lr and
    weight_decay are AdamW's where the scale makes them mean the same ("adamw-rms", the default); otherwise they stay too.
    `SpectralAdam` takes over both averages.

    Args:
        state_dict: of torch.optim.AdamW, or of Adam without weight decay.
        opt: the optimizer that is to load it.
        names: the parameters' names in the source's order, if `state_dict` has no `param_names`: for an AdamW built from
            `model.parameters()` `[name for name, _ in model.named_parameters()]`.

    Raises ValueError that lists what does not fit: parameters without a match, other shapes, amsgrad, or numbers that
    differ between parameters of one of our groups.

    Example:
        >>> import torch, schatten
        >>> model = torch.nn.Linear(4, 4)
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> model(torch.randn(2, 4)).sum().backward()
        >>> adamw.step()
        >>> opt = schatten.Muon(model)
        >>> names = [name for name, _ in model.named_parameters()]
        >>> opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt, names))
        >>> bool((opt.state[model.weight]["momentum_buffer"] == adamw.state[model.weight]["exp_avg"]).all())
        True
    """
    return converted(library_of(NAME, state_dict, names, _source), opt, _adapted)


def with_adamw(
    name: str,
    state_dict: Mapping[str, Any],
    names: Sequence[str] | None,
    source: Callable[[Entry], Source],
    adamw: Mapping[str, Any] | None,
) -> Library:
    """`library_of`, and behind it the parameters of the AdamW that trained what is no matrix; `names` has both in turn."""
    if adamw is None:
        return library_of(name, state_dict, names, source)
    first = sum(len(group["params"]) for group in taken_apart(state_dict)[0])
    own, rest = (None, None) if names is None else (names[:first], names[first:])
    return library_of(name, state_dict, own, source) + library_of(NAME, adamw, rest, _source)


def _source(entry: Entry) -> Source:
    choice(NAME, {"amsgrad": False, **entry.group}, "amsgrad", {False: None})
    numbers = numbers_of(NAME, entry.group, NUMBERS)
    if entry.group.get("decoupled_weight_decay") is False and numbers["weight_decay"] != 0:
        choice("torch.optim.Adam", entry.group, "weight_decay", {0: None})
    return Source(entry.name, state_of(NAME, entry.state, STATE), numbers)


def _adapted(source: Source, rule: Rule, group: Mapping[str, Any]) -> Source | str:
    """AdamW's averages as a rule's momentum: they average gradients as these signals do."""
    numbers = {"maximize": source.numbers.get("maximize", False)}
    if rule.scale in (Scale("adamw-rms"), RMS()):
        numbers |= renamed(source.numbers, {key: key for key in ("lr", "weight_decay", "initial_lr")})
    if isinstance(rule.signal, AdamRatio):
        return Source(source.name, source.state, {**numbers, "betas": source.numbers["betas"]})
    if not isinstance(rule.signal, Momentum | TwoBeta):
        return f"is trained by a rule whose {rule.signal!r} keeps no average of gradients: start it without loading."
    average = source.state.get("exp_avg")
    if isinstance(average, Tensor) and isinstance(rule.signal, Momentum) and rule.signal.form == "sum":
        average = average.to(wide(average.dtype)) / (1 - group["momentum"])
    return Source(source.name, {} if average is None else {"momentum_buffer": average}, numbers)
