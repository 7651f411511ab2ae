"""Learn the words around a class name from few examples: CoOp; images in, a classifier out.

    python -m training.coop --checkpoint clip.safetensors --data shop/ --shots 16 --out shop.npz

Both towers stay as they are. What is learned is a row of token embeddings, shared by all classes,
that stands before the name where "a photo of a" would. The class embeddings that come of it are
saved as a probe, which `Client.classify` serves.

Source: Zhou et al. 2022, section 3.1, unified context with the class name at the end. Deviations:
AdamW on embeddings computed once, where the paper has SGD on augmented images; and the context may
start from words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from clip_rt.classification.probe import Probe
from clip_rt.errors import InputError
from clip_rt.inputs.prompts import check_labels, fill
from clip_rt.inputs.tokenizer import encode, pad
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.evaluation.embed import device_of, logit_scale
from training.evaluation.labelled import check_exist
from training.evaluation.source import Source, choose_shots, embed_data, find_classes
from training.evaluation.tune import Recipe, descend
from training.model import CLIP, causal_mask
from training.weights.load import fingerprint

NUM_CONTEXT = 16
"""Context vectors, where the context length leaves room for them."""
CONTEXT_STD = 0.02
"""Of vectors that start from nothing (Zhou et al. 2022, section 4.1)."""
DEFAULT_RECIPE = Recipe(num_steps=100, peak_lr=5e-3, batch_size=512)


@dataclass(frozen=True, kw_only=True)
class CoopConfig(Source):
    """What to learn from."""

    out: Path
    """The probe to write; ends in .npz."""
    shots: int | None = None
    """Examples of each class to learn from; without it, all."""
    num_context: int = NUM_CONTEXT
    """Context vectors."""
    num_steps: int = DEFAULT_RECIPE.num_steps
    """Updates of the context vectors."""
    peak_lr: float = DEFAULT_RECIPE.peak_lr
    """Highest learning rate."""
    seed: int = 0
    """Of the context vectors and of the choice of examples."""


def embed_prompts(model: CLIP, context_MD: Tensor, labels: Sequence[str]) -> Tensor:
    """Embed learned context followed by each label and a full stop.

    Args:
        model: Its text tower is used as it is.
        context_MD: M token embeddings, on the model's device; gradients reach them.
        labels: C names.

    Returns:
        float32 (C, E), rows of length 1.

    Raises:
        InputError: context and the longest label do not fit into the context length together.
    """
    device = device_of(model)
    ids = encode([fill("{}.", label) for label in check_labels(labels)])
    num_context, longest = len(context_MD), max(map(len, ids))
    length = num_context + longest
    if length > model.spec.text.context_length:
        raise InputError(
            f"{num_context} context vectors and a label of {longest} tokens are {length}; the "
            f"model reads {model.spec.text.context_length}. Use fewer context vectors."
        )
    tokens_CL = torch.from_numpy(pad(ids, length_tokens=longest)).to(device)
    words_CLD = model.token_embedding(tokens_CL)
    context_CMD = context_MD.expand(len(labels), -1, -1)
    # Start of text, then the context, then the name, the full stop and the end of text.
    x_CLD = torch.cat([words_CLD[:, :1], context_CMD, words_CLD[:, 1:]], dim=1)
    x_CLD = x_CLD + model.positional_embedding[:length]
    x_CLD = model.transformer(x_CLD, causal_mask(length).to(device))
    end_C = torch.tensor([num_context + len(each) - 1 for each in ids], device=device)
    x_CD = x_CLD[torch.arange(len(ids), device=device), end_C]
    return functional.normalize((model.ln_final(x_CD) @ model.text_projection).float(), dim=-1)


def learn_context(
    model: CLIP,
    image_NE: NDArray[np.float32],
    right_N: NDArray[np.int64],
    labels: Sequence[str],
    *,
    num_context: int = NUM_CONTEXT,
    words: str | None = None,
    recipe: Recipe = DEFAULT_RECIPE,
) -> Tensor:
    """Learn context vectors that tell the examples apart.

    Args:
        model: Is not changed.
        image_NE: Embeddings of the examples, rows of length 1.
        right_N: Class of each, an index into `labels`.
        labels: C names.
        num_context: How many vectors; fewer where the context length has no room for them.
        words: Text whose token embeddings the vectors start from, in place of `num_context`.
        recipe: Steps, rate, batch, seed.

    Returns:
        float32 (M, D), detached.

    Raises:
        InputError: no room for any, or a label is too long.
    """
    device = device_of(model)
    longest = max(map(len, encode([fill("{}.", label) for label in check_labels(labels)])))
    num_context = min(num_context, model.spec.text.context_length - longest)
    if words is not None:
        start_MD = model.token_embedding.weight[encode([words])[0][1:-1]].detach().clone()
    else:
        generator = torch.Generator().manual_seed(recipe.seed)
        width = model.spec.text.width
        start_MD = CONTEXT_STD * torch.randn(max(num_context, 0), width, generator=generator)
    if len(start_MD) == 0:
        raise InputError(f"num_context is {num_context}; at least 1 vector must have room.")
    context_MD = nn.Parameter(start_MD.to(device))
    images, right = torch.from_numpy(image_NE).to(device), torch.from_numpy(right_N).to(device)
    scale = logit_scale(model)

    def loss_of(rows_B: Tensor) -> Tensor:
        class_CE = embed_prompts(model, context_MD, labels)
        rows = rows_B.to(device)
        return functional.cross_entropy(scale * images[rows] @ class_CE.T, right[rows])

    descend([context_MD], loss_of, num_rows=len(right_N), recipe=recipe)
    return context_MD.detach()


@torch.no_grad()
def context_probe(model: CLIP, context_MD: Tensor, labels: Sequence[str]) -> Probe:
    """Turn learned context into the classifier of some labels; they may be others than learned."""
    class_CE = embed_prompts(model, context_MD, labels).cpu().numpy()
    return Probe(
        weight=logit_scale(model) * class_CE,
        bias=np.zeros(len(labels), np.float32),
        labels=tuple(labels),
        fingerprint=fingerprint(model.state_dict()),
        method=f"CoOp, {len(context_MD)} context vectors",
    )


def run(config: CoopConfig) -> Probe:
    """Do what `config` says.

    Raises:
        InputError, CheckpointError: something it names cannot be used.
    """
    table = config.read_table()
    check_exist(*config.data)
    model = config.open_model()
    images = embed_data(model, config.data, allow_outside=config.allow_outside, limits=config)
    classes = find_classes(images.labels, table)
    rows_N, right_N = classes.rows_N, classes.right_N
    if config.shots is not None:
        rng = np.random.default_rng(config.seed)
        few = choose_shots(right_N, config.shots, rng=rng)
        rows_N, right_N = rows_N[few], right_N[few]
    recipe = Recipe(
        num_steps=config.num_steps,
        peak_lr=config.peak_lr,
        batch_size=DEFAULT_RECIPE.batch_size,
        seed=config.seed,
    )
    context_MD = learn_context(
        model,
        images.image_NE[rows_N],
        right_N,
        classes.names,
        num_context=config.num_context,
        recipe=recipe,
    )
    probe = context_probe(model, context_MD, classes.names)
    probe.save(config.out)
    return probe


def main(config: CoopConfig) -> None:
    """Learn, save, and say what came of it."""
    probe = run(config)
    Console(highlight=False).print(
        f"{config.out}: {len(probe.labels):,} classes, {probe.method}", soft_wrap=True
    )


if __name__ == "__main__":
    with command():
        main(tyro.cli(CoopConfig, prog=program("training.coop"), description=__doc__))
