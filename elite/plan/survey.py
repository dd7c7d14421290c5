"""What a machine can do with a model: every tier's plan side by side, and the longest context. Arithmetic alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table
from rich.text import Text

from elite.config import Executor, RunConfig
from elite.facts import Device, ModelShape
from elite.optimizations.ring_attention import RingAttention
from elite.plan.batch import SHARED_WORD, sharing, with_context, with_shared_sequences
from elite.plan.executors import Prediction, choose_executor, least_bytes
from elite.plan.plan import Plan
from elite.plan.words import duration, gib
from elite.streaming import Place, Streaming, WeightPlace

STEP = 1024
"""Contexts are looked for in multiples of so many tokens."""
MOST_TOKENS = 2**27
"""No longer context is looked for."""


@dataclass(frozen=True)
class Longest:
    """The longest context of one executor; `prediction` is None where not even the shortest fits."""

    executor: Executor
    sharing: int
    """Ranks that share each sequence."""
    tokens: int
    prediction: Prediction | None
    least_bytes: float
    """Device memory that the shortest context takes at least, with headroom."""


def longest_contexts(config: RunConfig, device: Device, shape: ModelShape) -> tuple[Longest, ...]:
    """The longest context that fits under each executor, one sequence a step, and on several GPUs that share it; the model's own positions
    are no limit.

    Memory grows with the context in every layout, so a bisection finds it.
    """
    wanted = [config.executor.name] if config.executor.name is not Executor.auto else [Executor.whole, Executor.streamed]
    names = [name for name in wanted if name is Executor.whole or not shape.unstreamable]
    runs = [replace(config, executor=replace(config.executor, name=name)) for name in names]
    if Executor.whole in names and not shape.unstreamable and (shared := with_shared_sequences(runs[0], device)) is not None:
        runs.append(shared)
    return tuple(_longest(run, device, shape) for run in runs)


def _longest(config: RunConfig, device: Device, shape: ModelShape) -> Longest:
    def made(tokens: int) -> Prediction:
        return choose_executor(with_context(config, tokens), device, shape, 1)

    low, high = 0, MOST_TOKENS // STEP + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if made(middle * STEP).fits else (low, middle)
    least = least_bytes(with_context(config, STEP), device, shape) / (1 - config.plan.headroom_fraction)
    return Longest(config.executor.name, sharing(config, device), low * STEP, made(low * STEP) if low else None, least)


def render_longest(found: Sequence[Longest], device: Device, model: str) -> Table:
    """A line for each executor."""
    table = _table(f"Longest context of {model} on {_named(device)}", "executor", "tokens", "GPU", "host, pinned", "disk", "a step", "how")
    for line in found:
        made = line.prediction
        name = line.executor.value + (f", {line.sharing} ranks share it" if line.sharing > 1 else "")
        if made is None:
            table.add_row(name, "none", f"needs {gib(line.least_bytes)}", "", "", "", "")
        else:
            cells = gib(made.estimate.total), gib(made.host_bytes), gib(made.disk_bytes), duration(made.step_s)
            table.add_row(name, f"{line.tokens:,}", *cells, _how(made.layout, line.sharing))
    return table


def render_tiers(plans: Sequence[tuple[Plan, float]], device: Device) -> Table:
    """A line for each tier.

    Args:
        plans: with the device memory that the tier takes at least, headroom included.
    """
    name = plans[0][0].model if plans else ""
    heads = ("tier", "tokens", "fits", "GPU", "at least", "host, pinned", "disk", "a step", "how, or what would make it fit")
    table = _table(f"Tiers of {name} on {_named(device)}, {gib(device.memory_usable_bytes)} usable", *heads)
    for plan, least in plans:
        fits = Text("yes", style="green") if plan.fits else Text("no", style="red")
        layout = Streaming.from_dict(plan.layout) if plan.layout else None
        shared = any(switch.name == RingAttention.name and switch.active for switch in plan.decisions)
        how = _how(layout, plan.ranks if shared else 1) if plan.fits else f"{plan.shortage}; {plan.fix}"
        figures = gib(plan.total_bytes), gib(least), gib(plan.host_bytes), gib(plan.disk_bytes), duration(plan.step_s)
        table.add_row(plan.tier, f"{plan.context:,}", fits, *figures, how)
    return table


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head.startswith(("executor", "tier", "fits", "how")) else "right", overflow="fold")
    return table


def _named(device: Device) -> str:
    return device.name + ("" if device.present else " (not in this machine)")


def _how(layout: Streaming | None, sharing: int) -> str:
    """What a plan had to take to: the executor, what of its state is kept elsewhere or computed again, and how many ranks share a row."""
    if layout is None:
        return "whole" + (f", {sharing} ranks share each sequence ({SHARED_WORD})" if sharing > 1 else "")
    words = [f"streamed, chunks of {layout.chunk:,}", f"kept: {layout.keep.value}"]
    if layout.weights is WeightPlace.streamed:
        words.append("weights streamed")
    if layout.keys_values is Place.host:
        words.append("keys and values on the host")
    if layout.boundaries is not Place.host:
        words.append(f"boundaries on {layout.boundaries.value}")
    return ", ".join(words)
