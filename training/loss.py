"""The objectives: normalised embeddings of a batch of pairs go in, one scalar loss comes out.

Where torch.distributed runs on several ranks, each rank passes its own pairs, equally many on each,
and gets its local loss: its own rows against the embeddings of all ranks, gathered with gradient.
The mean of the ranks' losses is the loss of the joined batch, and the mean of their gradients,
which DDP and FSDP take, is its gradient. Logits are FP32 under autocast too (FP64 where given).

Shape suffixes: B own pairs, G pairs of all ranks, R rows of logits at a time, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24
"""More logits than these (64 MiB) are made some rows at a time, and again in the backward pass."""


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
    image_GE, text_GE = _gather(image_BE, text_BE)
    positive_B, group_G = _positives(image_BE), _repeats(group_B)

    def cross_entropy(logits_RG: Tensor, positive_R: Tensor) -> Tensor:
        if group_G is not None:
            logits_RG = logits_RG.masked_fill(_same_group(group_G, positive_R), -torch.inf)
        return functional.cross_entropy(logits_RG, positive_R, reduction="sum")

    image_loss = _sum_over_rows(cross_entropy, positive_B, (image_BE, text_GE, logit_scale))
    text_loss = _sum_over_rows(cross_entropy, positive_B, (text_BE, image_GE, logit_scale))
    return (image_loss + text_loss) / (2 * len(image_BE))


def sigmoid_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group_B: Tensor | None = None,
) -> Tensor:
    """Pairwise sigmoid loss: each image and text is one yes-or-no question of its own.

    Args:
        image_BE: As for `contrastive_loss`, and so are `text_BE`, `logit_scale` and `group_B`.
        text_BE: See there.
        logit_scale: See there; the paper starts it at 10.
        logit_bias: Scalar added to all logits; the paper starts it at -10, because nearly all
            answers are no.
        group_B: See there.

    Returns:
        Scalar sum over all B x G questions, divided by B.

    Source: Zhai et al. 2023, algorithm 1. Texts are gathered rather than passed around a ring:
    embeddings are small, and rows of logits at a time bound the memory just as well.
    """
    (text_GE,) = _gather(text_BE)
    positive_B, group_G = _positives(image_BE), _repeats(group_B)

    def binary_cross_entropy(logits_RG: Tensor, positive_R: Tensor) -> Tensor:
        own_R1 = logits_RG.gather(1, positive_R[:, None])
        loss_RG = functional.softplus(logits_RG)
        if group_G is not None:
            loss_RG = loss_RG.masked_fill(_same_group(group_G, positive_R), 0.0)
        # Of the own text, softplus(-x) = softplus(x) - x.
        return loss_RG.sum() - own_R1.sum()

    tensors = (image_BE, text_GE, logit_scale, logit_bias)
    return _sum_over_rows(binary_cross_entropy, positive_B, tensors) / len(image_BE)


def distillation_loss(
    student: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Cross-entropy of the student's rows of logits against the teacher's, both directions.

    Its weight is the caller's: `contrastive_loss(...) + weight * distillation_loss(...)`.

    Args:
        student: `(image_BE, text_BE, logit_scale)` as for `contrastive_loss`.
        teacher: The same of the teacher on the same pairs, whose embeddings may have another
            width. No gradient reaches it.

    Returns:
        Scalar mean of both directions. Its minimum is the entropy of the teacher's rows, not 0.

    Source: Yang et al. 2024, "CLIP-KD", section 3.2 (contrastive relational distillation); the
    cross-entropy form is that of open_clip `src/open_clip/loss.py`, DistillClipLoss.
    """
    image_BE, text_BE, scale = student
    teacher_image_BE, teacher_text_BE, teacher_scale = (each.detach() for each in teacher)
    image_GE, text_GE = _gather(image_BE, text_BE)
    teacher_image_GE, teacher_text_GE = _gather(teacher_image_BE, teacher_text_BE)
    positive_B = _positives(image_BE)

    def direction(own: Tensor, others: Tensor, teacher_own: Tensor, teacher_all: Tensor) -> Tensor:
        def cross_entropy(logits_RG: Tensor, row_R: Tensor) -> Tensor:
            target_RG = _logits(teacher_own[row_R - positive_B[0]], teacher_all, teacher_scale)
            return functional.cross_entropy(logits_RG, target_RG.softmax(dim=1), reduction="sum")

        return _sum_over_rows(cross_entropy, positive_B, (own, others, scale))

    image_loss = direction(image_BE, text_GE, teacher_image_BE, teacher_text_GE)
    text_loss = direction(text_BE, image_GE, teacher_text_BE, teacher_image_GE)
    return (image_loss + text_loss) / (2 * len(image_BE))


def _sum_over_rows(
    loss: Callable[[Tensor, Tensor], Tensor], positive_B: Tensor, tensors: tuple[Tensor, ...]
) -> Tensor:
    """Sum `loss(logits_RG, positive_R)` over blocks of rows, so that B x G logits never coexist.

    `tensors` is what `_logits` takes; its first is cut into the blocks.
    """
    own_BE, *others = tensors
    rows = max(1, LOGITS_AT_ONCE // len(others[0]))

    def block(own_RE: Tensor, positive_R: Tensor, *others: Tensor) -> Tensor:
        return loss(_logits(own_RE, *others), positive_R)

    if rows >= len(own_BE):
        return block(own_BE, positive_B, *others)
    blocks = zip(own_BE.split(rows), positive_B.split(rows), strict=True)
    losses = [checkpoint(block, *each, *others, use_reentrant=False) for each in blocks]
    return torch.stack(losses).sum()


def _logits(own_RE: Tensor, all_GE: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    with torch.autocast(own_RE.device.type, enabled=False):
        dtype = torch.promote_types(own_RE.dtype, torch.float32)
        logits_RG = scale.to(dtype) * own_RE.to(dtype) @ all_GE.to(dtype).T
        return logits_RG if bias is None else logits_RG + bias.to(dtype)


def _num_ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _gather(*tensors_BE: Tensor) -> tuple[Tensor, ...]:
    """Join the rows of all ranks, in one exchange each way; gradients flow back to their rank."""
    if _num_ranks() == 1:
        return tensors_BE
    own = torch.cat(tensors_BE, dim=1)
    widths = [tensor_BE.shape[1] for tensor_BE in tensors_BE]
    return torch.cat(all_gather(own)).split(widths, dim=1)


def _positives(own_BE: Tensor) -> Tensor:
    """Return the column of each own row's partner among the pairs of all ranks."""
    first = 0 if _num_ranks() == 1 else torch.distributed.get_rank() * len(own_BE)
    return torch.arange(first, first + len(own_BE), device=own_BE.device)


def _repeats(group_B: Tensor | None) -> Tensor | None:
    """Join the groups of all ranks; None on a CPU where none repeats, so that no mask is made.

    On a GPU the mask costs less than waiting for the device to tell.
    """
    if group_B is None:
        return None
    group_G = group_B
    if (num_ranks := _num_ranks()) > 1:
        gathered = [torch.empty_like(group_B) for _ in range(num_ranks)]
        torch.distributed.all_gather(gathered, group_B.contiguous())
        group_G = torch.cat(gathered)
    if group_G.device.type == "cpu" and len(group_G.unique()) == len(group_G):
        return None
    return group_G


def _same_group(group_G: Tensor, positive_R: Tensor) -> Tensor:
    """Mark the pairs of each row's group, itself excepted; bool (R, G)."""
    same_RG = group_G[positive_R][:, None] == group_G[None, :]
    return same_RG.scatter_(1, positive_R[:, None], False)
