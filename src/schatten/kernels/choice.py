"""Which back-end computes: eager torch everywhere, Triton's kernels where they run.

`"auto"` takes Triton for a CUDA device of capability 8.0 or higher, for bf16 and fp16, and for fp32 where torch is allowed
TF32. `"triton"` asks for it and raises where it cannot be; `"eager"` never takes it. What autograd or a tracer must see
through, and tensors without storage, are eager in any case.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "triton")

# The oldest GPU with bf16 tensor cores and asynchronous copies, which the kernels' tiles are made for.
CAPABILITY = (8, 0)

# The oldest Triton that the kernels have been compiled with.
OLDEST = (3, 6)

_name: ContextVar[str] = ContextVar("schatten_kernels", default="auto")


@contextmanager
def use(name: str) -> Iterator[None]:
    """Compute with this back-end inside the block: `"auto"`, `"eager"` or `"triton"`; of this thread or task alone.

    Raises ValueError for another name, and for `"triton"` where Triton is not installed.

    Example:
        >>> import torch
        >>> from schatten import kernels
        >>> with kernels.use("eager"):
        ...     A = kernels.gram(torch.eye(3).unsqueeze(0))
        >>> A.shape
        torch.Size([1, 3, 3])
    """
    token = _name.set(checked(name))
    try:
        yield
    finally:
        _name.reset(token)


def checked(name: str) -> str:
    """`name` if it is a back-end that can be asked for here."""
    if name not in BACKENDS:
        raise ValueError(f"kernels must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}.")
    if name == "triton" and (why := missing()):
        raise ValueError(f"kernels='triton' cannot be had, as {why}: install it, or leave kernels='auto'.")
    return name


@lru_cache(maxsize=1)
def missing() -> str:
    """What keeps this installation from Triton's kernels; empty if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for name in ("triton", "pytorch-triton"):
        # Asked of the installation, as importing it takes half a second.
        with suppress(PackageNotFoundError):
            own = version(name)
            return (
                "" if tuple(map(int, own.split(".")[:2])) >= OLDEST else f"Triton {own} is older than {OLDEST[0]}.{OLDEST[1]}"
            )
    return ""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def lacking(device: torch.device, name: str | None = None) -> str:
    """Why Triton's kernels do not run on `device` with back-end `name` (that in use by default); empty where they do."""
    name = _name.get() if name is None else name
    if name == "eager":
        return "asked for"
    kind = device.type
    if kind == "cuda":
        return _lacking_gpu(device)
    return "" if name == "triton" and kind == "cpu" and interpreted() else f"on {kind}"


@lru_cache(maxsize=64)
def _lacking_gpu(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "on ROCm"
    if why := missing():
        return why
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= CAPABILITY else f"the device has capability {capability[0]}.{capability[1]}, below 8.0"


def refuse_unavailable(name: str, device: torch.device) -> None:
    """Raise ValueError if `name` is "triton" and cannot be had on `device`."""
    if checked(name) == "triton" and (why := lacking(device, name)):
        raise ValueError(f"kernels='triton' cannot be had here ({why}): leave kernels='auto', which takes it where it can.")


def described(devices: Iterable[torch.device], name: str) -> str:
    """What computes on these devices if the back-end `name` is asked for, in words."""
    found = {device: lacking(device, name) for device in dict.fromkeys(devices)}
    texts = ["triton" if not why else f"eager ({why})" for why in found.values()]
    if len(set(texts)) == 1:
        return texts[0]
    return ", ".join(f"{text} on {device}" if text == "triton" else text for device, text in zip(found, texts, strict=True))


def tf32() -> bool:
    """Whether torch may multiply fp32 in TF32. The older question raises where the newer setting was used."""
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.fp32_precision == "tf32"
    except AttributeError:  # torch before 2.9
        return bool(matmul.allow_tf32)


def on_triton(X: Tensor, work: torch.dtype | None = None, *, products: bool = True) -> bool:
    """Whether Triton computes with `X`: products, in precision `work` where that is not X's; or element by element."""
    dtype = X.dtype if work is None else work
    if lacking(X.device) or X.numel() == 0 or torch.compiler.is_compiling() or type(X) not in (Tensor, torch.nn.Parameter):
        return False
    if torch.is_grad_enabled() and X.requires_grad:
        return False
    if products and dtype == torch.float32:
        # As fp32 its own library multiplies faster.
        return _name.get() == "triton" or tf32()
    return dtype in (torch.bfloat16, torch.float16, torch.float32)
