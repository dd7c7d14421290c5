"""The kernel and its reference against fp64 and torch's own norms; under the interpreter on a CPU, in a process of its own."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elite.kernels.norm import reference
from tests.kernels.interpreter import run_interpreted

SHAPES = [(5, 80), (2, 37, 129), (1, 1), (0, 16), (3, 5000)]
EPS = 1e-5


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) + 0.5 for name in ("x", "residual", "dy", "dh")}
    made |= {name: torch.randn(shape[-1], generator=generator) for name in ("weight", "bias")}
    # What each dtype can hold, so that all compute from the same values.
    return {name: t.to(dtype).to(device) for name, t in made.items()}


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor], center: bool, adds: bool, has_bias: bool, trains: bool
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    names = ["x", *(["residual"] if adds else []), *(["weight", *(["bias"] if has_bias else [])] if trains else [])]
    leaves = {name: t.detach().requires_grad_(name in names) for name, t in given.items()}
    y, h = function(leaves["x"], leaves["weight"], leaves["bias"] if has_bias else None, EPS, center, leaves["residual"] if adds else None)
    outputs, upstream = ([y, h], [given["dy"], given["dh"]]) if adds else ([y], [given["dy"]])
    found = torch.autograd.grad(outputs, [leaves[name] for name in names], upstream)
    return {"y": y.detach(), **({"h": h.detach()} if adds else {}), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_reference_is_torchs(shape: tuple[int, ...]) -> None:
    t = inputs(shape, torch.float64)
    y, h = reference.norm(t["x"], t["weight"], t["bias"], EPS, True, t["residual"])
    torch.testing.assert_close(h, t["x"] + t["residual"])
    torch.testing.assert_close(y, F.layer_norm(h, shape[-1:], t["weight"], t["bias"], EPS))
    y, h = reference.norm(t["x"], t["weight"], None, EPS, False)
    assert h is t["x"]
    torch.testing.assert_close(y, F.rms_norm(h, shape[-1:], t["weight"], EPS))


def check_kernel(device: str) -> None:
    from elite.kernels.norm.kernel import norm

    every = list(itertools.product([False, True], repeat=4))
    # A GPU compiles each combination: all of them for one shape, and a few for the others.
    for shape, flags in [(SHAPES[0], flags) for flags in every] + list(itertools.product(SHAPES[1:], every[::5])):
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 4e-3)):
            given = inputs(shape, dtype, device)
            # h is stored in x's dtype, and everything follows from what is stored.
            stored = given | (_rounded(given) if flags[1] else {})
            exact = gradients(reference.norm, {name: t.double() for name, t in stored.items()}, *flags)
            for name, got in gradients(norm, given, *flags).items():
                assert got.dtype is dtype and got.shape == exact[name].shape, name
                torch.testing.assert_close(got.double(), exact[name], rtol=tolerance, atol=tolerance * 4)


def _rounded(given: dict[str, Tensor]) -> dict[str, Tensor]:
    h = given["x"] + given["residual"]
    return {"x": h, "residual": torch.zeros_like(h)}


def check_wide_residual(device: str) -> None:
    """What a half-precision block adds leaves an fp32 residual stream in fp32; gradients come in each input's dtype."""
    from elite.kernels.norm.kernel import norm

    t = inputs((6, 40), torch.float32, device)
    x, residual = t["x"].half().requires_grad_(), t["residual"].requires_grad_()
    y, h = norm(x, t["weight"], t["bias"], EPS, True, residual)
    assert y.dtype is torch.float16 and h.dtype is torch.float32
    torch.testing.assert_close(h, x.float() + residual)
    got = torch.autograd.grad([y, h], [x, residual], [t["dy"].half(), t["dh"]])
    assert [g.dtype for g in got] == [torch.float16, torch.float32]
    right, total = reference.norm(x.float(), t["weight"], t["bias"], EPS, True, residual)
    exact = torch.autograd.grad([right, total], [residual], [t["dy"].half().float(), t["dh"]])[0]
    torch.testing.assert_close(got[1], exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[0], exact.half(), rtol=2e-3, atol=2e-3)


def check_strides(device: str) -> None:
    from elite.kernels.norm.kernel import MOST_WIDTH, norm

    t = inputs((6, 40), torch.float32, device)
    expected, _ = reference.norm(t["x"].t(), t["weight"][:6], None, EPS, False)
    got, _ = norm(t["x"].t(), t["weight"][:6], None, EPS, False)
    torch.testing.assert_close(got, expected)
    wide, _ = norm(t["x"].half(), t["weight"], None, EPS, True, dtype=torch.float32)
    assert wide.dtype is torch.float32
    torch.testing.assert_close(wide, reference.norm(t["x"].half().float(), t["weight"], None, EPS, True)[0])
    with pytest.raises(ValueError, match="at most"):
        norm(torch.empty(0, MOST_WIDTH + 1), torch.empty(MOST_WIDTH + 1), None, EPS, False)


@pytest.mark.parametrize("check", ["check_kernel", "check_wide_residual", "check_strides"])
def test_kernel_in_the_interpreter(check: str) -> None:
    run_interpreted("tests.kernels.test_norm", check)


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    check_kernel("cuda")
    check_wide_residual("cuda")
    check_strides("cuda")
