"""How contracts make any preset step on given gradients."""

import torch


def step(opt):
    """One step with the gradients that parameters have; a zero-order preset gets the loss they are the gradients of."""
    if not opt.needs_closure:
        opt.step()
        return
    held = [(p, p.grad) for group in opt.param_groups for p in group["params"] if p.grad is not None]
    opt.step(lambda: sum(((p.double() * g.double()).sum() for p, g in held), torch.zeros((), dtype=torch.float64)))
    for p, g in held:
        p.grad = g
