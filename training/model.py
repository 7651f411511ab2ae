"""CLIP: an image tower, a causal text tower, and the temperature that scales their cosine.

Parameter names are those of OpenAI's checkpoints (openai/CLIP `clip/model.py`), so that weights of
that naming load strictly, even where another name would be clearer. Attention is written out as
matrix products: it exports to a graph that TensorRT fuses and gets right, which torch's own
decomposition of scaled-dot-product attention does not promise.

Shape suffixes: B batch, L positions, D width, H heads, K head width, E embedding, C channels,
S side of the image in pixels.

Sources: Radford et al. 2021, section 2.4; Dosovitskiy et al. 2021 for the ViT; Li et al. 2023
(FLIP), section 3, for patch dropout; Zhai et al. 2023 (SigLIP), section 3.2, for the bias.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_rt.errors import InputError
from clip_rt.inputs.tokenizer import OpenAITokenizer
from clip_rt.specs import END_OF_TEXT, Activation, ModelSpec, Tower, ViTSpec
from training.dual_encoder import SCALARS, DualEncoder, TextHidden
from training.recompute import recompute_in_backward
from training.resnet import ModifiedResNet


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in FP32 whatever the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * torch.sigmoid(1.702 * x)


def activation_module(name: Activation) -> nn.Module:
    """Build the activation of the MLP blocks."""
    return QuickGELU() if name == "quick_gelu" else nn.GELU()


def causal_mask(length: int) -> Tensor:
    """Build what is added to attention logits so that a token sees itself and those before it.

    Returns:
        float32 (L, L), 0 on and below the diagonal, minus infinity above.
    """
    return torch.full((length, length), -torch.inf).triu(1)


def drop_patches(x_BLD: Tensor, num_kept: int) -> Tensor:
    """Keep the class token and as many random patches, others for each item.

    Returns:
        (B, 1 + num_kept, D). Patches carry their position, so their order is free.
    """
    B, L, D = x_BLD.shape
    kept_BK = 1 + torch.rand(B, L - 1, device=x_BLD.device).topk(num_kept, dim=1).indices
    patches_BKD = x_BLD.gather(1, kept_BK[:, :, None].expand(-1, -1, D))
    return torch.cat([x_BLD[:, :1], patches_BKD], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter layout of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None) -> Tensor:
        """Attend within each item of the batch; `mask_LL` is added to the attention logits."""
        B, L, D = x_BLD.shape
        qkv = functional.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q_BHLK, k_BHLK, v_BHLK = qkv.view(B, L, 3, self.heads, D // self.heads).permute(
            2, 0, 3, 1, 4
        )
        logits_BHLL = (q_BHLK * (D // self.heads) ** -0.5) @ k_BHLK.transpose(-1, -2)
        if mask_LL is not None:
            logits_BHLL = logits_BHLL + mask_LL
        y_BHLK = logits_BHLL.softmax(dim=-1) @ v_BHLK
        return self.out_proj(y_BHLK.transpose(1, 2).reshape(B, L, D))


class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: Activation) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, mlp_width),
                gelu=activation_module(activation),
                c_proj=nn.Linear(mlp_width, width),
            )
        )
        self.ln_2 = LayerNorm(width)

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None) -> Tensor:  # noqa: D102
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD), mask_LL)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class Transformer(nn.Module):
    """A stack of residual attention blocks."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        activation: Activation,
        mlp_width: int | None = None,
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_width or 4 * width, activation)
            for _ in range(layers)
        )
        self.grad_checkpointing = False

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None) -> Tensor:  # noqa: D102
        for block in self.resblocks:
            if self.grad_checkpointing:
                x_BLD = recompute_in_backward(block, x_BLD, mask_LL)
            else:
                x_BLD = block(x_BLD, mask_LL)
        return x_BLD

    def reset_parameters(self) -> None:
        """Initialise as section 2.4's scheme: residual branches shrink with depth."""
        width, layers = self.resblocks[0].get_parameter("ln_1.weight").numel(), len(self.resblocks)
        std_by_name = {
            "attn.in_proj_weight": width**-0.5,
            "attn.out_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
            "mlp.c_fc.weight": (2 * width) ** -0.5,
            "mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        }
        for block in self.resblocks:
            for name, std in std_by_name.items():
                nn.init.normal_(block.get_parameter(name), std=std)
            for name in ("attn.out_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"):
                nn.init.zeros_(block.get_parameter(name))


class VisionTransformer(nn.Module):
    """The ViT image tower; `patch_dropout` is the share of patches left out while training."""

    def __init__(
        self,
        spec: ViTSpec,
        side_px: int,
        embedding_dim: int,
        activation: Activation,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = spec.width
        self.num_patches = (side_px // spec.patch_px) ** 2
        self.num_kept_patches = max(1, int(self.num_patches * (1 - patch_dropout)))
        self.conv1 = nn.Conv2d(3, width, spec.patch_px, stride=spec.patch_px, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(
            width**-0.5 * torch.randn(self.num_patches + 1, width)
        )
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, spec.layers, spec.heads, activation, spec.mlp_width)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embedding_dim))
        self.transformer.reset_parameters()

    def embed_patches(self, image_BCSS: Tensor) -> Tensor:
        """Return what the first block reads: the class token, then the patches, row by row."""
        x_BLD = self.conv1(image_BCSS).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.to(x_BLD.dtype).expand(x_BLD.shape[0], 1, -1)
        x_BLD = torch.cat([class_B1D, x_BLD], dim=1) + self.positional_embedding.to(x_BLD.dtype)
        return self.ln_pre(x_BLD)

    def forward(self, image_BCSS: Tensor) -> Tensor:
        """Embed normalised images; the result is not L2-normalised."""
        x_BLD = self.embed_patches(image_BCSS)
        if self.training and self.num_kept_patches < self.num_patches:
            x_BLD = drop_patches(x_BLD, self.num_kept_patches)
        x_BLD = self.transformer(x_BLD)
        return self.ln_post(x_BLD[:, 0]) @ self.proj


class CLIP(DualEncoder):
    """Both towers of one architecture, randomly initialised.

    Args:
        spec: What to build; `clip_rt.specs.MODELS` has the published ones.
        patch_dropout: Share of the patches a ViT leaves out while it trains, in [0, 1).
        logit_bias: First value of the learned bias of the sigmoid loss, which has its authors'
            value at -10; None for the contrastive loss, which has no bias.

    Raises:
        InputError: a side that does not divide into patches, an empty context, or patches that
            cannot be dropped.
    """

    causal_mask_LL: Tensor

    def __init__(
        self, spec: ModelSpec, *, patch_dropout: float = 0.0, logit_bias: float | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.facts = spec.facts
        self.text_tokenizer = OpenAITokenizer(spec.text.context_length)
        text = spec.text
        _check_lengths(spec)
        _check_patch_dropout(spec, patch_dropout)
        self.visual: nn.Module
        if isinstance(spec.image, ViTSpec):
            self.visual = VisionTransformer(
                spec.image, spec.side_px, spec.embedding_dim, spec.activation, patch_dropout
            )
        else:
            self.visual = ModifiedResNet(spec.image, spec.side_px, spec.embedding_dim)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(
            0.01 * torch.randn(text.context_length, text.width)
        )
        self.transformer = Transformer(text.width, text.layers, text.heads, spec.activation)
        self.ln_final = LayerNorm(text.width)
        self.text_projection = nn.Parameter(
            text.width**-0.5 * torch.randn(text.width, spec.embedding_dim)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.register_buffer("causal_mask_LL", causal_mask(text.context_length), persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.transformer.reset_parameters()

    def encode_image(self, image_BCSS: Tensor) -> Tensor:
        """Embed images, float (B, 3, S, S), mean and std already applied.

        Returns:
            float (B, E), not L2-normalised.
        """
        return self.visual(image_BCSS)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Embed token ids, int (B, L) with L up to the context length.

        L may be cut anywhere after the last end-of-text of the batch: no later position can reach
        the embedding through the causal mask.

        Returns:
            float (B, E), not L2-normalised, read at the first end-of-text token.
        """
        length = tokens_BL.shape[1]
        x_BLD = self.token_embedding(tokens_BL) + self.positional_embedding[:length]
        x_BLD = self.transformer(x_BLD, self.causal_mask_LL[:length, :length])
        end_B = (tokens_BL == END_OF_TEXT).int().argmax(dim=1)
        x_BD = x_BLD[torch.arange(x_BLD.shape[0], device=x_BLD.device), end_B]
        return self.ln_final(x_BD) @ self.text_projection

    def encode_text_hidden(self, tokens_BL: Tensor) -> TextHidden:
        """Return the hidden states of token ids, int (B, L) with L up to the context length."""
        length = tokens_BL.shape[1]
        mask_LL = self.causal_mask_LL[:length, :length]
        *blocks, last_block = self.transformer.resblocks
        x_BLD = self.token_embedding(tokens_BL) + self.positional_embedding[:length]
        for block in blocks:
            x_BLD = block(x_BLD, mask_LL)
        last_BLD = self.ln_final(last_block(x_BLD, mask_LL))
        end_B = (tokens_BL == END_OF_TEXT).int().argmax(dim=1)
        end_BD = last_BLD[torch.arange(last_BLD.shape[0], device=last_BLD.device), end_B]
        return TextHidden(last_BLD, x_BLD, self.ln_final(x_BLD), end_BD @ self.text_projection)

    @property
    def has_text_hidden(self) -> bool:
        """It has them."""
        return True

    def embed_tokens(self) -> nn.Embedding:
        """Return the table from which the text tower takes the vectors of ids."""
        return self.token_embedding

    def tower_of(self, name: str) -> Tower | None:
        """Say to which tower a parameter belongs."""
        if name in SCALARS:
            return None
        return "image" if name.startswith("visual.") else "text"

    def tower_modules(self, tower: Tower) -> Sequence[nn.Module]:
        """Return the modules that are a tower."""
        if tower == "image":
            return (self.visual,)
        return self.token_embedding, self.transformer, self.ln_final

    def with_weights(self, weights: Mapping[str, Tensor]) -> CLIP:
        """Return another CLIP of this architecture; see `DualEncoder.with_weights`."""
        # On the meta device nothing is initialised only to be overwritten.
        with torch.device("meta"):
            clip = CLIP(self.spec, logit_bias=0.0 if "logit_bias" in weights else None)
        clip.load_state_dict(weights, strict=True, assign=True)
        clip.causal_mask_LL = causal_mask(self.spec.text.context_length)
        return clip.requires_grad_(False).eval()

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Trade time for memory: keep one activation per transformer block or ResNet stage.

        The others are computed again in the backward pass; gradients are the same.
        """
        for module in self.modules():
            if isinstance(module, Transformer | ModifiedResNet):
                module.grad_checkpointing = enabled


def _check_lengths(spec: ModelSpec) -> None:
    cell_px = spec.image.patch_px if isinstance(spec.image, ViTSpec) else spec.image.cell_px
    if spec.side_px < cell_px or spec.side_px % cell_px:
        raise InputError(
            f"side_px is {spec.side_px}; {spec.name} reads squares whose side is a multiple of "
            f"{cell_px} px."
        )
    if spec.text.context_length < 2:
        raise InputError(
            f"context_length is {spec.text.context_length}; start and end of text need 2."
        )


def _check_patch_dropout(spec: ModelSpec, patch_dropout: float) -> None:
    if not 0 <= patch_dropout < 1:
        raise InputError(f"patch_dropout is {patch_dropout}; it must be at least 0 and below 1.")
    if patch_dropout and not isinstance(spec.image, ViTSpec):
        raise InputError(
            f"patch_dropout is {patch_dropout}, but {spec.name} is a ResNet and has no patches to "
            "drop; use 0."
        )
