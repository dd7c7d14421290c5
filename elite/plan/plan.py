"""The plan of one run: everything that is printed and kept in `plan.json`, computed before a byte is allocated."""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from elite.config import RunConfig
from elite.facts import Corpus, Device, Facts, ModelShape
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.contract import Decision, Estimate
from elite.optimizations.memory_mapped_data import MemoryMappedData, corpus_bytes
from elite.plan.batch import BatchGeometry, batch_geometry, facts_of
from elite.plan.executors import Prediction, choose_executor
from elite.plan.fix import smallest_change
from elite.plan.generation import generation_tokens
from elite.plan.memory import NOT_MODELLED, averages, folded
from elite.plan.micro_batch import Settled, faster, settled
from elite.plan.peaks import may_be_held_up, needed_bytes, peaks
from elite.plan.rates import rates_of
from elite.plan.stages import ContextStage, PlannedStage, curriculum_words, planned, predict_stages
from elite.plan.streamed import host_usable
from elite.plan.time import model_flops_per_token
from elite.plan.values import check_values
from elite.plan.words import gib
from elite.scaling import scaled_rate, scaling_words

YARN_TESTED_FACTOR = 4
"""Beyond this stretch of the trained positions quality is doubtful (Peng et al. 2023 go to 16 with fine-tuning on it)."""


@dataclass(frozen=True)
class Switch:
    """What became of one optimization."""

    name: str
    title: str
    row: int
    exactness: str
    requested: bool
    active: bool
    reason: str


@dataclass(frozen=True)
class Plan:
    """One run, predicted. Memory in bytes of one device, times in seconds, FLOPs of one rank."""

    model: str
    model_type: str
    total_params: int
    trainable_params: int
    adapter: str
    device: str
    device_kind: str
    device_present: bool
    device_capped: bool
    ranks: int
    tier: str
    context: int
    target_length: int
    micro_batch: int
    largest_micro_batch: int | None
    """Most sequences that fit in one forward pass, where the micro-batch was to be found; else None."""
    accumulation: int
    step_tokens: int
    """Token slots of one optimizer step, all ranks."""
    learning_rate: float
    """At the peak of the schedule, scaled for the tokens of a step."""
    learning_rate_words: str
    """How it was scaled, and by whose law."""
    corpus: Corpus
    decisions: tuple[Switch, ...]
    memory: dict[str, float]
    """Bytes by component at the step's peak; they sum to `total_bytes`."""
    total_bytes: float
    """What is allocated at the peak."""
    needed_bytes: float
    """The least that has to be reserved for it."""
    ahead_bytes: float
    """What is reserved from before the first step on; 0 where memory is taken as it is needed."""
    reserved_bytes: float | None
    """What torch's allocator reserves for it; None on a CPU."""
    device_bytes: float | None
    """What the driver shows: reserved, and the CUDA context with its libraries; None on a CPU."""
    usable_bytes: float
    headroom_bytes: float
    """What a plan leaves free for what is not modelled."""
    fits: bool
    fix: str
    """The smallest change that would make it fit, as overrides; empty if it fits."""
    executor: str
    layout: dict[str, Any] | None
    """The streamed executor's, by the fields of `Streaming`."""
    host_bytes: float
    """Pinned host memory of one rank."""
    host_usable_bytes: float
    corpus_bytes: float
    """The tokenised corpus in host memory, of one rank; 0 where it is read from disk."""
    disk_bytes: float
    """Boundaries on disk, of one rank."""
    generation_tokens: int
    """Prompt and continuation of the completion to look at: as much of the context as there is memory for."""
    curriculum: str
    stages: tuple[PlannedStage, ...]
    """Contexts in turn; one unless the context grows. Times below are of the last, memory is of the one that takes most."""
    steps: int
    step_flops: float
    step_s: float
    time: dict[str, float]
    """Seconds by what takes them; they sum to `step_s`."""
    exchanged: dict[str, float]
    """Bytes that one rank hands over to the others in a step, by what they are."""
    rates: str
    """Where the rates behind these times come from."""
    tokens_per_s: float
    """Of all ranks together."""
    mfu: float
    """Operations that the mathematics needs over what the data sheet's rate would carry out meanwhile; 0 on a CPU, which has no sheet."""
    epoch_s: float
    """One pass over the corpus, in whole steps of the run's mean duration."""
    run_s: float
    """All optimizer steps; validation and checkpoints come on top."""
    rope_factor: float
    """Context over trained positions; above 1 positions are stretched."""
    positions: str
    checkpoint_bytes: float
    """One checkpoint on disk: what is trained, and the optimizer's state."""
    warnings: tuple[str, ...]
    not_modelled: tuple[str, ...]

    @property
    def shortage(self) -> str:
        """What is too little for this plan, in words; empty if it fits."""
        found = []
        cuda = self.device_kind == "cuda"
        short = max(self.total_bytes + self.headroom_bytes, self.needed_bytes) - self.usable_bytes + (0 if cuda else self.corpus_bytes)
        if short > 0:
            found.append(f"{gib(short)} too much with headroom")
        if cuda and self.host_bytes + self.corpus_bytes > self.host_usable_bytes:
            found.append(f"{gib(self.host_bytes + self.corpus_bytes)} of host memory, {gib(self.host_usable_bytes)} can be used")
        return "; ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types: what `plan.json` holds."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def make_plan(config: RunConfig, device: Device, shape: ModelShape, corpus: Corpus) -> Plan:
    """Predict memory and time of the run.

    Raises:
        ConfigError: a number is out of range.
        PlanError: the batch geometry is impossible, or two optimizations exclude each other.
    """
    check_values(config)
    in_memory = _in_memory(config, device, shape, corpus)
    return _planned(settled(config, _beside(in_memory, config, device), shape), device, shape, corpus, in_memory)


def _planned(micro_batch: Settled, device: Device, shape: ModelShape, corpus: Corpus, in_memory: float) -> Plan:
    config, training = micro_batch.config, micro_batch.config.training
    batch = batch_geometry(config, device)
    rate = training.learning_rate, training.lr_scaling, batch.step_tokens, training.lr_reference_tokens
    room = _beside(in_memory, config, device)
    made = choose_executor(config, room, shape, batch.accumulation)
    steps = _steps(config, corpus, batch)
    stages = predict_stages(config, room, shape, made, batch.accumulation, steps)
    model = facts_of(config, replace(device, count=1), shape)
    facts, estimate = made.facts, max((one.estimate for _, one in reversed(stages)), key=lambda found: found.total)
    fits = all(one.fits for _, one in stages) and (device.kind == "cpu" or in_memory <= host_usable(device))
    factor, positions = _positions(config, shape)
    usable = device.memory_usable_bytes * (1 - config.plan.headroom_fraction)
    return Plan(
        model=shape.name,
        model_type=shape.model_type,
        total_params=model.model.total_params,
        trainable_params=model.trainable_params,
        adapter=f"lora, rank {config.adapter.rank}" if facts.adapter == "lora" else facts.adapter,
        device=device.name,
        device_kind=device.kind,
        device_present=device.present,
        device_capped=device.capped,
        ranks=device.count,
        tier=config.tier.name,
        context=facts.context,
        target_length=config.tier.target_length,
        micro_batch=facts.micro_batch,
        largest_micro_batch=micro_batch.largest,
        accumulation=batch.accumulation,
        step_tokens=batch.step_tokens,
        learning_rate=scaled_rate(*rate),
        learning_rate_words=scaling_words(*rate),
        corpus=corpus,
        decisions=tuple(_switch(decision) for decision in made.decisions),
        memory=estimate.by_component(),
        total_bytes=estimate.total,
        **_beyond(estimate.total, made, config),
        usable_bytes=device.memory_usable_bytes,
        headroom_bytes=device.memory_usable_bytes * config.plan.headroom_fraction,
        fits=fits,
        fix="" if fits else _fix(config, device, shape, in_memory),
        executor=made.executor.value,
        layout=made.layout.to_dict() if made.layout else None,
        host_bytes=max(one.host_bytes for _, one in stages),
        host_usable_bytes=host_usable(device),
        corpus_bytes=in_memory,
        disk_bytes=max(one.disk_bytes for _, one in stages),
        generation_tokens=generation_tokens(facts, made.decisions, estimate, usable),
        curriculum=curriculum_words(config.curriculum),
        **_times(made, corpus, batch, stages),
        rope_factor=factor,
        positions=positions,
        checkpoint_bytes=_checkpoint_bytes(model.trainable_params, facts, estimate, made.decisions),
        warnings=(*_warnings(config, made, corpus, batch, factor, model.trainable_params), *faster(config, room, shape, made, batch)),
        not_modelled=NOT_MODELLED,
    )


def _in_memory(config: RunConfig, device: Device, shape: ModelShape, corpus: Corpus) -> float:
    """Host memory of one rank's tokens. Bytes."""
    facts = facts_of(config, device, shape)
    # No other part is asked: which of them go together depends on the executor, which is not chosen yet.
    alone = OptimizationsConfig(memory_mapped_data=config.optimizations.memory_mapped_data)
    return corpus_bytes(folded(facts, decide(alone, facts)), corpus, shape)


def _beside(in_memory: float, config: RunConfig, device: Device) -> Device:
    """The machine with so much of the host's memory taken by each rank's tokens; a CPU has no other."""
    if device.kind == "cpu":
        left = device.memory_usable_bytes - in_memory / (1 - config.plan.headroom_fraction)
        return replace(device, memory_usable_bytes=max(1, int(left)))
    return replace(device, host_ram_bytes=max(0, int(device.host_ram_bytes - in_memory * device.count)))


def _fix(config: RunConfig, device: Device, shape: ModelShape, in_memory: float) -> str:
    """The smallest change that would make it fit; where the corpus is too much, that it stays on disk."""
    if in_memory and choose_executor(config, device, shape, 1).fits:
        return f"optimizations.{MemoryMappedData.name}.enabled=true"
    return smallest_change(config, device, shape)


def _beyond(total_bytes: float, made: Prediction, config: RunConfig) -> dict[str, Any]:
    """A plan's fields about what the device has to hold besides what is allocated."""
    found = peaks(total_bytes, made.facts, made.decisions, made.executor, config.plan)
    return {
        "needed_bytes": needed_bytes(total_bytes, made.facts.device),
        "ahead_bytes": found.ahead_bytes if found else 0.0,
        "reserved_bytes": found.reserved_bytes if found else None,
        "device_bytes": found.device_bytes if found else None,
    }


def _switch(decision: Decision) -> Switch:
    kind = decision.optimization
    return Switch(decision.name, kind.title, kind.row, kind.exactness.value, decision.requested, decision.active, decision.reason)


def _steps(config: RunConfig, corpus: Corpus, batch: BatchGeometry) -> int:
    if config.training.max_steps is not None:
        return config.training.max_steps
    return max(1, math.ceil(config.training.epochs * corpus.train_tokens / batch.step_tokens))


def _times(made: Prediction, corpus: Corpus, batch: BatchGeometry, stages: list[tuple[ContextStage, Prediction]]) -> dict[str, Any]:
    """A plan's fields about time."""
    steps = sum(stage.steps for stage, _ in stages)
    run_s = sum(stage.steps * one.step_s for stage, one in stages)
    return {
        "stages": tuple(planned(stage, one, batch.step_tokens) for stage, one in stages),
        "steps": steps,
        "step_flops": made.step_flops,
        "step_s": made.step_s,
        "time": made.time.by_part(),
        "exchanged": {one.what: one.handed_bytes for one in made.exchanges},
        "rates": rates_of(made.facts.device).origin,
        "tokens_per_s": batch.step_tokens / made.step_s,
        "mfu": _mfu(made.facts, made.step_s, batch),
        "epoch_s": run_s / steps * math.ceil(corpus.train_tokens / batch.step_tokens),
        "run_s": run_s,
    }


def _mfu(facts: Facts, step_s: float, batch: BatchGeometry) -> float:
    if facts.device.kind == "cpu":
        return 0.0
    done = model_flops_per_token(facts) * facts.dividing * batch.step_tokens / facts.device.count
    return done / step_s / facts.device.matmul_flops_per_s


def _checkpoint_bytes(trained: int, facts: Facts, estimate: Estimate, decisions: tuple[Decision, ...]) -> float:
    """The trained weights, the optimizer's state, averages of the weights, and what else parts keep.

    Args:
        trained: parameters, of which a rank may have a part.
    """
    kept = sum(decision.optimization.checkpoint_bytes(facts) for decision in decisions if decision.active)
    return 4 * trained * (1 + averages(decisions)) + estimate.optimizer_state * trained / facts.trainable_params + kept


def _positions(config: RunConfig, shape: ModelShape) -> tuple[float, str]:
    """Context over trained positions, and what is done about it."""
    trained, context = shape.max_position_embeddings, config.tier.context
    factor = context / trained
    if factor <= 1:
        return factor, f"{context:,} of {trained:,} trained positions"
    if _own_scaling(config):
        return factor, f"{context:,}, {factor:g} times the {trained:,} trained positions; the model's own rotary scaling is kept"
    return factor, f"YaRN factor {factor:g} stretches {trained:,} trained positions to {context:,}"


def _own_scaling(config: RunConfig) -> bool:
    rope = config.model.rope_parameters
    return "rope_type" in rope and rope["rope_type"] != "default"


def _warnings(config: RunConfig, made: Prediction, corpus: Corpus, batch: BatchGeometry, factor: float, trained: int) -> tuple[str, ...]:
    facts = made.facts
    found = [batch.note] if batch.note else []
    if corpus.train_tokens < facts.context:
        found.append(f"the corpus has {corpus.train_tokens:,} tokens, less than one sequence of {facts.context:,}")
    if factor > 1 and _own_scaling(config):
        found.append(f"positions beyond the trained ones ({factor:g} times) are used as they are: expect a high loss there")
    elif factor > YARN_TESTED_FACTOR:
        found.append(f"YaRN factor {factor:g} is above {YARN_TESTED_FACTOR}: the far positions have to be learnt in this run")
    if config.adapter.dropout:
        found.append(
            f"adapter.dropout={config.adapter.dropout} keeps a copy and a mask of every linear map's input: memory leaves them out"
        )
    if made.fits and not config.plan.take_ahead and may_be_held_up(made.estimate.total, made.decisions, facts.device):
        found.append("freed memory may lie in blocks too small to use, and the run end short of it: optimizations.memory_pool.enabled=true")
    copied, usable = _checkpoint_bytes(trained, facts, made.estimate, made.decisions), host_usable(facts.device)
    if facts.device.kind == "cuda" and made.host_bytes + copied > usable:
        beside = f", beside {gib(made.host_bytes)} pinned" if made.host_bytes else ""
        found.append(f"a checkpoint is {gib(copied)} of host memory while it is written{beside}: {gib(usable)} can be used")
    if not facts.device.present:
        found.append(f"{facts.device.name} is not in this machine: this is a plan for it, with its data sheet's rates")
    elif made.disk_bytes > facts.device.disk_free_bytes > 0:
        found.append(f"layer inputs take {gib(made.disk_bytes)} of disk, {gib(facts.device.disk_free_bytes)} are free where the cache lies")
    return tuple(found)
