"""The retractions that have a name, and which of them decay explicitly."""

from schatten.retractions.cautious_decay import CautiousDecay
from schatten.retractions.core import Retraction
from schatten.retractions.decoupled_decay import DecoupledDecay
from schatten.retractions.server_compression import ServerCompression
from schatten.retractions.tied_decay import TiedDecay


def named(decay: str | Retraction) -> Retraction:
    """`"explicit"`, `"implicit"` or `"cautious"` as a retraction; a retraction as it is. ValueError for anything else.

    Example:
        >>> import schatten
        >>> schatten.retractions.named("implicit")
        DecoupledDecay(form='implicit')
    """
    if not isinstance(decay, str | type) and isinstance(decay, Retraction):
        return decay
    if decay == "cautious":
        return CautiousDecay()
    if decay == "explicit" or decay == "implicit":
        return DecoupledDecay(decay)
    raise ValueError(
        f"decay must be 'explicit', 'implicit', 'cautious' or a retraction of schatten.retractions, got {decay!r}."
    )


def decays_explicitly(retraction: Retraction) -> bool:
    """Whether a step takes the share lr lambda of a weight, which overshoots for lr lambda > 1.

    Example:
        >>> import schatten
        >>> schatten.retractions.decays_explicitly(schatten.retractions.FixedNorm())
        False
    """
    if isinstance(retraction, ServerCompression):
        return decays_explicitly(retraction.inner)
    if isinstance(retraction, TiedDecay):
        return decays_explicitly(retraction.retraction)
    return isinstance(retraction, CautiousDecay) or retraction == DecoupledDecay("explicit")
