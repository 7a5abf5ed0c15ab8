"""The self test: an optimizer steps copies of its own parameters, and every step is computed a second time.

What set-ups get wrong without a word is looked for on the object that will train: directions that are not orthogonal, steps
shortened by a clip, decay that is printed and not applied, an lr from elsewhere, a layout that is not the plan's. The copy
is of the optimizer's own class, so `step` is the real one; the parameters, their gradients and state are only read.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from schatten.placements.meshes import meshes, together
from schatten.self_test.plan_checks import frozen_checks, needs_more, number_checks, route_checks
from schatten.self_test.report import Check, Report, SelfTestError
from schatten.self_test.step_checks import Steps

if TYPE_CHECKING:
    from schatten.optimizer import SpectralOptimizer


@torch.no_grad()
def self_test(opt: "SpectralOptimizer") -> Report:
    """Step copies of an optimizer's parameters and compare update, decay, lr and accumulation with what its plan says.

    Of each group one or two parameters of each shape are copied and stepped on seeded gradients, from fresh state:

    | check | what must hold |
    |---|---|
    | routes, numbers | each parameter of the plan is in one group, with its route, layout, lr and decay |
    | step | with the group's own lr and decay: the weight that the rule's slots give, or torch.optim.AdamW |
    | update, momentum | the first and second step without decay, at an lr that makes them as long as the weight |
    | singular values | of an update under the nuclear norm, over lr c: near 1 |
    | decay | what weight_decay adds to a step |
    | twice the lr | a step at twice the lr |
    | accumulation | nothing moves in two backward passes; then the step of their sum |
    | no gradient | what has none does not move |
    | read only | gradients and the numbers of groups are not written to |

    Returns the report. Raises SelfTestError that lists every check that failed. Of optimizers whose `step` needs more than
    gradients, such as a closure, it checks routes and numbers alone, and says so. Hooks on `opt` and wrappers around its
    `step` are not called. Memory: about fifteen times one or two parameters of each shape; time: some ten steps of them.

    Parameters that several ranks hold are tested on this process alone, as whole matrices: the rule, the numbers and the plan,
    not what travels in a step. DTensors are gathered for it, so that all ranks must call this; others need no other rank.

    Example:
        >>> import torch, schatten
        >>> from schatten.self_test import self_test
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
        >>> report = self_test(schatten.Muon(model))
        >>> all(check.ok for check in report)
        True
    """
    routes = list(route_checks(opt))
    checks = [*routes, *number_checks(opt), *frozen_checks(opt)]
    if shared := meshes(p for group in opt.param_groups for p in group["params"]):
        # One rank alone would wait for the others where weights are gathered.
        together(lambda: _refuse(checks), shared)
    why = needs_more(opt) if all(c.ok for c in routes) else "groups are not the plan's"
    if why is not None:
        checks.append(Check("step", "all", "a step on gradients alone", f"not checked: {why}", None))
    else:
        checks += Steps(opt).checks()
    return _refuse(checks)


def _refuse(checks: Sequence[Check]) -> Report:
    report = Report(tuple(checks))
    if any(c.ok is False for c in report):
        raise SelfTestError(report)
    return report
