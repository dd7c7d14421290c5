"""Which executor carries out a run, in which layout: the fastest that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from elite.config import AdapterMethod, Executor, RunConfig
from elite.errors import PlanError
from elite.facts import Device, Facts, ModelShape
from elite.optimizations import decide
from elite.optimizations.contract import Decision, Estimate, Exchange
from elite.optimizations.zero_3 import divides_weights
from elite.plan import streamed
from elite.plan.batch import dividing, facts_of, sharing
from elite.plan.exchange import exchanges
from elite.plan.memory import host, predict
from elite.plan.peaks import needed_bytes
from elite.plan.time import StepTime, recomputed, step_flops, step_time
from elite.streaming import Place, Streaming, WeightPlace, check_layout

STREAMED_GAIN = 1.05
"""A streamed step must be predicted this much faster before it is preferred to a whole one that fits."""

NEARLY = 1.02
"""Of layouts whose steps are predicted to take no longer than this beside the fastest, the one that takes least of the device is taken."""


@dataclass(frozen=True)
class Prediction:
    """One executor in one layout."""

    executor: Executor
    layout: Streaming | None
    """Of the streamed executor."""
    facts: Facts
    decisions: tuple[Decision, ...]
    estimate: Estimate
    host_bytes: float
    """Pinned host memory of one rank."""
    disk_bytes: float
    fits: bool
    step_flops: float
    time: StepTime
    exchanges: tuple[Exchange, ...] = ()
    """Of one rank with the others, in an optimizer step."""

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.time.total


def choose_executor(config: RunConfig, device: Device, shape: ModelShape, accumulation: int) -> Prediction:
    """The executor that was asked for; with `auto`, the fastest that fits, else the one that takes least.

    Raises:
        PlanError: the model cannot be streamed as asked.
    """
    wanted = config.executor.name
    if shape.unstreamable and wanted is Executor.streamed:
        raise PlanError(f"{shape.name} cannot be streamed: {shape.unstreamable}", "executor=whole")
    if config.training.mid_step_checkpoint and sharing(config, device) > 1:
        # One rank's journal may end a layer before another's, whose rows are gone by then.
        problem = "training.mid_step_checkpoint=true with optimizations.ring_attention: ranks that share a sequence cannot be cut off alike"
        raise PlanError(problem, "training.mid_step_checkpoint=false")
    if config.adapter.method is AdapterMethod.full and config.executor.weights is WeightPlace.streamed and wanted is not Executor.whole:
        trained = "executor.weights=streamed with adapter.method=full: weights that are trained stay on the device"
        raise PlanError(trained, "executor.weights=resident")
    if wanted is Executor.streamed:
        # What the whole executor's parts would refuse each other is no concern of its.
        return _streamed(config, device, shape, accumulation)
    whole = _whole(config, device, shape, accumulation)
    if (
        wanted is Executor.whole
        or shape.unstreamable
        or dividing(config, device) > 1
        or (wanted is Executor.auto and whole.fits and device.kind == "cpu")
    ):
        return whole
    small = _streamed(config, device, shape, accumulation)
    if not whole.fits:
        return small if small.fits else min((whole, small), key=lambda made: made.estimate.total)
    return small if small.fits and small.step_s * STREAMED_GAIN < whole.step_s else whole


def held_to(config: RunConfig, made: Prediction) -> RunConfig:
    """The run with the executor and layout of a prediction, whatever else is changed about it."""
    executor, layout = replace(config.executor, name=made.executor), made.layout
    if layout is not None:
        executor = replace(
            executor,
            chunk=layout.chunk,
            block=layout.block,
            keep=layout.keep,
            slots=layout.slots,
            boundaries=layout.boundaries,
            keys_values=layout.keys_values,
            weights=layout.weights,
        )
    return replace(config, executor=executor)


def least_bytes(config: RunConfig, device: Device, shape: ModelShape) -> float:
    """Device memory of the layout that takes least, whatever the host and time may say. Bytes."""
    wanted, found = config.executor.name, list[float]()
    if wanted is not Executor.streamed:
        found.append(_whole(config, device, shape, 1).estimate.total)
    if wanted is not Executor.whole and not shape.unstreamable and dividing(config, device) == 1:
        found += [made.estimate.total for made in _Layouts(config, device, shape)]
    return min(found)


def _whole(config: RunConfig, device: Device, shape: ModelShape, accumulation: int) -> Prediction:
    facts = facts_of(config, device, shape)
    decisions = decide(config.optimizations, facts)
    estimate = predict(facts, decisions)
    again = recomputed(decisions)
    found = exchanges(facts, decisions, 1 + again[1], accumulation, 2 + again[0])
    flops, time = step_flops(facts, again, accumulation), step_time(facts, decisions, again, accumulation, exchanges=found)
    on_host = host(facts, decisions)
    fits = _fits(config, device, estimate, on_host)
    return Prediction(Executor.whole, None, facts, decisions, estimate, on_host, 0, fits, flops, time, found)


@dataclass(frozen=True)
class _Candidate:
    """What a layout takes. Its time is worked out for the one that is chosen, of hundreds."""

    layout: Streaming
    estimate: Estimate
    host_bytes: float
    fits: bool


class _Layouts:
    """The streamed executor's layouts for one run, in turn: the fastest first.

    Raises:
        PlanError: two optimizations exclude each other.
    """

    def __init__(self, config: RunConfig, device: Device, shape: ModelShape) -> None:
        self._config, self._device = config, device
        self.facts = facts_of(config, device, shape, Executor.streamed.value)
        self.decisions = decide(config.optimizations, self.facts)
        self.memory = streamed.StreamedMemory(self.facts, self.decisions)

    def __iter__(self) -> Iterator[_Candidate]:
        config, facts = self._config, self.facts
        folder = str(Path(config.executor.folder or config.output.cache).expanduser())
        of_switches = host(facts, self.decisions)
        for layout in streamed.layouts(config.executor, facts.context // facts.sharing, folder, config.training.mid_step_checkpoint):
            check_layout(layout)
            if layout.keys_values is Place.host and facts.model.sliding_window:
                continue
            if layout.weights is WeightPlace.streamed and (facts.adapter == "full" or divides_weights(self.decisions)):
                continue
            yield self._candidate(layout, of_switches)

    def others(self, layout: Streaming) -> list[_Candidate]:
        """What fits beside this one, and may be faster."""
        of_switches = host(self.facts, self.decisions)
        tried = (self._candidate(one, of_switches) for one in streamed.others(self._config.executor, layout, self.facts))
        return [made for made in tried if made.fits]

    def _candidate(self, layout: Streaming, of_switches: float) -> _Candidate:
        estimate, on_host = self.memory.device(layout), self.memory.host(layout) + of_switches
        return _Candidate(layout, estimate, on_host, _fits(self._config, self._device, estimate, on_host))


def _streamed(config: RunConfig, device: Device, shape: ModelShape, accumulation: int) -> Prediction:
    """The first layout that fits device and host; if none does, the one that exceeds them least."""
    layouts, made = _Layouts(config, device, shape), list[_Candidate]()
    for candidate in layouts:
        made.append(candidate)
        if candidate.fits:
            break
    if not made:
        raise PlanError("executor.keys_values=host does not go with a sliding window", "executor.keys_values=device")

    def excess(candidate: _Candidate) -> float:
        on_host = 0.0 if device.kind == "cpu" else candidate.host_bytes / max(1.0, streamed.host_usable(device))
        return max(candidate.estimate.total / device.memory_usable_bytes, on_host)

    def predicted(candidate: _Candidate) -> Prediction:
        facts, decisions, layout = layouts.facts, layouts.decisions, candidate.layout
        again = streamed.recomputed(facts, layout)
        # A layer is computed once more in the pass that goes back over it.
        found = exchanges(facts, decisions, 1 + again[1], accumulation, 1 + again[0])
        flops = step_flops(facts, again, accumulation)
        time = step_time(facts, decisions, again, accumulation, layout, found)
        taken = candidate.estimate, candidate.host_bytes, layouts.memory.disk(layout), candidate.fits
        return Prediction(Executor.streamed, layout, facts, decisions, *taken, flops, time, found)

    best = made[-1] if made[-1].fits else min(made, key=excess)
    found = [predicted(candidate) for candidate in (best, *(layouts.others(best.layout) if best.fits else ()))]
    fastest = min(one.step_s for one in found)
    return min((one for one in found if one.step_s <= NEARLY * fastest), key=lambda one: one.estimate.total)


def _fits(config: RunConfig, device: Device, estimate: Estimate, on_host: float) -> bool:
    """Whether both memories hold it; a CPU has but one."""
    there = device.kind == "cpu" or on_host <= streamed.host_usable(device)
    usable = device.memory_usable_bytes
    return there and estimate.total <= usable * (1 - config.plan.headroom_fraction) and needed_bytes(estimate.total, device) <= usable
