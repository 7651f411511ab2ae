"""The same architecture as other projects build it, to compare numbers and names with."""

from __future__ import annotations

import torch

from training.model import CLIP


def open_clip_name(spec) -> str:
    suffix = "-quickgelu" if spec.activation == "quick_gelu" else ""
    return spec.name.replace("/", "-").replace("@", "-").removesuffix("px") + suffix


def empty_open_clip(open_clip, spec) -> torch.nn.Module:
    """open_clip's model of the architecture, without any memory for its weights."""
    with torch.device("meta"):
        return open_clip.create_model(open_clip_name(spec), device="meta")


def as_open_clip(open_clip, clip: CLIP) -> torch.nn.Module:
    """open_clip's model with the weights of ours."""
    reference = empty_open_clip(open_clip, clip.spec)
    reference.load_state_dict(clip.state_dict(), strict=True, assign=True)
    reference.attn_mask = clip.causal_mask_LL.clone()
    return reference.eval()


@torch.no_grad()
def unsettle(model: torch.nn.Module) -> None:
    """Give biases and normalisations, which start as zeros and ones, values that matter."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif parameter.ndim == 1 and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)


def as_hugging_face(transformers, spec) -> torch.nn.Module:
    """A CLIPModel of the same architecture, with random weights."""
    activation, image, text = spec.activation, spec.image, spec.text
    config = transformers.CLIPConfig(
        projection_dim=spec.embedding_dim,
        vision_config={
            "hidden_size": image.width,
            "intermediate_size": image.mlp_width or 4 * image.width,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "image_size": spec.side_px,
            "patch_size": image.patch_px,
            "hidden_act": activation,
        },
        text_config={
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "hidden_act": activation,
        },
    )
    model = transformers.CLIPModel(config).eval()
    unsettle(model)
    return model
