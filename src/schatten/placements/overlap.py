"""Overlap: what a step sends travels while the model computes, to the owners in `backward`, from them in the next forward.

| when | what |
|---|---|
| `backward` has reduced the last gradient of a bucket | its signals are sent, and what has arrived is computed and sent back |
| `step()` | ranks decide what moves; the rest is sent and computed, and state is kept |
| before the forward of a module | its updates are waited for and written |

Nobody waits in `backward`, and nothing is kept there. Weights are those of steps without overlap, to the last bit.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor

from schatten.groups import name_of
from schatten.kernels.choice import use
from schatten.placements.agreement import agree, group_like
from schatten.placements.flight import Context, Flight
from schatten.placements.lane import Lane, Moving
from schatten.placements.local import Local, plain, plain_parameter
from schatten.placements.schedule import whole_step
from schatten.placements.units import Unit, gathered, gathers_others, units
from schatten.rule import Rule

if TYPE_CHECKING:
    from schatten.optimizer import SpectralOptimizer
    from schatten.placements.ranks import Crew, Member


class Stamp(NamedTuple):
    """A tensor and what changes when somebody writes to it: place and versions, of a DTensor its own and its part's."""

    tensor: Tensor
    at: tuple[int, ...]

    @staticmethod
    def of(t: Tensor) -> "Stamp":
        own = plain(t)
        return Stamp(t, (own.data_ptr(), t._version, own._version))

    def holds(self, t: Tensor | None) -> bool:
        return t is not None and t is self.tensor and Stamp.of(t).at == self.at


class Waiting(NamedTuple):
    """A bucket on its way back, and the weights as it will have to find them, by number."""

    lane: Lane
    flight: Flight
    weights: Mapping[int, Stamp]


class Overlap:
    """The hooks by which an optimizer's steps overlap with its model: see `schatten.SpectralOptimizer.overlap`.

    A context; leaving it, or `close()`, brings in what is on its way and removes the hooks, on all ranks together.
    """

    def __init__(self, opt: "SpectralOptimizer", model: nn.Module, backward: bool) -> None:
        self.opt, self.model, self.backward = opt, model, backward
        self.ranks = opt._ranks
        self.hooks = ExitStack()
        self.lanes: dict[tuple[int, ...], Lane] = {}
        self.waiting: list[Waiting] = []
        self.crews: list[Crew] | None = None
        self._forget()
        self.follow()

    def _forget(self) -> None:
        """Know nothing of a backward that is over."""
        self.given: dict[int, Stamp] = {}
        self.read: dict[int, list[Stamp]] = {}
        self.context: Context | None = None

    # -- the handle ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Wait for the updates that are on their way, and write them: weights are then those of the last step.

        Called by `state_dict()` and `load_state_dict()` of model and optimizer, `metrics()`, `self_test()` and the next step.
        A loop calls it before it reads or writes weights by other means than a module's forward, such as an average of them
        or an FSDP2 module's `unshard()`.
        """
        if self.ranks.torn:
            self.waiting.clear()
        self._land(self.waiting)

    def discard(self) -> None:
        """Take no step with the gradients of the last `backward`, for a loop that skips one; all ranks call it together."""
        for crew in self.crews or ():
            rank, ahead = dist.get_rank(crew.host), self.ahead(crew)
            self.agreed(crew, agree([], [], [], crew.host, rank, failed=False, fingerprint=0, ahead=ahead).ahead)
        self.drop()

    def close(self) -> None:
        """Bring in what is on its way and step without overlap from now on; all ranks call it together."""
        self._close(together=not self.ranks.torn)

    def __enter__(self) -> "Overlap":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Of a rank that has failed the others know nothing.
        self._close(together=kind is None and not self.ranks.torn)

    def _close(self, together: bool) -> None:
        if self.ranks.overlap is not self:
            return
        self.ranks.overlap = None
        self.hooks.close()
        if together:
            self.finish()
            self.discard()
        else:
            self.ranks.aside.clear()
        self.ranks.torn |= bool(self.waiting)

    # -- who has what ----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Set hooks, or set them anew where groups or parameters are others now; all ranks of a group come here together."""
        if self.crews is self.ranks.crews:
            return
        if any(lane.flights for lane in self.lanes.values()):
            raise RuntimeError(
                "Param groups were changed between backward and step, with gradients on their way to their owners: change them "
                "after a step. No weight was changed."
            )
        self.hooks.close()
        self._forget()
        self.crews, self.lanes = self.ranks.crews, {}
        self.members: dict[int, tuple[Lane, Member]] = {}
        for crew in self.crews:
            if crew.team is not None and crew.team.buckets:
                lane = self.lanes[_ranks(crew)] = Lane(crew.team, *self._groups_of(crew))
                self.members |= {m.number: (lane, m) for m in crew.members if any(m.number in own for own in lane.numbers)}
        self._hook(units(self.model) if self.members else [])

    def _groups_of(self, crew: "Crew") -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        ranks = _ranks(crew)
        if ranks not in self.ranks.aside:
            assert crew.team is not None
            device = crew.team.wire.device
            # Never destroyed: torch would give the next group its name, under which ranks find addresses of the old.
            self.ranks.aside[ranks] = (group_like(crew.group, device), group_like(crew.group, device))
        return self.ranks.aside[ranks]

    def _hook(self, units: Sequence[Unit]) -> None:
        read = [(unit, frozenset(n for n, (_, m) in self.members.items() if m.p in unit.parameters)) for unit in units]
        for number, (_, m) in self.members.items():
            if not any(number in numbers for _, numbers in read):
                raise ValueError(f"The model must have all parameters that ranks share, but {self._name(m)} is not in it.")
            if m.p.requires_grad:
                self._keep(m.p.register_post_accumulate_grad_hook(partial(self._given, number)))
        for unit, numbers in read:
            for module in unit.modules if numbers else ():
                self._keep(module.register_forward_pre_hook(partial(self._before_forward, numbers), prepend=True))
        for module in self.model.modules() if self.members else ():
            self._keep(module.register_state_dict_pre_hook(self._before_state_dict))
            self._keep(module.register_load_state_dict_pre_hook(self._before_state_dict))

    def _keep(self, hook: Any) -> None:
        self.hooks.callback(hook.remove)

    def _name(self, m: "Member") -> str:
        group = self.opt.param_groups[m.group]
        at = next(i for i, p in enumerate(group["params"]) if p is m.p)
        return f"{name_of(group, at)} of shape {tuple(m.p.shape)}"

    # -- in backward -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _given(self, number: int, p: Tensor) -> None:
        """A parameter has its gradient: start its bucket if that is the last, and compute what has arrived."""
        lane, m = self.members[number]
        if any(number in waiting.flight.moving for waiting in self.waiting):
            raise RuntimeError(
                f"{self._name(m)} has a gradient of this backward while its update of the last step is still on its way, so "
                f"forward has read the weight of the step before: call finish() on what overlap() returned, before weights are "
                f"read other than by their module's forward."
            )
        assert p.grad is not None
        self.given[number] = Stamp.of(p.grad)
        if not self.backward or self.ranks.torn or self.crews is not self.ranks.crews:
            return
        with use(self.opt.kernels), lane.aside():
            while lane.next and all(map(self._ready, lane.next)):
                lane.start({n: self._local(n) for n in lane.next}, self._early_context())
            if not self._measured():
                lane.compute()

    def _ready(self, number: int) -> bool:
        """Whether a gradient is that of all ranks, and where its parameter is."""
        p = self.members[number][1].p
        grad = p.grad
        # DistributedDataParallel reduces a plain one later.
        if number not in self.given or not isinstance(p, DTensor) or not isinstance(grad, DTensor):
            return False
        return grad.placements == p.placements and self.given[number].holds(grad)

    def _early_context(self) -> Context:
        if self.context is None:
            groups = [{**group, "step": group["step"] + 1} for group in self.opt.param_groups]
            self.context = Context(groups, self._rules(), None, None)
        return self.context

    def _rules(self) -> list[Rule]:
        return [self.opt.rule(group) if group["algorithm"] == "spectral" else Rule() for group in self.opt.param_groups]

    def _local(self, number: int) -> Local:
        m = self.members[number][1]
        assert m.traveller is not None
        self.read[number] = [Stamp.of(t) for t in self._reads(m)]
        own = {key: plain(value) for key, value in self.opt.state[m.p].items()}
        # Counted in the step only, for which this is.
        return Local(m.traveller, plain_parameter(m.p), {**own, "step": own["step"] + 1}, None)

    def _reads(self, m: "Member") -> list[Tensor]:
        assert m.p.grad is not None and m.traveller is not None
        weights = [m.p] if whole_step(m.traveller.rule) else []
        return [m.p.grad, *self.opt.state[m.p].values(), *weights]

    def _measured(self) -> bool:
        """Whether the step will be measured, which is done where directions are computed."""
        every = self.opt._recorder.every
        return bool(every) and (self.opt._step_number() + 1) % every == 0

    # -- the step --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise RuntimeError if what was sent in backward is not what this step would send."""
        if self.context is None:
            return
        if getattr(self.opt, "grad_scale", None) is not None:
            raise RuntimeError(f"Gradients were sent in backward before a GradScaler unscaled them: {WAY_OUT}")
        for number, read in self.read.items():
            m = self.members[number][1]
            now = self._reads(m) if m.p.grad is not None else []
            if len(now) != len(read) or not all(stamp.holds(t) for stamp, t in zip(read, now, strict=True)):
                raise RuntimeError(
                    f"Gradient or state of {self._name(m)} is another than was sent to the owner in backward: {WAY_OUT}"
                )
        for g, (group, rule) in enumerate(zip(self.opt.param_groups, self._rules(), strict=True)):
            early = self.context.groups[g]
            keys = ("maximize", *rule.hyperparameters) if group["algorithm"] == "spectral" else ()
            if rule != self.context.rules[g] or any(_number(group[key]) != _number(early[key]) for key in keys):
                raise RuntimeError(
                    f"Numbers of param group {g}, one of {', '.join(keys)}, were changed after backward had sent signals made "
                    f"with them: change them before backward; lr and weight_decay may be later. No weight was changed."
                )

    def ahead(self, crew: "Crew") -> tuple[int, int]:
        """How many buckets of a crew this rank has started and computed."""
        lane = self.lanes.get(_ranks(crew))
        return (0, 0) if lane is None else lane.ahead

    def agreed(self, crew: "Crew", ahead: tuple[int, int]) -> None:
        """How many any of its ranks has."""
        if lane := self.lanes.get(_ranks(crew)):
            lane.goal = ahead

    def drop(self) -> None:
        """Take no step, after `agreed`."""
        self._forget()
        torn, self.ranks.torn = self.ranks.torn, True
        for lane in self.lanes.values():
            with torch.no_grad(), lane.aside():
                lane.drop()
            lane.join()
        self.ranks.torn = torn

    def fly(self, crew: "Crew", moving: Moving, context: Context) -> None:
        """The part of the step that buckets take, to where they are on their way back."""
        self._forget()
        if lane := self.lanes.get(_ranks(crew)):
            # A schedule may have changed lr by the time weights are written.
            context = context._replace(groups=[_kept(group) for group in context.groups])
            with lane.aside():
                flights = lane.fly(moving, context)
            lane.join()
            for flight in flights:
                flight.let_go()
                self.waiting.append(Waiting(lane, flight, {n: Stamp.of(self.members[n][1].p) for n in flight.moving}))

    # -- in the next forward ---------------------------------------------------------------------------------------------

    @_disable_dynamo
    def _before_forward(self, numbers: Collection[int], module: nn.Module, _: Any) -> None:
        mine = [w for w in self.waiting if gathers_others(module) or any(n in w.flight.moving for n in numbers)]
        if not mine:
            return
        self.ranks.refuse_torn()
        if gathered(module):
            raise RuntimeError(
                f"{type(module).__name__} has gathered its weights before their updates had arrived: call finish() on what "
                f"overlap() returned before unshard()."
            )
        self._land(mine)

    def _before_state_dict(self, *_: Any) -> None:
        self.finish()

    def _land(self, waiting: Sequence[Waiting]) -> None:
        """Wait for these, then write them; a rank that dies before leaves weights behind their momentum."""
        waiting = list(waiting)
        if not waiting:
            return
        self.ranks.torn = True
        with torch.no_grad():
            for lane, flight, weights in waiting:
                with lane.aside():
                    flight.arrive()
                for number, stamp in weights.items():
                    if not stamp.holds(self.members[number][1].p):
                        raise RuntimeError(
                            f"{self._name(self.members[number][1])} was written to while its update was on its way, which is "
                            f"lost: call finish() on what overlap() returned before, and load the last checkpoint."
                        )
            for lane, flight, _ in waiting:
                with use(self.opt.kernels), lane.aside():
                    flight.write_()
                lane.join()
        landed = {id(w) for w in waiting}
        self.waiting = [w for w in self.waiting if id(w) not in landed]
        self.ranks.torn = False


WAY_OUT = (
    "gradients that are accumulated, clipped or unscaled after backward, and steps that are skipped, need "
    "overlap(model, backward=False), or discard() where one backward has no step. No weight was changed."
)


def _ranks(crew: "Crew") -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(crew.group))


def _kept(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group as it is now."""
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in own.items()}


def _number(value: Any) -> Any:
    """A number to compare; what lies on a device is not looked at."""
    return float(value) if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1 else value
