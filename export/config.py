"""What an export is told, whatever it ends in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import Limits
from clip_rt.specs import Activation
from export.parity_report import Precision
from export.repository import KEEP_VERSIONS
from export.triton_config import MAX_BATCH_SIZE
from training.encoders.find import has_own_weights, is_external, name_model


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Limits):
    """From weights to a model repository."""

    model: str
    """Architecture, such as ViT-B/32; open_clip:NAME or open_clip:FOLDER; hf:owner/name or
    hf:FOLDER, through transformers."""
    weights: str = "openai"
    """A file, a folder in the hub's layout, hf:owner/name@revision, openai, or random."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one, for models of open_clip whose tokenizer is not
    OpenAI's and cannot be had from the hub."""
    name: str | None = None
    """Served name; without it, the model's, which of hf:owner/name is name."""
    repository: Path = Path("model_repository")
    """Triton model repository to publish into."""
    activation: Activation | None = None
    """Of the MLP blocks, as the weights were trained; needed where nothing beside them says it."""
    fp32_island: tuple[str, ...] = ()
    """Layers that stay FP32 among FP16 ones, by name or pattern: 'visual.*.resblocks.3.mlp'."""
    find_islands: bool = False
    """Measure which layers must stay FP32, and keep those."""
    samples: tuple[Path, ...] = ()
    """Images of one's own to measure on too: folders with one of images for each class, tables with
    the columns image and label or caption, or .tar shards."""
    class_names: Path | None = None
    """What the classes of the samples are called, where wnids or numbers say nothing."""
    num_images: int = 256
    """How many images of each of the samples to measure on."""
    allow_outside: bool = False
    """Let paths in tables and links in folders of the samples lead out of them."""
    matryoshka_dimensions: tuple[int, ...] = ()
    """Lengths that embeddings may be cut to, as the model was trained to be; nothing else says it.
    """
    calibration: tuple[Path, ...] = ()
    """For int8 and fp8: images like those to come, in any form of samples; for int8 with classes or
    captions."""
    max_batch_size: int = MAX_BATCH_SIZE
    """Largest batch the server accepts."""
    keep_versions: int = KEEP_VERSIONS
    """Versions of the model to keep in the repository, the new one included."""
    cache: Path | None = None
    """Where files are kept for the next export; without it, $XDG_CACHE_HOME/clip_rt/export, or
    below ~/.cache."""
    verbose: bool = False
    """Print every case of the comparison with torch."""
    dry_run: bool = False
    """Only say what would be done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_external(self.model) and (self.fp32_island or self.find_islands):
            raise InputError(
                f"{self.model} is another library's model; islands are layers of clip_rt's own "
                "architectures. Leave --fp32-island and --find-islands out."
            )

    @property
    def is_for_embedded_server(self) -> bool:
        """Whether clip_rt's own server can run what is exported; a container runs the others."""
        return False

    @property
    def served_name(self) -> str:
        """Name the client asks for."""
        return self.name or name_model(self.model)

    @property
    def weights_in_words(self) -> str:
        """Where the weights are from; those of a folder or a hub are its own."""
        is_own = has_own_weights(self.model) and self.weights == ExportConfig.weights
        return "its own" if is_own else self.weights


PRECISION_IN_WORDS: dict[Precision, str] = {
    "fp32": "FP32",
    "fp16_weights": "FP32 arithmetic on weights stored as FP16",
    "fp16": "FP16; FP32 normalisations, projection, mean and std",
    "fp8": "FP8 matrix products of the image tower; the rest as in FP16",
    "int8": "INT8 matrix products; FP32 attention, normalisations and projection",
}
