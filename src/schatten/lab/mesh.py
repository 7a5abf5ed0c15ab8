"""Meshes: how a model's parameters lie on any number of ranks, by the wrappers people use, without starting one of them."""

from dataclasses import dataclass

from torch.distributed.tensor import Placement, Replicate, Shard

from schatten.lab.errors import InputError
from schatten.layout import Layout
from schatten.placements.regions import Arrangement
from schatten.routing.entries import Entry

# Names of layers whose output features tensor parallelism divides, and of those whose input features it divides.
BY_COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc")
BY_ROW = ("o_proj", "down_proj", "c_proj")
BY_VOCABULARY = ("embed_tokens", "lm_head", "wte")


@dataclass(frozen=True)
class Mesh:
    """`replicate` copies of a model sharded over `shard` ranks (FSDP2) times `tp` (tensor parallel), the last the closest.

    `replicate` alone is DDP, with `shard` HSDP. `ep` of the shard x tp ranks of a copy divide the experts of a bank.
    """

    replicate: int = 1
    shard: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tp

    @staticmethod
    def parse(text: str) -> "Mesh":
        """`dp=64,tp=8`, `replicate=8,shard=8`: sizes by name, where `dp` is another name of `shard`. Raises InputError.

        Example:
            >>> from schatten.lab.mesh import Mesh
            >>> Mesh.parse("replicate=4,dp=8,tp=2").ranks
            64
        """
        names = {"dp": "shard", "shard": "shard", "replicate": "replicate", "tp": "tp", "ep": "ep"}
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = (word.strip() for word in part.partition("="))
            if name not in names or not number.isdecimal() or int(number) < 1:
                raise InputError(f"--mesh takes sizes such as dp=64,tp=8, of {', '.join(names)}, got {part.strip()!r}.")
            if names[name] in sizes:
                raise InputError(f"--mesh has {names[name]!r} twice, got {text!r}.")
            sizes[names[name]] = int(number)
        mesh = Mesh(**sizes)
        if (mesh.shard * mesh.tp) % mesh.ep:
            raise InputError(f"ep must divide the {mesh.shard * mesh.tp} ranks of a copy (dp times tp), got ep={mesh.ep}.")
        return mesh

    def of(self, entry: Entry) -> Arrangement:
        """How a parameter lies on the ranks."""
        experts = entry.route == "spectral" and _kind(entry.layout) == "experts"
        copy = self.shard * self.tp
        if experts and self.ep > 1:
            rest = copy // self.ep
            dims = [(rest, Shard(0 if entry.shape[0] % copy == 0 else 1)), (self.ep, Shard(0))]
        elif experts:
            dims = [(copy, Shard(0))]
        else:
            dims = [(self.shard, Shard(0)), (self.tp, self._across(entry))]
        found: list[tuple[int, Placement]] = [(self.replicate, Replicate()), *dims]
        kept = [(n, placement) for n, placement in found if n > 1] or [(1, Replicate())]
        return Arrangement(tuple(n for n, _ in kept), tuple(placement for _, placement in kept))

    def divides(self, entry: Entry) -> bool:
        """Whether tensor parallelism divides a parameter."""
        return not self._across(entry).is_replicate()

    def _across(self, entry: Entry) -> Placement:
        names = entry.name.split(".")
        flipped = isinstance(entry.layout, Layout) and entry.layout.transpose
        if len(entry.shape) != 2:
            return Replicate()
        if any(name in BY_COLUMN for name in names):
            return Shard(1 if flipped else 0)
        if any(name in BY_ROW for name in names):
            return Shard(0 if flipped else 1)
        return Shard(0) if any(name in BY_VOCABULARY for name in names) else Replicate()


def _kind(layout: str | Layout) -> str:
    return layout if isinstance(layout, str) else layout.kind
