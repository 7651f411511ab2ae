"""What a dual encoder is to an export: two towers, and all that a client must know to feed them.

Our own model (`training.model.CLIP`) and those of open_clip and transformers have the same face:
`facts`, `encode_image`, `encode_text`, `logit_scale`, `logit_bias` and `state_dict`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from clip_rt.errors import TextError
from clip_rt.inputs.tokenizer import OpenAITokenizer, TextTokenizer, pad
from clip_rt.inputs.tokenizer_file import FileTokenizer
from clip_rt.specs import EncoderFacts

MAX_CUT_DIFFERENCE = 1e-5
"""Of numbers of an embedding of length 1, through rounding in another order of summation."""


class Source(Protocol):
    """The library's own path from images and texts to what its model reads."""

    def pixels(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return float32 (N, 3, S, S), normalised."""

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return int64 (N, context length), padded."""


class DualEncoder(Protocol):
    """Two towers with one space of embeddings: `training.model.CLIP` or an `ExternalEncoder`."""

    @property
    def facts(self) -> EncoderFacts:
        """What a client must know of it."""

    logit_scale: nn.Parameter
    """Logarithm of the factor of the cosine."""
    logit_bias: nn.Parameter | None

    def encode_image(self, image_BCSS: Tensor) -> Tensor:
        """Embed normalised images; float (B, E), not L2-normalised."""

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Embed padded token ids; float (B, E), not L2-normalised."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every weight."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return every weight by its name."""


class ExternalEncoder(nn.Module):
    """A dual encoder of another library, in eval mode, without gradients.

    Args:
        facts: What a client must know.
        image_tower: float (B, 3, S, S), normalised, to (B, E), of any length; its `model` is the
            library's.
        text_tower: int (B, L), padded, to (B, E), of any length.
        logit_scale: The factor of the cosine, not its logarithm.
        logit_bias: Added to the scaled cosine; None where the model has none.
        tokenizer_file: Bytes of the tokenizer.json; None for OpenAI's.
        source: How the library itself prepares images and texts.
        versions: Of the libraries that built it.
    """

    def __init__(
        self,
        facts: EncoderFacts,
        *,
        image_tower: nn.Module,
        text_tower: nn.Module,
        logit_scale: float,
        logit_bias: float | None,
        tokenizer_file: bytes | None,
        source: Source,
        versions: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.facts = facts
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.tokenizer_file = tokenizer_file
        self.text_tokenizer: TextTokenizer = (
            OpenAITokenizer(facts.context_length)
            if tokenizer_file is None
            else FileTokenizer(
                tokenizer_file, facts.tokenization, context_length=facts.context_length
            )
        )
        self.source = source
        self.versions = dict(versions)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale).log())
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.requires_grad_(False).eval()

    def weights(self) -> dict[str, Tensor]:
        """Return every weight once: both towers hold the whole model of the library."""
        return self.image_tower.get_submodule("model").state_dict()

    def encode_image(self, image_BCSS: Tensor) -> Tensor:
        """Embed normalised images; float (B, E), not L2-normalised."""
        return self.image_tower(image_BCSS)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Embed padded token ids; float (B, E), not L2-normalised."""
        return self.text_tower(tokens_BL)


def describe_configuration(configuration: Mapping[str, Any]) -> str:
    """Return what `Manifest.activation` says of a library's configuration.

    The same weights under another one are another model: its activation, heads or epsilons differ.
    """
    text = json.dumps(configuration, sort_keys=True, default=str)
    return f"configured:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def tokenizer_of(encoder: DualEncoder) -> TextTokenizer:
    """Return what makes ids of texts for an encoder."""
    if isinstance(encoder, ExternalEncoder):
        return encoder.text_tokenizer
    return OpenAITokenizer(encoder.facts.context_length)


def encode_usable(encoder: DualEncoder, texts: Sequence[str]) -> dict[str, list[int]]:
    """Return the ids of texts, cut where they are too long, but for texts that say nothing.

    What that is depends on the cleaning: of "?" SigLIP leaves nothing.
    """
    tokenizer, found = tokenizer_of(encoder), {}
    for text in texts:
        with contextlib.suppress(TextError):
            found[text] = tokenizer.encode_text(text, truncate=True)
    return found


@torch.inference_mode()
def measure_any_length(encoder: ExternalEncoder, texts: Sequence[str]) -> bool:
    """Return whether texts that are cut after their end have the embeddings of padded ones.

    A causal tower read at its end of text has them; one that reads its last position, or that is
    given no mask, has not.
    """
    facts = encoder.facts
    for ids in encode_usable(encoder, texts).values():
        both = [
            pad([ids], length_tokens=length, pad_id=facts.tokenization.pad_id)
            for length in (len(ids), facts.context_length)
        ]
        try:
            rows = [encoder.encode_text(torch.from_numpy(padded).long()) for padded in both]
        except RuntimeError:  # A tower with positions or masks of one length.
            return False
        unit = [nn.functional.normalize(row, dim=-1) for row in rows]
        if float((unit[0] - unit[-1]).abs().max()) > MAX_CUT_DIFFERENCE:
            return False
    return True
