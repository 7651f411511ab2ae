"""Mix two sets of weights, zero-shot and fine-tuned, as WiSE-FT does; files in, a file out.

    python -m training.interpolate --zero-shot clip.safetensors --fine-tuned tuned.safetensors \
        --alphas 0 0.25 0.5 0.75 1 --data shop/ --out mixed.safetensors

With `--data`, prints the zero-shot accuracy at each alpha. `--out` receives the best, or the only.

Source: Wortsman et al. 2022, section 3: (1 - alpha) x zero-shot + alpha x fine-tuned, weight by
weight; they recommend alpha = 0.5 where no data of the target can be spared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clip_rt.classification.probe import Probe
from clip_rt.errors import CheckpointError, InputError
from clip_rt.inputs.decoding import Limits
from clip_rt.inputs.prompts import DEFAULT_TEMPLATE
from clip_rt.specs import Activation
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.checkpoint import save_checkpoint
from training.dual_encoder import DualEncoder
from training.encoders.find import is_external
from training.evaluation.class_names import read_name_table, read_templates
from training.evaluation.embed import class_embeddings, logit_scale, open_model
from training.evaluation.labelled import check_exist
from training.evaluation.metrics import Accuracy
from training.evaluation.source import embed_data
from training.evaluation.zero_shot import zero_shot
from training.weights.load import fingerprint


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(Limits):
    """What to mix, how, and where to."""

    zero_shot: str
    """Weights before fine-tuning: alpha = 0. openai stands for those that a model of another
    library brings along."""
    fine_tuned: Path
    """Weights after it: alpha = 1."""
    alphas: tuple[float, ...] = (0.5,)
    """Shares of the fine-tuned weights."""
    data: tuple[Path, ...] = ()
    """Class folders or shards to measure each mixture on."""
    class_names: Path | None = None
    """What the classes are called; see training.evaluate."""
    templates: str | None = None
    """Prompts: a named set, or a file with one a line; without it, "a photo of a {}."."""
    out: Path | None = None
    """Where the mixture goes; ends in .safetensors. Of several, the most accurate."""
    model: str | None = None
    """Architecture; without it, the one the checkpoints name. Or a model of another library."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one, for models of open_clip whose tokenizer is not
    OpenAI's and cannot be had from the hub."""
    activation: Activation | None = None
    """Of the MLP blocks, as the weights were trained; needed where nothing beside them says it."""
    device: str = "cpu"
    """Where torch computes: cpu, cuda, cuda:1."""
    allow_outside: bool = False
    """Let paths in tables and links in folders of `data` lead out of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise InputError(f"alphas are {self.alphas}; at least one within 0 and 1 is needed.")
        if len(self.alphas) > 1 and not self.data:
            raise InputError("several alphas need --data to choose among them.")


def interpolate(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Mix two state dicts tensor by tensor; counters are taken from the second.

    Args:
        first: All of it at alpha = 0.
        second: All of it at alpha = 1.
        alpha: Share of the second.

    Raises:
        CheckpointError: names or shapes differ.
    """
    if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in second.items()}:
        odd = sorted(
            name
            for name in first.keys() | second.keys()
            if name not in first or name not in second or first[name].shape != second[name].shape
        )
        raise CheckpointError(
            f"the two sets of weights differ in {len(odd)} names or shapes, the first is "
            f"{odd[0]!r}. Only weights of one architecture can be mixed."
        )
    return {
        name: torch.lerp(first[name], tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }


def interpolate_probes(first: Probe, second: Probe, alpha: float) -> Probe:
    """Mix two classifiers of the same labels on embeddings of the same weights.

    Raises:
        InputError: labels, sizes or fingerprints differ.
    """
    same = first.labels == second.labels and first.weight.shape == second.weight.shape
    if not same or first.fingerprint != second.fingerprint:
        raise InputError("two probes can be mixed only with equal labels, sizes and fingerprints.")
    return Probe(
        weight=(1 - alpha) * first.weight + alpha * second.weight,
        bias=(1 - alpha) * first.bias + alpha * second.bias,
        labels=first.labels,
        fingerprint=first.fingerprint,
        method=f"{1 - alpha:g} x ({first.method}) + {alpha:g} x ({second.method})",
    )


def zero_shot_probe(
    model: DualEncoder, labels: Sequence[str], *, templates: str | Sequence[str] | None = None
) -> Probe:
    """Write the zero-shot classifier of some labels as a probe: scaled class embeddings, no bias.

    Raises:
        TemplateError, TextError: see `clip_rt.Client.class_embeddings`.
    """
    weight = logit_scale(model) * class_embeddings(model, labels, templates=templates)
    return Probe(
        weight=weight,
        bias=weight[:, 0] * 0,
        labels=tuple(labels),
        fingerprint=fingerprint(model.weights()),
        method="zero-shot",
    )


def run(config: InterpolateConfig) -> dict[float, Accuracy]:
    """Do what `config` says; return the accuracy at each alpha, where there are data.

    Raises:
        InputError, CheckpointError: something it names cannot be used.
    """
    table = read_name_table(config.class_names) if config.class_names else None
    frames = read_templates(config.templates) if config.templates else [DEFAULT_TEMPLATE]
    check_exist(*config.data)
    tokenizer, activation = config.tokenizer, config.activation
    model = open_model(
        config.zero_shot, model=config.model, activation=activation, tokenizer=tokenizer
    )
    name = config.model or model.facts.name
    if not is_external(name):
        activation = cast("Activation", model.facts.activation)
    first = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    second = open_model(
        config.fine_tuned, model=name, activation=activation, tokenizer=tokenizer
    ).state_dict()
    model.to(torch.device(config.device))
    found: dict[float, Accuracy] = {}
    for alpha in config.alphas if config.data else ():
        model.load_state_dict(interpolate(first, second, alpha))
        embedded = embed_data(model, config.data, allow_outside=config.allow_outside, limits=config)
        _, results = zero_shot(model, embedded, table=table, templates=frames)
        found[alpha] = list(results.values())[-1]
    if config.out:
        best = max(found, key=lambda alpha: found[alpha].top1, default=config.alphas[0])
        facts = {"zero_shot": str(config.zero_shot), "fine_tuned": str(config.fine_tuned)}
        save_checkpoint(
            config.out,
            model.to_file(interpolate(first, second, best)),
            model.facts,
            step=0,
            config={**facts, "alpha": best},
        )
    return found


def main(config: InterpolateConfig) -> None:
    """Mix, measure, save, and print a table."""
    found = run(config)
    table = Table("alpha", "top-1", "top-5", "mean per class")
    for alpha, row in found.items():
        figures = (row.top1, row.top5, row.mean_per_class)
        table.add_row(f"{alpha:g}", *(f"{100 * figure:.2f} %" for figure in figures))
    if found:
        Console().print(table)


if __name__ == "__main__":
    with command():
        main(tyro.cli(InterpolateConfig, prog=program("training.interpolate"), description=__doc__))
