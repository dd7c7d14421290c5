"""Every kernel compiles for every generation of GPUs, in each dtype that generation has, and fits its shared memory."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from elite import kernels
from elite.kernels.cross_entropy import kernel as cross_entropy
from elite.kernels.dequantise import kernel as dequantise
from elite.kernels.dequantise import reference as packed
from elite.kernels.gate import kernel as gate
from elite.kernels.group_sum import kernel as group_sum
from elite.kernels.launch import UNFUSED
from elite.kernels.merge import kernel as merge
from elite.kernels.norm import kernel as norm
from elite.kernels.pack import kernel as pack
from elite.kernels.residual import kernel as residual
from elite.kernels.rotary import kernel as rotary
from elite.kernels.running_loss import kernel as running_loss
from elite.loss_tiles import MOST_WORDS
from tests.kernels.offline import SHARED_BYTES, Launch, shared_kib


def strides(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i64")


def parted(sizes: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What is compiled in, and the number of warps."""
    return {name: value for name, value in sizes.items() if name != "num_warps"}, {"num_warps": sizes["num_warps"]}


def launches(dtype: str) -> Iterator[Launch]:
    """Each kernel as the models of `conf/model` would launch it."""
    for head_dim, columns in ((64, 64), (80, 128), (128, 128)):
        yield Launch(
            merge._kernel,
            {**dict.fromkeys(("o_a", "o_b", "o"), f"*{dtype}"), **dict.fromkeys(("lse_a", "lse_b", "lse"), "*fp32"), "queries": "i64"}
            | strides("a_query", "a_head", "b_query", "b_head", "out_query", "out_head"),
            {"HEAD_DIM": head_dim, "COLUMNS": columns, "ROWS": merge.ROWS},
        )
        for has_base in (False, True):
            sizes, warps = parted(group_sum.sizes(head_dim))
            yield Launch(
                group_sum._kernel,
                {"more": f"*{dtype}", "base": "*fp32", "out": "*fp32", "keys": "i64"}
                | strides("more_key", "more_head", "base_key", "base_head", "out_key", "out_head"),
                {**sizes, "HEAD_DIM": head_dim, "HAS_BASE": has_base, "GROUP": 4},
                warps,
            )
    yield from norm_launches(dtype)
    yield from gate_launches(dtype)
    yield from rotary_launches(dtype)
    yield from residual_launches(dtype)
    yield from pack_launches(dtype)
    yield from running_loss_launches(dtype)
    yield Launch(
        dequantise._kernel,
        dict.fromkeys(("q", "s"), "*u8")
        | dict.fromkeys(("code", "scales", "coarse", "offset"), "*fp32")
        | {"out": f"*{dtype}"}
        | strides("blocks", "inputs", "stride"),
        {"BLOCK": packed.BLOCK, "COARSE": packed.COARSE, "BLOCKS": dequantise.BLOCKS},
        {"num_warps": dequantise.WARPS, **UNFUSED},
    )
    for gradient in (False, True):
        yield Launch(
            cross_entropy._kernel,
            {"logits": f"*{dtype}", "labels": "*i64", "losses": "*fp32", "smoothing": "fp32", "z_loss": "fp32"}
            | strides("row_stride", "vocab", "ignore_index"),
            {"GRADIENT": gradient, "BLOCK": cross_entropy.BLOCK},
            {"num_warps": cross_entropy.WARPS},
        )


def norm_launches(dtype: str) -> Iterator[Launch]:
    for width, center in ((576, False), (2560, True), (4096, False)):
        flags = {"CENTER": center, "HAS_BIAS": center, "ADDS": True}
        rows = dict.fromkeys(("x", "residual", "y", "h", "dy", "dh", "dx"), f"*{dtype}") | dict.fromkeys(("mean", "scale"), "*fp32")
        weights = {"weight": f"*{dtype}", "bias": f"*{dtype}", "dw": "*fp32", "db": "*fp32", "eps": "fp32"}
        types = rows | weights | {"width": "i32", "rows": "i64", "tiles_each": "i32"}
        sizes, warps = parted(norm.sizes(width, norm.FORWARD_VALUES, norm.TILE))
        yield Launch(norm._forward, types, flags | sizes, warps)
        for trains in (False, True):
            sizes, warps = parted(norm.sizes(width, norm.BACKWARD_VALUES, norm.TILE if trains else 1))
            yield Launch(norm._backward, types, flags | sizes | {"TRAINS": trains}, warps)


def gate_launches(dtype: str) -> Iterator[Launch]:
    rows = dict.fromkeys(("gate", "up", "out", "upstream", "d_gate", "d_up", "x", "bias"), f"*{dtype}") | {"count": "i64", "width": "i64"}
    gated, options = {"BLOCK": gate.SWIGLU_BLOCK}, {"num_warps": gate.WARPS}
    yield Launch(gate._swiglu_forward, rows, gated, options)
    yield Launch(gate._swiglu_backward, rows, gated, options)
    for backward in (False, True):
        yield Launch(gate._gelu, rows, {"BLOCK": gate.GELU_BLOCK} | {"BACKWARD": backward, "HAS_BIAS": True}, options)


def rotary_launches(dtype: str) -> Iterator[Launch]:
    types = dict.fromkeys(("q", "k", "q_out", "k_out", "cos", "sin"), f"*{dtype}") | {"tokens": "i64"}
    for name in ("q", "k", "q_out", "k_out"):
        types |= strides(f"{name}_row", f"{name}_token", f"{name}_head")
    types |= strides("angle_row", "angle_token")
    for heads, kv_heads, half, rest in ((32, 4, 16, 48), (32, 8, 64, 0), (9, 3, 32, 0)):
        for backward, copies in ((False, False), (True, False), (True, True)):
            sizes, warps = parted(rotary.sizes(heads, kv_heads, half, rest))
            yield Launch(rotary._kernel, types, sizes | {"BACKWARD": backward, "COPIES": copies}, warps)


def residual_launches(dtype: str) -> Iterator[Launch]:
    types = dict.fromkeys(("residual", "first", "second", "out"), f"*{dtype}") | {"count": "i64", "p": "fp32"}
    types |= strides("seed_first", "seed_second")
    for drops, backward, parts in ((False, False, 1), (True, False, 2), (True, True, 2)):
        flags = {"PARTS": parts, "DROPS": drops, "BACKWARD": backward, "LANES": residual.LANES}
        yield Launch(residual._kernel, types, flags, {"num_warps": residual.WARPS})


def running_loss_launches(dtype: str) -> Iterator[Launch]:
    types = dict.fromkeys(("logits", "bias", "weight", "gradient"), f"*{dtype}") | {"labels": "*i64", "smoothing": "fp32", "z_loss": "fp32"}
    types |= dict.fromkeys(("state", "sums", "mean", "losses"), "*fp32")
    types |= strides("row_stride", "first", "count", "tokens", "width", "vocab", "ignore_index")
    for sums, first in ((False, True), (True, True), (True, False)):
        sizes, warps = parted(running_loss.sizes(MOST_WORDS))
        flags = {"HAS_BIAS": True, "SMOOTH": True, "SUMS": sums, "FIRST": first, "BLOCK": running_loss.BLOCK}
        yield Launch(running_loss._absorb, types, sizes | flags, warps)
    for gradient in (False, True):
        flags = {"GRADIENT": gradient, "SMOOTH": True, "BLOCK": running_loss.BLOCK}
        yield Launch(running_loss._finish, types, flags, {"num_warps": running_loss.WARPS})


def pack_launches(dtype: str) -> Iterator[Launch]:
    bits = "i32" if dtype == "fp32" else "i16"
    signature = {"x": f"*{dtype}", "ends": f"*{bits}", "words": "*i32", "halves": "*i16", "scales": "*i16", "codes": "*i8", "low": "*u8"}
    signature |= dict.fromkeys(("width", "groups", "row_bytes", "row_words", "scale_bytes", "low_bytes", "room"), "i32")
    signature |= strides("x_stride", "row_stride")
    signature |= dict.fromkeys(("least", "finer", "coarser", "edge"), "fp32") | {"count": "i64"}
    yield Launch(pack._encode_int8, signature, {"TILE": pack.TILE}, UNFUSED)
    yield Launch(pack._decode_int8, signature, {"TILE": pack.TILE})
    yield Launch(pack._decode_int4, signature, {"WORDS": pack.WORDS, "VALUES": pack.VALUES})
    for width in (576, 2560, 4096):
        sizes, warps = parted(pack._sizes(width))
        yield Launch(pack._encode_int4, signature, sizes, warps | UNFUSED)


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_kernels_fit(dtype: str, capability: int) -> None:
    if dtype == "bf16" and capability < 80:
        pytest.skip("has no bf16")
    for launch in launches(dtype):
        assert shared_kib(launch, capability) <= SHARED_BYTES[capability], launch


def test_no_kernel_is_left_out() -> None:
    modules = [f"elite.kernels.{path.parent.name}.kernel" for path in Path(next(iter(kernels.__path__))).glob("*/kernel.py")]
    named = {launch.kernel.fn.__module__ for launch in launches("fp32")}
    assert modules and set(modules) == named
    for module in modules:
        assert importlib.import_module(module).__doc__
