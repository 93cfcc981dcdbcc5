"""Training on many devices by PyTorch's own means, put on the model from outside.

    torchrun --nproc-per-node 8 -m codellama train RECIPE --stage code --tensor 2

Ranks form a mesh of replicas x shards x contexts x tensor-parallel parts (docs/distributed.md).
Contexts and tensor-parallel parts read the same part of the global batch, shards and replicas one
of their own. One process needs none of this, and the functions here then do nothing.
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
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as styles

from codellama.data.packing import LaneState, lanes_of_rank
from codellama.model.attention import Attend
from codellama.model.transformer import Transformer


def _tensor_plan() -> Any:
    """Between projections a rank has some heads of all positions, elsewhere some positions."""
    whole, cut = Replicate(), Shard(1)

    def moved(x: Any, wanted: Any, *others: None, use_local_output: bool = False) -> Any:
        return styles.PrepareModuleInput(
            input_layouts=(x, *others),
            desired_input_layouts=(wanted, *others),
            use_local_output=use_local_output,
        )

    return {
        "layers.0": moved(whole, cut, None, None, use_local_output=True),
        "layers.*.*_layernorm": styles.SequenceParallel(),
        "layers.*.self_attn": moved(cut, whole, None, None),
        "layers.*.self_attn.[qkv]_proj": styles.ColwiseParallel(),
        "layers.*.self_attn.o_proj": styles.RowwiseParallel(output_layouts=cut),
        "layers.*.mlp": moved(cut, whole),
        "layers.*.mlp.gate_proj": styles.ColwiseParallel(),
        "layers.*.mlp.up_proj": styles.ColwiseParallel(),
        "layers.*.mlp.down_proj": styles.RowwiseParallel(output_layouts=cut),
        "norm": moved(cut, whole, use_local_output=True),
    }


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work; `n_data` parts of the global batch are read."""

    n_data: int = 1
    n_context: int = 1
    n_tensor: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None
    """replicas x parts x tensor, where the parts are shards x contexts."""
    context: DeviceMesh | None = None
    """The ranks that share the sequences of this one."""

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank reads."""
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
            f"{world_size} processes do not divide into {n_replicas} replicas x {n_tensor} "
            f"tensor-parallel parts x {n_context} contexts"
        )
    if world_size == 1:
        return ALONE
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    names, n_data = ("replicas", "parts", "tensor"), n_replicas * n_shards
    shape = (n_replicas, n_shards * n_context, n_tensor)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    shape = (n_data, n_context, n_tensor)
    contexts = init_device_mesh(kind, shape, mesh_dim_names=("data", "context", "tensor"))
    return Layout(n_data, n_context, n_tensor, dist.get_rank(), mesh, contexts["context"])


def distribute(
    model: Transformer, layout: Layout, loss: Callable[..., Tensor], compiled: bool = False
) -> Callable[..., Tensor]:
    """Cut a model over the mesh, in place, and return `loss` so that it runs on the parts.

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
        for block in model.model.layers:  # between what FSDP2 gathers and sends; one graph for all
            block.forward = torch.compile(block.forward, dynamic=False)
    if layout.n_tensor > 1:
        styles.parallelize_module(model.model, layout.mesh["tensor"], _tensor_plan())
    is_repeated = layout.mesh["replicas"].size() > 1
    data_mesh = layout.mesh["replicas", "parts"] if is_repeated else layout.mesh["parts"]
    for block in model.model.layers:
        fully_shard(block, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)
    # FSDP gathers weights around methods that it knows of.
    whole: Any = model
    whole.training_loss = types.MethodType(lambda _, *arguments: loss(*arguments), model)
    register_fsdp_forward_method(whole, "training_loss")
    return whole.training_loss


def fill(model: nn.Module, read: Callable[[str, Tensor], Tensor], device: str) -> None:
    """Bring a model from the meta device to one where its parameters have values.

    `read` gives the whole of one for its name and an empty tensor; a rank keeps its part of it.
    """
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = read(name, torch.empty(parameter.shape))
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value.to(device), mesh, placements, src_data_rank=None)
            parameter.copy_(value)


def own_positions(x: Tensor, layout: Layout) -> Tensor:
    """What this rank has of each sequence. x: [B, T]."""
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
    norms = [_whole(torch.nn.utils.get_total_norm(group)) for group in groups.values()]
    total = torch.stack(norms).norm().item()
    if total > limit:
        for gradient in gradients:
            gradient.mul_(limit / (total + 1e-6))
    return total


def whole_state(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """All weights, whole, on the main rank; every rank must call it."""
    pairs = ((name, _whole(tensor)) for name, tensor in model.state_dict().items())
    return {name: tensor for name, tensor in pairs if layout.is_main}


def _whole(tensor: Tensor) -> Tensor:
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
    device = layout.mesh.device_type if layout.mesh else "cpu"
    return bool(summed(torch.tensor(float(flag), device=device), layout))
