"""The kernels and their references against fp64; under the interpreter on a CPU, in a process of its own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elite.kernels.gate import reference
from tests.kernels.interpreter import run_interpreted

SHAPES = [(3, 80), (2, 3, 1111), (0, 16)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Two inputs, a bias, what arrives."""
    generator = torch.Generator().manual_seed(0)
    made = [3 * torch.randn(size, generator=generator) for size in (shape, shape, shape[-1:], shape)]
    return [t.to(dtype).to(device) for t in made]


def results(function: Callable[..., Tensor], given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def test_references_are_transformers() -> None:
    from transformers.activations import ACT2FN

    x, y, bias, _ = inputs((3, 80), torch.float64, "cpu")
    torch.testing.assert_close(reference.gelu_tanh(x, bias), ACT2FN["gelu_new"](x + bias))
    torch.testing.assert_close(reference.swiglu(x, y), ACT2FN["silu"](x) * y)


def check_that_inputs_are_spent_once(device: str) -> None:
    """Gradients lie where intermediate inputs lay, never where a leaf lies, and nobody reads them as inputs again."""
    from elite.kernels.gate import kernel

    x, y, _, upstream = inputs((7, 80), torch.float32, device)
    for name, given in (("swiglu", [x, y]), ("gelu_tanh", [x])):
        right = results(getattr(reference, name), given, upstream)[1:]
        leaves = [t.clone().requires_grad_() for t in given]
        between = [leaf * 1 for leaf in leaves]
        out = getattr(kernel, name)(*between)
        got = torch.autograd.grad(out, between, upstream, retain_graph=True)
        for one, place, exact in zip(got, between, right, strict=True):
            torch.testing.assert_close(one, exact)
            assert one.data_ptr() == place.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out, between, upstream)
        out = getattr(kernel, name)(*leaves)
        torch.autograd.grad(out, leaves, upstream)
        assert all(torch.equal(leaf, t) for leaf, t in zip(leaves, given, strict=True))
    leaf = x.clone().requires_grad_()
    (both,) = torch.autograd.grad(kernel.swiglu(twice := leaf * 1, twice), leaf, upstream)
    torch.testing.assert_close(both, sum(results(reference.swiglu, [x, x], upstream)[1:]))


def check_kernels(device: str) -> None:
    from elite.kernels.gate import kernel

    for shape in SHAPES:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
            x, y, bias, upstream = inputs(shape, dtype, device)
            for name, given in (("swiglu", [x, y]), ("gelu_tanh", [x]), ("gelu_tanh", [x, bias])):
                exact = results(getattr(reference, name), [t.double() for t in given], upstream.double())
                for got, right in zip(results(getattr(kernel, name), given, upstream), exact, strict=True):
                    assert got.dtype is dtype and got.isfinite().all()
                    torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=4 * tolerance)
    check_that_inputs_are_spent_once(device)
    x, y, _, upstream = (t.to(device) for t in inputs((7, 80), torch.float32, device))
    torch.testing.assert_close(kernel.swiglu(x.t(), y.t()), F.silu(x.t()) * y.t())
    big = torch.tensor([-300.0, 300.0, 1e30], device=device)
    torch.testing.assert_close(kernel.gelu_tanh(big), F.gelu(big, approximate="tanh"))


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("tests.kernels.test_gate", "check_kernels")


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    check_kernels("cuda")
