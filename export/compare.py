"""Two served versions and images in; what changes, and whether both may fill one index, out.

    python -m export.compare shop:3 shop:4 --samples photos.csv        # kept in one repository
    python -m export.compare shop shop-int8 --samples val/ --report change.json
    python -m export.compare grpc://old:8001/shop shop --repository models --samples val/

A and B are `NAME` or `NAME:VERSION` of --repository, served here one after the other by a Triton
of their own, or `grpc://host:port/NAME` of a running server. Exit status: 0 when old and new
embeddings may share an index, 2 when not, 1 on errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from clip_rt.client import Client
from clip_rt.errors import ContractError, ImageError, InputError
from clip_rt.inputs.decoding import ImageInput, Limits
from clip_rt.specs import slug
from clip_rt.wire.manifest import Manifest
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import probes
from export.console import console, stage
from export.drift import (
    MIN_IMAGES,
    MIN_KEPT_INTERCHANGEABLE,
    MIN_KEPT_MIXABLE,
    Comparison,
    Cosines,
    Flips,
    FloatArray,
    IntArray,
    Verdict,
    judge,
    measure,
)
from export.samples import NO_TEXT, read_choices
from export.served import Reference, find_reference
from training.evaluation.class_names import NameTable, read_name_table
from training.evaluation.labelled import check_exist

_PROBE_SIDE_PX, _NUM_SMOOTH, _NUM_NOISE = 336, 53, 8
_CHUNK = 64
"""Images for each call of the client: a step of the progress bar."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Limits):
    """What to compare, and on what."""

    a: tyro.conf.Positional[str]
    """What the index was made with: NAME, NAME:VERSION, or grpc://host:port/NAME."""
    b: tyro.conf.Positional[str]
    """What is to come."""
    repository: Path = Path("model_repository")
    """Triton model repository that names are looked up in."""
    samples: tuple[Path, ...] = ()
    """Images like those in the index: folders with one of images for each class, tables with the
    columns image and label or caption, or .tar shards."""
    class_names: Path | None = None
    """What the classes of the samples are called, where wnids or numbers say nothing."""
    num_images: int = 1000
    """How many images of each of the samples to measure on."""
    allow_outside: bool = False
    """Let paths in tables and links in folders of the samples lead out of them."""
    report: Path | None = None
    """JSON file to write everything measured to."""


@dataclass(frozen=True)
class Images:
    """Images as they are, and the texts they are told apart by."""

    name: str
    keys: tuple[str, ...]
    images: tuple[ImageInput, ...]
    texts: tuple[str, ...]
    right_N: IntArray


@dataclass(frozen=True)
class Embedded:
    """Vectors of a sample, rows of length 1."""

    image_NE: FloatArray
    text_ME: FloatArray


@dataclass(frozen=True, kw_only=True)
class Report:
    """All there is to say about A and B."""

    references: tuple[Reference, Reference]
    manifests: tuple[Manifest, Manifest]
    comparisons: tuple[Comparison, ...]
    verdict: Verdict

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        served = zip(self.references, self.manifests, strict=True)
        a, b = ({"reference": str(each)} | asdict(manifest) for each, manifest in served)
        return {
            "a": a,
            "b": b,
            "samples": [asdict(each) | {"kept": each.kept()} for each in self.comparisons],
            "verdict": asdict(self.verdict) | {"sentence": self.verdict.sentence()},
            "limits": {
                "mixable": MIN_KEPT_MIXABLE,
                "interchangeable": MIN_KEPT_INTERCHANGEABLE,
            },
        }


def compare(config: CompareConfig) -> Report:
    """Do what `config` says, print it, and write the report where one is asked for.

    Raises:
        InputError: A or B is not there, both are the same, or the samples cannot be used.
        ServerError, ContractError: one of them cannot be served or reached.
    """
    a, b = (find_reference(text, config.repository) for text in (config.a, config.b))
    if _identity(a) == _identity(b):
        raise InputError(f"A and B are both {a}. Name two versions, models or servers.")
    if config.num_images < MIN_IMAGES:
        raise InputError(f"num_images is {config.num_images}; it must be at least {MIN_IMAGES}.")
    if config.report is not None and not config.report.parent.is_dir():
        raise InputError(f"there is no folder {config.report.parent} to write the report into.")
    if config.report is not None and config.report.is_dir():
        raise InputError(f"{config.report} is a folder; --report names a file.")
    check_exist(*config.samples, config.class_names)
    samples, weak = _read(config)
    (manifest_a, embedded_a), (manifest_b, embedded_b) = (
        _embed(each, samples, config) for each in (a, b)
    )
    comparisons = tuple(
        measure(
            sample.name,
            image_a_NE=before.image_NE,
            text_a_ME=before.text_ME,
            image_b_NF=after.image_NE,
            text_b_MF=after.text_ME,
            right_N=sample.right_N,
        )
        for sample, before, after in zip(samples, embedded_a, embedded_b, strict=True)
    )
    report = Report(
        references=(a, b),
        manifests=(manifest_a, manifest_b),
        comparisons=comparisons,
        verdict=judge(manifest_a, manifest_b, comparisons, weak=weak),
    )
    if config.report is not None:
        config.report.write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
    print_report(report)
    return report


def _identity(reference: Reference) -> tuple[object, ...]:
    name = reference.name and slug(reference.name)
    return reference.url, reference.repository, name, reference.version


def _read(config: CompareConfig) -> tuple[list[Images], tuple[str, ...]]:
    """Read the samples, or draw some where there are none; and say why they do not say much."""
    if not config.samples:
        drawn = probes.images(_PROBE_SIDE_PX, num_noise=_NUM_NOISE, num_smooth=_NUM_SMOOTH)
        keys = tuple(f"probe {number}" for number in range(len(drawn)))
        nothing = np.full(len(drawn), NO_TEXT, np.int64)
        sample = Images("probes", keys, tuple(drawn), probes.PROMPTS, nothing)
        return [sample], ("probes are no photographs; pass images like yours with --samples",)
    table = read_name_table(config.class_names) if config.class_names else None
    with stage("read samples") as outcome:
        samples = [_read_sample(path, config, table) for path in config.samples]
        num_texts = sum(len(each.texts) for each in samples)
        outcome.append(f"{sum(len(each.keys) for each in samples)} images, {num_texts} texts")
    return samples, ()


def _read_sample(path: Path, config: CompareConfig, table: NameTable | None) -> Images:
    kept, texts, right_N = read_choices(
        path,
        num_images=config.num_images,
        table=table,
        allow_outside=config.allow_outside,
        limits=config,
    )
    if len(kept) < MIN_IMAGES:
        raise InputError(f"{path} has {len(kept)} images; at least {MIN_IMAGES} are needed.")
    return Images(
        path.name,
        tuple(each.key for each in kept),
        tuple(each.image for each in kept),
        tuple(texts),
        right_N,
    )


def _embed(
    reference: Reference, samples: Sequence[Images], limits: Limits
) -> tuple[Manifest, list[Embedded]]:
    """Embed the samples with what is served under a reference."""
    with reference.connect(limits) as client:
        with stage(f"serve {reference}") as outcome:
            manifest = client.manifest
            outcome.append(f"{manifest.architecture}, {manifest.precision}")
        with stage(f"embed with {reference}", spinner=False) as outcome:
            found = [_embed_sample(client, each) for each in samples]
            outcome.append(f"{sum(len(each.image_NE) for each in found)} images")
        if (now := client.manifest) != manifest:
            raise ContractError(
                f"{reference} was replaced while it was measured. Run the comparison again.",
                expected=manifest,
                found=now,
            )
    return manifest, found


def _embed_sample(client: Client, sample: Images) -> Embedded:
    image_NE = []
    for start in track(
        range(0, len(sample.images), _CHUNK),
        description=escape(sample.name),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        try:
            image_NE.append(client.encode_images(sample.images[start : start + _CHUNK]))
        except ImageError as error:
            key = sample.keys[start + (error.index or 0)]
            raise ImageError(f"{key}: {error}", index=error.index) from error
    return Embedded(np.concatenate(image_NE), client.encode_texts(sample.texts, truncate=True))


def print_report(report: Report) -> None:
    """Print who is compared, what was measured, and the verdict."""
    who = Table("", "A", "B")
    who.add_row("served", *(escape(str(each)) for each in report.references))
    for title, value in (
        ("architecture", lambda each: each.architecture),
        ("precision", lambda each: each.precision),
        ("weights", lambda each: each.fingerprint[:12]),
        ("dimensions", lambda each: str(each.embedding_dim)),
        ("pixels", lambda each: str(each.side_px)),
    ):
        who.add_row(title, *map(value, report.manifests))
    console.print(who)
    table = Table("", *(escape(each.name) for each in report.comparisons))
    rows = [_cells(each) for each in report.comparisons]
    for title in rows[0]:
        table.add_row(title, *(row[title] for row in rows))
    console.print(table)
    verdict = report.verdict
    style = {"interchangeable": "green", "mixable": "yellow", "not mixable": "red"}[verdict.word]
    console.print(verdict.sentence(), style=style, markup=False, soft_wrap=True)
    for reason in verdict.weak:
        console.print(f"weak: {reason}", style="yellow", markup=False, soft_wrap=True)


def _cells(each: Comparison) -> dict[str, str]:
    """Say what was measured on one sample, by the title of its row."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    def cosines(value: Cosines | None) -> str:
        return "" if value is None else f"{value.min:.5f} / {value.p01:.5f} / {value.mean:.5f}"

    def flips(value: Flips | None) -> str:
        if value is None:
            return ""
        if not each.num_labelled:
            return number(value.share)
        return f"{value.share:.4f} ({value.right_to_wrong} lost, {value.wrong_to_right} won)"

    return {
        "images / texts": f"{each.num_images} / {each.num_texts}",
        "image cosine: min / p1 / mean": cosines(each.image_cosine),
        "text cosine: min / p1 / mean": cosines(each.text_cosine),
        "10 nearest kept: each in its space": number(each.own_overlap),
        "  B asks A's index": number(each.query_overlap),
        "  B asks an index of both": number(each.shared_overlap),
        "  by chance": number(each.chance_overlap),
        "top-1: A": number(each.top1_a),
        "  B": number(each.top1_b),
        "  A's images, B's texts": number(each.top1_mixed),
        "flips: A to B": flips(each.flips),
        "  B to A's images, B's texts": flips(each.mixed_flips),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    with command():
        try:
            config = tyro.cli(
                CompareConfig, prog=program("export.compare"), description=__doc__, args=arguments
            )
        except SystemExit as end:
            # Ours is 2 when versions do not mix; a mistyped option is an error.
            raise SystemExit(1 if end.code else 0) from None
        return 2 if compare(config).verdict.word == "not mixable" else 0


if __name__ == "__main__":
    sys.exit(main())
