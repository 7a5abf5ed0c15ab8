"""Fixtures for every test: a fixed seed, and the axes that contracts run over.

Without a GPU, Triton's kernels run in its interpreter, which must be asked for before anything imports Triton.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from schatten import presets


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=presets.__all__)
def any_preset(request):
    """Every optimizer of `schatten.presets`; a new file there is tested without being named here."""
    return getattr(presets, request.param)


@pytest.fixture(params=[name for name in presets.__all__ if not getattr(presets, name).needs_closure])
def preset(request):
    """Every one that reads gradients: all but the zero-order ones."""
    return getattr(presets, request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def dtype(request):
    return request.param
