"""What `mode=` selects: one function each."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.prompt import Prompt

from elite import checkpoint, geometry, hardware, pretrained
from elite.compose import TIER_OPTIONS, Composed, from_overrides, options
from elite.config import Mode, RunConfig
from elite.console import console, start_logging
from elite.continued import FREE, among, changes, refusal, typed, with_values, words
from elite.data.batches import TrainStream
from elite.data.harvest import Harvest, estimate, harvest
from elite.data.sources import find_repositories
from elite.data.tokens import TokenStore, cached, tokenise
from elite.distributed.launch import ended_by, launch, saved
from elite.distributed.ranks import by_slurm, joined, launched, ranks_here
from elite.errors import CheckpointError, ConfigError, ModelError, PlanError
from elite.facts import NO_CORPUS, Corpus, Device, ModelShape
from elite.jsonfile import read_object
from elite.plan import (
    Plan,
    choose_tier,
    longest_contexts,
    make_plan,
    planned_on_all,
    render,
    render_longest,
    render_survey,
    render_tiers,
    survey,
)
from elite.plan.ablated import require_variation
from elite.plan.executors import least_bytes
from elite.plan.values import check_values
from elite.printable import one_line
from elite.redealt import redealt
from elite.runfolder import ANOTHER, RunFolder, interrupted_run, new_folder, request_key, write_request, write_start
from elite.schema import from_yaml


def run(composed: Composed) -> float | None:
    """Do what `mode` says; returns the best validation loss if that was to train."""
    start_logging()
    check_values(composed.config)
    return MODES[composed.config.mode](composed)


def plan(composed: Composed) -> None:
    """Print what the run would need and do; allocate nothing."""
    config = composed.config
    found = harvest(config.data, config.seed)
    tokenizer = pretrained.tokenizer(config.model, Path(config.output.cache).expanduser(), download=False)
    store = cached(found, tokenizer, Path(config.output.cache).expanduser()) if tokenizer else None
    device = _device(config)
    _, made, _ = _decide(composed, device, geometry.shape(config.model), found, store.corpus(found) if store else estimate(found))
    console.print(render(made))


def tiers(composed: Composed) -> None:
    """Print what every tier would take with this model and machine; no corpus, no GPU, no network."""
    device, shape = _device(composed.config), geometry.shape(composed.config.model)
    made = []
    for name in TIER_OPTIONS[1:]:
        config = composed.again(f"tier={name}").config
        least = least_bytes(config, device, shape) / (1 - config.plan.headroom_fraction)
        made.append((planned_on_all(config, device, shape, NO_CORPUS)[1], least))
    console.print(render_tiers(made, device))


def max_context(composed: Composed) -> None:
    """Print the longest context that fits, under each executor, with these switches."""
    device, shape = _device(composed.config), geometry.shape(composed.config.model)
    console.print(render_longest(longest_contexts(composed.config, device, shape), device, shape.name))


def optimizations(composed: Composed) -> None:
    """Print every optimization: what it is, whether it acts here, what it saves and costs; no corpus, no GPU, no network."""
    device, shape = _device(composed.config), geometry.shape(composed.config.model)
    config = composed.config
    if config.tier.name == "auto":
        # Without a corpus no tier has too little text.
        composed = composed.again("plan.min_sequences=0")
        candidates = ((name, composed.again(f"tier={name}").config) for name in reversed(TIER_OPTIONS[1:]))
        config, _, _ = choose_tier(candidates, device, shape, NO_CORPUS)
    console.print(render_survey(survey(config, device, shape)))


def lr_range(composed: Composed) -> None:
    """Train at rising learning rates on the run's own data and model; suggest one. No run is begun or changed."""
    config = composed.config
    device = _device(config)
    hardware.require_present(device, config.hardware)
    if launched() or device.count > 1:
        raise ConfigError(f"mode=lr_range runs in one process, not on {device.count} ranks", "hardware.gpus=1, without a launcher")
    resolved, made, name, store = _settled(composed, device, harvest(config.data, config.seed))
    output = resolved.output
    # Inside a folder that was asked for: a run may take that one afterwards.
    apart = replace(output, folder=str(Path(output.folder) / "lr_range") if output.folder else None)
    folder = new_folder(replace(resolved, output=apart), f"{name}-lr_range", datetime.now())
    write_request(folder, resolved, made.to_dict(), device)
    from elite.bench.lr_range import lr_range as test

    test(folder, store)


def train(composed: Composed) -> float | None:
    """Plan, then train: in child processes, or in this one if a launcher started it as one of several.

    Returns:
        The best validation loss; None in a process that is one of several.
    """
    if launched():
        from elite import worker

        with joined() as ranks:
            request = composed.again(f"hardware.gpus={ranks.world}")
            folder = RunFolder(ranks.broadcast(_prepare(request)[0].path if ranks.is_main else None))
            if not folder.identity.is_file():
                problem = f"rank {ranks.rank} does not see the run folder {folder.path} that rank 0 has made"
                raise ConfigError(problem, "output.root= and output.cache= on a file system that all machines share")
            try:
                worker.train(folder, ranks)
            except worker.Interrupted as error:
                raise ended_by(error.number, saved(error.step)) from error
        return None
    folder, processes = _prepare(composed)
    if not folder.finished:
        launch(folder.path, processes)
    return folder.best_val_loss()


def uptrain(composed: Composed) -> float | None:
    """Convert the model to fewer key/value heads and train what was converted; report the loss before, after, and at the end."""
    return train(composed.again("adapter.method=converted", "optimizations.gqa_conversion.enabled=true"))


def interactive(composed: Composed) -> float | None:
    """Ask for the main choices, defaults from the configuration, then train."""
    if not console.is_terminal:
        raise ConfigError("mode=interactive needs a terminal", "give the choices as overrides: tier=… model=… data.repo=…")
    config = composed.config
    repositories = [str(path) for path in find_repositories(Path.cwd())]
    asked = {
        "data.repo": Prompt.ask("Repository", default=config.data.repo or (repositories[0] if repositories else ".")),
        "model": Prompt.ask("Model", choices=options("model"), default=config.model.name),
        "hardware": Prompt.ask("Hardware", choices=options("hardware"), default=config.hardware.name),
        "tier": Prompt.ask("Context", choices=TIER_OPTIONS, default=config.tier.name),
        "name": Prompt.ask("Name of the run", default=config.name or "run"),
        "output.root": Prompt.ask("Output folder", default=config.output.root),
    }
    answers = [f"{key}={_quoted(value)}" for key, value in asked.items()]
    console.print("python train.py " + " ".join(answers), markup=False)
    return train(composed.again("mode=train", *answers))


def probe(composed: Composed) -> None:
    """Run and time a few chunks of a streamed step; report its real peak and its extrapolated time."""
    from elite.bench.probe import probe as measure

    measure(composed.config)


def profile(composed: Composed) -> None:
    """Measure what this machine sustains, and keep it for its plans."""
    config = composed.config
    device = hardware.device(config.hardware)
    hardware.require_present(device, config.hardware)
    from elite.bench.stress import profile_machine

    profile_machine(config, device)


def calibrate(composed: Composed) -> None:
    """Measure a seeded grid of configurations on this machine, each beside its plan; report how far the plans are off."""
    from elite.bench.calibrate.grid import calibrate as measure

    measure(composed.config)


def evaluate(composed: Composed) -> None:
    """Score a run's last weights, or the base model, on held-out files, and continue some of them."""
    config = composed.config
    if launched():
        raise ConfigError("mode=evaluate runs in one process", "python train.py mode=evaluate, without torchrun")
    if config.evaluate.run is None:
        folder, _ = _prepare(replace(composed, config=replace(config, resume="never")))
    else:
        folder = RunFolder(Path(config.evaluate.run).expanduser().absolute())
        if not folder.identity.is_file():
            raise ConfigError(f"evaluate.run={config.evaluate.run}: this folder holds no run", "the folder that a run printed")
    from elite import evaluation

    with joined() as ranks:
        evaluation.evaluate(folder, config.evaluate, config.optimizations, ranks)


MODES: dict[Mode, Callable[[Composed], float | None]] = {
    Mode.plan: plan,
    Mode.tiers: tiers,
    Mode.max_context: max_context,
    Mode.train: train,
    Mode.profile: profile,
    Mode.probe: probe,
    Mode.calibrate: calibrate,
    Mode.optimizations: optimizations,
    Mode.lr_range: lr_range,
    Mode.uptrain: uptrain,
    Mode.evaluate: evaluate,
    Mode.interactive: interactive,
}


def _device(config: RunConfig) -> Device:
    """The machine to plan for, at the rates that were measured on it if it is here and they were."""
    return hardware.device(config.hardware, cache=Path(config.output.cache).expanduser())


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _prepare(composed: Composed) -> tuple[RunFolder, int]:
    """A run folder ready to train in, new or interrupted, and the number of processes."""
    config = composed.config
    device = _device(config)
    # srun may show each process its own card alone.
    hardware.require_present(device, config.hardware, local=1 if by_slurm() else ranks_here() if launched() else None)
    found = harvest(config.data, config.seed)
    request = request_key(config, found.origin)
    again = composed.job is not None and config.resume == "auto"
    interrupted = _of_job(Path(composed.job or ""), request) if again else _to_resume(config, request)
    if interrupted is not None and interrupted.finished:
        console.print(f"finished before: {interrupted.path}", markup=False)
        return interrupted, device.count
    if interrupted is not None:
        _take_over(interrupted, composed, device)
        console.print(f"continuing the interrupted run in {interrupted.path} (resume=never starts anew)", markup=False)
        return interrupted, device.count
    require_variation(composed.config, device, geometry.shape(composed.config.model))
    resolved, made, name, store = _settled(composed, device, found)
    folder = new_folder(resolved, name, datetime.now())
    write_start(folder, resolved, made.to_dict(), device, request, store.folder)
    console.print(f"run folder: {folder.path}", markup=False)
    return folder, device.count


def _settled(composed: Composed, device: Device, found: Harvest) -> tuple[RunConfig, Plan, str, TokenStore]:
    """The run with its plan, which is printed, its name, and its tokens.

    Raises:
        PlanError: it does not fit.
    """
    shape = geometry.shape(composed.config.model)
    store = _tokens(composed.config, found, shape.vocab_size)
    resolved, made, name = _decide(composed, device, shape, found, store.corpus(found))
    console.print(render(made))
    console.print(_packing(resolved, store))
    if not made.fits:
        needs = f"it needs {made.total_bytes / 2**30:.2f} GiB of {made.usable_bytes / 2**30:.2f} GiB usable"
        raise PlanError(f"{name} does not fit: {needs} ({made.shortage})", made.fix)
    return resolved, made, name, store


def _packing(config: RunConfig, store: TokenStore) -> str:
    """How well the sequences are filled; raises where the corpus has too little text for one."""
    packed = config.optimizations.sequence_packing.enabled
    stream = TrainStream(store, config.data, config.tier.context, config.training.sequences, config.seed, packed)
    return f"{stream.sequences_per_epoch:,} sequences an epoch, {stream.utilisation:.1%} of their tokens are text"


def _to_resume(config: RunConfig, request: str) -> RunFolder | None:
    """The run that `resume` asks to continue.

    Raises:
        CheckpointError: it names a folder that holds no interrupted run.
    """
    if config.resume == "never":
        return None
    if config.resume != "auto":
        folder = RunFolder(Path(config.resume).expanduser().absolute())
        if not folder.resumable:
            state = "has ended well" if folder.finished else "is in use by another process" if folder.begun else "holds no checkpoint"
            raise CheckpointError(
                f"resume={config.resume}: this folder {state}", "resume=auto, resume=never or the folder of an interrupted run"
            )
        return folder
    if config.output.folder is not None:
        folder = RunFolder(Path(config.output.folder).expanduser().absolute())
        return folder if folder.resumable and folder.asked_for(request) else None
    return interrupted_run(Path(config.output.root).expanduser().absolute(), request)


def _take_over(folder: RunFolder, composed: Composed, device: Device) -> None:
    """What this command changes in the run that goes on, which is said.

    Raises:
        CheckpointError: it cannot go on so.
    """
    begun, now = from_yaml(folder.config), composed.config
    plan = read_object(folder.plan, CheckpointError, ANOTHER)
    ranks = plan.get("ranks", device.count)
    dealt = redealt(begun, plan, device, geometry.shape(begun.model)) if ranks != device.count else None
    says = _may_change if now.resume == "auto" else typed(now, from_overrides().config, composed.overrides)
    taken, refused = changes(begun, now, says)
    if refused:
        raise CheckpointError(f"resume={now.resume}: {refusal(refused)}", "leave them out, or begin a new run: resume=never")
    if dealt is not None:
        begun, plan = dealt
        # A start that is cut off in between deals anew.
        folder.rewrite_config(begun)
        checkpoint.write_text(folder.plan, json.dumps(plan, indent=2))
        said = f"a step is dealt to {plan['ranks']} ranks, not {ranks}: {plan['accumulation']} × {plan['micro_batch']} sequences each"
        console.print(said, markup=False)
    if taken:
        folder.rewrite_config(with_values(begun, taken))
        console.print(f"from here on: {', '.join(words(name, value) for name, value in taken.items())}", markup=False)


def _may_change(name: str) -> bool:
    # The rest of a command that found its run by itself is that of the run.
    return among(name, FREE)


def _of_job(job: Path, request: str) -> RunFolder | None:
    """What an earlier start of the same multirun left in this job's folder, finished or to go on; None if it is to begin."""
    folder = RunFolder(job)
    if not folder.asked_for(request):
        return None
    if folder.finished or folder.begun:
        return folder
    folder.begin_again()
    return None


def _tokens(config: RunConfig, found: Harvest, vocab_size: int) -> TokenStore:
    cache = Path(config.output.cache).expanduser()
    tokenizer: Any = pretrained.tokenizer(config.model, cache, download=True)
    if tokenizer is None:
        raise ConfigError(f"model={config.model.name} names no hub id, folder or package", "model.path=FOLDER")
    if len(tokenizer) > vocab_size:
        raise ModelError(f"the tokenizer has {len(tokenizer):,} tokens, the model {vocab_size:,}", "model.vocab_size= that many at least")
    return tokenise(found, tokenizer, cache)


def _decide(composed: Composed, device: Device, shape: ModelShape, found: Harvest, corpus: Corpus) -> tuple[RunConfig, Plan, str]:
    """The configuration with its tier settled, its plan, and the run's name."""
    for note in found.notes:
        console.print(one_line(note), markup=False)
    config = composed.config
    if config.tier.name == "auto":
        candidates = ((name, composed.again(f"tier={name}").config) for name in reversed(TIER_OPTIONS[1:]))
        config, made, reason = choose_tier(candidates, device, shape, corpus)
        console.print(f"tier=auto: {config.tier.name}. {reason}", markup=False)
    else:
        made = make_plan(config, device, shape, corpus)
    return config, made, config.name or f"{made.model}-{config.tier.name}"
