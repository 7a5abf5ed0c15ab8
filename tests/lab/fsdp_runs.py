"""`torchrun fsdp_runs.py FOLDER`: runs of the laboratory on this rank, whole and stopped and resumed, under DDP and --fsdp."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from schatten.lab import data
from schatten.lab.config import CompareConfig
from schatten.lab.store import Store
from schatten.lab.train import Trainer

NAMES = ("adamw", "muon", "soapmuon")

# Saved at 5, stopped at 10: the record of step 10 then has losses from before the save and from after it.
OPTIONS = {"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 4, "steps": 15, "dropout": 0.1, "save_every": 5}


def stop(progress):
    if progress.step == 10:
        raise KeyboardInterrupt


def main(folder):
    PartialState(cpu=not torch.accelerator.is_available())
    corpus = data.load("pydoc", "byte", OPTIONS["context"])
    for fsdp in (False, True):
        lrs = {name: (4e-3,) for name in NAMES}
        config = CompareConfig(
            **OPTIONS, optimizers=NAMES, lrs=lrs, eval_every=10, eval_windows=9, final_eval_windows=9, fsdp=fsdp, trackers=()
        )
        whole, stopped = (Store(folder / f"{'fsdp' if fsdp else 'ddp'}-{name}") for name in ("whole", "stopped"))
        for store in (whole, stopped):
            store.root.mkdir(parents=True, exist_ok=True)
        for run in config.runs():
            Trainer(config, corpus, run, whole).train(lambda progress: None)
            try:
                Trainer(config, corpus, run, stopped).train(stop)
            except KeyboardInterrupt:
                Trainer(config, corpus, run, stopped).train(lambda progress: None)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
