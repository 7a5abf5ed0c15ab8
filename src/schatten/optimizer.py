"""The engine: one torch.optim.Optimizer with the only step() of the library.

A spectral group is stepped by its rule, matrices of one shape at a time as one batch; an AdamW group by torch's own
functional AdamW. Nothing in a step waits for the device: a non-finite gradient is masked, not branched on.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

from schatten import checkpoint, converters, edits, metrics
from schatten.adamw import adamw_steps_
from schatten.batching import Part, Room, batches, default_batch_bytes
from schatten.finite import counted, refuse_unusable
from schatten.fused import iterates_bytes
from schatten.groups import (
    ADAMW_DEFAULTS,
    UNORDERED,
    check_layouts,
    check_numbers,
    check_parameters,
    check_stability,
    completed,
    follow_replaced_,
    name_of,
    unpack,
)
from schatten.kernels.bucket import Tables
from schatten.kernels.choice import checked, described, refuse_unavailable, use
from schatten.layout import Layout, Piece, pieces
from schatten.placements import Context, Overlap, Ranks
from schatten.retractions import decays_explicitly
from schatten.retractions.core import lr_of
from schatten.routing import Plan, plan
from schatten.routing.sharding import refuse_flat
from schatten.rule import Rule
from schatten.self_test import Report, self_test
from schatten.state import Member, follow_device_, fresh_state, suffixes, wide
from schatten.stepping import step_


class SpectralOptimizer(torch.optim.Optimizer):
    r"""Trains matrices by a `Rule` and everything else by torch's AdamW, in one optimizer object.

        S = signal(G),   D = grad K(S),   U = c(shape) D,   W <- retraction(W, U, lr, weight_decay)

    Args:
        params: a module, routed by `schatten.plan`; or tensors, `(name, tensor)` pairs or dict groups. A group's
            `algorithm` is `"spectral"` (default) or `"adamw"`; a spectral group's `layout` says how its tensors are
            read as matrices (`schatten.layout`).
        rule: the `Rule` of spectral groups, default `Rule()`; a group may carry its own under the key `rule`.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: decoupled decay lambda.
        rounding: how results enter half-precision parameters: `"stochastic"` (bf16; fp16 is rounded to nearest),
            `"kahan"` (what rounding takes is kept in a second tensor of the parameter's dtype and added at the next
            step) or `"nearest"`.
        state_dtype: `"bfloat16"` or `"int8"` (one fp32 scale for 256 entries) to keep running averages of spectral
            groups in a half or a quarter of the memory, rounded stochastically; None for fp32.
        maximize: ascend instead of descend.
        adamw: defaults of AdamW groups: `betas`, `eps`, and `lr` or `weight_decay` where they differ from the matrices'.
        rules: overrides for a module's routes, see `schatten.plan`.
        strict: refuse a module with parameters of two or more dimensions whose kind is not known; False trains them by AdamW.
        max_batch_bytes: what a step may allocate at a time; equal shapes are stepped in batches that keep to it, one matrix
            at least. Less saves memory, more saves nothing from some 100 MiB on. Default 160 MiB, on a GPU 512 MiB.
        kernels: `"auto"` computes by Triton's kernels where they run (CUDA from capability 8.0) and by torch elsewhere,
            `"eager"` by torch everywhere, `"triton"` refuses to do without; `plan` says which it is (docs/speed.md).
        placement: where directions are computed if several ranks hold a parameter, found from the parameters by default:
            `"local"` on every rank; `"owners"` each on one, of those of `process_group`, which then hears of it from there
            (default for a DistributedDataParallel module); `"zero1"` so, and matrices' state is divided among ranks. DTensors
            (FSDP2, HSDP, tensor parallel) always have owners (docs/distributed.md).
        process_group: the ranks that hold all parameters, for `"owners"` and `"zero1"`; default that of the module, or all.
        layout: how spectral groups that do not say so read their tensors as matrices: a kind's name or a `Layout`.
        hyperparameters: the numbers the rule reads, such as `momentum=0.95` or `betas=(0.9, 0.99)`.

    State, made at construction: what the slots keep (one tensor per matrix for `Momentum`) and two counters; half
    precision parameters have fp32 state. Raises ValueError or TypeError for a parameter or number no rule can use; the
    message names it.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(4, 4))
        >>> rule = schatten.Rule(scale=schatten.scales.Scale("none"))
        >>> opt = schatten.SpectralOptimizer([W], rule, lr=0.1, momentum=0.9)
        >>> W.grad = torch.eye(4)
        >>> opt.step()
        >>> bool(((W.diagonal() + 0.1).abs() < 0.02).all())
        True
    """

    # Where a module's parameters go that are no hidden matrices, see `schatten.plan`.
    others: str = "adamw"

    # The lr of AdamW groups where that of matrices is in other units; None where they share it.
    adamw_lr: float | None = None

    # Whether `step` needs a closure that returns the loss, because gradients are estimated from it.
    needs_closure: bool = False

    # Options that a preset reads from groups and that its constructor does not name.
    group_options: tuple[str, ...] = ()

    plan: Plan | None

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        rule: Rule | None = None,
        *,
        rules: Sequence[tuple[Any, ...]] = (),
        strict: bool = True,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        state_dtype: str | None = None,
        maximize: bool = False,
        adamw: Mapping[str, Any] | None = None,
        max_batch_bytes: int | None = None,
        kernels: str = "auto",
        layout: str | Layout = "auto",
        placement: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        **hyperparameters: Any,
    ) -> None:
        if adamw is not None and not isinstance(adamw, Mapping):
            raise TypeError(f"adamw must be the options of AdamW groups, such as {{'betas': (0.9, 0.95)}}, got {adamw!r}.")
        if not isinstance(layout, Layout):
            Layout(layout)  # refuses what no group may have
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "layout": layout,
            **hyperparameters,
            # Nested, because torch's momentum-cycling schedulers look for "betas" here and would then cycle only those.
            "adamw": {**ADAMW_DEFAULTS, **({"lr": self.adamw_lr} if self.adamw_lr else {}), **(adamw or {})},
        }
        if rule is not None:
            defaults["rule"] = rule
        if max_batch_bytes is not None and (
            isinstance(max_batch_bytes, bool) or not isinstance(max_batch_bytes, int) or max_batch_bytes < 1
        ):
            raise ValueError(f"max_batch_bytes must be a positive number of bytes, got {max_batch_bytes!r}.")
        if type(self).rule is SpectralOptimizer.rule:
            known = self.rule({"rule": rule}).hyperparameters
            if unknown := [key for key in hyperparameters if key not in known]:
                raise TypeError(
                    f"This rule reads {', '.join(known) or 'no numbers'} besides lr and weight_decay, got {unknown}."
                )
        elif unknown := [key for key in hyperparameters if key not in {*self._named_options(), *self.group_options}]:
            raise TypeError(
                f"{type(self).__name__} got the unknown options {unknown}; its own are "
                f"{', '.join(sorted({*self._named_options(), *self.group_options} - {'self', 'params', 'options'}))}, "
                f"and those of SpectralOptimizer."
            )
        self.kernels = checked(kernels)
        self.plan = None
        self._tables = Tables()
        self._recorder = metrics.Recorder()
        self._seen: list[edits.Seen] = []
        self._looked_at = -1
        replicas = params.process_group if isinstance(params, DistributedDataParallel) else None
        self._ranks = Ranks(placement, process_group, replicas)
        self._averaged = replicas is not None
        if isinstance(params, nn.Module):
            self.plan = plan(params, rules, others=self.others, strict=strict)
            params = self.plan.groups(params, options={*defaults, *ADAMW_DEFAULTS} - {"adamw", "rule"})
        elif rules:
            raise ValueError("rules route a module's parameters by name: pass the module itself instead of its parameters.")
        if isinstance(params, (set, frozenset)):
            raise TypeError(UNORDERED)
        check_numbers(defaults)
        check_numbers({**defaults, **defaults["adamw"]})
        # A lone tensor or a dict is left for torch to refuse.
        groups = params if isinstance(params, (Tensor, dict)) else list(params)
        if len(groups) == 0:
            raise ValueError("The optimizer got an empty parameter list: pass the model, or the parameters to train.")
        super().__init__(groups, defaults)
        if self.plan is None:
            self.plan = Plan.of_groups(self.param_groups)
        self._find_kernels()
        devices = [p.device for group in self.param_groups for p in group["params"]]
        self.max_batch_bytes = default_batch_bytes(devices) if max_batch_bytes is None else max_batch_bytes
        self._find_ranks()

    def __getstate__(self) -> dict[str, Any]:
        self._ranks.settle()
        own = {"plan": self.plan, "max_batch_bytes": self.max_batch_bytes, "_recorder": self._recorder}
        own["_averaged"] = self._averaged
        own["_ranks"] = self._ranks
        own["kernels"] = self.kernels
        own["_tables"] = Tables()
        return {**super().__getstate__(), **own, "_seen": [], "_looked_at": -1}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule of a spectral group. A preset overrides this to build it from the group's own options."""
        rule = group.get("rule")
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(f"rule must be a schatten.Rule, got {rule!r}.")
        return rule or Rule()

    # -- groups and state ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after the same checks as at construction; its state is made at once."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}.")
        group = dict(param_group)
        group["params"], names = unpack(group["params"])
        if names is not None:
            group["param_names"] = names
        spectral = group.setdefault("algorithm", "spectral") == "spectral"
        if spectral:
            self._refuse_fixed_options(group)
            self._refuse_unfed(self.rule({**self.defaults, **group}))
        group = completed(group, self.defaults)
        check_parameters(group)
        for i, p in enumerate(group["params"]):
            refuse_flat(name_of(group, i), p)
        if spectral:
            check_layouts(group)
            check_numbers(group, self.rule(group).hyperparameters)
        else:
            check_numbers(group)
        if not spectral or decays_explicitly(self.rule(group).retraction):
            check_stability(group)
        self._refuse_duplicates(group)
        fresh = {p: self._fresh_state(p, group) for p in group["params"]}
        keys = set(group)
        names = group.pop("param_names", None)
        if names is not None:
            group["params"] = list(zip(names, group["params"], strict=True))
        super().add_param_group(group)
        added = self.param_groups[-1]
        for key in set(added) - keys:  # defaults of the other algorithm, which torch has filled in
            del added[key]
        self.state.update(fresh)
        self._seen.append(edits.Seen.of(added, self.state))

    def _refuse_fixed_options(self, group: Mapping[str, Any]) -> None:
        options = self._named_options()
        fixed = [key for key in group if key in options and key not in self.defaults and key not in ("params", "rule")]
        if fixed:
            raise ValueError(
                f"{fixed[0]} is one for all groups of {type(self).__name__}, got it in a group: leave it to the constructor, "
                f"or give the group a rule of its own under the key 'rule'."
            )

    @classmethod
    def _named_options(cls) -> set[str]:
        return set(inspect.signature(cls.__init__).parameters)

    def _refuse_unfed(self, rule: Rule) -> None:
        feeder = getattr(rule.signal, "fed_by", None)
        if feeder is not None and feeder not in {base.__name__ for base in type(self).__mro__}:
            raise ValueError(f"{rule.signal!r} reads what {feeder} evaluates for it: build {feeder}(...) instead.")

    def _refuse_duplicates(self, group: Mapping[str, Any]) -> None:
        owned = {p: name_of(g, i) for g in self.param_groups for i, p in enumerate(g["params"])}
        for i, p in enumerate(group["params"]):
            if p in owned:
                raise ValueError(f"A parameter may be in one group, but {name_of(group, i)} is {owned[p]} of another group.")

    def _fresh_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        spectral = group["algorithm"] == "spectral"
        rule = self.rule(group) if spectral else None
        return self._ranks.fresh(p, lambda whole: fresh_state(whole, group, rule), spectral)

    # -- the step ------------------------------------------------------------------------------------------------------

    # A step chooses by shapes and counts on the host: traced, it would be compiled anew for each. This is torch's own mark,
    # which does not import the compiler, as torch.compiler.disable does.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient. `closure` re-evaluates the model and its value is returned.

        Gradients are only read. A parameter whose gradient is None does not move, decay or count; one whose gradient
        holds inf or nan is left as it is and counted in `metrics()`. All checks run before the first weight changes.
        """
        with use(self.kernels):
            return self._step_(closure)

    def _step_(self, closure: Callable[[], Any] | None) -> Any:
        checks = [self._ranks.settle, self._ranks.refuse_torn, self._check_edits, self._follow_replaced, self._find_ranks]
        if closure is not None:
            # Ranks that evaluate while another has refused would wait for it.
            self._decided(checks)
            checks = []
        loss: list[Any] = []
        decided = self._decided([*checks, lambda: loss.append(self.evaluate(closure)), self._refuse_unusable_gradients])
        room, index, shared = Room(self._tables), 0, self._ranks.numbers
        self._recorder.begin(self._step_number() + 1)
        for group in self.param_groups:
            group["step"] += 1
            indexed = [(i, p) for i, p in enumerate(group["params"], index) if i not in shared]
            index += len(group["params"])
            self._step_parameters_(indexed, group, room)
        if shared:
            self._step_on_ranks_(decided)
        self._recorder.end()
        return loss[0]

    def step_in_backward(self) -> ExitStack:
        """Step each parameter as soon as `backward` has its gradient, and free that: gradients of one parameter at a time.

        The loop stays as it is: `step()` then finds no gradient left and only counts, so that schedulers and
        `metrics(every=n)` work. Not for gradients that are accumulated, unscaled or clipped after `backward`. Returns the
        hooks; leaving it as a context or calling `close()` removes them. Raises TypeError for a preset that evaluates
        gradients itself.

        Example:
            >>> import torch, schatten
            >>> model = torch.nn.Linear(4, 4)
            >>> opt = schatten.Muon(model)
            >>> with opt.step_in_backward():
            ...     model(torch.ones(1, 4)).sum().backward()
            ...     opt.step()
            >>> model.weight.grad is None, float(opt.state[model.weight]["step"])
            (True, 1.0)
        """
        if type(self).evaluate is not SpectralOptimizer.evaluate:
            raise TypeError(f"{type(self).__name__} evaluates gradients in step(), so backward has none to step with.")
        self._check_edits()
        self._find_ranks()
        if self._ranks.numbers:
            raise TypeError(
                f"A parameter of shape {tuple(self._ranks.crews[0].members[0].p.shape)} lies on several ranks, whose gradients "
                f"are not there at the same time: call step() after backward. No hook was set."
            )
        if self._averaged:
            raise TypeError(
                "DistributedDataParallel averages gradients after these hooks, so each rank would step with its own: call "
                "step() after backward. No hook was set."
            )
        hooks, index = ExitStack(), 0
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    hooks.callback(p.register_post_accumulate_grad_hook(partial(self._step_now_, g, index)).remove)
                index += 1
        return hooks

    def overlap(self, model: nn.Module, *, backward: bool = True) -> Overlap:
        """Let what ranks send each other for a step travel while `model` computes (docs/overlap.md).

        In `backward` a bucket of matrices sets out as soon as the last of its gradients is reduced (FSDP2, HSDP and tensor
        parallel; a DistributedDataParallel module reduces later). Updates come back while the next forward runs, and are
        written before the module that reads them. Weights after a step are the same, to the last bit.

        Not in `backward` if gradients are changed after it: with `backward=False` they may be accumulated, clipped and
        unscaled, and only updates overlap. Takes up to eight bytes for each entry of this rank's share beside
        `max_batch_bytes`. Returns the hooks, a context; `close()` removes them, `finish()` brings all updates in, `discard()`
        takes no step with the last gradients. All ranks call these together.

        Raises TypeError for a preset that evaluates gradients in `step`, ValueError for a model without the parameters.

        Example:
            >>> import torch, schatten
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
            >>> opt = schatten.Muon(model)  # of fully_shard(model), on several ranks
            >>> with opt.overlap(model):
            ...     for _ in range(2):
            ...         model(torch.ones(1, 4)).sum().backward()
            ...         opt.step()
            ...         opt.zero_grad()
        """
        if backward and type(self).evaluate is not SpectralOptimizer.evaluate:
            raise TypeError(
                f"{type(self).__name__} evaluates gradients in step(), so backward has none to send: pass backward=False."
            )
        if self._ranks.overlap is not None:
            raise RuntimeError("Steps overlap with a model already: close() what overlap() has returned first.")
        self._check_edits()
        self._follow_replaced()
        self._find_ranks()
        self._ranks.overlap = Overlap(self, model, backward)
        return self._ranks.overlap

    @torch.no_grad()
    def _step_now_(self, g: int, index: int, p: Tensor) -> None:
        group = self.param_groups[g]
        if self._looked_at != self._step_number():  # the first of this backward
            self._check_edits()
            self._looked_at = self._step_number()
        refuse_unusable(p, lambda: f"the parameter number {index}")
        self._recorder.begin(group["step"] + 1)
        with use(self.kernels):
            self._step_parameters_([(index, p)], {**group, "step": group["step"] + 1}, Room(self._tables))
        p.grad = None

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """How a step gets its gradients: by `closure`, if there is one; its value is returned.

        A preset whose rule needs another evaluation (at other weights, or of the loss alone) overrides this.
        """
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _decided(self, checks: Sequence[Callable[[], Any]]) -> dict[int, tuple[bool, Tensor | None]]:
        """What ranks decide together once all `checks` have passed on each; see `Ranks.agree`. An error is raised on all."""
        failure = None
        try:
            for check in checks:
                check()
        except Exception as error:
            failure = error
            if self._ranks.seen is None:
                # The others are about to ask, in their first step too.
                with suppress(Exception):
                    self._find_ranks()
        squares = [
            group["algorithm"] == "adamw" or getattr(self.rule(group).signal, "squares", False)
            for group in (self.param_groups if self._ranks.crews and failure is None else ())
        ]
        return self._ranks.agree(self.param_groups, squares, failure, getattr(self, "found_inf", None))

    def _find_ranks(self) -> None:
        seen = [(seen.options, seen.forms) for seen in self._seen]
        if self._ranks.look(self.param_groups, self.state, self.rule, seen, self.max_batch_bytes) and self.plan is not None:
            self.plan = replace(self.plan, placement=self._ranks.text())
        if self._ranks.overlap is not None:
            self._ranks.overlap.follow()

    def _find_kernels(self) -> None:
        """Say in the plan what computes; raise if kernels are wanted where they cannot be."""
        devices = [p.device for group in self.param_groups for p in group["params"]]
        for device in dict.fromkeys(devices):
            refuse_unavailable(self.kernels, device)
        if self.plan is not None:
            self.plan = replace(self.plan, kernels=described(devices, self.kernels))

    def _step_on_ranks_(self, decided: Mapping[int, tuple[bool, Tensor | None]]) -> None:
        """Step the parameters that several ranks hold."""
        rules = [self.rule(group) if group["algorithm"] == "spectral" else Rule() for group in self.param_groups]
        scale, recorder = getattr(self, "grad_scale", None), self._recorder if self._recorder.open else None
        context = Context(self.param_groups, rules, scale, recorder)
        self._ranks.step_(decided, self.state, context, getattr(self, "found_inf", None))

    def _check_edits(self) -> None:
        """Refuse groups that were made unusable since the last step; nothing has changed then."""
        if len(self._seen) != len(self.param_groups):
            self._seen = [edits.Seen.of(group, self.state) for group in self.param_groups]
        self._seen = [
            edits.checked(g, group, seen, self.state, self.rule)
            for g, (group, seen) in enumerate(zip(self.param_groups, self._seen, strict=True))
        ]

    def _follow_replaced(self) -> None:
        follow_replaced_(self.state, self.param_groups, self._fresh_state)

    def _refuse_unusable_gradients(self) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                refuse_unusable(p, partial(name_of, group, i))
        if self._ranks.overlap is not None:
            self._ranks.overlap.check()

    def _step_parameters_(self, indexed: Iterable[tuple[int, Tensor]], group: Mapping[str, Any], room: Room) -> None:
        """Step those parameters of a group that have a gradient; each comes with its place in the optimizer."""
        # A GradScaler sets both for the time of a step, if `_step_supports_amp_scaling` is set on the optimizer.
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        stepped = [(index, p) for index, p in indexed if p.grad is not None and p.numel()]
        if any([follow_device_(self.state[p], p) for _, p in stepped]):
            self._find_kernels()
        if self._recorder.open:
            for index, p in stepped:
                self._recorder.gradient(index, p)
        if group["algorithm"] == "adamw":
            members = [Member(index, p, _whole(p), "", self.state[p], None) for index, p in stepped]
            before = [p.detach().to(wide(p.dtype), copy=True) for _, p in stepped] if self._recorder.open else []
            adamw_steps_(members, group, found_inf, scale, room.tables)
            for m, W in zip(members, before, strict=False):
                self._recorder.change(m.number, W, m.p, lr_of(group) * group["weight_decay"])
            return
        rule, members = self.rule(group), []
        params = [p for _, p in stepped]
        found = counted(params, [self.state[p] for p in params], found_inf, getattr(rule.signal, "squares", False))
        for (index, p), (moved, finite) in zip(stepped, found, strict=True):
            if moved:
                members += self._members(index, p, group, finite)
        # What is measured is stepped by the slots' own operations.
        lean = None if self._recorder.open else partial(iterates_bytes, rule)
        for batch in batches(members, self.max_batch_bytes, lean):
            self._spectral_step_(Part(batch), rule, group, room, scale)

    def _members(self, index: int, p: Tensor, group: Mapping[str, Any], finite: Tensor | None = None) -> list[Member]:
        """A spectral parameter as its pieces."""
        own = pieces(group["layout"], p.shape)
        return [Member(index, p, piece, s, self.state[p], finite) for piece, s in zip(own, suffixes(own), strict=True)]

    def _spectral_step_(self, whole: Part, rule: Rule, group: Mapping[str, Any], room: Room, scale: Tensor | None) -> None:
        """Step equal blocks, by `stepping.step_`."""
        step_(whole, rule, group, room, scale, self._recorder if self._recorder.open else None)

    # -- what can be seen ----------------------------------------------------------------------------------------------

    def metrics(self, every: int | None = None) -> dict[str, Any] | None:
        """What was done to each parameter, as plain numbers; reading them waits for the device.

        With `every=n`, called after each step, it returns numbers at every n-th step and None between, where a step is
        not slowed down and nothing waits. What must be measured inside a step is there from the second such call on.

        The keys are those of `schatten.metrics.read`.
        """
        if every is not None:
            if isinstance(every, bool) or not isinstance(every, int) or every < 1:
                raise ValueError(f"every must be a positive number of steps, got {every!r}.")
            self._recorder.every = every
            if self._step_number() % every:
                return None
        self._ranks.settle()
        self._follow_replaced()
        return metrics.read(self, self._recorder)

    def self_test(self) -> Report:
        """Step copies of some parameters and compare the update, decay, lr and accumulation with what the plan says.

        Nothing of this optimizer changes, nor the user's random state. Raises `schatten.self_test.SelfTestError`, which lists
        every check that failed; otherwise the report is a table to print. See `schatten.self_test.core.self_test`.

        Example:
            >>> import torch, schatten
            >>> opt = schatten.Muon(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)))
            >>> all(check.ok for check in opt.self_test())
            True
        """
        self._ranks.settle()
        return self_test(self)

    def _step_number(self) -> int:
        return max(group["step"] for group in self.param_groups)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; each spectral group carries the text of its rule (`schatten.checkpoint`)."""
        self._ranks.settle()
        self._follow_replaced()
        self._ranks.refuse_torn()
        return checkpoint.exported(super().state_dict(), self.param_groups, self.rule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an optimizer with the same rules, or from torch.optim.Muon's.

        lr, momentum and every other number come from the checkpoint; the rule must agree. Raises ValueError, before
        anything changes, for another rule, another optimizer's state or parameters that do not match.
        """
        self._ranks.settle()
        self._follow_replaced()
        if converters.is_torch_muon(state_dict):
            state_dict = converters.from_torch_muon(state_dict, self)
        checked = checkpoint.imported(state_dict, self.param_groups, self.state, self.rule)
        super().load_state_dict(checked)
        checkpoint.restore_precision(checked, self.param_groups, self.state)
        self._ranks.torn = False


def _whole(p: Tensor) -> Piece:
    return pieces("flat", p.shape)[0]
