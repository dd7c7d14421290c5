"""Every optimization side by side: what it is, what it excludes, and what it would do to this run. Arithmetic alone.

The effect of a part is the plan's figure with it on, less the figure with it off, all else as in the present run: the same executor in the
same layout. Where another part holds its place, that one gives way while it is on.
"""

from dataclasses import dataclass, replace

from rich.console import Group
from rich.table import Table
from rich.text import Text

from elite.config import RunConfig
from elite.errors import PlanError
from elite.facts import GIB, Device, ModelShape
from elite.optimizations import ALL
from elite.optimizations.contract import Optimization, Site
from elite.plan.batch import batch_geometry
from elite.plan.executors import Prediction, choose_executor, held_to
from elite.plan.micro_batch import settled
from elite.plan.values import check_values
from elite.plan.words import duration, gib

NONE = "–"
"""A cell without an effect."""


@dataclass(frozen=True)
class Effect:
    """What a part does: with it, less without it."""

    total_bytes: float
    """Device memory at the peak of the run with the part toggled."""
    memory_bytes: float
    host_bytes: float
    """Pinned host memory."""
    step_s: float


@dataclass(frozen=True)
class Line:
    """One part."""

    kind: type[Optimization]
    requested: bool
    active: bool
    reason: str
    """Why it does not act, or would not; empty if it does, or could."""
    conflicts: tuple[str, ...]
    """Parts that claim a place it claims, in their order."""
    instead_of: tuple[str, ...]
    """Active ones among them."""
    effect: Effect | None
    """None where it cannot act."""


@dataclass(frozen=True)
class Survey:
    """All parts in their order, and the run they would act on."""

    present: Prediction
    lines: tuple[Line, ...]


def conflicts_of(kind: type[Optimization]) -> tuple[type[Optimization], ...]:
    """The other parts that claim a place which this one claims, or that it excludes, or that exclude it."""
    return tuple(other for other in ALL if other is not kind and (_reach(other) & kind.claims or other.claims & _reach(kind)))


def _reach(kind: type[Optimization]) -> frozenset[Site]:
    """The places that it claims, and those that nobody may occupy beside it."""
    return kind.claims | kind(kind.Config()).excludes.keys()


def survey(config: RunConfig, device: Device, shape: ModelShape) -> Survey:
    """What every part does, or would do, to this run.

    Raises:
        ConfigError: a number is out of range.
        PlanError: the run itself cannot be planned.
    """
    check_values(config)
    config = settled(config, device, shape).config

    def made(changed: RunConfig) -> Prediction:
        # Ranks that share sequences take more of them for the same global batch.
        return choose_executor(changed, device, shape, batch_geometry(changed, device).accumulation)

    present = made(config)
    # An effect is the part's own, not that of another layout.
    pinned = held_to(config, present)
    requested = {decision.name: decision.active for decision in present.decisions if decision.requested}
    lines = []
    for decision in present.decisions:
        kind = type(decision.optimization)
        rivals = conflicts_of(kind)
        names = tuple(rival.name for rival in rivals if rival.name in requested)
        effect = None
        try:
            on = made(switched(pinned, {kind.name: True} | dict.fromkeys(names, False)))
            reason = next(d.reason for d in on.decisions if d.name == kind.name)
        except PlanError as refusal:
            reason = str(refusal).splitlines()[0]
        if not reason:
            without = made(switched(pinned, {kind.name: False}))
            effect = _effect(on, without, without if decision.active else on)
        replaced = tuple(name for name in names if requested[name])
        lines.append(Line(kind, decision.requested, decision.active, reason, tuple(rival.name for rival in rivals), replaced, effect))
    return Survey(present, tuple(lines))


def _effect(on: Prediction, without: Prediction, toggled: Prediction) -> Effect:
    return Effect(
        total_bytes=toggled.estimate.total,
        memory_bytes=on.estimate.total - without.estimate.total,
        host_bytes=on.host_bytes - without.host_bytes,
        step_s=on.step_s - without.step_s,
    )


def switched(config: RunConfig, states: dict[str, bool]) -> RunConfig:
    """The same run with these parts on or off."""
    return replace(config, optimizations=config.optimizations.switched(states))


def render_survey(found: Survey) -> Group:
    """What the parts do here, why some do not act, and what they are."""
    facts = found.present.facts
    where = facts.device.name + ("" if facts.device.present else " (not in this machine)")
    run = f"{facts.context:,} tokens × {facts.micro_batch}, {found.present.executor.value} executor"
    now = f"{gib(found.present.estimate.total)} planned, {duration(found.present.step_s)} a step"
    title = f"Optimizations of {facts.model.name} on {where}, {run}: {now}"
    effects = _table("row", "name", "class", "state", "GiB", "on host", "a step")
    for line in found.lines:
        kind, effect = line.kind, line.effect
        cells = ("", "", "")
        if effect is not None:
            cells = (_signed_gib(effect.memory_bytes), _signed_gib(effect.host_bytes), _signed_s(effect.step_s))
        effects.add_row(str(kind.row), kind.name, kind.exactness.value, _state(line), *cells)
    reasons = _table("name", "why it does not act")
    for line in found.lines:
        if reason := line.reason or ("would replace " + ", ".join(line.instead_of) if line.instead_of else ""):
            reasons.add_row(line.kind.name, reason)
    places = _table("name", "stage", "what it is", "decides", "excludes", "source")
    for line in found.lines:
        decides = ", ".join(sorted(site.value for site in line.kind.claims))
        places.add_row(
            line.kind.name, line.kind.stage.value, line.kind.title, decides, ", ".join(line.conflicts) or "none", line.kind.source
        )
    notes = "GiB of the device, of the host, time of a step: with the part, less without it, as planned for this model and context"
    return Group(Text(title, style="bold"), effects, Text(notes, style="dim"), Text(), reasons, Text(), places)


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in heads:
        right = head in ("row", "GiB", "on host", "a step")
        table.add_column(
            head, justify="right" if right else "left", overflow="fold", no_wrap=right or head in ("name", "class", "state", "stage")
        )
    return table


def _state(line: Line) -> Text:
    if line.active:
        return Text("active", style="green")
    if line.requested:
        return Text("inactive", style="yellow")
    return Text("cannot act" if line.reason else "off", style="dim")


def _signed_gib(value: float) -> str:
    return f"{'+' if value > 0 else '−'}{abs(value) / GIB:.2f}" if value else NONE


def _signed_s(seconds: float) -> str:
    return f"{'+' if seconds > 0 else '−'}{duration(abs(seconds))}" if seconds else NONE
