"""Write docs/optimizers.md: what every preset is, from the presets themselves and benchmarks/results/optimizers.json.

python scripts/optimizers_table.py
"""

import inspect
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from schatten import SpectralOptimizer, presets  # noqa: E402
from schatten.maps import Map  # noqa: E402

PAGE = ROOT / "docs" / "optimizers.md"

SHAPE = (48, 32)

DECAY = 0.1

# Solvers are the same few everywhere and make a rule unreadable.
SOLVER = re.compile(r"(, )?(solver=)?(polynomial|tower|krylov|svd)\([^()]*\)")


def short(part: object) -> str:
    """A slot's text without solvers and without keyword arguments that say nothing."""
    text = SOLVER.sub("", repr(part)).replace("over='spectrum', ", "").replace("over='spectrum'", "").replace("(, ", "(")
    return f"`{text}`"


def source(preset: type[SpectralOptimizer]) -> str:
    first = (inspect.getdoc(preset) or "").split("\n\n")[0]
    found = re.search(r"\(([^()]*(?:arXiv|20\d\d)[^()]*)\)", " ".join(first.split()))
    return found.group(1) if found else ""


def implied(preset: type[SpectralOptimizer], opt: SpectralOptimizer) -> str:
    group = {**opt.param_groups[0]}
    decay = group["weight_decay"] or DECAY
    rule = opt.rule(group)
    if preset is presets.Hyperball:
        return "min F on the sphere of Frobenius norm R"
    if preset is presets.TrustRegion:
        return f"min F + {decay / 2:g} * sum of w^2 + penalty"
    text = rule.describe(decay, *SHAPE)
    return text.replace("|", "\\|")


def row(name: str, times: dict[str, dict[str, float]]) -> str:
    preset = getattr(presets, name)
    W = nn.Parameter(torch.randn(SHAPE))
    opt = preset([W])
    rule = opt.rule(opt.param_groups[0])
    state = sum(t.numel() for key, t in opt.state[W].items() if key not in ("step", "skipped")) / W.numel()
    K = "convex" if isinstance(rule.map, Map) else "none"
    cost = f"{times[name]['over_muon']:.2f}" if name in times else "-"
    cells = [
        f"`{name}`",
        short(rule.signal),
        short(rule.map),
        short(rule.scale),
        short(rule.retraction),
        K,
        implied(preset, opt),
        f"{state:.2g}",
        f"{opt.param_groups[0]['lr']:.3g}",
        cost,
        source(preset),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "optimizers.json").read_text())
    head = ["preset", "signal", "map", "scale", "retraction", "K", "implied problem", "state", "lr", "time", "source"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(row(name, recorded["presets"]) for name in presets.__all__)]
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end of table -->")
    PAGE.write_text(f"{before}<!-- table -->\n" + "\n".join(lines) + f"\n<!-- end of table -->{after}")
    print(f"written to {PAGE.relative_to(ROOT)}: {len(presets.__all__)} presets")


if __name__ == "__main__":
    main()
