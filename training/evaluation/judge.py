"""Weights of a run in, what a user of them would see out: accuracy and retrieval on held-out data.

Measured on a plain copy of the model, so that the processes that share a model need not take part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from clip_rt.embedded.bundled import find_sample
from clip_rt.inputs.decoding import Limits
from training.config import TrainConfig
from training.data.drawing_batches import load_drawings
from training.dual_encoder import DualEncoder
from training.evaluation.class_names import read_name_table
from training.evaluation.embed import class_embeddings, embed_drawings
from training.evaluation.labelled import check_exist
from training.evaluation.metrics import accuracy, retrieval
from training.evaluation.source import embed_data
from training.evaluation.zero_shot import retrieve, zero_shot


class Judge:
    """What a run is measured by: styles of drawings, or the user's `eval_data`."""

    def __init__(self, config: TrainConfig, model: DualEncoder, device: torch.device) -> None:
        self._model = model
        self._eval_data = config.eval_data
        self._allow_outside = config.allow_outside
        self._limits = Limits(max_pixels=config.max_pixels, max_bytes=config.max_bytes)
        check_exist(*config.eval_data)
        self._table = read_name_table(config.class_names) if config.class_names else None
        data_dir = find_sample() if config.drawings.sample else config.drawings.data_dir
        shards = [] if config.data else data_dir.glob("styles/openmoji*.tar")
        self._styles = {
            path.stem: load_drawings([path], progress=False)
            for path in sorted(shards, key=lambda path: path.stem)
        }
        self._device = device

    def score(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Evaluate weights.

        Returns:
            `top1_*`, `top5_*` for what has classes, `recall1_*` to `recall10_*` for what has
            captions (texts found by image, and images found by text), fractions of 1.
        """
        clip = self._model.with_weights(weights).to(self._device)
        scores: dict[str, float] = {}
        for style, drawings in self._styles.items():
            names = [record["name"] for record in drawings.records]
            image_NE, class_NE = embed_drawings(clip, drawings), class_embeddings(clip, names)
            right_N = np.arange(len(names))
            each = accuracy(image_NE @ class_NE.T, right_N)
            scores |= {f"top1_{style}": each.top1, f"top5_{style}": each.top5}
            found = retrieval(image_NE, class_NE, right_N)
            scores |= {f"recall{k}_{style}": share for k, share in found.image_at.items()}
        if self._eval_data:
            embedded = embed_data(
                clip, self._eval_data, allow_outside=self._allow_outside, limits=self._limits
            )
            if any(label is not None for label in embedded.labels):
                _, accuracies = zero_shot(clip, embedded, table=self._table)
                one_prompt, ensemble = accuracies.values()
                for prompts, each in ("one_prompt", one_prompt), ("ensemble", ensemble):
                    scores |= {f"top1_{prompts}": each.top1, f"top5_{prompts}": each.top5}
            if any(embedded.captions):
                found = retrieve(clip, embedded)
                for kind, recalls in ("texts", found.text_at), ("images", found.image_at):
                    scores |= {f"recall{k}_{kind}": share for k, share in recalls.items()}
        return scores

    def rank(self, scores: Mapping[str, float]) -> float:
        """Return the score by which the best weights are chosen: the first one.

        Without any the newest weights are the best.
        """
        return next(iter(scores.values()), float("inf"))
