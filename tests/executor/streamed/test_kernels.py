"""Attention kernels on a CPU: plain products against the textbook, parts against the whole, what libraries say they lack."""

import pytest
import torch
from torch import Tensor

from elite.executor.streamed.kernels import KERNELS, AttentionShape, merge
from elite.executor.streamed.math_kernel import Math
from tests.executor.streamed.dense import NAMES, Five, dense, random, relative

SCALE = 0.3
CASES = [
    pytest.param(16, 16, 4, 4, True, None, id="square"),
    pytest.param(13, 29, 6, 2, True, None, id="bottom_right"),
    pytest.param(13, 29, 6, 1, True, 5, id="window"),
    pytest.param(17, 17, 4, 2, True, 1, id="window_of_one"),
    pytest.param(9, 31, 4, 2, True, 100, id="window_beyond_all"),
    pytest.param(11, 23, 4, 2, False, None, id="unmasked"),
    pytest.param(23, 11, 4, 2, False, None, id="fewer_keys"),
    pytest.param(1, 1, 2, 1, True, None, id="one_token"),
]


def whole(kernel: Math, do: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Five:
    o, lse = kernel.forward(q, k, v, causal, window, SCALE)
    return o, lse, *kernel.backward(do, q, k, v, o, lse, causal, window, SCALE)


def assert_equal(found: Five, expected: Five) -> None:
    """Up to the rounding of fp64."""
    for name, got, right in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12, msg=f"{name} differs by {(got - right).abs().max():.1e}")


@pytest.mark.parametrize("tile", [1, 60, 1000, 2**23])
@pytest.mark.parametrize(("n", "m", "heads", "kv_heads", "causal", "window"), CASES)
def test_math_is_attention(n: int, m: int, heads: int, kv_heads: int, causal: bool, window: int | None, tile: int) -> None:
    tensors = do, q, k, v = random(n, m, heads, kv_heads, 8, torch.float64)
    found = whole(Math(tile), do, q, k, v, causal, window)
    assert_equal(found, dense(*tensors, causal, window, SCALE))


def test_math_holds_one_tile_at_a_time() -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    do, q, k, v = random(64, 256, 4, 2, 2, torch.float32)
    with Watch():
        whole(Math(512), do, q, k, v, True, None)
    assert sizes and max(sizes) <= max(512, k.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_math_computes_in_fp32(dtype: torch.dtype) -> None:
    do, q, k, v = random(33, 70, 4, 2, 16, dtype)
    o, lse, *gradients = whole(Math(), do, q, k, v, True, None)
    expected = dense(do, q, k, v, True, None, SCALE)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    # o is rounded to the inputs' dtype and enters the gradients through δ; L is not.
    rounding = 4 * torch.finfo(dtype).eps
    for name, got, right in zip(NAMES, (o, lse, *gradients), expected, strict=True):
        assert relative(got, right) < (1e-6 if name == "lse" else rounding), name


def test_autocast_does_not_round_the_reference() -> None:
    do, q, k, v = random(33, 70, 4, 2, 16, torch.float32)
    plain = whole(Math(), do, q, k, v, True, None)
    with torch.autocast("cpu", torch.bfloat16):
        cast = whole(Math(), do, q, k, v, True, None)
    for name, got, expected in zip(NAMES, cast, plain, strict=True):
        assert torch.equal(got, expected), name


def test_merged_parts_are_the_whole() -> None:
    tensors = do, q, k, v = random(13, 40, 4, 2, 8, torch.float64)
    kernel = Math()
    parts = [(27, 40, True), (0, 10, False), (10, 27, False)]
    o, lse = kernel.forward(q, k[27:], v[27:], True, None, SCALE)
    for first, stop, _ in parts[1:]:
        o, lse = merge(o, lse, *kernel.forward(q, k[first:stop], v[first:stop], False, None, SCALE))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first, stop, causal in parts:
        more, dk[first:stop], dv[first:stop] = kernel.backward(do, q, k[first:stop], v[first:stop], o, lse, causal, None, SCALE)
        dq += more
    assert_equal((o, lse, dq, dk, dv), dense(*tensors, True, None, SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    o_a, o_b, *_ = random(50, 50, 3, 3, 8, dtype)
    lse_a, lse_b = (5 * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    a, b = ((t.double() - torch.logaddexp(lse_a.double(), lse_b.double())).exp().t()[..., None] for t in (lse_a, lse_b))
    o, lse = merge(o_a, lse_a, o_b, lse_b)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    exact = o_a.double() * a + o_b.double() * b
    # Half a unit in the last place of the result, and what fp32 adds where the two parts nearly cancel.
    bound = 0.5 * torch.finfo(dtype).eps * exact.abs() + 1e-6 * (o_a.double() * a).abs().maximum((o_b.double() * b).abs()) + 1e-7
    assert ((o.double() - exact).abs() <= bound).all()
    torch.testing.assert_close(lse.double(), torch.logaddexp(lse_a.double(), lse_b.double()))


def test_merge_with_a_part_of_no_weight() -> None:
    o_a, o_b, *_ = random(5, 5, 2, 2, 4, torch.float32)
    far = torch.full((2, 5), 200.0)
    for a, b, expected in ((far, -far, o_a), (-far, far, o_b)):
        o, lse = merge(o_a, a, o_b, b)
        assert torch.equal(o, expected) and torch.equal(lse, far)


def test_library_kernels_say_what_they_need() -> None:
    shape = AttentionShape(heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    reasons = {name: kernel.supports(shape, torch.device("cpu")) for name, kernel in KERNELS.items()}
    assert reasons.pop("math") is None
    assert set(reasons) == {"cudnn", "flash", "flash_attn", "efficient"}
    assert set(reasons.values()) == {"runs on CUDA GPUs alone"}


@pytest.mark.parametrize(
    ("name", "capability", "change", "reason"),
    [
        ("cudnn", (9, 0), {}, None),
        ("cudnn", (9, 0), {"window": 128}, "has no sliding window"),
        ("cudnn", (9, 0), {"head_dim": 256}, "takes head dimensions that are multiples of 8 up to 128, not 256"),
        ("cudnn", (7, 5), {"dtype": torch.float16}, "needs compute capability 8.0 for float16; this GPU has 7.5"),
        ("flash", (8, 6), {"window": 128, "head_dim": 256}, None),
        ("flash", (8, 6), {"dtype": torch.float32}, "does not take float32"),
        ("flash", (8, 6), {"head_dim": 36}, "takes head dimensions that are multiples of 8 up to 256, not 36"),
        ("flash_attn", (8, 6), {}, "flash-attn is not installed"),
        ("efficient", (7, 5), {"dtype": torch.float16}, None),
        ("efficient", (7, 5), {}, "needs compute capability 8.0 for bfloat16; this GPU has 7.5"),
        ("efficient", (8, 6), {"window": 128}, "has no sliding window"),
    ],
)
def test_limits(
    name: str, capability: tuple[int, int], change: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    shape = AttentionShape(**{"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16, **change})  # type: ignore[arg-type]
    assert KERNELS[name].supports(shape, torch.device("cuda")) == reason


def test_cudnn_says_that_it_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    torch.use_deterministic_algorithms(True)
    try:
        reason = KERNELS["cudnn"].supports(AttentionShape(8, 2, 64, torch.bfloat16), torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert reason == "has no deterministic backward"
