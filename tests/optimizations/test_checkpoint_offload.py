"""Layer inputs in host memory: same gradients, nothing of them left on the device, safe against odd backward passes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from elite.executor.whole import WholeExecutor
from elite.optimizations.checkpoint_offload import CheckpointOffload
from elite.optimizations.functions.offload import HostShelf
from elite.optimizations.gradient_checkpointing import GradientCheckpointing
from tests.models import tiny
from tests.test_attention import row


def offloaded(forward: Callable[..., Any], shelf: HostShelf) -> Callable[..., Any]:
    """`forward`, checkpointed, with its input on `shelf`."""

    def run(*args: Any) -> Any:
        with saved_tensors_hooks(shelf.pack, shelf.unpack):
            return checkpoint(forward, *args, use_reentrant=False)

    return run


def offload(model: Any) -> None:
    assert CheckpointOffload(CheckpointOffload.Config(enabled=True)).apply(model).count == 2


def gradients(model: Any, *seeds: int) -> dict[str, Tensor]:
    model.zero_grad()
    executor = WholeExecutor(model, torch.float32)
    torch.stack([executor.loss_sum(row(13, 24, seed=seed)) for seed in seeds]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_gradients_are_those_of_plain_checkpointing(kind: str, seeds: tuple[int, ...]) -> None:
    plain, kept = tiny(kind), tiny(kind)
    GradientCheckpointing(GradientCheckpointing.Config(enabled=True)).apply(plain)
    offload(kept)
    expected = gradients(plain, *seeds)
    for name, gradient in gradients(kept, *seeds).items():
        assert torch.equal(gradient, expected[name]), name


def test_dropout_repeats_in_the_recomputation() -> None:
    plain, kept = tiny("phi", resid_pdrop=0.5), tiny("phi", resid_pdrop=0.5)
    offload(kept)
    torch.manual_seed(5)
    expected = gradients(plain, 1)
    torch.manual_seed(5)
    for name, gradient in gradients(kept, 1).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("offloads", [True, False])
def test_the_originals_are_gone_after_the_forward(offloads: bool) -> None:
    model, inputs = tiny("llama"), []
    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(lambda _module, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    (CheckpointOffload if offloads else GradientCheckpointing)(CheckpointOffload.Config(enabled=True)).apply(model)
    loss = WholeExecutor(model, torch.float32).loss_sum(row(13, 24))
    gc.collect()
    assert [storage() is None for storage in inputs] == [offloads, offloads]
    loss.backward()


def test_a_graph_may_be_used_twice() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    shelf = HostShelf(2)
    layers = [offloaded(torch.nn.Linear(4, 4).forward, shelf) for _ in range(3)]
    out = x
    for layer in layers:
        out = layer(out).tanh()
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), x)
    assert first.any() and torch.equal(first, second)


@pytest.mark.gpu
def test_inputs_leave_the_gpu() -> None:
    """Sixteen layers whose work is long enough to hide the copies keep two inputs there, and the gradient stays exact."""
    tokens, width, depth = 8192, 1024, 16
    torch.manual_seed(0)
    linears = [torch.nn.Linear(width, width).cuda() for _ in range(depth)]
    x = torch.randn(tokens, width, device="cuda", requires_grad=True)

    def run(layers: list[Any]) -> tuple[Tensor, int]:
        out = x
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for layer in layers:
            out = layer(out)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        return gradient, held

    def block(linear: Any) -> Any:
        return lambda h: torch.tanh(linear(torch.tanh(linear(h))))

    expected, _ = run([block(linear) for linear in linears])
    shelf = HostShelf(2)
    for _ in range(3):
        got, held = run([offloaded(block(linear), shelf) for linear in linears])
        assert torch.equal(got, expected)
        assert held <= 3.1 * x.nbytes
