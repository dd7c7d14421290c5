"""Tensors of which each rank holds a part: how a layer's maps come to be such, and what optimizer, norm and checkpoints do with them.

A part is torch's `DTensor`. Whatever makes a tensor whole, or sums over parts, is done by all ranks together and in the same order.

Source: torch.distributed.tensor.parallel (colwise and rowwise linear maps).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from elite.optimizations.tensor_parallel import BY_INPUTS, BY_OUTPUTS, SUMMED

LAYER_NUMBER = re.compile(r"\.\d+\.")
"""In a module's name, where a plan has a star."""


def divide(model: Any, plan: Mapping[str, str]) -> int:
    """Leave each rank its part of the layers' maps, on its device. Before, all ranks have the whole model, alike, in host memory.

    Args:
        plan: `base_model_tp_plan`.

    Returns:
        How many maps are divided.
    """
    decoder, device = model.get_decoder(), "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    wanted = {name: _style(style) for name, style in plan.items() if style in (BY_OUTPUTS, BY_INPUTS)}
    parallelize_module(decoder, mesh, wanted, src_data_rank=None)
    # Parts are on the device now, and what is to be tried out needs the rest there too.
    nn.Module.to(model, device)
    for name, module in decoder.named_modules():
        style = plan.get(LAYER_NUMBER.sub(".*.", name))
        if style == BY_INPUTS:
            module.register_forward_hook(_added_up)
        elif style == SUMMED:
            for parameter in module.parameters(recurse=False):
                # It is whole, and each rank's gradient of it is that of the rank's heads alone.
                parameter.register_hook(_summed)
    return sum(isinstance(module.weight, DTensor) for module in decoder.modules() if isinstance(module, nn.Linear))


def _style(name: str) -> ParallelStyle:
    # What torch adds up itself may still be under way when a kernel of ours reads it.
    return ColwiseParallel() if name == BY_OUTPUTS else RowwiseParallel(output_layouts=Partial(), use_local_output=False)


def _added_up(_module: nn.Module, _inputs: Any, partial: DTensor) -> Tensor:
    """The sum of all ranks' results."""
    return partial.redistribute(placements=[Replicate()]).to_local()


def _summed(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total)
    return total


def divide_adapter(layer: Any) -> None:
    """Divide a LoRA layer's matrices as its map is: B by its outputs, A by its inputs. The other one stays whole on each rank."""
    weight = layer.get_base_layer().weight
    if not isinstance(weight, DTensor):
        return
    by_outputs = weight.placements[0] == Shard(0)
    for matrix in (layer.lora_B if by_outputs else layer.lora_A).values():
        parallelize_module(matrix, weight.device_mesh, _style(BY_OUTPUTS if by_outputs else BY_INPUTS), src_data_rank=None)
        if not by_outputs:
            matrix.register_forward_hook(_added_up)


def whole(tree: Any) -> Any:
    """A tree of dictionaries, lists, tensors and plain values with every part made whole, in host memory."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().detach().cpu().contiguous()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def parts_of(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors with this rank's parts of those whose namesakes are divided."""
    return {name: _part(tensor, like.get(name)) for name, tensor in tensors.items()}


def state_parts(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimizer state with this rank's parts of what belongs to divided parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_each = {index: {name: _part(value, parameters[index]) for name, value in values.items()} for index, values in state["state"].items()}
    return state | {"state": of_each}


def _part(value: Any, like: Tensor | None) -> Any:
    """A rank's part of a tensor, if `like` is one of a tensor of the same shape."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Divided ones and whole ones apart, empty lists left out: one operation over many tensors takes no mixture."""
    kinds: tuple[list[Tensor], list[Tensor]] = [], []
    for tensor in tensors:
        kinds[0 if isinstance(tensor, DTensor) else 1].append(tensor)
    return [kind for kind in kinds if kind]


def clip_grad_norm_(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """As torch's function of that name, over whole and divided parameters; the same on every rank."""
    kinds = by_kind(parameter for parameter in parameters if parameter.grad is not None)
    if len(kinds) <= 1 and not isinstance(kinds[0][0] if kinds else None, DTensor):
        return nn.utils.clip_grad_norm_(parameters, most)
    norms = [nn.utils.get_total_norm([one.grad for one in kind if one.grad is not None]) for kind in kinds]
    norm = torch.linalg.vector_norm(torch.stack([one.full_tensor() if isinstance(one, DTensor) else one for one in norms]))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm
