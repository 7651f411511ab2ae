"""A configuration in, a run before its first update out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from clip_rt.embedded.bundled import find_sample
from clip_rt.errors import InputError
from clip_rt.inputs.decoding import Limits
from clip_rt.specs import find_spec
from training import parallel
from training.checkpoint import remove_partials
from training.config import TrainConfig
from training.data.batches import BatchStream
from training.data.drawing_batches import DrawingBatches, load_drawings
from training.data.pair_batches import PairBatches
from training.data.photos import PhotoAugmentation
from training.data.sources import open_sources
from training.dual_encoder import DualEncoder
from training.ema import WeightAverage
from training.encoders.encoder import ExternalEncoder
from training.encoders.find import has_own_tokenizer, is_external
from training.evaluation.embed import open_external
from training.model import CLIP
from training.optimizer import adamw, lock_tower
from training.state import Run
from training.weights.load import load_clip

SIGLIP_LOGIT_SCALE, SIGLIP_LOGIT_BIAS = 10.0, -10.0
"""Where the sigmoid loss begins (Zhai et al. 2023, section 3.3)."""


def claim_folder(config: TrainConfig) -> None:
    """Make `out_dir`, or make sure that the run in it is to go on."""
    if config.out_dir.exists() and any(config.out_dir.iterdir()) and not config.resume:
        raise InputError(
            f"{config.out_dir} is not empty. Go on with the run in it by --resume, or name another "
            "--out-dir."
        )
    config.out_dir.mkdir(parents=True, exist_ok=True)
    remove_partials(config.out_dir)


def build(config: TrainConfig, world: parallel.World) -> Run:
    """Make model, optimiser and data as they are before the first update."""
    seed_everything(config.seed)
    clip = build_external(config) if is_external(config.model) else build_clip(config)
    data = open_data(config, world, clip)
    clip = clip.to(world.device)
    if config.parallel == "ddp" or world.size == 1:  # FSDP takes contiguous weights only.
        clip = clip.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile_backend:
        clip.compile(backend=config.compile_backend)
    wrapped = parallel.wrap(clip, config.parallel)
    return Run(
        config=config,
        world=world,
        clip=clip,
        wrapped=wrapped,
        optimizer=adamw(
            clip,
            peak_lr=config.peak_lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        ),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16"),
        data=data,
        seen_V=torch.zeros(clip.embed_tokens().num_embeddings, dtype=torch.bool),
        is_from_nothing=config.init_from is None and isinstance(clip, CLIP),
        teacher=None if config.teacher is None else load_teacher(config, clip).to(world.device),
        average=WeightAverage(clip, decay=config.ema_decay) if config.ema_decay else None,
    )


def build_clip(config: TrainConfig) -> CLIP:
    """Make the model with random weights, or with those of `init_from`."""
    if config.tokenizer is not None:
        raise InputError(f"{config.model} has OpenAI's tokenizer; leave --tokenizer out.")
    spec = find_spec(config.model)
    loaded = None
    if config.init_from is not None:
        loaded = load_clip(spec, config.init_from, activation=config.activation)
        spec = loaded.spec  # The weights know better which activation they were trained with.
    elif config.activation is not None:
        spec = replace(spec, activation=config.activation)
    has_bias = loaded is not None and loaded.logit_bias is not None
    is_sigmoid = config.objective == "sigmoid" or (config.objective is None and has_bias)
    clip = CLIP(
        spec,
        patch_dropout=config.patch_dropout,
        logit_bias=SIGLIP_LOGIT_BIAS if is_sigmoid else None,
    )
    if is_sigmoid:
        nn.init.constant_(clip.logit_scale, math.log(SIGLIP_LOGIT_SCALE))
    if loaded is not None:
        # Weights of the contrastive loss have no bias; the sigmoid loss then begins with its own.
        bias_is_new = is_sigmoid and not has_bias
        clip.load_state_dict(loaded.state_dict(), strict=not bias_is_new)
    clip.set_grad_checkpointing(config.grad_checkpointing)
    lock_tower(clip, config.lock)
    return clip


def build_external(config: TrainConfig) -> ExternalEncoder:
    """Load a model of another library, with its own weights or those of `init_from`.

    Raises:
        InputError: an option is for our own architectures, or the loss is not the model's.
    """
    for is_given, option, way_out in (
        (config.patch_dropout, "--patch-dropout", "--batch-size with --chunk-size saves memory"),
        (config.grad_checkpointing, "--grad-checkpointing", "--chunk-size saves memory"),
        (config.parallel == "fsdp", "--parallel fsdp", "--parallel ddp shares the work"),
        (not config.data, "learning from drawings", "name --data"),
    ):
        if is_given:
            raise InputError(
                f"{config.model} is another library's model, and {option} is for clip_rt's own "
                f"architectures only; {way_out}."
            )
    encoder = open_external(
        config.model, config.init_from, activation=config.activation, tokenizer=config.tokenizer
    )
    objective = "infonce" if encoder.logit_bias is None else "sigmoid"
    if config.objective not in (None, objective):
        raise InputError(
            f"{config.model} was trained by the objective {objective}, and its library has no "
            f"place for what {config.objective} learns. Leave --objective out."
        )
    if not encoder.has_scale:
        raise InputError(
            f"{config.model} has no temperature to learn by a contrastive loss. python -m "
            "training.probe, training.coop and training.few_shot take it as it is."
        )
    lock_tower(encoder, config.lock)
    encoder.lock_unused()
    return encoder


def load_teacher(config: TrainConfig, student: DualEncoder) -> DualEncoder:
    """Load the model to distil from.

    Raises:
        InputError: it reads images or texts otherwise than the student, and there is one batch.
    """
    assert config.teacher is not None
    teacher: DualEncoder
    if is_external(config.teacher_model):
        teacher = open_external(
            config.teacher_model,
            config.teacher,
            activation=config.teacher_activation,
            tokenizer=None if has_own_tokenizer(config.teacher_model) else config.tokenizer,
        )
    else:
        teacher = load_clip(
            find_spec(config.teacher_model),
            config.teacher,
            activation=config.teacher_activation,
            option="--teacher-activation",
        )
    mine, theirs = teacher.facts, student.facts
    for name in ("side_px", "mean", "std", "context_length", "tokenization"):
        if getattr(mine, name) != getattr(theirs, name):
            raise InputError(
                f"the teacher {mine.name} and {theirs.name} must read the same images and texts, "
                f"and {name} differs: {getattr(mine, name)} and {getattr(theirs, name)}. Name "
                "another with --teacher-model."
            )
    if theirs.is_any_length_exact and not mine.is_any_length_exact:
        raise InputError(
            f"texts are cut to their length for {theirs.name}, and the teacher {mine.name} reads "
            "them at one length only. Name another with --teacher-model."
        )
    return teacher


def open_data(config: TrainConfig, world: parallel.World, model: DualEncoder) -> BatchStream:
    """Open what the run learns from."""
    facts = model.facts
    if config.data:
        return PairBatches(
            open_sources(
                config.data,
                templates=config.templates,
                allow_commands=config.allow_commands,
                allow_outside=config.allow_outside,
                folder_kind=config.folder_kind,
                max_bytes=config.max_bytes,
            ),
            batch_size=config.batch_size,
            facts=facts,
            tokenizer=model.text_tokenizer,
            seed=config.seed,
            weights=config.data_weights or None,
            augmentation=PhotoAugmentation(
                limits=Limits(max_pixels=config.max_pixels, max_bytes=config.max_bytes),
                scale=config.crop_scale,
                jitter=(*3 * (config.colour_jitter,), config.colour_jitter / 4),
                grey_probability=config.grey_probability,
            ),
            num_workers=config.num_workers,
            device=world.device,
            max_bad_share=config.max_bad_share,
        )
    data_dir = find_sample() if config.drawings.sample else config.drawings.data_dir
    shards = sorted(data_dir.glob("train/*.tar"))
    if not shards:
        raise InputError(
            f"{data_dir}/train holds no .tar shards. Make them with python -m training.drawings, "
            "pass --sample to train on the drawings that come with the code, or name --data."
        )
    drawings = load_drawings(shards, progress=world.is_first)
    if (side_px := drawings.pixels.shape[1]) != facts.side_px:
        raise InputError(
            f"the drawings in {data_dir} are {side_px} px wide, and {config.model} reads "
            f"{facts.side_px} px. --recipe drawings takes a model that fits them."
        )
    return DrawingBatches(
        drawings,
        batch_size=config.batch_size,
        emoji_fraction=config.drawings.emoji_fraction,
        random_convolutions=config.drawings.random_convolutions,
        context_length=facts.context_length,
        seed=config.seed,
    )


def seed_everything(*where: int) -> None:
    """Set torch's generators by a place in the run."""
    state = np.random.SeedSequence(where).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)
