"""Errors of bf16 gradients, streamed and ordinary, on a pretrained model and real code: `python -m elite.bench.gradients FILE`.

The reference is the ordinary backward in fp32, its attention by plain products, its loss in fp64. Against it stand the whole executor
in bf16 and the streamed one in several layouts, on the same weights (frozen ones as bf16 rounds them) and the same rows. The gradients
g_r of a tensor on rows r have the relative error sqrt(Σ ‖g_r − ref_r‖² / Σ ‖ref_r‖²); a streamed layout is as good as the ordinary pass
where the ratio of the two errors is about 1.

How far two right computations differ by chance is measured too: the ordinary pass a second time, whose kernels add up in another order,
and the ordinary pass with another attention kernel. Where a tensor's gradients nearly cancel, its error is a few roundings, and their
ratio to other roundings is mostly chance: as many tensors should then lie below 1 / 1.1 as lie above 1.1.
"""

import gc
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from elite import geometry, hardware
from elite.bench import text
from elite.bench.assemble import write
from elite.config import AdapterMethod, RunConfig
from elite.console import console
from elite.data.batches import IGNORE, Batch, TrainStream
from elite.data.tokens import TokenStore
from elite.distributed.ranks import Ranks, joined
from elite.errors import DataError
from elite.executor.build import build
from elite.executor.contract import Executor
from elite.model import LoadedModel, load
from elite.optimizations import decide
from elite.optimizations.ring_attention import Variant
from elite.plan import facts_of
from elite.runfolder import environment
from elite.streaming import Keep, Place, Streaming, WeightPlace
from elite.training.step import accumulate, make_scaler

ORDINARY = ("optimizations=none", "optimizations.flash_attention.enabled=true", "optimizations.gradient_checkpointing.enabled=true")
"""Nothing but the executor differs between the bf16 passes."""
REFERENCE_ATTENTION = "elite_bench_reference"
REFERENCE_QUERIES = 1024
"""Queries whose scores exist at once in the reference."""
ADAPTER_SPREAD = 0.02
"""Standard deviation of the adapters' entries. Fresh ones have B = 0, and with it no gradient for A."""
WORSE = 1.1
"""Ratio of errors above which a tensor is counted; below its inverse likewise."""


Gradients = dict[str, Tensor]
"""By parameter."""


@dataclass(frozen=True)
class Errors:
    """Of one way of computing, over all rows."""

    loss: float
    """Mean over the rows, nats."""
    of: dict[str, float]
    """Relative error by tensor."""


@dataclass(frozen=True)
class Bench:
    """What all passes of one comparison share."""

    config: RunConfig
    dtype: torch.dtype
    """Of matrix products and frozen weights."""
    batches: tuple[Batch, ...]
    """One row each."""
    ranks: Ranks

    def reference(self) -> list[tuple[float, Gradients]]:
        """Loss and gradients of every row in fp32, on the weights that the others have."""
        loaded = self.loaded("whole")
        loaded.model.float()
        loaded.core.set_attn_implementation(REFERENCE_ATTENTION)
        return list(self._rows(loaded, ReferenceExecutor(loaded.model), torch.float32))

    def loaded(self, executor: str) -> LoadedModel:
        """The model as a run under this executor has it, on the device."""
        config = self.config
        facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), executor)
        torch.manual_seed(config.seed)
        loaded = load(config, decide(config.optimizations, facts), self.dtype, self.ranks.device)
        if loaded.model is not loaded.core:
            _spread(loaded.trainable, config.seed)
        return loaded

    def errors(
        self, loaded: LoadedModel, layout: Streaming | None, reference: list[tuple[float, Gradients]], shared: Variant | None = None
    ) -> Errors:
        """Of the ordinary pass, or of the streamed one in a layout; the model is left as it was.

        Args:
            shared: how all ranks exchange keys and values of each row; None: a row is one rank's.
        """
        cache = Path(self.config.output.cache).expanduser()
        executors = build(loaded, layout, self.dtype, hardware.device(self.config.hardware), self.ranks, cache, shared)
        try:
            return errors(self._rows(loaded, executors.training, self.dtype, shared is not None), reference)
        finally:
            if executors.attached is not None:
                executors.attached.undo()
            _free(self.ranks.device)

    def _rows(self, loaded: LoadedModel, executor: Executor, dtype: torch.dtype, shared: bool = False) -> Iterator[tuple[float, Gradients]]:
        for whole in self.batches:
            batch = whole.shared(self.ranks.rank, self.ranks.world) if shared else whole
            loss = accumulate(executor, [batch], make_scaler(self.ranks.device, dtype), self.ranks)
            yield loss, {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
            loaded.model.zero_grad(set_to_none=True)


class ReferenceExecutor:
    """The ordinary pass in fp32 without autocast, its loss in fp64: over 49,152 classes torch's fp32 one errs by 1e-5 on a CPU.

    Args:
        model: attends to a row as one document.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Sum of the token losses in nats, fp64 scalar. See `elite.executor.contract`; all positions are scored."""
        assert keep is None
        logits = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return F.cross_entropy(logits.double().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")


def compare(config: RunConfig, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """Full fine-tuning and LoRA; what the file gets.

    Args:
        config: `tier.context` is the length of a row.
        dtype: of all passes but the reference.
        rows: over which errors are taken.

    Raises:
        DataError: the repository has too few documents of that length.
    """
    # On some GPUs PyTorch may be told to multiply fp32 as TF32; the reference must not.
    torch.set_float32_matmul_precision("highest")
    batches, runs = full_rows(text.tokens(config), config, rows), []
    with joined() as ranks:
        for method in (AdapterMethod.full, AdapterMethod.lora):
            adapted = replace(config, adapter=replace(config.adapter, method=method))
            runs.append({"adapter": method.value, **_compared(Bench(adapted, dtype, batches, ranks))})
    return {
        "environment": environment(),
        "device": hardware.device(config.hardware).name,
        "model": {"name": config.model.name, "weights": config.model.weights.value, "lora_rank": config.adapter.rank},
        "context": config.tier.context,
        "rows": rows,
        "trained_positions": config.model.max_position_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        "runs": runs,
    }


def full_rows(store: TokenStore, config: RunConfig, count: int) -> tuple[Batch, ...]:
    """The first rows of the training stream that are one document from end to end.

    Raises:
        DataError: there are fewer.
    """
    context, found = config.tier.context, []
    stream = TrainStream(store, config.data, context, 1, config.seed, packed=True)
    for _ in range(stream.sequences_per_epoch):
        (batch,) = stream.next_window(1)
        if batch.documents == ((context,),):
            found.append(batch)
        if len(found) == count:
            return tuple(found)
    raise DataError(
        f"{config.data.repo} fills {len(found)} rows of {context:,} tokens, {count} are asked for",
        "a larger repository, a shorter --context or fewer --rows",
    )


def layouts(tokens: int, adapter: AdapterMethod) -> list[Streaming]:
    """The row as one chunk, which nothing is merged in; chunks that divide it and such that don't, with everything kept in turn.

    Keys and values in host memory besides; with adapters, weights too.
    """
    even, odd = tokens // 4, tokens * 3 // 10
    found = [
        Streaming(tokens, tokens, Keep.attention),
        Streaming(even, 2 * even, Keep.attention),
        Streaming(even, odd, Keep.layers, keys_values=Place.host),
        Streaming(odd, 2 * even, Keep.sqrt),
        Streaming(odd, odd, Keep.multilevel, slots=3, keys_values=Place.host),
    ]
    return [replace(layout, weights=WeightPlace.streamed) for layout in found] if adapter is AdapterMethod.lora else found


def _compared(bench: Bench) -> dict[str, Any]:
    adapter, tokens, device = bench.config.adapter.method, bench.config.tier.context, bench.ranks.device
    reference = bench.reference()
    _free(device)
    loaded = bench.loaded("whole")
    ordinary = bench.errors(loaded, None, reference)
    yardsticks = {"repeated": against(ordinary, bench.errors(loaded, None, reference))}
    with _another_kernel(device, bench.dtype):
        yardsticks["other_kernel"] = against(ordinary, bench.errors(loaded, None, reference))
    del loaded
    _free(device)
    loss = statistics.fmean(loss for loss, _ in reference)
    whole = {"loss": ordinary.loss, "worst_error": max(ordinary.of.values()), "median_error": statistics.median(ordinary.of.values())}
    console.print(f"{adapter.value}: {len(ordinary.of)} tensors, loss {loss:.6f}; whole: loss {ordinary.loss:.6f}, {_words(whole)}")
    for name, found in yardsticks.items():
        console.print(f"  {name}: {_words(found)}")
    loaded, lines = bench.loaded("streamed"), []
    for layout in layouts(tokens, adapter):
        found = against(ordinary, bench.errors(loaded, layout, reference))
        lines.append({"layout": layout.to_dict(), "divides": tokens % layout.chunk == 0, **found})
        console.print(f"  {_chosen(layout)}: {_words(found)}")
    return {"tensors": len(ordinary.of), "reference_loss": loss, "whole": whole, **yardsticks, "streamed": lines}


@contextmanager
def _another_kernel(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Attention by FlashAttention, where recent GPUs would take cuDNN; by plain products on a CPU and in fp32, which it has not."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if device.type == "cuda" and dtype != torch.float32 else SDPBackend.MATH):
        yield


def errors(rows: Iterable[tuple[float, Gradients]], reference: Iterable[tuple[float, Gradients]]) -> Errors:
    """Mean loss and relative errors over rows. The same tensors must have gradients in both."""
    losses, wrong, right = [], defaultdict[str, float](float), defaultdict[str, float](float)
    for (loss, found), (_, expected) in zip(rows, reference, strict=True):
        if found.keys() != expected.keys():
            raise AssertionError(f"gradients of other tensors: {sorted(found.keys() ^ expected.keys())[:4]}")
        losses.append(loss)
        for name, exact in expected.items():
            wrong[name] += (found[name].double() - exact.double()).square().sum().item()
            right[name] += exact.double().square().sum().item()
    return Errors(statistics.fmean(losses), {name: math.sqrt(wrong[name] / right[name]) for name in sorted(right)})


def against(ordinary: Errors, other: Errors) -> dict[str, Any]:
    """Loss and errors of a pass and their ratios to those of the ordinary one, over all tensors; their mean is the geometric one."""
    # An error below fp32's own rounding is no figure to divide by.
    smallest = torch.finfo(torch.float32).eps
    ratios = {name: max(other.of[name], smallest) / max(error, smallest) for name, error in ordinary.of.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    return {
        "loss": other.loss,
        "worst_error": max(other.of.values()),
        "median_error": statistics.median(other.of.values()),
        "worst_ratio": ratios[worst],
        "worst_ratio_tensor": worst,
        "median_ratio": statistics.median(ratios.values()),
        "mean_ratio": math.exp(statistics.fmean(map(math.log, ratios.values()))),
        "tensors_above": sum(ratio > WORSE for ratio in ratios.values()),
        "tensors_below": sum(ratio < 1 / WORSE for ratio in ratios.values()),
    }


def _chosen(layout: Streaming) -> str:
    """What differs from the defaults."""
    usual = Streaming().to_dict()
    return " ".join(f"{name}={value}" for name, value in layout.to_dict().items() if name in ("chunk", "keep") or value != usual[name])


def _words(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items() if name != "loss" and not isinstance(value, str))


def _free(device: torch.device) -> None:
    """Give back what the last pass took."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _spread(adapters: list[nn.Parameter], seed: int) -> None:
    """The same entries on every device."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * ADAPTER_SPREAD)


def _reference_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None, **_unused: Any
) -> tuple[Tensor, None]:
    """Causal attention of one document by plain products, some queries at a time. query [B,H,S,D], key and value [B,K,S,D] → [B,S,H,D]."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for start in range(0, length, REFERENCE_QUERIES):
        stop = min(start + REFERENCE_QUERIES, length)
        tensors = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
        parts.append(checkpoint(_attended, *tensors, scaling, use_reentrant=False))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The queries are those of the last keys."""
    n, m = query.shape[2], key.shape[2]
    visible = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, visible, scale=scale)


AttentionInterface.register(REFERENCE_ATTENTION, _reference_attention)


def main() -> None:
    """The command."""
    options = text.options(__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=8, help="documents of that length, each a row of its own")
    arguments = options.parse_args()
    write(arguments.file, compare(text.request(arguments, *ORDINARY), getattr(torch, arguments.dtype), arguments.rows))


if __name__ == "__main__":
    main()
