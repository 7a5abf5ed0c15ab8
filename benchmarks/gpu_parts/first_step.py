"""Seconds of an optimizer's first step, which compiles and tunes, in a fresh process: once with empty caches, once with those.

python -m gpu_parts.first_step MODEL [--quick], in which form it prints the seconds of one process as JSON, is its own helper.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_parts.models import MODELS, Parameters
from gpu_parts.timing import synchronize

import schatten

LIMIT_SECONDS = 20.0
MODEL = "gpt2"

# Where Triton keeps compiled kernels and schatten what it has tuned.
CACHES = ("TRITON_CACHE_DIR", "SCHATTEN_CACHE")


def first_step(device: torch.device, quick: bool) -> dict[str, Any]:
    """For schatten.Muon on `MODEL`'s parameters, with the kernels of the device."""
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_in_process(Path(folder), quick) for _ in range(2))
    return {"model": MODEL, "kernels": "triton" if device.type == "cuda" else "eager", "cold": cold, "warm": warm}


def _in_process(folder: Path, quick: bool) -> dict[str, Any]:
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **{name: str(folder / name) for name in CACHES}, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "gpu_parts.first_step", MODEL, *(["--quick"] if quick else [])]
    nothing = {"first_seconds": None, "second_seconds": None}
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    except subprocess.TimeoutExpired as error:
        return {**nothing, "error": f"no end after {error.timeout:.0f} s"}
    if ran.returncode:
        said = ran.stderr.strip().splitlines()
        return {**nothing, "error": said[-1] if said else f"exit status {ran.returncode}"}
    return {**json.loads(ran.stdout.splitlines()[-1]), "error": None}


def seconds(model: str, quick: bool, device: torch.device) -> dict[str, float]:
    """Of the first two steps in this process, the optimizer's construction included in the first."""
    parameters = Parameters(MODELS[model](quick, 0), device)
    synchronize(device)
    times = [time.perf_counter()]
    optimizer = schatten.Muon(parameters.groups())
    for _ in range(2):
        optimizer.step()
        synchronize(device)
        times.append(time.perf_counter())
    return {"first_seconds": times[1] - times[0], "second_seconds": times[2] - times[1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(seconds(args.model, args.quick, here)))
