"""The bytes that mixed precision is said to keep, against what autograd keeps."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from elite.facts import LinearShape
from elite.optimizations.contract import Estimate, OptimizationConfig, Step
from elite.optimizations.mixed_precision import MixedPrecision
from tests.optimizations.test_all import FACTS, SHAPE

VALUES = 4096
PLAIN_MLP = (LinearShape("self_attn.q_proj", 32, 32), LinearShape("mlp.fc1", 32, 64), LinearShape("mlp.fc2", 64, 32))


def kept_bytes(function: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Bytes of distinct storages that autograd saves for a bf16 input of `VALUES` values."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == VALUES:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive = torch.randn(VALUES, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(alive)
        assert result.requires_grad
        return sum(kept.values())


def gelu_new(power: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """GELU by its tanh formula (transformers' `gelu_new`), the power taken in `power`, as CUDA's autocast does in fp32."""
    return lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x.to(power), 3.0))))


def test_gelu_under_cuda_autocast_keeps_six_bytes_more_a_value() -> None:
    extra = (kept_bytes(gelu_new(torch.float32)) - kept_bytes(gelu_new(torch.bfloat16))) / VALUES
    cpu = replace(FACTS, model=replace(SHAPE, model_type="phi", layer_linears=PLAIN_MLP))
    cuda = replace(cpu, device=replace(cpu.device, kind="cuda"))
    step = MixedPrecision(OptimizationConfig(enabled=True)).memory(Step(Estimate()), cpu)
    on_cpu, on_cuda = (step.form.activation(step.sizes(facts, 1)).saved for facts in (cpu, cuda))
    assert on_cuda - on_cpu == extra * SHAPE.intermediate_size
    assert extra == 6
