"""Models of a transformers configuration, with fresh weights and the calls of the other models here."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from schatten.lab.errors import InputError


class HuggingFaceDecoder(nn.Module):
    """forward(ids, targets) of a causal language model of transformers, which lies in `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` given `ids`, both (batch, context)."""
        scores = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


class HuggingFaceClassifier(nn.Module):
    """forward(images) of an image classifier of transformers, which lies in `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> scores (batch, classes)."""
        return self.model(pixel_values=images).logits


def decoder(source: str, **changes: Any) -> HuggingFaceDecoder:
    """A causal language model of the configuration `source`, with fields such as vocab_size changed.

    `source` is a config.json, a folder that holds one, or a name on the hub, of which no weights are loaded. Raises
    InputError for one that cannot be read or is of another kind.
    """
    return HuggingFaceDecoder(_build("AutoModelForCausalLM", source, changes))


def classifier(source: str, **changes: Any) -> HuggingFaceClassifier:
    """An image classifier of the configuration `source`, with fields such as num_labels or image_size changed."""
    return HuggingFaceClassifier(_build("AutoModelForImageClassification", source, changes))


def _build(kind: str, source: str, changes: dict[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise InputError(f"{source} needs the transformers library: pip install 'schatten[hf]'.") from None
    path = Path(source)
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent if path.name == "config.json" else source, **changes)
        return getattr(transformers, kind).from_config(config)
    except Exception as error:  # the library's errors have no common class
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
        raise InputError(f"{source} gives no {kind}: {line}") from None
