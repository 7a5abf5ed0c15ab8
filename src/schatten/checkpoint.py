"""Checkpoints: what a state_dict holds, and the checks a loaded one passes before anything changes.

A state_dict is tensors and plain values, so it loads with `weights_only=True`. Every group carries `schema` and its
`algorithm`; a spectral group also the text of its rule, which must equal the optimizer's on load. Slots that are
objects (a solver, a rule) are saved as text and never read back: the optimizer's own stay.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from schatten.batching import COUNTERS, wide
from schatten.groups import name_of
from schatten.retractions import DecoupledDecay
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum

RuleOf = Callable[[Mapping[str, Any]], Rule]

States = Mapping[torch.Tensor, dict[str, torch.Tensor]]

SCHEMA = 1

PLAIN = (Real, str, torch.Tensor, type(None))


def exported(packed: dict[str, Any], live_groups: Sequence[Mapping[str, Any]], rule_of: RuleOf) -> dict[str, Any]:
    """`packed`, torch's state_dict of an optimizer with these groups and rules, with rules and other objects as text."""
    groups = []
    for saved, live in zip(packed["param_groups"], live_groups, strict=True):
        group = {k: _text(v) for k, v in saved.items()}
        group["schema"] = SCHEMA
        if live["algorithm"] == "spectral":
            group["rule"] = repr(rule_of(live))
        groups.append(group)
    return {**packed, "param_groups": groups}


def imported(
    state_dict: Mapping[str, Any], live_groups: Sequence[Mapping[str, Any]], live_state: States, rule_of: RuleOf
) -> dict[str, Any]:
    """`state_dict` checked against an optimizer's groups, state and rules, with its objects in the place of their texts."""
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"An optimizer's state_dict has the keys 'state' and 'param_groups', got {sorted(map(str, state_dict))}."
        )
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(live_groups):
        raise ValueError(
            f"The checkpoint has {len(saved_groups)} parameter groups, this optimizer {len(live_groups)}: "
            f"build it from the same groups."
        )
    if any("ns_coefficients" in group for group in saved_groups):
        state_dict = _from_torch_muon(state_dict, live_groups, live_state, rule_of)
    groups = []
    for saved, live in zip(state_dict["param_groups"], live_groups, strict=True):
        _check_group(saved, live, rule_of)
        # The optimizer's own objects, and its own names: a wrapper such as DDP renames every parameter.
        objects = {k: v for k, v in live.items() if k == "param_names" or (k != "params" and not _plain(v))}
        groups.append({k: v for k, v in {**saved, **objects}.items() if k in live or k not in ("rule", "schema")})
    for saved, live in zip(state_dict["param_groups"], live_groups, strict=True):
        _check_state(saved, live, state_dict["state"], live_state)
    return {**state_dict, "param_groups": groups}


def restore_precision(state_dict: Mapping[str, Any], live_groups: Sequence[Mapping[str, Any]], live_state: States) -> None:
    """Give state the saved values in the precision of state: torch has cast them to that of the parameters."""
    for saved, live in zip(state_dict["param_groups"], live_groups, strict=True):
        for index, p in zip(saved["params"], live["params"], strict=True):
            for key, value in state_dict["state"][index].items():
                # A fresh tensor, so that the optimizer never shares memory with the caller's dictionary.
                wanted = torch.float32 if key in COUNTERS else wide(p.dtype)
                live_state[p][key] = torch.empty(value.shape, dtype=wanted, device=p.device).copy_(value)


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    return isinstance(value, PLAIN)


def _text(value: Any) -> Any:
    """A plain value as it is, a number of another library as Python's, anything else as its text."""
    if isinstance(value, (list, tuple)):
        return type(value)(_text(v) for v in value)
    if isinstance(value, Real) and type(value) not in (bool, int, float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value if isinstance(value, PLAIN) else repr(value)


def _check_group(saved: Mapping[str, Any], live: Mapping[str, Any], rule_of: RuleOf) -> None:
    if "schema" not in saved or "algorithm" not in saved:
        raise ValueError(
            "This is not a checkpoint of a schatten optimizer (no 'schema' in its groups); of others', "
            f"torch.optim.Muon's can be loaded. Its groups have the keys {sorted(set(saved) - {'params'})}."
        )
    if saved["schema"] != SCHEMA:
        raise ValueError(f"The checkpoint has schema {saved['schema']}, this version of schatten reads schema {SCHEMA}.")
    if saved["algorithm"] != live["algorithm"]:
        raise ValueError(
            f"The checkpoint trains a group by {saved['algorithm']!r} that this optimizer trains by {live['algorithm']!r}."
        )
    if live["algorithm"] == "spectral" and saved["rule"] != (own := repr(rule_of(live))):
        raise ValueError(
            f"The checkpoint is of another rule.\n  checkpoint: {saved['rule']}\n  optimizer:  {own}\n"
            f"Build the optimizer with the checkpoint's options, or start it without loading."
        )


def _check_state(saved: Mapping[str, Any], live: Mapping[str, Any], state: Mapping[Any, Any], live_state: States) -> None:
    _check_count(saved, live)
    _check_order(saved.get("param_names"), live.get("param_names"))
    wrong = []
    for i, (index, p) in enumerate(zip(saved["params"], live["params"], strict=True)):
        wanted = {key: tuple(value.shape) for key, value in live_state[p].items()}
        found = {key: tuple(value.shape) for key, value in state.get(index, {}).items()}
        if wanted != found:
            wrong.append(f"{name_of(live, i)} of shape {tuple(p.shape)}: needs {wanted}, checkpoint has {found}")
    if wrong:
        raise ValueError("The checkpoint's state does not fit these parameters:\n  " + "\n  ".join(wrong))


def _check_count(saved: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    if len(saved["params"]) != len(live["params"]):
        raise ValueError(
            f"A group of the checkpoint has {len(saved['params'])} parameters, this optimizer's has {len(live['params'])}."
        )


def _check_order(saved: Sequence[str] | None, live: Sequence[str] | None) -> None:
    if saved and live and list(saved) != list(live) and sorted(saved) == sorted(live):
        i = next(i for i, (theirs, ours) in enumerate(zip(saved, live, strict=True)) if theirs != ours)
        raise ValueError(
            f"The checkpoint has these parameters in another order: its number {i} is {saved[i]!r}, this optimizer's is "
            f"{live[i]!r}. Pass the parameters in the checkpoint's order."
        )


def _from_torch_muon(
    state_dict: Mapping[str, Any], live_groups: Sequence[Mapping[str, Any]], live_state: States, rule_of: RuleOf
) -> dict[str, Any]:
    """torch.optim.Muon's state as this optimizer's: its momentum buffers and numbers; its scale and Nesterov must agree."""
    groups, state = [], {}
    for saved, live in zip(state_dict["param_groups"], live_groups, strict=True):
        if live["algorithm"] != "spectral":
            raise ValueError("torch.optim.Muon's checkpoint holds matrices only, but this optimizer has an AdamW group.")
        rule = rule_of(live)
        scale = Scale(saved["adjust_lr_fn"] or "original")
        theirs = Rule(Momentum("ema", saved["nesterov"]), rule.map, scale, DecoupledDecay("explicit"))
        if theirs != rule:
            raise ValueError(
                f"The torch.optim.Muon checkpoint is of another rule.\n  checkpoint: {theirs}\n  optimizer:  {rule}\n"
                f"Build Muon with scale={scale.name!r}, nesterov={saved['nesterov']}, form='ema' and decay='explicit'."
            )
        _check_count(saved, live)
        numbers = {k: saved[k] for k in ("lr", "weight_decay", "momentum", "initial_lr") if k in saved}
        own = {k: v for k, v in live.items() if k != "params"}
        groups.append({**own, **numbers, "params": saved["params"], "schema": SCHEMA, "rule": repr(rule)})
        for index, p in zip(saved["params"], live["params"], strict=True):
            fresh = {key: torch.zeros_like(value) for key, value in live_state[p].items()}
            state[index] = {**fresh, **state_dict["state"].get(index, {})}
    return {"state": state, "param_groups": groups}
