"""Zero-shot classification and retrieval, as the paper does them: embeddings in, figures out.

Prompts and the classifier are those that serve.

Source: Radford et al. 2021, sections 3.1 and 3.3; retrieval as in table 13.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clip_rt.classification.zero_shot import classify
from clip_rt.inputs.prompts import DEFAULT_TEMPLATE
from training.data.drawing_batches import Drawings
from training.dual_encoder import DualEncoder
from training.evaluation.class_names import NameTable, describe_layout, read_templates
from training.evaluation.embed import class_embeddings, embed_drawings, embed_texts, logit_scale
from training.evaluation.metrics import Accuracy, Retrieval, accuracy, retrieval
from training.evaluation.source import Embedded, find_classes


def zero_shot(
    model: DualEncoder,
    embedded: Embedded,
    *,
    table: NameTable | None = None,
    templates: str | Sequence[str] = "openai_imagenet",
    all_classes: bool = False,
) -> tuple[str, dict[str, Accuracy]]:
    """Classify the images that have a class.

    Args:
        model: Whose text tower makes the classes.
        embedded: Images with labels; those without are left out.
        table: Names of the classes; see `name_classes`.
        templates: Of the ensemble.
        all_classes: Choose among every class of the table, not only those that have images.

    Returns:
        The layout of the classes in words, and the accuracy with one prompt and with all of them.

    Raises:
        InputError: a class has no name, or no image has a class.
    """
    classes = find_classes(embedded.labels, table, all_classes=all_classes)
    frames = list(read_templates(templates)) if isinstance(templates, str) else list(templates)
    prompts = {f"one prompt, {DEFAULT_TEMPLATE!r}": [DEFAULT_TEMPLATE]}
    prompts[f"ensemble of {len(frames)}"] = frames
    results = {}
    for title, each in prompts.items():
        class_CE = class_embeddings(model, classes.names, templates=each, progress=len(each) > 1)
        scores = classify(
            embedded.image_NE[classes.rows_N],
            class_CE,
            classes.names,
            logit_scale=logit_scale(model),
        )
        results[title] = accuracy(scores.logits, classes.right_N)
    return describe_layout(classes.ids), results


def retrieve(model: DualEncoder, embedded: Embedded) -> Retrieval:
    """Find images by their captions and captions by their images; too long ones are cut.

    Raises:
        InputError: no image has a caption.
    """
    pairs = [(text, row) for row, texts in enumerate(embedded.captions) for text in texts]
    text_ME = embed_texts(model, [text for text, _ in pairs], truncate=True)
    return retrieval(embedded.image_NE, text_ME, np.array([row for _, row in pairs], dtype=int))


def zero_shot_accuracy(
    model: DualEncoder,
    drawings: Drawings,
    labels: Sequence[str],
    *,
    templates: str | Sequence[str] | None = None,
) -> Accuracy:
    """Classify drawings among labels; each drawing's name must be one of them."""
    class_CE = class_embeddings(model, labels, templates=templates)
    image_NE = embed_drawings(model, drawings)
    index_by_label = {label: index for index, label in enumerate(labels)}
    right_N = np.array([index_by_label[record["name"]] for record in drawings.records])
    return accuracy(
        classify(image_NE, class_CE, labels, logit_scale=logit_scale(model)).logits, right_N
    )
