"""What `test_accelerate_fsdp2.py` does on each rank: accelerate's own FSDP2, which it has for accelerators only, on the CPU."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

import schatten

STEPS = 3

TOKENS = torch.arange(32)


def start(preset: str) -> tuple[nn.Module, schatten.SpectralOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 32))
    return model, getattr(schatten, preset)(model, lr=1e-2)


def sharding() -> Accelerator:
    """An accelerator as it is with the plugin on GPUs: on the CPU accelerate leaves the plugin aside."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
    accelerator.state.fsdp_plugin = plugin
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def train(model: nn.Module, opt: Any, tokens: Tensor, accelerator: Accelerator | None = None) -> None:
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 32)
        loss.backward() if accelerator is None else accelerator.backward(loss)
        if accelerator is not None:
            accelerator.clip_grad_norm_(model.parameters(), 100.0)
        opt.step()
        opt.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor().clone() for name, p in model.named_parameters()}  # type: ignore[operator]


def prepared(rank: int, size: int, preset: str, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    model, opt = accelerator.prepare(*start(preset))
    train(model, opt, TOKENS[rank::size], accelerator)
    accelerator.save_state(str(folder / preset))
    at_save = weights(model)
    train(model, opt, TOKENS[rank::size], accelerator)
    uninterrupted = weights(model)
    accelerator.load_state(str(folder / preset))
    loaded = weights(model)
    train(model, opt, TOKENS[rank::size], accelerator)
    accelerator.free_memory()
    return {
        "sharded": all(hasattr(p, "full_tensor") for group in opt.param_groups for p in group["params"]),
        "saved": at_save,
        "loaded": loaded,
        "uninterrupted": uninterrupted,
        "resumed": weights(model),
        "kept": {name: len(opt.optimizer.state[p]) for name, p in model.named_parameters()},
    }


def of_rank(rank: int, size: int, presets: list[str], folder: Path) -> dict[str, Any]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({**{key: str(value) for key, value in own.items()}, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"})
    accelerator = sharding()
    return {preset: prepared(rank, size, preset, accelerator, folder) for preset in presets}
