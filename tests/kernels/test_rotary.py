"""The kernel and its reference against fp64 and transformers' own rotation; under the interpreter on a CPU, in a process of its own."""

import pytest
import torch
from torch import Tensor

from elite.kernels.rotary import reference
from tests.kernels.interpreter import run_interpreted

# Rows, tokens, query heads, key heads, values of a head, values that are turned, rows of angles.
SHAPES = [(2, 5, 4, 2, 16, 16, 1), (1, 7, 3, 3, 80, 32, 1), (3, 4, 9, 3, 24, 6, 3), (1, 1, 1, 1, 2, 2, 1), (1, 0, 2, 1, 8, 4, 1)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k, cos, sin and what arrives at both."""
    rows, tokens, heads, kv_heads, dim, turned, angle_rows = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, tokens, heads, dim), (rows, tokens, kv_heads, dim)]
    q, k, dq, dk = (torch.randn(size, generator=generator) for size in (*sizes, *sizes))
    angles = 50 * torch.rand(angle_rows, tokens, turned // 2, generator=generator).repeat(1, 1, 2)
    return [t.to(dtype).to(device) for t in (q, k, angles.cos(), angles.sin(), dq, dk)]


def test_reference_is_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin, *_ = inputs(SHAPES[0], torch.float64)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(reference.rotary(q, k, cos, sin), expected)


def check_kernel(device: str) -> None:
    from elite.kernels.rotary.kernel import rotary

    for shape in SHAPES:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            q, k, cos, sin, *upstream = inputs(shape, dtype, device)
            leaves = [t.double().requires_grad_() for t in (q, k)]
            exact = reference.rotary(leaves[0], leaves[1], cos.double(), sin.double())
            right = [*exact, *torch.autograd.grad(exact, leaves, [t.double() for t in upstream])]
            own = [t.clone().requires_grad_() for t in (q, k)]
            # Heads inside wider rows, as a fused projection would leave them; what lies beside must stay.
            wide = [torch.cat([t, t + 1], -1) for t in own]
            narrow = [t[..., : t.shape[-1] // 2] for t in wide]
            made = rotary(narrow[0], narrow[1], cos, sin, spend=True)
            # Attention's own layout for what comes back, then that of projections.
            back = [t.clone().transpose(1, 2).contiguous().transpose(1, 2) for t in upstream]
            got = [*made, *torch.autograd.grad(made, own, back, retain_graph=True)]
            assert all(torch.equal(a, b) for a, b in zip(back, upstream, strict=True) if not a.is_contiguous())
            spent = [t.clone() for t in upstream]
            assert all(map(torch.equal, torch.autograd.grad(made, own, spent), got[2:]))
            assert all(map(torch.equal, spent, got[2:]))
            for name, a, b in zip(("q", "k", "dq", "dk"), got, right, strict=True):
                assert a.dtype is dtype and a.shape == b.shape, name
                torch.testing.assert_close(a.detach().double(), b.detach(), rtol=tolerance, atol=tolerance)
            for t, start, out in zip(wide, (q, k), made, strict=True):
                assert torch.equal(t[..., start.shape[-1] :], start + 1)
                assert out.data_ptr() == t.data_ptr()


def check_refusals(device: str) -> None:
    from elite.kernels.rotary.kernel import rotary

    q, k, cos, sin, *_ = inputs(SHAPES[0], torch.float32, device)
    with pytest.raises(ValueError, match="side by side"):
        rotary(q.transpose(2, 3), k, cos, sin)
    with pytest.raises(ValueError, match="cannot be turned"):
        rotary(q[..., :8], k[..., :8], cos, sin)
    upstream = torch.ones_like(q), torch.ones_like(k)
    torch.autograd.grad(rotary(q.requires_grad_() * 1, k.requires_grad_() * 1, cos, sin), (q, k), upstream)
    assert all(bool((t == 1).all()) for t in upstream)
    kept = (q * 1).exp()
    rotary(kept, k, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


@pytest.mark.parametrize("check", ["check_kernel", "check_refusals"])
def test_kernel_in_the_interpreter(check: str) -> None:
    run_interpreted("tests.kernels.test_rotary", check)


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    check_kernel("cuda")
    check_refusals("cuda")
