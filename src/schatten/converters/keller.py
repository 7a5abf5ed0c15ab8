"""Keller Jordan's Muon (the package muon-optimizer), alone or with its own Adam."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from schatten.converters.adamw import with_adamw
from schatten.converters.core import Entry, Target, choice, converted, numbers_of, state_of
from schatten.converters.state import Method, Source

NAME = "Keller Jordan's Muon"

NUMBERS = {key: key for key in ("lr", "weight_decay", "momentum")}

ADAM = {key: key for key in ("lr", "weight_decay", "betas", "eps")}

STATE = {key: key for key in ("step", "exp_avg", "exp_avg_sq")}

# Of groups without `use_muon`, which is all there is of Muon's own; SGD's, which are alike, have more.
KEYS = {"lr", "weight_decay", "momentum", "initial_lr", "params", "param_names"}


def from_keller(
    state_dict: Mapping[str, Any],
    opt: Target,
    names: Sequence[str] | None = None,
    *,
    adamw: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The state_dict of Keller Jordan's Muon as one for `opt`.

    Of `MuonWithAuxAdam` and `SingleDeviceMuonWithAuxAdam` both parts; of `Muon` and `SingleDeviceMuon` the matrices, and the
    `adamw` beside them. The momentum is an average, as ours; lr means the same for `scale="keller"`, the step's Adam is
    AdamW. It reads 3-D parameters as banks of matrices (layout "experts") and 4-D ones as `conv`, but takes the factor of
    these from the kernel's height and width: 1 for square kernels, where "keller" has sqrt(out / (in * kernel)) if that is
    more. `opt` must agree, by a group with `scale="none"` where needed.

    Args:
        state_dict: of one of the four classes.
        opt: the optimizer that is to load it, `schatten.Muon(..., scale="keller")`.
        names: the names of its parameters, then of `adamw`'s, in the order of its groups. `Muon` and `MuonWithAuxAdam` sort
            those of a group by size: `{p: name for name, p in model.named_parameters()}`, read for each p of
            `source.param_groups`, gives them as they are.
        adamw: the state_dict of torch.optim.AdamW that trained what is no matrix.

    Raises ValueError that lists what does not fit; also where only some matrices have a momentum, as in a file that one of
    several ranks has written of what it owns.

    Example:
        >>> import torch, schatten
        >>> saved = {
        ...     "state": {0: {"momentum_buffer": torch.ones(4, 4)}},
        ...     "param_groups": [{"lr": 0.02, "weight_decay": 0, "momentum": 0.95, "params": [0]}],
        ... }
        >>> opt = schatten.Muon([torch.nn.Parameter(torch.zeros(4, 4))], scale="keller")
        >>> opt.load_state_dict(schatten.converters.from_keller(saved, opt))
        >>> opt.param_groups[0]["lr"]
        0.02
    """
    library = with_adamw(NAME, state_dict, names, _source, adamw)
    stepped = [bool(source.state) for source in library.sources if source.method is not None]
    if any(stepped) and not all(stepped):
        library.refuse(
            [f"{len(stepped) - sum(stepped)} of {len(stepped)} matrices have no momentum."],
            "Each rank of its distributed classes keeps the momentum of the matrices it owns: put the ranks' files together, "
            '{"state": {**a["state"], **b["state"]}, "param_groups": a["param_groups"]}.',
        )
    return converted(library, opt)


def _source(entry: Entry) -> Source:
    group = {"use_muon": True, **entry.group}
    if not choice(NAME, group, "use_muon", {True: True, False: False}):
        return Source(entry.name, state_of(NAME, entry.state, STATE), numbers_of(NAME, group, ADAM))
    if unknown := set(group) - KEYS - {"use_muon"}:
        found = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"This is no checkpoint of {NAME}: its groups of matrices do not have {found}.")
    state = state_of(NAME, entry.state, {"momentum_buffer": "momentum_buffer"})
    return Source(entry.name, state, numbers_of(NAME, group, NUMBERS), Method("ema", True, "keller", _layout, _factor))


def _layout(shape: tuple[int, ...]) -> str:
    return {2: "matrix", 4: "conv"}.get(len(shape), "experts")


def _factor(shape: tuple[int, ...]) -> float:
    return sqrt(max(1.0, shape[-2] / shape[-1]))
