"""How long ranks stand still in a step's exchanges, with `opt.overlap(model)` and without.

    python benchmarks/overlap.py [--ranks 2] [--width 256] [--layers 4] [--rounds 10] [--links 0,20,5] [--out FILE.json]

A GPT under FSDP2 and under DistributedDataParallel, on gloo ranks of one thread each. Training with and without overlap takes
turns of four iterations (forward, backward, step), of which the first is not counted, so that what travels at the end of a turn
stands for what traveled at its begin. Measured for an iteration are the seconds that a rank spends in `wait()` of exchanges,
mean over ranks, and the seconds of its step and of all of it, of the slowest rank; medians and quartiles over rounds. The
hidden share is 1 - (blocked with) / (blocked without).

Ranks of one machine send through its memory, by the cores that also compute, which no overlap can hide. So `--links` has, in
MB/s, the rate of a link that each rank's exchanges pass one after another, and that takes no core: an exchange is over when
gloo says so and the link would have carried its bytes. 0 is without.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import schatten
from schatten.placements import exchange

VOCABULARY, LENGTH, HEADS = 512, 64, 4

# Iterations that are counted in a turn.
COUNTED = 3

PLACEMENTS = ("fsdp2", "ddp")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.n_head = HEADS
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(self.norm_1(x)).chunk(3, dim=-1))
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        x = self.tokens(batch[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())


class Link:
    """A collective that is over when it is, and when a link of `rate` bytes per second has carried its bytes."""

    free = 0.0

    def __init__(self, work: dist.Work, sent: int, rate: float) -> None:
        self.work = work
        Link.free = self.due = max(Link.free, time.perf_counter()) + (sent / rate if rate else 0.0)

    def is_completed(self) -> bool:
        return self.work.is_completed() and time.perf_counter() >= self.due

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.due - time.perf_counter()))


@contextmanager
def measured(rate: float) -> Iterator[list[float]]:
    """Exchanges over such a link, and the seconds of each `wait()`."""
    blocked: list[float] = []

    def linked(init: Callable[..., None]) -> Callable[..., None]:
        def linking(own: Any, *args: Any, **kwargs: Any) -> None:
            init(own, *args, **kwargs)
            if own.work is not None:
                gathers = isinstance(own, exchange.Gathering)
                own.work = Link(own.work, own.received.nbytes - own.sent.nbytes if gathers else own.sent.nbytes, rate)

        return linking

    def timed(wait: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def timing(own: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(own)
            finally:
                blocked.append(time.perf_counter() - start)

        return timing

    with ExitStack() as patches:
        for kind in (exchange.Exchange, exchange.Gathering):
            patches.enter_context(mock.patch.object(kind, "__init__", linked(kind.__init__)))
            patches.enter_context(mock.patch.object(kind, "wait", timed(kind.wait)))
        yield blocked


class Training(NamedTuple):
    """An iteration, which gives the seconds of its step, how a turn ends, and the number of buckets."""

    iteration: Callable[[], float]
    end: Callable[[], None]
    buckets: int


def training(placement: str, overlapped: bool, args: argparse.Namespace) -> Training:
    torch.manual_seed(0)
    model: nn.Module = GPT(args.width, args.layers)
    if placement == "fsdp2":
        mesh = init_device_mesh("cpu", (args.ranks,))
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    opt = schatten.Muon(model, lr=1e-3, max_batch_bytes=args.bytes, placement="owners" if placement == "ddp" else None)
    end = opt.overlap(model).finish if overlapped else lambda: None
    generator = torch.Generator().manual_seed(dist.get_rank())

    def iteration() -> float:
        model(torch.randint(0, VOCABULARY, (args.batch, LENGTH + 1), generator=generator)).backward()
        start = time.perf_counter()
        opt.step()
        taken = time.perf_counter() - start
        opt.zero_grad()
        return taken

    iteration()
    teams = [crew.team for crew in opt._ranks.crews if crew.team is not None]
    return Training(iteration, end, sum(len(team.buckets) for team in teams))


def compared(placement: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of both ways in each round."""
    with measured(rate) as blocked:
        trainings = {name: training(placement, name == "overlap", args) for name in ("plain", "overlap")}
        times: dict[str, dict[str, list[float]]] = {name: {"blocked": [], "step": [], "iteration": []} for name in trainings}
        for repeat in range(args.rounds + 1):
            for name, own in trainings.items():
                dist.barrier()
                own.iteration()
                blocked.clear()
                start = time.perf_counter()
                steps = sum(own.iteration() for _ in range(COUNTED))
                taken = torch.tensor([sum(blocked), steps, time.perf_counter() - start], dtype=torch.float64) / COUNTED
                own.end()
                slowest = taken.clone()
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                dist.all_reduce(taken)
                mean = float(taken[0]) / args.ranks
                for key, value in zip(times[name], [mean, *slowest[1:].tolist()], strict=True) if repeat else ():
                    times[name][key].append(1e3 * value)
    return {"buckets": trainings["plain"].buckets, "milliseconds": times}


def on_ranks(rank: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), args.ranks)  # noqa: PTH118
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.ranks)
    found = {
        f"{placement}, {link}": compared(placement, 1e6 * float(link), args)
        for placement in PLACEMENTS
        for link in args.links.split(",")
    }
    if rank == 0:
        torch.save(found, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def started(args: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=on_ranks, args=(r, folder, args), daemon=True) for r in range(args.ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=args.timeout)
        hung = [p for p in processes if p.exitcode != 0]
        for process in processes:
            process.kill()
        if hung:
            raise RuntimeError(f"{len(hung)} of {args.ranks} ranks failed or took longer than {args.timeout} s.")
        return torch.load(Path(folder) / "result.pt")


def ratios(over: Sequence[float], under: Sequence[float]) -> str:
    """Median and quartiles of one time over another in the same round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def summed_up(row: dict[str, Any]) -> dict[str, Any]:
    plain, overlap = (row["milliseconds"][name] for name in ("plain", "overlap"))
    hidden = 1 - common.median(overlap["blocked"]) / common.median(plain["blocked"])
    return {
        "hidden share": round(hidden, 3),
        "blocked": {
            name: [common.median(t["blocked"]), common.spread(t["blocked"])] for name, t in row["milliseconds"].items()
        },
        "step ratio": ratios(overlap["step"], plain["step"]),
        "iteration ratio": ratios(overlap["iteration"], plain["iteration"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bytes", type=int, default=16 << 20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--links", default="0,20,5")
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overlap.json"))
    args = parser.parse_args()
    rows = {name: {**row, **summed_up(row)} for name, row in started(args).items()}
    print(
        f"{'placement, MB/s':16}{'buckets':>8}{'blocked ms':>26}{'with overlap':>26}{'hidden':>8}  step, iteration over plain's"
    )
    for name, row in rows.items():
        plain, overlap = (f"{ms:.1f} ({spread})" for ms, spread in row["blocked"].values())
        print(f"{name:16}{row['buckets']:8}{plain:>26}{overlap:>26}{row['hidden share']:8.0%}  ", end="")
        print(f"{row['step ratio']}, {row['iteration ratio']}")
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "timeout")}
    common.save(args.out, "overlap", {"settings": settings, "results": rows})


if __name__ == "__main__":
    main()
