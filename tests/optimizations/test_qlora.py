"""QLoRA beyond what all optimizations share."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from elite.model import apply_stage
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.contract import OptimizationConfig, Stage
from elite.optimizations.functions.four_bit import FourBitLinear
from tests.models import tiny
from tests.optimizations.test_all import FACTS


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_the_residual_stream_keeps_the_compute_dtype(kind: str) -> None:
    """Norms answer in fp32 under autocast; packed linear maps must not pass that on, or every kept activation doubles."""
    model = tiny(kind, hidden_size=64).bfloat16()
    apply_stage(Stage.model, decide(OptimizationsConfig(qlora=OptimizationConfig(enabled=True)), FACTS), model)
    torch.nn.Module.to(model, torch.device("cpu"))
    dtypes = []
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.arange(16)[None], documents=((16,),), use_cache=False)
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_packed_maps_stay_close_to_their_originals() -> None:
    plain, packed = tiny("llama", hidden_size=64), tiny("llama", hidden_size=64)
    applied = apply_stage(Stage.model, decide(OptimizationsConfig(qlora=OptimizationConfig(enabled=True)), FACTS), packed)
    assert applied["qlora"].count == 2 * 7
    torch.nn.Module.to(packed, torch.device("cpu"))
    ids = torch.arange(30)[None]
    one, two = (model(input_ids=ids, documents=((30,),), use_cache=False).logits for model in (plain, packed))
    assert 0 < (one - two).norm() / one.norm() < 0.2


def test_gradients_pass_after_an_evaluation() -> None:
    """On CPUs with bf16 instructions bitsandbytes would go over to a layout for inference alone, and stay there."""
    model = tiny("llama", hidden_size=64)
    apply_stage(Stage.model, decide(OptimizationsConfig(qlora=OptimizationConfig(enabled=True)), FACTS), model)
    torch.nn.Module.to(model, torch.device("cpu"))
    linear = model.get_decoder().layers[0].mlp.up_proj
    x = torch.randn(5, 64, requires_grad=True)
    (before,) = torch.autograd.grad(linear(x).square().sum(), x)
    with torch.no_grad():
        linear.eval()(x.detach())
    (after,) = torch.autograd.grad(linear.train()(x).square().sum(), x)
    assert before.any() and torch.equal(after, before)


def check_product(device: str, dtype: torch.dtype, biased: bool) -> None:
    """Forward and backward against bitsandbytes, of more rows than it has a kernel of its own for, and without gradients."""
    made, results = [], []
    for kind in (Linear4bit, FourBitLinear):
        torch.manual_seed(0)
        linear = kind(320, 192, biased, compute_dtype=dtype, quant_type="nf4")
        linear.weight = Params4bit(linear.weight.data.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True)
        made.append(linear.to(device))
    x = torch.randn(2, 1024, 320, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for linear in made:
        leaf = x.clone().requires_grad_()
        out = linear(leaf)
        with torch.no_grad():
            again, few = linear(x), linear(x[:, :8])
        results.append((out, again, few, *torch.autograd.grad(out.float().square().sum(), leaf)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_bitsandbytes(biased: bool) -> None:
    check_product("cpu", torch.float32, biased)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
def test_products_on_a_gpu_are_those_of_bitsandbytes(biased: bool) -> None:
    check_product("cuda", torch.bfloat16, biased)
