"""What a self test reads off: whether groups are what the plan says, and what a step would need."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from schatten.layout import Layout, resolve
from schatten.self_test.report import Check

if TYPE_CHECKING:
    from schatten.optimizer import SpectralOptimizer


def _named(opt: "SpectralOptimizer") -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    for g, group in enumerate(opt.param_groups):
        for i, p in enumerate(group["params"]):
            yield group["param_names"][i] if "param_names" in group else f"{g}.{i}", p, group


def layouts(opt: "SpectralOptimizer") -> dict[str, str | Layout]:
    """The layout of each spectral parameter: the plan's, or that of its group where it joined later."""
    planned = {e.name: e.layout for e in opt.plan or () if e.route == "spectral"}
    return {
        name: planned.get(name) or resolve(group["layout"], tuple(p.shape), name)
        for name, p, group in _named(opt)
        if group["algorithm"] == "spectral"
    }


def route_checks(opt: "SpectralOptimizer") -> Iterator[Check]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, p, group in _named(opt):
        found[name].append(_route(name, p, group))
    planned = {e.name: f"spectral, {e.layout}" if e.route == "spectral" else "adamw" for e in opt.plan or ()}
    wrong = [name for name, text in planned.items() if found[name] != [text]]
    for name in wrong:
        yield Check("routes", name, planned[name], " and ".join(found[name]) or "in no group", False)
    if not wrong:
        yield Check("routes", "all of the plan", "in one group each", f"{len(planned)} as planned", True)


def _route(name: str, p: Tensor, group: Mapping[str, Any]) -> str:
    if group["algorithm"] != "spectral":
        return str(group["algorithm"])
    try:
        return f"spectral, {resolve(group['layout'], tuple(p.shape), name)}"
    except ValueError as error:
        return f"spectral, unreadable: {error}"


def number_checks(opt: "SpectralOptimizer") -> Iterator[Check]:
    """The lr and decay of groups made from a plan, as long as no schedule may have moved them."""
    options = {e.name: dict(e.options) for e in opt.plan or () if e.reason != "passed in this group"}
    checked, wrong = 0, False
    for name, _, group in _named(opt):
        if name not in options or group["step"] > 0 or "initial_lr" in group:
            continue
        defaults = {**opt.defaults, **({} if group["algorithm"] == "spectral" else opt.defaults["adamw"])}
        expected = {"lr": defaults["lr"], "weight_decay": defaults["weight_decay"], **options[name]}
        measured = {key: group.get(key) for key in expected}
        checked += 1
        if any(measured[key] != value for key, value in expected.items()):
            wrong = True
            yield Check("numbers", name, _listed(expected), _listed(measured), False)
    if checked and not wrong:
        yield Check("numbers", "all of the plan", "lr and decay", f"{checked} as planned", True)


def _listed(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {float(n) if isinstance(n, Tensor) else n}" for key, n in numbers.items())


def frozen_checks(opt: "SpectralOptimizer") -> Iterator[Check]:
    for name, p, _ in _named(opt):
        if not p.requires_grad and p.grad is not None:
            yield Check("frozen", name, "no gradient", "one from before, by which step() moves it: set p.grad = None", False)


def needs_more(opt: "SpectralOptimizer") -> str | None:
    """Why a step cannot be done on gradients alone, if it cannot."""
    if opt.needs_closure:
        return "step() needs a closure that returns the loss"
    for group in opt.param_groups:
        signal = opt.rule(group).signal if group["algorithm"] == "spectral" else None
        if (feeder := getattr(signal, "fed_by", None)) is not None:
            return f"its signal reads what {feeder} evaluates besides the gradient"
    return None
