"""The graphs that are exported: a dual encoder's towers inside the tensor contract.

uint8 pixels or int32 tokens go in, L2-normalised float32 embeddings come out, or the hidden states
of texts. Nothing here knows about ONNX or TensorRT. The last block of our own transformers computes
only the position the embedding is read from, which changes no result; parity with the plain model
is checked at every export. Towers of other libraries are exported as they are.

Shape suffixes are those of `training/model.py`; S is also the side of the uint8 image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_rt.specs import CLIP_MEAN, CLIP_STD, END_OF_TEXT, Channels, Tower
from training.dual_encoder import DualEncoder
from training.encoders.encoder import ExternalEncoder
from training.model import CLIP, Attention, ResidualAttentionBlock, VisionTransformer

MASKED = -30_000.0
"""Added to the logits of later tokens. Finite, because optimisers of FP16 graphs mishandle
infinity; the softmax of anything this far below its best is exactly 0."""


class PooledAttention(nn.Module):
    """Self-attention evaluated at one position per item.

    Keys and values still come from every position; the query and the output projection are
    computed once per item instead of L times. Parameters are shared with `attn`.
    """

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        width = attn.out_proj.in_features
        self.heads = attn.heads
        self.query = _linear(attn.in_proj_weight[:width], attn.in_proj_bias[:width])
        self.key_value = _linear(attn.in_proj_weight[width:], attn.in_proj_bias[width:])
        self.out_proj = attn.out_proj

    def forward(self, x_BLD: Tensor, x_BD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Attend from `x_BD`, one of the rows of each item, to all rows `x_BLD`."""
        B, L, D = x_BLD.shape
        K = D // self.heads
        q_BH1K = self.query(x_BD).view(B, self.heads, 1, K)
        k_BHLK, v_BHLK = self.key_value(x_BLD).view(B, L, 2, self.heads, K).permute(2, 0, 3, 1, 4)
        logits_BH1L = (q_BH1K * K**-0.5) @ k_BHLK.transpose(-1, -2)
        if mask_BL is not None:
            logits_BH1L = logits_BH1L + mask_BL[:, None, None, :]
        return self.out_proj((logits_BH1L.softmax(dim=-1) @ v_BHLK).reshape(B, D))


class PooledBlock(nn.Module):
    """A residual attention block evaluated at one position per item, its MLP too."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, ResidualAttentionBlock)
        self.ln_1, self.ln_2, self.mlp = block.ln_1, block.ln_2, block.mlp
        self.attn = PooledAttention(block.attn)

    def forward(self, x_BLD: Tensor, x_BD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Return the block's output, (B, D), at the position whose input is `x_BD`."""
        x_BD = x_BD + self.attn(self.ln_1(x_BLD), self.ln_1(x_BD), mask_BL)
        return x_BD + self.mlp(self.ln_2(x_BD))


class Normalise(nn.Module):
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) with mean and standard deviation applied."""

    mean_C: Tensor
    scale_C: Tensor

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__()
        # One subtraction and one product on [0, 255] instead of dividing by 255 first.
        self.register_buffer("mean_C", 255 * torch.tensor(mean))
        self.register_buffer("scale_C", 1 / (255 * torch.tensor(std)))

    def forward(self, pixels_BSSC: Tensor) -> Tensor:
        """Normalise RGB images."""
        # The cast comes first because TensorRT takes UINT8 for nothing else.
        image_BSSC = (pixels_BSSC.float() - self.mean_C) * self.scale_C
        return image_BSSC.permute(0, 3, 1, 2)


class ImageGraph(nn.Module):
    """Pixels to embeddings: mean and standard deviation, the image tower, L2 normalisation."""

    tower: Tower = "image"

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.normalise = Normalise(CLIP_MEAN, CLIP_STD)
        self.visual = clip.visual
        self.last_block: PooledBlock | None = None
        if isinstance(clip.visual, VisionTransformer):
            self.last_block = PooledBlock(clip.visual.transformer.resblocks[-1])

    def forward(self, pixels_BSSC: Tensor) -> Tensor:
        """Embed RGB images.

        Args:
            pixels_BSSC: uint8 (B, S, S, 3), resized and cropped, not normalised.

        Returns:
            float32 (B, E), L2-normalised.
        """
        image_BCSS = self.normalise(pixels_BSSC)
        if self.last_block is None or not isinstance(self.visual, VisionTransformer):
            return _normalise(self.visual(image_BCSS))
        x_BLD = self.visual.embed_patches(image_BCSS)
        for block in self.visual.transformer.resblocks[:-1]:
            x_BLD = block(x_BLD)
        x_BD = self.last_block(x_BLD, x_BLD[:, 0])
        return _normalise(self.visual.ln_post(x_BD.float()) @ self.visual.proj)

    def layers(self) -> dict[str, nn.Module]:
        """Return what a precision can be chosen for, by its name in the checkpoint, in order."""
        if self.last_block is None:
            stages = [f"layer{stage}" for stage in range(1, 5)]
            blocks = [
                f"{stage}.{name}"
                for stage in stages
                for name, _ in self.visual.get_submodule(stage).named_children()
            ]
            names = ["conv1", "conv2", "conv3", *blocks, "attnpool"]
            return {f"visual.{name}": self.visual.get_submodule(name) for name in names}
        assert isinstance(self.visual, VisionTransformer)
        blocks_ = [*self.visual.transformer.resblocks[:-1], self.last_block]
        return {"visual.conv1": self.visual.conv1} | _halves("visual.transformer", blocks_)


class TextGraph(nn.Module):
    """Tokens to embeddings: the text tower read at the first end of text, L2 normalisation."""

    tower: Tower = "text"
    causal_mask_LL: Tensor

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.blocks = clip.transformer.resblocks[:-1]
        self.last_block = PooledBlock(clip.transformer.resblocks[-1])
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.register_buffer("causal_mask_LL", clip.causal_mask_LL.clamp(min=MASKED))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Embed token ids.

        Args:
            tokens_BL: int32 (B, L), L up to the context length, each row with an end of text.

        Returns:
            float32 (B, E), L2-normalised.
        """
        B, L = tokens_BL.shape
        mask_LL = self.causal_mask_LL[:L, :L]
        x_BLD = self.token_embedding(tokens_BL)
        x_BLD = x_BLD + self.positional_embedding[:L].to(x_BLD.dtype)
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_LL)
        # On integers: in FP16 the ids 49406 and 49407 are the same number.
        end_B = (tokens_BL == END_OF_TEXT).int().argmax(dim=1)
        x_BD = x_BLD[torch.arange(B, device=x_BLD.device), end_B]
        x_BD = self.last_block(x_BLD, x_BD, mask_LL[end_B])
        return _normalise(self.ln_final(x_BD.float()) @ self.text_projection)

    def layers(self) -> dict[str, nn.Module]:
        """Return what a precision can be chosen for, by its name in the checkpoint, in order."""
        blocks = [*self.blocks, self.last_block]
        return {"token_embedding": self.token_embedding} | _halves("transformer", blocks)


def _halves(prefix: str, blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    return {
        f"{prefix}.resblocks.{index}.{half}": block.get_submodule(half)
        for index, block in enumerate(blocks)
        for half in ("attn", "mlp")
    }


class ExternalImageGraph(nn.Module):
    """Pixels to embeddings by the image tower of another library."""

    tower: Tower = "image"

    def __init__(self, encoder: ExternalEncoder) -> None:
        super().__init__()
        self.normalise = Normalise(encoder.facts.mean, encoder.facts.std)
        self.encoder = encoder

    def forward(self, pixels_BSSC: Tensor) -> Tensor:
        """Embed RGB images; as `ImageGraph`."""
        return _normalise(self.encoder.encode_image(self.normalise(pixels_BSSC)))

    def layers(self) -> dict[str, nn.Module]:
        """Return what a precision can be chosen for in torch: nothing, see `export.half`."""
        return {}


class ExternalTextGraph(nn.Module):
    """Tokens to embeddings by the text tower of another library."""

    tower: Tower = "text"

    def __init__(self, encoder: ExternalEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Embed token ids; as `TextGraph`, padded as the manifest says."""
        return _normalise(self.encoder.encode_text(tokens_BL))

    def layers(self) -> dict[str, nn.Module]:
        """Return what a precision can be chosen for in torch: nothing."""
        return {}


class TextHiddenGraph(nn.Module):
    """Tokens, filled up to the context length, to the outputs of `specs.HIDDEN_OUTPUTS`."""

    tower: Tower = "text"

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, ...]:
        """Return hidden states, float32 (B, L, W) each, and projected embeddings, (B, E).

        Args:
            tokens_BL: int32 (B, L), L the context length, each row with an end of text.
        """
        return tuple(self.encoder.encode_text_hidden(tokens_BL))


Graph = ImageGraph | TextGraph | ExternalImageGraph | ExternalTextGraph


def make_graphs(encoder: DualEncoder) -> tuple[Graph, Graph]:
    """Return the graphs of the image and the text tower."""
    if isinstance(encoder, ExternalEncoder):
        return ExternalImageGraph(encoder), ExternalTextGraph(encoder)
    assert isinstance(encoder, CLIP)
    return ImageGraph(encoder), TextGraph(encoder)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _normalise(embeddings_BE: Tensor) -> Tensor:
    return functional.normalize(embeddings_BE.float(), dim=-1)
