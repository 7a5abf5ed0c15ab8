"""Write the tables of docs/learning-rate.md: other libraries' scales, and learning rates for common shapes.

python scripts/learning_rate_tables.py
"""

from pathlib import Path

from schatten.convert_lr import convert_lr
from schatten.scale_names import NAMES, PEERS, Peer
from schatten.scales import ADAMW_RMS, Scale

PAGE = Path(__file__).parents[1] / "docs" / "learning-rate.md"

SHAPES = {
    "GPT-2 small, attention": (768, 768),
    "GPT-2 small, MLP up": (3072, 768),
    "GPT-2 small, MLP down": (768, 3072),
    "Llama 8B, query": (4096, 4096),
    "Llama 8B, key, value": (1024, 4096),
    "Llama 8B, gate, up": (14336, 4096),
    "Llama 8B, down": (4096, 14336),
    "3 x 3 convolution, 256 to 256": (256, 2304),
    "LoRA A, rank 16": (16, 4096),
    "LoRA B, rank 16": (4096, 16),
}


def formula(peer: Peer) -> str:
    """The factor as the library applies it."""
    text = {"keller": "sqrt(max(1, fan_out / fan_in))", "mup": "sqrt(fan_out / fan_in)", "none": "1"}
    if peer.scale != "adamw-rms":
        return text[peer.scale]
    r = ADAMW_RMS * peer.times
    return f"{'' if r == 1 else f'{r:.3g} '}sqrt(max(fan_out, fan_in))"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def peers() -> list[str]:
    """One line for each setting of each library; the first of a library is its default."""
    head = ["library", "there", "factor", "here", "lr here / lr there", "read in"]
    lines, seen = [_row(head), f"|{'---|' * len(head)}"], set()
    for peer in PEERS:
        there = "its only one" if peer.setting == "the factor" else f"`{peer.setting}`"
        default = "" if peer.library in seen or there == "its only one" else " (default)"
        seen.add(peer.library)
        cells = [peer.library, there + default, f"`{formula(peer)}`", f"`{peer.scale}`", f"{peer.times:g}", peer.source]
        lines.append(_row(cells))
    return lines


def shapes() -> list[str]:
    """For each shape the factors, the lr that equal 1e-3 under "adamw-rms", and what Keller's 0.02 is there."""
    others = [name for name in NAMES if name != "adamw-rms"]
    head = ["matrix", "shape", *(f"c `{name}`" for name in NAMES)]
    head += [f"`{name}` for `adamw-rms` 1e-3" for name in others] + ["`adamw-rms` for `keller` 0.02"]
    lines = [_row(head), f"|{'---|' * len(head)}"]
    for label, shape in SHAPES.items():
        cells = [label, f"{shape[0]} x {shape[1]}", *(f"{Scale(name).factor(*shape):.3g}" for name in NAMES)]
        cells += [f"{convert_lr(1e-3, 'adamw-rms', name, shape):.3g}" for name in others]
        lines.append(_row([*cells, f"{convert_lr(0.02, 'keller', 'adamw-rms', shape):.3g}"]))
    return lines


def main() -> None:
    text = PAGE.read_text()
    for name, lines in (("libraries", peers()), ("shapes", shapes())):
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition(f"<!-- end of {name} -->")
        text = "\n".join([f"{before}<!-- {name} -->", *lines, f"<!-- end of {name} -->{after}"])
    PAGE.write_text(text)
    print(f"written to docs/{PAGE.name}: {len(PEERS)} settings, {len(SHAPES)} shapes")


if __name__ == "__main__":
    main()
