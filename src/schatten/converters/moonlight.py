"""Moonlight's Muon, with its own AdamW."""

from collections.abc import Mapping, Sequence
from typing import Any

from schatten.converters.core import Entry, Target, choice, converted, library_of, numbers_of, state_of
from schatten.converters.state import Method, Source

NAME = "Moonlight's Muon"

NUMBERS = {"lr": "lr", "wd": "weight_decay", "momentum": "momentum"}

ADAMW = {"lr": "lr", "wd": "weight_decay", "adamw_betas": "betas", "adamw_eps": "eps"}

STATE = {"step": "step", "moment1": "exp_avg", "moment2": "exp_avg_sq"}


def from_moonlight(state_dict: Mapping[str, Any], opt: Target, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The state_dict of Moonlight's Muon (`examples/toy_train.py`) as one for `opt`, matrices and AdamW parameters.

    Its momentum is a sum, which becomes an average by the factor 1 - momentum unless `opt` has `form="sum"`. lr means the
    same for `scale="adamw-rms"`, which `opt` must have, with the same `nesterov`. Its AdamW adds eps before the bias is
    corrected, torch's and ours after: with eps 1e-8 a difference at gradients below 1e-6 only.

    Args:
        state_dict: of Moonlight's Muon; each parameter's state says by `use_muon` what trains it.
        opt: the optimizer that is to load it.
        names: the names of its parameters in its order: first `muon_params`, then `adamw_params`.

    Raises ValueError that lists what does not fit.

    Example:
        >>> import torch, schatten
        >>> group = {"lr": 1e-3, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
        >>> group |= {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, "params": [0]}
        >>> saved = {"state": {0: {"use_muon": True, "momentum_buffer": torch.ones(4, 4)}}, "param_groups": [group]}
        >>> opt = schatten.Muon([W := torch.nn.Parameter(torch.zeros(4, 4))])
        >>> opt.load_state_dict(schatten.converters.from_moonlight(saved, opt))
        >>> round(float(opt.state[W]["momentum_buffer"][0, 0]), 4)
        0.05
    """
    return converted(library_of(NAME, state_dict, names, _source), opt)


def _source(entry: Entry) -> Source:
    if "use_muon" not in entry.state:
        raise ValueError(f"Every parameter of {NAME} has a state with use_muon, number or name {entry.name!r} has not.")
    kept = {key: value for key, value in entry.state.items() if key != "use_muon"}
    if not choice(NAME, entry.state, "use_muon", {True: True, False: False}):
        return Source(entry.name, state_of(NAME, kept, STATE), numbers_of(NAME, entry.group, ADAMW))
    nesterov = choice(NAME, entry.group, "nesterov", {True: True, False: False})
    state = state_of(NAME, kept, {"momentum_buffer": "momentum_buffer"})
    method = Method("sum", nesterov, "adamw-rms", lambda shape: "matrix")
    return Source(entry.name, state, numbers_of(NAME, entry.group, NUMBERS), method)
