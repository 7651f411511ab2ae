"""The two graphs that are exported: `training.model.CLIP` inside the tensor contract.

uint8 pixels or int32 tokens go in, L2-normalised float32 embeddings come out. Nothing here knows
about ONNX or TensorRT. The last block of a transformer computes only the position the embedding is
read from, which changes no result; parity with the plain model is checked at every export.

Shape suffixes are those of `training/model.py`; S is also the side of the uint8 image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_rt.specs import CLIP_MEAN, CLIP_STD, END_OF_TEXT
from training.model import CLIP, ResidualAttentionBlock, VisionTransformer


class PooledBlock(nn.Module):
    """A residual attention block evaluated at one position per item.

    Keys and values still come from every position; the query, the output projection and the MLP
    are computed once per item instead of L times. Parameters are shared with `block`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, ResidualAttentionBlock)
        attn, width = block.attn, block.attn.out_proj.in_features
        self.heads = attn.heads
        self.ln_1 = block.ln_1
        self.query = _linear(attn.in_proj_weight[:width], attn.in_proj_bias[:width])
        self.key_value = _linear(attn.in_proj_weight[width:], attn.in_proj_bias[width:])
        self.out_proj = attn.out_proj
        self.ln_2 = block.ln_2
        self.mlp = block.mlp

    def forward(self, x_BLD: Tensor, x_BD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Return the block's output, (B, D), at the position whose input is `x_BD`."""
        B, L, D = x_BLD.shape
        K = D // self.heads
        q_BH1K = self.query(self.ln_1(x_BD)).view(B, self.heads, 1, K)
        key_value = self.key_value(self.ln_1(x_BLD)).view(B, L, 2, self.heads, K)
        k_BHLK, v_BHLK = key_value.permute(2, 0, 3, 1, 4)
        logits_BH1L = (q_BH1K * K**-0.5) @ k_BHLK.transpose(-1, -2)
        if mask_BL is not None:
            logits_BH1L = logits_BH1L + mask_BL[:, None, None, :]
        x_BD = x_BD + self.out_proj((logits_BH1L.softmax(dim=-1) @ v_BHLK).reshape(B, D))
        return x_BD + self.mlp(self.ln_2(x_BD))


class ImageGraph(nn.Module):
    """Pixels to embeddings: mean and standard deviation, the image tower, L2 normalisation."""

    mean_C11: Tensor
    scale_C11: Tensor

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        # One subtraction and one product on [0, 255] instead of dividing by 255 first.
        self.register_buffer("mean_C11", 255 * torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("scale_C11", 1 / (255 * torch.tensor(CLIP_STD).view(3, 1, 1)))
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
        image_BCSS = (pixels_BSSC.permute(0, 3, 1, 2).float() - self.mean_C11) * self.scale_C11
        if self.last_block is None or not isinstance(self.visual, VisionTransformer):
            return _normalise(self.visual(image_BCSS))
        x_BLD = self.visual.embed_patches(image_BCSS)
        for block in self.visual.transformer.resblocks[:-1]:
            x_BLD = block(x_BLD)
        x_BD = self.last_block(x_BLD, x_BLD[:, 0])
        return _normalise(self.visual.ln_post(x_BD) @ self.visual.proj)


class TextGraph(nn.Module):
    """Tokens to embeddings: the text tower read at the first end of text, L2 normalisation."""

    causal_mask_LL: Tensor

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.blocks = clip.transformer.resblocks[:-1]
        self.last_block = PooledBlock(clip.transformer.resblocks[-1])
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.register_buffer("causal_mask_LL", clip.causal_mask_LL)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Embed token ids.

        Args:
            tokens_BL: int32 (B, L), L up to the context length, each row with an end of text.

        Returns:
            float32 (B, E), L2-normalised.
        """
        B, L = tokens_BL.shape
        mask_LL = self.causal_mask_LL[:L, :L]
        x_BLD = self.token_embedding(tokens_BL) + self.positional_embedding[:L]
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_LL)
        # On integers: in FP16 the ids 49406 and 49407 are the same number.
        end_B = (tokens_BL == END_OF_TEXT).int().argmax(dim=1)
        x_BD = x_BLD[torch.arange(B, device=x_BLD.device), end_B]
        x_BD = self.last_block(x_BLD, x_BD, mask_LL[end_B])
        return _normalise(self.ln_final(x_BD) @ self.text_projection)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _normalise(embeddings_BE: Tensor) -> Tensor:
    return functional.normalize(embeddings_BE.float(), dim=-1)
