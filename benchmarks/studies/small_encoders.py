"""Small models of every family of open_clip and transformers, of random weights, in folders.

Their image towers are the families' own, in the smallest size that the library has; their text
towers are narrow. Tokenizers are of the family's kind, trained here (`studies.made_tokenizers`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.studies import made_tokenizers
from training.encoders.libraries import import_open_clip, import_transformers

LENGTH = 48
"""Tokens that every text tower reads; about a tenth of the texts have more."""
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
SQUASH = {"resize_mode": "squash"}
BILINEAR = {"interpolation": "bilinear"}
TOWER = {"hidden_size": 32, "intermediate_size": 64}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 2}
SIDE_PX = 224
VISION = {**TOWER, "image_size": SIDE_PX, "patch_size": 32}


@dataclass(frozen=True, kw_only=True)
class OpenCLIPFamily:
    """A model of open_clip: the parts of its configuration that make the family."""

    vision: dict[str, Any]
    preprocessing: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], str] | None = None
    bias: float | None = None

    def write(self, folder: Path) -> str:
        """Write a folder as open_clip pushes one to the hub; return what names the model."""
        open_clip = import_open_clip()
        text = {"context_length": LENGTH, "width": 64, "heads": 2, "layers": 2, **self.text}
        config: dict[str, Any] = {"embed_dim": 64, "custom_text": True, "vision_cfg": self.vision}
        if self.bias is not None:
            config["init_logit_bias"] = self.bias
        folder.mkdir(parents=True)
        if self.tokenizer is not None:
            _tokenizer(self.tokenizer()).save_pretrained(folder)
            vocab_size = len(
                json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
            )
            text |= {"hf_tokenizer_name": str(folder), "vocab_size": vocab_size}
        size = self.vision["image_size"]
        document = {
            "model_cfg": config | {"text_cfg": text},
            "preprocess_cfg": {"size": size, **self.preprocessing},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(document), "utf-8")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
            disturb(model)
        _save(model, folder / "open_clip_model.safetensors")
        return f"open_clip:{folder}"


@dataclass(frozen=True, kw_only=True)
class TransformersFamily:
    """A model of transformers: its configuration, tokenizer and image processor."""

    make: Callable[[Any, Any], tuple[Any, Any]]
    """Of the library and the tokenizer: configuration and image processor."""
    tokenizer: Callable[[Path], Any]

    def write(self, folder: Path) -> str:
        """Write a folder as transformers saves one; return what names the model."""
        library = import_transformers()
        folder.mkdir(parents=True)
        tokenizer = self.tokenizer(folder)
        config, images = self.make(library, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if config.model_type == "blip":
                model = library.BlipForImageTextRetrieval(config)
            else:
                model = library.AutoModel.from_config(config)
            disturb(model)
        for each in (model, tokenizer, images):
            each.save_pretrained(folder)
        return f"hf:{folder}"


def disturb(model: nn.Module) -> None:
    """Move norms, biases and weights away from where they begin, so that none can be left out."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("logit_scale", "logit_bias", "temperature")):
                parameter.add_((0.1 if parameter.ndim < 2 else 0.01) * torch.randn_like(parameter))


def _save(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: each.contiguous().clone() for name, each in model.state_dict().items()}, path)


def _tokenizer(content: str) -> Any:
    """Return a tokenizer of transformers that is given no class of its own."""
    from tokenizers import Tokenizer

    library = import_transformers()
    names = {
        "pad_token": ("<pad>", "[PAD]"),
        "unk_token": ("<unk>", "[UNK]"),
        "bos_token": ("<s>", "<bos>"),
        "eos_token": ("</s>", "<eos>"),
        "sep_token": ("[SEP]",),
        "cls_token": ("[CLS]",),
    }
    added = {each["content"] for each in json.loads(content)["added_tokens"]}
    found = {name: each for name, known in names.items() for each in known if each in added}
    return library.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content), model_max_length=LENGTH, **found
    )


def _siglip_tokenizer(folder: Path) -> Any:
    """Write a model of sentencepiece, which transformers runs in Python for SigLIP."""
    import sentencepiece

    lines = (" ".join(each.lower().split()) for each in made_tokenizers.corpus())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=8000,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        add_dummy_prefix=False,
        character_coverage=0.99,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    library = import_transformers()
    return library.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=LENGTH)


def _siglip2_tokenizer(folder: Path) -> Any:
    """Write Gemma's, which lowers its letters when transformers reads it for SigLIP 2."""
    (folder / "tokenizer.json").write_text(made_tokenizers.gemma(), "utf-8")
    names = {"tokenizer_class": "Siglip2Tokenizer", "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    return import_transformers().AutoTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def _of(make: Callable[[], str]) -> Callable[[Path], Any]:
    return lambda _: _tokenizer(make())


def _text(tokenizer: Any, *, length: int = LENGTH, **others: Any) -> dict[str, Any]:
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    if ids["eos_token_id"] is None:
        ids |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": length}
    return {**TOWER, **ids, **sizes, **others}


SQUARE = {"size": {"height": SIDE_PX, "width": SIDE_PX}}
CROP = {"size": {"shortest_edge": SIDE_PX}, "crop_size": SQUARE["size"]}
JOINT = {"projection_dim": 32}


def _clip(library: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = library.CLIPConfig(
        text_config=_text(tokenizer, **JOINT), vision_config={**VISION, **JOINT}, **JOINT
    )
    return config, library.CLIPImageProcessor(**CROP)


def _siglip(library: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = library.SiglipConfig(
        text_config=_text(tokenizer, projection_size=32), vision_config=VISION
    )
    return config, library.SiglipImageProcessor(**SQUARE)


def _metaclip_2(library: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = library.MetaClip2Config(
        text_config=_text(tokenizer, **JOINT), vision_config={**VISION, **JOINT}, **JOINT
    )
    return config, library.CLIPImageProcessor(**CROP)


def _chinese_clip(library: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = library.ChineseCLIPConfig(
        text_config=_text(tokenizer), vision_config={**VISION, **JOINT}, **JOINT
    )
    return config, library.ChineseCLIPImageProcessor(**SQUARE, do_center_crop=False)


def _altclip(library: Any, tokenizer: Any) -> tuple[Any, Any]:
    # Its positions begin behind the padding id.
    length = LENGTH + tokenizer.pad_token_id + 1
    config = library.AltCLIPConfig(
        text_config=_text(tokenizer, length=length, project_dim=32),
        vision_config={**VISION, **JOINT},
        **JOINT,
    )
    return config, library.CLIPImageProcessor(**CROP)


def _align(library: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = library.AlignConfig(
        text_config=_text(tokenizer),
        vision_config={"image_size": 64, "width_coefficient": 0.2, "hidden_dim": 64}
        | {"depth_coefficient": 0.2},
        projection_dim=64,
    )
    crop = {"size": {"height": 289, "width": 289}, "crop_size": {"height": 64, "width": 64}}
    return config, library.EfficientNetImageProcessor(
        **crop, do_center_crop=True, include_top=False
    )


def _blip(library: Any, tokenizer: Any) -> tuple[Any, Any]:
    config = library.BlipConfig(
        text_config=_text(tokenizer, encoder_hidden_size=32, sep_token_id=tokenizer.sep_token_id),
        vision_config=VISION,
        image_text_hidden_size=24,
        **JOINT,
    )
    return config, library.BlipImageProcessor(**SQUARE)


def _timm(name: str, size: int, pool: str, proj: str | None = None) -> dict[str, Any]:
    return {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": proj}


FAMILIES: dict[str, OpenCLIPFamily | TransformersFamily] = {
    "transformers CLIP": TransformersFamily(make=_clip, tokenizer=_of(made_tokenizers.byte_level)),
    "transformers SigLIP": TransformersFamily(make=_siglip, tokenizer=_siglip_tokenizer),
    "transformers SigLIP 2": TransformersFamily(make=_siglip, tokenizer=_siglip2_tokenizer),
    "transformers MetaCLIP 2": TransformersFamily(
        make=_metaclip_2, tokenizer=_of(made_tokenizers.unigram)
    ),
    "transformers Chinese-CLIP": TransformersFamily(
        make=_chinese_clip, tokenizer=_of(made_tokenizers.word_piece)
    ),
    "transformers ALIGN": TransformersFamily(
        make=_align, tokenizer=_of(made_tokenizers.word_piece)
    ),
    "transformers AltCLIP": TransformersFamily(
        make=_altclip, tokenizer=_of(made_tokenizers.unigram)
    ),
    "transformers BLIP": TransformersFamily(make=_blip, tokenizer=_of(made_tokenizers.word_piece)),
    "open_clip EVA-02": OpenCLIPFamily(
        vision=_timm("eva02_tiny_patch14_224", 224, "token", "linear"), preprocessing=OPENAI
    ),
    "open_clip MobileCLIP2": OpenCLIPFamily(
        vision=_timm("fastvit_mci0", 256, "avg"),
        preprocessing=PLAIN | BILINEAR,
        text={"no_causal_mask": True},
    ),
    "open_clip PE-Core": OpenCLIPFamily(
        vision=_timm("vit_pe_core_tiny_patch16_384", 384, "map"),
        preprocessing=HALF | SQUASH | BILINEAR,
    ),
    "open_clip CLIPA": OpenCLIPFamily(
        vision={"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 28}
        | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        preprocessing=IMAGENET | SQUASH | BILINEAR,
        text={"tokenizer_kwargs": {"strip_sep_token": True}, "pool_type": "last"}
        | {"no_causal_mask": True},
        tokenizer=made_tokenizers.word_piece,
    ),
    "open_clip SigLIP 2": OpenCLIPFamily(
        vision={"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
        preprocessing=HALF | SQUASH,
        text={"tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True}
        | {"proj_bias": True, "pool_type": "last", "act_kwargs": {"approximate": "tanh"}},
        tokenizer=made_tokenizers.gemma,
        bias=-10.0,
    ),
    "open_clip ViTamin": OpenCLIPFamily(
        vision=_timm("vitamin_small_224", 224, "", "linear"), preprocessing=OPENAI
    ),
    "open_clip ConvNeXt": OpenCLIPFamily(
        vision=_timm("convnext_atto", 224, "", "linear"), preprocessing=OPENAI
    ),
    "open_clip ResNet": OpenCLIPFamily(
        vision={"image_size": 224, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        preprocessing=OPENAI,
    ),
    "open_clip ViT, longest side": OpenCLIPFamily(
        vision={"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
        preprocessing=OPENAI | {"resize_mode": "longest", "fill_color": 128},
    ),
}
"""By library and name."""
