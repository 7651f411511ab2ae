"""The contrastive objective: which image belongs to which text of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def contrastive_loss(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, *, group_B: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE over a batch of pairs.

    Args:
        image_BE: L2-normalised image embeddings.
        text_BE: L2-normalised text embeddings; row i belongs to image i.
        logit_scale: Scalar factor on the cosines (the exponential of the learned parameter).
        group_B: Optional integer per pair. Two pairs of one group say the same thing (two drawings
            named "cat"), so neither counts as a negative of the other.

    Returns:
        Scalar mean of both directions' cross-entropy.

    Source: Radford et al. 2021, figure 3. The groups are ours: with many drawings of each name the
    plain loss would push right answers apart.
    """
    logits_BB = logit_scale * image_BE @ text_BE.T
    if group_B is not None:
        same_BB = group_B[:, None] == group_B[None, :]
        same_BB.fill_diagonal_(False)
        logits_BB = logits_BB.masked_fill(same_BB, -torch.inf)
    target_B = torch.arange(len(logits_BB), device=logits_BB.device)
    image_loss = functional.cross_entropy(logits_BB, target_B)
    text_loss = functional.cross_entropy(logits_BB.T, target_B)
    return (image_loss + text_loss) / 2
