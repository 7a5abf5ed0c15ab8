"""Checkpoints: what a state_dict holds, and the checks a loaded one passes before anything changes.

A state_dict is tensors and plain values, so it loads with `weights_only=True`. Every group carries `schema` and its
`algorithm`; a spectral group also the text of its rule, which must equal the optimizer's on load. What a schedule may
change (lr, momentum, every other number) comes from the checkpoint; what the rule's text fixes (a solver, a scale, a
layout) stays the optimizer's own. Whatever does not fit is listed in one error.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch

from schatten.checkpoint_checks import (
    is_number,
    layout_problem,
    layout_text,
    name_problems,
    number_problems,
    state_problems,
)
from schatten.groups import SCHEMA, name_of
from schatten.layout import Layout
from schatten.placements.meshes import meshes, together
from schatten.placements.states import placed_as
from schatten.rule import Rule
from schatten.state import wide

RuleOf = Callable[[Mapping[str, Any]], Rule]

States = Mapping[torch.Tensor, dict[str, torch.Tensor]]

# How many problems an error lists.
LISTED = 20

PLAIN = (Real, str, torch.Tensor, type(None))

# Keys that only a checkpoint's groups have.
OWN_KEYS = ("schema", "rule")

# Of groups that other optimizers have saved: keys to know them by, and who reads them.
OTHERS = (
    (("ns_coefficients", "adjust_lr_fn"), "torch.optim.Muon's", "from_torch_muon"),
    (("use_muon", "ns_coeffs"), "pytorch_optimizer's", "from_pytorch_optimizer"),
    (("use_muon",), "Keller Jordan's", "from_keller"),
    (("mu", "algorithm"), "Dion's", "from_dion"),
    (("wd", "adamw_betas"), "Moonlight's", "from_moonlight"),
    (("betas", "amsgrad"), "AdamW's", "from_adamw"),
)


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
    """`checked`, with fresh tensors for its state, in the precision of an optimizer's own and placed as that is.

    On several ranks all load or none: an error of one is raised there and RuntimeError on the others.
    """
    own = meshes(t for p, state in live_state.items() for t in (p, *state.values()))
    found = together(lambda: checked(state_dict, live_groups, live_state, rule_of), own)
    placed = {
        index: {key: placed_as(found["state"][index][key], like, like.dtype) for key, like in live_state[p].items()}
        for saved, live in zip(found["param_groups"], live_groups, strict=True)
        for index, p in zip(saved["params"], live["params"], strict=True)
    }
    return {**found, "state": placed}


def checked(
    state_dict: Mapping[str, Any], live_groups: Sequence[Mapping[str, Any]], live_state: States, rule_of: RuleOf
) -> dict[str, Any]:
    """`state_dict` checked against an optimizer's groups, state and rules, with its objects in the place of their texts.

    Raises ValueError that lists what does not fit: first of the groups, then of the numbers and the state in them.
    """
    saved_groups, state = taken_apart(state_dict)
    for saved in saved_groups:
        _refuse_foreign(saved)
    problems = name_problems(saved_groups, live_groups)
    if len(saved_groups) != len(live_groups):
        problems.insert(0, f"The checkpoint has {len(saved_groups)} parameter groups, this optimizer {len(live_groups)}.")
    else:
        for g, (saved, live) in enumerate(zip(saved_groups, live_groups, strict=True)):
            problems += [f"group {g}: {problem}" for problem in _group_problems(saved, live, rule_of)]
    _refuse(problems)
    groups = [_merged(saved, live) for saved, live in zip(saved_groups, live_groups, strict=True)]
    for g, (saved, live) in enumerate(zip(saved_groups, live_groups, strict=True)):
        problems += [f"group {g}: {problem}" for problem in number_problems(saved, live, groups[g], rule_of)]
    problems += state_problems(saved_groups, live_groups, state, live_state)
    _refuse(problems)
    return {**state_dict, "param_groups": groups}


def restore_precision(loaded: Mapping[str, Any], live_groups: Sequence[Mapping[str, Any]], live_state: States) -> None:
    """Give state the tensors of `loaded`: torch has cast them to the precision of the parameters."""
    for saved, live in zip(loaded["param_groups"], live_groups, strict=True):
        for index, p in zip(saved["params"], live["params"], strict=True):
            live_state[p].update(loaded["state"][index])


def taken_apart(state_dict: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    """The groups and the state of any torch optimizer's state_dict. ValueError for anything else."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        what = sorted(map(str, state_dict))[:LISTED] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"An optimizer's state_dict has the keys 'state' and 'param_groups', got {what}.")
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
        raise ValueError(
            f"In an optimizer's state_dict 'state' is a dict and 'param_groups' a list, got {type(state).__name__} and "
            f"{type(groups).__name__}."
        )
    for g, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"A group of an optimizer's state_dict is a dict with a list 'params', number {g} is not.")
        if not all(isinstance(index, (int, str)) for index in group["params"]):
            raise ValueError(f"A saved group lists its parameters by number or name, got {group['params'][:LISTED]}.")
    return list(groups), state


def _text(value: Any) -> Any:
    """A plain value as it is, a number of another library as Python's, anything else as its text."""
    if isinstance(value, (list, tuple)):
        return type(value)(_text(v) for v in value)
    if isinstance(value, Real) and type(value) not in (bool, int, float):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Layout):
        return layout_text(value)
    return value if isinstance(value, PLAIN) else repr(value)


def _refuse(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise ValueError(
            "The checkpoint does not fit this optimizer, which stays as it was:\n  "
            + "\n  ".join(problems[:LISTED] + more)
            + "\nBuild the optimizer from the checkpoint's model and options, or start it without loading."
        )


def _refuse_foreign(saved: Mapping[str, Any]) -> None:
    if "schema" not in saved:
        _refuse_others(saved)
    if "algorithm" not in saved:
        raise ValueError("A group of the checkpoint has lost its 'algorithm': it is damaged, take an earlier one.")
    if type(saved["schema"]) is not int or saved["schema"] != SCHEMA:
        raise ValueError(f"The checkpoint has schema {saved['schema']}, this version of schatten reads schema {SCHEMA}.")


def _refuse_others(saved: Mapping[str, Any]) -> NoReturn:
    known = [(whose, name) for keys, whose, name in OTHERS if set(keys) <= set(saved)]
    way_out = (
        f"It looks like {known[0][0]}: opt.load_state_dict(schatten.converters.{known[0][1]}(state_dict, opt)) takes it over."
        if known
        else "schatten.converters reads those of other optimizers."
    )
    raise ValueError(
        f"This is not a checkpoint of a schatten optimizer (no 'schema' in its groups, whose keys are "
        f"{sorted(map(str, set(saved) - {'params'}))}). {way_out}"
    )


def _group_problems(saved: Mapping[str, Any], live: Mapping[str, Any], rule_of: RuleOf) -> list[str]:
    if saved["algorithm"] != live["algorithm"]:
        return [f"The checkpoint trains it by {saved['algorithm']!r}, this optimizer by {live['algorithm']!r}."]
    problems = []
    if len(saved["params"]) != len(live["params"]):
        problems.append(f"The checkpoint's has {len(saved['params'])} parameters, this optimizer's has {len(live['params'])}.")
    kahan = [group.get("rounding") == "kahan" for group in (saved, live)]
    if kahan[0] != kahan[1] and any(p.dtype != wide(p.dtype) for p in live["params"]):
        problems.append(
            f"The checkpoint's rounding is {saved.get('rounding')!r}, this optimizer's {live['rounding']!r}; only 'kahan' "
            f"keeps what rounding took."
        )
    if live["algorithm"] == "adamw":
        return problems
    if saved.get("rule") != (own := repr(rule_of(live))):
        problems.append(f"The checkpoint is of another rule.\n    checkpoint: {saved.get('rule')}\n    optimizer:  {own}")
    if saved.get("state_dtype") != live.get("state_dtype"):
        problems.append(
            f"The checkpoint's state_dtype is {saved.get('state_dtype')!r}, this optimizer's {live.get('state_dtype')!r}."
        )
    for i, p in enumerate(live["params"]):
        if problem := layout_problem(saved.get("layout"), live["layout"], tuple(p.shape), name_of(live, i)):
            return [*problems, problem]
    return problems


def _merged(saved: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's own group with the checkpoint's numbers, and what only the checkpoint has, such as a scheduler's."""
    own = {k: v for k, v in live.items() if k != "params"}
    loaded = {k: v for k, v in saved.items() if k in ("rounding", "maximize") or (k in own and is_number(own[k]))}
    added = {k: v for k, v in saved.items() if k not in own and k not in OWN_KEYS}
    return {**own, **loaded, **added, "params": list(saved["params"])}
