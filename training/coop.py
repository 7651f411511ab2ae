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

import itertools
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
from clip_rt.inputs.tokenizer import pad
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.dual_encoder import DualEncoder
from training.evaluation.embed import device_of, logit_scale
from training.evaluation.labelled import check_exist
from training.evaluation.source import Source, choose_shots, embed_data, find_classes
from training.evaluation.tune import Recipe, descend
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


def embed_prompts(model: DualEncoder, context_MD: Tensor, labels: Sequence[str]) -> Tensor:
    """Embed learned context followed by each label and a full stop.

    The model reads the id of a filler for each vector, and the vectors in place of the filler's: so
    this works for whatever text tower lies behind a table of vectors.

    Args:
        model: Its text tower is used as it is.
        context_MD: M token embeddings, on the model's device; gradients reach them.
        labels: C names.

    Returns:
        float32 (C, E), rows of length 1.

    Raises:
        InputError: context and the longest label do not fit into the context length together.
    """
    device, facts, num_context = device_of(model), model.facts, len(context_MD)
    start, _ = _count_ends(model)
    filler = _encode(model, "a")[start]
    ids = [
        [*each[:start], *[filler] * num_context, *each[start:]]
        for each in (_encode(model, fill("{}.", label)) for label in check_labels(labels))
    ]
    length = max(map(len, ids))
    if length > facts.context_length:
        raise InputError(
            f"{num_context} context vectors and a label of {length - num_context} tokens are "
            f"{length}; the model reads {facts.context_length}. Use fewer context vectors."
        )
    if not facts.is_any_length_exact:
        length = facts.context_length
    tokens_CL = pad(ids, length_tokens=length, pad_id=facts.tokenization.pad_id)

    def put_context(_: nn.Module, __: object, words_CLD: Tensor) -> Tensor:
        context_CMD = context_MD.to(words_CLD.dtype).expand(len(words_CLD), -1, -1)
        name_CLD = words_CLD[:, start + num_context :]
        return torch.cat([words_CLD[:, :start], context_CMD, name_CLD], dim=1)

    hook = model.embed_tokens().register_forward_hook(put_context)
    try:
        text_CE = model.encode_text(torch.from_numpy(tokens_CL).to(device))
    finally:
        hook.remove()
    return functional.normalize(text_CE.float(), dim=-1)


def _encode(model: DualEncoder, text: str) -> list[int]:
    return model.text_tokenizer.encode_text(text)


def _count_ends(model: DualEncoder) -> tuple[int, int]:
    """Return how many ids every text begins with, and how many it ends with."""
    forward = [_encode(model, text) for text in ("a", "7", "x y")]
    return _count_common(forward), _count_common([ids[::-1] for ids in forward])


def _count_common(rows: Sequence[Sequence[int]]) -> int:
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(itertools.takewhile(bool, same))


def learn_context(
    model: DualEncoder,
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
    longest = max(len(_encode(model, fill("{}.", label))) for label in check_labels(labels))
    num_context = min(num_context, model.facts.context_length - longest)
    table_VD = model.embed_tokens().weight.detach()
    if words is not None:
        num_start, num_end = _count_ends(model)
        ids = _encode(model, words)
        start_MD = table_VD[ids[num_start : len(ids) - num_end]].clone()
    else:
        generator = torch.Generator().manual_seed(recipe.seed)
        size = max(num_context, 0), table_VD.shape[1]
        start_MD = CONTEXT_STD * torch.randn(size, generator=generator)
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
def context_probe(model: DualEncoder, context_MD: Tensor, labels: Sequence[str]) -> Probe:
    """Turn learned context into the classifier of some labels; they may be others than learned."""
    class_CE = embed_prompts(model, context_MD, labels).cpu().numpy()
    return Probe(
        weight=logit_scale(model) * class_CE,
        bias=np.zeros(len(labels), np.float32),
        labels=tuple(labels),
        fingerprint=fingerprint(model.weights()),
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
