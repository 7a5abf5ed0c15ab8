"""State passed on as dictionaries and files, converted and refused, as `tests/distributed/ranks.py` runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import schatten
from tests.distributed import parity_runs
from tests.distributed.checkpoint_parts import Run, Stepped, Values, state, stepped
from tests.distributed.parity_model import whole

# Steps before state is passed on.
STEPS = 2


def _set(own: Stepped, twin: Stepped, **options: bool) -> None:
    given = StateDictOptions(**options)
    saved = get_optimizer_state_dict(own.model, own.opt, options=given)
    set_optimizer_state_dict(twin.model, twin.opt, saved, options=given)


def _from_first(own: Stepped, twin: Stepped) -> None:
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(own.model, own.opt, options=full)
    assert bool(saved) == (dist.get_rank() == 0)
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(twin.model, twin.opt, saved, options=sent)


def _full_by_itself(own: Stepped, twin: Stepped) -> None:
    full = get_optimizer_state_dict(own.model, own.opt, options=StateDictOptions(full_state_dict=True))
    twin.opt.load_state_dict(full)


def dictionaries(rank: int, size: int, folder: Path, runs: list[Run]) -> list[dict[str, Values]]:
    """The state that each way of passing it on leaves in a new optimizer of the same placement."""
    return [_passed_on(stepped(run, size).step(range(STEPS)), run, size, folder, str(i)) for i, run in enumerate(runs)]


def _passed_on(own: Stepped, run: Run, size: int, folder: Path, name: str) -> dict[str, Values]:
    mine, common = folder / f"{name} of {dist.get_rank()}.pt", folder / f"{name}.pt"
    torch.save(own.opt.state_dict(), mine)
    schatten.save(own.opt, common)
    ways: dict[str, Callable[[Stepped], None]] = {
        "as it is": lambda twin: twin.opt.load_state_dict(own.opt.state_dict()),
        "a file of each rank": lambda twin: twin.opt.load_state_dict(torch.load(mine, weights_only=True)),
        "schatten.save": lambda twin: schatten.load(twin.opt, common),
        "full, by itself": lambda twin: _full_by_itself(own, twin),
        "full, of the first rank": lambda twin: _from_first(own, twin),
        "sharded": lambda twin: _set(own, twin),
        "on the host": lambda twin: _set(own, twin, cpu_offload=True),
        "flat": lambda twin: _set(own, twin, flatten_optimizer_state_dict=True),
        "full": lambda twin: _set(own, twin, full_state_dict=True),
    }
    if run.placement == "FSDP2 and tensor parallel":
        del ways["full"]  # torch cannot distribute whole tensors so, an AdamW's neither
    found = {"own": state(own.model, own.opt)}
    for way, pass_on in ways.items():
        twin = stepped(run, size)
        pass_on(twin)
        found[way] = state(twin.model, twin.opt)
    return found


def other_placements(rank: int, size: int, runs: list[Run]) -> dict[tuple[str, str], tuple[Values, Values]]:
    """The state of every run beside what every other takes over of its state_dict."""
    all_runs = {run.placement: stepped(run, size).step(range(STEPS)) for run in runs}
    found = {}
    for run in runs:
        for name, own in all_runs.items():
            twin = stepped(run, size)
            twin.opt.load_state_dict(own.opt.state_dict())
            found[name, run.placement] = (state(own.model, own.opt), state(twin.model, twin.opt))
    return found


def files(rank: int, size: int, folder: Path, runs: list[Run]) -> list[Values]:
    """What `schatten.load` makes of the files of `dictionaries`."""
    found = []
    for i, run in enumerate(runs):
        own = stepped(run, size)
        schatten.load(own.opt, folder / f"{i}.pt")
        found.append(state(own.model, own.opt))
    return found


def conversions(rank: int, size: int) -> dict[str, Values]:
    """Momentum of torch's optimizers under FSDP2, whole, and what of it stands in ours: of each state_dict, and gathered."""

    def whole_state(opt: torch.optim.Optimizer, key: str) -> Values:
        return {str(i): whole(opt.state[p][key]) for i, p in enumerate(matrices)}

    run = Run("FSDP2")
    own = stepped(run, size)
    matrices = _several_rows(own.model)
    names = [name for name, _ in own.model.named_parameters()]
    adamw, muon = torch.optim.AdamW(own.model.parameters()), torch.optim.Muon(matrices)
    own.with_gradients(0)
    adamw.step()
    muon.step()
    found = {"AdamW": whole_state(adamw, "exp_avg"), "Muon": whole_state(muon, "momentum_buffer")}
    own.opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), own.opt, names))
    found["AdamW, sharded"] = whole_state(own.opt, "momentum_buffer")
    full = get_optimizer_state_dict(own.model, adamw, options=StateDictOptions(full_state_dict=True))
    again = stepped(run, size)
    again.opt.load_state_dict(schatten.converters.from_adamw(full, again.opt, names))
    matrices = _several_rows(again.model)
    found["AdamW, full"] = whole_state(again.opt, "momentum_buffer")
    ours = schatten.Muon(matrices, scale="keller")
    ours.load_state_dict(muon.state_dict())
    found["Muon, sharded"] = whole_state(ours, "momentum_buffer")
    return found


def refusals(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What each rank hears of what one of them must refuse, and whether anything has changed."""
    own = stepped(Run("FSDP2", "NorMuon"), size).step(range(STEPS))
    before, heard = own.values(), {}

    def refused(name: str, act: Callable[[], None]) -> None:
        try:
            act()
            heard[name] = "nothing"
        except (ValueError, RuntimeError, OSError) as error:
            heard[name] = f"{type(error).__name__}: {error}"

    torch.save(own.opt.state_dict(), folder / f"refused {rank}.pt")
    schatten.save(own.opt, folder / "refused.pt")
    dist.barrier()
    first = torch.load(folder / "refused 0.pt", weights_only=True)
    refused("the first rank's part", lambda: own.opt.load_state_dict(first))
    damaged = own.opt.state_dict()
    if rank == 1:
        index = next(iter(damaged["state"]))
        kept = damaged["state"][index]
        damaged["state"] = {**damaged["state"], index: {**kept, "momentum_buffer": kept["momentum_buffer"] * torch.nan}}
    refused("nan on the second rank", lambda: own.opt.load_state_dict(damaged))
    path = folder / ("refused.pt" if rank else "nowhere.pt")
    refused("no file on the first rank", lambda: schatten.load(own.opt, path))
    refused("no folder", lambda: schatten.save(own.opt, folder / "nowhere" / "opt.pt"))
    unchanged = parity_runs.identical(before, own.values())
    own.step(range(1))  # nobody waits for anybody
    return {"heard": heard, "unchanged": unchanged}


def _several_rows(model: nn.Module) -> list[Tensor]:
    """Matrices that torch.optim.Muon can step: it fails for one row that is sharded."""
    return [p for p in model.parameters() if p.ndim == 2 and len(p) > 1]
