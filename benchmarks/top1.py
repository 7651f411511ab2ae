"""Top-1 accuracy of two towers on images that have a text each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.requests.batches import MAX_ROWS, plan_texts

if TYPE_CHECKING:
    from export.samples import Samples


def top1(
    images: Callable[[Any], NDArray[np.float32]],
    texts: Callable[[Any], NDArray[np.float32]],
    samples: Samples,
) -> float:
    """Return the share of the images for which the right text is chosen."""
    plan = plan_texts(samples.token_ids, max_rows=MAX_ROWS)
    image_NE = np.concatenate([images(each) for each in samples.image_batches(MAX_ROWS)])
    text_ME = np.concatenate([texts(each) for each in plan.batches])[plan.row_by_text]
    return float(((image_NE @ text_ME.T).argmax(axis=1) == samples.right_N).mean())
