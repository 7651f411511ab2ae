"""One process or many: a model goes in, one that all processes of torchrun train comes out.

    torchrun --nproc-per-node 8 -m training.run ...

DDP keeps the whole model on every process; FSDP (torch's `fully_shard`) gives each a slice of
every matrix, gathered where it is used. Weights and optimiser leave and enter whole, on the CPU and
by the names of the plain model, so that what N processes saved M processes load. Every function
here but `World`'s own must be called by all processes alike. One process needs no group at all.

Sources: Li et al. 2020 (DDP), Rajbhandari et al. 2020 (ZeRO), Zhao et al. 2023 (FSDP).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clip_rt.errors import InputError
from training.dual_encoder import DualEncoder
from training.model import ResidualAttentionBlock
from training.resnet import Bottleneck

Kind = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """Where this process stands among those that train together."""

    rank: int
    size: int
    device: torch.device
    """What this process computes on."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that logs, evaluates and saves."""
        return self.rank == 0


@contextmanager
def join(device: str = "auto", *, timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them again.

    Without torchrun there is one process and nothing to join. When the body fails, its process
    leaves at once and torchrun ends the others.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        timeout_s: How long to wait for the others at any exchange before giving up.

    Raises:
        InputError: CUDA is asked for and not there, or has fewer devices than processes.
    """
    rank, size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    world = World(rank, size, _find_device(device, local_rank))
    if size == 1:
        yield world
        return
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield world
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def wrap(model: DualEncoder, kind: Kind) -> nn.Module:
    """Let the processes train one model; all begin with the first one's weights.

    Args:
        model: On this process's device; compiled in place (`model.compile()`) if at all.
        kind: "ddp" keeps it whole and returns a wrapper around it; "fsdp" shards it in place, and
            an optimiser must be made after.

    Returns:
        What to call in training. In one process, the model as it is. Under FSDP `encode_image` and
        `encode_text` work too, and the temperature and the bias, of which nothing can be cut off,
        stay whole and plain: give them a parameter group of their own.
    """
    if not _is_shared():
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.detach(), src=0)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    mesh = init_device_mesh(model.logit_scale.device.type, (torch.distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, ResidualAttentionBlock | Bottleneck):
            fully_shard(module, mesh=mesh)
    # Or its parameters would be other objects after a forward pass than an optimiser knows.
    fully_shard(model, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_hook(mean_over_ranks)
    return model


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Decide whether forward and backward passes within exchange gradients or only add them up."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_is_last_backward(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a norm over all of them, wherever they lie.

    Args:
        model: As `wrap` returned it, after the backward pass.
        max_norm: Largest L2 norm to leave; infinity only measures.

    Returns:
        The norm before, float32 scalar, the same on every process.
    """
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    norm = torch.nn.utils.get_total_norm(whole)
    if shards:
        square = torch.nn.utils.get_total_norm(shards).square()
        torch.distributed.all_reduce(square)
        norm = (square + norm.to(square.device).square()).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*shards, *whole], factor)
    return norm


@torch.no_grad()
def mean_over_ranks(value: Tensor) -> Tensor:
    """Average a tensor over all processes, such as their local losses; the argument is kept."""
    if not _is_shared():
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def broadcast(value: Any) -> Any:
    """Return the first process's value on every process; the others' are not looked at."""
    if not _is_shared():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


class Signals:
    """A number that any process may raise, known to all of them one exchange later.

    What is exchanged during one update is read in the next, on the CPU: nobody waits for a device.
    """

    def __init__(self) -> None:
        self._under_way: tuple[Tensor, torch.distributed.Work] | None = None

    def exchange(self, number: int) -> int:
        """Pass this process's number on.

        Returns:
            The largest of what all processes passed the last time, 0 at first; in one process
            its own number, at once.
        """
        if not _is_shared():
            return number
        largest = 0
        if self._under_way is not None:
            earlier, work = self._under_way
            work.wait()
            (largest,) = earlier.numpy()
        numbers = torch.tensor([number])
        work = torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, async_op=True)
        self._under_way = numbers, work
        return int(largest)


def barrier() -> None:
    """Wait until every process is here."""
    if _is_shared():
        torch.distributed.barrier()


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Collect the whole state dict on the CPU of the first process; the others get none of it.

    Tensors of a model that is on the CPU itself may be the model's own, not copies.
    """
    weights: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    return weights


def gather_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Collect the optimiser's state on the CPU of the first process; the others get none of it.

    Returns:
        By the name of the parameter and the role, such as `exp_avg`. Hyperparameters are not in it.
    """
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    return whole.get("state", {})


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Spread what `gather_weights` returned; only the first process's is read."""
    set_model_state_dict(model, dict(weights), options=_spread())


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Spread what `gather_optimizer` returned; only the first process's is read."""
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    whole["state"] = {name: dict(roles) for name, roles in state.items()}
    set_optimizer_state_dict(model, optimizer, whole, options=_spread())
    for parameter, roles in optimizer.state.items():
        for role, tensor in roles.items():
            # What comes from a file is contiguous, and fused AdamW walks parameter and state by
            # the same strides: those of channels_last would take another weight's moments.
            if tensor.shape == parameter.shape and tensor.stride() != parameter.stride():
                roles[role] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _spread() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=_is_shared())


def _is_shared() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _find_device(device: str, local_rank: int) -> torch.device:
    num_devices = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not num_devices):
        return torch.device("cpu")
    if local_rank >= num_devices:
        raise InputError(
            f"process {local_rank} of this machine needs a CUDA device of its own, and "
            f"{num_devices} can be seen. Start fewer (torchrun --nproc-per-node), or use "
            "--device cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
