"""A batch in chunks goes in, the gradient of the whole batch comes out, in the memory of one chunk.

A contrastive loss looks at all pairs of a batch at once, so its gradient is no sum over chunks. But
it needs of each pair only its embeddings: these are made chunk by chunk without a graph, the loss
gives its gradient with respect to them, and then each chunk is embedded again, with a graph, to
carry its rows of that gradient on into the weights. Twice the forward passes, the same result.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clip_rt.errors import InputError
from training.data.batches import Batch
from training.parallel import gradient_sync
from training.recompute import hold_running_statistics

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Image and text embeddings and groups of the whole batch to the scalar loss."""
Autocast = Callable[[], AbstractContextManager[object]]
"""Opens the context of one forward pass."""


def split_batch(batch: Batch, chunk_size: int) -> list[Batch]:
    """Cut a batch into chunks of at most `chunk_size` pairs, their tokens as long as they need."""
    chunks = []
    for start in range(0, len(batch.group_B), chunk_size):
        rows = slice(start, start + chunk_size)
        length_B = batch.length_B[rows]
        chunks.append(
            replace(
                batch,
                image_BCSS=batch.image_BCSS[rows],
                tokens_BL=batch.tokens_BL[rows, : int(length_B.numpy().max())],
                group_B=batch.group_B[rows],
                length_B=length_B,
            )
        )
    return chunks


def cached_backward(
    model: nn.Module,
    chunks: Sequence[Batch],
    objective: Objective,
    *,
    autocast: Autocast = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Add the gradient of `objective` over all chunks together to the parameters' `grad`.

    Equal to one backward pass over the joined batch, dropout included: each chunk is embedded with
    the same random numbers both times. The exception is batch normalisation, whose statistics
    are those of a chunk, as they are those of a process; the running ones move once per chunk.

    Args:
        model: A CLIP, or what `training.parallel.wrap` made of it. Each chunk is moved to its
            device. The objective may use its `logit_scale` and `logit_bias`, no other parameter.
        chunks: Parts of a batch. One is taken the plain way, embedded once. More are asked for one
            by one, twice: a sequence that makes them when asked keeps none in memory. Every process
            must have equally many pairs.
        objective: Called once, with the float32 embeddings of all chunks of this process.
        autocast: Where matrix products in BF16 or FP16 are wanted.
        scaler: Of FP16 gradients; its `unscale_`, `step` and `update` stay the caller's.

    Returns:
        The loss, detached and not scaled.

    Raises:
        InputError: there are no chunks.
    """
    if not chunks:
        raise InputError("a batch of no chunks has no loss; give at least one.")
    scaled = torch.nn.Identity() if scaler is None else scaler.scale
    if len(chunks) == 1:
        with gradient_sync(model, enabled=True):
            loss = objective(*_embed(model, chunks[0], autocast))
            scaled(loss).backward()
        return loss.detach()

    states, embedded = _embed_without_graph(model, chunks, autocast)
    image_BE, text_BE, group_B = (torch.cat(parts) for parts in zip(*embedded, strict=True))
    scalars = _scalars(model)
    loss = objective(image_BE.requires_grad_(), text_BE.requires_grad_(), group_B)
    image_grad_BE, text_grad_BE, *scalar_grads = torch.autograd.grad(
        scaled(loss), (image_BE, text_BE, *scalars), materialize_grads=True
    )
    sizes = [len(group) for *_, group in embedded]
    grads = list(zip(image_grad_BE.split(sizes), text_grad_BE.split(sizes), strict=True))
    with hold_running_statistics(model):
        for index, state in enumerate(states):
            is_last = index == len(states) - 1
            with gradient_sync(model, enabled=is_last), state.restored():
                image_BE, text_BE, _ = _embed(model, chunks[index], autocast)
                pairs = list(zip((image_BE, text_BE), grads[index], strict=True))
                if is_last:
                    # In this pass, because DDP waits in it for every parameter's gradient.
                    pairs += zip(scalars, scalar_grads, strict=True)
                _backward(pairs)
    return loss.detach()


def _backward(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Send each tensor's gradient on into its graph, all at once; a locked tower has none."""
    live = [pair for pair in pairs if pair[0].requires_grad]
    if live:
        tensors, grads = zip(*live, strict=True)
        torch.autograd.backward(tensors, grads)


@torch.no_grad()
def _embed_without_graph(
    model: nn.Module, chunks: Sequence[Batch], autocast: Autocast
) -> tuple[list[_RandomState], list[tuple[Tensor, Tensor, Tensor]]]:
    """Embed all chunks; return the random state before each, and its embeddings and groups."""
    states, embedded = [], []
    for index in range(len(chunks)):
        chunk = chunks[index]
        states.append(_RandomState.now(_device(model)))
        embedded.append(_embed(model, chunk, autocast))
    # An autocast around us keeps its casts of the weights, and these were made without a graph.
    torch.clear_autocast_cache()
    return states, embedded


def _embed(model: nn.Module, chunk: Batch, autocast: Autocast) -> tuple[Tensor, Tensor, Tensor]:
    device = _device(model)
    with autocast():
        image_BE, text_BE = model(
            chunk.image_BCSS.to(device, non_blocking=True),
            chunk.tokens_BL.to(device, non_blocking=True),
        )
    return image_BE, text_BE, chunk.group_B.to(device, non_blocking=True)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    """Find what the objective may use beside the embeddings: the temperature and the bias."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in ("logit_scale", "logit_bias") and parameter.requires_grad
    ]


@dataclass(frozen=True)
class _RandomState:
    """Where torch's generators stand, on the CPU and on the model's device."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the numbers that followed this state once more, then go on as if none were drawn."""
        with torch.random.fork_rng([] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
