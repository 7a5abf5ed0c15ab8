"""The retractions that have a name."""

from schatten.retractions.cautious_decay import CautiousDecay
from schatten.retractions.core import Retraction
from schatten.retractions.decoupled_decay import DecoupledDecay


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
