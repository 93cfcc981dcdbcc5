"""Training on many devices by PyTorch's own means, put on the model from outside.

    torchrun --nproc-per-node 8 -m codellama train RECIPE --stage code --tensor 2

Ranks form a mesh of replicas x shards x tensor-parallel parts. FSDP2 shards weights, gradients and
optimiser over the shards and repeats them over the replicas; tensor parallelism cuts the heads and
the feed-forward width of each block. Each group of tensor-parallel ranks reads one part of the
global batch. One process needs none of this, and the functions here then do nothing.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from codellama.data.packing import LaneState, lanes_of_rank
from codellama.model.transformer import Transformer

_TENSOR_PLAN = {
    **{f"self_attn.{name}": ColwiseParallel for name in ("q_proj", "k_proj", "v_proj")},
    "self_attn.o_proj": RowwiseParallel,
    **{f"mlp.{name}": ColwiseParallel for name in ("gate_proj", "up_proj")},
    "mlp.down_proj": RowwiseParallel,
}


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work."""

    n_replicas: int = 1
    n_shards: int = 1
    n_tensor: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None

    @property
    def n_data(self) -> int:
        """Parts that the global batch is read in."""
        return self.n_replicas * self.n_shards

    @property
    def n_ranks(self) -> int:
        """All processes."""
        return self.n_data * self.n_tensor

    @property
    def data_rank(self) -> int:
        """Which of them this rank reads."""
        return self.rank // self.n_tensor

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.mesh is None


ALONE = Layout()


def make_layout(device: str, n_replicas: int = 1, n_tensor: int = 1) -> Layout:
    """Join the ranks that torchrun started; all that are left over by the options are shards.

    Raises:
        ValueError: the ranks do not divide so.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rest, left = divmod(world_size, n_replicas * n_tensor)
    if left or rest == 0:
        raise ValueError(
            f"{world_size} processes do not divide into {n_replicas} replicas x {n_tensor} "
            "tensor-parallel parts"
        )
    if world_size == 1:
        return ALONE
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    mesh = init_device_mesh(
        kind, (n_replicas, rest, n_tensor), mesh_dim_names=("replicas", "shards", "tensor")
    )
    return Layout(n_replicas, rest, n_tensor, dist.get_rank(), mesh)


def distribute(
    model: Transformer, layout: Layout, loss: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Cut a model over the mesh, in place, and return `loss` so that it runs on the parts.

    Raises:
        ValueError: heads do not divide over the tensor-parallel parts.
    """
    if layout.mesh is None:
        return loss
    config = model.config
    if config.num_key_value_heads % layout.n_tensor or config.intermediate_size % layout.n_tensor:
        raise ValueError(
            f"{config.num_key_value_heads} key-value heads and a feed-forward width of "
            f"{config.intermediate_size} do not divide over {layout.n_tensor} tensor-parallel parts"
        )
    if layout.n_tensor > 1:
        plan: Any = {name: style() for name, style in _TENSOR_PLAN.items()}
        for block in model.model.layers:
            parallelize_module(block, layout.mesh["tensor"], plan)
    data_mesh = layout.mesh["shards"]
    if layout.n_replicas > 1:
        data_mesh = layout.mesh["replicas", "shards"]
    for block in model.model.layers:
        fully_shard(block, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)
    # FSDP gathers weights around methods that it knows of.
    whole: Any = model
    whole.training_loss = types.MethodType(lambda _, *arguments: loss(*arguments), model)
    register_fsdp_forward_method(whole, "training_loss")
    return whole.training_loss


@contextmanager
def gathered(model: Transformer) -> Iterator[None]:
    """Have the embedding, last norm and output projection whole for a while, without gradients."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients so that their norm is at most `limit`; returns the norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:  # norms add up over tensors of one mesh only
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        groups.setdefault(mesh, []).append(gradient)
    if list(groups) == [None]:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in groups.values()]
    total = torch.stack(norms).norm().item()
    if total > limit:
        for gradient in gradients:
            gradient.mul_(limit / (total + 1e-6))
    return total


def whole_state(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """All weights, whole, on the main rank; every rank must call it."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = whole(tensor)
        if layout.is_main:
            tensors[name] = value
    return tensors


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut over ranks, whole, on the CPU."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def summed(value: Tensor, layout: Layout) -> Tensor:
    """The sum over all parts of the global batch."""
    if layout.mesh is None:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / layout.n_tensor  # tensor-parallel ranks have read the same part


def from_main(value: Any, layout: Layout) -> Any:
    """What the main rank says."""
    if layout.mesh is None:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_lanes(states: list[LaneState], n_lanes: int, layout: Layout) -> list[LaneState]:
    """Where all lanes of the global batch stand, each as the rank that reads it knows."""
    if layout.mesh is None:
        return states
    own = lanes_of_rank(n_lanes, layout.data_rank, layout.n_data)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {lane: states[lane] for lane in own})
    merged = {lane: state for part in found for lane, state in part.items()}
    return [merged[lane] for lane in range(n_lanes)]


def any_rank(flag: bool, layout: Layout) -> bool:
    """Whether it is true on any rank: decisions are taken by all or by none."""
    if layout.mesh is None:
        return flag
    value = torch.tensor(float(flag), device=layout.mesh.device_type)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def finish(layout: Layout) -> None:
    """Leave the group of ranks."""
    if layout.mesh is not None and dist.is_initialized():
        dist.destroy_process_group()
