"""The way to the hidden states of a model's texts: a Triton model beside its towers.

It is asked about when hidden states are first asked for, so that a client of embeddings alone pays
nothing for it.
"""

from __future__ import annotations

from functools import partial

from clip_rt.deadline import Deadline
from clip_rt.errors import ServerUnavailableError, UnknownModelError
from clip_rt.requests.connection import Model
from clip_rt.requests.dynamic_batching import DynamicBatcher
from clip_rt.specs import HiddenLayer, hidden_model
from clip_rt.wire.contract import check_hidden
from clip_rt.wire.messages import ServedModel, read_hidden_config


def find_hidden(model: Model, layer: HiddenLayer, deadline: Deadline) -> DynamicBatcher:
    """Return the way to a layer's hidden states; the first time the servers are asked.

    Raises:
        UnknownModelError: a server does not have them.
        ContractError: they are of another model.
        ServerError: nobody answers.
    """
    found = model.hidden.get(layer)
    if found is None:
        served = model.connection.retry(lambda: _describe(model, layer, deadline), deadline)
        # Of several threads that came at once, one's is used by all.
        found = model.hidden.setdefault(layer, DynamicBatcher(served, model.connection.pool))
    return found


def _describe(model: Model, layer: HiddenLayer, deadline: Deadline) -> ServedModel:
    """Ask all servers that are healthy, and hold what they say against the model."""
    connection, pool = model.connection, model.connection.pool
    connection.verify(model, deadline)
    name = hidden_model(model.manifest.model)
    read = partial(read_hidden_config, layer=layer)
    described: ServedModel | None = None
    for replica in pool.replicas:
        if not replica.is_healthy:
            continue
        url = replica.transport.url
        try:
            (served,) = replica.transport.describe((name,), deadline, read)
        except ServerUnavailableError:
            pool.mark_unhealthy(replica)
            raise
        except UnknownModelError as error:
            raise UnknownModelError(
                f"{url} serves {model.manifest.model!r} without its hidden states, {name}. Export "
                "it again: python -m export.onnx --text-output hidden.",
                model=name,
                known=(model.image.tower.name, model.text.tower.name),
            ) from error
        check_hidden(served, model.text.tower, url)
        described = described or served
    if described is None:
        raise ServerUnavailableError(f"{connection.urls}: nobody answers there now.")
    return described
