"""Small models of open_clip and transformers, random weights, in folders of the hub's layout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

SIDE_PX = 32
CONTEXT_LENGTH = 16
WORDS = (
    "a photo of a cat dog red blue car house bicycle with two people and the old bridge over "
    "A Photo TWO Dogs isn't it? crème brûlée Maßstab красная машина 红色的汽车 赤い自転車"
)

TOWER = {"hidden_size": 32, "intermediate_size": 64}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 2}
LARGE_PX = 224
"""So large that an image processor on torchvision differs by more than a level."""
GEMMA = {"vocab_size": 400, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
CLIP = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
CLIP |= {"pad_token_id": 49407}
BERT = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


@cache
def sentencepiece_bpe() -> str:
    """Return a tokenizer.json like Gemma's: BPE with bytes for what it does not know."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, processors, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    numbers = [f"<0x{each:02X}>" for each in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *numbers], show_progress=False
    )
    made.train_from_iterator([WORDS] * 4, trainer)
    # The trainer marks bytes as special, and no text would become one.
    content = json.loads(made.to_str())
    content["added_tokens"] = [
        each for each in content["added_tokens"] if each["content"] in special
    ]
    made = Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens([AddedToken(each, special=True) for each in special])
    made.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return str(made.to_str())


def clip_tokenizer(length: int = CONTEXT_LENGTH) -> Any:
    """Return CLIP's own tokenizer as transformers builds it, with the packaged vocabulary."""
    from transformers import CLIPTokenizer

    from clip_rt.inputs import tokenizer as own

    alphabet, merges = own._byte_alphabet(), own._read_merges()
    symbols = [*alphabet, *(f"{each}</w>" for each in alphabet)]
    symbols += [*(first + second for first, second in merges), "<|startoftext|>", "<|endoftext|>"]
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length)


def write_clip(folder: Path, *, length: int = CONTEXT_LENGTH, **text: Any) -> Path:
    """Write a small CLIP of transformers with its tokenizer; `text` is of its text tower."""
    import transformers as library

    joint = {"projection_dim": 24}
    vision = {**TOWER, **joint, "image_size": SIDE_PX, "patch_size": SIDE_PX // 2}
    config = library.CLIPConfig(
        text_config={**_text_tower(CLIP, length=length), **joint, **text},
        vision_config=vision,
        **joint,
    )
    square = {"height": SIDE_PX, "width": SIDE_PX}
    images = library.CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size=square)
    return write_transformers(folder, config, clip_tokenizer(length), images)


def sentencepiece_unigram(folder: Path) -> Path:
    """Write a model of sentencepiece like SigLIP's: pieces with scores, of lower-case text."""
    import sentencepiece

    from export.source_parity import TEXTS

    lines = [each.lower() for each in (WORDS, *TEXTS[:20])]
    (folder / "corpus.txt").write_text("\n".join(lines * 4), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=220,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        add_dummy_prefix=False,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "spiece.model"


@cache
def word_piece() -> str:
    """Return a tokenizer.json like BERT's: words of pieces between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator([WORDS] * 4, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return str(made.to_str())


def write_open_clip(
    folder: Path,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    preprocessing: dict[str, Any] | None = None,
    bias: float | None = None,
) -> Path:
    """Write a folder as open_clip pushes one to the hub: configuration, weights, tokenizer."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    tower = {"width": 64, "heads": 2, "layers": 2}
    config: dict[str, Any] = {
        "embed_dim": 48,
        "custom_text": True,
        "vision_cfg": {"image_size": SIDE_PX, "patch_size": 16, "width": 64, "layers": 2}
        | {"head_width": 32, **(vision or {})},
        "text_cfg": {"context_length": CONTEXT_LENGTH, **tower, **(text or {})},
    }
    if bias is not None:
        config["init_logit_bias"] = bias
    if tokenizer is not None:
        config["text_cfg"] |= {"hf_tokenizer_name": str(folder), "vocab_size": 400}
    folder.mkdir(parents=True, exist_ok=True)
    said = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": SIDE_PX} | (preprocessing or {})
    document = {"model_cfg": config, "preprocess_cfg": said}
    (folder / "open_clip_config.json").write_text(json.dumps(document), "utf-8")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer, "utf-8")
        names = _special_tokens(tokenizer)
        (folder / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        disturb(model)
    tensors = {name: each.contiguous().clone() for name, each in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def disturb(model: Any) -> None:
    """Move norms, biases and weights away from where they begin, so that none can be left out."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("logit_scale", "logit_bias")):
                continue
            spread = 0.2 if parameter.ndim < 2 else 0.02
            parameter.add_(spread * torch.randn_like(parameter))


def write_transformers(folder: Path, config: Any, tokenizer: Any, images: Any) -> Path:
    """Write a folder as transformers saves one."""
    import torch
    from transformers import AutoModel, BlipForImageTextRetrieval

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if config.model_type == "blip":
            model = BlipForImageTextRetrieval(config)
        else:
            model = AutoModel.from_config(config)
        disturb(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


KINDS = ("open_clip's CLIP", "open_clip's SigLIP", "transformers' SigLIP", "transformers' BERT")
"""One of each way that models of other libraries are fed and asked."""


def write_kind(folder: Path, kind: str) -> str:
    """Write a small model of one of `KINDS`; return it as --model names it."""
    if kind == "open_clip's CLIP":
        return f"open_clip:{write_open_clip(folder)}"
    if kind == "open_clip's SigLIP":
        return f"open_clip:{write_siglip(folder)}"
    family = "siglip" if kind == "transformers' SigLIP" else "chinese_clip"
    return f"hf:{write_family(folder, family)}"


def write_siglip(folder: Path) -> Path:
    """Write a small SigLIP 2 as open_clip has it."""
    return write_open_clip(
        folder,
        text={"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        | {"tokenizer_kwargs": {"clean": "canonicalize"}},
        tokenizer=sentencepiece_bpe(),
        preprocessing={"resize_mode": "squash"},
        bias=-10.0,
    )


def write_family(folder: Path, family: str, *, side_px: int = SIDE_PX) -> Path:
    """Write a small model of a family of transformers, by its `model_type`."""
    config, content, images = _families(side_px)[family]
    return write_transformers(folder, config, _tokenizer(content), images)


def _tokenizer(content: str) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    is_bert = "[CLS]" in content
    names = (
        {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]", "unk_token": "[UNK]"}
        if is_bert
        else {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content), model_max_length=CONTEXT_LENGTH, **names
    )


def _text_tower(
    ids: dict[str, int], *, length: int = CONTEXT_LENGTH, **others: Any
) -> dict[str, Any]:
    return {**TOWER, **ids, "max_position_embeddings": length, **others}


def _families(side_px: int) -> dict[str, tuple[Any, str, Any]]:
    import transformers as library

    joint = {"projection_dim": 24}
    own = {**TOWER, "image_size": side_px, "patch_size": side_px // 2}
    vision = {**own, **joint}
    square = {"size": {"height": side_px, "width": side_px}}
    cut = {"size": {"shortest_edge": side_px}, "crop_size": square["size"]}
    bert, gemma = word_piece(), sentencepiece_bpe()
    crop, squash = library.CLIPImageProcessor(**cut), library.SiglipImageProcessor(**square)
    return {
        "siglip": (
            library.SiglipConfig(
                text_config=_text_tower(GEMMA, projection_size=32), vision_config=own
            ),
            gemma,
            squash,
        ),
        "metaclip_2": (
            library.MetaClip2Config(
                text_config=_text_tower(GEMMA, **joint), vision_config=vision, **joint
            ),
            gemma,
            crop,
        ),
        "chinese_clip": (
            library.ChineseCLIPConfig(text_config=_text_tower(BERT), vision_config=vision, **joint),
            bert,
            library.ChineseCLIPImageProcessor(**square, do_center_crop=False),
        ),
        "altclip": (
            library.AltCLIPConfig(
                # Its positions begin behind the padding id.
                text_config=_text_tower(BERT, length=CONTEXT_LENGTH + 1, project_dim=24),
                vision_config=vision,
                **joint,
            ),
            bert,
            crop,
        ),
        "blip": (
            library.BlipConfig(
                text_config=_text_tower(BERT, encoder_hidden_size=32, sep_token_id=3),
                vision_config=own,
                image_text_hidden_size=24,
                **joint,
            ),
            bert,
            library.BlipImageProcessor(**square),
        ),
        "align": (
            library.AlignConfig(
                text_config=_text_tower(BERT),
                vision_config={"image_size": 64, "width_coefficient": 0.2, "hidden_dim": 64}
                | {"depth_coefficient": 0.2},
                projection_dim=64,
            ),
            bert,
            library.EfficientNetImageProcessor(
                size={"height": 72, "width": 72},
                crop_size={"height": 64, "width": 64},
                do_center_crop=True,
                include_top=False,
            ),
        ),
    }


def _special_tokens(tokenizer: str) -> dict[str, Any]:
    is_bert = "[CLS]" in tokenizer
    if is_bert:
        names = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", **names}
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **names}
