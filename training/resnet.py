"""The ResNet image tower of CLIP: normalised images in, embeddings out.

Parameter names are those of OpenAI's checkpoints (openai/CLIP `clip/model.py`).

Shape suffixes: B batch, C channels, P side of a grid of cells, S side of the image in pixels,
L positions, D width, K head width, H heads.

Sources: Radford et al. 2021, section 2.4; He et al. 2016 for the residual blocks.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from clip_rt.specs import ResNetSpec
from training.recompute import recompute_in_backward


class Bottleneck(nn.Module):
    """A residual block that average-pools where ResNet uses a strided convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = channels * ResNetSpec.expansion
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
                channels_in = channels * ResNetSpec.expansion
            self.add_module(f"layer{stage + 1}", layer)
        self.attnpool = AttentionPool2d(
            side_px // spec.cell_px, channels_in, spec.heads, embedding_dim
        )
        self.grad_checkpointing = False

    def forward(self, image_BCSS: Tensor) -> Tensor:
        """Embed normalised images; the result is not L2-normalised."""
        x = torch.relu(self.bn1(self.conv1(image_BCSS)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(torch.relu(self.bn3(self.conv3(x))))
        for number in range(1, 5):
            stage = self.get_submodule(f"layer{number}")
            x = recompute_in_backward(stage, x) if self.grad_checkpointing else stage(x)
        return self.attnpool(x)
