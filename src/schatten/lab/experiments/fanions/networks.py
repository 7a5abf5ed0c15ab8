"""The members of the family on networks: hidden matrices by the member, all else by AdamW, with one shape factor."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

import schatten
from schatten.lab import images
from schatten.lab.contest import Contender
from schatten.lab.errors import named
from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.ledger import Row
from schatten.lab.models import MLP, ResNet, ResNetConfig
from schatten.lab.statistics import compared, mean, p_value, spread, summary
from schatten.lab.tasks import Classification
from schatten.lab.tuning import Params, Span
from schatten.maps import L1, Frobenius, Map
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum

MODELS = ("mlp", "resnet")

MOMENTUM, BETAS = 0.95, (0.9, 0.95)
AUX = {"aux_lr": Span(3e-4, 3e-2)}

# One point of accuracy: as much as four of the 359 test digits. The published spread of a run is 0.13 points.
MARGIN = 0.01
SIGNIFICANT = 0.05

# Published: accuracy on CIFAR-10 in per cent (200 runs), loss of the NanoGPT speedrun.
IMAGES = {"Muon": 94.01, "F-Muon": 94.01, "S-Muon": 94.03, "NSGD": 91.6, "SignSGD": 91.54, "Neon": 69.8}
TEXT = {"Muon": 3.279, "F-Muon": 3.281, "S-Muon": 3.287}

Build = Callable[[nn.Module, Params], torch.optim.Optimizer]


def _preset(kind: type[schatten.SpectralOptimizer], model: nn.Module, params: Params) -> torch.optim.Optimizer:
    eta_s = {"eta_s": params["eta_s"]} if "eta_s" in params else {}
    adamw = {"lr": params["aux_lr"], "betas": BETAS}
    return kind(
        model, lr=params["lr"], weight_decay=0.0, momentum=MOMENTUM, nesterov=True, scale="keller", adamw=adamw, **eta_s
    )


def _plain(map: Map, scale: str, model: nn.Module, params: Params) -> torch.optim.Optimizer:
    rule = Rule(Momentum(nesterov=True), map, Scale(scale))
    adamw = {"lr": params["aux_lr"], "betas": BETAS}
    return schatten.SpectralOptimizer(model, rule, lr=params["lr"], weight_decay=0.0, momentum=MOMENTUM, adamw=adamw)


# An entry of a sign step has the size of lr itself, so its range is lower.
CONTENDERS = (
    Contender("Muon", partial(_preset, schatten.Muon), {"lr": Span(3e-3, 0.3), **AUX}),
    Contender("F-Muon", partial(_preset, schatten.FMuon), {"lr": Span(3e-3, 0.3), **AUX}),
    Contender("S-Muon", partial(_preset, schatten.SMuon), {"lr": Span(3e-3, 0.3), **AUX, "eta_s": [3e-4, 3e-3, 1e-2]}),
    Contender("Neon", partial(_preset, schatten.Neon), {"lr": Span(1e-2, 1.0), **AUX}),
    Contender("NSGD", partial(_plain, Frobenius(), "keller"), {"lr": Span(1e-2, 1.0), **AUX}),
    Contender("SignSGD", partial(_plain, L1(), "none"), {"lr": Span(3e-4, 3e-2), **AUX}),
)


def image_task(source: str, model: str, width: int) -> Classification:
    """`model` is `"mlp"` of two hidden layers of `width`, or `"resnet"`, of which `width` is the first stage's."""
    with named("--images"):
        found = images.load(source)
    channels, height, across = found.shape
    if model == "mlp":
        return Classification(found, lambda: MLP((channels * height * across, width, width, found.classes)))
    config = ResNetConfig(channels, found.classes, widths=(width, 2 * width, 4 * width), blocks=(2, 2, 2))
    return Classification(found, lambda: ResNet(config))


def finals(rows: Sequence[Row], part: str, name: str) -> list[Row]:
    """The rows of a contender on `part` at its best params, by seed."""
    wanted = (part, "final", name)
    found = [row for row in rows if (row.get("part"), row.get("phase"), row.get("optimizer")) == wanted]
    return sorted(found, key=lambda row: row["seed"])


def values(rows: Sequence[Row], part: str, name: str) -> list[float]:
    """Accuracy on images, loss on text, one for each seed."""
    return [row["accuracy" if part == "images" else "loss"] for row in finals(rows, part, name)]


def check(rows: Sequence[Row]) -> list[Verdict]:
    """The published orderings at our scale; the published numbers are of other networks and data."""
    return [*_images(rows), *_text(rows)]


def _images(rows: Sequence[Row]) -> list[Verdict]:
    muon = values(rows, "images", "Muon")
    verdicts = []
    for name in ("F-Muon", "S-Muon"):
        found = values(rows, "images", name)
        if muon and len(found) == len(muon):
            gaps = [a - b for a, b in zip(found, muon, strict=True)]
            error = spread(gaps) / len(gaps) ** 0.5
            holds = abs(mean(gaps)) + 2 * error <= MARGIN
            why = f"equal if the difference and two standard errors ({error:.1g}) lie within {MARGIN}; {compared(found, muon)}"
            verdicts.append(_line(rows, "images", f"{name} as accurate as Muon", name, IMAGES, found, muon, holds, why))
    for name in ("Neon", "NSGD", "SignSGD"):
        found = values(rows, "images", name)
        if muon and len(found) == len(muon):
            verdicts.append(
                _ordering(
                    rows, "images", f"{name} less accurate than Muon", name, IMAGES, found, muon, mean(found) < mean(muon)
                )
            )
    if muon:
        text = f"Muon {summary(muon)}"
        why = "94 % is of airbench's network on CIFAR-10 in 8 epochs, 200 runs; ours is of the data and model named above"
        verdicts.append(Verdict("accuracy on CIFAR-10", "94.01 +- 0.10 % (paper)", text, OUT_OF_REACH, why))
    return verdicts


def _text(rows: Sequence[Row]) -> list[Verdict]:
    muon = values(rows, "text", "Muon")
    verdicts = []
    for name in ("F-Muon", "S-Muon", "Neon"):
        found = values(rows, "text", name)
        if muon and len(found) == len(muon):
            verdicts.append(
                _ordering(rows, "text", f"{name}'s loss above Muon's", name, TEXT, found, muon, mean(found) > mean(muon))
            )
    if muon:
        why = "a 124M GPT on FineWeb in 1750 steps"
        verdicts.append(Verdict("loss of the NanoGPT speedrun", "3.279 (paper)", f"Muon {summary(muon)}", OUT_OF_REACH, why))
    return verdicts


def _ordering(
    rows: Sequence[Row], part: str, quantity: str, name: str, published: Mapping[str, float], ours: Sequence[float],
    muon: Sequence[float], right: bool,
) -> Verdict:  # fmt: skip
    p = p_value(ours, muon, paired=True)
    word = "" if p < SIGNIFICANT else "no difference seen, "
    holds = right and p < SIGNIFICANT
    return _line(rows, part, quantity, name, published, ours, muon, holds, f"{word}{compared(ours, muon)}, paired by seed")


def _line(
    rows: Sequence[Row], part: str, quantity: str, name: str, published: Mapping[str, float], ours: Sequence[float],
    muon: Sequence[float], holds: bool, why: str,
) -> Verdict:  # fmt: skip
    theirs = f"{published[name]:g} against {published['Muon']:g} (paper)" if name in published else "clearly (paper)"
    config = finals(rows, part, name)[0]["run"]["config"]
    keys = ("images", "model", "image_width", "image_steps") if part == "images" else ("text", "width", "layers", "steps")
    scale = ", ".join(f"{key.replace('_', ' ')} {config.get(key)}" for key in keys)
    text = f"{summary(ours)} against {summary(muon)}"
    return verdict(f"{part}: {quantity}", theirs, text, holds, f"{why}; {scale}{_edges(rows, part, name)}")


def _edges(rows: Sequence[Row], part: str, name: str) -> str:
    """Says so if the best lr lies within a tenth of the range, on its logarithm, of an end."""
    span = next(contender.space["lr"] for contender in CONTENDERS if contender.name == name)
    assert isinstance(span, Span)
    lr = finals(rows, part, name)[0].get("lr", span.low)
    share = torch.tensor(lr / span.low).log() / torch.tensor(span.high / span.low).log()
    return "" if 0.1 <= float(share) <= 0.9 else f"; its best lr {lr:.2g} lies near an end of {span.low:g} .. {span.high:g}"
