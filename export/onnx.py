"""A dual encoder becomes two ONNX files in the model repository, if they pass the parity gate.

    python -m export.onnx --model ViT-B/32
    python -m export.onnx --model ViT-B/32 --weights clip.safetensors --name shop-v3
    python -m export.onnx --model ViT-L/14 --precision fp16 --find-islands
    python -m export.onnx --model ViT-B/32 --precision int8 --calibration photos/ --samples val/
    python -m export.onnx --model ViT-L/14 --text-output hidden
    python -m export.onnx --help

A second run makes only what has changed. Below the gate's limits nothing is published and what was
served stays served. INT8, for processors, is an OpenVINO model made from the FP32 ONNX file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from clip_rt import processor
from clip_rt.errors import InputError
from clip_rt.specs import Tower, find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import hidden, int8, parity, parity_report, speed
from export.config import PRECISION_IN_WORDS, ExportConfig
from export.console import print_plan, stage
from export.model_folders import check_name, check_writable
from export.pipeline import (
    check_dimensions,
    choose_islands,
    fingerprint_of,
    load_weights,
    make_int8,
    make_manifest,
    make_onnx,
    print_what_next,
    read_samples,
    run_gate,
)
from export.repository import publish
from export.source_parity import compare_with_source
from export.store import Store
from export.trial_load import check_survive
from export.triton_config import Device, Runtime, Serving
from training.encoders.encoder import ExternalEncoder
from training.encoders.find import RANDOM_WEIGHTS, is_external
from training.evaluation.labelled import check_exist


@dataclass(frozen=True, kw_only=True)
class OnnxConfig(ExportConfig):
    """What to write, and what runs it."""

    precision: Literal["fp32", "fp16_weights", "fp16", "int8"] = "fp32"
    """Of the graph. fp16_weights halves the file and computes in FP32; int8 is the fastest on a
    processor with AVX-512, VNNI or AMX; fp16 is for GPUs: on a processor it is computed in FP32
    with roundings between."""
    backend: Literal["python", "onnxruntime"] = "python"
    """Triton backend that runs it; NVIDIA's container has onnxruntime too."""
    device: Device = "cpu"
    """Where Triton places it."""
    runtime: Runtime = "auto"
    """What runs it in the python backend on cpu; auto is what the server measures to be the faster.
    int8 is OpenVINO's."""
    text_output: Literal["embeddings", "hidden"] = "embeddings"
    """hidden serves the hidden states of texts too, for pipelines of diffusion models, in a Triton
    model of their own."""

    @property
    def is_for_embedded_server(self) -> bool:
        """It has Triton's python backend and no other."""
        return (self.backend, self.device) == ("python", "cpu")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_output == "hidden" and self.precision not in ("fp32", "fp16_weights"):
            raise InputError(
                f"precision is {self.precision}; hidden states are exported in fp32 or "
                "fp16_weights. Leave --precision, or --text-output embeddings."
            )
        if self.precision != "fp16" and (self.fp32_island or self.find_islands):
            raise InputError(f"precision is {self.precision}; islands are of fp16 only.")
        if self.precision != "int8":
            if self.calibration:
                raise InputError(f"precision is {self.precision}; only int8 is calibrated.")
        elif (self.backend, self.device) != ("python", "cpu"):
            raise InputError("int8 is run by OpenVINO: leave --backend python and --device cpu.")
        elif self.runtime == "onnxruntime":
            raise InputError("int8 is run by OpenVINO only: leave --runtime auto.")
        elif self.weights != RANDOM_WEIGHTS and not (self.calibration and self.samples):
            raise InputError(
                "int8 needs --calibration, images and texts like those to come, and --samples to "
                "measure what it costs; calibrated on other pictures it answers nonsense."
            )


def export(config: OnnxConfig) -> parity_report.ParityReport | None:
    """Do what `config` says.

    Returns:
        The report of the gate; None of a dry run.

    Raises:
        InputError, CheckpointError: something it names cannot be used.
        ParityError: the graphs drift from the weights; the repository is as it was.
        ExportError: a runtime crashes of another library's graph.
    """
    if not is_external(config.model):
        find_spec(config.model)
    check_name(config.served_name, config.repository)
    serving = Serving(
        backend=config.backend,
        device=config.device,
        runtime=config.runtime,
        max_batch_size=config.max_batch_size,
    )
    if config.dry_run:
        limit = parity_report.TOLERANCES[config.precision]
        print_plan(
            ("load the weights", f"{config.weights_in_words}, as {config.model}"),
            ("export both towers", f"ONNX, {PRECISION_IN_WORDS[config.precision]}"),
            ("compare with torch", f"cosine at least {limit.min_cosine}, every batch and length"),
            *[("export hidden states of texts", "ONNX, and compare them with torch")]
            * (config.text_output == "hidden"),
            ("publish", f"{config.served_name!r} into {config.repository}, {serving.backend}"),
        )
        return None
    check_writable(config.repository, config.served_name)
    check_exist(*config.samples, *config.calibration, config.class_names)
    clip = load_weights(config)
    if config.text_output == "hidden":
        hidden.check_encoder(clip)
    dimensions = check_dimensions(config, clip)
    samples = read_samples(config.samples, config, clip)
    islands = choose_islands(clip, config, samples) if config.precision == "fp16" else ()
    fingerprint = fingerprint_of(clip)
    store = Store(config.cache)
    made = "fp32" if config.precision == "int8" else config.precision
    towers = make_onnx(
        clip,
        store,
        precision=made,
        weights_fingerprint=fingerprint,
        islands=islands,
    )
    runtimes = parity.installed_runtimes()
    if config.runtime == "onnxruntime":
        runtimes = ("onnxruntime",)
    if isinstance(clip, ExternalEncoder):
        with stage("load both in processes of their own") as outcome:
            files: dict[Tower, Path] = {"image": towers.image, "text": towers.text}
            for tower, path in files.items():
                check_survive(path, tower=tower, precision=made, runtimes=runtimes)
            outcome.append(f"by {' and '.join(parity.IN_WORDS[each] for each in runtimes)}")
    libraries: dict[str, str] = {}
    if config.precision == "int8":
        calibration = read_samples(config.calibration, config, clip)
        fp32, towers = towers, make_int8(towers, calibration, clip, store)
        libraries = int8.library_versions()
        with stage("time INT8 beside FP32") as outcome:
            outcome.append(speed.compare(fp32, towers, clip).in_words(processor.read()))
    report = run_gate(
        "compare with torch",
        lambda: parity.check_files(
            clip,
            image=towers.image,
            text=towers.text,
            precision=config.precision,
            runtimes=runtimes,
            samples=samples,
        ),
        config,
        store,
    )
    source = compare_with_source(
        clip, lambda: parity.load_files(towers.image, towers.text), config.precision
    )
    more: dict[str, object] = {}
    states, width = None, 0
    if config.text_output == "hidden":
        states, width = hidden.make_hidden(
            clip, store, precision=config.precision, weights_fingerprint=fingerprint
        )
        more["hidden"] = hidden.check_hidden(clip, states, precision=config.precision, by=runtimes)
    manifest = make_manifest(
        clip,
        config.served_name,
        precision=config.precision,
        weights_fingerprint=fingerprint,
        matryoshka_dimensions=dimensions,
        libraries=libraries,
    )
    with stage("publish") as outcome:
        folders = publish(
            config.repository,
            manifest,
            image=towers.image,
            text=towers.text,
            serving=serving,
            report=report.to_json() | {"fp32_islands": islands} | source | more,
            keep_versions=config.keep_versions,
            tokenizer_file=clip.tokenizer_file if isinstance(clip, ExternalEncoder) else None,
            hidden=states,
            hidden_width=width,
        )
        outcome.extend(str(folder) for folder in folders)
    print_what_next(config, folders)
    return report


if __name__ == "__main__":
    with command():
        export(tyro.cli(OnnxConfig, prog=program("export.onnx"), description=__doc__))
