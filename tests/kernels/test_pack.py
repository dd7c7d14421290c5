"""The kernels against their reference: the same bytes, and each reads the other's; in the interpreter on a CPU, in a process of its own."""

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from elite.kernels.pack import reference
from tests.kernels.interpreter import run_interpreted

KINDS = ("int8", "int4")
WIDTHS = (1, 2, 3, 7, 64, 65, 576, 577, 1000, 2560)
FEW_WIDTHS = (1, 3, 64, 65, 577, 2560)
"""A single value, one group and a little more, bytes with and without padding, more values than are decoded at once."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SENTINEL = 0xA5


def values(width: int, dtype: torch.dtype) -> Tensor:
    """Rows of several kinds, one of each."""
    generator = torch.Generator().manual_seed(width)
    gaussian = torch.randn(5, width, generator=generator)
    channels = torch.linspace(-2.5, 2.5, width).exp() ** 1.5
    gaussian[1] *= channels[torch.randperm(width, generator=generator)]
    gaussian[2, width // 2] = -25_000.0
    # Far from 1, but neither subnormal nor infinite in any dtype.
    gaussian[3] *= 2.0**13
    gaussian[4] *= 2.0**-8
    # The last one's scale lies halfway between two numbers of bf16; then values halfway between two codes.
    constants = torch.tensor([0.0, 3.0, -0.001, 65504.0, 127 * (1 + 3 / 256)])[:, None].expand(5, width)
    ties = (torch.arange(width) % 9 - 4) / 2
    ties[::64] = 127.0
    return torch.cat([gaussian, constants, ties[None]]).to(dtype)


def row_bytes(kind: str, width: int) -> int:
    return int(getattr(reference, f"{kind}_row_bytes")(width))


def encoded(pack: ModuleType, kind: str, x: Tensor) -> Tensor:
    """Rows written into the middle of a larger tensor, of which nothing else may change."""
    around = torch.full((len(x) + 2, row_bytes(kind, x.shape[1]) + 8), SENTINEL, dtype=torch.uint8, device=x.device)
    rows = around[1:-1, 4:-4]
    getattr(pack, f"encode_{kind}")(x, rows)
    written = rows.clone()
    rows.fill_(SENTINEL)
    assert (around == SENTINEL).all()
    return written


def decoded(pack: ModuleType, kind: str, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    x = getattr(pack, f"decode_{kind}")(rows, width, dtype)
    assert x.dtype is dtype and x.shape == (len(rows), width)
    return x.cpu()


def check_finite(device: str, widths: Sequence[int] = FEW_WIDTHS) -> None:
    from elite.kernels.pack import kernel

    cases = [(width, dtype) for dtype in DTYPES for width in (widths if dtype is torch.float32 else widths[::-3])]
    for (width, dtype), kind in itertools.product(cases, KINDS):
        x, case = values(width, dtype), (width, dtype, kind)
        expected, rows = encoded(reference, kind, x), encoded(kernel, kind, x.to(device)).cpu()
        differs = (rows != expected).any(1)
        # Sums in another order may move a step of the 4.5-bit code by a rounding; the 8-bit code has none.
        assert not differs.any() or (kind == "int4" and device == "cuda"), case
        wide = x.double()
        here, there = (decoded(reference, kind, each, width, torch.float32).double() for each in (rows, expected))
        assert ((here - wide).norm(dim=1) <= 1.001 * (there - wide).norm(dim=1))[differs].all(), case
        for each in (rows, expected) if differs.any() else (rows,):
            found, wanted = decoded(kernel, kind, each.to(device), width, dtype), decoded(reference, kind, each, width, dtype)
            # The interpreter cuts bf16 off instead of rounding.
            tolerance = 2**-7 if dtype is torch.bfloat16 and device == "cpu" else 0
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0, msg=str(case))


def check_every_width(device: str) -> None:
    check_finite(device, WIDTHS)


def check_not_finite(device: str) -> None:
    """Rows that are not finite stay visible, each to itself, and their bytes within their row."""
    from elite.kernels.pack import kernel

    for width, dtype, kind in itertools.product((1, 65, 576, 2560) if device == "cuda" else (1, 65, 2560), DTYPES[:2], KINDS):
        plain = values(width, dtype)[:3]
        x = plain.repeat(3, 1)
        x[3, 0], x[4, width // 2], x[5, width - 1] = float("inf"), float("nan"), -float("inf")
        if dtype is torch.float32:
            # Its sum is not finite, though its values are.
            x[5] = 3e38 if width > 1 and kind == "int4" else float("inf")
        rows = encoded(kernel, kind, x.to(device))
        alone = encoded(kernel, kind, plain.to(device))
        assert torch.equal(rows[:3], alone) and torch.equal(rows[6:], alone)
        for pack, given in ((kernel, rows), (reference, rows.cpu())):
            back = decoded(pack, kind, given, width, dtype)
            assert not back[3:6].isfinite().all(1).any(), (width, dtype, kind)
            assert back[:3].isfinite().all() and back[6:].isfinite().all()
            assert kind == "int8" or back[3:6].isnan().all()
        assert torch.equal(encoded(reference, kind, x), rows.cpu())


def check_layouts(device: str) -> None:
    """Rows and values that are not contiguous, not aligned, none, or too wide."""
    from elite.kernels.pack import kernel

    base = values(577, torch.float32).to(device)
    for kind, x in itertools.product(KINDS, (base[:2, 1:], base[:2].t().contiguous().t(), base[::8, ::2], base[1:2].expand(2, 577))):
        expected = encoded(kernel, kind, x.contiguous())
        assert torch.equal(encoded(kernel, kind, x), expected)
        width, size = x.shape[1], expected.shape[1]
        back = decoded(kernel, kind, expected, width, x.dtype)
        # A column of bytes more, then rows of bytes that begin nowhere near a word, then bytes apart.
        for shape, part in (
            ((len(x), size + 1), slice(1, None)),
            ((len(x), size + 4), slice(4, None)),
            ((len(x), 2 * size), slice(0, None, 2)),
        ):
            rows = torch.full(shape, SENTINEL, dtype=torch.uint8, device=device)[:, part]
            getattr(kernel, f"encode_{kind}")(x, rows)
            assert torch.equal(rows, expected)
            assert torch.equal(decoded(kernel, kind, rows, width, x.dtype), back)
        assert encoded(kernel, kind, x[:0]).shape == (0, size)
        assert decoded(kernel, kind, expected[:0], width, x.dtype).shape == (0, width)
    widest = values(kernel.MOST_WIDTH, torch.float32)[1:2]
    for kind in KINDS:
        rows = encoded(kernel, kind, widest.to(device))
        back = decoded(kernel, kind, rows, kernel.MOST_WIDTH, torch.float32)
        assert torch.equal(back, decoded(reference, kind, rows.cpu(), kernel.MOST_WIDTH, torch.float32))
        assert (back - widest).norm() < 0.05 * widest.norm()
    with pytest.raises(ValueError, match="at most"):
        kernel.encode_int4(torch.empty(0, kernel.MOST_WIDTH + 1), torch.empty(0, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at most"):
        kernel.decode_int4(torch.empty(0, 4, dtype=torch.uint8), kernel.MOST_WIDTH + 1, torch.float32)


@pytest.mark.parametrize(
    "check", ["check_finite", pytest.param("check_every_width", marks=pytest.mark.slow), "check_not_finite", "check_layouts"]
)
def test_kernels_in_the_interpreter(check: str) -> None:
    run_interpreted("tests.kernels.test_pack", check)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_every_width, check_not_finite, check_layouts])
def test_kernels_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_offsets_beyond_32_bits(kind: str) -> None:
    from elite.kernels.pack import kernel

    width = 2048
    distinct = torch.randn(7, width, device="cuda", dtype=torch.float16)
    size = row_bytes(kind, width)
    # More values, and more bytes, than 32 bits count.
    n = 2**31 // size + 7
    x = distinct.repeat(n // 7 + 1, 1)
    rows = torch.empty(len(x), size, dtype=torch.uint8, device="cuda")
    getattr(kernel, f"encode_{kind}")(x, rows)
    assert torch.equal(rows[-7:], rows[:7])
    del x
    back = getattr(kernel, f"decode_{kind}")(rows, width, torch.float16)
    assert torch.equal(back[-7:], back[:7])
    assert torch.equal(back[:7].cpu(), decoded(reference, kind, rows[:7].cpu(), width, torch.float16))
