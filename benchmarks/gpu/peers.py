"""What people use instead, in FP16 with the weights of ours: open_clip, and transformers' SDPA.

Both read normalised FP16 images and ids padded to the context; how these are made of ours is not
timed.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_rt.specs import CLIP_MEAN, CLIP_STD, Tower
from training.encoders.libraries import import_open_clip
from training.model import CLIP


def import_forms() -> Any:
    """Import what gives peers the weights of ours.

    Raises:
        ImportError: something it needs, such as psutil, is not installed.
    """
    return importlib.import_module("benchmarks.contenders.forms")


def form_input(batch: Tensor) -> Tensor:
    """Make what peers read of uint8 pixels (B, S, S, 3) or of int32 tokens (B, L)."""
    if batch.dtype != torch.uint8:
        return batch.long()
    mean_C, std_C = (torch.tensor(each, device=batch.device) for each in (CLIP_MEAN, CLIP_STD))
    image_BSSC = (batch.float() / 255 - mean_C) / std_C
    return image_BSSC.permute(0, 3, 1, 2).half().contiguous()


def make_open_clip(clip: CLIP, device: torch.device, *, dtype: torch.dtype | None) -> nn.Module:
    """Build open_clip's model with the weights of ours.

    Args:
        clip: A vision transformer.
        device: Where to.
        dtype: As its `create_model(precision="fp16")` has it; None keeps FP32 weights, as its
            training does.
    """
    import_open_clip()
    theirs: Any = importlib.import_module("open_clip.model")
    described = import_forms().describe_for_open_clip(clip.spec)
    model = theirs.CLIP(
        embed_dim=described["embed_dim"],
        vision_cfg=theirs.CLIPVisionCfg(**described["vision_cfg"]),
        text_cfg=theirs.CLIPTextCfg(**described["text_cfg"]),
        quick_gelu=described["quick_gelu"],
        cast_dtype=dtype,
        output_dict=True,
    )
    model.load_state_dict(clip.state_dict())
    model.to(device)
    if dtype is not None:
        theirs.convert_weights_to_lp(model, dtype=dtype)
        model.requires_grad_(False).eval()
    return model


def open_clip_encoder(clip: CLIP, device: torch.device, tower: Tower) -> Any:
    """Return its encoder in FP16; takes what `form_input` returns."""
    model: Any = make_open_clip(clip, device, dtype=torch.float16)
    encode = model.encode_image if tower == "image" else model.encode_text
    return lambda given: encode(given, normalize=True)


def transformers_encoder(clip: CLIP, device: torch.device, tower: Tower) -> Any:
    """Return the encoder of a CLIPModel in FP16 with SDPA; takes what `form_input` returns."""
    model = import_forms().make_hugging_face(clip, attn_implementation="sdpa")
    model = model.half().to(device).requires_grad_(False).eval()

    def encode(given: Tensor) -> Tensor:
        if tower == "image":
            found = model.get_image_features(pixel_values=given)
        else:
            found = model.get_text_features(input_ids=given)
        # Version 5 wraps them.
        found = found if isinstance(found, Tensor) else found.pooler_output
        return functional.normalize(found, dim=-1)

    return encode
