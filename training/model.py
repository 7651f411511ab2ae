"""CLIP: an image tower, a causal text tower, and the temperature that scales their cosine.

Parameter names are those of OpenAI's checkpoints (openai/CLIP `clip/model.py`), so that weights of
that naming load strictly, even where another name would be clearer. Attention is written out as
matrix products: it exports to a graph that TensorRT fuses and gets right, which torch's own
decomposition of scaled-dot-product attention does not promise.

Shape suffixes: B batch, L positions, D width, H heads, K head width, E embedding, C channels,
S side of the image in pixels, P side of a grid of patches or cells.

Source: Radford et al. 2021, section 2.4; He et al. 2016 for the residual blocks.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_rt.specs import END_OF_TEXT, MAX_LOGIT_SCALE, Activation, ModelSpec, ResNetSpec, ViTSpec


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

    def __init__(self, width: int, heads: int, activation: Activation) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=activation_module(activation),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = LayerNorm(width)

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None) -> Tensor:  # noqa: D102
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD), mask_LL)
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class Transformer(nn.Module):
    """A stack of residual attention blocks."""

    def __init__(self, width: int, layers: int, heads: int, activation: Activation) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, activation) for _ in range(layers)
        )

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None) -> Tensor:  # noqa: D102
        for block in self.resblocks:
            x_BLD = block(x_BLD, mask_LL)
        return x_BLD

    def reset_parameters(self) -> None:
        """Initialise as section 2.4's scheme: residual branches shrink with depth."""
        width, layers = self.resblocks[0].attn.out_proj.in_features, len(self.resblocks)
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                nn.init.zeros_(bias)


class VisionTransformer(nn.Module):
    """The ViT image tower."""

    def __init__(
        self, spec: ViTSpec, side_px: int, embedding_dim: int, activation: Activation
    ) -> None:
        super().__init__()
        width, patches = spec.width, (side_px // spec.patch_px) ** 2
        self.conv1 = nn.Conv2d(3, width, spec.patch_px, stride=spec.patch_px, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(patches + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, spec.layers, spec.heads, activation)
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
        x_BLD = self.transformer(self.embed_patches(image_BCSS))
        return self.ln_post(x_BLD[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    """A residual block that average-pools where ResNet uses a strided convolution."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = channels * self.expansion
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(channels_in, channels_out, 1, bias=False)),
                        ("1", nn.BatchNorm2d(channels_out)),
                    ]
                )
            )
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x_BCPP: Tensor) -> Tensor:  # noqa: D102
        y = torch.relu(self.bn1(self.conv1(x_BCPP)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        identity = x_BCPP if self.downsample is None else self.downsample(x_BCPP)
        return torch.relu(y + identity)


class AttentionPool2d(nn.Module):
    """Pool a grid of cells by attention, with their mean as the one query."""

    def __init__(self, cells_per_side: int, width: int, heads: int, embedding_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(
            width**-0.5 * torch.randn(cells_per_side**2 + 1, width)
        )
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embedding_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BCPP: Tensor) -> Tensor:  # noqa: D102
        x_BLD = x_BCPP.flatten(2).transpose(1, 2)
        x_BLD = torch.cat([x_BLD.mean(dim=1, keepdim=True), x_BLD], dim=1)
        x_BLD = x_BLD + self.positional_embedding.to(x_BLD.dtype)
        B, L, D = x_BLD.shape
        K = D // self.heads
        q_BH1K = self.q_proj(x_BLD[:, :1]).view(B, 1, self.heads, K).transpose(1, 2)
        k_BHLK = self.k_proj(x_BLD).view(B, L, self.heads, K).transpose(1, 2)
        v_BHLK = self.v_proj(x_BLD).view(B, L, self.heads, K).transpose(1, 2)
        weights_BH1L = ((q_BH1K * K**-0.5) @ k_BHLK.transpose(-1, -2)).softmax(dim=-1)
        return self.c_proj((weights_BH1L @ v_BHLK).reshape(B, D))


class ModifiedResNet(nn.Module):
    """The ResNet image tower: three-convolution stem, anti-aliased strides, attention pooling."""

    def __init__(self, spec: ResNetSpec, side_px: int, embedding_dim: int) -> None:
        super().__init__()
        width = spec.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels_in = width
        for stage, blocks in enumerate(spec.layers):
            channels = width * 2**stage
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layer.append(Bottleneck(channels_in, channels, stride))
                channels_in = channels * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", layer)
        self.attnpool = AttentionPool2d(side_px // 32, channels_in, spec.heads, embedding_dim)

    def forward(self, image_BCSS: Tensor) -> Tensor:
        """Embed normalised images; the result is not L2-normalised."""
        x = torch.relu(self.bn1(self.conv1(image_BCSS)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(torch.relu(self.bn3(self.conv3(x))))
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class CLIP(nn.Module):
    """Both towers of one architecture, randomly initialised.

    Args:
        spec: What to build; `clip_rt.specs.MODELS` has the published ones.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        text = spec.text
        self.visual: nn.Module
        if isinstance(spec.image, ViTSpec):
            self.visual = VisionTransformer(
                spec.image, spec.side_px, spec.embedding_dim, spec.activation
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
