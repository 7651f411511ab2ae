"""Tensors under any of CLIP's published namings go in, the same tensors under OpenAI's come out.

OpenAI's own naming is also that of open_clip's `CLIP`; open_clip's `CustomTextCLIP` puts `text.`
before the text tower; Hugging Face's `CLIPModel` has names of its own, separate projections for
queries, keys and values, and its last projections transposed.

Sources: openai/CLIP `clip/model.py`; mlfoundations/open_clip `src/open_clip/model.py`;
huggingface/transformers `src/transformers/models/clip/modeling_clip.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clip_rt.errors import CheckpointError

IGNORED = frozenset({"attn_mask", "input_resolution", "context_length", "vocab_size"})
"""Facts of the architecture that some projects store beside the weights, as tensors."""

_OF_OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of a name that DistributedDataParallel, torch.compile, FSDP and checkpointing add."""

HUGGING_FACE = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""Parts of Hugging Face's names, and what OpenAI calls the same; replaced in this order."""


def to_openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint.

    Names that no naming knows stay as they are: whoever checks the fit lists them.

    Returns:
        The tensors, without those in `IGNORED`; values are only joined or transposed.

    Raises:
        CheckpointError: two tensors would get the same name.
    """
    renamed = _rename(tensors, _unwrap)
    if any(name.startswith(("vision_model.", "text_model.")) for name in renamed):
        renamed = _from_hugging_face(renamed)
    elif any(name.startswith("text.") for name in renamed):
        renamed = _rename(renamed, lambda name: name.removeprefix("text."))
    for name in ("logit_scale", "logit_bias"):
        # Some write a scalar as a vector of one, because FSDP shards no scalars.
        if name in renamed and renamed[name].shape == (1,):
            renamed[name] = renamed[name][0]
    return {name: tensor for name, tensor in renamed.items() if name not in IGNORED}


def is_hugging_faces(tensors: Mapping[str, Tensor]) -> bool:
    """Say whether the names are those of Hugging Face's `CLIPModel`."""
    return any(_unwrap(name).startswith(("vision_model.", "text_model.")) for name in tensors)


def is_openais_archive(tensors: Mapping[str, Tensor]) -> bool:
    """Say whether the tensors come from a file that OpenAI published.

    Only those hold all three facts of the architecture as tensors (openai/CLIP `clip/model.py`,
    `build_model`); whoever saves the model again leaves them out.
    """
    return tensors.keys() >= _OF_OPENAI


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = _rename(tensors, _translate)
    for name in [name for name in renamed if name.endswith(".position_ids")]:
        del renamed[name]
    for name in ("visual.proj", "text_projection"):
        if name in renamed and renamed[name].ndim == 2:
            renamed[name] = renamed[name].T.contiguous()
    for query in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        shapes = [renamed[part].shape for part in parts if part in renamed]
        if len(shapes) == 3 and shapes[0] and len(set(shapes)) == 1:
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[query.replace(".q_proj.", ".in_proj_")] = joined
    return renamed


def _translate(name: str) -> str:
    for theirs, ours in HUGGING_FACE:
        name = name.replace(theirs, ours)
    return name


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _rename(tensors: Mapping[str, Tensor], rule: Callable[[str], str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new_name = rule(name)
        if new_name in renamed:
            raise CheckpointError(
                f"the checkpoint holds {new_name!r} twice, once as {name!r}. Save one "
                "model.state_dict() per file."
            )
        renamed[new_name] = tensor
    return renamed
