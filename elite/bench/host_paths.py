"""What the host's side of a step costs on each path: `python -m elite.bench.host_paths FILE [--cache CACHE]`.

Models so small that their steps wait for the host alone, one for each way to train and each executor. The fastest forward, backward and
update of several steps on calm cores count, as whoever shares the machine only adds time. The weights of elite/plan/launches.py are fitted
to this.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from elite.bench.assemble import Assembled, assembled, write
from elite.bench.calibrate.measure import Machine, configured
from elite.bench.calibrate.sample import Drawn
from elite.console import console, start_logging
from elite.data.batches import Batch
from elite.runfolder import environment

SIZES = {
    "llama": ("model=llama31_8b", "model.num_attention_heads=4", "model.num_key_value_heads=2"),
    "qwen": ("model=qwen25_coder_1_5b", "model.num_attention_heads=4", "model.num_key_value_heads=2"),
    "phi": ("model=phi2", "model.num_attention_heads=8", "model.num_key_value_heads=8"),
}
WIDTHS = {"llama": 512, "qwen": 512, "phi": 640}
DEPTHS = (3, 12)
"""Layers: what is around them shows in the shallow model."""
COMMON = (
    *("model.weights=random", "model.intermediate_size=1024", "model.vocab_size=4096"),
    *("tier=tier1", "tier.context=512", "tier.target_length=64", "training.max_steps=1", "training.micro_batch=1"),
    *("training.global_batch_tokens=512", "adapter.rank=8", "plan.take_ahead=false"),
    *("optimizations=none", "optimizations.mixed_precision.enabled=true", "optimizations.flash_attention.enabled=true"),
)
PLACES = {
    "whole": ("executor=whole",),
    "streamed": ("executor=streamed", "executor.boundaries=device"),
    "staged": ("executor=streamed", "executor.boundaries=host"),
}
WAYS: dict[str, tuple[str, ...]] = {
    "full": (),
    "peft": (),
    "fused": ("fused_lora",),
    "peft packed": ("qlora",),
    "fused packed": ("fused_lora", "qlora"),
    "full kernels": ("fused_kernels",),
    "peft kernels": ("fused_kernels",),
    "fused kernels": ("fused_lora", "fused_kernels"),
    "full liger": ("liger_kernels",),
    "fused liger": ("fused_lora", "liger_kernels"),
    "peft packed liger": ("qlora", "liger_kernels"),
    "fused packed kernels": ("fused_lora", "qlora", "fused_kernels"),
    "peft checkpointed": ("gradient_checkpointing",),
    "peft offloaded": ("checkpoint_offload",),
    "peft 8 bits": ("adamw_8bit",),
    "full 8 bits": ("adamw_8bit",),
}
SHALLOW = ("full", "peft", "fused", "fused packed")
OF_WHOLE = ("checkpointed", "offloaded", "8 bits")
"""Ends of the names of what the streamed executor does its own way."""
STEPS = 9
BESIDE = 3
"""Steps of the stress test's model beside each of these."""


def paths() -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """Name, model, layers and overrides of each."""
    for model in SIZES:
        for place, executor in PLACES.items():
            for way, switches in WAYS.items():
                if place != "whole" and way.endswith(OF_WHOLE):
                    continue
                adapter = "adapter.method=full" if way.startswith("full") else "adapter.method=lora"
                chosen = (*executor, adapter, *(f"optimizations.{name}.enabled=true" for name in switches))
                for depth in DEPTHS if way in SHALLOW else DEPTHS[-1:]:
                    size = (*SIZES[model], f"model.hidden_size={WIDTHS[model]}", f"model.num_hidden_layers={depth}")
                    yield f"{place} {way}", model, depth, (*size, *COMMON, *chosen)


class _Marked:
    """An executor that notes when its forward is handed over."""

    def __init__(self, inner: Any) -> None:
        self.model, self._inner, self.handed = inner.model, inner, 0.0

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        loss: Tensor = self._inner.loss_sum(batch, keep)
        self.handed = time.perf_counter()
        return loss


def timed(made: Assembled, machine: Machine, steps: int = STEPS) -> dict[str, float]:
    """Fastest seconds of forward, of backward and of what follows, and of an operation of the stress test beside them."""
    training, inner, began = _Marked(made.executors.training), made.recovery.accumulate, list[float]()
    found: list[dict[str, float]] = []

    def accumulate(*args: Any) -> float:
        began.append(time.perf_counter())
        loss = inner(*args)
        began.append(time.perf_counter())
        return loss

    made.recovery.accumulate = accumulate  # type: ignore[method-assign, assignment]
    marked = replace(made, executors=replace(made.executors, training=training))
    for number in range(steps + 1):
        began.clear()
        with machine.cores.chosen():
            machine.cores.settle()
            seconds = marked.step()["step_s"]
        forward, backward = training.handed - began[0], began[1] - training.handed
        if number:
            # The first one compiles.
            operation_s = machine.operations.seconds(BESIDE)
            found.append(
                {"forward_s": forward, "backward_s": backward, "update_s": seconds - forward - backward, "operation_s": operation_s}
            )
    return {name: min(step[name] for step in found) for name in found[0]}


def measure(machine: Machine, cache: str | None, chosen: Iterator[tuple[str, str, int, tuple[str, ...]]]) -> Iterator[dict[str, Any]]:
    """A row for each path."""
    for name, model, layers, overrides in chosen:
        machine.cleared()
        with assembled(configured(Drawn(name, overrides), cache)) as made:
            taken = timed(made, machine)
        ahead, back = (taken[f"{part}_s"] * 1e3 for part in ("forward", "backward"))
        console.print(f"{model:6} {layers:3} {name:30} forward {ahead:6.1f} ms, backward {back:6.1f} ms")
        yield {"name": name, "model": model, "layers": layers, "overrides": list(overrides)} | taken


def main() -> None:
    """The command."""
    start_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--cache", help="folder of converted models and kernel choices")
    arguments = parser.parse_args()
    machine = Machine(arguments.cache)
    rows = list(measure(machine, arguments.cache, paths()))
    write(arguments.file, {"environment": environment(), "device": machine.name, "rows": rows})


if __name__ == "__main__":
    main()
