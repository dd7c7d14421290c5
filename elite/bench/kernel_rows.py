"""Cases without matrix products: the streamed executor's sums over groups of heads, merged attention and boundaries as bytes; weights of
four bits."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from elite.bench.kernel_case import DTYPE, FORWARD, Call, Case, Geometry, Make, total, values
from elite.executor.streamed.encoding import Int4, Int8
from elite.kernels.dequantise.reference import BLOCK, Packed
from elite.kernels.dequantise.reference import dequantised as dequantised_by_torch
from elite.kernels.group_sum.reference import group_sum as summed_by_torch
from elite.kernels.merge.reference import merge as merged_by_torch


def group_sum(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """Gradients of keys by query head, added to fp32 sums of each key head; only where heads share keys."""
    if g.heads == g.kv_heads:
        return
    more = values(tokens, g.heads, g.head_dim, device=device, trained=False)
    base = values(tokens, g.kv_heads, g.head_dim, device=device, trained=False, dtype=torch.float32)
    out = torch.empty_like(base)

    def eager(more: Tensor, base: Tensor, out: Tensor) -> Tensor:
        summed_by_torch(more, base, out)
        return out

    def ours() -> Call:
        from elite.kernels.group_sum.kernel import group_sum

        def call(more: Tensor, base: Tensor, out: Tensor) -> Tensor:
            group_sum(more, base, out)
            return out

        return call

    moved = {FORWARD: total(more, base, out)}
    yield Case("group_sum", g, tokens, (more, base, out), lambda: eager, eager, ours, moved=moved, passes=(FORWARD,), in_place=True)


def merge(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """Attention over two sets of keys from attention over each."""
    o_a, o_b = (values(tokens, g.heads, g.head_dim, device=device, trained=False) for _ in range(2))
    lse_a, lse_b = (values(g.heads, tokens, device=device, trained=False, dtype=torch.float32) for _ in range(2))
    inputs = (o_a, lse_a, o_b, lse_b)

    def ours() -> Call:
        from elite.kernels.merge.kernel import merge

        return merge

    moved = {FORWARD: total(*inputs) + total(o_a, lse_a)}
    yield Case("merge", g, tokens, inputs, lambda: merged_by_torch, merged_by_torch, ours, moved=moved, passes=(FORWARD,))


def pack(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """Boundaries to bytes and back, 8 and 4.5 bits a value; the plain form goes tile by tile, so it is not compiled."""
    x = values(tokens, g.hidden, device=device, trained=False)
    for name, encoding in (("int8", Int8()), ("int4", Int4())):
        rows = torch.empty(tokens, encoding.row_bytes(g.hidden, DTYPE), dtype=torch.uint8, device=device)
        encoding.encode(x, rows)
        moved = {FORWARD: total(x, rows)}
        for way, inputs in (("encode", (x, torch.empty_like(rows))), ("decode", (rows,))):
            plain, kernel = (partial(_packing, module, f"{way}_{name}", g.hidden) for module in ("reference", "kernel"))
            yield Case(
                *("pack", g, tokens, inputs, partial(_itself, plain), plain, partial(_itself, kernel)),
                variant=f"{name} {way}",
                moved=moved,
                passes=(FORWARD,),
                in_place=True,
                compiles=False,
            )


def dequantise(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """Weights of four bits, as bitsandbytes packs them, made whole; where rows are of whole blocks."""
    if g.hidden % BLOCK:
        return
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, width in (("q", g.heads * g.head_dim), ("up", g.mlp)):
        matrix = values(width, g.hidden, device=device, trained=False)
        q, state = quantize_4bit(matrix, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        packed = Packed(q, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset)
        out = torch.empty_like(matrix)

        def eager(*packed_and_out: Tensor) -> Tensor:
            *packed, out = packed_and_out
            return dequantised_by_torch(Packed(*packed), out)

        def ours() -> Call:
            from elite.kernels.dequantise.kernel import dequantised

            return lambda *packed_and_out: dequantised(Packed(*packed_and_out[:-1]), packed_and_out[-1])

        others: dict[str, Make] = {"bitsandbytes": partial(_itself, partial(_by_bitsandbytes, dequantize_4bit, q, state))}
        case = Case("dequantise", g, tokens, (*packed, out), lambda: eager, eager, ours, variant=name, others=others)
        yield replace(case, moved={FORWARD: total(*packed, out)}, passes=(FORWARD,), in_place=True)


def _by_bitsandbytes(function: Call, q: Tensor, state: Any, *_: Tensor) -> Tensor:
    whole: Tensor = function(q, state)
    return whole


def _itself(call: Call) -> Call:
    """It imports what it needs when it is called."""
    return call


def _packing(module: str, name: str, width: int, source: Tensor, out: Tensor | None = None) -> Tensor:
    """Call `name` of elite.kernels.pack.`module`."""
    function = getattr(import_module(f"elite.kernels.pack.{module}"), name)
    if out is None:
        decoded: Tensor = function(source, width, DTYPE)
        return decoded
    # What is stored is that of half-precision values.
    function(source.to(DTYPE), out)
    return out
