"""Embeddings within Ray Data: a client in each of its actors, for datasets of any size.

    import ray
    from clip_rt.ray import embed_dataset

    dataset = ray.data.read_binary_files("photos", include_paths=True)
    embed_dataset(dataset, column="bytes", num_workers=4).write_parquet("embeddings")

Ray reads, distributes and writes; it restarts actors that die and gives their batches to others.
What cannot be embedded is a row with an `error`, and its embedding is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from clip_rt.client import Client
from clip_rt.embedding import find_dimensions
from clip_rt.errors import InputError

if TYPE_CHECKING:
    import ray.data

BATCH_SIZE = 256

Batch = dict[str, NDArray[Any]]
"""Columns of a batch as Ray has them with `batch_format="numpy"`."""


class EmbedBatch:
    """Adds embeddings to a batch: a callable class for `Dataset.map_batches`.

    Args:
        kind: What is embedded, "image" or "text".
        column: With paths, encoded bytes or uint8 (H, W, 3) of images, or with texts.
        output_column: For the embeddings, float32 (N, D), rows of length 1; NaN where there is an
            error.
        error_column: For what went wrong with a row; empty where nothing did.
        truncate: Cut texts that are too long for the model.
        dimensions: Numbers of each embedding to keep, as `Client.encode_images` has it.
        client_options: Arguments of `clip_rt.Client`. Name a `fingerprint`, so that all actors are
            held to the same weights.

    Raises:
        InputError: an argument cannot be used.
    """

    def __init__(
        self,
        *,
        kind: Literal["image", "text"] = "image",
        column: str = "image",
        output_column: str = "embedding",
        error_column: str = "error",
        truncate: bool = False,
        dimensions: int | None = None,
        client_options: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in ("image", "text"):
            raise InputError(f"kind is {kind!r:.80}; it must be 'image' or 'text'.")
        self._kind = kind
        self._column = column
        self._output_column = output_column
        self._error_column = error_column
        self._truncate = truncate
        self._dimensions = dimensions
        self._client = Client(**(client_options or {}))

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with embeddings and errors.

        Raises:
            InputError: the batch has no such column, or another format than "numpy".
            ServerError, UnknownModelError, ContractError: see `Client.encode_images`; Ray makes
                the batch anew, or ends, as it was told.
        """
        if not isinstance(batch, dict):
            raise InputError(
                f"a batch is a {type(batch).__name__}; have map_batches give arrays, which "
                "is its default."
            )
        if self._column not in batch:
            raise InputError(
                f"the dataset has no column {self._column!r}; it has "
                f"{', '.join(map(repr, batch))[:200]}. Name the one that is meant with column=."
            )
        items = list(batch[self._column])
        if self._kind == "text":
            encoded = self._client.encode_texts(
                items, truncate=self._truncate, on_error="skip", dimensions=self._dimensions
            )
        else:
            encoded = self._client.encode_images(
                items, on_error="skip", dimensions=self._dimensions
            )
        dim = find_dimensions(self._client.manifest, self._dimensions)
        embeddings = np.full((len(items), dim), np.nan, np.float32)
        embeddings[encoded.indices] = encoded.embeddings
        errors = np.full(len(items), "", object)
        for error in encoded.failures:
            errors[getattr(error, "index")] = str(error)  # noqa: B009 - not of every error
        return {**batch, self._output_column: embeddings, self._error_column: errors}


def embed_dataset(
    dataset: ray.data.Dataset,
    *,
    num_workers: int = 1,
    batch_size: int = BATCH_SIZE,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **arguments: Any,
) -> ray.data.Dataset:
    """Return a dataset with embeddings, made by a pool of actors when it is consumed.

    Args:
        dataset: Of Ray, with a column of images or texts.
        num_workers: Actors, each with a client; one for each server or GPU, or for each few cores
            of models that run in process.
        batch_size: Rows that an actor is given at a time.
        num_cpus: Cores an actor counts for, where Ray places actors; Ray's own default if None.
        num_gpus: GPUs it counts for.
        arguments: Of `EmbedBatch`.

    Returns:
        The rows with two columns more, in Ray's order, which `preserve_order` of its DataContext
        makes the given one.

    Raises:
        InputError: Ray is not installed, or an argument cannot be used.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError(
            f"embedding datasets of Ray needs {error.name}: pip install 'clip-rt[ray]'."
        ) from error
    return dataset.map_batches(
        EmbedBatch,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        batch_size=batch_size,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
