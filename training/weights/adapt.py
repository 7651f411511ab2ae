"""Weights for one image side, context length or colour normalisation become weights for another.

State dicts under OpenAI's names go in, changed copies come out. Positions are interpolated, which
is an approximation to be fine-tuned; a change of colour normalisation is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from clip_rt.errors import CheckpointError
from clip_rt.specs import CLIP_MEAN, CLIP_STD

IMAGE_POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
"""Of a ViT, and of a ResNet's attention pooling."""
TEXT_POSITIONS = "positional_embedding"


def resize_image_positions(positions_LD: Tensor, num_positions: int) -> Tensor:
    """Interpolate the positions of a square grid, bicubic with antialiasing.

    Equals `resize_pos_embed` of mlfoundations/open_clip `src/open_clip/model.py`.

    Args:
        positions_LD: float32 (1 + P * P, D); the first is the class token's, or the mean's, and
            stays.
        num_positions: One more than a square.

    Raises:
        CheckpointError: one of the two is no square grid and one more.
    """
    old, new = math.isqrt(len(positions_LD) - 1), math.isqrt(num_positions - 1)
    if (old**2, new**2) != (len(positions_LD) - 1, num_positions - 1):
        raise CheckpointError(
            f"{len(positions_LD)} image positions cannot become {num_positions}: both must be one "
            "more than a square number."
        )
    grid_1DPP = positions_LD[1:].T.reshape(1, -1, old, old)
    grid_1DPP = functional.interpolate(
        grid_1DPP, size=(new, new), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([positions_LD[:1], grid_1DPP.flatten(2)[0].T])


def resize_text_positions(positions_LD: Tensor, num_positions: int) -> Tensor:
    """Interpolate the positions of a sequence linearly; float32 (L, D) to (num_positions, D).

    Equals `resize_text_pos_embed` of mlfoundations/open_clip `src/open_clip/model.py`.
    """
    line_1DL = functional.interpolate(
        positions_LD.T[None], size=num_positions, mode="linear", align_corners=False
    )
    return line_1DL[0].T.contiguous()


def read_our_colours(
    state_dict: dict[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Tensor]:
    """Rewrite a ViT trained under another mean and deviation, so that it reads CLIP's.

    The patch projection is linear and pads nothing, so the difference is a factor on each channel
    of its weights and one constant vector, which every patch position takes up.

    Args:
        state_dict: float32 tensors.
        mean: Of each channel in [0, 1], RGB, as it was trained.
        std: Likewise.

    Raises:
        CheckpointError: a ResNet, whose first convolution pads with zeros.
    """
    if "visual.class_embedding" not in state_dict:
        raise CheckpointError(
            f"the weights were trained on images normalised with mean {tuple(mean)} and deviation "
            f"{tuple(std)}; here they get {CLIP_MEAN} and {CLIP_STD}, and a ResNet cannot be "
            "rewritten for that. Use other weights."
        )
    weight_DCSS = state_dict["visual.conv1.weight"].double()
    their_mean_C, their_std_C = torch.tensor(mean).double(), torch.tensor(std).double()
    our_mean_C, our_std_C = torch.tensor(CLIP_MEAN).double(), torch.tensor(CLIP_STD).double()
    shift_C = (our_mean_C - their_mean_C) / their_std_C
    shift_D = torch.einsum("dcij,c->d", weight_DCSS, shift_C)
    weight_DCSS = weight_DCSS * (our_std_C / their_std_C)[:, None, None]
    positions_LD = state_dict["visual.positional_embedding"].double()
    positions_LD = torch.cat([positions_LD[:1], positions_LD[1:] + shift_D])
    return state_dict | {
        "visual.conv1.weight": weight_DCSS.float(),
        "visual.positional_embedding": positions_LD.float(),
    }
