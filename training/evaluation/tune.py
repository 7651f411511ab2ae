"""Fine-tune one tower of a model on few examples; the other one stays as it is.

`tune_image` starts from the zero-shot classifier and moves the image tower and the classifier, as
WiSE-FT does before it interpolates (Wortsman et al. 2022, section 3). `tune_text` locks the images
and moves the text tower, as LiT does (Zhai et al. 2022). Statistics of batch normalisation stay
what they were: a few examples are no measure of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from clip_rt.errors import InputError, TrainingError
from clip_rt.inputs.prompts import check_labels, fill, find_templates
from clip_rt.inputs.tokenizer import pad
from clip_rt.specs import Tower
from training.dual_encoder import DualEncoder
from training.evaluation.embed import device_of, pixels_to_input
from training.schedule import cosine_lr


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How far and how fast to go."""

    num_steps: int
    peak_lr: float
    batch_size: int = 64
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1 or not self.peak_lr > 0:
            raise InputError(
                f"{self.num_steps} steps of {self.batch_size} examples at a learning rate of "
                f"{self.peak_lr}: all of them must be above 0."
            )


def descend(
    parameters: Iterable[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    *,
    num_rows: int,
    recipe: Recipe,
) -> None:
    """Lower a loss by AdamW, with a cosine schedule and a tenth of the steps as warm-up.

    Args:
        parameters: What may move; their gradients are left empty.
        loss_of: Loss of the examples with the given rows, int64 (B,), on the CPU.
        num_rows: How many examples there are; each step draws a batch of different ones.
        recipe: Steps, rate, batch, seed.

    Raises:
        TrainingError: the loss is not finite.
    """
    moving = list(parameters)
    optimizer = torch.optim.AdamW(moving, lr=recipe.peak_lr, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(
                step,
                peak_lr=recipe.peak_lr,
                warmup_steps=recipe.num_steps // 10,
                total_steps=recipe.num_steps,
            )
        rows_B = torch.randperm(num_rows, generator=generator)[: recipe.batch_size]
        loss = loss_of(rows_B)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {step + 1} of {recipe.num_steps}; lower the "
                f"learning rate of {recipe.peak_lr}."
            )
        gradients = torch.autograd.grad(loss, moving, allow_unused=True)
        for parameter, gradient in zip(moving, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in moving:
        parameter.grad = None


def tune_image(
    model: DualEncoder,
    pixels_NSSC: NDArray[np.uint8],
    right_N: NDArray[np.int64],
    class_CE: NDArray[np.float32],
    recipe: Recipe,
) -> tuple[DualEncoder, NDArray[np.float32]]:
    """Fine-tune the image tower together with a classifier.

    Args:
        model: Is not changed.
        pixels_NSSC: uint8 (N, S, S, 3) as `clip_rt.preprocess` makes them.
        right_N: Class of each.
        class_CE: Where the classifier starts: class embeddings, rows of length 1.
        recipe: Steps, rate, batch, seed.

    Returns:
        A tuned copy of the model in eval mode, and the tuned classifier, float32 (C, E).
    """
    device = device_of(model)
    tuned, moving = _copy_to_tune(model, "image")
    head_CE = nn.Parameter(torch.from_numpy(class_CE.copy()).to(device))
    right = torch.from_numpy(right_N)
    scale = tuned.logit_scale.exp()

    def loss_of(rows_B: Tensor) -> Tensor:
        image_BCSS = pixels_to_input(pixels_NSSC[rows_B.numpy()], tuned.facts).to(device)
        image_BE = functional.normalize(tuned.encode_image(image_BCSS).float(), dim=-1)
        return functional.cross_entropy(scale * image_BE @ head_CE.T, right[rows_B].to(device))

    descend([*moving, head_CE], loss_of, num_rows=len(right_N), recipe=recipe)
    return tuned.requires_grad_(False), head_CE.detach().cpu().numpy()


def tune_text(
    model: DualEncoder,
    image_NE: NDArray[np.float32],
    right_N: NDArray[np.int64],
    labels: Sequence[str],
    recipe: Recipe,
    *,
    templates: str | Sequence[str] | None = None,
) -> DualEncoder:
    """Fine-tune the text tower so that prompts find the examples; the images are locked.

    Args:
        model: Is not changed.
        image_NE: Embeddings of the examples, rows of length 1.
        right_N: Class of each, an index into `labels`.
        labels: C names.
        recipe: Steps, rate, batch, seed.
        templates: As for `clip_rt.Client.class_embeddings`.

    Returns:
        A tuned copy of the model in eval mode.
    """
    device, facts = device_of(model), model.facts
    tuned, moving = _copy_to_tune(model, "text")
    labels, frames = check_labels(labels), find_templates(templates)
    texts = [fill(frame, label) for label in labels for frame in frames]
    ids = [model.text_tokenizer.encode_text(text, truncate=True) for text in texts]
    tokens = pad(
        ids,
        length_tokens=max(map(len, ids)) if facts.is_any_length_exact else facts.context_length,
        pad_id=facts.tokenization.pad_id,
    )
    tokens_BL = torch.from_numpy(tokens).to(device)
    images, right = torch.from_numpy(image_NE).to(device), torch.from_numpy(right_N).to(device)
    scale = tuned.logit_scale.exp().detach()

    def loss_of(rows_B: Tensor) -> Tensor:
        text_BE = functional.normalize(tuned.encode_text(tokens_BL).float(), dim=-1)
        pooled = text_BE.view(len(labels), len(frames), -1).mean(dim=1)
        class_CE = functional.normalize(pooled, dim=-1)
        rows = rows_B.to(device)
        return functional.cross_entropy(scale * images[rows] @ class_CE.T, right[rows])

    descend(moving, loss_of, num_rows=len(right_N), recipe=recipe)
    return tuned.requires_grad_(False)


def _copy_to_tune(model: DualEncoder, tower: Tower) -> tuple[DualEncoder, list[nn.Parameter]]:
    """Copy a model in eval mode; return the copy and those of its parameters that may move."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tuned = model.with_weights(weights).to(device_of(model))
    # The table of tokens stays: it is most of a small tower, and few of its rows are read.
    table = tuned.embed_tokens().weight
    moving = [
        parameter
        for name, parameter in tuned.named_parameters()
        if tuned.tower_of(name) == tower and parameter is not table
    ]
    for parameter in moving:
        parameter.requires_grad_(True)
    return tuned, moving
