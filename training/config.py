"""What a training run depends on, as one frozen record; recipes say what to set for a purpose."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import Limits
from clip_rt.specs import Activation
from training.data.tree import FolderKind
from training.optimizer import Lock

Precision = Literal["auto", "fp32", "bf16", "fp16"]

FREE_FIELDS = frozenset(
    "recipe out_dir resume init_from tokenizer teacher num_workers num_threads device parallel "
    "eval_every_steps log_every_steps keep_last tensorboard eval_data class_names max_bad_share "
    "max_pixels max_bytes".split()
)
"""Fields that may differ when a run is resumed; the others decide what its weights become."""


@dataclass(frozen=True, kw_only=True)
class DrawingsConfig:
    """Of drawings, which a run learns from where no data are named."""

    data_dir: Path = Path("data/drawings")
    """Folder with train/*.tar and styles/*.tar of python -m training.drawings."""
    sample: bool = False
    """Train briefly on the small sample of drawings that comes with the code."""
    emoji_fraction: float = 0.5
    """Share of each batch that is emoji; the rest are icons."""
    random_convolutions: float = 0.2
    """Share of the drawings that go through a random convolution."""

    def __post_init__(self) -> None:
        _check_shares(self, "emoji_fraction", "random_convolutions")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Limits):
    """Everything a run depends on."""

    recipe: str | None = None
    """Of the command line: a recipe whose options come before the others, NAME or NAME:STAGE of
    training/recipes, or a .toml file. Without it and without data, drawings or drawings:sample."""
    model: str = "ViT-B/32"
    """Architecture, a key of clip_rt.specs.MODELS; or a model of another library: open_clip:NAME,
    open_clip:FOLDER, hf:owner/name or hf:FOLDER."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one, for models of open_clip whose tokenizer is not
    OpenAI's and cannot be had from the hub."""
    activation: Activation | None = None
    """Of the MLP blocks, as the weights were trained; needed where nothing beside them says it.
    Without init_from, what the network is to have; None is the architecture's."""
    init_from: str | None = None
    """Weights to start from (fine-tuning): a file, hf:owner/name@revision, or openai. Models of
    other libraries start from their own where nothing is named, and are random by that name."""
    out_dir: Path = Path("runs/clip")
    """Where checkpoints, the log and the curves go."""
    resume: bool = False
    """Go on with the run in out_dir, from its last snapshot."""

    data: tuple[str, ...] = ()
    """Tar shards (with {000..099}), a .csv or .jsonl with image and caption or label, a folder."""
    templates: str = "openai_imagenet"
    """Captions of images that have a class only: a named set of prompt templates."""
    data_weights: tuple[float, ...] = ()
    """How often each of `data` is drawn from, in proportion; by size if empty."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Least and largest share of an image of `data` that a random crop keeps."""
    colour_jitter: float = 0.0
    """Largest change of brightness, contrast and saturation of `data`; hue changes a quarter."""
    grey_probability: float = 0.0
    """Share of the images of `data` that lose their colour."""
    allow_commands: bool = False
    """Let `pipe:` shards of `data` run their commands in a shell."""
    allow_outside: bool = False
    """Let paths in tables and links in folders of `data` and `eval_data` lead out of them."""
    folder_kind: FolderKind = "auto"
    """What folders of `data` are: images in a folder for each class, or with a .txt beside each."""
    max_bad_share: float = 0.2
    """Share of the first 1,000 samples drawn from `data` that may be bad; each is replaced."""
    num_workers: int = 2
    """Processes that decode the images of `data`."""
    eval_data: tuple[Path, ...] = ()
    """Folder, table or shards to evaluate on: classes by zero-shot, captions by retrieval."""
    class_names: Path | None = None
    """Names of the classes of `eval_data`, as for python -m training.evaluate."""

    objective: Literal["infonce", "sigmoid"] | None = None
    """CLIP's softmax over the batch, or SigLIP's sigmoid of each pair. None is what the weights of
    `init_from` were trained by, infonce where there are none."""
    teacher: str | None = None
    """Weights, as init_from, of a model to distil from, of the architecture `teacher_model`; of one
    of another library openai stands for its own."""
    teacher_model: str = "ViT-B/32"
    """Architecture of the teacher, as model; it reads images and texts as the model does."""
    teacher_activation: Activation | None = None
    """As activation, of the teacher."""
    distill_weight: float = 1.0
    """Weight of the teacher's loss beside the objective's."""

    batch_size: int = 512
    """Pairs per update, over all processes."""
    chunk_size: int = 0
    """Pairs of one process in memory at once (cached gradients); 0 is all of them."""
    total_steps: int = 10_000
    """Updates in all."""
    warmup_steps: int = 2000
    """Updates during which the learning rate rises; at most a quarter of all."""
    peak_lr: float = 5e-4
    """Highest learning rate."""
    layer_decay: float = 1.0
    """Factor on the learning rate for each layer further from the embeddings."""
    weight_decay: float = 0.2
    """Of matrices; gains, biases and the temperature are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    lock: Lock = "none"
    """Tower to leave as it is; 'image' is LiT."""
    patch_dropout: float = 0.0
    """Share of a ViT's patches left out in training."""
    ema_decay: float = 0.0
    """Decay of the average of the weights, which is then what is evaluated and saved; 0 is none."""

    precision: Precision = "auto"
    """Of matrix products and convolutions; auto is bf16 where the device has instructions for it,
    else fp32, and a resumed run keeps its own. fp16 scales the loss."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    compile_backend: str = ""
    """Backend of torch.compile, such as inductor; none if empty."""
    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How the processes of torchrun share the model."""
    num_threads: int = 0
    """Threads of torch; 0 leaves its default."""
    seed: int = 0
    """Of weights, order, captions, augmentation and dropout."""

    eval_every_steps: int = 1000
    """Updates between two evaluations; each also saves."""
    log_every_steps: int = 10
    """Updates between two lines of log.jsonl."""
    keep_last: int = 2
    """Snapshots to keep for resuming."""
    tensorboard: bool = False
    """Write the log for TensorBoard as well."""

    drawings: Annotated[DrawingsConfig, tyro.conf.OmitArgPrefixes] = field(
        default_factory=DrawingsConfig
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shares(self, "patch_dropout", "ema_decay", "layer_decay", "max_bad_share")
        for name in (
            *("batch_size", "total_steps", "eval_every_steps", "log_every_steps", "keep_last"),
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.precision == "fp16" and self.parallel == "fsdp":
            raise InputError(
                "precision fp16 with fsdp is not supported: the shards would scale apart. bf16 is."
            )
        if self.chunk_size < 0:
            raise InputError(f"chunk_size is {self.chunk_size}; it must be 0 or more.")

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON, those of a group among the others."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        drawings = fields.pop("drawings")
        return {**fields, **drawings}

    def check_resumes(self, earlier: dict[str, Any]) -> None:
        """Refuse to go on with a run that another configuration began.

        Args:
            earlier: As `as_json` returned it then.

        Raises:
            InputError: names each field that differs.
        """
        now = self.as_json()
        is_older = "recipe" not in earlier  # When the defaults of every run were those of drawings.
        if earlier.get("total_steps", 0) is None:
            earlier = {**earlier, "total_steps": 150 if earlier["sample"] else 3200}
        if now["objective"] is None and earlier.get("objective") == "infonce":
            earlier = {**earlier, "objective": None}  # Of when it had to be one or the other.
        differing = [
            f"{name} was {earlier[name]!r} and is {now[name]!r}"
            for name in sorted(now.keys() & earlier.keys() - FREE_FIELDS)
            if earlier[name] != now[name]
        ]
        # A file may have moved; whether there is one decides what the weights become.
        differing += [
            f"{name} was {earlier[name]!r} and is {now[name]!r}"
            for name in ("init_from", "teacher")
            if name in earlier and (earlier[name] is None) != (now[name] is None)
        ]
        if differing:
            raise InputError(
                f"the run in {self.out_dir} was begun with another configuration: "
                f"{'; '.join(differing)}. Name the same, or another --out-dir."
                + is_older
                * " What an earlier version took by default is in --recipe drawings."
            )


def _check_shares(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{name} is {getattr(config, name)}; it must be within 0 and 1.")
