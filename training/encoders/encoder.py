"""Dual encoders of other libraries: the library's model, with all that a client must know of it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from clip_rt.errors import CheckpointError, TextError
from clip_rt.inputs.tokenizer import OpenAITokenizer, pad
from clip_rt.inputs.tokenizer_file import FileTokenizer
from clip_rt.specs import EncoderFacts, Tower
from training.dual_encoder import DualEncoder, TextHidden

MAX_CUT_DIFFERENCE = 1e-5
"""Of numbers of an embedding of length 1, through rounding in another order of summation."""
_MODEL = "model."
_SCALE, _DIVISOR, _BIAS = "logit_scale", "temperature", "logit_bias"
"""Parameters of the library's model: logarithm of the factor of the cosine; a divisor of it, where
it has that; what is added."""


class Source(Protocol):
    """The library's own path from images and texts to what its model reads."""

    def pixels(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return float32 (N, 3, S, S), normalised."""

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return int64 (N, context length), padded."""


class Towers(Protocol):
    """How a library's model is asked for embeddings, and which of its modules make them."""

    @property
    def image_modules(self) -> Sequence[str]:
        """Names of submodules of the model; those it lacks are passed over."""

    @property
    def text_modules(self) -> Sequence[str]:
        """The same of the text tower."""

    def image(self, model: Any, image_BCSS: Tensor) -> Tensor:
        """Return float (B, E), of any length."""

    def text(self, model: Any, tokens_BL: Tensor) -> Tensor:
        """Return float (B, E), of any length."""

    @property
    def has_text_hidden(self) -> bool:
        """Whether `text_hidden` knows its way in this model."""

    def text_hidden(self, model: Any, tokens_BL: Tensor) -> TextHidden:
        """Return the hidden states of its text tower."""


class ExternalEncoder(DualEncoder):
    """A dual encoder of another library, in eval mode, without gradients.

    Args:
        facts: What a client must know.
        model: The library's; its temperature and bias become those of this encoder.
        towers: How it is asked.
        tokenizer_file: Bytes of the tokenizer.json; None for OpenAI's.
        source: How the library itself prepares images and texts.
        versions: Of the libraries that built it.
    """

    def __init__(
        self,
        facts: EncoderFacts,
        *,
        model: nn.Module,
        towers: Towers,
        tokenizer_file: bytes | None,
        source: Source,
        versions: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.facts = facts
        self.model = model
        self.towers = towers
        self.tokenizer_file = tokenizer_file
        self.text_tokenizer = (
            OpenAITokenizer(facts.context_length)
            if tokenizer_file is None
            else FileTokenizer(
                tokenizer_file, facts.tokenization, context_length=facts.context_length
            )
        )
        self.source = source
        self.versions = dict(versions)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        has_bias = getattr(model, _BIAS, None) is not None
        self.logit_bias = nn.Parameter(torch.zeros(())) if has_bias else None
        self._read_scalars()
        self.requires_grad_(False).eval()

    def weights(self) -> dict[str, Tensor]:
        """Return every weight once, by the library's names."""
        return self.model.state_dict()

    def encode_image(self, image_BCSS: Tensor) -> Tensor:
        """Embed normalised images; float (B, E), not L2-normalised."""
        return self.towers.image(self.model, image_BCSS)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Embed padded token ids; float (B, E), not L2-normalised."""
        return self.towers.text(self.model, tokens_BL.long())

    def encode_text_hidden(self, tokens_BL: Tensor) -> TextHidden:
        """Return the hidden states of padded token ids, int (B, L)."""
        return self.towers.text_hidden(self.model, tokens_BL.long())

    @property
    def has_text_hidden(self) -> bool:
        """Whether there is a way to its hidden states."""
        return self.towers.has_text_hidden

    def embed_tokens(self) -> nn.Embedding:
        """Return the table from which the text tower takes the vectors of ids."""
        tables = [
            module
            for part in self.tower_modules("text")
            for module in part.modules()
            if isinstance(module, nn.Embedding)
        ]
        return max(tables, key=lambda table: table.num_embeddings)

    def tower_of(self, name: str) -> Tower | None:
        """Say to which tower a parameter belongs; None for those of a decoder too."""
        inner = name.removeprefix(_MODEL)
        if inner != name:
            if inner.startswith(tuple(f"{each}." for each in self.towers.image_modules)):
                return "image"
            if inner.startswith(tuple(f"{each}." for each in self.towers.text_modules)):
                return "text"
        return None

    def tower_modules(self, tower: Tower) -> Sequence[nn.Module]:
        """Return the modules that are a tower."""
        names = self.towers.image_modules if tower == "image" else self.towers.text_modules
        return [getattr(self.model, each) for each in names if hasattr(self.model, each)]

    def with_weights(self, weights: Mapping[str, Tensor]) -> ExternalEncoder:
        """Return another encoder of this model; see `DualEncoder.with_weights`."""
        # What is asked of these two is not changed by asking.
        shared = {id(each): each for each in (self.source, self.text_tokenizer)}
        other = copy.deepcopy(self, shared).to("cpu")
        other.load_state_dict(weights, strict=True, assign=True)
        return other.requires_grad_(False).eval()

    def to_file(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights, named as by `state_dict`, under the library's names."""
        found = {
            name.removeprefix(_MODEL): tensor
            for name, tensor in weights.items()
            if name.startswith(_MODEL)
        }
        if _SCALE in found:
            found[_SCALE] = weights[_SCALE].reshape(found[_SCALE].shape)
        elif _DIVISOR in found:
            found[_DIVISOR] = (-weights[_SCALE]).exp().reshape(found[_DIVISOR].shape)
        if _BIAS in weights:
            found[_BIAS] = weights[_BIAS].reshape(found[_BIAS].shape)
        return found

    def load_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights that `to_file` gave.

        Raises:
            CheckpointError: they are of another model.
        """
        mine = self.weights()
        odd = sorted(
            name
            for name in mine.keys() | tensors.keys()
            if name not in mine or name not in tensors or mine[name].shape != tensors[name].shape
        )
        if odd:
            raise CheckpointError(
                f"the weights do not fit {self.facts.name}: {len(odd)} names or shapes differ, the "
                f"first is {odd[0]!r}. Name the model that they were trained as with --model."
            )
        self.model.load_state_dict(tensors)
        self._read_scalars()

    @property
    def has_scale(self) -> bool:
        """Whether the library's model has a place for a learned temperature."""
        return any(getattr(self.model, name, None) is not None for name in (_SCALE, _DIVISOR))

    def clamp_logit_scale(self) -> None:
        """Keep the temperature in the range the paper allows; of a sigmoid it has no limits."""
        if self.facts.score == "softmax":
            super().clamp_logit_scale()

    def lock_unused(self) -> None:
        """Take no gradient for what reaches no embedding, so that nobody waits for one."""
        facts = self.facts
        ids = self.text_tokenizer.encode_text("a", truncate=True)
        tokens_1L = pad([ids], length_tokens=facts.context_length, pad_id=facts.tokenization.pad_id)
        pixels = torch.zeros(1, 3, facts.side_px, facts.side_px)
        rows = self.encode_image(pixels), self.encode_text(torch.from_numpy(tokens_1L).long())
        moving = [each for each in self.parameters() if each.requires_grad]
        total = torch.stack([row.sum() for row in rows]).sum()
        gradients = torch.autograd.grad(total, moving, allow_unused=True)
        for parameter, gradient in zip(moving, gradients, strict=True):
            parameter.requires_grad_(gradient is not None or parameter.ndim == 0)

    @torch.no_grad()
    def _read_scalars(self) -> None:
        if (scale := getattr(self.model, _SCALE, None)) is not None:
            self.logit_scale.copy_(scale.reshape(()))
        elif (divisor := getattr(self.model, _DIVISOR, None)) is not None:
            self.logit_scale.copy_(-divisor.log().reshape(()))
        if self.logit_bias is not None:
            self.logit_bias.copy_(getattr(self.model, _BIAS).reshape(()))


def describe_configuration(configuration: Mapping[str, Any]) -> str:
    """Return what `Manifest.activation` says of a library's configuration.

    The same weights under another one are another model: its activation, heads or epsilons differ.
    """
    text = json.dumps(configuration, sort_keys=True, default=str)
    return f"configured:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def encode_usable(encoder: DualEncoder, texts: Sequence[str]) -> dict[str, list[int]]:
    """Return the ids of texts, cut where they are too long, but for texts that say nothing.

    What that is depends on the cleaning: of "?" SigLIP leaves nothing.
    """
    found = {}
    for text in texts:
        with contextlib.suppress(TextError):
            found[text] = encoder.text_tokenizer.encode_text(text, truncate=True)
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
