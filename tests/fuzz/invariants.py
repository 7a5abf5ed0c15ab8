"""What must hold whatever is thrown at an optimizer, how it is driven, and how cases are run and counted."""

import copy
import linecache
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import schatten

SOURCE = Path(schatten.__file__).parent
TORCH_OPTIM = Path(torch.optim.__file__).parent

# How many cases each test runs in CI, and how many times as many, from a random seed, `-m slow` does.
CASES = {
    "legal steps": 600,
    "illegal options": 300,
    "illegal parameters": 150,
    "edits": 400,
    "added groups": 100,
    "fitting layouts": 200,
    "any layouts": 200,
    "resumed checkpoints": 120,
    "edited checkpoints": 300,
    "other checkpoints": 50,
}
LONG = 20


def fuzz(name: str, **drawn: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a check: `CASES[name]` cases with fixed draws in CI, 20 times as many with random ones under `-m slow`.

    A case is one call of the check that came to its end; fewer than asked for are a failure.
    """
    cases = CASES[name]

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("times", [1, pytest.param(LONG, marks=pytest.mark.slow)], ids=["ci", "long"])
        def test(times: int) -> None:
            ran = 0

            @settings(
                max_examples=cases * times,
                deadline=None,
                derandomize=times == 1,
                database=None,
                print_blob=False,
                # Whole optimizers are drawn, on a core that may be busy, which is no sign of a bad strategy.
                suppress_health_check=[HealthCheck.too_slow],
                phases=[Phase.explicit, Phase.generate, Phase.shrink],
            )
            @given(**drawn)
            def run(**case: Any) -> None:
                nonlocal ran
                check(**case)
                ran += 1

            run()
            assert ran >= cases * times
            print(f"{name}: {ran} cases")

        test.__name__ = check.__name__
        test.__doc__ = check.__doc__
        return test

    return decorate


# -- errors ----------------------------------------------------------------------------------------------------------------


def assert_named(error: BaseException, words: Sequence[str]) -> None:
    """The library's own refusal: raised on purpose, of a fitting type, and naming one of `words`."""
    told = "".join(traceback.format_exception(error))
    assert type(error) in (ValueError, TypeError, RuntimeError), told
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(frame.filename)
    assert SOURCE in path.parents or TORCH_OPTIM in path.parents, f"raised outside the library:\n{told}"
    # An operation's own error has no raise statement in its last frame of Python.
    line = linecache.getline(frame.filename, frame.lineno or 0)
    assert line.strip().startswith("raise"), f"not a refusal but a failure:\n{told}"
    assert any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(error)) for word in words), f"names none of {words}:\n{told}"


@contextmanager
def refusal(*words: str) -> Iterator[None]:
    """The body must be refused by an error that names one of `words`."""
    try:
        yield
    except Exception as error:
        assert_named(error, words)
        return
    raise AssertionError(f"accepted, but should be refused by naming one of {words}")


# -- what was and what is --------------------------------------------------------------------------------------------------


def bits(t: Tensor) -> Tensor:
    # A copy: a contiguous tensor with one entry may have any stride, which a view of another size refuses.
    return t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def is_finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(t.isfinite().all())


def params_of(opt: Any) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


class Snapshot:
    """Weights, gradients, state and options of an optimizer at one time."""

    def __init__(self, opt: Any, params: Sequence[Tensor]) -> None:
        self.opt, self.params = opt, list(params)
        self.weights = [p.detach().clone() for p in self.params]
        self.forms = [(p.stride(), p.dtype, p.requires_grad) for p in self.params]
        self.gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in self.params]
        self.state = [copy.deepcopy(dict(opt.state[p])) if opt is not None and p in opt.state else None for p in self.params]
        self.groups = [] if opt is None else [_options(group) for group in opt.param_groups]
        self.random = torch.get_rng_state()

    def assert_weights_kept(self) -> None:
        for p, w in zip(self.params, self.weights, strict=True):
            assert same_bits(p, w), f"a weight changed:\n{w}\n{p}"

    def assert_forms_kept(self) -> None:
        """Strides, dtypes, requires_grad and the user's random numbers."""
        assert [(p.stride(), p.dtype, p.requires_grad) for p in self.params] == self.forms
        assert torch.equal(self.random, torch.get_rng_state())

    def assert_gradients_kept(self, objects: bool = True) -> None:
        for p, (grad, copied) in zip(self.params, self.gradients, strict=True):
            assert not objects or p.grad is grad
            if grad is not None and copied is not None and grad.layout == torch.strided:
                assert same_bits(grad, copied), f"a gradient was written to:\n{copied}\n{grad}"

    def assert_state_kept(self) -> None:
        for p, state in zip(self.params, self.state, strict=True):
            assert_same_state(dict(self.opt.state[p]) if p in self.opt.state else None, state)
        assert [_options(group) for group in self.opt.param_groups] == self.groups

    def assert_nothing_changed(self) -> None:
        self.assert_weights_kept()
        self.assert_forms_kept()
        self.assert_gradients_kept()
        if self.opt is not None:
            self.assert_state_kept()


def _options(group: dict[Any, Any]) -> dict[Any, str]:
    return {k: repr(v) if k != "params" else repr([id(p) for p in v]) for k, v in group.items()}


def assert_same_state(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> None:
    if a is None or b is None:
        assert a is b
        return
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert same_bits(value, b[key]), f"state {key} changed:\n{b[key]}\n{value}"


def assert_same(a: Any, b: Any) -> None:
    """Two optimizers with the same bits in weights and state."""
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert same_bits(p, q), f"not deterministic:\n{p}\n{q}"
        assert_same_state(dict(a.state[p]), dict(b.state[q]))


# -- driving ---------------------------------------------------------------------------------------------------------------


def drive(opt: Any, gradients: Sequence[Tensor | None]) -> bool:
    """One step on these gradients, by whatever the preset needs for it; whether `p.grad` must be left as it is."""
    params = params_of(opt)

    def assign() -> None:
        for p, g in zip(params, gradients, strict=True):
            if p.grad is not g:
                p.grad = g

    if opt.needs_closure:
        held = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
        zero = torch.zeros((), dtype=torch.float64)
        opt.step(lambda: sum(((p.double() * g.double()).sum() for p, g in held), zero))
        return False
    if getattr(opt, "exact", False):
        opt.step(assign)
        return False
    if getattr(opt, "workers", 1) > 1:
        for j in range(opt.workers):
            with opt.worker(j):
                assign()
        opt.step()
        return False
    assign()
    opt.step()
    return True


def step_and_check(opt: Any, gradients: Sequence[Tensor | None]) -> None:
    """One step, and all that must hold after any step that raises nothing."""
    params = params_of(opt)
    before = Snapshot(opt, params)
    copies = [None if g is None else g.clone() for g in gradients]
    untouched = drive(opt, gradients)
    before.assert_forms_kept()
    for p, w, state, g, copied in zip(params, before.weights, before.state, gradients, copies, strict=True):
        assert g is None or copied is None or same_bits(g, copied), f"a gradient was written to:\n{copied}\n{g}"
        assert not untouched or p.grad is g
        if not is_finite(w):
            continue
        assert is_finite(p), f"not finite any more:\n{w}\n{p}\ngradient\n{g}"
        for key, value in opt.state[p].items():
            assert is_finite(value), f"state {key}:\n{value}\ngradient\n{g}"
        if untouched and g is None:
            assert same_bits(p, w)
            assert_same_state(dict(opt.state[p]), state)
        elif untouched and g is not None and not is_finite(g):
            assert same_bits(p, w)
            assert state is not None and opt.state[p]["skipped"] == state["skipped"] + 1
