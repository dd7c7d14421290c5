"""The plan as people read it, 80 to 120 columns wide."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elite.plan.plan import Plan, Switch
from elite.plan.words import amount, count, duration, gib, operations
from elite.printable import one_line

HOUR = 3600
LEAST_SHARE = 0.01
"""Of a step's time; what takes less is not named."""

JOURNAL_WORDS = "; one after every step, and within a step one after every layer (training.mid_step_checkpoint)"


def render(plan: Plan) -> Group:
    """Every section of the plan, in the order in which one decides."""
    sections: list[RenderableType] = [_run(plan), _corpus(plan), _optimizations(plan), _memory(plan), _verdict(plan), _time(plan)]
    if plan.warnings:
        sections.append(_notes("Warnings", plan.warnings, "yellow"))
    sections.append(_notes("Not modelled", plan.not_modelled, "dim"))
    return Group(*sections)


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True, min_width=16)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(one_line(value)))
    return table


def _notes(title: str, notes: tuple[str, ...], style: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    for note in notes:
        table.add_row(Text(f"- {note}", style=style))
    return table


def _run(plan: Plan) -> Table:
    device = plan.device + ("" if plan.device_present else " (not in this machine)") + (" (memory capped)" if plan.device_capped else "")
    trained = f"{count(plan.trainable_params)} ({plan.trainable_params / plan.total_params:.2%})"
    found = "" if plan.largest_micro_batch is None else f" (at most {plan.largest_micro_batch:,} fit)"
    factors = f"{plan.context:,} × {plan.micro_batch} micro-batch{found} × {plan.accumulation} accumulated"
    alone = plan.step_tokens == plan.context * plan.micro_batch * plan.accumulation * plan.ranks
    factors += f" × {plan.ranks} ranks" if alone else f", shared by {plan.ranks} ranks"
    return _pairs(
        "Run",
        [
            ("model", f"{plan.model} ({plan.model_type}), {count(plan.total_params)} parameters"),
            ("trained", f"{plan.adapter}: {trained}"),
            ("device", device + (f" × {plan.ranks}" if plan.ranks > 1 else "")),
            ("context", f"{plan.context:,} tokens ({plan.tier}), the last {plan.target_length:,} are the target"),
            ("positions", plan.positions),
            ("batch", f"{plan.step_tokens:,} tokens = {factors}"),
            ("learning rate", plan.learning_rate_words),
            ("executor", _executor(plan)),
            ("curriculum", plan.curriculum),
        ],
    )


def _executor(plan: Plan) -> str:
    if plan.layout is None:
        return plan.executor
    layout = plan.layout
    parts = [
        f"chunks of {layout['chunk']:,}",
        f"blocks of {layout['block']:,}",
        f"{layout['encoding']} boundaries on {layout['boundaries']}",
    ]
    slots = f" ({layout['slots']})" if layout["keep"] == "multilevel" else ""
    parts += [f"kept: {layout['keep']}{slots}", f"keys and values on {layout['keys_values']}", f"weights {layout['weights']}"]
    return f"{plan.executor}: {', '.join(parts)}"


def _corpus(plan: Plan) -> Table:
    corpus = plan.corpus
    label = "" if corpus.count_method == "exact" else f" ({corpus.count_method})"
    rows = [
        ("origin", corpus.origin),
        ("training", f"{corpus.train_tokens:,} tokens in {corpus.train_files:,} files{label}"),
        ("validation", f"{corpus.val_tokens:,} tokens in {corpus.val_files:,} files{label}"),
    ]
    if corpus.skipped:
        rows.append(("skipped", ", ".join(f"{reason} {number:,}" for reason, number in sorted(corpus.skipped.items()))))
    return _pairs("Corpus", rows)


def _optimizations(plan: Plan) -> Table:
    table = Table(title="Optimizations", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("row", justify="right", style="dim")
    table.add_column("name", no_wrap=True)
    table.add_column("exactness", no_wrap=True)
    table.add_column("state", overflow="fold")
    for switch in plan.decisions:
        table.add_row(str(switch.row), switch.name, switch.exactness, _state(switch))
    return table


def _state(switch: Switch) -> Text:
    if switch.active:
        return Text("active", style="green")
    return Text(f"requested, inactive: {switch.reason}", style="yellow") if switch.requested else Text("off", style="dim")


def _memory(plan: Plan) -> Table:
    title = "Memory of one GPU, at the peak" if plan.device_kind == "cuda" else "Host memory, at the peak"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True, min_width=18)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", style="dim", no_wrap=True)
    for name, value in plan.memory.items():
        if value:
            table.add_row(name.replace("_", " "), gib(value), f"{value / plan.total_bytes:.1%}")
    table.add_row(Text("predicted", style="bold"), Text(gib(plan.total_bytes), style="bold"), "")
    if plan.reserved_bytes is not None and plan.device_bytes is not None:
        table.add_row(
            "reserved for it", gib(plan.reserved_bytes), "by torch's allocator" + (", before the first step" if plan.ahead_bytes else "")
        )
        table.add_row("the driver shows", gib(plan.device_bytes), "with CUDA's context")
    table.add_row("usable", gib(plan.usable_bytes), "")
    table.add_row("of it kept free", gib(plan.headroom_bytes), "")
    if plan.host_bytes and plan.device_kind == "cuda":
        table.add_row("host, pinned", gib(plan.host_bytes), f"of {gib(plan.host_usable_bytes)}")
    if plan.corpus_bytes:
        table.add_row("host, corpus", gib(plan.corpus_bytes), "its tokens, read into memory")
    if plan.disk_bytes and plan.device_kind == "cuda":
        table.add_row("disk", gib(plan.disk_bytes), "")
    return table


def _verdict(plan: Plan) -> Text:
    left = plan.usable_bytes - plan.total_bytes
    if plan.fits:
        return Text(f"FITS, {gib(left)} free", style="bold green")
    return Text(f"DOES NOT FIT, {plan.shortage}; would fit with: {plan.fix}", style="bold red")


def _time(plan: Plan) -> Table:
    step = f"{duration(plan.step_s)}, {operations(plan.step_flops)} a rank, at rates of {plan.rates}"
    if plan.step_s >= HOUR:
        saved = "nothing is learnt before that" if _journal(plan) else "nothing is learnt and nothing saved before that"
        step += f". One step takes {plan.step_s / HOUR:,.1f} hours: {saved}"
    mfu = f", {plan.mfu:.0%} of the data sheet's rate (MFU)" if plan.mfu else ""
    rows = [
        ("steps", f"{plan.steps:,} of {plan.step_tokens:,} tokens"),
        *_stages(plan),
        ("a step", step),
        ("of which", _parts(plan)),
        *_exchanged(plan),
        ("throughput", f"{plan.tokens_per_s:,.0f} tokens/s{mfu}"),
        ("an epoch", duration(plan.epoch_s) if plan.corpus.train_tokens else "no corpus"),
        ("all steps", f"{duration(plan.run_s)}, validation and checkpoints not counted"),
        ("a checkpoint", f"{gib(plan.checkpoint_bytes)} on disk{JOURNAL_WORDS if _journal(plan) else ''}"),
        ("completion", f"{plan.generation_tokens:,} tokens at most, as the keys and values of all layers have room for"),
    ]
    return _pairs("Steps and time", rows)


def _journal(plan: Plan) -> bool:
    return plan.layout is not None and bool(plan.layout["journal"])


def _stages(plan: Plan) -> list[tuple[str, str]]:
    """A line for each context, where it grows."""
    if len(plan.stages) == 1:
        return []
    lines = []
    for stage in plan.stages:
        rows = f"{stage.steps:,} steps of {stage.context:,} tokens × {stage.micro_batch} micro-batch"
        lines.append(("of these", f"{rows}: {gib(stage.total_bytes)}, {duration(stage.step_s)} each, {stage.tokens_per_s:,.0f} tokens/s"))
    return lines


def _exchanged(plan: Plan) -> list[tuple[str, str]]:
    """What ranks hand over to each other, where there are several."""
    if not plan.exchanged:
        return []
    what = ", ".join(f"{name} {amount(size)}" for name, size in plan.exchanged.items())
    return [("exchanged", f"a rank and step: {what}; {duration(plan.time['exchange'])} that nothing hides")]


def _parts(plan: Plan) -> str:
    """What takes at least a hundredth of a step, the longest first."""
    shares = sorted(((seconds / plan.step_s, name) for name, seconds in plan.time.items()), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for share, name in shares if share >= LEAST_SHARE)
