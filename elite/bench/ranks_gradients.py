"""Errors of bf16 gradients where several GPUs share a row, against those of one GPU: `python -m elite.bench.ranks_gradients FILE`.

Reference, errors and ratios are those of `elite.bench.gradients`, and so is the text: the ordinary backward in fp32 on one GPU, its loss in
fp64. Against it stand one GPU's bf16 passes, ordinary and streamed, and those of all ranks together. An error that sharing adds shows in
the ratio to one GPU's own; how far two right passes differ by chance, in that of the streamed pass to the ordinary one.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from elite import hardware
from elite.bench import text
from elite.bench.assemble import write
from elite.bench.gradients import ORDINARY, Bench, Errors, Gradients, against, full_rows
from elite.bench.ranks import launched
from elite.config import AdapterMethod, RunConfig
from elite.console import console
from elite.distributed.ranks import Ranks, joined
from elite.optimizations.ring_attention import Variant
from elite.runfolder import environment
from elite.streaming import Keep, Streaming

RING = "optimizations.ring_attention.enabled=true"


@dataclass(frozen=True)
class Pass:
    """One way of computing."""

    executor: str
    shared: Variant | None = None
    """How all ranks exchange keys and values; None: one rank alone."""

    @property
    def name(self) -> str:
        """In the file."""
        return self.executor if self.shared is None else f"{self.executor}, {self.shared.value}"

    def layout(self, tokens: int) -> Streaming | None:
        """Chunks of an eighth of the row, so that a rank has several."""
        return None if self.executor == "whole" else Streaming(tokens // 8, tokens // 8, Keep.attention)


ALONE = (Pass("whole"), Pass("streamed"))
TOGETHER = tuple(Pass(executor, variant) for executor in ("whole", "streamed") for variant in Variant)


def compare(config: RunConfig, dtype: torch.dtype, rows: int, ranks: Ranks) -> dict[str, Any]:
    """Full fine-tuning and LoRA by one rank and by all; what the file gets. All ranks call it.

    Args:
        config: of what ranks share; `tier.context` is the length of a row.
        dtype: of all passes but the reference.
        rows: over which errors are taken.
    """
    torch.set_float32_matmul_precision("highest")
    if ranks.is_main:
        # Converts the model and tokenises; the others find both.
        text.tokens(config)
    ranks.barrier()
    batches, runs = full_rows(text.tokens(config), config, rows), []
    for method in (AdapterMethod.full, AdapterMethod.lora):
        together = Bench(replace(config, adapter=replace(config.adapter, method=method)), dtype, batches, ranks)
        runs.append({"adapter": method.value, **_compared(together)})
    return {
        "environment": environment(),
        "device": hardware.device(config.hardware).name,
        "ranks": ranks.world,
        "model": {"name": config.model.name, "weights": config.model.weights.value, "lora_rank": config.adapter.rank},
        "context": config.tier.context,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "runs": runs,
    }


def _compared(together: Bench) -> dict[str, Any]:
    options = together.config.optimizations
    single = replace(
        together.config,
        optimizations=replace(options, ring_attention=replace(options.ring_attention, enabled=False)),
        hardware=replace(together.config.hardware, gpus=1),
    )
    alone = replace(together, config=single, ranks=replace(together.ranks, rank=0, world=1))
    # Each rank works them out: so none waits, and all have them.
    reference = alone.reference()
    own = {one.executor: _errors(alone, one, reference) for one in ALONE}
    found = {one.name: against(own["whole"], own[one.executor]) for one in ALONE[1:]}
    for one in TOGETHER:
        shared = _errors(together, one, reference)
        found[one.name] = against(own[one.executor], shared)
        if together.ranks.is_main:
            said = ", ".join(f"{name} {found[one.name][name]:.4g}" for name in ("mean_ratio", "median_ratio", "worst_ratio"))
            console.print(f"{together.config.adapter.method.value}: {one.name}: {said}")
    errors = {executor: {"loss": one.loss, "worst_error": max(one.of.values())} for executor, one in own.items()}
    return {"tensors": len(own["whole"].of), "alone": errors, "ratios": found}


def _errors(bench: Bench, one: Pass, reference: list[tuple[float, Gradients]]) -> Errors:
    loaded = bench.loaded(one.executor)
    return bench.errors(loaded, one.layout(bench.config.tier.context), reference, one.shared)


def main() -> None:
    """The command; it starts its ranks, which are asked the same."""
    options = text.options(__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=4, help="documents of that length, each a row of its own")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if not arguments.member:
        launched(arguments.ranks, "elite.bench.ranks_gradients", (*sys.argv[1:], "--member"))
        return
    config = text.request(arguments, *ORDINARY, RING, f"hardware.gpus={arguments.ranks}")
    with joined() as ranks:
        found = compare(config, getattr(torch, arguments.dtype), arguments.rows, ranks)
        if ranks.is_main:
            write(arguments.file, found)
        # None leaves while another still needs it.
        ranks.barrier()


if __name__ == "__main__":
    main()
