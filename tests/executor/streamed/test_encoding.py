"""Rows of bytes give the values back: exactly, or within what each encoding promises."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elite.executor.streamed import encoding
from elite.executor.streamed.encoding import ENCODINGS
from elite.streaming import BoundaryEncoding

EXACT, INT8, INT4 = BoundaryEncoding.exact, BoundaryEncoding.int8, BoundaryEncoding.int4
LOSSY = (INT8, INT4)
Rows = Callable[[int, int], Tensor]
WIDTHS = (1, 2, 3, 7, 21, 22, 63, 64, 65, 576, 577, 1000)


def encoded(kind: BoundaryEncoding, x: Tensor) -> Tensor:
    # Old bytes must not shine through.
    rows = torch.full((x.shape[0], ENCODINGS[kind].row_bytes(x.shape[1], x.dtype)), 0xA5, dtype=torch.uint8, device=x.device)
    ENCODINGS[kind].encode(x, rows)
    return rows


def there_and_back(kind: BoundaryEncoding, x: Tensor) -> Tensor:
    return ENCODINGS[kind].decode(encoded(kind, x), x.shape[1], x.dtype)


def gaussian(n: int, width: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(width))


def heavy_tailed(n: int, width: int) -> Tensor:
    """A few channels hold most of the energy, as in a trained model."""
    channels = torch.linspace(-2.5, 2.5, width).exp() ** 1.5
    return gaussian(n, width) * channels[torch.randperm(width, generator=torch.Generator().manual_seed(1))]


def relative_error(kind: BoundaryEncoding, x: Tensor) -> float:
    return ((there_and_back(kind, x) - x).norm(dim=1) / x.norm(dim=1)).square().mean().sqrt().item()


def reference_steps(row: list[float], room: int) -> list[float]:
    """One row rounded to the finest of many steps whose quotients fit into `room`, by trying them all."""
    total = sum(map(abs, row))
    step = total / (5 * len(row) + 2 * room)
    while True:
        codes = [round(value / step) for value in row]
        if sum((2 * c if c >= 0 else -2 * c - 1) // 4 for c in codes) <= room:
            return [c * step for c in codes]
        step *= 1.002


def reference_decode(row: Tensor, width: int) -> list[float]:
    """A 4.5-bit row read value by value."""
    step = row[:2].clone().view(torch.bfloat16).item()
    low_bytes = -(-width // 4)
    bits = [byte >> i & 1 for byte in row[2 + low_bytes :].tolist() for i in range(8)]
    values, position = [], 0
    for i in range(width):
        quotient = 0
        while not bits[position]:
            quotient, position = quotient + 1, position + 1
        position += 1
        folded = 4 * quotient + (int(row[2 + i // 4]) >> 2 * (i % 4) & 3)
        values.append(step * (folded // 2 if folded % 2 == 0 else -(folded + 1) // 2))
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_exact_is_bit_identical(width: int, dtype: torch.dtype) -> None:
    x = gaussian(5, width).to(dtype)
    x[0, 0], x[1, 0], x[2, 0] = float("nan"), float("inf"), -0.0
    back = there_and_back(EXACT, x)
    assert back.dtype is dtype and torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("width", [576, 1536, 2560, 4096])
@pytest.mark.parametrize(("kind", "bits"), [(EXACT, 16), (INT8, 8.3), (INT4, 4.5)])
def test_bits_a_value(kind: BoundaryEncoding, bits: float, width: int) -> None:
    assert 8 * ENCODINGS[kind].row_bytes(width, torch.bfloat16) / width <= bits


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_rows_are_aligned(kind: BoundaryEncoding) -> None:
    assert all(ENCODINGS[kind].row_bytes(width, torch.bfloat16) % 4 == 0 for width in range(1, 600))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_int8_is_within_half_a_step(make: Rows, width: int) -> None:
    x = make(9, width)
    back = there_and_back(INT8, x)
    for start in range(0, width, 64):
        group = slice(start, start + 64)
        half = x[:, group].abs().amax(1, keepdim=True) / 127 / 2
        # The scale is rounded to bf16: 2⁻⁹ of the value besides.
        assert ((back - x)[:, group].abs() <= half * 1.01 + x[:, group].abs() * 2**-8).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_int4_reads_as_its_layout_says(make: Rows, width: int) -> None:
    rows = encoded(INT4, make(3, width))
    back = ENCODINGS[INT4].decode(rows, width, torch.float32)
    assert back.tolist() == [pytest.approx(reference_decode(row, width), rel=1e-6) for row in rows]


@pytest.mark.parametrize("width", [64, 576, 577, 1000])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_int4_takes_the_finest_step_that_fits(make: Rows, width: int) -> None:
    x = make(4, width)
    back = there_and_back(INT4, x)
    room = 8 * (ENCODINGS[INT4].row_bytes(width, x.dtype) - 2 - -(-width // 4)) - width
    reference = torch.tensor([reference_steps(row, room) for row in x.tolist()])
    assert ((back - x).norm(dim=1) <= 1.02 * (reference - x).norm(dim=1)).all()


@pytest.mark.parametrize(
    ("kind", "make", "limit"), [(INT8, gaussian, 0.008), (INT8, heavy_tailed, 0.012), (INT4, gaussian, 0.065), (INT4, heavy_tailed, 0.05)]
)
@pytest.mark.parametrize("width", [576, 1536, 2560])
def test_relative_error(kind: BoundaryEncoding, make: Rows, limit: float, width: int) -> None:
    assert relative_error(kind, make(16, width)) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LOSSY)
def test_zeros_stay_and_constants_survive(kind: BoundaryEncoding, dtype: torch.dtype) -> None:
    x = torch.zeros(4, 577, dtype=dtype)
    x[1:] = torch.tensor([3.0, -0.001, torch.finfo(torch.float16).max], dtype=dtype)[:, None]
    back = there_and_back(kind, x)
    assert back.dtype is dtype and torch.equal(back[0], x[0]) and torch.isfinite(back).all()
    torch.testing.assert_close(back, x, rtol=0.01, atol=0)


def test_a_row_of_zeros_is_coded_as_zeros() -> None:
    row = encoded(INT4, torch.zeros(1, 577))[0]
    assert not row[: 2 + 145].any() and reference_decode(row, 577) == [0.0] * 577


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("exponent", [-80, -40, 40, 80])
def test_rows_of_any_size_are_treated_alike(kind: BoundaryEncoding, exponent: int) -> None:
    x = heavy_tailed(5, 576)
    assert torch.equal(there_and_back(kind, x * 2.0**exponent), there_and_back(kind, x) * 2.0**exponent)


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("size", [50.0, 25_000.0, -1e6])
def test_a_huge_outlier_survives(kind: BoundaryEncoding, size: float) -> None:
    x = gaussian(3, 576)
    x[1, 100] = size
    back = there_and_back(kind, x)
    assert back[1, 100].item() == pytest.approx(size, rel=0.01)
    # Its neighbours in the chunk don't notice.
    assert torch.equal(back[[0, 2]], there_and_back(kind, x[[0, 2]]))


@pytest.mark.parametrize("kind", LOSSY)
def test_what_is_not_finite_stays_visible(kind: BoundaryEncoding) -> None:
    x = gaussian(3, 576)
    x[0, 5], x[1, 5] = float("nan"), float("inf")
    back = there_and_back(kind, x)
    assert not torch.isfinite(back[0]).all() and not torch.isfinite(back[1]).all()
    assert torch.equal(back[2], there_and_back(kind, x[2:])[0])


@pytest.mark.parametrize("kind", ENCODINGS)
def test_rows_are_independent_and_repeatable(kind: BoundaryEncoding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk gives the same bytes as its rows one by one, whatever the tiles; reading may start anywhere."""
    x = heavy_tailed(11, 576)
    rows = encoded(kind, x)
    back = ENCODINGS[kind].decode(rows, 576, x.dtype)
    monkeypatch.setattr(encoding, "TILE_VALUES", 4 * 576)
    assert torch.equal(encoded(kind, x), rows) and torch.equal(ENCODINGS[kind].decode(rows, 576, x.dtype), back)
    for i in range(11):
        assert torch.equal(encoded(kind, x[i : i + 1])[0], rows[i])
        assert torch.equal(ENCODINGS[kind].decode(rows[i : i + 1], 576, x.dtype)[0], back[i])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ENCODINGS)
def test_the_gpu_is_not_waited_for(kind: BoundaryEncoding) -> None:
    x = heavy_tailed(300, 2560)
    on_device, rows = x.cuda(), encoded(kind, x[:300]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ENCODINGS[kind].encode(on_device, rows)
        back = ENCODINGS[kind].decode(rows, 2560, x.dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Sums in another order may round a step to its neighbour.
    torch.testing.assert_close(back.cpu(), there_and_back(kind, x), rtol=0.01, atol=0.01 * x.abs().max().item())
