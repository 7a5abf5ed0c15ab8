"""The tiles a product is made of: a few candidates for each kind of product, of which `tuning` takes the fastest.

Compiled for capability 8.0 and 9.0 none of them spills registers where it is used, but for two to six that the capped one
keeps in local memory behind its loop; and 9.0 multiplies bf16, fp16 and TF32 by its own instructions (`wgmma`).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from schatten.kernels.choice import interpreted


class Tiles(NamedTuple):
    """The entries of a result that one program computes, and how.

    It adds `depth` terms at a time, with `warps` warps, loads them in a pipeline of `stages`, and may take `registers` in each
    thread (0: as many as it likes).
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    registers: int = 0


LARGE = Tiles(128, 128, 64, 8, 3)

# Two programs of 8 warps share a multiprocessor if a thread takes at most 128 registers, and one multiplies while the other
# stores. The symmetric product takes 134 on 9.0, and 175 on 8.0, which it would spill; in fp16 it spills on 9.0 as well.
CAPPED = Tiles(128, 128, 64, 8, 3, 128)

# Twice the entries for each warp: 9.0 alone keeps factors in shared memory, and has the registers for it.
DENSE = Tiles(128, 128, 64, 4, 3)

# The larger a tile, the fewer times rows and columns are read. On 8.0 a symmetric product would spill.
WIDE = Tiles(128, 256, 64, 8, 3)
TALL = Tiles(256, 128, 64, 8, 3)

LOW = Tiles(64, 128, 64, 4, 4)
MIDDLE = Tiles(64, 64, 64, 4, 4)
SMALL = Tiles(32, 32, 64, 4, 4)

# What has no room for a sum or a weight beside its result, and what takes its place there.
UNFUSED = {CAPPED: LARGE, WIDE: LARGE, TALL: LARGE, DENSE: LARGE}

# Rows that do not begin at multiples of 16 entries are loaded entry by entry, past the pipeline.
LOOSE = (Tiles(64, 64, 64, 8, 2), Tiles(32, 32, 64, 4, 2))

# fp32 without TF32 has no tensor cores.
EXACT = (Tiles(64, 64, 16, 4, 3), Tiles(32, 32, 32, 4, 3))

# In Triton's interpreter, for tests: several programs even for small matrices.
INTERPRETED = Tiles(32, 32, 32, 4, 1)


def candidates(
    kind: str, m: int, n: int, batch: int, dtype: torch.dtype, precision: str, loose: bool, device: torch.device
) -> tuple[Tiles, ...]:
    """Tiles for a `"gram"`, `"sym"` or `"affine"` product (batch, m, n), the one to take unseen first."""
    if interpreted():
        return (INTERPRETED,)
    if precision == "ieee" and dtype == torch.float32:
        return EXACT
    if loose:
        return LOOSE
    processors, hopper = _device(device)
    if m <= 32:
        found = (SMALL, MIDDLE)
    elif m <= 64:
        found = (MIDDLE, LOW) if kind == "affine" else (MIDDLE, SMALL)
    elif kind == "affine":
        found = (LARGE, WIDE, DENSE, MIDDLE) if hopper else (LARGE, WIDE, MIDDLE)
    elif kind == "sym":
        found = (CAPPED if dtype == torch.bfloat16 else LARGE, TALL, MIDDLE) if hopper else (LARGE, MIDDLE)
    else:
        found = (LARGE, TALL, DENSE, MIDDLE) if hopper else (LARGE, MIDDLE)
    if dtype == torch.float32:
        shallow = dict.fromkeys(UNFUSED.get(t, t) for t in found)
        found = tuple(t._replace(depth=t.depth // 2) for t in shallow)
    # Too few large tiles would leave processors idle.
    if m > 64 and batch * m * (n if kind == "affine" else m // 2) < processors * LARGE.rows * LARGE.cols:
        found = (found[-1], *found[:-1])
    return found


@lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[int, bool]:
    """How many multiprocessors a device has, and whether it is a Hopper."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major == 9
