"""torch.optim.Muon's state."""

from collections.abc import Mapping, Sequence
from typing import Any

from schatten.converters.adamw import with_adamw
from schatten.converters.core import Entry, Target, choice, converted, numbers_of, state_of
from schatten.converters.state import Method, Source

NAME = "torch.optim.Muon"

NUMBERS = {key: key for key in ("lr", "weight_decay", "momentum")}

SCALES = {None: "keller", "original": "keller", "match_rms_adamw": "adamw-rms"}


def is_torch_muon(state_dict: Any) -> bool:
    """Whether this is a state_dict of torch.optim.Muon, by the keys of its groups.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> [schatten.converters.is_torch_muon(opt([W]).state_dict()) for opt in (torch.optim.Muon, torch.optim.AdamW)]
        [True, False]
    """
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    return isinstance(groups, (list, tuple)) and any(
        isinstance(group, Mapping) and {"ns_coefficients", "adjust_lr_fn"} <= set(group) for group in groups
    )


def from_torch_muon(
    state_dict: Mapping[str, Any],
    opt: Target,
    names: Sequence[str] | None = None,
    *,
    adamw: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """torch.optim.Muon's state_dict, and that of the AdamW beside it, as one for `opt`.

    The momentum is an average, as ours; lr, weight_decay and momentum mean the same for `scale="keller"` (its
    `adjust_lr_fn` None or "original") or `"adamw-rms"` ("match_rms_adamw"), which `opt` must have, with the same `nesterov`.
    A parameter that was never stepped has zero momentum. `opt.load_state_dict` takes such a dictionary without `adamw` as
    it is.

    Args:
        state_dict: of torch.optim.Muon.
        opt: the optimizer that is to load it.
        names: the names of its parameters, and then of `adamw`'s, in their order, if neither dictionary has `param_names`.
        adamw: the state_dict of torch.optim.AdamW that trained what is no matrix.

    Raises ValueError that lists what does not fit.

    Example:
        >>> import torch, schatten
        >>> model = torch.nn.Linear(4, 4)
        >>> muon, adamw = torch.optim.Muon([model.weight]), torch.optim.AdamW([model.bias])
        >>> model(torch.randn(2, 4)).sum().backward()
        >>> muon.step(), adamw.step()
        (None, None)
        >>> opt = schatten.Muon(model, scale="keller")
        >>> both = schatten.converters.from_torch_muon(
        ...     muon.state_dict(), opt, ["weight", "bias"], adamw=adamw.state_dict()
        ... )
        >>> opt.load_state_dict(both)
    """
    return converted(with_adamw(NAME, state_dict, names, _source, adamw), opt)


def _source(entry: Entry) -> Source:
    group = entry.group
    nesterov = choice(NAME, group, "nesterov", {True: True, False: False})
    method = Method("ema", nesterov, choice(NAME, group, "adjust_lr_fn", SCALES), lambda shape: "matrix")
    state = state_of(NAME, entry.state, {"momentum_buffer": "momentum_buffer"})
    return Source(entry.name, state, numbers_of(NAME, group, NUMBERS), method)
