"""FSDP2 in the laboratory: torch's `fully_shard` on every block, and checkpoints of what it shards.

accelerate's own plugin shards on accelerators only, so the model is sharded before the optimizer is built and accelerate's
loop gets it as it is: the same on a CPU.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from schatten.lab.models import GPT

# The whole weights, as every other checkpoint has them; the optimizer's state, each process its own part.
WEIGHTS, STATE = "model.safetensors", "optimizer"


def shard(model: GPT, accelerator: Accelerator) -> GPT:
    """`model` on its device, the parameters sharded over all processes block by block; it is changed in place."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    model.to(accelerator.device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # By default the outermost module keeps its gathered weights until a backward, and after an evaluation a checkpoint would
    # find them in the place of its parameters.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def save(folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, the optimizer's state and what accelerate keeps into `folder`; every process calls it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, p in model.named_parameters():
        whole = _sharded(p).full_tensor()
        if accelerator.is_main_process:
            weights[name] = whole.cpu()
    if accelerator.is_main_process:
        save_file(weights, folder / WEIGHTS)
    state_dict_saver.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder / STATE)
    save_accelerator_state(
        str(folder), [], [], [], [], accelerator.process_index, accelerator.step, accelerator.scaler
    )  # generators and the scaler


@torch.no_grad()
def load(folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take over what `save` has written; every process calls it."""
    weights = load_file(folder / WEIGHTS)
    for name, p in model.named_parameters():
        whole = weights[name].to(p.device)
        p.copy_(distribute_tensor(whole, _sharded(p).device_mesh, _sharded(p).placements, src_data_rank=None))
    state = get_optimizer_state_dict(model, optimizer)
    state_dict_loader.load(state, checkpoint_id=folder / STATE)
    set_optimizer_state_dict(model, optimizer, state)
    load_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, accelerator.scaler)


def _sharded(p: nn.Parameter) -> DTensor:
    assert isinstance(p, DTensor)
    return p
