"""Launches to compile: every kind of product, pass and step, by name, on CPU tensors that nothing reads."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from compile_parts import launches  # noqa: F401  (before kernels are defined)

import schatten
import schatten.kernels.triton as ours
from schatten import batching
from schatten.kernels import Bucket, Onto, Tables
from schatten.kernels.triton.product import affine_onto
from schatten.lab.models import GPT, GPTConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
STEP = "the first step of Muon on GPT-2 small"


def products(dtype: torch.dtype, *, all_forms: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a launch for each way a step calls the products; with `all_forms` not of wide matrices alone."""
    forms = {
        "": torch.empty(4, 768, 3072, dtype=dtype),
        " of transposed": torch.empty(4, 3072, 768, dtype=dtype).mT,
        " of odd sizes": torch.empty(3, 77, 333, dtype=dtype),
    }
    for name, X in forms.items() if all_forms else [("", forms[""])]:
        b, m, n = X.shape
        A, weight = X.new_empty(b, m, m), torch.empty(b, 1, 1)
        square, total = A.float(), torch.empty_strided(X.shape, X.stride())
        yield f"gram{name}", partial(ours.gram, X)
        yield f"sym{name}", partial(ours.sym, A, A, A, 1.5, 0.5)
        yield f"sym{name} into a sum", partial(ours.sym, A, A, A, 1.5, 0.5, total=square, weight=0.25)
        yield f"sym{name} into a sum by tensors", partial(ours.sym, A, A, A, 1.5, 0.5, total=square, weight=weight)
        yield f"affine{name}", partial(ours.affine, A, X, 1.5)
        yield f"affine{name} alone", partial(ours.affine, A, X, 0.0)
        yield f"affine{name} into a sum", partial(ours.affine, A, X, 1.5, total=total, weight=0.25)
        for kind, onto in ontos((1, m, n), b).items():
            yield f"affine{name} onto {kind}", partial(affine_onto, A, X, 1.5, onto=onto)


def ontos(shape: tuple[int, int, int], members: int) -> dict[str, Onto]:
    """Weights, in rows and in columns, in the ways that a step changes them."""
    blocks, m, n = shape
    row, column = (m * n, n, 1), (m * n, 1, m)

    def bucket(dtype: torch.dtype, strides: tuple[int, int, int] = row) -> Bucket:
        return Bucket([torch.empty(blocks, m, n, dtype=dtype) for _ in range(members)], shape, strides)

    number = torch.tensor(1e-3)
    finite = [torch.tensor(True) for _ in range(members)]
    noise = [(torch.tensor(1.0), i) for i in range(members)]
    return {
        "fp32": Onto(bucket(torch.float32), 0.9, 1e-3, finite),
        "fp32 in columns": Onto(bucket(torch.float32, column), 0.9, 1e-3, finite),
        "fp32 by tensors": Onto(bucket(torch.float32), number, number, finite),
        "bf16": Onto(bucket(torch.bfloat16), 0.9, 1e-3, finite),
        "bf16 by noise": Onto(bucket(torch.bfloat16), 0.9, 1e-3, finite, noise),
    }


def passes(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same for passes over gradients, averages and weights."""
    b, m, n = 4, 3072, 768
    tables, finite = Tables(), [torch.tensor(True) for _ in range(b)]
    G, M = ([torch.empty(m, n, dtype=of) for _ in range(b)] for of in (dtype, torch.float32))
    for name, wide in (("momentum", False), ("momentum transposed", True)):
        yield (
            name,
            partial(
                ours.momentum_,
                *(Bucket(of, (1, m, n), (m * n, n, 1)) for of in (G, M)),
                finite,
                beta=0.95,
                form="ema",
                nesterov=True,
                scale=None,
                maximize=False,
                dtype=dtype,
                wide=wide,
                tables=tables,
            ),
        )
    S = torch.empty(b, m, n, dtype=dtype)
    yield "quotient", partial(ours.quotient, S, torch.empty(b, 1, 1), dtype)
    yield "quotient of transposed", partial(ours.quotient, S.mT, torch.empty(b, 1, 1), dtype)
    for kind, onto in ontos((1, m, n), b).items():
        yield f"retract onto {kind}", partial(ours.retract_, S, onto)
    steps = [torch.tensor(1.0) for _ in range(b)]
    V = [torch.empty(m, n) for _ in range(b)]
    for name, noise in (("adamw", None), ("adamw by noise", [(step, i) for i, step in enumerate(steps)])):
        if noise is None or dtype == torch.bfloat16:
            yield (
                name,
                partial(
                    ours.adamw_,
                    *([torch.empty(m, n, dtype=dtype) for _ in range(b)], G, M, V, steps, finite),
                    lr=1e-3,
                    beta1=0.9,
                    beta2=0.95,
                    eps=1e-8,
                    weight_decay=0.1,
                    maximize=False,
                    scale=None,
                    noise=noise,
                    tables=tables,
                ),
            )


def gpt2_step() -> None:
    """The first step of Muon on GPT-2 small with fp32 weights, multiplied in bf16."""
    model = GPT(GPTConfig(vocabulary=50304, layers=12, heads=12, width=768, context=1024))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    solver = schatten.solvers.polynomial(dtype="bfloat16")
    # As much memory as on a GPU: how many matrices go together is a number that varieties are compiled for.
    optimizer = schatten.Muon(model, lr=6e-4, solver=solver, max_batch_bytes=batching.MAX_GPU_BATCH_BYTES)
    optimizer.step()


def at_precision(name: str, launch: Callable[[], object]) -> None:
    """Launch with torch told to multiply fp32 at this precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        launch()
    finally:
        torch.set_float32_matmul_precision(before)


def examples() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {STEP: gpt2_step}
    for name, dtype in DTYPES.items():
        for kind, launch in (*products(dtype, all_forms=name == "bf16"), *(() if name == "tf32" else passes(dtype))):
            found[f"{kind}, {name}"] = partial(at_precision, "high" if name == "tf32" else "highest", launch)
    return found
