"""Makes what peers read from the same weights; a process of its own, for it needs torch.

    python -m benchmarks.contenders.forms hub --folder KIT --model ViT-B/32 --weights random

Part of `kit.make_kit`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.contenders.kit import Kit
from clip_rt.errors import InputError
from clip_rt.inputs import tokenizer
from clip_rt.specs import END_OF_TEXT, START_OF_TEXT, ModelSpec, ViTSpec, find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.config import ExportConfig
from export.pipeline import fingerprint_of, load_own
from training.encoders.libraries import import_transformers
from training.model import CLIP
from training.weights.load import load_clip
from training.weights.naming import HUGGING_FACE

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class FormConfig:
    """Make one form of the weights."""

    form: tyro.conf.Positional[Literal["checkpoint", "hub"]]
    folder: Path
    """Of the kit."""
    model: str
    """Architecture."""
    weights: str
    """As export.onnx takes them."""


def write_checkpoint(clip: CLIP, kit: Kit) -> None:
    """Write the weights under OpenAI's names, and open_clip's description of the architecture."""
    tensors = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    # open_clip's has none, and its loader refuses what it does not know.
    tensors.pop("logit_bias", None)
    save_file(tensors, kit.checkpoint, {"activation": clip.spec.activation})
    kit.open_clip_config.parent.mkdir(exist_ok=True)
    kit.open_clip_config.write_text(json.dumps(describe_for_open_clip(clip.spec)), "utf-8")
    facts = {"fingerprint": fingerprint_of(clip)}
    (kit.folder / "checkpoint.json").write_text(json.dumps(facts), "utf-8")


def describe_for_open_clip(spec: ModelSpec) -> dict[str, Any]:
    """Return the architecture in the words of open_clip's model configurations."""
    image, text = spec.image, spec.text
    vision: dict[str, Any] = {"image_size": spec.side_px, "width": image.width}
    if isinstance(image, ViTSpec):
        vision |= {"layers": image.layers, "patch_size": image.patch_px}
        vision["head_width"] = image.width // image.heads
        vision["mlp_ratio"] = (image.mlp_width or 4 * image.width) / image.width
    else:
        vision |= {"layers": list(image.layers), "patch_size": None}
    return {
        "embed_dim": spec.embedding_dim,
        "quick_gelu": spec.activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
    }


def write_hub(clip: CLIP, folder: Path) -> None:
    """Write a folder as the hub has it for a CLIPModel of transformers, tokenizer and all.

    Version 4 reads it as well as version 5, by which it is written.

    Raises:
        InputError: the image tower is no vision transformer.
    """
    spec = clip.spec
    model = make_hugging_face(clip)
    transformers = import_transformers()
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    side = {"height": spec.side_px, "width": spec.side_px}
    transformers.CLIPImageProcessor(
        size={"shortest_edge": spec.side_px}, crop_size=side
    ).save_pretrained(folder)
    ours: Any = json.loads(tokenizer._load().to_str())["model"]
    transformers.CLIPTokenizer(
        vocab={**ours["vocab"], START: START_OF_TEXT, END: END_OF_TEXT},
        merges=[tuple(each) for each in ours["merges"]],
        model_max_length=spec.text.context_length,
    ).save_pretrained(folder)


def make_hugging_face(clip: CLIP, **settings: Any) -> Any:
    """Build a CLIPModel of transformers with the weights of ours.

    Args:
        clip: With a vision transformer.
        settings: Of its configuration, such as attn_implementation.

    Raises:
        InputError: the image tower is no vision transformer.
    """
    spec = clip.spec
    image, text = spec.image, spec.text
    if not isinstance(image, ViTSpec):
        raise InputError(f"transformers has no CLIPModel like {spec.name}.")
    transformers = import_transformers()
    common = {"hidden_act": spec.activation, "projection_dim": spec.embedding_dim}
    config = transformers.CLIPConfig(
        projection_dim=spec.embedding_dim,
        vision_config=common
        | {
            "hidden_size": image.width,
            "intermediate_size": image.mlp_width or 4 * image.width,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "image_size": spec.side_px,
            "patch_size": image.patch_px,
        },
        text_config=common
        | {
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": START_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": END_OF_TEXT,
        },
        **settings,
    )
    model = transformers.CLIPModel(config)
    model.load_state_dict(to_hugging_face(clip.state_dict()))
    return model


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a vision transformer's CLIP as transformers' CLIPModel has them.

    The way back is `training.weights.naming.to_openai_names`.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in ("visual.proj", "text_projection"):
            tensor = tensor.T
        for theirs, ours in HUGGING_FACE:
            name = name.replace(ours, theirs)
        if ".in_proj_" in name:
            for part, each in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".in_proj_", f".{part}_proj.")] = each.clone()
        elif name != "logit_bias":
            renamed[name] = tensor.contiguous()
    return renamed


def main(config: FormConfig) -> None:
    """Make one form of the weights."""
    kit = Kit(folder=config.folder, spec=find_spec(config.model))
    if config.form == "checkpoint":
        export = ExportConfig(model=config.model, weights=config.weights)
        write_checkpoint(load_own(export), kit)
    else:
        write_hub(load_clip(kit.architecture, kit.checkpoint), kit.hub)


if __name__ == "__main__":
    with command():
        main(tyro.cli(FormConfig, prog=program(__spec__.name), description=__doc__))
