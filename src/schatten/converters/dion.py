"""Muon and NorMuon of microsoft/dion, with their AdamW."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from schatten.converters.core import Entry, Target, choice, converted, library_of, numbers_of, state_of, values_of
from schatten.converters.state import ROWS, Method, Source
from schatten.layout import Layout

NAME = "Dion's Muon"

NUMBERS = {"lr": "lr", "weight_decay": "weight_decay", "mu": "momentum"}

ADAMW = {"lr": "lr", "weight_decay": "weight_decay", "epsilon": "eps", "beta1": "beta1", "beta2": "beta2"}

SCALES = {"spectral_norm": "mup", "rms_norm": "adamw-rms", None: "none"}

FLAG = {True: True, False: False}


def from_dion(state_dict: Mapping[str, Any], opt: Target, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The state_dict of Muon or NorMuon of microsoft/dion as one for `opt`, matrices and AdamW parameters.

    Its momentum is a sum, which becomes an average by the factor 1 - mu unless `opt` has `form="sum"`; NorMuon's
    `variance_neuron` is our moment of rows. lr means the same for `scale="mup"` (its `adjust_lr="spectral_norm"`),
    `"adamw-rms"` ("rms_norm") or `"none"` (None), which `opt` must have, with the same `nesterov`, and `decay="cautious"` for
    `cautious_wd`. `flatten` is the layout `conv`; without it more than two dimensions are `experts`; `num_heads` and
    `split_sizes` are a `Layout` with `heads` and `split`. Its AdamW counts the steps of a group.

    Args:
        state_dict: whole tensors, as from one device or `get_optimizer_state_dict` with `full_state_dict=True`.
        opt: the optimizer that is to load it, such as `schatten.Muon(model, scale="mup", nesterov=False)`.
        names: the names of its parameters, in the order of its groups.

    Raises ValueError that lists what does not fit: another algorithm (Dion, Dion2, Lion), cautious decay of AdamW
    parameters, NorMuon's moments of convolutions from before it flattened them.

    Example:
        >>> import torch, schatten
        >>> group = {"lr": 0.01, "mu": 0.95, "weight_decay": 0.01, "algorithm": "muon", "step": 1, "nesterov": False}
        >>> group |= {"flatten": False, "adjust_lr": "spectral_norm", "params": [0]}
        >>> saved = {"state": {0: {"momentum": torch.ones(4, 4)}}, "param_groups": [group]}
        >>> opt = schatten.Muon([W := torch.nn.Parameter(torch.zeros(4, 4))], scale="mup", nesterov=False)
        >>> opt.load_state_dict(schatten.converters.from_dion(saved, opt))
        >>> round(float(opt.state[W]["momentum_buffer"][0, 0]), 4)
        0.05
    """
    return converted(library_of(NAME, state_dict, names, _source), opt)


def _source(entry: Entry) -> Source:
    group = {"cautious_wd": False, **entry.group}
    algorithm = choice(NAME, group, "algorithm", {key: key for key in ("muon", "normuon", "adamw")})
    cautious = choice(NAME, group, "cautious_wd", FLAG)
    if algorithm == "adamw":
        if group["weight_decay"] != 0:
            choice(f"AdamW in {NAME}", group, "cautious_wd", {False: None})
        state = state_of(NAME, entry.state, {"momentum": "exp_avg", "variance": "exp_avg_sq"})
        numbers = numbers_of(NAME, group, ADAMW)
        betas = (numbers.pop("beta1"), numbers.pop("beta2"))
        steps = values_of(NAME, group, {"step": "step"}) if state else {}
        return Source(entry.name, {**state, **steps}, {**numbers, "betas": betas})
    method = Method(
        "sum",
        choice(NAME, group, "nesterov", FLAG),
        choice(NAME, group, "adjust_lr", SCALES),
        _layout(group),
        decay="cautious" if cautious else "explicit",
    )
    state = state_of(NAME, entry.state, {"momentum": "momentum_buffer"})
    numbers = numbers_of(NAME, group, NUMBERS)
    if algorithm == "muon":
        return Source(entry.name, state, numbers, method)
    state |= state_of("NorMuon in Dion", entry.state, {"variance_neuron": ROWS})
    method = replace(method, preset="NorMuon", keeps=("momentum_buffer", ROWS))
    return Source(entry.name, state, {**numbers, **values_of(NAME, group, {"muon_beta2": "beta2"})}, method)


def _layout(group: Mapping[str, Any]) -> Callable[[tuple[int, ...]], str | Layout]:
    """How a parameter of a group is read, by its shape."""
    cuts = {ours: group[theirs] for theirs, ours in (("num_heads", "heads"), ("split_sizes", "split")) if theirs in group}
    cuts = {name: value for name, value in cuts.items() if value is not None}
    many = "conv" if choice(NAME, group, "flatten", FLAG) else "experts"
    return lambda shape: Layout("matrix", **cuts) if len(shape) == 2 else many
