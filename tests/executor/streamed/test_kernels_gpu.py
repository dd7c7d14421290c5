"""Library kernels on a GPU against the textbook: whole and in merged parts, grouped heads, windows, odd lengths, views as inputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from elite.executor.streamed.choose import CHOICES, fastest, rates
from elite.executor.streamed.kernels import KERNELS, AttentionShape, Kernel, merge
from tests.executor.streamed.dense import NAMES, Five, dense, random, relative

pytestmark = pytest.mark.gpu

LIMIT = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 2e-3}
"""2-norms: a few roundings of the inputs' dtype; fp32 may be multiplied as TF32."""
LIBRARIES = [name for name in KERNELS if name != "math"]


def usable(name: str, shape: AttentionShape) -> Kernel:
    reason = KERNELS[name].supports(shape, torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return KERNELS[name]


def compare(found: Five, expected: Five, dtype: torch.dtype) -> None:
    for name, got, right in zip(NAMES, found, expected, strict=True):
        assert got.isfinite().all(), name
        assert relative(got, right) < (1e-3 if name == "lse" else LIMIT[dtype]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 8, 64), (8, 2, 128), (6, 1, 80), (4, 2, 256)])
@pytest.mark.parametrize(
    ("n", "m", "causal", "window"),
    [
        (512, 512, True, None),
        (333, 333, True, None),
        (256, 900, True, None),
        (256, 900, False, None),
        (300, 70, False, None),
        (256, 700, True, 100),
        (333, 333, True, 40),
        (1, 500, False, None),
        (2, 2, True, None),
    ],
)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_kernel_is_attention(
    name: str, n: int, m: int, causal: bool, window: int | None, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    kernel = usable(name, AttentionShape(heads, kv_heads, dim, dtype, window))
    tensors = do, q, k, v = random(n, m, heads, kv_heads, dim, dtype, "cuda")
    scale = dim**-0.5
    o, lse = kernel.forward(q, k, v, causal, window, scale)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (heads, n), torch.float32)
    gradients = kernel.backward(do, q, k, v, o, lse, causal, window, scale)
    compare((o, lse, *gradients), dense(*tensors, causal, window, scale), dtype)


@pytest.mark.parametrize("name", LIBRARIES)
def test_one_token_attends_to_itself(name: str) -> None:
    kernel = usable(name, AttentionShape(8, 2, 64, torch.float16))
    do, q, k, v = random(1, 1, 8, 2, 64, torch.float16, "cuda")
    o, lse = kernel.forward(q, k, v, True, None, 0.125)
    dq, dk, dv = kernel.backward(do, q, k, v, o, lse, True, None, 0.125)
    assert torch.equal(o, v.repeat_interleave(4, dim=1))
    assert relative(lse, (q.double() * k.repeat_interleave(4, dim=1).double()).sum(-1).t() * 0.125) < 1e-3
    assert relative(dv, do.double().unflatten(1, (2, 4)).sum(2)) < LIMIT[torch.float16]
    # One key has no say in its weight, so that what remains of dq and dk is rounding.
    assert dq.abs().max() < 1e-2 and dk.abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["tokens_first", "heads_first", "sliced"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_merged_parts_are_the_whole(name: str, layout: str, dtype: torch.dtype) -> None:
    kernel = usable(name, AttentionShape(8, 2, 64, dtype))
    tensors = random(256, 900, 8, 2, 64, dtype, "cuda")
    expected = dense(*tensors, True, None, 0.125)
    do, q, k, v = (laid_out(t, layout) for t in tensors)
    parts = [(644, 900, True), (0, 256, False), (256, 644, False)]
    o, lse = kernel.forward(q, k[644:], v[644:], True, None, 0.125)
    for first, stop, _ in parts[1:]:
        o, lse = merge(o, lse, *kernel.forward(q, k[first:stop], v[first:stop], False, None, 0.125))
    dq, dk, dv = (torch.zeros(t.shape, device="cuda") for t in (q, k, v))
    for first, stop, causal in parts:
        more, dk[first:stop], dv[first:stop] = kernel.backward(do, q, k[first:stop], v[first:stop], o, lse, causal, None, 0.125)
        dq += more
    compare((o, lse, dq, dk, dv), expected, dtype)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides: as projections, rotary embeddings and packed projections leave them."""
    if layout == "heads_first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.cat([t, t], dim=1)[:, : t.shape[1]] if layout == "sliced" else t


def test_layouts_of_o_and_do_may_change_between_calls() -> None:
    kernel = usable("cudnn", AttentionShape(8, 2, 64, torch.bfloat16))
    tensors = do, q, k, v = random(512, 512, 8, 2, 64, torch.bfloat16, "cuda")
    expected = dense(*tensors, True, None, 0.125)
    o, lse = kernel.forward(q, k, v, True, None, 0.125)
    for layout in ("tokens_first", "heads_first", "sliced"):
        gradients = kernel.backward(laid_out(do, layout), q, k, v, laid_out(o, layout), lse, True, None, 0.125)
        compare((o, lse, *gradients), expected, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 512])
def test_the_choice_is_a_library_kernel_that_is_remembered(window: int | None, tmp_path: Path) -> None:
    shape = AttentionShape(8, 2, 64, torch.float16, window)
    device = torch.device("cuda")
    if all(KERNELS[name].supports(shape, device) for name in LIBRARIES):
        pytest.skip("no library kernel attends this shape here")
    before = torch.cuda.get_rng_state()
    kernel = fastest(shape, device, tmp_path, 2048, 8192)
    assert kernel.name in LIBRARIES
    assert torch.equal(torch.cuda.get_rng_state(), before)
    written = (tmp_path / CHOICES).read_text()
    assert fastest(shape, device, tmp_path, 2048, 8192) is kernel
    assert (tmp_path / CHOICES).read_text() == written
    assert all(rate > 0 for rate in rates(shape, device, kernel, 2048, 8192).values())
