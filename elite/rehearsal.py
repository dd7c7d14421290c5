"""What a run tries before it begins, and what it says when memory runs out all the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elite import checkpoint
from elite.config import Executor as ExecutorName
from elite.console import console
from elite.distributed.exchange import Exchange
from elite.executor.build import Executors, ring, whole
from elite.executor.contract import Executor
from elite.executor.streamed.attach import Attached
from elite.facts import Corpus
from elite.model import LoadedModel
from elite.optimizations.ring_attention import active_variant
from elite.plan import make_plan
from elite.plan.batch import sequences_of_a_rank
from elite.plan.memory import averages
from elite.plan.micro_batch import dealt
from elite.plan.words import duration, gib
from elite.prepared import Run
from elite.training.batch_finder import Found, find
from elite.training.loop import Trainer
from elite.training.preflight import Preflight, preflight
from elite.training.shortage import Actual, MemoryShortage, actual, breakdown, largest, smaller, to_dict
from elite.training.trial import Subject, attempt, one_pass, rehearse


def micro_batch_found(run: Run, loaded: LoadedModel) -> Run:
    """The run with the largest micro-batch that all ranks hold, and with the plan of that; as it is where none is looked for.

    Raises:
        MemoryShortage: not even one sequence fits.
    """
    if not run.searches:
        return run
    most = sequences_of_a_rank(run.config, run.device)
    # DDP, which comes later, keeps a second copy of the gradients; so do averages, one each of the weights.
    copies = sum(p.nbytes for p in loaded.trainable) * ((1 if run.ranks.world > 1 else 0) + averages(run.decisions))
    variant = active_variant(run.decisions)
    sharing = None if variant is None else ring(variant, run.device, run.ranks, Path(run.config.output.cache).expanduser())
    subject = _subject(run, loaded, whole(loaded, run.dtype, sharing=sharing), run.plan["memory"]["optimizer_state"] + copies, sharing)

    def probe(sequences: int) -> Any:
        return attempt(subject, sequences, one_pass(subject, sequences), gradients=sequences < most)

    found = find(probe, run.plan["largest_micro_batch"], most, subject.limit_bytes)
    agreed = -int(run.ranks.max(-found.largest))
    if agreed == 0:
        seen = actual("", loaded.model, None, run.ranks.device)
        raise shortage(run, replace(seen, allocated=max(trial.peak_bytes for trial in found.trials)), 0)
    config = dealt(run.config, run.device, agreed)
    fixed = replace(config, executor=replace(config.executor, name=ExecutorName(run.plan["executor"])))
    made = make_plan(fixed, run.device, run.facts.model, Corpus(**run.plan["corpus"])).to_dict()
    plan = made | {"largest_micro_batch": agreed}
    if run.ranks.is_main:
        run.folder.plan.write_text(json.dumps(plan, indent=2))
        kept = {"planned": run.plan["largest_micro_batch"], "agreed": agreed, "chosen": plan["micro_batch"]} | found.to_dict()
        run.folder.micro_batch.write_text(json.dumps(kept, indent=2))
        console.print(_search_words(found, agreed, plan, run.ranks.device))
    facts = replace(run.facts, micro_batch=plan["micro_batch"])
    return replace(run, config=config, plan=plan, searches=False, facts=facts)


def _search_words(found: Found, agreed: int, plan: dict[str, Any], device: torch.device) -> str:
    tried = ", ".join(f"{t.sequences}: {gib(t.peak_bytes) if not t.out_of_memory else 'out of memory'}" for t in found.trials)
    what = "allocated on the device" if device.type == "cuda" else "of tensors"
    sure = "" if found.proven else ", perhaps more"
    limit = f"{gib(found.limit_bytes)} {what}"
    return (
        f"micro-batch: {agreed} sequences fit{sure} in {limit} ({len(found.trials)} probes: {tried}); "
        f"a step of {plan['step_tokens']:,} tokens is {plan['accumulation']} × {plan['micro_batch']} of them a rank"
    )


def checked(run: Run, loaded: LoadedModel, trainer: Trainer, attached: Attached | None) -> None:
    """Measure before the first step, if that is asked for (`training.preflight`), and say what was found.

    Raises:
        MemoryShortage: a step does not fit.
    """
    ranks, wanted = run.ranks, run.config.training.preflight
    if not (ranks.device.type == "cuda" if wanted is None else wanted):
        return
    if trainer.exchange.in_every_pass:
        if ranks.is_main:
            console.print("preflight: left out, a pass exchanges gradients here and cannot fail on one rank alone")
        return
    if run.folder.mid_step.is_dir():
        # A step that was cut off has shown what it takes, and its files may leave no room on the disk for others as large.
        return
    there = sum(v.nbytes for one in trainer.optimizer.state.values() for v in one.values() if isinstance(v, torch.Tensor))
    # Validation's executor has the bare model.
    held = max(0.0, run.plan["memory"]["optimizer_state"] - there)
    if ranks.device.type != "cuda":
        # Where nobody counts what is allocated, averages are known by name alone.
        held += sum(p.nbytes for p in loaded.trainable) * averages(run.decisions)
    mine = preflight(_subject(run, loaded, trainer.validator.executor, held, trainer.validator.sharing), attached, run.plan)
    found = Preflight(
        planned_bytes=mine.planned_bytes,
        measured_bytes=ranks.max(mine.measured_bytes),
        reserved_bytes=ranks.max(mine.reserved_bytes),
        usable_bytes=mine.usable_bytes,
        planned_step_s=mine.planned_step_s,
        step_s=ranks.max(mine.step_s),
        fits=ranks.max(float(not mine.fits)) == 0,
    )
    if not found.fits:
        seen = actual("", loaded.model, trainer.optimizer, ranks.device)
        raise shortage(
            run, replace(seen, allocated=found.measured_bytes, reserved=found.reserved_bytes), trainer.progress.step, "preflight: "
        )
    if ranks.is_main:
        run.folder.preflight.write_text(json.dumps(found.to_dict(), indent=2))
        reserved = f" ({gib(found.reserved_bytes)} reserved)" if found.reserved_bytes else ""
        console.print(
            f"preflight: planned {gib(found.planned_bytes)}, measured {gib(found.measured_bytes)}{reserved}, "
            f"step about {duration(found.step_s)}, planned {duration(found.planned_step_s)}"
        )


def warm(run: Run, loaded: LoadedModel, executors: Executors) -> float:
    """Carry a pass of the run's shape through, so that what the first use of a kernel takes is spent; its seconds."""
    # Validation's is around the bare model.
    return rehearse(_subject(run, loaded, executors.validation, 0.0, executors.sharing), run.plan["micro_batch"])


def shortage(run: Run, found: Actual, step: int, when: str = "") -> MemoryShortage:
    """The error to raise; the breakdown is printed, and kept in the run folder.

    Args:
        step: the last one that was finished.
    """
    last = checkpoint.latest(run.folder.checkpoints)
    saved = f"checkpoint {last.name} is intact" if last else "nothing had been saved yet"
    need = found.allocated + found.requested
    remedy = smaller(run.config, run.device, run.facts.model, run.plan["total_bytes"], found.allocated, need)
    usable = run.device.memory_usable_bytes
    where = when or (f"after step {step}, " if step else "before the first step, ")
    problem = (
        f"{where}out of memory: {gib(found.allocated)} held{f', {gib(found.requested)} more refused' if found.requested else ''}, "
        f"{gib(usable)} usable, {gib(run.plan['total_bytes'])} planned (most of it {largest(run.plan['memory'])}); {saved}"
    )
    error = MemoryShortage(problem, remedy)
    console.print(breakdown(run.plan["memory"], usable, found))
    kept = {"problem": problem, "remedy": remedy, "step": step, "checkpoint": last.name if last else None}
    kept_all = kept | {"planned": run.plan["memory"], "usable_bytes": usable, "actual": to_dict(found)}
    run.folder.failure.write_text(json.dumps(kept_all, indent=2))
    return error


def _subject(run: Run, loaded: LoadedModel, executor: Executor, held_bytes: float, sharing: Exchange | None) -> Subject:
    usable = run.device.memory_usable_bytes
    return Subject(
        executor=executor,
        compute_dtype=run.dtype,
        trainable=loaded.trainable,
        vocab=int(loaded.core.config.get_text_config().vocab_size),
        context=run.config.tier.context,
        device=run.ranks.device,
        # On a CPU only tensors are counted: what else the process takes needs the headroom.
        limit_bytes=usable if run.device.kind == "cuda" else usable * (1 - run.config.plan.headroom_fraction),
        held_bytes=held_bytes,
        sharing=sharing,
    )
