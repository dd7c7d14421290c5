"""A model ready to take optimizer steps on random tokens, assembled as a run would assemble it."""

import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from elite import geometry, hardware
from elite.config import RunConfig
from elite.data.batches import Batch, random_batch
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks, joined
from elite.distributed.zero import loading_device, wrapping
from elite.errors import PlanError
from elite.executor.build import Executors, build, streams_weights
from elite.facts import NO_CORPUS, Device
from elite.model import LoadedModel, load
from elite.optimizations import decide
from elite.optimizations.contract import Applied
from elite.optimizations.hooks import Hook
from elite.optimizations.ring_attention import active_variant
from elite.plan import Plan, facts_of, make_plan
from elite.plan.batch import with_micro_batch
from elite.plan.words import gib
from elite.prepared import carriers_of, compute_dtype, prepare_process
from elite.streaming import Streaming
from elite.training.ahead import Taking
from elite.training.around import hooked_step, loop_hooks
from elite.training.heap import settled
from elite.training.optimizer import build_optimizer
from elite.training.recovery import Recovery
from elite.training.step import make_scaler
from elite.training.trial import Subject, rehearse

STEPS = 1000
"""Of the loop that hooks are told of: more than any bench takes."""


@dataclass(frozen=True)
class Assembled:
    """Everything that a step needs."""

    config: RunConfig
    plan: Plan
    dtype: torch.dtype
    """Of matrix products."""
    loaded: LoadedModel
    executors: Executors
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    carriers: Ranks
    """This process among those that carry other sequences; alone where ranks divide each layer, who carry the same."""
    recovery: Recovery
    """What is done where memory runs out, with sizes as they are."""
    sharing: int = 1
    """Ranks that carry each row together."""
    hooks: Sequence[Hook] = ()
    numbers: Iterator[int] = field(default_factory=lambda: count(1))
    """Of the steps."""

    @property
    def vocab(self) -> int:
        """Size of the vocabulary."""
        return int(self.loaded.core.config.get_text_config().vocab_size)

    def step(self, passes: int = 1) -> dict[str, float]:
        """One optimizer step over so many micro-batches of random tokens: seconds and peaks."""
        device, number = self.ranks.device, next(self.numbers)
        window = [self._batch((number * passes + i) * self.carriers.world + self.carriers.rank // self.sharing) for i in range(passes)]
        reset_peak(device)
        synchronise(device)
        began = time.perf_counter()
        scaler, norm = make_scaler(device, self.dtype), self.config.training.max_grad_norm
        around = (number, self.hooks, self.executors.training, self.optimizer)
        done = hooked_step(*around, scaler, window, self.loaded.trainable, norm, self.carriers, self.recovery.accumulate)
        synchronise(device)
        seconds = time.perf_counter() - began
        return {"step_s": seconds, "tokens_per_s": sum(batch.slots for batch in window) / seconds, "loss": done.loss} | peaks(device)

    def _batch(self, seed: int) -> Batch:
        """This rank's part of a micro-batch; ranks that share rows draw the same ones."""
        generator = torch.Generator().manual_seed(self.config.seed + seed)
        batch = random_batch(self.plan.micro_batch, self.plan.context, self.vocab, generator)
        return batch.shared(self.ranks.rank % self.sharing, self.sharing)


@contextmanager
def assembled(config: RunConfig) -> Iterator[Assembled]:
    """Load the model of `config`, apply what its plan says, build optimizer and executor.

    Raises:
        PlanError: the plan does not fit, or the hardware is not here.
    """
    device = hardware.device(config.hardware, cache=Path(config.output.cache).expanduser())
    hardware.require_present(device, config.hardware)
    shape = geometry.shape(config.model)
    plan = make_plan(config, device, shape, NO_CORPUS)
    if not plan.fits:
        raise PlanError(f"the plan does not fit: {gib(plan.total_bytes)} of {gib(plan.usable_bytes)} usable ({plan.shortage})", plan.fix)
    config = with_micro_batch(config, plan.micro_batch)
    facts = facts_of(config, device, shape, plan.executor)
    decisions = decide(config.optimizations, facts)
    layout = Streaming.from_dict(plan.layout) if plan.layout else None
    with joined() as ranks, ExitStack() as undone:
        carriers = carriers_of(ranks, facts)
        prepare_process(config, ranks, device)
        dtype, of_runtime = compute_dtype(decisions, device)
        _undo_after(undone, of_runtime)
        loaded = load(config, decisions, dtype, loading_device(decisions, ranks), streams_weights(layout))
        _undo_after(undone, loaded.applied)
        optimizer, _ = build_optimizer(loaded.trainable, plan.learning_rate, config.training, decisions, loaded.model)
        wrapped = wrapping(loaded, layout, decisions, facts, dtype, optimizer, ranks)
        cache = Path(config.output.cache).expanduser()
        executors = build(loaded, layout, dtype, device, carriers, cache, active_variant(decisions), wrapped)
        undone.callback(gradient_exchange(executors.training.model).close)
        if executors.attached is not None:
            undone.callback(executors.attached.undo)
        parts = (config, decisions, executors.training, optimizer, loaded.trainable, STEPS, ranks.device)
        taking = Taking.of(plan.ahead_bytes, plan.memory)
        vocab = int(loaded.core.config.get_text_config().vocab_size)
        subject = Subject(executors.training, dtype, loaded.trainable, vocab, plan.context, ranks.device, plan.usable_bytes, 0.0)
        hooks, of_loop = loop_hooks(*parts, taking, rehearse=lambda: rehearse(subject, plan.micro_batch))
        _undo_after(undone, of_loop)
        if ranks.device.type == "cuda":
            # Random weights are made on the device whole; a checkpoint's would have come packed, or not at all.
            torch.cuda.empty_cache()
        for hook in hooks:
            hook.begin()
        recovery = Recovery(loaded.trainable, ranks, executors.attached.runner if executors.attached else None, hooks=hooks, shrinks=False)
        made = Assembled(config, plan, dtype, loaded, executors, optimizer, ranks, carriers, recovery, facts.sharing, hooks)
        with settled():
            yield made


def _undo_after(undone: ExitStack, applied: dict[str, Applied]) -> None:
    """Some of what was touched is the process's, in which others may be assembled."""
    for act in applied.values():
        if act.undo is not None:
            undone.callback(act.undo)


def described(made: Assembled, device: Device | None = None) -> dict[str, Any]:
    """What was measured: model, adapters, context, executor, layout, switches, and what the plan said."""
    model, plan = asdict(made.config.model), made.plan
    kept = ("name", "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    return {
        "model": {name: model[name] for name in kept} | {"weights": made.config.model.weights.value, "adapter": plan.adapter},
        "device": plan.device,
        "context": plan.context,
        "micro_batch": plan.micro_batch,
        "executor": plan.executor,
        "layout": plan.layout,
        "active": [switch.name for switch in plan.decisions if switch.active],
        "usable_bytes": plan.usable_bytes,
        "planned": {"device_bytes": plan.total_bytes, "host_bytes": plan.host_bytes, "step_s": plan.step_s},
    }


def write(file: Path, found: dict[str, Any]) -> None:
    """Write a result as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def peaks(device: torch.device) -> dict[str, float]:
    """Highest memory since `reset_peak`, bytes; the host's is of the whole process so far."""
    found: dict[str, float] = {"host_rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        found["allocated_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["reserved_peak_bytes"] = torch.cuda.max_memory_reserved(device)
    return found


def reset_peak(device: torch.device) -> None:
    """Begin to look for the highest memory anew. What is cached stays, as between a run's steps."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
