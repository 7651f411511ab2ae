"""One call of a transport, by a test that goes past the client."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.deadline import Deadline
from clip_rt.wire.messages import ServedModel, make_inference_request, make_row_error
from clip_rt.wire.transport import Transport


def infer(
    transport: Transport, model: ServedModel, array: NDArray[Any], *, timeout_s: float = 10.0
) -> NDArray[np.float32]:
    """Embed one batch; float32 (N, D) for N rows.

    Raises:
        NonFiniteEmbeddingError: an embedding is no direction; carries its row.
    """
    deadline = Deadline.after(timeout_s)
    message = make_inference_request(model, array, deadline)
    future = transport.send("ModelInfer", message, deadline)
    embeddings, bad_rows = transport.read(future, model, len(array), deadline)
    for row in bad_rows:
        raise make_row_error(model, embeddings[row], transport.url, row)
    return embeddings
