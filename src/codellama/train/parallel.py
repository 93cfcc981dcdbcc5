"""Training on many devices by PyTorch's own means, put on the model from outside.

    torchrun --nproc-per-node 8 -m codellama train RECIPE --stage code --tensor 2

Ranks form a mesh of replicas x shards x contexts x tensor-parallel parts. FSDP2 shards weights,
gradients and optimiser over shards and contexts and repeats them over the replicas. Context ranks
hold a part of every sequence each and exchange it for all of it in some of the heads where
attention is computed. Tensor parallelism cuts heads and feed-forward width of each block, and the
sequence between them. Contexts and tensor-parallel parts read the same part of the global batch.
One process needs none of this, and the functions here then do nothing.
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
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from codellama.data.packing import LaneState, lanes_of_rank
from codellama.model.attention import Attend
from codellama.model.transformer import Transformer


def _tensor_plan() -> Any:
    """Between projections a rank has some heads of all positions, elsewhere some positions."""
    whole, cut = Replicate(), Shard(1)
    return {
        "layers.0": PrepareModuleInput(
            input_layouts=(whole, None, None),
            desired_input_layouts=(cut, None, None),
            use_local_output=True,
        ),
        "layers.*.*_layernorm": SequenceParallel(),
        "layers.*.self_attn": PrepareModuleInput(
            input_layouts=(cut, None, None), desired_input_layouts=(whole, None, None)
        ),
        "layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        "layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=cut),
        "layers.*.mlp": PrepareModuleInput(input_layouts=cut, desired_input_layouts=whole),
        "layers.*.mlp.gate_proj": ColwiseParallel(),
        "layers.*.mlp.up_proj": ColwiseParallel(),
        "layers.*.mlp.down_proj": RowwiseParallel(output_layouts=cut),
        "norm": PrepareModuleInput(
            input_layouts=cut, desired_input_layouts=whole, use_local_output=True
        ),
    }


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work."""

    n_replicas: int = 1
    n_shards: int = 1
    n_context: int = 1
    n_tensor: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None
    """replicas x parts x tensor, where the parts are shards x contexts."""
    context: DeviceMesh | None = None
    """The ranks that share the sequences of this one."""

    @property
    def n_data(self) -> int:
        """Parts that the global batch is read in."""
        return self.n_replicas * self.n_shards

    @property
    def n_ranks(self) -> int:
        """All processes."""
        return self.n_data * self.n_context * self.n_tensor

    @property
    def data_rank(self) -> int:
        """Which of them this rank reads."""
        return self.rank // (self.n_context * self.n_tensor)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.mesh is None


ALONE = Layout()


def make_layout(device: str, n_replicas: int = 1, n_tensor: int = 1, n_context: int = 1) -> Layout:
    """Join the ranks that torchrun started; all that are left over by the options are shards.

    Raises:
        ValueError: the ranks do not divide so.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    n_shards, left = divmod(world_size, n_replicas * n_context * n_tensor)
    if left or n_shards == 0:
        raise ValueError(
            f"{world_size} processes do not divide into {n_replicas} replicas x {n_context} "
            f"contexts x {n_tensor} tensor-parallel parts"
        )
    if world_size == 1:
        return ALONE
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    n_parts = n_shards * n_context
    mesh = init_device_mesh(
        kind, (n_replicas, n_parts, n_tensor), mesh_dim_names=("replicas", "parts", "tensor")
    )
    context = init_device_mesh(
        kind,
        (n_replicas * n_shards, n_context, n_tensor),
        mesh_dim_names=("data", "context", "tensor"),
    )["context"]
    return Layout(n_replicas, n_shards, n_context, n_tensor, dist.get_rank(), mesh, context)


def distribute(
    model: Transformer, layout: Layout, loss: Callable[..., Tensor], compiled: bool = False
) -> Callable[..., Tensor]:
    """Cut a model over the mesh, in place, and return `loss` so that it runs on the parts.

    Args:
        compiled: compile what each block does between what FSDP2 gathers and sends.

    Raises:
        ValueError: heads do not divide over the tensor-parallel parts and contexts.
    """
    if layout.mesh is None:
        return loss
    config, n_cuts = model.config, layout.n_context * layout.n_tensor
    if config.num_key_value_heads % n_cuts or config.intermediate_size % layout.n_tensor:
        raise ValueError(
            f"{config.num_key_value_heads} key-value heads and a feed-forward width of "
            f"{config.intermediate_size} do not divide over {layout.n_tensor} tensor-parallel "
            f"parts x {layout.n_context} contexts"
        )
    if compiled:
        for block in model.model.layers:  # one graph serves them all
            block.forward = torch.compile(block.forward, dynamic=False)
    if layout.n_tensor > 1:
        parallelize_module(model.model, layout.mesh["tensor"], _tensor_plan())
    data_mesh = layout.mesh["parts"]
    if layout.n_replicas > 1:
        data_mesh = layout.mesh["replicas", "parts"]
    for block in model.model.layers:
        fully_shard(block, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)
    # FSDP gathers weights around methods that it knows of.
    whole: Any = model
    whole.training_loss = types.MethodType(lambda _, *arguments: loss(*arguments), model)
    register_fsdp_forward_method(whole, "training_loss")
    return whole.training_loss


def own_positions(x: Tensor, layout: Layout) -> Tensor:
    """What this rank has of each sequence. x: [B, T].

    Raises:
        ValueError: sequences do not divide.
    """
    if layout.context is None:
        return x
    if x.shape[1] % (layout.n_context * layout.n_tensor):
        raise ValueError(
            f"sequences of {x.shape[1]} tokens do not divide over {layout.n_context} contexts x "
            f"{layout.n_tensor} tensor-parallel parts"
        )
    return x.chunk(layout.n_context, dim=1)[layout.context.get_local_rank()]


def over_contexts(attend: Attend, layout: Layout) -> Attend:
    """Attention of sequences that ranks share: each attends over all of it, in some of the heads.

    Two all-to-alls a layer, and nothing is held twice (DeepSpeed Ulysses, arXiv 2309.14509). The
    ring of PyTorch's context_parallel knows no CPU kernel and no mask of documents.
    """
    mesh = layout.context
    if mesh is None or layout.n_context == 1:
        return attend

    def exchange(x: Tensor, held: int, wanted: int) -> Tensor:
        part = DTensor.from_local(x, mesh, [Shard(held)])
        return part.redistribute(placements=[Shard(wanted)]).to_local()

    def attended(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (exchange(x, 1, 2) for x in (q, k, v))
        return exchange(attend(layer, q, k, v), 2, 1)

    return attended


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
    """The sum over all ranks, of which the tensor-parallel ones have the same value."""
    if layout.mesh is None:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / layout.n_tensor


def from_main(value: Any, layout: Layout, group: Any = None) -> Any:
    """What the main rank says."""
    if layout.mesh is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group)
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
