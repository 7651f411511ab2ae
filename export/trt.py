"""A dual encoder becomes two TensorRT engines in FP16 or FP8, if they pass the parity gate.

    python -m export.trt --model ViT-L/14
    python -m export.trt --model ViT-L/14 --weights clip.safetensors --name shop-v3 --find-islands
    python -m export.trt --model open_clip:EVA02-B-16 --weights hf:owner/name
    python -m export.trt --model ViT-L/14 --precision fp8 --calibration photos/
    python -m export.trt --model ViT-L/14 --join     # on a second kind of GPU, for a mixed fleet
    python -m export.trt --model ViT-L/14 --weights random --runtime rtx     # no GPU needed
    python -m export.trt --help

With TensorRT, on the GPU that will serve, engines are run against FP32 torch and published for
Triton's tensorrt backend. With TensorRT for RTX and no GPU they are built, the ONNX files they are
built from pass the gate in ONNX Runtime, and both go to `engines`; Triton does not load those.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import onnx
import tyro

from clip_rt.errors import InputError
from clip_rt.specs import TOKENIZER_FILE, Tower, find_spec, slug
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import fp8, parity, parity_report
from export.config import PRECISION_IN_WORDS, ExportConfig
from export.console import console, mib, print_plan, stage
from export.engine import (
    BuildOptions,
    Profile,
    Runtime,
    build_engine,
    check_fp8,
    check_targets,
    engine_key,
    gpu_names,
    image_profiles,
    load_runtime,
    text_lengths,
    text_profiles,
)
from export.engine_runner import EngineRunner
from export.model_folders import check_name, check_writable
from export.pipeline import (
    Towers,
    check_dimensions,
    choose_islands,
    fingerprint_of,
    load_weights,
    make_fp8,
    make_manifest,
    make_onnx,
    print_what_next,
    read_samples,
    run_gate,
)
from export.repository import publish
from export.samples import Samples
from export.source_parity import compare_with_source
from export.storage import external_files
from export.store import Store, sha256_of
from export.trial_load import check_survive
from export.triton_config import Serving
from training.dual_encoder import DualEncoder
from training.encoders.encoder import ExternalEncoder
from training.encoders.find import RANDOM_WEIGHTS, is_external
from training.evaluation.labelled import check_exist


@dataclass(frozen=True, kw_only=True)
class TrtConfig(ExportConfig):
    """What to build, and for which runtime."""

    precision: Literal["fp16", "fp8"] = "fp16"
    """fp8 is of the image towers of vision transformers, for GPUs of compute capability 8.9 and
    newer; the text tower is FP16 in both."""
    fp8_attention: bool = True
    """Of fp8: the products of attention too. Where the comparison refuses that, leave them FP16."""
    runtime: Runtime = "tensorrt"
    """tensorrt builds and runs on this machine's GPU; rtx needs no GPU."""
    opt_batch_size: int = 8
    """Batch the kernels are tuned for: what you expect to be asked."""
    optimization_level: int = 3
    """0 to 5: how long TensorRT looks for fast kernels."""
    cuda_graph_batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Batches whose kernels Triton captures once and launches as one."""
    workspace_gib: float = 4.0
    """Most scratch memory a kernel may take."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to compile for, such as 8.9, with rtx; empty is the runtime's default."""
    join: bool = False
    """Take the served version's engines for other GPUs along: for a fleet of mixed GPUs, export on
    one of each kind into the same repository."""
    engines: Path = Path("engines")
    """Where engines of rtx go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "fp16":
            if self.calibration:
                raise InputError("precision is fp16; only fp8 is calibrated.")
            return
        if self.fp32_island or self.find_islands:
            raise InputError("precision is fp8; islands are of fp16 only.")
        if self.weights != RANDOM_WEIGHTS and not self.calibration:
            raise InputError("fp8 needs --calibration, images like those to come.")

    @property
    def options(self) -> BuildOptions:
        """What the builder is told."""
        return BuildOptions(
            runtime=self.runtime,
            opt_batch_size=min(self.opt_batch_size, self.max_batch_size),
            max_batch_size=self.max_batch_size,
            optimization_level=self.optimization_level,
            workspace_gib=self.workspace_gib,
            compute_capabilities=self.compute_capabilities,
        )


def export(config: TrtConfig) -> parity_report.ParityReport | None:
    """Do what `config` says.

    Returns:
        The report of the gate; None of a dry run.

    Raises:
        InputError, CheckpointError: something it names cannot be used.
        ExportError: TensorRT or its GPU is missing, or it refuses the network.
        ParityError: engines or graphs drift from the weights; what was served stays.
    """
    options = config.options
    # What can be missing or in the way is looked for before minutes of work.
    folder = config.engines / slug(config.served_name)
    serving = Serving(
        backend="tensorrt",
        device="gpu",
        max_batch_size=config.max_batch_size,
        cuda_graph_batch_sizes=tuple(
            size for size in config.cuda_graph_batch_sizes if size <= config.max_batch_size
        ),
    )
    if config.runtime == "tensorrt":
        check_name(config.served_name, config.repository)
    else:
        _check_free(folder)
    if not is_external(config.model):
        find_spec(config.model)
    if config.dry_run:
        _print_plan(config)
        return None
    check_exist(*config.samples, *config.calibration, config.class_names)
    if config.runtime == "tensorrt":
        check_writable(config.repository, config.served_name)
    trt = load_runtime(config.runtime)
    check_targets(trt, options)
    libraries = {trt.__name__: trt.__version__}
    if config.precision == "fp8":
        check_fp8(options)
        libraries |= fp8.library_versions()
    clip = load_weights(config)
    dimensions = check_dimensions(config, clip)
    samples = read_samples(config.samples, config, clip)
    islands = choose_islands(clip, config, samples)
    fingerprint = fingerprint_of(clip)
    store = Store(config.cache)
    graphs = make_onnx(
        clip, store, precision=config.precision, weights_fingerprint=fingerprint, islands=islands
    )
    if config.precision == "fp8":
        calibration = read_samples(config.calibration, config, clip)
        graphs = make_fp8(graphs, calibration, clip, store, has_fp8_attention=config.fp8_attention)
    if isinstance(clip, ExternalEncoder):
        files: dict[Tower, Path] = {"image": graphs.image, "text": graphs.text}
        for tower, path in files.items():
            check_survive(
                path,
                tower=tower,
                precision=config.precision,
                runtimes=("onnxruntime",),
                other_way="The graph is compared in it before an engine is built: install another "
                "version of onnxruntime.",
            )
    # Before the engines are built from them: a graph that drifts is not worth the minutes.
    report = _gate_onnx(clip, graphs, samples, config, store)
    source = compare_with_source(
        clip, lambda: parity.load_files(graphs.image, graphs.text), config.precision
    )
    image, text = image_profiles(clip.facts, options), text_profiles(clip.facts, options)
    engines = Towers(
        image=_build("image", graphs.image, image, config, store, trt),
        text=_build("text", graphs.text, text, config, store, trt),
    )
    document: dict[str, object] = {"fp32_islands": islands, "runtime": config.runtime} | source
    if config.runtime == "tensorrt":
        runners = EngineRunner(engines.image, trt), EngineRunner(engines.text, trt)
        report = _gate_engines(clip, runners, config, store, samples=samples)
        document["fused_attentions"] = {
            "image": _count_fused("image", runners[0], graphs.image),
            "text": _count_fused("text", runners[1], graphs.text),
        }
    else:
        document["engine"] = "built, not run: the figures are those of its ONNX files"
    document |= report.to_json()
    manifest = make_manifest(
        clip,
        config.served_name,
        precision=config.precision,
        weights_fingerprint=fingerprint,
        text_buckets=text_lengths(clip.facts),
        matryoshka_dimensions=dimensions,
        libraries=libraries,
    )
    tokenizer = clip.tokenizer_file if isinstance(clip, ExternalEncoder) else None
    with stage("publish") as outcome:
        if config.runtime == "tensorrt":
            folders = publish(
                config.repository,
                manifest,
                image=engines.image,
                text=engines.text,
                serving=serving,
                report=document,
                keep_versions=config.keep_versions,
                compute_capability=gpu_names()[0].rpartition(", ")[2],
                join=config.join,
                tokenizer_file=tokenizer,
            )
            outcome.extend(map(str, folders))
        else:
            document["manifest"] = manifest.to_parameters()
            _place(folder, engines, document, tokenizer)
            outcome.append(f"{folder}, for TensorRT for RTX {trt.__version__}; not for Triton")
    if config.runtime == "tensorrt":
        print_what_next(config, folders)
    else:
        console.print(
            "the engines were built, not run; what was measured is their ONNX files: "
            f"{folder / 'export.json'}",
            markup=False,
            soft_wrap=True,
        )
    return report


def _print_plan(config: TrtConfig) -> None:
    on_gpu, options = config.runtime == "tensorrt", config.options
    limit = f"cosine at least {parity_report.TOLERANCES[config.precision].min_cosine}"
    islands = "by measuring" if config.find_islands else ", ".join(config.fp32_island) or "none"
    where = config.repository if on_gpu else config.engines
    quantise = []
    if config.precision == "fp8":
        ranges = ", ".join(map(str, config.calibration)) or "the images of the comparison"
        quantise = [("quantise the image tower", f"FP8, calibrated on {ranges}")]
    batches = f"batches 1 to {options.max_batch_size}, tuned for {options.opt_batch_size}"
    lengths = "the model's length"
    if not is_external(config.model):
        lengths = f"{', '.join(map(str, text_lengths(find_spec(config.model).facts)))} tokens"
    print_plan(
        ("load the weights", f"{config.weights_in_words}, as {config.model}"),
        ("find FP32 islands", islands),
        ("export both towers", f"ONNX, {PRECISION_IN_WORDS[config.precision]}"),
        *quantise,
        ("compare ONNX with torch", f"in ONNX Runtime, {limit}"),
        ("build both engines", f"{config.runtime}, {batches}, texts of {lengths}"),
        ("compare engines with torch", f"on the GPU, {limit}" if on_gpu else "not without a GPU"),
        ("publish", f"{config.served_name!r} into {where}"),
    )


def _build(
    tower: Tower,
    graph: Path,
    profiles: Sequence[Profile],
    config: TrtConfig,
    store: Store,
    trt: ModuleType,
) -> Path:
    key = engine_key(
        [sha256_of(each) for each in (graph, *external_files(graph))], profiles, config.options, trt
    )

    def write(path: Path) -> None:
        build_engine(
            graph,
            path,
            profiles=profiles,
            options=config.options,
            trt=trt,
            # Beside what is made; in a temporary folder it ends with it.
            timing_cache=path.parents[2] / f"timing-{trt.__version__}.cache",
        )

    with stage(f"build the {tower} engine", spinner=False) as outcome:
        artefact = store.make("model.plan", key, write)
        outcome.append(f"{trt.__name__} {trt.__version__}, {mib(artefact.path)}")
        if artefact.reused:
            outcome.append("unchanged, reused")
    return artefact.path


def _gate_onnx(
    clip: DualEncoder, graphs: Towers, samples: Sequence[Samples], config: TrtConfig, store: Store
) -> parity_report.ParityReport:
    return run_gate(
        "compare ONNX with torch",
        lambda: parity.check_files(
            clip, image=graphs.image, text=graphs.text, precision=config.precision, samples=samples
        ),
        config,
        store,
    )


def _gate_engines(
    clip: DualEncoder,
    runners: tuple[EngineRunner, EngineRunner],
    config: TrtConfig,
    store: Store,
    *,
    samples: Sequence[Samples],
) -> parity_report.ParityReport:
    """Run the engines on the GPU against torch."""
    return run_gate(
        "compare engines with torch",
        lambda: parity.check(
            clip,
            encode_images=runners[0],
            encode_texts=runners[1],
            precision=config.precision,
            text_lengths=text_lengths(clip.facts),
            max_batch_size=config.max_batch_size,
            samples=samples,
        ),
        config,
        store,
    )


def _count_fused(tower: Tower, runner: EngineRunner, file: Path) -> int:
    """Count the attentions that TensorRT has made one kernel of, and warn where some are not."""
    # There is one softmax in each.
    nodes = onnx.load(file, load_external_data=False).graph.node
    expected = sum(node.op_type == "Softmax" for node in nodes)
    fused = runner.inspect().num_fused_attentions
    # The last one attends from one token, which is no attention to TensorRT.
    if fused < expected - 1:
        console.print(
            f"[yellow]warning[/] {fused} of {expected} attentions of the {tower} tower are fused; "
            "the others are slower than they could be"
        )
    return fused


def _check_free(folder: Path) -> None:
    place = next(each for each in folder.absolute().parents if each.exists())
    if not place.is_dir():
        raise InputError(f"{place} is no folder; name another --engines.")
    if folder.exists() and not (folder / "export.json").is_file():
        raise InputError(f"{folder} holds no engines of this command; name another --engines.")


def _place(
    folder: Path,
    engines: Towers,
    document: dict[str, object],
    tokenizer_file: bytes | None = None,
) -> None:
    """Put both engines, their report and tokenizer into a folder, replacing it as a whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".clip_rt-", dir=folder.parent) as staging:
        made = Path(staging) / "made"
        made.mkdir()
        shutil.copyfile(engines.image, made / "image.engine")
        shutil.copyfile(engines.text, made / "text.engine")
        (made / "export.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        if tokenizer_file is not None:
            (made / TOKENIZER_FILE).write_bytes(tokenizer_file)
        with ExitStack() as undo:
            if folder.exists():
                replaced = folder.rename(Path(staging) / "replaced")
                undo.callback(replaced.rename, folder)
            made.rename(folder)
            undo.pop_all()


if __name__ == "__main__":
    with command():
        export(tyro.cli(TrtConfig, prog=program("export.trt"), description=__doc__))
