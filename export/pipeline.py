"""The pipeline of an export: weights, FP32 torch, precision in the graph, ONNX, gate, repository.

Each stage takes what the one before made. What is made is kept by content (`export.store`); what is
measured is measured every time.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

import clip_rt
from clip_rt.errors import InputError, ParityError
from clip_rt.specs import MODELS, ModelSpec, find_spec, slug
from clip_rt.wire.manifest import Manifest
from export import fp8, half, int8, onnx_writer, parity_report, probes, storage
from export.canary import make_canary
from export.config import PRECISION_IN_WORDS, ExportConfig
from export.console import (
    console,
    mib,
    print_choices,
    print_next,
    print_parity,
    stage,
    summarise_parity,
)
from export.graphs import Graph, make_graphs
from export.islands import Proposal, print_proposal, propose_islands
from export.models import list_versions, served_version
from export.parity_report import ParityReport, Precision, tower_precision
from export.precision import bake_fp16, match_islands
from export.repository import tell_published
from export.samples import Samples, calibration_batches, load_samples
from export.store import Artefact, Store, sha256_of, source_hash
from export.version_folder import REPORT
from training.dual_encoder import DualEncoder
from training.encoders.encoder import ExternalEncoder
from training.encoders.find import RANDOM_WEIGHTS, is_external
from training.evaluation.class_names import read_name_table
from training.evaluation.embed import open_external
from training.model import CLIP
from training.weights.load import fingerprint, load_clip

ISLAND_IMAGES = 8
"""Of each of the user's samples; every layer's drift is measured on all of them."""


@dataclass(frozen=True)
class Towers:
    """The two files of an export; what belongs to one lies beside it."""

    image: Path
    text: Path


def load_weights(config: ExportConfig) -> DualEncoder:
    """Load the model, float32, in eval mode.

    Raises:
        UnknownModelError, CheckpointError: see `training.weights.load.load_clip` and
            `training.encoders.find.load_encoder`.
    """
    return _load_external(config) if is_external(config.model) else load_own(config)


def load_own(config: ExportConfig) -> CLIP:
    """Load a model of one of our own architectures; as `load_weights`.

    Raises:
        InputError: the model is another library's.
    """
    if is_external(config.model):
        raise InputError(
            f"{config.model} is another library's model, and this works on clip_rt's own "
            f"architectures only: {', '.join(MODELS)}. python -m export.onnx exports the others."
        )
    if config.tokenizer is not None:
        raise InputError(f"{config.model} has OpenAI's tokenizer; leave --tokenizer out.")
    spec = find_spec(config.model)
    with stage("load the weights") as outcome:
        if config.weights == RANDOM_WEIGHTS:
            clip = random_clip(replace(spec, activation=config.activation or spec.activation))
        else:
            clip = load_clip(spec, config.weights, activation=config.activation)
        num_parameters = sum(parameter.numel() for parameter in clip.parameters())
        outcome.append(f"{clip.spec.name}, {clip.spec.activation}, {num_parameters / 1e6:.1f} M")
    return clip


def _load_external(config: ExportConfig) -> ExternalEncoder:
    with stage("load the weights") as outcome:
        encoder = open_external(
            config.model,
            config.weights,
            activation=config.activation,
            tokenizer=config.tokenizer,
        )
        facts = encoder.facts
        num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
        outcome.append(f"{facts.name}, {num_parameters / 1e6:.1f} M")
        outcome.append(
            f"texts of any length up to {facts.context_length} tokens"
            if facts.is_any_length_exact
            else f"texts are padded to {facts.context_length} tokens: shorter ones differ"
        )
    return encoder


def random_clip(spec: ModelSpec, *, seed: int = 0) -> CLIP:
    """Build a model nobody trained: it costs what a real one costs and knows nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(spec).requires_grad_(False).eval()


def read_samples(
    paths: Sequence[Path], config: ExportConfig, encoder: DualEncoder
) -> tuple[Samples, ...]:
    """Read the user's own images and texts.

    Raises:
        InputError: they cannot be read; says which.
    """
    if not paths:
        return ()
    table = read_name_table(config.class_names) if config.class_names else None
    with stage("read samples") as outcome:
        samples = tuple(
            load_samples(
                path,
                encoder.facts,
                tokenizer=encoder.text_tokenizer,
                num_images=config.num_images,
                table=table,
                allow_outside=config.allow_outside,
                limits=config,
            )
            for path in paths
        )
        num_images = sum(len(each.pixels_NSSC) for each in samples)
        num_texts = sum(len(each.token_ids) for each in samples)
        outcome.append(f"{num_images} images, {num_texts} texts")
    return samples


def choose_islands(
    clip: DualEncoder, config: ExportConfig, samples: Sequence[Samples] = ()
) -> tuple[str, ...]:
    """Return the layers that stay FP32: those named, and those found where that is asked for.

    Raises:
        InputError: a pattern matches no layer.
    """
    towers = make_graphs(clip)
    names = [name for tower in towers for name in tower.layers()]
    islands = match_islands(names, config.fp32_island)
    if config.find_islands:
        limit = parity_report.TOLERANCES["fp16"].min_cosine
        images = [probes.images(clip.facts.side_px)]
        images += [each.pixels_NSSC[:ISLAND_IMAGES] for each in samples]
        pixels = torch.from_numpy(np.concatenate(images))
        tokens = torch.from_numpy(probes.tokens_of(clip)[0])
        with stage("find FP32 islands", spinner=False) as outcome:
            found: list[Proposal] = [
                propose_islands(towers[0], pixels, min_cosine=limit),
                propose_islands(towers[1], tokens, min_cosine=limit),
            ]
            islands |= {name for proposal in found for name in proposal.islands}
            outcome.append(f"{len(islands)} of {len(names)} layers")
        for proposal in found:
            print_proposal(proposal, console)
        if islands:
            arguments = " ".join(f"'{name}'" for name in names if name in islands)
            console.print(f"the same without measuring: --fp32-island {arguments}", soft_wrap=True)
    return tuple(name for name in names if name in islands)


def make_onnx(
    clip: DualEncoder,
    store: Store,
    *,
    precision: Precision,
    weights_fingerprint: str,
    islands: Sequence[str] = (),
) -> Towers:
    """Write both towers as ONNX, or find them as they were written before.

    Those that are quantised afterwards are written in FP32: of int8 both, of fp8 the image tower.

    Raises:
        CheckpointError: a weight is beyond the range of FP16.
    """
    made: list[Artefact] = []
    for graph in make_graphs(clip):
        tower, names = graph.tower, set(graph.layers())
        written = tower_precision(precision, tower)
        if written in ("int8", "fp8"):
            written = "fp32"

        def write(
            path: Path,
            graph: Graph = graph,
            names: set[str] = names,
            written: Precision = written,
        ) -> None:
            # Of another library's graph there are no layers to choose a precision for.
            is_whole = written == "fp16" and isinstance(clip, ExternalEncoder)
            if written == "fp16" and not is_whole:
                graph = bake_fp16(graph, [name for name in islands if name in names])
            onnx_writer.write_onnx(
                graph,
                clip.facts,
                path,
                fp16_weights=written == "fp16_weights",
                fp16=is_whole,
            )

        key = onnx_writer.describe_writing(
            clip,
            tower,
            weights_fingerprint=weights_fingerprint,
            precision=written,
            islands=sorted(set(islands) & names),
        )
        with stage(f"export the {tower} tower") as outcome:
            artefact = store.make("model.onnx", key, write)
            made.append(artefact)
            outcome.append(f"ONNX, {PRECISION_IN_WORDS[written]}, {mib(artefact.path)}")
            if artefact.reused:
                outcome.append("unchanged, reused")
    return Towers(made[0].path, made[1].path)


def make_int8(
    towers: Towers, calibration: Sequence[Samples], encoder: DualEncoder, store: Store
) -> Towers:
    """Quantise both FP32 towers, or find them as they were quantised before.

    Args:
        towers: FP32.
        calibration: Images and texts like those to come; without any, the gate's own probes, which
            will do for weights that know nothing.
        encoder: What they were made from.
        store: Where they are kept.

    Raises:
        InputError: there are no texts to calibrate on.
        ExportError: see `int8.write_int8`.
    """
    images, texts = _calibrate_on(calibration, encoder)
    if not texts:
        names = ", ".join(each.name for each in calibration)
        raise InputError(
            f"--calibration {names} has images and no texts, and INT8 is calibrated on both: "
            "pass a folder with one of images for each class, or a table with captions."
        )
    made = []
    for tower, file, batches in (("image", towers.image, images), ("text", towers.text, texts)):
        key = _calibration_key(file, calibration) | {
            "tower": tower,
            "code": source_hash(int8),
            **int8.library_versions(),
        }

        def write(path: Path, file: Path = file, batches: list[Any] = batches) -> None:
            int8.write_int8(file, batches, path)

        with stage(f"quantise the {tower} tower") as outcome:
            artefact = store.make("model.xml", key, write)
            made.append(artefact.path)
            outcome.append(f"OpenVINO, INT8, {mib(artefact.path.with_suffix('.bin'))}")
            outcome.append(f"calibrated on {min(len(batches), int8.MAX_ROWS)} {tower}s")
            if artefact.reused:
                outcome.append("unchanged, reused")
    return Towers(*made)


def make_fp8(
    towers: Towers,
    calibration: Sequence[Samples],
    encoder: DualEncoder,
    store: Store,
    *,
    has_fp8_attention: bool = True,
) -> Towers:
    """Quantise the FP32 image tower, or find it as it was quantised before.

    Args:
        towers: Of `make_onnx` for fp8.
        calibration: Images like those to come; without any, the gate's own probes, as for INT8.
        encoder: What they were made from.
        store: Where it is kept.
        has_fp8_attention: See `fp8.write_fp8`.

    Raises:
        InputError, ExportError: see `fp8.write_fp8`.
    """
    images, _ = _calibrate_on(calibration, encoder)
    key = _calibration_key(towers.image, calibration) | {
        "code": source_hash(fp8, half, onnx_writer),
        "attention": has_fp8_attention,
        "onnx_version": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        **fp8.library_versions(),
    }
    with stage("quantise the image tower") as outcome:
        artefact = store.make(
            "model.onnx",
            key,
            lambda path: fp8.write_fp8(
                towers.image, images, path, has_fp8_attention=has_fp8_attention
            ),
        )
        outcome.append(f"ONNX, {PRECISION_IN_WORDS['fp8']}, {mib(artefact.path)}")
        outcome.append(f"calibrated on {min(len(images), int8.MAX_ROWS)} images")
        if artefact.reused:
            outcome.append("unchanged, reused")
    return replace(towers, image=artefact.path)


def _calibrate_on(
    calibration: Sequence[Samples], encoder: DualEncoder
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Return images, uint8 (1, S, S, 3), and texts, int32 (1, L); probes where nothing is given."""
    facts = encoder.facts
    images: list[NDArray[Any]]
    texts: list[NDArray[Any]]
    if calibration:
        images, texts = calibration_batches(
            calibration,
            length_tokens=None if facts.is_any_length_exact else facts.context_length,
            pad_id=facts.tokenization.pad_id,
        )
    else:
        images = [row[None] for row in probes.images(facts.side_px)]
        texts = [row[None] for row in probes.tokens_of(encoder)[0]]
    return images, texts


def _calibration_key(file: Path, calibration: Sequence[Samples]) -> dict[str, object]:
    return {
        "onnx": [sha256_of(each) for each in (file, *storage.external_files(file))],
        "calibration": [sample.fingerprint() for sample in calibration],
        "probes": "" if calibration else source_hash(probes),
    }


def make_manifest(
    clip: DualEncoder,
    name: str,
    *,
    precision: str,
    weights_fingerprint: str,
    text_buckets: tuple[int, ...] = (),
    matryoshka_dimensions: tuple[int, ...] = (),
    libraries: dict[str, str] | None = None,
) -> Manifest:
    """Write down what a client must know about `clip` served as `name`."""
    facts = clip.facts
    if not facts.is_any_length_exact:
        text_buckets = (facts.context_length,)
    return Manifest(
        model=name,
        architecture=facts.name,
        fingerprint=weights_fingerprint,
        embedding_dim=facts.embedding_dim,
        side_px=facts.side_px,
        context_length=facts.context_length,
        text_buckets=text_buckets,
        logit_scale=float(clip.logit_scale.exp()),
        logit_bias=0.0 if clip.logit_bias is None else float(clip.logit_bias),
        activation=facts.activation,
        mean=facts.mean,
        std=facts.std,
        resizing=facts.resizing,
        tokenization=facts.tokenization,
        score=facts.score,
        matryoshka_dimensions=matryoshka_dimensions,
        precision=precision,
        canary=make_canary(clip, precision),
        libraries={
            "clip_rt": clip_rt.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            **(clip.versions if isinstance(clip, ExternalEncoder) else {}),
            **(libraries or {}),
        },
    )


def check_dimensions(config: ExportConfig, encoder: DualEncoder) -> tuple[int, ...]:
    """Return the lengths that embeddings may be cut to, ascending.

    Raises:
        InputError: one is no part of an embedding.
    """
    asked, whole = config.matryoshka_dimensions, encoder.facts.embedding_dim
    if not all(0 < each < whole for each in asked):
        raise InputError(
            f"--matryoshka-dimensions are {' '.join(map(str, asked))}; embeddings of "
            f"{encoder.facts.name} have {whole} numbers, and each must be from 1 to {whole - 1}."
        )
    return tuple(sorted(set(asked)))


def fingerprint_of(clip: DualEncoder) -> str:
    """Return the sha256 over the weights that names this model everywhere."""
    return fingerprint(clip.weights())


def run_gate(
    title: str, check: Callable[[], ParityReport], config: ExportConfig, store: Store
) -> ParityReport:
    """Run the parity gate as a stage, and say in a line what it found.

    Args:
        title: Of the stage.
        check: Measures.
        config: Of the export.
        store: Keeps the report of a model that failed; of one that passes it is published.

    Raises:
        ParityError: the model drifts; the cases that do are printed.
    """
    try:
        with stage(title) as outcome:
            report = check()
            outcome.append(summarise_parity(report.to_json()))
    except ParityError as error:
        if error.report:
            name = f"failed-{slug(config.served_name)}.json"
            file = store.keep(name, json.dumps(error.report, indent=2) + "\n")
            print_parity(error.report, only_failed=file is not None and not config.verbose)
            print_choices(error.report)
            if file is not None:
                console.print(f"every case: {file}", markup=False, soft_wrap=True)
        raise
    if config.verbose:
        print_parity(report.to_json())
    print_choices(report.to_json())
    return report


def print_what_next(config: ExportConfig, folders: Sequence[Path]) -> None:
    """Say where the measurements of a published model are, and how it is asked."""
    repository, name = str(config.repository), config.served_name
    tell_published(config.repository, name)
    version = served_version(folders[0])
    console.print(f"every case: {folders[0] / str(version) / REPORT}", markup=False, soft_wrap=True)
    where = shlex.quote(repository)
    if config.is_for_embedded_server:
        program = f"import clip_rt; client = clip_rt.Client(repository={repository!r}, "
        program += f"model={name!r}); print(client.encode_texts(['a red shoe']).shape)"
        # The shell takes nothing in double quotes for its own but these.
        quoted = f'"{program}"' if not set(program) & set('"$`\\!') else shlex.quote(program)
        print_next("ask it, with a server of its own", f"python -c {quoted}")
        print_next("serve it", f"python -m clip_rt serve --repository {where}")
    if len(list_versions(folders[0])) > 1:
        rest = f"--repository {where} --name {shlex.quote(name)} --rollback"
        print_next("go back to the version before", f"python -m export.repository {rest}")
    print_next("list what is there", f"python -m export.repository --repository {where}")
