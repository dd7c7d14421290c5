"""The executor that a plan names, around a loaded model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from elite.distributed.exchange import Exchange
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.ring import Ring
from elite.executor.contract import Executor
from elite.executor.streamed.attach import Attached, attach
from elite.executor.streamed.choose import fastest
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.kernels import KERNELS, AttentionShape, Kernel
from elite.executor.whole import WholeExecutor
from elite.facts import Device
from elite.model import LoadedModel
from elite.optimizations.fused_loss import FusedLoss
from elite.optimizations.ring_attention import Variant
from elite.streaming import Streaming, WeightPlace

RING_TILE = 4096
"""Queries and keys with which attention kernels are timed for ranks that share sequences: beyond, rates hardly change."""


@dataclass(frozen=True)
class Executors:
    """What trains, what validates, and the streamed model behind both, if it is one."""

    training: Executor
    validation: Executor
    attached: Attached | None
    sharing: Exchange | None = None
    """What brings both the keys and values of batches that ranks share; None where each has its own."""


def streams_weights(layout: Streaming | None) -> bool:
    """Whether frozen weights stay in host memory when the model is loaded."""
    return layout is not None and layout.weights is WeightPlace.streamed


def build(
    loaded: LoadedModel,
    layout: Streaming | None,
    dtype: torch.dtype,
    device: Device,
    ranks: Any,
    cache: Path,
    shared: Variant | None = None,
    wrapped: Callable[[LoadedModel], torch.nn.Module] | None = None,
) -> Executors:
    """Executors for training and for validation.

    Args:
        layout: of the streamed executor; None is the whole one.
        dtype: of matrix products.
        device: what is emulated decides which attention kernels may run.
        ranks: this process among those that carry other sequences.
        cache: folder where kernel choices are remembered.
        shared: how ranks exchange keys and values of the sequences that they share; None: each has its own.
        wrapped: around the model, what exchanges gradients; unset: DDP if there are several ranks.
    """
    attached = None
    if layout is not None:

        def choice(shape: AttentionShape) -> Kernel:
            # In the chunks of the moment: where memory ran out they have become smaller.
            now = attached.runner.layout if attached is not None else layout
            return fastest(shape, ranks.device, cache, now.chunk, now.block, kernels_of(device))

        attached = attach(loaded.model, layout, ranks.device, choice)
    model = (wrapped or (_in_parallel if ranks.world > 1 else _bare))(loaded)
    # Validation runs on the bare model: DDP would wait for ranks that have fewer targets.
    validated = model if gradient_exchange(model).divides_weights else loaded.model
    if layout is not None:
        exchange = None if shared is None else Exchange(ranks, shared, dist.new_group())
        return Executors(StreamedExecutor(model, dtype, exchange), StreamedExecutor(validated, dtype, exchange), attached, exchange)
    # Groups of their own: gradients are exchanged meanwhile.
    sharing = None if shared is None else ring(shared, device, ranks, cache, dist.new_group())
    return Executors(whole(loaded, dtype, model, sharing), whole(loaded, dtype, validated, sharing), None, sharing)


def _in_parallel(loaded: LoadedModel) -> torch.nn.Module:
    # Gradients lie where they are exchanged: nobody copies what comes back, one parameter after another.
    return DistributedDataParallel(loaded.model, broadcast_buffers=False, gradient_as_bucket_view=True)


def _bare(loaded: LoadedModel) -> torch.nn.Module:
    model: torch.nn.Module = loaded.model
    return model


def whole(loaded: LoadedModel, dtype: torch.dtype, wrapped: torch.nn.Module | None = None, sharing: Ring | None = None) -> WholeExecutor:
    """The whole executor around a loaded model, or around what wraps it."""
    return WholeExecutor(loaded.model if wrapped is None else wrapped, dtype, FusedLoss.name in loaded.applied, sharing)


def ring(variant: Variant, device: Device, ranks: Ranks, cache: Path, group: dist.ProcessGroup | None = None) -> Ring:
    """Attention between all ranks, with the fastest kernel here; `group` as in `Exchange`."""

    def choice(shape: AttentionShape) -> Kernel:
        return fastest(shape, ranks.device, cache, RING_TILE, RING_TILE, kernels_of(device))

    return Ring(ranks, choice, variant, group)


def kernels_of(device: Device) -> list[str]:
    """Names of the attention kernels that run on this device: a larger one may stand in for it."""
    has = device.compute_capability
    return [name for name, kernel in KERNELS.items() if has is None or kernel.capability <= has]
