"""What a dual encoder is to training, evaluation and export: two towers, and how they are fed.

Our own model (`training.model.CLIP`) and those of open_clip and transformers
(`training.encoders.encoder.ExternalEncoder`) are such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_rt.inputs.tokenizer import TextTokenizer
from clip_rt.specs import MAX_LOGIT_SCALE, EncoderFacts, Tower

SCALARS = ("logit_scale", "logit_bias")
"""Parameters that are of no tower."""

Encoder = TypeVar("Encoder", bound="DualEncoder")


class TextHidden(NamedTuple):
    """The hidden states of texts, in the order of `specs.HIDDEN_OUTPUTS`; L positions, width W."""

    last_BLW: Tensor
    """Behind the last block and the final LayerNorm."""
    penultimate_BLW: Tensor
    """Behind the block before the last, as they are."""
    penultimate_norm_BLW: Tensor
    """The same through the final LayerNorm."""
    text_embeds_BE: Tensor
    """Projected at the end of the text; what `encode_text` returns."""


class DualEncoder(nn.Module):
    """Two towers with one space of embeddings."""

    facts: EncoderFacts
    """What a client must know of it."""
    logit_scale: nn.Parameter
    """Logarithm of the factor of the cosine, ()."""
    logit_bias: nn.Parameter | None
    """Added to the scaled cosine, (); None where the model has none."""
    text_tokenizer: TextTokenizer
    """What makes ids of texts."""

    def encode_image(self, image_BCSS: Tensor) -> Tensor:
        """Embed normalised images, float (B, 3, S, S); float (B, E), not L2-normalised."""
        raise NotImplementedError

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Embed padded token ids, int (B, L); float (B, E), not L2-normalised."""
        raise NotImplementedError

    def encode_text_hidden(self, tokens_BL: Tensor) -> TextHidden:
        """Return the hidden states of padded token ids, int (B, L); see `has_text_hidden`."""
        raise NotImplementedError

    @property
    def has_text_hidden(self) -> bool:
        """Whether there is a way to its hidden states: of text towers that are built as CLIP's."""
        return False

    def embed_tokens(self) -> nn.Embedding:
        """Return the table from which the text tower takes the vectors of ids."""
        raise NotImplementedError

    def tower_of(self, name: str) -> Tower | None:
        """Say to which tower a parameter belongs; None for `SCALARS` and what makes no embedding.

        Args:
            name: As `named_parameters` has it.
        """
        raise NotImplementedError

    def tower_modules(self, tower: Tower) -> Sequence[nn.Module]:
        """Return the modules that are a tower."""
        raise NotImplementedError

    def with_weights(self: Encoder, weights: Mapping[str, Tensor]) -> Encoder:
        """Return another encoder of this kind in eval mode, on the CPU, without gradients.

        Args:
            weights: As `state_dict` names them; they are taken, not copied.
        """
        raise NotImplementedError

    def to_file(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights, named as by `state_dict`, under the names that a file has them by."""
        return dict(weights)

    def weights(self) -> dict[str, Tensor]:
        """Return every weight once, by the names of a file; what the fingerprint is made of."""
        return self.state_dict()

    def forward(self, image_BCSS: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Embed a batch of pairs.

        Returns:
            Image and text embeddings, float32 (B, E) each, L2-normalised.
        """
        image_BE = functional.normalize(self.encode_image(image_BCSS).float(), dim=-1)
        text_BE = functional.normalize(self.encode_text(tokens_BL).float(), dim=-1)
        return image_BE, text_BE

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the learned temperature in the range the paper allows (section 2.5)."""
        self.logit_scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))
